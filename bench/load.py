"""The load generator: one job, given as JSON, answered by one line of JSON.

    python -m bench.load '{"port": 8080, "model": "openai/bench-100-0", "clients": 32, "seconds": 3, "watch": PID}'

Strategy: a closed loop of clients, each a bare asyncio protocol that asks again when its reply is whole and right; or, with
`levels`, streams that are opened and held while the gateway is looked at. Requests are made once, replies are checked by
`bench.checking`, CPU time and memory of the watched processes come from the kernel.
The one rule: it says when it was the bottleneck. Provider and load generator share a core; above 90 % of it, rates are theirs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import uvloop

from bench import kernel, said
from bench.checking import Reply, Wanted, WrongReply, check, check_start

Json = dict[str, Any]
KEY = "sk-bench-3f1c9a7e5b2d8046f0a1b2c3d4e5f607"  # what every request carries, for gateways that look at it
BUSY = 0.9
GRACE = 60.0  # seconds for the replies that are under way when the time is over
SAMPLE = 0.25
SETTLE = 0.5
PARAGRAPH = "The quick brown fox \u2013 \u201cjumps\u201d \u2013 over the lazy dog.\nCaf\u00e9 prices rose by 3 %.\n\n"


@dataclass(frozen=True)
class Job:
    """What to do. seconds, requests: no new request after so much (0: no bound). whole: not streamed. same: all requests are
    alike. prompt: bytes of the prompt. extra: further fields of the body. get: ask for a file. levels: hold so many streams open,
    one level after the other, then watch for `seconds`. watch, provider: process ids.
    """

    port: int
    model: str
    clients: int = 1
    seconds: float = 0.0
    requests: int = 0
    whole: bool = False
    same: bool = False
    prompt: int = 0
    extra: Json = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = "/v1/chat/completions"
    get: bool = False
    levels: tuple[int, ...] = ()
    watch: int = 0
    provider: int = 0

    @property
    def wanted(self) -> Wanted:
        count, delay = said.shape(self.model)
        return Wanted(count, delay > 0 and not self.whole, self.whole)

    def written(self) -> Iterator[bytes]:
        """The requests, ready to be sent, each a question of its own unless they are to be the same."""
        heads = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        host = f"HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        if self.get:
            while True:
                yield f"GET {self.path} {host}{heads}\r\n".encode()
        prompt = PARAGRAPH * (self.prompt // len(PARAGRAPH.encode()))
        fields = {"model": self.model, "messages": [{"role": "user", "content": f"Question @@@@@@@@: {prompt}"}], **self.extra}
        body = json.dumps(fields if self.whole else {**fields, "stream": True}, ensure_ascii=False).encode()
        head = f"POST {self.path} {host}Content-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n{heads}"
        before, after = (f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body).split(b"@@@@@@@@")
        number = 0
        while True:
            yield b"%b%08d%b" % (before, number, after)
            number += not self.same


@dataclass
class Figures:
    """What was seen; times in nanoseconds."""

    first: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    transit: list[int] = field(default_factory=list)
    jitter: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    chunks: int = 0

    def add(self, reply: Reply, asked: int, wanted: Wanted, gap: int) -> None:
        """A reply that is right. gap: the provider's, in nanoseconds."""
        self.first.append(reply.times[-1] - asked if wanted.whole else reply.first - asked)
        self.full.append(reply.times[-1] - asked)
        self.chunks += wanted.count
        if wanted.paced:
            stamps = reply.stamps()
            self.transit += [arrived - written for written, arrived in stamps]
            self.jitter += [abs(later - at - gap) for (_, at), (_, later) in itertools.pairwise(stamps)]


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


class Watch:
    """CPU time of the gateway, the provider and this process since it was made."""

    def __init__(self, job: Job) -> None:
        self._trees = [kernel.tree(process) if process else [] for process in (job.watch, job.provider)]
        self._before = [kernel.cpu_seconds(tree) for tree in self._trees]
        self._own, self._at = time.process_time(), time.monotonic()

    def resident(self) -> int:
        return kernel.resident(self._trees[0])

    def spent(self) -> Json:
        """Seconds of the gateway, wall seconds, and the shares of a core that all three took."""
        wall = time.monotonic() - self._at
        gateway, provider = (kernel.cpu_seconds(tree) - before for tree, before in zip(self._trees, self._before, strict=True))
        load = time.process_time() - self._own
        shares = {"gateway": gateway / wall, "provider": provider / wall, "load": load / wall}
        busy = bool(self._trees[0]) and shares["provider"] + shares["load"] > BUSY
        return {"cpu_s": gateway, "wall_s": wall, "shares": {who: round(x, 3) for who, x in shares.items()}, "bottleneck": busy}


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
    return _line(shared.figures, watch.spent())


def _line(figures: Figures, spent: Json) -> Json:
    requests, chunks, cpu = len(figures.full), figures.chunks, spent.pop("cpu_s")
    return {
        "ok": requests,
        "wrong": len(figures.wrong),
        "first_wrong": figures.wrong[0][:600] if figures.wrong else None,
        **spent,
        "requests_per_s": requests / spent["wall_s"],
        "chunks_per_s": chunks / spent["wall_s"],
        "cpu_us_per_request": cpu / requests * 1e6 if requests else None,
        "cpu_us_per_chunk": cpu / chunks * 1e6 if chunks else None,
        "resident_mb": max(figures.resident, default=0) / 1e6,
        **{
            f"{name}_ms": {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99)}
            for name in ("first", "full", "transit", "jitter")
            if (times := getattr(figures, name))
        },
    }


def percentile(times: list[int], part: float) -> float:
    """In milliseconds, of nanoseconds."""
    return sorted(times)[min(len(times) - 1, int(len(times) * part))] / 1e6


async def held(job: Job) -> Json:
    """Streams held open level after level. Memory at each level, then CPU per chunk for `seconds` at the last."""
    loop, requests = asyncio.get_running_loop(), job.written()
    streams: list[Held] = []
    memory = {0: Watch(job).resident()}
    for level in job.levels:
        while len(streams) < level:
            _, stream = await loop.create_connection(lambda: Held(next(requests)), "127.0.0.1", job.port)
            streams.append(stream)
        await asyncio.wait([stream.begun for stream in streams], timeout=GRACE)
        await asyncio.sleep(SETTLE)
        memory[level] = Watch(job).resident()
    watch, before = Watch(job), sum(stream.chunks for stream in streams)
    await asyncio.sleep(job.seconds)
    spent = watch.spent()
    chunks = sum(stream.chunks for stream in streams) - before
    wrong = [fault for stream in streams if (fault := stream.fault())]
    for stream in streams:
        stream.transport.abort()
    line = _line(Figures(wrong=wrong, chunks=chunks), spent)
    return {**line, "ok": len(streams) - len(wrong), "resident_at_mb": {level: size / 1e6 for level, size in memory.items()}}


def read(text: str) -> Job:
    fields = json.loads(text)
    return Job(**{**fields, "levels": tuple(fields.get("levels", ()))})


def write(job: Job) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    job = read(sys.argv[1])
    print(json.dumps(uvloop.run(held(job) if job.levels else closed_loop(job))))
