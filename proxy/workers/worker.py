"""One worker's process: a whole gateway on sockets that the supervisor gave, and what ties it to the others.

Signals: SIGTERM drains, SIGQUIT does not wait (any longer), SIGHUP: there is a notice about config.yaml; SIGINT is the
supervisor's business. The supervisor's own end,
however it comes, is the end of a pipe, and drains, too.
The one rule: it says that it lives from within its event loop, so a loop that stands still is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass

from proxy import logs
from proxy.app import Gateway, event_loop, settle_memory
from proxy.config import Config, ConfigError
from proxy.configfile import ConfigFile
from proxy.reload import Reloader
from proxy.workers.listening import Bound, leave
from proxy.workers.notice import posted
from proxy.workers.siblings import Siblings

BEAT_SECONDS = 1.0
HAND_OVER_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where a worker stands. number: from 0. directory: the workers' private one. beats: a pipe to the supervisor, for one's own
    number as a byte. lifeline: a pipe that ends with the supervisor. config: the number of the config that it starts with. file:
    where that is from, None where it cannot change.
    """

    number: int
    directory: str
    sockets: Bound
    beats: int
    lifeline: int
    config: int = 1
    file: ConfigFile | None = None


def work(config: Config, place: Place) -> int:
    """The worker's life; its exit status."""
    flush = logs.configure()
    try:
        with event_loop() as runner:
            runner.run(_serve(config, place))
    except ConfigError as error:
        print(f"penstock: worker {place.number}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        flush()
    return 0


async def _serve(config: Config, place: Place) -> None:
    told = _Told(place)
    siblings = Siblings(place.directory, place.number, config.server.workers)
    async with (
        Gateway(config, worker=place.number, number=place.config, sockets=place.sockets, ask=siblings.ask) as gateway,
        siblings.answering(gateway.edge.point),
    ):
        settle_memory()
        beating = asyncio.create_task(_beat(place))
        handing = asyncio.create_task(_hand_over(siblings))
        following = asyncio.create_task(_follow(gateway, place, told.bell))
        await told.stop.wait()
        following.cancel()
        draining = asyncio.create_task(gateway.drain(lambda: leave(place.sockets)))
        hurrying = asyncio.create_task(told.hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurrying, handing, beating):
            task.cancel()
        await asyncio.gather(draining, hurrying, handing, beating, following, return_exceptions=True)
        await siblings.hand_over()
    if told.orphaned:
        shutil.rmtree(place.directory, ignore_errors=True)


class _Told:
    """What the worker has been told. stop: drain. hurry: do not wait. bell: there is a notice. orphaned: the supervisor died."""

    def __init__(self, place: Place) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.bell = asyncio.Event()
        self.orphaned = False
        self._lifeline = place.lifeline
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        loop.add_signal_handler(signal.SIGQUIT, self._quit)
        if place.file is not None:
            loop.add_signal_handler(signal.SIGHUP, self.bell.set)
        loop.add_reader(place.lifeline, self._orphan)
        # Held since before the fork, when the handlers were another's.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP))

    def _quit(self) -> None:
        self.hurry.set()
        self.stop.set()

    def _orphan(self) -> None:
        asyncio.get_running_loop().remove_reader(self._lifeline)
        self.orphaned = True
        self.stop.set()


async def _beat(place: Place) -> None:
    with contextlib.suppress(BrokenPipeError):
        while True:
            os.write(place.beats, bytes([place.number]))
            await asyncio.sleep(BEAT_SECONDS)


async def _follow(gateway: Gateway, place: Place, bell: asyncio.Event) -> None:
    """Do what each notice says. Several signals may have been one, and some are from others: what counts is the notice."""
    if place.file is None:
        return
    reloader, notice = Reloader(gateway, place.file), posted(place.directory)
    seen = notice.serial if notice is not None else 0
    while True:
        await bell.wait()
        bell.clear()
        if (notice := posted(place.directory)) is None:
            continue
        if notice.faults and notice.serial > seen:
            gateway.record.refused(notice.faults)
        if notice.number > gateway.record.number:
            await reloader.follow(notice.text, notice.number)
        seen = notice.serial


async def _hand_over(siblings: Siblings) -> None:
    while True:
        await asyncio.sleep(HAND_OVER_SECONDS)
        await siblings.hand_over()
