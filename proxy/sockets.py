"""Listening: bound sockets, and aiohttp's low-level server with the settings that a streaming proxy needs.

The one rule: a client's leaving is noticed at once, whatever is still queued for it.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

KEEP_ALIVE_SECONDS = 75.0
HEADER_LIMIT = 2**15


def server(handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> web.Server:
    """aiohttp's server without application or resolver; a handler whose client has left is cancelled."""
    return _Server(
        handle,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        max_line_size=HEADER_LIMIT,
        max_field_size=HEADER_LIMIT,
        auto_decompress=True,
    )


class _Connection(RequestHandler):
    """aiohttp's server protocol, with one thing changed: a client that closes while bytes to it are still queued is gone at once,
    rather than when the queue has been flushed, which may be never."""

    __slots__ = ()

    def eof_received(self) -> None:
        if self.transport is not None and self.transport.get_write_buffer_size():
            self.transport.abort()


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


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
