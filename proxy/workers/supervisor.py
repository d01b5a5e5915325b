"""The first process of several: it starts the workers, starts those that end again, and passes on that it is to stop.

Strategy: processes, their ends and waiting for them are the standard library's (`multiprocessing`, forked, so that a worker is
there within a moment and shares the memory of what was imported); timers are `sched`'s. One loop waits for whatever comes first:
a worker's end, a worker's sign of life, a signal, a timer. No thread, no event loop: it must stay safe to fork.
Workers are told by signals: SIGTERM drains, SIGQUIT does not wait, SIGHUP says that there is a notice about config.yaml. They may
come any number of times, from anybody: systemd and a terminal signal the whole group. The file is watched and checked here.
The one rule: whoever has forked closes in the child what belongs to the parent, before anything else runs.
"""

from __future__ import annotations

import multiprocessing
import os
import sched
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from proxy.app import bound, cannot_listen, greet, settle_memory
from proxy.config import Config, ConfigError
from proxy.configfile import ConfigFile
from proxy.reload import POLL_SECONDS
from proxy.workers.listening import Ports
from proxy.workers.notice import Notice, post
from proxy.workers.restarts import Restarts
from proxy.workers.worker import Place, work

STOPS = (signal.SIGINT, signal.SIGTERM)
SILENT_SECONDS = 30.0  # a worker whose loop stood still for so long is killed
SPARE_SECONDS = 10.0  # what a worker may take for its end beyond what the config allows


def supervise(config: Config, file: ConfigFile | None = None) -> int:
    """Serve with `config.server.workers` processes until Ctrl-C or SIGTERM, then drain. file: where the config is from.

    The exit status: 0, or 1 where the port cannot be listened on, a worker could not start, or ended again and again.
    """
    try:
        ports = Ports(lambda: bound(config), config.server.workers)
    except OSError as error:
        return cannot_listen(config, error)
    return Supervisor(config, ports, file=file).run()


@dataclass
class Slot:
    """One worker's place. heard: when it last gave a sign of life. ready: it has served."""

    number: int
    restarts: Restarts
    process: BaseProcess | None = None
    heard: float = 0.0
    ready: bool = False


