"""From a call and its end to all that it increases, with one look-up.

Strategy: all that the labels are made of (kind, route, target, key, name, status, outcome, cache) is the key of a `Series`, which
holds the tallies themselves. It is remembered where labels.py has let in every word of it; where something became `other` it is
made anew each time, for such a target may yet get a label of its own, and clients invent further ones without end.
The one rule: nothing is remembered of what labels.py has not let in, and never more than `KEPT`.
"""

from __future__ import annotations

from functools import cached_property

from middleware.metrics.families import Families
from middleware.metrics.labels import DIRECT, OTHER, Labels
from middleware.metrics.tallies import Figure, Histogram
from proxy.call import Call, Kind
from proxy.errors import SUCCESSES, Outcome

KEPT = 4096  # of about half a KiB each; the tallies themselves stay when these are forgotten
# OpenTelemetry's words for what was asked.
OPERATIONS: dict[Kind, str] = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings"}
Who = tuple[str, str, str, str]


class Series:
    """What calls of the same labels increase. Each tally is taken up when it is first needed: what never happened has no series.

    target: its label. who: (route, target, key, name), bounded further: its target may be `other` although `target` is not.
    """

    def __init__(self, families: Families, call: Call, target: str, who: Who, outcome: Outcome, status: int, cache: str) -> None:
        provider, _, model = target.partition("/")
        self._families = families
        self._target = target
        self._who = who
        self._operation = (OPERATIONS[call.kind], provider, model or OTHER)
        self._outcome = outcome
        self._status = status
        self._cache = cache

    @cached_property
    def requests(self) -> Figure:
        return self._families.requests(*self._who, str(self._status), self._outcome.value)

    @cached_property
    def request(self) -> Histogram:
        return self._families.request(self._who[0], self._cache)

    @cached_property
    def overhead(self) -> Histogram:
        return self._families.overhead(self._who[0])

    @cached_property
    def gap(self) -> Histogram:
        return self._families.gap(*self._who[:2])

    @cached_property
    def stalls(self) -> Figure:
        return self._families.stalls(*self._who[:2])

    @cached_property
    def duration(self) -> Histogram:
        error_type = "" if self._outcome in SUCCESSES else self._outcome.value
        return self._families.duration(*self._operation, error_type)

    @cached_property
    def first_chunk(self) -> Histogram:
        return self._families.first_chunk(*self._operation)

    @cached_property
    def usage_input(self) -> Histogram:
        return self._families.usage(*self._operation, "input")

    @cached_property
    def usage_output(self) -> Histogram:
        return self._families.usage(*self._operation, "output")

    @cached_property
    def input(self) -> Figure:
        return self._families.tokens(*self._who, "input")

    @cached_property
    def output(self) -> Figure:
        return self._families.tokens(*self._who, "output")

    @cached_property
    def cached(self) -> Figure:
        return self._families.tokens(*self._who, "cached")

    @cached_property
    def reasoning(self) -> Figure:
        return self._families.tokens(*self._who, "reasoning")

    @cached_property
    def cost(self) -> Figure:
        return self._families.cost(*self._who)

    @cached_property
    def estimated_input(self) -> Figure:
        return self._families.estimated(*self._who, "input")

    @cached_property
    def estimated_output(self) -> Figure:
        return self._families.estimated(*self._who, "output")

    @cached_property
    def estimated_cost(self) -> Figure:
        return self._families.estimated_cost(*self._who)

    @cached_property
    def no_usage(self) -> Figure:
        return self._families.unpriced(self._target, "no_usage")

    @cached_property
    def no_price(self) -> Figure:
        return self._families.unpriced(self._target, "no_price")


class Index:
    """Finds the series of a call that has ended."""

    def __init__(self, families: Families, labels: Labels) -> None:
        self._families = families
        self._labels = labels
        self._kept: dict[tuple[object, ...], Series] = {}

    def __call__(self, call: Call, target: str, outcome: Outcome, status: int, cache: str, *, answered: bool) -> Series:
        """target: `provider/model`, who answered or was asked last. cache: as in `Head`, empty for None. answered: did it?"""
        key = (call.kind, call.route.name, target, call.principal.name, call.name, status, outcome, cache)
        found = self._kept.get(key)
        if found is None:
            labels = self._labels
            route, label = labels.route(call), labels.target(call, target, answered=answered)
            who = labels.asked(call, route, label)
            found = Series(self._families, call, label, who, outcome, status, cache)
            if who == _plain(call, target):
                self._keep(key, found)
        return found

    def _keep(self, key: tuple[object, ...], series: Series) -> None:
        if len(self._kept) >= KEPT:
            self._kept.clear()
        self._kept[key] = series


def _plain(call: Call, target: str) -> Who:
    """The labels of a call of which nothing has become `other`."""
    route = call.route.name
    return (DIRECT if route is None else route, target, call.principal.name, call.name or "")
