"""The only owner of client sockets: requests out to providers over HTTP/1.1, bytes back as they come.

Strategy: a request takes a kept connection or dials a new one, writes head and body in one piece and waits for one future, the
response's head; on a warm connection that is all: no task, no timer. Parsing is llhttp's, in C. `request` makes heads, `dialing`
connects, `pool` keeps, `connection` parses, `response` hands bodies on, `coding` unpacks compressed ones.
A kept connection that proves dead before a byte of the answer came is replaced by a new one, once, unseen by everybody above.
The one rule: `close` closes the socket at once and may be called from anywhere, any number of times.

Redirects are not followed (they would carry the key elsewhere), proxies from the environment are not used, cookies are not kept.
"""

from __future__ import annotations

import asyncio

from proxy.call import Limits
from proxy.transport import UpstreamRequest
from proxy.upstream.connection import Connection
from proxy.upstream.dialing import Dialer
from proxy.upstream.faults import Unanswered
from proxy.upstream.pool import Pool
from proxy.upstream.request import Origin, prepared
from proxy.upstream.response import HttpResponse

__all__ = ["HttpResponse", "HttpTransport"]


class HttpTransport:
    """Sends requests over HTTP/1.1. `open` and `close` belong to the process's start and end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._dialer = Dialer(loop)
        self._pool = Pool(loop)
        self._dialing = 0

    @classmethod
    def open(cls) -> HttpTransport:
        """A transport with its own connections; needs a running loop."""
        return cls(asyncio.get_running_loop())

    async def close(self) -> None:
        """Close every connection, busy ones too, and wait until they are gone."""
        self._dialer.close()
        await self._pool.close()

    @property
    def connections(self) -> int:
        """How many upstream connections are busy now, those that are being made included."""
        return self._dialing + self._pool.busy

    async def send(self, request: UpstreamRequest, limits: Limits) -> HttpResponse:
        origin, head = prepared(request.url, tuple(request.headers.items()))
        kept = self._pool.take(origin)
        if kept is not None:
            try:
                return await _answer(kept, head, request.body)
            except Unanswered:
                # Two ends of one idle connection: the provider closed it while our request was on its way (RFC 9112, 9.3.1).
                pass
        return await _answer(await self._connected(origin, limits.connect), head, request.body)

    async def _connected(self, origin: Origin, seconds: float | None) -> Connection:
        self._dialing += 1
        try:
            connection = Connection(self._loop, self._pool, origin)
            await self._dialer.dial(origin, connection, seconds)
            self._pool.add(connection)
            return connection
        finally:
            self._dialing -= 1


async def _answer(connection: Connection, head: bytes, body: bytes) -> HttpResponse:
    """The response whose head is in; whoever stops waiting for it closes the connection."""
    waiting = connection.ask(head, body)
    try:
        return await waiting
    except asyncio.CancelledError:
        if waiting.cancelled() or not waiting.done():
            connection.abort()
        elif waiting.exception() is None:
            # It came in the same turn of the loop; its connection may be another's by now.
            waiting.result().close()
        raise
