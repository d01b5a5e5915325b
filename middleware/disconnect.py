"""What becomes of a reply whose client has gone: closed at once, or read to its end, within bounds.

Strategy: a call that may outlive its client runs in a task of its own and is read through a flight with one follower
(proxy/shared.py, proxy/flight). When that leaves, the flight reads on by itself, as fast as the provider writes, and lets go
of what it reads; whatever lies further in (the cache's recorder, limits) sees a reply like any other.
It belongs outside of `coalesce` and `cache`: for a flight that others share it is one client more, which stays.
The one rule: what nobody waits for is bounded, in time and in number, and ends with the gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast

from proxy.call import Call, altered
from proxy.errors import Outcome
from proxy.flight import Bounds
from proxy.own_fields import Field, OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.reply import Reply
from proxy.shared import SharedCall
from proxy.timers import Expiry, after
from proxy.units import Between, Seconds

What = Literal["cancel", "finish_and_cache", "finish_for_usage"]
WORDS: tuple[What, ...] = ("cancel", "finish_and_cache", "finish_for_usage")
# The only reader is the only one who may be behind: then nothing is read.
BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Policy:
    """within: seconds after the client has left."""

    what: What
    within: float


class Disconnect:
    """Reads replies on when their client has left.

    on_disconnect: where the request does not say; `cancel` closes the upstream at once, `finish_and_cache` reads the reply to its
    end, so that the cache keeps it, `finish_for_usage` until its usage is known, and nothing is kept. finish_within: for how long
    at most; a request may ask for less. max_detached: replies that are read on at a time; beyond, they are closed.
    """

    FIELDS = ("on_disconnect",)

    def __init__(
        self,
        *,
        on_disconnect: What = "cancel",
        finish_within: Annotated[Seconds, Between(0.001, 3600)] = 60.0,
        max_detached: Annotated[int, Between(0, 100_000)] = 100,
    ) -> None:
        self._policy = Policy(on_disconnect, finish_within)
        self._most = max_detached
        self._bookkeepers: Sequence[Callable[[Call, Reply], None]] = ()
        self._detached: dict[SharedCall, Expiry] = {}
        self._ends: dict[str, int] = dict.fromkeys(("finished", "too_late", "too_many"), 0)

    def attach(self, surroundings: Surroundings) -> None:
        self._bookkeepers = surroundings.bookkeepers
        self._most = surroundings.share(self._most)

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `on_disconnect: "finish_and_cache" | {policy: …, finish_within: 10}` (seconds). Raises Refused (400)."""
        found = own.get("on_disconnect")
        return call if found is None else altered(call, extensions={**call.extensions, Policy: self._asked(found)})

    def _asked(self, field: Field) -> Policy:
        if not isinstance(field.value, dict):
            return Policy(cast(What, field.one_of(WORDS)), self._policy.within)
        what, within = field.get("policy"), field.get("finish_within")
        return Policy(
            cast(What, what.one_of(WORDS)) if what else self._policy.what,
            within.number(0.001, self._policy.within) if within else self._policy.within,
        )

    async def __call__(self, call: Call, next: Handler) -> Reply:
        policy = call.extension(Policy) or self._policy
        if policy.what == "cancel":
            return await next(call)
        shared = SharedCall(call, next, BOUNDS, over=self._over, left=partial(self._left, policy), outlived=self._bookkeepers)
        reply = await shared.join(call, leads=True)
        assert reply is not None, "who leads has its reply"
        return reply

    def _left(self, policy: Policy, shared: SharedCall, why: Outcome) -> None:
        """Nobody reads it any more. A deadline or a shutdown is no client that has left."""
        if why is not Outcome.CLIENT_GONE:
            shared.end(why)
        elif len(self._detached) >= self._most:
            self._ends["too_many"] += 1
            shared.end()
        else:
            self._detached[shared] = after(policy.within, partial(self._too_late, shared))
            shared.read_on(usage_only=policy.what == "finish_for_usage")

    def _too_late(self, shared: SharedCall) -> None:
        self._ends["too_late"] += 1
        del self._detached[shared]
        shared.end()

    def _over(self, shared: SharedCall) -> None:
        if (expiry := self._detached.pop(shared, None)) is not None:
            expiry.cancel()
            self._ends["finished"] += 1

    async def close(self) -> None:
        for shared, expiry in list(self._detached.items()):
            expiry.cancel()
            del self._detached[shared]
            shared.end(Outcome.DRAINING)

    def health(self) -> Mapping[str, Any]:
        return {"detached": len(self._detached)}

    def samples(self) -> Iterable[Sample]:
        yield Sample("penstock_detached", "gauge", "Replies that are read on without a client.", len(self._detached))
        for end, count in self._ends.items():
            words = "Replies whose client had left, by what became of them."
            yield Sample("penstock_detached_total", "counter", words, count, {"end": end})