class Supervisor:
    """See above. restarts: makes the policy of each worker. do: what a worker does; its result is its exit status. file: None
    where the config cannot change.
    """

    def __init__(
        self,
        config: Config,
        ports: Ports,
        restarts: Callable[[], Restarts] = Restarts,
        do: Callable[[Config, Place], int] = work,
        silent: float = SILENT_SECONDS,
        file: ConfigFile | None = None,
    ) -> None:
        self._config = config
        self._file = file
        self._notice = Notice(0, 1)
        self._ports = ports
        self._do = do
        self._silent = silent
        self._slots = [Slot(number, restarts()) for number in range(config.server.workers)]
        self._timers = sched.scheduler(time.monotonic)
        self._stopping = self._greeted = False
        self._status = 0

    def run(self) -> int:
        """Until all workers have ended. Returns the exit status."""
        self._directory = tempfile.mkdtemp(prefix="penstock-")
        # The workers hold the reading end: it ends when this process does, however it does.
        self._lifeline, self._life = os.pipe()
        self._heard, self._beats = os.pipe()
        settle_memory()
        try:
            with _signals(self._file is not None) as self._signals:
                self._watch()
                self._look()
                for slot in self._slots:
                    self._start(slot)
                while not self._done():
                    self._turn()
        finally:
            self._kill()
            self._ports.close_all()
            for end in (self._lifeline, self._life, self._heard, self._beats):
                os.close(end)
            shutil.rmtree(self._directory, ignore_errors=True)
        return self._status

    def _done(self) -> bool:
        return self._stopping and not any(slot.process for slot in self._slots)

    def _turn(self) -> None:
        """Wait for whatever comes first, and do what it asks for."""
        rest = self._timers.run(blocking=False)
        running = [slot.process.sentinel for slot in self._slots if slot.process]
        found = wait([*running, self._heard, self._signals], rest)
        if self._heard in found:
            # Before the ends: what is still in the pipe must not pass for a sign of the successor.
            self._listen(os.read(self._heard, 4096))
        if self._signals in found:
            for number in os.read(self._signals, 4096):
                self._signalled(number)
        for slot in self._slots:
            if slot.process is not None and slot.process.sentinel in found:
                self._ended(slot, slot.process)

    # Workers

    def _start(self, slot: Slot) -> None:
        if self._stopping:
            return None
        try:
            sockets = self._ports.of(slot.number)
        except OSError as error:
            self._say(f"worker {slot.number} cannot listen: {error.strerror or error}")
            return self._give_up()
        place = Place(slot.number, self._directory, sockets, self._beats, self._lifeline, self._notice.number, self._file)
        slot.ready, slot.heard = False, time.monotonic()
        slot.process = multiprocessing.get_context("fork").Process(target=self._child, args=(slot, place))
        # A signal that comes while the child still has this process's handlers would be lost.
        with _held():
            slot.process.start()

    def _child(self, slot: Slot, place: Place) -> None:
        """In the new process."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._ports.keep_only(slot.number)
        for end in (self._life, self._heard):
            os.close(end)
        sys.exit(self._do(self._config, place))

    def _ended(self, slot: Slot, process: BaseProcess) -> None:
        process.join()
        pid, how = process.pid, _how(process.exitcode or 0)
        process.close()
        slot.process = None
        if self._stopping:
            return None
        if not self._greeted and not slot.ready:
            self._say(f"worker {slot.number} could not start ({how})")
            return self._give_up()
        delay = slot.restarts.after(time.monotonic())
        if delay is None:
            self._say(f"worker {slot.number} ended {slot.restarts.recent} (at last: {how}); giving up")
            return self._give_up()
        self._say(f"worker {slot.number} (pid {pid}) ended ({how}); the next one starts {f'in {delay:g} s' if delay else 'now'}")
        if delay:
            self._ports.close(slot.number)
        self._timers.enter(delay, 0, self._start, (slot,))

    def _listen(self, beats: bytes) -> None:
        """Each byte is the number of a worker that is alive and serves."""
        for number in set(beats):
            self._slots[number].heard = time.monotonic()
            self._slots[number].ready = True
        if not self._greeted and all(slot.ready for slot in self._slots):
            self._greeted = True
            greet(self._config, self._ports.port)

    def _watch(self) -> None:
        """Kill who gives no sign of life."""
        for slot in self._slots:
            if slot.process is not None and time.monotonic() - slot.heard > self._silent:
                self._say(f"worker {slot.number} (pid {slot.process.pid}) has stood still for {self._silent:g} s")
                slot.process.kill()
        self._timers.enter(self._silent / 30, 0, self._watch)

    # The config

    def _look(self) -> None:
        """Once per second: has the file changed?"""
        if self._file is not None and not self._stopping:
            if self._config.server.watch and self._file.settled():
                self._reload(self._file)
            self._timers.enter(POLL_SECONDS, 0, self._look)

    def _reload(self, file: ConfigFile) -> None:
        """Check the file; if it is right it is that of workers to come, and those that run are told to follow."""
        before = self._notice
        try:
            text = file.read()
            config, kept = file.parse(text, self._config)
        except ConfigError as error:
            self._say("config not reloaded, the earlier one is still served:")
            for fault in error.faults:
                self._say(f"  {fault}")
            self._post(Notice(before.serial + 1, before.number, before.text, error.faults))
        else:
            if self._post(Notice(before.serial + 1, before.number + 1, text)):
                self._config = config
                self._say(f"config {before.number + 1} goes to {len(self._slots)} workers")
                if kept:
                    self._say(f"until a restart these stay as they were: {', '.join(kept)}")

    def _post(self, notice: Notice) -> bool:
        """Tell the workers; could they be told?"""
        try:
            post(self._directory, notice)
        except OSError as error:
            self._say(f"the workers cannot be told of the config: {error.strerror or error}")
            return False
        self._notice = notice
        self._tell(signal.SIGHUP)
        return True

    # The end

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP and self._file is not None and not self._stopping:
            self._reload(self._file)
        elif number in STOPS and not self._stopping:
            self._say(f"draining {len(self._slots)} workers")
            self._stop()
        elif number in STOPS:
            self._tell(signal.SIGQUIT)

    def _give_up(self) -> None:
        self._status = 1
        self._stop()

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._tell(signal.SIGTERM)
            server = self._config.server
            self._timers.enter(server.drain_delay, 0, self._ports.close_all)
            self._timers.enter(server.drain_delay + server.drain_timeout + SPARE_SECONDS, 0, self._kill)

    def _tell(self, number: int) -> None:
        for slot in self._slots:
            if slot.process is not None and slot.process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(slot.process.pid, number)

    def _kill(self) -> None:
        for slot in self._slots:
            if slot.process is not None:
                slot.process.kill()

    def _say(self, text: str) -> None:
        print(f"penstock: {text}", file=sys.stderr, flush=True)


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


@contextmanager
def _signals(reloads: bool) -> Iterator[int]:
    """A pipe's end from which the numbers of the signals that have come can be read."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    heard = (*STOPS, signal.SIGHUP) if reloads else STOPS
    before = {number: signal.signal(number, lambda number, frame: None) for number in heard}
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


@contextmanager
def _held() -> Iterator[None]:
    """Signals wait, in this process until the end, in a child until it lets them in."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPS, signal.SIGQUIT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
