"""A client's line to the gateway: HTTP/1.1 by hand, event by event, at the pace at which events are asked for.

Strategy: bytes are read only when the next event is wanted, so that who takes its time really is slow.
The one rule: what is against HTTP or SSE is a fault in the record; nothing is repaired.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.conformance.client import linger

Json = dict[str, Any]
NARROW = 4096


@dataclass(frozen=True, slots=True)
class Event:
    number: str
    text: str


class Line:
    """One connection, for one answer after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.answer: Answer | None = None

    @classmethod
    async def open(cls, port: int, *, narrow: bool = False) -> Line:
        """narrow: with buffers so small that a client that rests is noticed."""
        sock = socket.socket()
        sock.setblocking(False)
        if narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NARROW)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=NARROW if narrow else 2**16))

    @property
    def reusable(self) -> bool:
        """The last answer came to its end, and neither side has closed."""
        ended = self.answer is None or (self.answer.end == "clean" and self.answer.headers.get("connection") != "close")
        return ended and not self._reader.at_eof() and not self._writer.is_closing()

    async def ask(self, method: str, path: str, body: Json | bytes | None = None, **headers: str) -> Answer:
        """Sent, and the head of the answer read. Raises ConnectionError, IncompleteReadError."""
        self.send(method, path, body, **headers)
        self.answer = Answer(self._reader)
        await self.answer.begin()
        return self.answer

    def send(self, method: str, path: str, body: Json | bytes | None = None, **headers: str) -> None:
        text = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(text))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        self._writer.write(
            f"{method} {path} HTTP/1.1\r\n{''.join(f'{n}: {v}{chr(13)}{chr(10)}' for n, v in fields.items())}\r\n".encode()
        )
        self._writer.write(text)

    def leave(self, *, reset: bool = False) -> None:
        if reset and not self._writer.is_closing():
            linger(self._writer)
            self._writer.transport.abort()
        else:
            self._writer.close()


class Answer:
    """One answer. end: open | clean | cut. faults: what was against the formats."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.status = 0
        self.headers: dict[str, str] = {}
        self.end = "open"
        self.faults: list[str] = []
        self._left: int | None = None  # of a body with a length
        self._chunk = 0
        self._text = b""
        self._events: deque[Event] = deque()
        self._number = ""

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def begin(self) -> None:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip("\r\n").split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if self.headers.get("transfer-encoding") != "chunked":
            self._left = int(self.headers.get("content-length", "0"))

    async def event(self) -> Event | None:
        """The next event; None at the end, whichever it is."""
        while not self._events:
            if not (piece := await self._piece()):
                if self._text and self.end == "clean":
                    self.faults.append(f"the body ends in the middle of an event: {self._text[:80]!r}")
                self._text = b""
                return None
            *whole, self._text = (self._text + piece).split(b"\n\n")
            for block in whole:
                self._take(block)
        return self._events.popleft()

    def _take(self, block: bytes) -> None:
        """The lines of one event; comments may stand among them."""
        parts = []
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            if name == b"data":
                parts.append(value.removeprefix(b" ").decode())
            elif name == b"id":
                self._number = value.strip().decode()
            elif name and name not in (b"event", b"retry"):
                self.faults.append(f"no field of an event: {line[:80]!r}")
        if parts:
            self._events.append(Event(self._number, "\n".join(parts)))

    async def body(self) -> bytes:
        pieces = []
        while piece := await self._piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def _piece(self) -> bytes:
        """Some bytes of the body, none at its end."""
        if self.end != "open":
            return b""
        try:
            return await (self._of_chunks() if self._left is None else self._of_length())
        except (ConnectionError, asyncio.IncompleteReadError):
            self.end = "cut"
        except (ValueError, asyncio.LimitOverrunError) as error:
            self.end = "cut"
            self.faults.append(f"broken HTTP: {error}")
        return b""

    async def _of_length(self) -> bytes:
        if not self._left:
            self.end = "clean"
            return b""
        piece = await self._read(self._left)
        self._left -= len(piece)
        return piece

    async def _of_chunks(self) -> bytes:
        if not self._chunk:
            self._chunk = int(await self._reader.readuntil(b"\r\n"), 16)
            if not self._chunk:
                if await self._reader.readexactly(2) != b"\r\n":
                    raise ValueError("no end behind the last chunk")
                self.end = "clean"
                return b""
        piece = await self._read(self._chunk)
        self._chunk -= len(piece)
        if not self._chunk and await self._reader.readexactly(2) != b"\r\n":
            raise ValueError("a chunk is longer than its size")
        return piece

    async def _read(self, most: int) -> bytes:
        piece = await self._reader.read(most)
        if not piece:
            raise asyncio.IncompleteReadError(b"", most)
        return piece
