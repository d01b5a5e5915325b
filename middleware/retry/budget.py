"""How many retries each target may still have.

Strategy: two counts per target (requests, retries) that fade with a time constant of a minute, looked at only when they change.
The one rule: memory is bounded, because clients may invent models without end: the least recently asked target goes first.
"""

from __future__ import annotations

import math
from collections import OrderedDict

MAX_TARGETS = 1024


class Budgets:
    """`share` of a target's recent requests may be retries, and `floor` a minute on top. now: seconds, monotonic."""

    FADE_SECONDS = 60.0

    def __init__(self, share: float, floor: int) -> None:
        self._share = share
        self.floor = floor
        self._counts: OrderedDict[str, tuple[float, float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def requested(self, target: str, now: float) -> None:
        """A first try is about to be made."""
        requests, retries = self._faded(target, now)
        self._keep(target, requests + 1, retries, now)

    def spend(self, target: str, now: float) -> bool:
        """May there be a retry? If so it is counted."""
        requests, retries = self._faded(target, now)
        # The sum of many thirds is no whole number: what is missing by a rounding is not missing.
        if retries + 1 > self.floor + self._share * requests + 1e-9:
            return False
        self._keep(target, requests, retries + 1, now)
        return True

    def _faded(self, target: str, now: float) -> tuple[float, float]:
        requests, retries, since = self._counts.get(target, (0.0, 0.0, now))
        left = math.exp(min(0.0, since - now) / self.FADE_SECONDS)
        return requests * left, retries * left

    def _keep(self, target: str, requests: float, retries: float, now: float) -> None:
        self._counts[target] = (requests, retries, now)
        self._counts.move_to_end(target)
        if len(self._counts) > MAX_TARGETS:
            self._counts.popitem(last=False)
