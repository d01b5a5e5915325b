"""Further attempts at the same target, as long as nothing has gone out to the client.

Strategy: the loop asks pure functions (`may_repeat`, `hinted_seconds`) what an error allows, and waits: exponential backoff with
full jitter, never shorter than the provider's own hint. `await next(call)` returns with the first chunk in hand, so a reply that
has begun is never repeated, by construction. A budget per target (`budget`) keeps an outage from being multiplied.
Cost: around the head, one look at the clock and one addition; nothing per chunk.
The one rule: no wait passes the call's deadline; where waiting cannot help, the error goes out at once, with all its tries.

Backoff: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

from middleware.retry.budget import Budgets
from middleware.retry.hints import hinted_seconds
from proxy.call import Call, altered
from proxy.errors import GatewayError, Outcome, UpstreamCut, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.reply import Reply, Try
from proxy.units import Between, Seconds

Status = Annotated[int, Between(400, 599)]
DEFAULT_CODES = (429, 500, 502, 503, 504)
# About the request or the key: the same call cannot fare better, whatever `on_codes` says.
NEVER = frozenset({400, 401, 403, 404, 422})
# Errors of these outcomes are attempts at an upstream; all others (refused, limited, draining…) never reached one.
ATTEMPTED = frozenset({
    Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_CUT, Outcome.MALFORMED, Outcome.TIMEOUT_CONNECT, Outcome.TIMEOUT_CALL,
    Outcome.TIMEOUT_FIRST_CHUNK, Outcome.TIMEOUT_IDLE, Outcome.TIMEOUT_TOTAL,
})  # fmt: skip
REPEATABLE_TIMEOUTS = frozenset({"connect", "call", "first_chunk"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call may do. count: retries after the first try. codes: the provider's statuses that are tried again."""

    count: int
    codes: frozenset[int]


class Retry:
    """Tries the same target again after errors that may pass.

    count: retries after the first try. on_codes: the statuses of a provider after which it is asked again; network errors and
    timeouts before the first chunk always are, 400, 401, 403, 404 and 422 never. base, cap: the backoff before retry n is random
    between 0 and min(cap, base * 2 ** n). max_retry_after: a provider that asks for a longer wait is not waited for. budget: the
    share of a target's recent requests that may be retries; floor: retries a minute that are always allowed, so that a target
    with few requests is retried too. max_count: what a request may ask for.
    """

    FIELDS = ("retry",)

    def __init__(
        self,
        *,
        count: Annotated[int, Between(0, 5)] = 2,
        on_codes: list[Status] | tuple[Status, ...] = DEFAULT_CODES,
        base: Annotated[Seconds, Between(0, 60)] = 0.5,
        cap: Annotated[Seconds, Between(0, 600)] = 8.0,
        budget: Annotated[float, Between(0, 1)] = 0.2,
        floor: Annotated[int, Between(0, 1000)] = 10,
        max_retry_after: Annotated[Seconds, Between(0, 3600)] = 10.0,
        max_count: Annotated[int, Between(1, 5)] = 5,
    ) -> None:
        self._plan = Plan(count, frozenset(on_codes))
        self._base, self._cap = base, cap
        self._max_retry_after = max_retry_after
        self._max_count = max_count
        self._floor = floor
        self._budgets = Budgets(budget, floor)
        self._retries: Counter[str] = Counter()
        self.clock: Callable[[], float] = time.monotonic
        self.loop_time: Callable[[], float] = lambda: asyncio.get_running_loop().time()
        self.wall: Callable[[], float] = time.time
        self.random: Callable[[], float] = random.random
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def attach(self, surroundings: Surroundings) -> None:
        """The budget is a share of what this worker is asked; the floor is one for all workers."""
        self._budgets.floor = surroundings.share(self._floor)

    def adopt(self, previous: Retry) -> None:
        """What was spent of the budgets stays spent."""
        previous._budgets.share, previous._budgets.floor = self._budgets.share, self._budgets.floor
        self._budgets, self._retries = previous._budgets, previous._retries

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `retry: {count, on_codes}`; a request that gives only a count is retried on 429. Raises Refused."""
        found = own.get("retry")
        if found is None:
            return call
        count, codes = found.get("count"), found.get("on_codes")
        plan = Plan(
            self._plan.count if count is None else count.integer(1, self._max_count),
            frozenset({429} if codes is None else (code.integer(400, 599) for code in codes.items())),
        )
        return altered(call, extensions={**call.extensions, Plan: plan})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        chosen = call.target or (call.targets[0] if call.targets else None)
        target = call.model if chosen is None else chosen.name
        started = self.clock()
        self._budgets.requested(target, started)
        tries: tuple[Try, ...] = ()
        attempt = 0
        while True:
            try:
                reply = await next(call)
            except GatewayError as error:
                # Layers further in may have counted it (and others) already; what never reached an upstream is no attempt.
                own = (Try(target, error.code, self.clock() - started),) if error.outcome in ATTEMPTED else ()
                error.tries = tries = tries + (error.tries or own)
                wait = self._wait(error, attempt, call)
                if wait is None or not self._budgets.spend(target, self.clock()):
                    raise
                self._retries[reason(error)] += 1
            else:
                return reply.with_head(tries=tries + reply.head.tries) if tries else reply
            await self.sleep(wait)
            started = self.clock()
            attempt += 1

    def _wait(self, error: GatewayError, attempt: int, call: Call) -> float | None:
        """Seconds until the next attempt; None where there must be none."""
        if _another_key(error, call):
            return None
        plan, deadline = call.extension(Plan) or self._plan, call.deadline
        if attempt >= plan.count or not may_repeat(error, plan.codes):
            return None
        hint = hinted_seconds(error, self.wall())
        if hint > self._max_retry_after:
            return None
        wait = max(hint, self.random() * min(self._cap, self._base * 2.0**attempt))
        return wait if deadline is None or self.loop_time() + wait < deadline else None

    def samples(self) -> Iterable[Sample]:
        """Retries by reason (a status, or the gateway's word for a network error or timeout), and those the budget denied."""
        for why, count in sorted(self._retries.items()):
            yield Sample("penstock_retries_total", "counter", "Attempts repeated at the same target.", count, {"reason": why})
        text = "Retries not made because a target's retry budget was spent."
        yield Sample("penstock_retry_budget_exhausted_total", "counter", text, self._budgets.denied)


def _another_key(error: GatewayError, call: Call) -> bool:
    """This key has its rate limit, and the provider has keys that were not tried: those first (the fallback turns to them)."""
    return error.status == 429 and call.target is not None and bool(call.target.provider.further_keys)


def may_repeat(error: GatewayError, codes: frozenset[int]) -> bool:
    """Can another attempt at the same target fare better?"""
    if isinstance(error, UpstreamTimeout):
        return error.which in REPEATABLE_TIMEOUTS
    if error.outcome not in ATTEMPTED or {error.status, _native_status(error)} & NEVER:
        return False
    return isinstance(error, UpstreamUnreachable | UpstreamCut) or _native_status(error) in codes


def reason(error: GatewayError) -> str:
    """Why an attempt is repeated, in few words: providers' own codes are without number."""
    ours = isinstance(error, UpstreamTimeout | UpstreamUnreachable | UpstreamCut)
    return error.code if ours else str(_native_status(error))


def _native_status(error: GatewayError) -> int:
    """The provider's own status, where the client is told another one (401 on our key is 502 for the client)."""
    return (error.native_status if isinstance(error, UpstreamError) else None) or error.status


__all__ = ["Retry", "may_repeat"]
