"""Who is counted, in bounded memory, and how many replies each has open.

Strategy: labels come from clients, who can invent them without end. At most `most` are told apart, in order of their last use;
one that was idle for a minute makes room (its meters are whole again by then), and while none is, newcomers share one place per
owner.
The one rule: a label counts within its owner (the key), so nobody can use up another's allowance by knowing a name.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

IDLE_SECONDS = 60.0


class Subjects:
    """The subjects of one kind. open: all replies that hold a slot now. clock: seconds, monotonic."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._open: dict[str, int] = {}
        self.clock = clock
        self.open = 0

    def __len__(self) -> int:
        return len(self._seen)

    def subject(self, owner: str, label: str) -> str:
        """Under which name a label of this owner is counted. Owners are names from config, so without NUL."""
        found, now = f"{owner}\0{label}", self.clock()
        if found not in self._seen and not self._room(now):
            return f"{owner}\0"
        self._seen[found] = now
        self._seen.move_to_end(found)
        return found

    def _room(self, now: float) -> bool:
        if len(self._seen) < self.most:
            return True
        oldest, used = next(iter(self._seen.items()))
        if now - used < IDLE_SECONDS:
            return False
        if oldest in self._open:
            # A long stream: it stays, as one that was just used.
            self._seen[oldest] = now
            self._seen.move_to_end(oldest)
            return False
        del self._seen[oldest]
        return True

    def enter(self, subject: str, most: int) -> int | None:
        """Take a slot; how many are left after it, None where there was none."""
        taken = self._open.get(subject, 0)
        if taken >= most:
            return None
        self._open[subject] = taken + 1
        self.open += 1
        return most - taken - 1

    def leave(self, subject: str) -> None:
        """Give one slot back."""
        left = self._open[subject] - 1
        self.open -= 1
        if left:
            self._open[subject] = left
        else:
            del self._open[subject]
