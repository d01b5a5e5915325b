"""How many retries each target may still have.

Strategy: two counts per target (requests, retries) that fade with a time constant of a minute, looked at only when they change.
A request is one addition: what it finds is faded, and moved to the end of the queue, at most once a second.
The one rule: memory is bounded, because clients may invent models without end: the least recently asked target goes first.
"""

from __future__ import annotations

import math
from collections import OrderedDict

MAX_TARGETS = 1024
# Requests of the same second count as if they had come at its beginning: at most 1/60 off.
TICK = 1.0


class _Spent:
    """One target's counts, as they were at `since`."""

    __slots__ = ("requests", "retries", "since")

    def __init__(self, since: float) -> None:
        self.requests = 0.0
        self.retries = 0.0
        self.since = since


class Budgets:
    """`share` of a target's recent requests may be retries, and `floor` a minute on top. denied: how often `spend` said no.
    now: seconds, monotonic.
    """

    FADE_SECONDS = 60.0

    def __init__(self, share: float, floor: int) -> None:
        self.share = share
        self.floor = floor
        self.denied = 0
        self._counts: OrderedDict[str, _Spent] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def requested(self, target: str, now: float) -> None:
        """A first try is about to be made."""
        spent = self._counts.get(target)
        if spent is None or now - spent.since >= TICK:
            spent = self._faded(target, now)
        spent.requests += 1

    def spend(self, target: str, now: float) -> bool:
        """May there be a retry? If so it is counted."""
        spent = self._faded(target, now)
        # The sum of many thirds is no whole number: what is missing by a rounding is not missing.
        if spent.retries + 1 > self.floor + self.share * spent.requests + 1e-9:
            self.denied += 1
            return False
        spent.retries += 1
        return True

    def _faded(self, target: str, now: float) -> _Spent:
        """The target's counts as of now; it is the most recently asked one."""
        spent = self._counts.get(target)
        if spent is None:
            spent = self._counts[target] = _Spent(now)
            if len(self._counts) > MAX_TARGETS:
                self._counts.popitem(last=False)
            return spent
        self._counts.move_to_end(target)
        left = math.exp(min(0.0, spent.since - now) / self.FADE_SECONDS)
        spent.requests *= left
        spent.retries *= left
        spent.since = now
        return spent
