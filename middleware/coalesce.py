"""Single flight: the same question, asked while it is being answered, is answered by the same reply.

Strategy: the first to ask leads; its call goes in through the cache, in a task of its own, and becomes a flight (proxy/shared.py,
proxy/flight) that the others join: what has come at once, then each chunk as it comes. It ends with the last who left, and
stands in the table only as long as somebody can still have it from the start.
It belongs outside of the cache, whose recorder then survives the leader's leaving: what a flight was is a hit from then on.
The one rule: in doubt a request flies alone. Whose answers may be shared is decided as the cache decides it (proxy/question.py).

Cost: of a request that nobody joins 19 us (a task, a flight, a follower, a hash), and 3 thousand instructions per paced chunk,
which takes 39 without; of one that takes no part, a look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from proxy.call import Call, altered
from proxy.errors import Outcome
from proxy.flight import Bounds
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.question import Cacheable, Keyed, directives, question_key, routing_of, scope_of
from proxy.reply import Reply
from proxy.shared import SharedCall
from proxy.units import Between, ByteSize

Size = Annotated[ByteSize, Between(1024, 2**30)]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request itself, or `mode: all`, says. routing: part of the question. together: may it share a reply?"""

    together: bool
    routing: Mapping[str, Any]


ALONE = Wish(False, {})


class Coalesce:
    """Lets equal requests that are in flight at the same time share one reply.

    mode: `cached` are the requests that the cache answers (those that ask for it; with `opt_out` all that do not refuse), and
    those that say `coalesce: true`; `all`: all that do not say `coalesce: false`. scope: `key` lets requests of one client key
    share, `shared` those of all. max_flight_bytes: what is kept for those who come later; a longer reply can be joined no more.
    max_lag_bytes: how far behind a client may be; one that stays further behind for `server.write_timeout` is dropped.
    """

    FIELDS = ("coalesce",)

    def __init__(
        self,
        *,
        mode: Literal["cached", "all"] = "cached",
        scope: Literal["key", "shared"] = "key",
        max_flight_bytes: Size = 2**20,
        max_lag_bytes: Size = 2**20,
    ) -> None:
        self._all = mode == "all"
        self._shared = scope == "shared"
        self._bounds = Bounds(max_flight_bytes, max_lag_bytes)
        self._bookkeepers: Sequence[Callable[[Call, Reply], None]] = ()
        self._open: dict[str, SharedCall] = {}
        self._led = self._joined = 0

    def attach(self, surroundings: Surroundings) -> None:
        self._bookkeepers = surroundings.bookkeepers
        self._bounds = Bounds(self._bounds.keep, self._bounds.max_lag, surroundings.write_timeout)

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `coalesce: true | false`. Raises Refused (400) with the path."""
        found = own.get("coalesce")
        together = self._all if found is None else found.flag()
        # Who wants an answer of its own from the cache wants none of another's either.
        fresh = together and not directives(own.headers.get("cache-control", "")).isdisjoint({"no-cache", "no-store"})
        if together and not fresh:
            return altered(call, extensions={**call.extensions, Wish: Wish(True, routing_of(own))})
        if found is None and not fresh:
            return call
        return altered(call, extensions={**call.extensions, Wish: ALONE})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        found = self._question(call)
        if found is None:
            return await next(call)
        # A reply that nobody records is no entry for those who want one.
        key = found.key if call.extension(Cacheable) is not None else f"plain:{found.key}"
        shared = self._open.get(key)
        leads = shared is None or not shared.joinable
        if shared is None or leads:
            known = altered(call, extensions={**call.extensions, Keyed: found})
            shared = self._open[key] = self._opened(key, known, next)
        reply = await shared.join(call, leads=leads)
        if reply is None:
            return await next(call)
        self._joined += reply.head.cache == "joined"
        return reply

    def _question(self, call: Call) -> Keyed | None:
        """What this call shares a flight with others for; None: it flies alone."""
        cacheable, wish = call.extension(Cacheable), call.extension(Wish)
        if wish is None:
            if cacheable is None or not cacheable.read:
                return None
            routing = cacheable.routing
        elif wish.together:
            routing = wish.routing
        else:
            return None
        scope = scope_of(call, self._shared)
        return Keyed(call, routing, scope, question_key(call, routing, scope))

    def _opened(self, key: str, call: Call, next: Handler) -> SharedCall:
        self._led += 1
        return SharedCall(call, next, self._bounds, over=partial(self._over, key), outlived=self._bookkeepers)

    def _over(self, key: str, shared: SharedCall) -> None:
        if self._open.get(key) is shared:
            del self._open[key]

    async def close(self) -> None:
        for shared in list(self._open.values()):
            shared.end(Outcome.DRAINING)

    def health(self) -> dict[str, Any]:
        return {"flights": len(self._open)}

    def samples(self) -> Iterable[Sample]:
        yield Sample("penstock_flights", "gauge", "Shared calls that can still be joined.", len(self._open))
        yield Sample("penstock_flights_led_total", "counter", "Calls that others could join.", self._led)
        yield Sample("penstock_flights_joined_total", "counter", "Replies that were shared with an earlier call.", self._joined)
