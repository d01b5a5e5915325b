"""Which target answers: routing over a call's targets, fallback from one to the next, a circuit per target, hedging by choice.

Strategy: `choice` orders the targets, `attempts` goes through them, `breaker` remembers which are not worth asking, `hedge` asks
two. `await next(call)` returns with the first chunk in hand, so what has begun is never asked again, by construction.
Cost: around the head, and one callback at the end; nothing per chunk. A first target that answers is asked right here.
The one rule: a call has one answer; whatever else was asked for it is closed before that answer goes out.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
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
        self._policy = policy
        self._targets = Targets(policy, _clock)
        self._shared = Shared(self._targets, Keys(_clock), _clock, frozenset(on))
        self._choice = Choice(self._targets, _random, _clock)
        self._clock, self._random = _clock, _random
        self._delay = hedge.delay if hedge else None
        self._budget = Budget(hedge.share) if hedge else None
        self._hedges: Counter[str] = Counter()
        self._routes: set[str] = set()
        self._lookup: Callable[[str], Route] | None = None
        self._changed: frozenset[str] = frozenset()
        self._most = max_models

    def attach(self, surroundings: Surroundings) -> None:
        self._lookup, self._changed = surroundings.route, surroundings.changed
        self._renewed()

    def adopt(self, previous: Fallback) -> None:
        """What is known of the targets lives on, judged by the new policy; what was counted stays counted."""
        self._targets = previous._targets
        self._targets.follow(self._policy)
        before = previous._shared
        self._shared = replace(self._shared, targets=self._targets, keys=before.keys, fallbacks=before.fallbacks)
        self._choice = Choice(self._targets, self._random, self._clock)
        self._hedges = previous._hedges
        self._renewed()

    def _renewed(self) -> None:
        """There may be another config. A provider whose row it changed is met without prejudice: that may have been the cure."""
        self._targets.renew(self._changed)
        self._shared.keys.forget(self._changed)
        self._routes.clear()

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
        target = self._plainly_first(call)
        known = self._targets.of(target) if target is not None else None
        permit = known.breaker.enter() if known is not None else None
        if known is None or permit is None:
            return await self._in_turn(call, next)
        started = self._clock()
        try:
            reply = await next(altered(call, target=target))
        except GatewayError as error:
            attempts = Attempts(self._shared, call, next, call.targets, impatient=False)
            why = attempts.began(error, known, permit, started)
            if not why:
                raise attempts.telling(error) from None
        except BaseException as error:
            known.left(error)
            permit.end(None)
            raise
        else:
            now = self._clock()
            known.answered(call.stream, reply.head.upstream_seconds or now - started, now)
            reply.trailer.on_end(permit.ended)
            return reply
        return await _telling(attempts, attempts.lane(why))

    def _plainly_first(self, call: Call) -> Target | None:
        """The target to ask first, where nothing has to be found out for that: no choice, no further key, no race. Then a reply
        costs 1.6 us here instead of 3.4: one coroutine instead of five.
        """
        targets = call.targets
        if not targets or Plan in call.extensions:
            return None
        first = targets[0]
        if first.provider.further_keys and not first.provider.callers_key:
            return None
        if len(targets) == 1 or (call.route.strategy == "fallback" and not (self._budget and call.stream)):
            return first
        return None

    async def _in_turn(self, call: Call, next: Handler) -> Reply:
        """The reply of the first target that answers, all that a call may ask for considered."""
        plan = call.extension(Plan)
        targets = await self._ordered(call, plan)
        attempts = Attempts(self._shared, call, next, targets, impatient=plan is not None and plan.impatient)
        raced = self._budget is not None and call.stream and len(targets) > 1
        return await _telling(attempts, self._raced(attempts) if raced else attempts.lane())

    async def _ordered(self, call: Call, plan: Plan | None) -> list[Target]:
        """The call's targets, best first, each once."""
        if plan is None and call.route.strategy == "fallback":
            return list(call.targets)
        here = {target.name: target for target in call.targets}
        routes = [call.route]
        if plan is not None:
            first = weighted(plan.first, plan.weights, self._random) if plan.weights else plan.first
            routes = [*first, *plan.then]
        found = [target for route in routes for target in await self._choice.order(route, here, stream=call.stream)]
        return list(dict.fromkeys(found))

    async def _raced(self, attempts: Attempts) -> Reply:
        budget = self._budget
        assert budget is not None, "who races has a budget"
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
                self._targets.configure(target.name)

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
        for target, outcome, count in self._targets.attempts():
            yield Sample("penstock_attempts_total", "counter", text, count, {"target": target, "outcome": outcome})
        for reason, count in sorted(self._shared.fallbacks.items()):
            yield Sample("penstock_fallbacks_total", "counter", "Moves to a further target.", count, {"reason": reason})
        text = "Second targets asked because the first was late."
        for won, count in sorted(self._hedges.items()):
            yield Sample("penstock_hedges_total", "counter", text, count, {"won": won})


async def _telling(attempts: Attempts, asking: Awaitable[Reply]) -> Reply:
    """The reply, or the error, with all that was tried."""
    try:
        return attempts.answered(await asking)
    except GatewayError as error:
        raise attempts.telling(error) from None


__all__ = ["CircuitOpen", "Fallback", "Hedge", "State"]
