"""Which of a provider's keys is used: the first that is not resting.

Strategy: a key that was rate limited or refused rests, as long as the provider said or for a fixed time; the others are tried in
the order of config.yaml. When all rest, the one that is free soonest is tried.
The one rule: keys are told apart by their place in the list; no key is ever stored, compared or shown here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from proxy.call import Provider, Target

# Seconds that a key rests where the provider does not say how long.
REST = 10.0
REFUSED_REST = 60.0


class Keys:
    """clock: seconds, monotonic. Keeps one number per key of config.yaml that ever rested."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[tuple[str, int], float] = {}

    def rest(self, provider: Provider, place: int, seconds: float) -> None:
        """Do not use this key for `seconds`."""
        self._until[provider.name, place] = self._clock() + seconds

    def forget(self, providers: Collection[str]) -> None:
        """The keys of these providers may be others."""
        self._until = {key: until for key, until in self._until.items() if key[0] not in providers}

    def free_in(self, provider: Provider) -> float:
        """Seconds until the first of the provider's keys is free; 0 if one is."""
        places = range(1 + len(provider.further_keys))
        return max(0.0, min(self._until.get((provider.name, place), 0.0) for place in places) - self._clock())

    def usable(self, target: Target) -> Iterator[tuple[int, Target]]:
        """(place, the target with that key), in the order in which to try them. `further_keys` of each are those that come after
        it, so that whoever is further in sees that a 429 is not yet the provider's last word."""
        provider = target.provider
        keys = (provider.api_key, *provider.further_keys)
        places = self._places(provider.name, len(keys))
        for number, place in enumerate(places):
            further = tuple(key for other in places[number + 1 :] if (key := keys[other]) is not None)
            if place == 0 and further == provider.further_keys:
                yield place, target  # none rests: it is this very one
                continue
            yield place, replace(target, provider=replace(provider, api_key=keys[place], further_keys=further))

    def resting(self) -> dict[str, int]:
        """How many keys rest now, by provider."""
        now = self._clock()
        found: dict[str, int] = {}
        for (name, _), until in self._until.items():
            found[name] = found.get(name, 0) + (until > now)
        return {name: count for name, count in found.items() if count}

    def _places(self, name: str, count: int) -> list[int]:
        now = self._clock()
        free = [place for place in range(count) if self._until.get((name, place), 0.0) <= now]
        return free or [min(range(count), key=lambda place: self._until[name, place])]
