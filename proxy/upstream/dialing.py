"""New connections: names to addresses, addresses to a socket, TLS on top.

Strategy: addresses of one name are asked for once a minute, however many connections want them, and used in turn. Where a name
has several, they are raced (RFC 8305, through aiohappyeyeballs, because uvloop's own create_connection cannot).
The one rule: whatever stops a dial, its socket is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from functools import cached_property
from typing import Any

from aiohappyeyeballs import AddrInfoType, start_connection

from proxy.errors import UpstreamTimeout
from proxy.upstream.faults import invalid_url, unconnected, unresolved
from proxy.upstream.request import Origin

KEEP_ADDRESSES_SECONDS = 60.0
NEXT_ADDRESS_SECONDS = 0.25  # RFC 8305, 5: "Connection Attempt Delay"

Place = tuple[str, int]


class Dialer:
    """Connects protocols to origins."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._known: dict[Place, tuple[float, deque[AddrInfoType]]] = {}
        self._asked: dict[Place, asyncio.Task[list[Any]]] = {}

    async def dial(self, origin: Origin, protocol: asyncio.Protocol, seconds: float | None) -> None:
        """Connect within `seconds` in all. Raises UpstreamUnreachable, UpstreamTimeout("connect")."""
        try:
            async with asyncio.timeout(seconds) as limit:
                await self._dial(origin, protocol)
        except TimeoutError as error:
            raise UpstreamTimeout("connect", seconds or 0.0) if limit.expired() else unconnected(error) from None
        except (OSError, RuntimeError) as error:  # uvloop has RuntimeErrors for some
            raise unconnected(error) from None
        except ValueError:  # not even a name: a label too long, say
            raise invalid_url() from None

    def close(self) -> None:
        for asking in self._asked.values():
            asking.cancel()

    async def _dial(self, origin: Origin, protocol: asyncio.Protocol) -> None:
        addresses = await self._addresses(origin.host, origin.port)
        sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, loop=self._loop)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            secured: dict[str, Any] = {}
            if origin.tls:
                secured = {"ssl": self._tls, "server_hostname": origin.host.rstrip(".")}
            await self._loop.create_connection(lambda: protocol, sock=sock, **secured)
        except BaseException:
            sock.close()
            raise

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """The system's trust, read once; 20 ms and more."""
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    async def _addresses(self, host: str, port: int) -> list[Any]:
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        place = (host, port)
        until, found = self._known.get(place, (0.0, None))
        if found is None or until <= self._loop.time():
            found = deque(await self._ask(place))
            self._known[place] = (self._loop.time() + KEEP_ADDRESSES_SECONDS, found)
        found.rotate(-1)
        return list(found)

    async def _ask(self, place: Place) -> list[Any]:
        """One question for all that want to know; whoever stops waiting does not stop it for the others."""
        asking = self._asked.get(place)
        if asking is None:
            asking = self._asked[place] = self._loop.create_task(self._resolve(place))
            asking.add_done_callback(lambda done: self._told(place, done))
        try:
            return await asyncio.shield(asking)
        except socket.gaierror:
            raise unresolved() from None
        except asyncio.CancelledError:
            if asking.cancelled():  # the transport was closed; nobody has cancelled us
                raise unresolved() from None
            raise

    async def _resolve(self, place: Place) -> list[Any]:
        return await self._loop.getaddrinfo(*place, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)

    def _told(self, place: Place, asking: asyncio.Task[list[Any]]) -> None:
        del self._asked[place]
        if not asking.cancelled():
            asking.exception()  # somebody has seen it, even if everybody has left
