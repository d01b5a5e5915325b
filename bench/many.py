"""Many streams open at once: all are opened, one shortly after the other, and read to their ends.

Strategy: the streams last so much longer than it takes to open them that for a while all are open; how many really were is
counted (`open_at_once`), and memory is looked at all the while. Connections come from several loopback addresses, because one
has only so many ports.
The one rule: a stream that is not whole and right (`bench.checking`) is a wrong one, like one that was over before all were open.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, cast

from bench import said
from bench.checking import Reply, Wanted, WrongReply, check
from bench.figures import Figures, Watch, as_line
from bench.job import Job

Json = dict[str, Any]
ADDRESSES = [f"127.0.0.{number}" for number in range(2, 10)]
AT_A_TIME = 50
PER_SECOND = 1500
GRACE = 60.0
SAMPLE = 0.5


class One(asyncio.Protocol):
    """One stream, from its request to its end."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request, self._tally = request, tally
        self.reply = Reply()
        self.asked = 0
        self.whole = self.begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.asked = time.monotonic_ns()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.begun and b" token" in data:
            self.begun = True
            self._tally.begin()
        if self.reply.feed(data, time.monotonic_ns()):
            self.whole = True
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.end(self.begun)

    def fault(self, wanted: Wanted) -> str | None:
        if not self.whole:
            return f"a stream was lost after {self.reply.size} bytes: {b''.join(self.reply.reads)[-200:]!r}"
        try:
            check(self.reply, wanted)
        except WrongReply as wrong:
            return str(wrong)
        return None


class Tally:
    """How many streams are open now, and were at most. over: set when all `left` have ended."""

    def __init__(self, left: int) -> None:
        self.open = self.most = 0
        self._left = left
        self.over = asyncio.Event()

    def begin(self) -> None:
        self.open += 1
        self.most = max(self.most, self.open)

    def end(self, begun: bool) -> None:
        self.open -= begun
        self._left -= 1
        if not self._left:
            self.over.set()


async def many(job: Job) -> Json:
    """`clients` streams at once: memory, CPU per chunk, and what was wrong."""
    count, pause = said.shape(job.model)
    watch, tally, figures = Watch(job), Tally(job.clients), Figures()
    before = watch.resident()
    streams = await _opened(job, tally)
    limit = time.monotonic() + count * pause / 1000 + GRACE
    while not tally.over.is_set() and time.monotonic() < limit:
        figures.resident.append(watch.resident())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SAMPLE):
                await tally.over.wait()
    spent = watch.spent()
    for stream in streams:
        if fault := stream.fault(job.wanted):
            figures.wrong.append(fault)
        else:
            figures.add(stream.reply, stream.asked, job.wanted, pause * 1_000_000)
    if tally.most < job.clients:
        figures.wrong.append(f"at most {tally.most} of {job.clients} streams were open at once")
    return {**as_line(figures, spent), "open_at_once": tally.most, "resident_before_mb": before / 1e6}


async def _opened(job: Job, tally: Tally) -> list[One]:
    loop, requests = asyncio.get_running_loop(), job.written()
    streams: list[One] = []
    began = loop.time()
    while len(streams) < job.clients:
        some = [One(next(requests), tally) for _ in range(min(AT_A_TIME, job.clients - len(streams)))]
        await asyncio.gather(*(_connected(loop, one, job.port, len(streams) + n) for n, one in enumerate(some)))
        streams += some
        await asyncio.sleep(began + len(streams) / PER_SECOND - loop.time())
    return streams


async def _connected(loop: asyncio.AbstractEventLoop, one: One, port: int, number: int) -> None:
    await loop.create_connection(lambda: one, "127.0.0.1", port, local_addr=(ADDRESSES[number % len(ADDRESSES)], 0))
