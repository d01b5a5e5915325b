"""The load generator: one job, given as JSON, answered by one line of JSON.

    python -m bench.load '{"port": 8080, "model": "openai/bench-100-0", "clients": 32, "seconds": 3, "watch": PID}'

Strategy: a closed loop of clients, each a bare asyncio protocol that asks again when its reply is whole; or, for a job with
`levels`, streams that are held open (`bench.held`); with `together`, a great many at once (`bench.many`).
The one rule: a reply that is not right in every way (`bench.checking`) is counted as wrong and as nothing else.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, cast

import uvloop

from bench import said
from bench.checking import Reply, WrongReply, check
from bench.figures import Figures, Watch, as_line
from bench.held import held
from bench.job import Job, read
from bench.many import many

Json = dict[str, Any]
GRACE = 60.0  # seconds for the replies that are under way when the time is over
SAMPLE = 0.25  # seconds between looks at the memory


class Loop:
    """The state that the clients of a closed loop share: what is left to do, and what was seen."""

    def __init__(self, job: Job) -> None:
        self.job, self.wanted, self.figures = job, job.wanted, Figures()
        self.gap = said.shape(job.model)[1] * 1_000_000
        self._requests = job.written()
        self._left = job.requests or sys.maxsize
        self._until = time.monotonic() + job.seconds if job.seconds else float("inf")

    def next(self, *, first: bool = False) -> bytes | None:
        """A client's next request. Its first one is asked however late it is, so that all clients take part."""
        if self._left <= 0 or (not first and time.monotonic() >= self._until):
            return None
        self._left -= 1
        return next(self._requests)


class Client(asyncio.Protocol):
    """One connection of a closed loop. done: set when it has no more to ask, or its connection is lost."""

    def __init__(self, shared: Loop) -> None:
        self._shared = shared
        self._reply: Reply | None = None
        self._seen = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._ask(first=True)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            self._shared.figures.wrong.append(f"bytes that nobody asked for: {data[:100]!r}")
            self._transport.abort()
        elif reply.feed(data, time.monotonic_ns()):
            self._take(reply)
            self._ask()

    def _ask(self, *, first: bool = False) -> None:
        self._reply = None
        if (request := self._shared.next(first=first)) is None:
            self._transport.close()
            return
        self._reply, self._asked = Reply(), time.monotonic_ns()
        self._transport.write(request)

    def _take(self, reply: Reply) -> None:
        shared = self._shared
        try:
            check(reply, shared.wanted, thorough=self._seen < 2)
            shared.figures.add(reply, self._asked, shared.wanted, shared.gap)
        except WrongReply as wrong:
            shared.figures.wrong.append(str(wrong))
        self._seen += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply is not None:
            self._shared.figures.wrong.append(f"the connection was lost: {exc}")
        if not self.done.done():
            self.done.set_result(None)


async def closed_loop(job: Job) -> Json:
    shared = Loop(job)
    watch = Watch(job)
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    for _ in range(job.clients):
        _, client = await loop.create_connection(lambda: Client(shared), "127.0.0.1", job.port)
        clients.append(client)
    waiting = asyncio.gather(*(client.done for client in clients))
    limit = time.monotonic() + job.seconds + GRACE
    while not waiting.done() and time.monotonic() < limit:
        await asyncio.wait([waiting], timeout=SAMPLE)
        shared.figures.resident.append(watch.resident())
    if not waiting.done():
        shared.figures.wrong.append(f"replies not at their end {GRACE:.0f} s later")
    return as_line(shared.figures, watch.spent())


if __name__ == "__main__":
    job = read(sys.argv[1])
    print(json.dumps(uvloop.run((held if job.levels else many if job.together else closed_loop)(job))))
