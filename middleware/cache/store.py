"""Where entries lie: an interface, and the memory of this process.

Strategy: `cachetools.TLRUCache` with sizes in bytes and a time to live per entry; when a new entry needs room, what has expired
goes first, then what was used least recently.
The one rule: the bytes held never exceed `max_bytes`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cachetools import Cache, TLRUCache

from middleware.cache.entry import Entry


class Found(NamedTuple):
    """An entry and how many seconds ago it was stored."""

    entry: Entry
    age: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What is held now. evictions: how many entries went so far, by reason: `size` or `expired`."""

    entries: int
    bytes: int
    evictions: Mapping[str, int]


class Store(Protocol):
    """Keeps entries by key. None of these raises: a store that fails has found nothing, or has stored nothing."""

    async def get(self, key: str) -> Found | None:
        """The entry, unless its time is over."""

    async def set(self, key: str, entry: Entry) -> bool:
        """Keep it for `entry.ttl` seconds, in place of an older one; False where it is too large to be kept."""

    async def delete(self, key: str) -> bool:
        """Forget one entry; was there one?"""

    async def clear(self, key_name: str | None = None, name: str | None = None) -> int:
        """Forget the entries of a client key, of a tracking name, of both, or all; how many there were."""

    def figures(self) -> Figures:
        """What is held now; without waiting."""

    def resized(self, other: Store) -> Store:
        """The store to go on with where a reload made another: this one in the other's size, or the other if it keeps its entries
        elsewhere."""


class _Held(NamedTuple):
    entry: Entry
    size: int
    since: float


class _Counted(TLRUCache[str, _Held, float]):
    """The cache, counting what it lets go of and why."""

    def __init__(self, max_bytes: int, clock: Callable[[], float]) -> None:
        super().__init__(max_bytes, lambda key, held, now: now + held.entry.ttl, clock, lambda held: held.size)
        self.evictions: Counter[str] = Counter(size=0, expired=0)

    def resize(self, max_bytes: int) -> None:
        """cachetools has no way to; the name is that of its own private attribute."""
        self._Cache__maxsize = max_bytes
        self.expire()
        while self.currsize > max_bytes:
            self.popitem()

    def popitem(self) -> tuple[str, _Held]:
        found = super().popitem()
        self.evictions["size"] += 1
        return found

    def expire(self, time: float | None = None) -> Any:
        found = super().expire(time)
        if found:
            self.evictions["expired"] += len(found)
        return found


class MemoryStore:
    """In this process, and gone with it. max_bytes: of all entries together. clock: seconds, monotonic."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cache = _Counted(max_bytes, clock)

    async def get(self, key: str) -> Found | None:
        try:
            held = self._cache[key]  # not `get`, which looks twice
        except KeyError:
            return None
        return Found(held.entry, max(0.0, self._clock() - held.since))

    async def set(self, key: str, entry: Entry) -> bool:
        try:
            self._cache[key] = _Held(entry, entry.size, self._clock())
        except ValueError:  # larger than the whole cache
            # Whoever stores anew no longer wants the older one.
            self._cache.pop(key, None)
            return False
        return True

    async def delete(self, key: str) -> bool:
        return self._cache.pop(key, None) is not None

    async def clear(self, key_name: str | None = None, name: str | None = None) -> int:
        # Past the cache's own look-up: looking for what to forget is no use of it.
        held = {key: Cache.__getitem__(self._cache, key).entry for key in list(self._cache)}
        gone = [key for key, entry in held.items() if key_name in (None, entry.key_name) and name in (None, entry.name)]
        for key in gone:
            self._cache.pop(key, None)
        return len(gone)

    def resized(self, other: Store) -> Store:
        if not isinstance(other, MemoryStore):
            return other
        self._cache.resize(int(other._cache.maxsize))
        return self

    def figures(self) -> Figures:
        return Figures(len(self._cache), int(self._cache.currsize), dict(self._cache.evictions))
