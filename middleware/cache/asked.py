"""What a request says about the cache, read once, before anything is asked.

    cache: {type: "exact_match", ttl: 3600, replay: "recorded", usage: "zero"} · cache: true · cache: false
    replay: "instant" | "recorded" | {chunks_per_second: 20}
    Cache-Control: no-cache (do not read, but store) · no-store (neither)

Strategy: `Policy` holds what the operator decided, `read` gives what holds for one request.
The one rule: a request may narrow what the operator allows, never widen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proxy.own_fields import Field, OwnFields
from proxy.question import Cacheable, directives, routing_of

# Chunks per second, or one of the two words.
Pace = Literal["instant", "recorded"] | float
Usage = Literal["original", "zero"]

SLOWEST, FASTEST = 0.1, 10_000.0


@dataclass(frozen=True, slots=True)
class Asked(Cacheable):
    """What the cache does for one request. read: look for an entry first. ttl: of what is stored, in seconds.

    pace: how a hit comes back. routing: part of the key.
    """

    ttl: float
    pace: Pace
    usage: Usage


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator decided. opt_in: only requests that ask are cached. max_ttl: seconds, the most a request may ask for."""

    opt_in: bool
    ttl: float
    max_ttl: float
    pace: Pace
    usage: Usage

    def read(self, own: OwnFields) -> Asked | None:
        """What holds for this request; None where the cache stays out of it. Raises Refused with the path."""
        cache, replay = own.get("cache"), own.get("replay")
        if cache is None and replay is None and self.opt_in:
            return None  # as most requests, and what they say in Cache-Control changes nothing then
        wanted = self._wanted(cache)
        details = cache if cache is not None and not isinstance(cache.value, bool) else None
        ttl, pace, usage = self._details(details, replay)
        words = directives(own.headers.get("cache-control", ""))
        if not wanted or "no-store" in words:
            return None
        return Asked("no-cache" not in words, routing_of(own), ttl, pace, usage)

    def _wanted(self, cache: Field | None) -> bool:
        if cache is None:
            return not self.opt_in
        if isinstance(cache.value, bool):
            return cache.value
        if not isinstance(cache.value, dict):
            cache.refuse("must be true, false or an object such as {type: exact_match, ttl: 3600}")
        if (kind := cache.get("type")) is not None:
            kind.one_of(("exact_match",))
        return True

    def _details(self, cache: Field | None, replay: Field | None) -> tuple[float, Pace, Usage]:
        ttl, usage = (cache.get("ttl"), cache.get("usage")) if cache else (None, None)
        replay = (cache.get("replay") if cache else None) or replay
        return (
            ttl.number(1, self.max_ttl) if ttl else self.ttl,
            _pace(replay) if replay else self.pace,
            ("zero" if usage.one_of(("original", "zero")) == "zero" else "original") if usage else self.usage,
        )


def _pace(replay: Field) -> Pace:
    if isinstance(replay.value, dict):
        rate = replay.get("chunks_per_second") or replay.refuse("must have chunks_per_second")
        return rate.number(SLOWEST, FASTEST)
    return "recorded" if replay.one_of(("instant", "recorded")) == "recorded" else "instant"
