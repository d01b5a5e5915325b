"""Connections that wait for their next request.

Strategy: a stack per origin: the connection used last is the one least likely to have been closed by the provider meanwhile, and
the rest grow old and go. One timer for all of them, set only while some wait.
The one rule: a connection is in here exactly while nobody uses it and nothing is expected from it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy.upstream.request import Origin

if TYPE_CHECKING:
    from proxy.upstream.connection import Connection

KEEP_SECONDS = 30.0


class Pool:
    """All connections of a transport. standing: those that are open, waiting or busy. closed: no more may be opened."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._free: dict[Origin, list[Connection]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Future[None] | None = None
        self.standing: set[Connection] = set()
        self.closed = False

    @property
    def busy(self) -> int:
        return sum(connection.busy for connection in self.standing)

    def add(self, connection: Connection) -> None:
        """A connection that has been made. Not before: uvloop does not call `connection_lost` where its making is cancelled."""
        if self.closed:
            connection.cut()
        elif connection.open:
            self.standing.add(connection)

    def take(self, origin: Origin) -> Connection | None:
        """The connection to `origin` that was given last."""
        free = self._free.get(origin)
        return free.pop() if free else None

    def give(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        connection.since = self._loop.time()
        free = self._free.get(connection.origin)
        if free is None:
            self._free[connection.origin] = [connection]
        else:
            free.append(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(KEEP_SECONDS, self.sweep)

    def forget(self, connection: Connection) -> None:
        """Do not hand out a connection that has ended. Idempotent."""
        free = self._free.get(connection.origin, [])
        if connection in free:
            free.remove(connection)

    def left(self, connection: Connection) -> None:
        """The connection is closed."""
        self.forget(connection)
        self.standing.discard(connection)
        if not self.standing and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def sweep(self) -> None:
        """Close what has waited too long, and come back when the next one will have."""
        now = self._loop.time()
        self._timer = None
        for origin, free in list(self._free.items()):
            old = sum(connection.since <= now - KEEP_SECONDS for connection in free)
            gone, free[:] = free[:old], free[old:]
            if not free:
                del self._free[origin]
            for connection in gone:
                connection.abort()
        if self._free:
            oldest = min(free[0].since for free in self._free.values())
            self._timer = self._loop.call_at(oldest + KEEP_SECONDS + 0.001, self.sweep)

    async def close(self) -> None:
        """Close every connection; a response still being read ends as cut."""
        self.closed = True
        self._emptied = self._loop.create_future()
        for connection in list(self.standing):
            connection.cut()
        if self.standing:
            await self._emptied
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
