"""From a socket to the edge by the shortest way: requests of the usual form are read here; any other is left to aiohttp.

Strategy: a head that comes whole, in HTTP/1.1, with a plain method and path, one Host and at most one Content-Length, is
understood by one regular expression and a loop over its lines. Whatever else comes (transfer codings, upgrades, Expect, HTTP/1.0,
half a head, anything odd) is handed over, bytes and connection, to aiohttp's server protocol, which then keeps the connection.
The one rule: any doubt goes to aiohttp. What is taken here is so strict that no two readers could disagree about it.

Format: https://www.rfc-editor.org/rfc/rfc9112
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from multidict import CIMultiDict, CIMultiDictProxy

from proxy.delivery import Delivery
from proxy.http import Request

KEEP_ALIVE_SECONDS = 75.0
LINGER_SECONDS = 10.0
HEAD_LIMIT = 2**15
HELD_LIMIT = 2**16
HEAD = re.compile(
    rb"(GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS) (/[!-~]*) HTTP/1\.1\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)+)\r\n"
)
# What changes how a message is framed or answered; whoever sends it gets aiohttp's reading.
ODD = frozenset({"transfer-encoding", "upgrade", "expect", "content-encoding", "te", "trailer", "http2-settings"})
ONCE = frozenset({"host", "content-length", "content-type", "connection"})

Handle = Callable[[Request], Awaitable[None]]


class Lane(asyncio.Protocol):
    """One connection of a client. handle: answers a request. hand_over: makes the protocol that takes the connection over.
    lanes: the open ones, for whoever closes them all.
    """

    def __init__(self, handle: Handle, hand_over: Callable[[], asyncio.Protocol], lanes: set[Lane]) -> None:
        self._handle = handle
        self._hand_over = hand_over
        self._lanes = lanes
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.congested = False
        self.parting = False
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._request: Request | None = None
        self._held: list[bytes] = []
        self._held_size = 0
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._lanes.add(self)
        self._idle_since = self._loop.time()
        self._timer = self._loop.call_later(KEEP_ALIVE_SECONDS, self._check_idle)

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionResetError("The client has gone."))
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        """A client that closes is gone, also while bytes to it are still queued: its upstream is closed at once."""
        if self.transport is not None and self.transport.get_write_buffer_size():
            self.transport.abort()
        return False

    def close(self) -> None:
        """End the connection and what is served on it."""
        if self._task is not None:
            self._task.cancel()
        if self.transport is not None:
            self.transport.close()

    def close_idle(self) -> None:
        """End the connection if nothing is served on it; else it ends with its answer (`parting`)."""
        if self._task is None and self.transport is not None:
            self.transport.close()

    def _leave(self) -> None:
        """It is no longer this protocol's connection."""
        self.transport = None
        self._lanes.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_idle(self) -> None:
        """The one timer: closes a connection on which nothing was asked for a while."""
        now = self._loop.time()
        due = self._idle_since + KEEP_ALIVE_SECONDS if self._task is None else now + KEEP_ALIVE_SECONDS
        if due > now:
            self._timer = self._loop.call_at(due, self._check_idle)
        elif self.transport is not None:
            self.transport.abort() if self.transport.get_write_buffer_size() else self.transport.close()

    # Flow control

    def pause_writing(self) -> None:
        self.congested = True

    def resume_writing(self) -> None:
        self.congested = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def drained(self) -> None:
        if self.transport is None:
            raise ConnectionResetError("The client has gone.")
        if self.congested:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    # Requests

    def data_received(self, data: bytes) -> None:
        if self._request is not None and (data := self._request.feed(data)) == b"":
            return
        if self._task is not None:
            self._hold(data)
        else:
            self._next(data)

    def _hold(self, data: bytes) -> None:
        """A further request before the first was answered: it waits its turn."""
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > HELD_LIMIT and self.transport is not None:
            self.transport.pause_reading()

    def _next(self, data: bytes) -> None:
        request = self._read(data)
        if request is None:
            self._give_away(data)
            return
        self._request = request
        serving = self._serve(request)
        if sys.version_info >= (3, 12):
            self._task = asyncio.Task(serving, loop=self._loop, eager_start=True)
            if self._task.done():
                self._task = None
        else:
            self._task = self._loop.create_task(serving)

    def _read(self, data: bytes) -> Request | None:
        """The request that `data` begins with; None where aiohttp must look at it."""
        found = HEAD.match(data)
        if found is None or found.end() > HEAD_LIMIT:
            return None
        headers: list[tuple[str, str]] = []
        seen: set[str] = set()
        for line in found[3].decode("utf-8", "surrogateescape").split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            name = name.lower()
            if name in ODD or (name in seen and name in ONCE):
                return None
            seen.add(name)
            headers.append((name, value.strip(" \t")))
        fields = CIMultiDictProxy(CIMultiDict(headers))
        length, connection = fields.get("content-length", "0"), fields.get("connection", "keep-alive").lower()
        if "host" not in seen or not (length.isascii() and length.isdigit()) or len(length) > 18:
            return None
        if connection not in ("keep-alive", "close"):
            return None
        method = found[1].decode()
        delivery = Delivery(self, bodiless=method == "HEAD", close=connection == "close")
        request = Request(method, found[2].decode(), fields, delivery, int(length))
        rest = request.feed(data[found.end() :])
        if rest:
            self._hold(rest)
        return request

    def _give_away(self, data: bytes) -> None:
        """aiohttp's from here on."""
        transport, other = self.transport, self._hand_over()
        if transport is None:
            return
        self._leave()
        transport.set_protocol(other)
        other.connection_made(transport)
        other.data_received(data)

    async def _serve(self, request: Request) -> None:
        try:
            await self._handle(request)
        except ConnectionError:
            request.delivery.close = True
        finally:
            self._task = None
            self._request = None
            # Whoever stays in the middle of a body or of an answer cannot be asked again.
            self._turn(request)

    def _turn(self, request: Request) -> None:
        """The answer is out: on to the next request on this connection, if there may be one."""
        transport = self.transport
        if transport is None:
            return
        if request.delivery.close or not request.delivery.begun or self.parting:
            self._part(request, transport)
        elif request.missing:
            # It was answered before its body was all there: the rest is read over, for a while.
            self._request = request.left()
            self._loop.call_later(LINGER_SECONDS, self._give_up, self._request)
        elif self._held:
            data = b"".join(self._held)
            self._held.clear()
            if self._held_size > HELD_LIMIT:
                transport.resume_reading()
            self._held_size = 0
            self._loop.call_soon(self._resume, data)
        self._idle_since = self._loop.time()

    def _resume(self, data: bytes) -> None:
        if self.transport is not None and self._task is None:
            self._next(data)

    def _part(self, request: Request, transport: asyncio.Transport) -> None:
        """Close, but let a client that is still sending read the answer first: unread bytes would reset the connection."""
        if request.missing and request.delivery.begun:
            self._request = request.left()
            self._loop.call_later(LINGER_SECONDS, self._give_up, self._request)
            if transport.can_write_eof():
                transport.write_eof()
        else:
            transport.close()

    def _give_up(self, request: Any) -> None:
        if self._request is request and self.transport is not None:
            self.transport.close()
