"""Requests and tokens per minute, on throttled-py's GCRA: the one place that knows the library.

Strategy: GCRA is a bucket that holds a minute's worth and refills evenly, kept as one number per key, so that the same few lines
run in memory now and as one Redis script later (`store`). Reserve, then settle: the settling limiter shares key and rate with the
reserving one but may go below zero, so that a reply longer than its estimate is paid for by the next minute.
The one rule: `take` admits nothing beyond the bucket, and takes nothing where it refuses.

Why throttled-py: typed, async, bounded memory, no work in the background. `limits` scans all its keys in a task on every hit.
GCRA: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from throttled.asyncio import BaseStore, MemoryStore, per_min
from throttled.asyncio.rate_limiter import GCRARateLimiter

# How far below zero a bucket can be: more than any reply can cost.
DEBT = 10**12
PREFIX = "penstock"


@dataclass(frozen=True, slots=True)
class Level:
    """A bucket after it was asked. wait: seconds until the same can be had, 0 where it was. reset: until the bucket is full."""

    limit: int
    remaining: int
    reset: float
    wait: float = 0.0


class Meters:
    """Buckets by key. most: how many are kept in memory, the least recently used goes first. store: throttled-py's, for a shared
    one. A limit is per minute; a cost beyond it is brought down to it, so that a full bucket always admits.
    """

    def __init__(self, most: int = 2**16, store: BaseStore | None = None) -> None:
        self._store = store or MemoryStore(options={"MAX_SIZE": most})
        # By what operators wrote into config and keys files: few.
        self._limiters: dict[tuple[int, bool], GCRARateLimiter] = {}

    def _limiter(self, limit: int, *, debt: bool = False) -> GCRARateLimiter:
        found = self._limiters.get((limit, debt))
        if found is None:
            quota = per_min(limit, burst=DEBT if debt else limit)
            found = self._limiters[limit, debt] = GCRARateLimiter(quota, self._store, key_prefix=PREFIX)
        return found

    async def look(self, key: str, limit: int, cost: int) -> Level:
        """What `take` would answer, if nobody comes between."""
        if limit < 1:
            return Level(0, 0, 60.0, 60.0)
        state = await self._limiter(limit, debt=True).peek(key)
        left = limit - math.ceil(state.reset_after * limit / 60)
        cost = min(cost, limit)
        wait = 0.0 if left >= cost else state.reset_after - (limit - cost) * 60 / limit
        return Level(limit, max(0, left), state.reset_after, wait)

    async def take(self, key: str, limit: int, cost: int) -> Level:
        """Take `cost` out of the bucket, all or nothing."""
        if limit < 1:
            return Level(0, 0, 60.0, 60.0)
        result = await self._limiter(limit).limit(key, min(cost, limit))
        state = result.state
        wait = max(state.retry_after, 0.001) if result.limited else 0.0
        return Level(limit, max(0, state.remaining), state.reset_after, wait)

    async def settle(self, key: str, limit: int, difference: int) -> None:
        """Take `difference` more, into debt if need be; give back where it is negative, never more than was taken.

        The library keeps a bucket that is not full, so up to one token stays behind where everything is given back.
        """
        limiter = self._limiter(limit, debt=True)
        if difference < 0:
            taken = math.ceil((await limiter.peek(key)).reset_after * limit / 60 - 1e-6) - 1
            difference = -min(-difference, max(0, taken))
        if difference:
            await limiter.limit(key, difference)
