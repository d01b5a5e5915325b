"""The fake provider: it answers OpenAI's paths with exactly the bytes that a case wants, and sees what becomes of them.

Strategy: a case registers an `Exchange` under a token; the token travels in the model's name, through whatever the gateway makes
of it; the exchange's own coroutine then writes the answer on the raw connection. So cuts, resets and silence are one line each.
The one rule: a script never outlives its connection: when the gateway hangs up, the moment is noted and the script cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import orjson

from proxy.conformance.client import closed, linger

Json = dict[str, Any]
TOKEN = re.compile(r"conf-[a-z0-9-]+")
# What `GET /v1/models` lists: some gateways ask before they send anything on.
MODELS = ("conf-model",)


@dataclass
class Line:
    """The provider's end of a connection to the gateway, while it answers one request. asked: the request's JSON."""

    asked: Json
    headers: Mapping[str, str]
    writer: asyncio.StreamWriter

    async def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        """Each piece in a write of its own (asyncio switches Nagle's algorithm off), `pause` seconds between them."""
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(pause)
            self.writer.write(piece)
            await self.writer.drain()

    async def open(self, status: int = 200, **headers: str) -> None:
        """The head of a chunked event stream; headers by name with `_` for `-`, an empty one is left out."""
        await self.send(head(status, {"Content_Type": "text/event-stream", "Transfer_Encoding": "chunked", **headers}))

    async def chunk(self, *pieces: bytes) -> None:
        """Each piece as one HTTP chunk in one write."""
        await self.send(*(http_chunk(piece) for piece in pieces))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def whole(self, body: bytes, status: int = 200, **headers: str) -> None:
        """An answer with a Content-Length."""
        await self.send(head(status, {"Content_Type": "application/json", **headers, "Content_Length": str(len(body))}) + body)

    async def silence(self) -> None:
        """Say nothing more, until the gateway hangs up."""
        await asyncio.Event().wait()

    def hang_up(self) -> None:
        """FIN, after what was written."""
        self.writer.close()

    def reset(self) -> None:
        """RST."""
        linger(self.writer)
        self.writer.transport.abort()


Answer = Callable[[Line], Awaitable[None]]


def http_chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value)
    return f"HTTP/1.1 {status} Told\r\n{lines}\r\n".encode()


@dataclass
class Exchange:
    """What one request shall get, and what was seen of it. attempts: how often the gateway asked.

    gone_at: when the gateway hung up during an answer, in seconds of `time.perf_counter`.
    """

    answer: Answer
    attempts: int = 0
    lines: list[Line] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    gone_at: float = 0.0


class Provider:
    """`async with Provider(host, port) as provider`: listens, on a port of the system's choice for 0."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host, self.port = host, port
        self.exchanges: dict[str, Exchange] = {}
        self.faults: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    async def __aenter__(self) -> Provider:
        self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=2**23, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            early = b""
            while (request := await _request(reader, early)) is not None:
                early = await self._respond(*request, reader, writer)
                if writer.is_closing() or request[1].get("connection", "").lower() == "close":
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            writer.close()
            with contextlib.suppress(asyncio.CancelledError):
                await closed(writer)
            self._tasks.discard(task)

    async def _respond(
        self, first: str, headers: dict[str, str], body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        """Answer one request; returns what was read of the next one while looking out for the gateway's leaving."""
        try:
            asked = orjson.loads(body) if body else {}
        except orjson.JSONDecodeError:
            asked = {}
        line = Line(asked if isinstance(asked, dict) else {}, headers, writer)
        exchange = self._exchange(line)
        if exchange is None:
            await _elsewhere(first, line)
            return b""
        exchange.attempts += 1
        exchange.lines.append(line)
        exchange.arrived.set()
        answering = asyncio.ensure_future(exchange.answer(line))
        watching = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and (watching.exception() is not None or not watching.result()):
                exchange.gone_at = time.perf_counter()
                exchange.gone.set()
                writer.close()
                return b""
            await asyncio.wait({answering})
            return watching.result() if watching.done() and watching.exception() is None else b""
        finally:
            await self._settle(answering, watching)

    async def _settle(self, answering: asyncio.Future[None], watching: asyncio.Future[bytes]) -> None:
        """Both futures ended; a script's own mistake is kept, for whoever runs the cases to see."""
        answering.cancel()
        watching.cancel()
        results = await asyncio.gather(answering, watching, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], ConnectionError):
            self.faults.append(repr(results[0]))

    def _exchange(self, line: Line) -> Exchange | None:
        found = TOKEN.search(str(line.asked.get("model", "")))
        return self.exchanges.get(found[0]) if found else None


async def _request(reader: asyncio.StreamReader, early: bytes) -> tuple[str, dict[str, str], bytes] | None:
    """First line, headers by lower-case name, body; None at the connection's end."""
    try:
        text = (early + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = text.rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int((await reader.readline()).partition(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readline()
        return first, headers, b"".join(parts)
    return first, headers, await reader.readexactly(int(headers.get("content-length", "0")))


async def _elsewhere(first: str, line: Line) -> None:
    """Whatever is no case of ours: the list of models, health checks, and a 404 for the rest."""
    method, path = first.split(" ")[:2]
    if path.partition("?")[0].endswith("/models"):
        rows = [{"id": name, "object": "model", "created": 1700000000, "owned_by": "conformance"} for name in MODELS]
        await line.whole(orjson.dumps({"object": "list", "data": rows}))
    elif method == "GET":
        await line.whole(b"{}")
    else:
        words = {"message": "no such case", "type": "invalid_request_error", "param": None, "code": "unknown_case"}
        await line.whole(orjson.dumps({"error": words}), 404)
