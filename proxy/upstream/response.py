"""One response whose head is in: its body is pulled (`read`) or pushed (`listen`), and its connection let go or closed.

Strategy: the connection hands on what each network read gave; here it waits in a list until it is taken. Where nobody takes it (a
puller that is busy, a listener that has said `pause`) the reading stops at HIGH_WATER, not before: so the end of a short rest is
noticed, and its connection let go, while the client is still behind.
The one rule: once the HTTP end is in, the connection is no longer this response's, and nothing done here touches it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from proxy.errors import GatewayError
from proxy.upstream.coding import Inflater, codings
from proxy.upstream.faults import broken, undecodable, unknown_coding

if TYPE_CHECKING:
    from proxy.upstream.connection import Connection

LINGER_SECONDS = 1.0
HIGH_WATER = 2**17


class HttpResponse:
    """See `proxy.transport.PushingResponse`. A body under gzip or deflate is handed on unpacked, in pieces of at most 256 KiB.

    over: nothing more will come, or be taken.
    """

    __slots__ = (
        "__weakref__", "_connection", "_ended", "_error", "_held", "_inflater", "_linger", "_loop", "_parts", "_pushing",
        "_receive", "_size", "_waiter", "headers", "over", "status",
    )  # fmt: skip

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str], loop: asyncio.AbstractEventLoop) -> None:
        self.status = status
        self.headers = headers
        self._connection: Connection | None = connection
        self._loop = loop
        self._parts: list[bytes] = []
        self._size = 0  # bytes that nobody has taken, as they came
        self.over = False
        self._error: GatewayError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._receive: Callable[[bytes], None] | None = None
        self._ended: Callable[[GatewayError | None], None] | None = None
        self._held = self._pushing = False
        self._linger: asyncio.TimerHandle | None = None
        self._inflater: Inflater | None = None
        if "content-encoding" in headers:
            self._unpack(codings(headers["content-encoding"]))

    # For whoever asked

    async def read(self) -> bytes:
        while not (found := self._take()):
            if self.over:
                if self._error is None:
                    return b""
                # A new one: a raised error keeps the frames it went through, and they this response.
                raise type(self._error)(self._error.message)
            self.resume()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._connection is not None and self._size <= HIGH_WATER:
            self._connection.resume()
        return found

    def listen(self, receive: Callable[[bytes], None], ended: Callable[[GatewayError | None], None]) -> None:
        self._receive, self._ended = receive, ended
        if self._connection is not None and not self._held:
            self._connection.resume()
        self._advance()

    def pause(self) -> None:
        self._held = True

    def resume(self) -> None:
        self._held = False
        if self._receive is not None:
            self._advance()
        # A listener may have paused again, or closed, in between.
        if self._connection is not None and not self._held:
            self._connection.resume()

    def done(self) -> None:
        if self._connection is not None and self._linger is None:
            self._linger = self._loop.call_later(LINGER_SECONDS, self.close)

    def close(self) -> None:
        self._receive = self._ended = None
        if not self.over:
            self._end(broken())
        self._parts.clear()
        self._inflater = None
        self._wake()

    # For the connection

    def feed(self, data: bytes) -> None:
        """A further piece of the body."""
        if self._receive is not None and not self._held and not self._parts and self._inflater is None:
            self._receive(data)
            return
        self._parts.append(data)
        self._size += len(data)
        self._advance()

    def end(self, data: bytes, error: GatewayError | None) -> None:
        """The last piece, and how the body ended; the connection has been let go already."""
        self._connection = None
        if not self.over:
            self._end(error)
            if data:
                self._parts.append(data)
        self._advance()

    # Within

    def _end(self, error: GatewayError | None) -> None:
        """Nothing more will come: give up the connection, if it has not been let go."""
        self.over = True
        self._error = error
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def _advance(self) -> None:
        """Tell the listener, or the reader; if neither is there, see that it does not become too much."""
        if self._receive is not None and not self._held:
            if not self._pushing:
                self._push()
        elif self._waiter is not None:
            self._wake()
        elif self._size > HIGH_WATER and self._connection is not None:
            self._connection.pause()

    def _push(self) -> None:
        """Hand on what there is, unless held back, and the end behind it. The listener may do anything meanwhile."""
        self._pushing = True
        try:
            while self._receive is not None and not self._held and (found := self._take()):
                self._receive(found)
        finally:
            self._pushing = False
        if self.over and self._ended is not None and not self._pending():
            ended, self._receive, self._ended = self._ended, None, None
            ended(self._error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pending(self) -> bool:
        return bool(self._parts) or (self._inflater is not None and not self._inflater.drained)

    def _take(self) -> bytes:
        """What can be handed on now; b"" if nothing can."""
        parts = self._parts
        if not parts and self._inflater is None:
            return b""
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._size = 0
        return found if self._inflater is None else self._inflated(self._inflater, found)

    def _inflated(self, inflater: Inflater, packed: bytes) -> bytes:
        inflater.feed(packed)
        try:
            found = inflater.take()
        except zlib.error:
            found = self._undecodable()
        self._size = len(inflater.pending)
        if not found and self.over and self._error is None and not inflater.complete:
            found = self._undecodable()
        return found

    def _undecodable(self) -> bytes:
        self._inflater = None
        self._end(undecodable())
        return b""

    def _unpack(self, names: list[str]) -> None:
        if len(names) == 1 and names[0] in ("gzip", "deflate"):
            self._inflater = Inflater(names[0])
        elif names:
            self.over, self._error = True, unknown_coding(", ".join(names))
