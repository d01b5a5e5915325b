"""A client that is nothing but a socket: it reads only when told to, and leaves in the way that a test wants.

Strategy: a non-blocking socket under `loop.sock_*`, so that no stream buffer takes bytes behind the test's back.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WAYS = ("fin", "half_close", "rst")


class RawClient:
    """One connection to a gateway. received: all bytes so far."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        """A whole POST request."""
        await self.send(request_bytes(body, path))

    async def read(self, size: int = 65536) -> bytes:
        """Whatever comes next; b"" at the end. Raises ConnectionError at a reset."""
        data = await self._loop.sock_recv(self.sock, size)
        self.received += data
        return data

    async def read_until(self, needle: bytes, count: int = 1, seconds: float = 5.0) -> bytes:
        """Read until `needle` was seen `count` times in all that was received."""
        async with asyncio.timeout(seconds):
            while self.received.count(needle) < count:
                assert await self.read(), f"the answer ended before {needle!r}: {self.received[-500:]!r}"
        return self.received

    async def read_to_end(self, seconds: float = 10.0) -> bytes:
        async with asyncio.timeout(seconds):
            while await self.read():
                pass
        return self.received

    def leave(self, way: str) -> None:
        """fin: close (a reset, where bytes lie unread). half_close: FIN, but the socket stays. rst: a reset."""
        if way == "half_close":
            self.sock.shutdown(socket.SHUT_WR)
            return
        if way == "rst":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@contextmanager
def _closing(client: RawClient) -> Iterator[RawClient]:
    try:
        yield client
    finally:
        client.sock.close()


async def connected(port: int, *, receive_buffer: int | None = None) -> Any:
    """`with await connected(port) as client:`. receive_buffer: SO_RCVBUF, for a client whose socket is soon full."""
    sock = socket.socket()
    try:
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return _closing(RawClient(sock))


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw
