"""Exact-match cache: the same question again is answered by the recorded reply, streamed or whole as this client asks.

Strategy: the reply is recorded while it passes and stored after its clean end; a hit is a reply like any other, so that the relay
folds or unfolds it where its form is not what the client asked for. One entry serves both.
Cost: a hash per request; on a miss two appends and a look at the clock per batch; on a hit one write for all chunks.
The one rule: only what completed is stored. `Recorder.finish` runs on a clean end alone, so a reply that was cut, failed, was
refused or abandoned is never stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import orjson

from middleware.cache.asked import FASTEST, SLOWEST, Asked, Pace, Policy
from middleware.cache.asked import Usage as UsageChoice
from middleware.cache.entry import Entry
from middleware.cache.recorder import Recorder
from middleware.cache.replay import Later, Pauses, Replay, call_later, plan
from middleware.cache.store import Found, MemoryStore, Store
from proxy.call import Call, altered
from proxy.errors import Refused
from proxy.own_fields import OwnFields
from proxy.pipeline import Answer, Endpoint, Handler, Query, Sample
from proxy.question import Cacheable, question_key, scope_of
from proxy.reply import Head, Reply, Trailer, tapped
from proxy.units import Between, ByteSize, Seconds

Lifetime = Annotated[Seconds, Between(1, 259_200)]
Rate = Annotated[float, Between(SLOWEST, FASTEST)]
Size = Annotated[ByteSize, Between(1024, 2**40)]
Reason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]

COUNTERS = {
    "hits": "Calls that were answered from the cache.",
    "misses": "Calls that were looked for in the cache and not found.",
    "bypass": "Calls that were not looked for in the cache.",
    "stores": "Replies that were stored.",
    "saved_tokens": "Tokens (input and output) of the replies that came from the cache.",
}
# What the heads of hits are made from: `altered` takes a third of the time of making one.
HIT = Head("", cache="hit")


@dataclass(slots=True)
class Counts:
    """Of the calls so far; what each is, `COUNTERS` says."""

    hits: int = 0
    misses: int = 0
    bypass: int = 0
    stores: int = 0
    saved_tokens: int = 0


class Cache:
    """Caches replies to equal requests.

    mode: opt_in caches requests that ask for it, opt_out all that do not refuse. ttl: how long an entry lives where the request
    does not say; max_ttl: the most it may say. max_bytes: of all entries; max_entry_bytes: of one, a longer reply is not stored.
    scope: `key` keeps every client key's entries to itself, `shared` lets all find all. replay: how a hit comes back to a client
    that streams. usage: what it says about tokens. store: with which finish reasons a reply is worth storing.
    """

    FIELDS = ("cache", "replay")

    def __init__(
        self,
        *,
        mode: Literal["opt_in", "opt_out"] = "opt_in",
        ttl: Lifetime = 1800.0,
        max_ttl: Lifetime = 259_200.0,
        max_bytes: Size = 256 * 2**20,
        max_entry_bytes: Size = 2**20,
        scope: Literal["key", "shared"] = "key",
        replay: Literal["instant", "recorded"] | dict[Literal["chunks_per_second"], Rate] = "instant",
        usage: UsageChoice = "original",
        store: Sequence[Reason] = ("stop", "tool_calls", "function_call"),
        _store: Store | None = None,
        _clock: Callable[[], float] = time.monotonic,
        _later: Later = call_later,
    ) -> None:
        pace: Pace = replay.get("chunks_per_second", "instant") if isinstance(replay, dict) else replay
        self._policy = Policy(mode == "opt_in", min(ttl, max_ttl), max_ttl, pace, usage)
        self._most = max_entry_bytes
        self._shared = scope == "shared"
        self._worth = frozenset(store)
        self._store = MemoryStore(max_bytes, _clock) if _store is None else _store
        self._clock = _clock
        self._later = _later
        self._counts = Counts()
        self.endpoints = (Endpoint("DELETE", "/admin/cache", self._clear, admin=True),)

    def adopt(self, previous: Cache) -> None:
        """The entries live on, in as much room as there is now."""
        self._store = previous._store.resized(self._store)
        self._counts = previous._counts

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `cache`, `replay` and Cache-Control. Raises Refused (400) with the path."""
        asked = self._policy.read(own)
        return call if asked is None else altered(call, extensions={**call.extensions, Asked: asked, Cacheable: asked})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        asked = call.extension(Asked)
        if asked is None:
            self._counts.bypass += 1
            return (await next(call)).with_head(cache="bypass")
        key = question_key(call, asked.routing, scope_of(call, self._shared))
        if not asked.read:
            self._counts.bypass += 1
            return await self._recorded(call, next, asked, key, "bypass")
        found = await self._store.get(key)
        if found is not None:
            return await self._hit(call, asked, found)
        self._counts.misses += 1
        return await self._recorded(call, next, asked, key, "miss")

    async def _recorded(self, call: Call, next: Handler, asked: Asked, key: str, word: str) -> Reply:
        """The reply, taken down on its way."""
        began = self._clock()
        reply = await next(call)
        keep = partial(self._keep, key)
        recorder = Recorder(call, reply, asked.ttl, began, most=self._most, worth=self._worth, clock=self._clock, keep=keep)
        chunks = tapped(reply.chunks, recorder.see, recorder.finish)
        return altered(reply.with_head(cache=word), chunks=chunks)

    async def _keep(self, key: str, entry: Entry) -> None:
        if await self._store.set(key, entry):
            self._counts.stores += 1

    async def _hit(self, call: Call, asked: Asked, found: Found) -> Reply:
        """The recorded reply, its first chunk due. Who does not stream gets it at once, whatever the pace."""
        entry, trailer = found.entry, Trailer()
        self._counts.hits += 1
        self._counts.saved_tokens += entry.tokens
        pace: Pace = asked.pace if call.stream else "instant"
        steps, pauses = plan(entry, pace), None
        if pace != "instant":
            pauses = Pauses(self._clock, self._later)
            await pauses.until(steps[0][0])
            trailer.own(pauses.release)
        head = altered(HIT, target=entry.target, dropped=entry.dropped, age=found.age)
        return Reply(head, Replay(entry, steps, pauses, asked.usage, trailer), trailer, whole=entry.whole)

    async def _clear(self, query: Query) -> Answer:
        """`DELETE /admin/cache?key=NAME&name=TRACKING`: forget the entries of both, of one, or all; `{"deleted": 3}`."""
        for unknown in query.params.keys() - {"key", "name"}:
            # Read over, a misspelled one would delete everything.
            raise Refused(f"{unknown[:64]}: is not known here, only key and name.", code="invalid_value", param=unknown[:64])
        deleted = await self._store.clear(query.params.get("key"), query.params.get("name"))
        return Answer(orjson.dumps({"deleted": deleted}))

    def health(self) -> dict[str, Any]:
        figures = self._store.figures()
        return {"entries": figures.entries, "bytes": figures.bytes}

    def samples(self) -> Iterable[Sample]:
        figures = self._store.figures()
        for name, words in COUNTERS.items():
            yield Sample(f"penstock_cache_{name}_total", "counter", words, getattr(self._counts, name))
        for reason, count in figures.evictions.items():
            words = "Entries that the cache let go of, by reason."
            yield Sample("penstock_cache_evictions_total", "counter", words, count, {"reason": reason})
        yield Sample("penstock_cache_bytes", "gauge", "Memory that the entries take, in bytes.", figures.bytes)
        yield Sample("penstock_cache_entries", "gauge", "Entries in the cache.", figures.entries)
