"""One answer on its way to one client: head, chunk framing and payload, written straight to the connection's transport.

Strategy: the head waits for the first bytes of the body and leaves with them; each write is one piece of one HTTP chunk, the last
one carries the end of the body too. So a stream costs one system call per batch, and a whole answer one in all.
The one rule: nothing is written without its flow control at hand: `congested` says that the client is behind, `drained` waits.

Format: https://www.rfc-editor.org/rfc/rfc9112 (7.1 chunked transfer coding)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

REASONS = {status.value: status.phrase for status in HTTPStatus}
BODILESS = frozenset({204, 304})
# How the chunks of HTTP begin that hold one event, made once: 1.1 instead of 1.7 thousand instructions.
MOST = 1024
SIZES = tuple(b"%x\r\n" % size for size in range(MOST))


@dataclass(slots=True)
class Response:
    """A whole answer. close: the connection ends with it."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False


class Connection(Protocol):
    """What a delivery needs of the connection it writes to. transport: None once it is gone."""

    @property
    def transport(self) -> asyncio.Transport | None: ...

    @property
    def congested(self) -> bool:
        """More is queued than the transport's high-water mark."""
        ...

    @property
    def parting(self) -> bool:
        """The server is going away: each connection ends with the answer that is being written."""
        ...

    async def drained(self) -> None:
        """Returns when it is no longer congested. Raises ConnectionError when the client has gone."""
        ...


class Delivery:
    """Writes one answer. chunked: the client speaks HTTP/1.1 (else the end of the connection ends the body). bodiless: HEAD.

    close: the connection must not be used again. begun: something has left, so the status can no longer be changed.
    lines: header lines that the answer has whatever it is, each with its end.
    """

    __slots__ = ("_bodiless", "_chunked", "_connection", "_head", "begun", "close", "lines")

    def __init__(self, connection: Connection, *, chunked: bool = True, bodiless: bool = False, close: bool = False) -> None:
        self._connection = connection
        self._chunked = chunked
        self._bodiless = bodiless
        self._head = b""
        self.close = close or not chunked
        self.begun = False
        self.lines = ""

    @property
    def congested(self) -> bool:
        return self._connection.congested

    async def drained(self) -> None:
        await self._connection.drained()

    @property
    def buffered(self) -> int:
        """Bytes that were written and that the client's side has not yet taken."""
        transport = self._connection.transport
        return transport.get_write_buffer_size() if transport is not None else 0

    def peer(self) -> str:
        """The address at the other end of the connection, "" where it has none."""
        transport = self._connection.transport
        name = transport.get_extra_info("peername") if transport is not None else None
        return str(name[0]) if isinstance(name, tuple) else ""

    def abort(self) -> None:
        """Drop the connection, with whatever is queued."""
        if (transport := self._connection.transport) is not None:
            transport.abort()

    def whole(self, response: Response) -> None:
        """A complete answer in one write."""
        self.close = self.close or response.close
        length = "" if response.status in BODILESS else f"Content-Length: {len(response.body)}\r\n"
        body = b"" if self._bodiless or response.status in BODILESS else response.body
        self._send(self._headed(response.status, response.headers, length) + body)

    def start(self, headers: Mapping[str, str]) -> None:
        """Begin a stream with status 200. Its head leaves with the first `write`, or with the end."""
        self._head = self._headed(200, headers, "Transfer-Encoding: chunked\r\n" if self._chunked else "")

    def write(self, data: bytes) -> bool:
        """A piece of the body. Is the client behind now?"""
        size = len(data)
        if self._head or not self._chunked or size >= MOST:
            framed = b"%b%x\r\n%b\r\n" % (self._head, size, data) if self._chunked else self._head + data
            self._head = b""
        else:
            framed = SIZES[size] + data + b"\r\n"
        connection = self._connection
        transport = connection.transport
        if transport is None:
            raise ConnectionResetError("The client has gone.")
        self.begun = True
        # One that is closing drops it, and its owner is told in a moment: asking it first would cost each chunk 0.1 us.
        transport.write(framed)
        return connection.congested

    def end(self, data: bytes = b"") -> None:
        """The last piece, and the end of the body."""
        if not self._chunked:
            framed = self._head + data
        elif data:
            framed = b"%b%x\r\n%b\r\n0\r\n\r\n" % (self._head, len(data), data)
        else:
            framed = self._head + b"0\r\n\r\n"
        self._head = b""
        self._send(framed)

    def _send(self, data: bytes) -> None:
        transport = self._connection.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("The client has gone.")
        self.begun = True
        transport.write(data)

    def _headed(self, status: int, headers: Mapping[str, str], framing: str) -> bytes:
        self.close = self.close or self._connection.parting
        close = "Connection: close\r\n" if self.close else ""
        lines = [f"{name}: {value}\r\n" for name, value in headers.items() if name != "Connection"]
        fields = "".join(lines)
        if fields.count("\n") != len(lines) or fields.count("\r") != len(lines):
            # A value that would end its line: nothing the client or a provider says may become a header of its own.
            fields = "".join(line[:-2].replace("\r", " ").replace("\n", " ") + "\r\n" for line in lines)
        reason = REASONS.get(status, "")
        head = f"HTTP/1.1 {status} {reason}\r\n{fields}{self.lines}Date: {_date()}\r\n{framing}{close}\r\n"
        return head.encode("utf-8", "surrogateescape")


_stamped = (0, "")


def _date() -> str:
    """The time as HTTP writes it (RFC 9110, 5.6.7), made once a second."""
    global _stamped
    now = int(time.time())
    if _stamped[0] != now:
        _stamped = (now, formatdate(now, usegmt=True))
    return _stamped[1]
