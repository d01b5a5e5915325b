"""One worker's process: a whole gateway on sockets that the supervisor gave, and what ties it to the others.

Signals: SIGTERM drains, SIGQUIT does not wait (any longer); SIGINT is the supervisor's business. The supervisor's own end,
however it comes, is the end of a pipe, and drains, too.
The one rule: it says that it lives from within its event loop, so a loop that stands still is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from dataclasses import dataclass

from proxy import logs
from proxy.app import Gateway, event_loop, settle_memory
from proxy.config import Config
from proxy.workers.listening import Bound, leave
from proxy.workers.siblings import Siblings

BEAT_SECONDS = 1.0
HAND_OVER_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where a worker stands. number: from 0. directory: the workers' private one. beats: a pipe to the supervisor, for one's own
    number as a byte. lifeline: a pipe that ends with the supervisor.
    """

    number: int
    directory: str
    sockets: Bound
    beats: int
    lifeline: int


def work(config: Config, place: Place) -> int:
    """The worker's life; its exit status."""
    flush = logs.configure()
    try:
        with event_loop() as runner:
            runner.run(_serve(config, place))
    finally:
        flush()
    return 0


async def _serve(config: Config, place: Place) -> None:
    told = _Told(place)
    siblings = Siblings(place.directory, place.number, config.server.workers)
    async with (
        Gateway(config, worker=place.number, sockets=place.sockets, ask=siblings.ask) as gateway,
        siblings.answering(gateway.edge.point),
    ):
        settle_memory()
        beating = asyncio.create_task(_beat(place))
        handing = asyncio.create_task(_hand_over(siblings))
        await told.stop.wait()
        draining = asyncio.create_task(gateway.drain(lambda: leave(place.sockets)))
        hurrying = asyncio.create_task(told.hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurrying, handing, beating):
            task.cancel()
        await asyncio.gather(draining, hurrying, handing, beating, return_exceptions=True)
        await siblings.hand_over()
    if told.orphaned:
        shutil.rmtree(place.directory, ignore_errors=True)


class _Told:
    """What the worker has been told. stop: drain. hurry: do not wait. orphaned: the supervisor is no more."""

    def __init__(self, place: Place) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.orphaned = False
        self._lifeline = place.lifeline
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        loop.add_signal_handler(signal.SIGQUIT, self._quit)
        loop.add_reader(place.lifeline, self._orphan)
        # Held since before the fork, when the handlers were another's.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT))

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


async def _hand_over(siblings: Siblings) -> None:
    while True:
        await asyncio.sleep(HAND_OVER_SECONDS)
        await siblings.hand_over()
