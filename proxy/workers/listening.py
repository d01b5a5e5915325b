"""A listening socket per worker and address, so that the kernel spreads connections evenly (SO_REUSEPORT, as Linux has it).

Strategy: the supervisor binds them and keeps them open, workers inherit their own. So a connection that waits in the queue of a
worker that was killed is not reset: its successor takes it. A socket is bound before anybody listens on it, and only listening
ones are given connections. Elsewhere, where the option does not spread (macOS), all workers share one socket.
The one rule: the first socket of an address is bound without the option: with it, two gateways could share a port by mistake.

man 7 socket, SO_REUSEPORT: https://lwn.net/Articles/542629/
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

Bound = tuple[Sequence[socket.socket], Sequence[socket.socket]]
SPREADS = sys.platform == "linux"


class Ports:
    """The sockets of `workers` workers. bind: those for the port and the admin address, bound; it raises OSError."""

    def __init__(self, bind: Callable[[], Bound], workers: int, *, spreads: bool = SPREADS) -> None:
        first = bind()
        self._spreads = spreads
        self.port = first[0][-1].getsockname()[1]
        self._slots: list[Bound | None] = [first] * workers
        if spreads:
            # A port that the system chose is this gateway's once the first socket with the option stands.
            self._names = [[(sock.family, sock.getsockname()) for sock in group] for group in first]
            _close(first)
            self._slots = [self._bound() for _ in range(workers)]

    def of(self, worker: int) -> Bound:
        """The sockets of one worker: those of its predecessor if they still listen."""
        found = self._slots[worker]
        if self._spreads and (found is None or not _listening(found)):
            self.close(worker)
            found = self._slots[worker] = self._bound()
        assert found is not None
        return found

    def close(self, worker: int) -> None:
        """Nobody will take its connections for a while: the kernel is to give them to the others."""
        if self._spreads and (found := self._slots[worker]) is not None:
            _close(found)
            self._slots[worker] = None

    def keep_only(self, worker: int) -> None:
        """In the worker's process: close those of the others."""
        for other in range(len(self._slots)):
            if other != worker:
                self.close(other)

    def close_all(self) -> None:
        for found in self._slots:
            if found is not None:
                _close(found)
        self._slots = [None] * len(self._slots)

    def _bound(self) -> Bound:
        made = [[_shared(family, name) for family, name in group] for group in self._names]
        return made[0], made[1]


def leave(sockets: Bound) -> None:
    """Stop listening in this process and, where each worker has its own, in the supervisor: new connections go to the others."""
    if SPREADS:
        for sock in sockets[0]:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _shared(family: int, name: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(name)
    return sock


def _listening(found: Bound) -> bool:
    return all(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for group in found for sock in group)


def _close(found: Bound) -> None:
    for group in found:
        for sock in group:
            sock.close()
