"""What is counted, in plain objects: an increase is an addition, an observation a bisection and two additions.

Strategy: prometheus_client's own counters take a lock, histograms also walk through their bounds, and each look-up of a child
hashes its label values again: 14 us for the dozen figures of a streamed request, where these take 4. So figures are kept here and
prometheus_client only writes them down when somebody scrapes (families.py).
The one rule: all of it happens on the event loop, so nothing is locked, and a read copies.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Values = tuple[str, ...]


class Figure:
    """A counter, or a gauge, which may also fall."""

    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value: float = 0

    def inc(self, amount: float = 1) -> None:
        self._value += amount

    def read(self) -> float:
        return self._value


class Histogram:
    """bounds: of the buckets, ascending and without infinity; a value that equals a bound belongs below it (`le`)."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum: float = 0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> tuple[list[int], float]:
        """How many values there are in each bucket alone, the last one reaching to infinity, and the sum of all values."""
        return self._counts.copy(), self._sum


T = TypeVar("T", Figure, Histogram)


class Tallies(Generic[T]):
    """All series of one metric, by their label values. make: a new one's tally."""

    __slots__ = ("_make", "_series")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] = make
        self._series: dict[Values, T] = {}

    def __call__(self, *values: str) -> T:
        """The tally of these label values; from now on it is on the page."""
        tally = self._series.get(values)
        if tally is None:
            tally = self._series[values] = self._make()
        return tally

    def read(self) -> list[tuple[Values, Any]]:
        """Label values and what the tally reads, in the order in which the series began."""
        return [(values, tally.read()) for values, tally in self._series.items()]
