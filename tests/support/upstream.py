"""A provider at the network's edge: a raw TCP server that answers with exactly the bytes a test wants, and remembers who came.

It speaks just enough HTTP/1.1 to read a request; every answer is written as the test's own coroutine decides, so that cuts,
resets, silence, odd framing and slow writers are all one line.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Json = dict[str, Any]


@dataclass
class Asked:
    """One request as the provider saw it. headers by lower-case name."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        found: Json = json.loads(self.body)
        return found


@dataclass
class Line:
    """The connection to the gateway, seen from the provider. closed: set when the gateway has closed it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, *pieces: bytes, pause: Callable[[], Awaitable[None]] | None = None) -> None:
        """Write each piece by itself (Nagle is off; a loop turn between them)."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await (pause() if pause else asyncio.sleep(0))

    async def head(self, status: int = 200, content_type: str = "text/event-stream", **headers: str) -> None:
        """A response head with chunked transfer encoding; `chunk` and `end` follow."""
        lines = {
            "Content-Type": content_type,
            "Transfer-Encoding": "chunked",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        await self.send(http_head(status, lines))

    async def chunk(self, *pieces: bytes) -> None:
        await self.send(*(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def forever(self) -> None:
        """Say nothing more until the gateway closes the connection."""
        await self.closed.wait()

    def reset(self) -> None:
        """RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def hang_up(self) -> None:
        self.writer.close()


Answer = Callable[[Asked, Line], Awaitable[None]]


def http_head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode()


def whole(
    body: bytes, status: int = 200, content_type: str = "application/json", headers: Mapping[str, str] | None = None
) -> Answer:
    """An answer with a Content-Length."""

    async def answer(asked: Asked, line: Line) -> None:
        fields = {"Content-Type": content_type, **(headers or {}), "Content-Length": str(len(body))}
        await line.send(http_head(status, fields) + body)

    return answer


def stream(pieces: Iterable[bytes], status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """A chunked event stream, one HTTP chunk and one write per piece, cleanly ended."""
    held = list(pieces)

    async def answer(asked: Asked, line: Line) -> None:
        await line.head(status, **{k.replace("-", "_"): v for k, v in (headers or {}).items() if k.lower() != "content-type"})
        await line.chunk(*held)
        await line.end()

    return answer


class Held:
    """Answers with a stream that begins with `first`, and goes on with `rest` to its end when `go` is set."""

    def __init__(self, first: bytes, rest: bytes) -> None:
        self.first = first
        self.rest = rest
        self.go = asyncio.Event()

    async def __call__(self, asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(self.first)
        await self.go.wait()
        await line.chunk(self.rest)
        await line.end()


class Upstream:
    """`async with Upstream(answer) as upstream`: listens on loopback. `answer` may be replaced at any time.

    tls: speaks TLS with this context, as localhost.
    asked: all requests so far. lines: all connections so far, in the order of their first request. open: how many stand now.
    """

    def __init__(self, answer: Answer | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer or whole(b"{}")
        self.tls = tls
        self.asked: list[Asked] = []
        self.lines: list[Line] = []
        self.open = 0
        self.connected = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" if self.tls else f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**22, ssl=self.tls)
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
        self.open += 1
        line = Line(reader, writer)
        try:
            await self._requests(line)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            line.closed.set()
            writer.close()
            self._tasks.discard(task)

    async def _requests(self, line: Line) -> None:
        while (asked := await _read_request(line.reader)) is not None:
            self.asked.append(asked)
            if line not in self.lines:
                self.lines.append(line)
            self.connected.set()
            answering = asyncio.ensure_future(self.answer(asked, line))
            gone = asyncio.ensure_future(line.reader.read(1) if asked.headers.get("x-pipelined") else _gone(line))
            done, _ = await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone in done and answering not in done:
                line.closed.set()
                answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            if gone in done:
                return
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            if line.writer.is_closing():
                return
            error = answering.exception() if not answering.cancelled() else None
            if error is not None and not isinstance(error, ConnectionError):
                raise error


async def _gone(line: Line) -> None:
    """Returns when the gateway has closed the connection (it never pipelines, so any wake-up with nothing to read is the end)."""
    while not line.reader.at_eof():
        transport = line.writer.transport
        if transport.is_closing() and line.reader.at_eof():
            return
        if line.reader._buffer:  # type: ignore[attr-defined]
            await asyncio.Event().wait()
        try:
            await line.reader._wait_for_data("gone")  # type: ignore[attr-defined]
        except ConnectionError:
            return


async def _read_request(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Asked(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))
