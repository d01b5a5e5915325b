"""Streams that are opened and held while the gateway is looked at: memory at each level, then CPU per chunk.

The one rule: each level is looked at only when all of its streams have begun, and what came is right as far as it came.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from bench.checking import Reply, WrongReply, check_start
from bench.figures import Figures, Watch, as_line
from bench.job import Job

Json = dict[str, Any]
BEGIN = 60.0  # seconds for all streams of a level to begin
SETTLE = 0.5


class Held(asyncio.Protocol):
    """One stream that is held open. begun: set at its first chunk."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.reply = Reply()
        self.chunks = 0
        self.lost = False
        self.begun = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.lost |= self.reply.feed(data, time.monotonic_ns())
        self.chunks += data.count(b" token")
        if self.chunks and not self.begun.done():
            self.begun.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.begun.done():
            self.begun.set_result(None)

    def fault(self) -> str | None:
        if self.lost:
            return f"a stream ended: {b''.join(self.reply.reads)[:300]!r}"
        try:
            check_start(self.reply)
        except WrongReply as wrong:
            return str(wrong)
        return None


async def held(job: Job) -> Json:
    """Streams held open level after level. Memory at each level, then CPU per chunk for `seconds` at the last."""
    loop, requests = asyncio.get_running_loop(), job.written()
    streams: list[Held] = []
    memory = {0: Watch(job).resident()}
    for level in job.levels:
        while len(streams) < level:
            _, stream = await loop.create_connection(lambda: Held(next(requests)), "127.0.0.1", job.port)
            streams.append(stream)
        await asyncio.wait([stream.begun for stream in streams], timeout=BEGIN)
        await asyncio.sleep(SETTLE)
        memory[level] = Watch(job).resident()
    watch, before = Watch(job), sum(stream.chunks for stream in streams)
    await asyncio.sleep(job.seconds)
    spent = watch.spent()
    chunks = sum(stream.chunks for stream in streams) - before
    wrong = [fault for stream in streams if (fault := stream.fault())]
    for stream in streams:
        stream.transport.abort()
    line = as_line(Figures(wrong=wrong, chunks=chunks), spent)
    return {**line, "ok": len(streams) - len(wrong), "resident_at_mb": {level: size / 1e6 for level, size in memory.items()}}
