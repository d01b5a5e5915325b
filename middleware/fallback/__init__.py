"""Which target answers: routing over a call's targets, fallback from one to the next, a circuit per target, hedging by choice.

Strategy: `choice` orders the targets, `attempts` goes through them, `breaker` remembers which are not worth asking, `hedge` asks
two. `await next(call)` returns with the first chunk in hand, so what has begun is never asked again, by construction.
Cost: around the head, and one callback at the end; nothing per chunk.
The one rule: a call has one answer; whatever else was asked for it is closed before that answer goes out.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from middleware.fallback.attempts import Attempts, Shared
from middleware.fallback.breaker import Policy, State
from middleware.fallback.choice import Choice, weighted
from middleware.fallback.hedge import Budget, Hedge, race
from middleware.fallback.keys import Keys
from middleware.fallback.options import Plan, read_plan
from middleware.fallback.targets import Targets
from middleware.fallback.verdict import Cause, CircuitOpen
from proxy.call import Call, Route, Target, altered
from proxy.errors import GatewayError
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.reply import Reply
from proxy.units import Between, Seconds


class Fallback:
    """Asks a call's targets in turn until one answers.

    on: causes of a provider's 4xx for which the next target is asked too. A target's circuit opens when `failure_rate` of at
    least `min_requests` failed within `window`; after `cool_down` it lets `probes` requests at a time through. max_park: the
    longest Retry-After that is obeyed. hedge: ask a second target when the first is late; streams only. max_models: that one
    request may name.
    """

    FIELDS = ("fallbacks", "models", "load_balancer")

    def __init__(
        self,
        *,
        on: list[Cause] | tuple[Cause, ...] = (),
        failure_rate: Annotated[float, Between(0.01, 1)] = 0.5,
        min_requests: Annotated[int, Between(1, 100_000)] = 10,
        window: Annotated[Seconds, Between(1, 3600)] = 60.0,
        cool_down: Annotated[Seconds, Between(0.1, 3600)] = 30.0,
        probes: Annotated[int, Between(1, 100)] = 2,
        max_park: Annotated[Seconds, Between(0, 86400)] = 300.0,
        hedge: Hedge | None = None,
        max_models: Annotated[int, Between(1, 64)] = 16,
        _clock: Callable[[], float] = time.monotonic,
        _random: Callable[[], float] = random.random,
    ) -> None:
        policy = Policy(failure_rate, min_requests, window, cool_down, probes, max_park)
        self._targets = Targets(policy, _clock)
        self._shared = Shared(self._targets, Keys(_clock), _clock, frozenset(on))
        self._choice = Choice(self._targets, _random, _clock)
        self._random = _random
        self._delay = hedge.delay if hedge else None
        self._budget = Budget(hedge.share) if hedge else None
        self._hedges: Counter[str] = Counter()
        self._routes: set[str] = set()
        self._lookup: Callable[[str], Route] | None = None
        self._most = max_models

    def attach(self, surroundings: Surroundings) -> None:
        self._lookup = surroundings.route

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `fallbacks`, `models`, `load_balancer`; all that they name become the call's targets. Raises Refused."""
        self._configured(call.route)
        assert self._lookup is not None, "a middleware is attached before its first call"
        plan = read_plan(own, call.route, self._lookup, self._most)
        if plan is None:
            return call
        for route in plan.routes:
            self._configured(route)
        return altered(call, targets=plan.targets, extensions={**call.extensions, Plan: plan})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        plan = call.extension(Plan)
        targets = await self._ordered(call, plan)
        attempts = Attempts(self._shared, call, next, targets, impatient=plan is not None and plan.impatient)
        try:
            if self._budget is not None and call.stream and len(targets) > 1:
                reply = await self._raced(attempts, self._budget)
            else:
                reply = await attempts.lane()
        except GatewayError as error:
            raise attempts.telling(error) from None
        return attempts.answered(reply)

    async def _ordered(self, call: Call, plan: Plan | None) -> list[Target]:
        """The call's targets, best first, each once."""
        if plan is None and call.route.strategy == "fallback":
            return list(call.targets)
        here = {str(target): target for target in call.targets}
        routes = [call.route]
        if plan is not None:
            first = weighted(plan.first, plan.weights, self._random) if plan.weights else plan.first
            routes = [*first, *plan.then]
        found = [target for route in routes for target in await self._choice.order(route, here, stream=call.stream)]
        return list(dict.fromkeys(found))

    async def _raced(self, attempts: Attempts, budget: Budget) -> Reply:
        budget.earn()
        hedged = False

        def may_hedge() -> bool:
            nonlocal hedged
            hedged = attempts.another() and budget.spend()
            return hedged

        won = "neither"
        try:
            reply, won = await race(attempts.lane, lambda: attempts.due(self._delay), may_hedge)
        finally:
            if hedged:
                self._hedges[won] += 1
        return reply

    def _configured(self, route: Route) -> None:
        """The targets of a route of config.yaml are known for good."""
        if route.name is not None and route.name not in self._routes:
            self._routes.add(route.name)
            for target in route.targets:
                self._targets.configure(str(target))

    def health(self) -> dict[str, Any]:
        """Each target's circuit: its state, seconds until it may be asked, ends within the window; and how many keys rest."""
        shown = {}
        for name, known in self._targets.shown():
            good, bad = known.breaker.counts()
            state, wait = known.breaker.state.name.lower(), round(known.breaker.wait(), 1)
            shown[name] = {"circuit": state, "retry_in": wait, "completed": good, "failed": bad}
        return {"targets": shown, "resting_keys": self._shared.keys.resting()}

    def samples(self) -> Iterable[Sample]:
        """Circuits, attempts by target, fallbacks by reason, hedges by who won."""
        text = "0 closed, 1 half-open, 2 open or told to wait."
        for name, known in self._targets.shown():
            yield Sample("penstock_circuit_state", "gauge", text, float(known.breaker.state), {"target": name})
        text = "Times a target was asked; retries of the retry middleware are within one."
        for (target, outcome), count in sorted(self._targets.attempts.items()):
            yield Sample("penstock_attempts_total", "counter", text, count, {"target": target, "outcome": outcome})
        for reason, count in sorted(self._shared.fallbacks.items()):
            yield Sample("penstock_fallbacks_total", "counter", "Moves to a further target.", count, {"reason": reason})
        text = "Second targets asked because the first was late."
        for won, count in sorted(self._hedges.items()):
            yield Sample("penstock_hedges_total", "counter", text, count, {"won": won})


__all__ = ["CircuitOpen", "Fallback", "Hedge", "State"]
