"""A client that sees every byte: HTTP/1.1 over a plain socket, one connection per request.

Strategy: the request is written by hand and the answer read by its own framing, so that how the body ended (properly, cut,
reset, not at all) is a fact and not what a library made of it.
The one rule: reading never raises for what the other side did; it is written down in `Received`.

Framing: RFC 9112, section 6.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from proxy.conformance.sse import Event, SseReader

Json = dict[str, Any]
READ = 2**16


@dataclass
class Received:
    """One answer as it came. headers by lower-case name.

    end: clean (as HTTP wants it) | cut (the connection ended too early) | reset | open (no end within the time) | none (no
    answer at all). events: of an event stream; body: of anything else. faults: what was against HTTP or SSE.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    end: str = "none"
    events: list[Event] = field(default_factory=list)
    body: bytes = b""
    faults: list[str] = field(default_factory=list)
    comments: int = 0
    sent_at: float = 0.0

    @property
    def streamed(self) -> bool:
        """It is an event stream; an error status never is, whatever it says of itself."""
        return self.status < 400 and self.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"

    @property
    def json(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, with what headers. url: up to and without `/chat/completions`. limit: seconds for a whole answer."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    limit: float = 30.0

    async def open(self, body: Json) -> Conversation:
        """Connect and ask. Raises OSError where nobody listens."""
        parts = urlsplit(self.url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls or None, limit=2**20)
        writer.write(_request(parts.netloc, f"{parts.path.rstrip('/')}/chat/completions", self.headers, body))
        return Conversation(reader, writer)

    async def ask(self, body: Json, limit: float | None = None) -> Received:
        """Ask and read to the end, or until `limit` seconds are over."""
        try:
            conversation = await self.open(body)
        except OSError as error:
            return Received(faults=[f"cannot connect: {error.strerror or error}"])
        return await conversation.finish(limit or self.limit)


def _request(host: str, path: str, headers: Mapping[str, str], body: Json) -> bytes:
    text = orjson.dumps(body)
    accept = "text/event-stream" if body.get("stream") else "application/json"
    fields = {"Host": host, "Content-Type": "application/json", "Accept": accept, **headers, "Content-Length": str(len(text))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + text


class Conversation:
    """One request that has been sent. `async for event in conversation` reads on; `finish` reads all; `leave` goes away."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._sse = SseReader()
        self.received = Received(sent_at=time.perf_counter())
        self._events = self._read()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def finish(self, limit: float) -> Received:
        """Read to the end, and hang up."""
        try:
            async with asyncio.timeout(limit):
                async for _ in self._events:
                    pass
        except TimeoutError:
            self.received.end = "open"
        finally:
            await self.leave()
        return self.received

    async def leave(self, reset: bool = False) -> None:
        """Close the connection, with a FIN or an RST."""
        await self._events.aclose()
        self.received.faults += self._sse.faults
        self.received.comments = self._sse.comments
        if reset:
            linger(self._writer)
            self._writer.transport.abort()
        else:
            self._writer.close()
        await closed(self._writer)

    async def _read(self) -> AsyncGenerator[Event, None]:
        received, parts = self.received, list[bytes]()
        try:
            await self._head()
            async for piece in self._body():
                if not received.streamed:
                    parts.append(piece)
                    continue
                for event in self._sse.feed(piece):
                    received.events.append(event)
                    yield event
            received.end = "clean"
        except asyncio.IncompleteReadError:
            received.end = "cut" if received.status else "none"
        except ConnectionError:
            received.end = "reset" if received.status else "none"
        except (ValueError, IndexError, asyncio.LimitOverrunError) as error:
            received.end = "cut"
            received.faults.append(f"broken HTTP: {error}")
        received.body = b"".join(parts)
        if received.streamed:
            for event in self._sse.close():
                received.events.append(event)
                yield event

    async def _head(self) -> None:
        """The first head that is no interim one."""
        while self.received.status < 200:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip("\r\n").split("\r\n")
            self.received.status = int(first.split(" ")[1])
            pairs = (line.partition(":") for line in lines)
            self.received.headers = {name.lower(): value.strip() for name, _, value in pairs}

    async def _body(self) -> AsyncIterator[bytes]:
        """The body's bytes as they come. Raises IncompleteReadError where it stops too early, ValueError where it is not HTTP."""
        headers = self.received.headers
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0].strip(), 16):
                async for piece in self._exactly(size):
                    yield piece
                if await self._reader.readexactly(2) != b"\r\n":
                    raise ValueError("a chunk is longer than its size")
            while await self._reader.readuntil(b"\r\n") != b"\r\n":
                pass
        elif "content-length" in headers:
            async for piece in self._exactly(int(headers["content-length"])):
                yield piece
        else:
            while piece := await self._reader.read(READ):
                yield piece

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            piece = await self._reader.read(min(size, READ))
            if not piece:
                raise asyncio.IncompleteReadError(b"", size)
            size -= len(piece)
            yield piece


async def closed(writer: asyncio.StreamWriter) -> None:
    """Until a connection that is being closed is; one whose other side takes nothing more is dropped after a second."""
    try:
        async with asyncio.timeout(1):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


def linger(writer: asyncio.StreamWriter) -> None:
    """From now on an abort of this connection is an RST."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
