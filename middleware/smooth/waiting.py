"""What waits in a smoothed stream, and until when: two ways to hold chunks back.

Strategy: pure bookkeeping. `hold` takes a batch, `due` says when the next one may go, `take` gives what may go by then. The clock
is the caller's.
The one rule: everything comes out in the order in which it went in, and `take_all` leaves nothing.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from middleware.smooth.pieces import Pieces
from proxy.reply import Batch, Item, Run, single_events

# uvloop's timers go off up to a millisecond early.
GRAIN = 0.001


class Waiting(Protocol):
    """The chunks that wait. Times are the event loop's, in seconds."""

    def hold(self, batch: Batch, now: float) -> None: ...

    def due(self) -> float | None:
        """When something may go; None while nothing waits."""
        ...

    def take(self, now: float) -> list[Item]:
        """What may go now."""
        ...

    def take_all(self) -> list[Item]: ...


class Merging:
    """Joins what comes within `interval` seconds of the last departure, or until it is `size` bytes of text.

    What comes later than that after the last departure goes at once, so no chunk of a slow stream waits.
    """

    def __init__(self, interval: float, size: int) -> None:
        self._interval, self._size = interval, size
        self._pieces = Pieces(size)
        self._due = -math.inf
        self._any = False

    def hold(self, batch: Batch, now: float) -> None:
        self._any = True
        add = self._pieces.add
        for item in batch.items:
            add(item)

    def due(self) -> float | None:
        if not self._any:
            return None
        return -math.inf if self._pieces.size >= self._size else self._due

    def take(self, now: float) -> list[Item]:
        self._due = now + self._interval
        return self.take_all()

    def take_all(self) -> list[Item]:
        self._any = False
        return self._pieces.take()


class Spreading:
    """Lets one chunk go every `period` seconds; but none waits longer than `most` seconds, however fast they come."""

    def __init__(self, period: float, most: float) -> None:
        self._period, self._most = period, most
        self._queue: deque[tuple[float, Item]] = deque()
        self._last = -math.inf

    def hold(self, batch: Batch, now: float) -> None:
        for item in batch.items:
            for single in single_events(item) if isinstance(item, Run) else (item,):
                self._last = min(max(self._last + self._period, now), now + self._most)
                self._queue.append((self._last, single))

    def due(self) -> float | None:
        return self._queue[0][0] if self._queue else None

    def take(self, now: float) -> list[Item]:
        queue, found = self._queue, []
        while queue and queue[0][0] <= now + GRAIN:
            found.append(queue.popleft()[1])
        return found

    def take_all(self) -> list[Item]:
        found = [item for _, item in self._queue]
        self._queue.clear()
        return found
