"""In which order the targets of a call are tried: ordered, weighted, least latency, cheapest.

Strategy: one pure function per strategy, from targets to the same targets in another order; those that were not chosen follow as
fallbacks. Randomness comes from outside.
The one rule: an order names every target once, so that whatever is chosen can still be fallen back from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from middleware.fallback.prices import Prices, blend
from middleware.fallback.targets import Targets
from proxy.call import Route, Target

T = TypeVar("T")
Random = Callable[[], float]


def weighted(items: Sequence[T], weights: Sequence[float], random: Random) -> list[T]:
    """One drawn by weight, then the others by weight. weights: any positive scale; empty means equal."""
    found = list(weights) or [1.0] * len(items)
    by_weight = sorted(range(len(items)), key=lambda place: -found[place])
    drawn, rest = by_weight[-1], random() * sum(found)
    for place in by_weight:
        rest -= found[place]
        if rest < 0:
            drawn = place
            break
    return [items[drawn], *(items[place] for place in by_weight if place != drawn)]


def least(items: Sequence[T], seconds: Sequence[float], random: Random) -> list[T]:
    """The faster of two drawn at random (so that not everybody runs to the one that was fastest a moment ago), then the others
    by speed. https://www.eecs.harvard.edu/~michaelm/postscripts/handbook2001.pdf"""
    by_speed = sorted(range(len(items)), key=lambda place: seconds[place])
    one = int(random() * len(items))
    other = int(random() * (len(items) - 1))
    other += other >= one
    chosen = min(one, other, key=by_speed.index)
    return [items[chosen], *(items[place] for place in by_speed if place != chosen)]


class Choice:
    """Orders the targets of a route. What it needs to know (speeds, prices) is asked for per call."""

    def __init__(self, targets: Targets, random: Random, clock: Callable[[], float]) -> None:
        self._targets = targets
        self._random = random
        self._clock = clock
        self._prices = Prices()

    async def order(self, route: Route, here: Mapping[str, Target], *, stream: bool) -> list[Target]:
        """The route's targets, best first. here: those that may be asked, by name (a layer further out may have left some out, or
        given them another key)."""
        places = [place for place, target in enumerate(route.targets) if target.name in here]
        found = [here[route.targets[place].name] for place in places]
        if len(found) < 2:
            return found
        if route.strategy == "weighted":
            weights = [route.weights[place] for place in places] if route.weights else []
            return weighted(found, weights, self._random)
        if route.strategy == "least_latency":
            return least(found, [self._seconds(target, stream) for target in found], self._random)
        if route.strategy == "cheapest":
            return await self._cheapest(route, places, found)
        return found

    def _seconds(self, target: Target, stream: bool) -> float:
        known = self._targets.of(target)
        return (known.speed if stream else known.whole).average(self._clock())

    async def _cheapest(self, route: Route, places: Sequence[int], targets: list[Target]) -> list[Target]:
        prices = await self._prices.of(targets)
        if route.prices:
            own = [route.prices[place] for place in places]
            prices = [blend(price) if price is not None else table for price, table in zip(own, prices, strict=True)]
        return [target for _, target in sorted(zip(prices, targets, strict=True), key=lambda pair: pair[0])]
