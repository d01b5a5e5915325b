"""Listening: bound sockets, our own lane for requests of the usual form, and aiohttp's low-level server for all others.

Strategy: both ways end in the same handler. What aiohttp has read is made a `Request`, and its answer is written by the same
`Delivery` straight to the transport; aiohttp is then told that its response has already been sent.
The one rule: a client's leaving is noticed at once, whatever is still queued for it.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_protocol import RequestHandler

from proxy.delivery import Delivery
from proxy.errors import Refused
from proxy.http import Request, too_large, too_slow
from proxy.lane import KEEP_ALIVE_SECONDS, Handle, Lane

HEADER_LIMIT = 2**15
ORIGIN = re.compile(rb"\r\norigin:[ \t]*([!-~]{1,300})[ \t]*\r\n", re.IGNORECASE)


class Server(web.Server):
    """aiohttp's server without application or resolver, behind a lane; a handler whose client has left is cancelled.

    lines: header lines for a client of an origin, for what aiohttp refuses by itself and `handle` never sees.
    """

    def __init__(self, handle: Handle, lines: Callable[[str], str] = lambda origin: "") -> None:
        super().__init__(
            self._handed,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
            auto_decompress=True,
        )
        self.lines = lines
        self._handle = handle
        self._lanes: set[Lane] = set()
        self.parting = False

    def __call__(self) -> Lane:  # type: ignore[override]
        lane = Lane(self._handle, self._connection, self._lanes)
        lane.parting = self.parting
        return lane

    def part(self) -> None:
        """From now on every answer says `Connection: close`, and is its connection's last."""
        self.parting = True
        for lane in self._lanes:
            lane.parting = True

    def close_idle(self) -> None:
        """Close the connections on which nothing is being served; those of aiohttp also end with what is."""
        for lane in list(self._lanes):
            lane.close_idle()
        self.pre_shutdown()

    def _connection(self) -> asyncio.Protocol:
        return _Connection(self, loop=self._loop, **self._kwargs)

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's own signature
        for lane in list(self._lanes):
            lane.close()
        await super().shutdown(timeout)

    async def _handed(self, request: web.BaseRequest) -> web.StreamResponse:
        """A request that aiohttp has read."""
        found = _Read(request, self)
        await self._handle(found)
        return _Sent(found.delivery)


class _Connection(RequestHandler):
    """aiohttp's server protocol with three changes. A client that closes while bytes to it are still queued is gone at once,
    rather than when the queue has been flushed, which may be never. To close an idle connection closes it; aiohttp only stops
    serving it, and leaves the rest to the server's end. And what cannot be read is refused so that a page may read why, if its
    origin stood in what came."""

    __slots__ = ("_origin",)

    _manager: Any

    def data_received(self, data: bytes) -> None:
        if self._manager.lines("") and (found := ORIGIN.search(data)):
            self._origin = found[1].decode()
        super().data_received(data)

    def handle_error(self, *given: Any, **named: Any) -> web.StreamResponse:
        answer = super().handle_error(*given, **named)
        for line in self._manager.lines(getattr(self, "_origin", "")).splitlines():
            answer.headers.add(*line.split(": ", 1))
        return answer

    def eof_received(self) -> None:
        if self.transport is not None and self.transport.get_write_buffer_size():
            self.transport.abort()

    def close(self) -> None:
        idle = self._waiter is not None
        super().close()
        if idle and self.transport is not None:
            self.transport.close()


class _Read(Request):
    """A request out of aiohttp's parser; its body is read from there, too."""

    __slots__ = ("_request",)

    def __init__(self, request: web.BaseRequest, server: Server) -> None:
        modern = request.version >= (1, 1)
        delivery = Delivery(
            _Written(request, server), chunked=modern, bodiless=request.method == "HEAD", close=not request.keep_alive
        )
        super().__init__(request.method, "", request.headers, delivery, request.content_length or 0)
        self.path, self.query_string = request.path, request.query_string
        self.raw_path = request.raw_path.partition("?")[0]
        self.missing = self.length or 1  # it may have a body of unknown length; `body` finds out
        self._request = request

    async def body(self, limit: int, seconds: float) -> bytes:
        if self.length > limit:
            raise too_large(limit)
        if self.headers.get("expect", "").lower() == "100-continue" and (transport := self._request.transport) is not None:
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(seconds):
                return await self._content(limit)
        except TimeoutError:
            raise too_slow(seconds) from None

    async def _content(self, limit: int) -> bytes:
        content, parts, size = self._request.content, [], 0
        try:
            while data := await content.readany():
                parts.append(data)
                size += len(data)
                if size > limit:
                    raise too_large(limit)
        except web.RequestPayloadError as error:
            raise Refused(f"The body cannot be read: {error}.", code="invalid_body", headers={"Connection": "close"}) from None
        return b"".join(parts)


class _Written:
    """An aiohttp connection as a delivery sees it."""

    __slots__ = ("_request", "_server")

    def __init__(self, request: web.BaseRequest, server: Server) -> None:
        self._request = request
        self._server = server

    @property
    def parting(self) -> bool:
        return self._server.parting

    @property
    def transport(self) -> Any:
        return self._request.transport

    @property
    def congested(self) -> bool:
        return self._request.protocol.writing_paused

    async def drained(self) -> None:
        if self._request.transport is None:
            raise ConnectionResetError("The client has gone.")
        writer: AbstractStreamWriter = self._request.writer
        await writer.drain()


class _Sent(web.StreamResponse):
    """Tells aiohttp that the answer is out already."""

    def __init__(self, delivery: Delivery) -> None:
        super().__init__()
        self._close = delivery.close or not delivery.begun

    @property
    def keep_alive(self) -> bool | None:
        return not self._close

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Bound sockets for every address of `host`; raises OSError."""
    found: list[socket.socket] = []
    for family, kind, proto, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        found.append(sock)
    return found
