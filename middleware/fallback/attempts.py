"""The way of one call through its targets: each in turn, with each of its keys, until one has its first chunk in hand.

Strategy: a lane takes targets off one list and goes on after errors that another target may not have; hedging is a second lane on
the same list. What was tried, and why it failed, is collected here and told with the reply or the error. Where the first target
answers, which is the common way, nothing of this is built: `Fallback` asks it by itself, and comes here (`began`) when it failed.
The one rule: every target that was entered hears how it went, once, on every way out.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from middleware.fallback.breaker import Permit
from middleware.fallback.keys import REFUSED_REST, REST, Keys
from middleware.fallback.targets import Known, Speed, Targets
from middleware.fallback.verdict import Cause, CircuitOpen, moves_on, reason, rests, retry_after, speaks_against
from proxy.call import Call, Target, altered
from proxy.errors import GatewayError, Outcome, Unconfigured, UpstreamTimeout
from proxy.pipeline import Handler
from proxy.reply import Reply, Try

HEDGE_LOST = "hedge_lost"


@dataclass(slots=True)
class Shared:
    """What all calls share. on: the causes of a 4xx after which the next target is asked. fallbacks: how often, by reason."""

    targets: Targets
    keys: Keys
    clock: Callable[[], float]
    on: Collection[Cause] = ()
    fallbacks: Counter[str] = field(default_factory=Counter)


class Attempts:
    """One call. tries: the attempts that failed, in the order in which they ended."""

    def __init__(self, shared: Shared, call: Call, next: Handler, targets: Sequence[Target], *, impatient: bool) -> None:
        self._shared = shared
        self._call = call
        self._next = next
        self._left = deque(targets)
        self._count = len(targets)
        self._impatient = impatient
        self._error: GatewayError | None = None
        self._skipped: list[GatewayError] = []
        self._since: tuple[Known, float] | None = None
        self.tries: tuple[Try, ...] = ()

    def began(self, error: GatewayError, known: Known, permit: Permit, started: float) -> str:
        """The first target was asked at `started` and ended in this error. Why the next may be asked; "" if it may not."""
        target = self._left.popleft()
        self._missed(error, target, known, started)
        self._speak(error, target, known, permit, self._shared.clock() - started)
        return self._moves_on(error)

    async def lane(self, why: str = "") -> Reply:
        """The first reply of the targets that nobody has taken yet. why: one before them failed. Raises GatewayError, see
        `telling`.
        """
        while self._left and not (why and self._too_late()):
            target = self._left.popleft()
            if why:
                self._shared.fallbacks[why] += 1
            try:
                return await self._visit(target)
            except GatewayError as error:
                if not (why := self._moves_on(error)):
                    raise
        raise self.telling()

    def telling(self, raised: GatewayError | None = None) -> GatewayError:
        """What the client is told: the last error of a target that was asked; where none was, why. With all tries."""
        if raised is not None and not isinstance(raised, CircuitOpen | Unconfigured):
            found = raised
        else:
            found = self._error or self._nobody_asked()
        found.tries = self.tries
        return found

    def answered(self, reply: Reply) -> Reply:
        """The reply, with the tries before it."""
        return reply.with_head(tries=self.tries + reply.head.tries) if self.tries else reply

    def due(self, delay: float | None) -> float | None:
        """Seconds until the current target is late: `delay`, or its own p95; None where that is not known."""
        if self._since is None:
            return 0.001  # the lane has not begun
        known, since = self._since
        now = self._shared.clock()
        limit = delay if delay is not None else known.speed.p95(now)
        return None if limit is None else since + limit - now

    def another(self) -> bool:
        """Is there a further target that could be asked now? Those before it that could not are passed over."""
        targets = self._shared.targets
        return any(target.provider.missing is None and targets.of(target).breaker.ready for target in self._left)

    # One target

    async def _visit(self, target: Target) -> Reply:
        known = self._shared.targets.of(target)
        permit = known.breaker.enter()
        if permit is None:
            raise CircuitOpen(known.breaker.wait())
        started = self._shared.clock()
        self._since = (known, started)
        try:
            reply = await self._with_keys(target, known)
        except GatewayError as error:
            self._speak(error, target, known, permit, self._shared.clock() - started)
            raise
        except BaseException:
            permit.end(None)
            raise
        reply.trailer.on_end(permit.ended)
        return reply

    def _speak(self, error: GatewayError, target: Target, known: Known, permit: Permit, seconds: float) -> None:
        """What an error means for the target's circuit."""
        provider = target.provider
        against = speaks_against(error, seconds, callers_key=provider.callers_key, impatient=self._impatient)
        permit.end(against)
        if against and (wait := retry_after(error)) is not None:
            # With several keys, the target rests until the first of them is free.
            known.breaker.park(self._shared.keys.free_in(provider) if provider.further_keys and rests(error) else wait)

    async def _with_keys(self, target: Target, known: Known) -> Reply:
        provider, keys = target.provider, self._shared.keys
        if not provider.further_keys or provider.callers_key:
            return await self._once(target, known)
        last: GatewayError | None = None
        for place, keyed in keys.usable(target):
            try:
                return await self._once(keyed, known)
            except GatewayError as error:
                if not rests(error):
                    raise
                wait = retry_after(error)
                keys.rest(provider, place, wait if wait is not None else REST if error.status == 429 else REFUSED_REST)
                last = error
                if self._too_late():
                    break
        assert last is not None, "a provider with a list of keys has a key to try"
        raise last

    async def _once(self, target: Target, known: Known) -> Reply:
        clock = self._shared.clock
        started = clock()
        try:
            reply = await self._next(altered(self._call, target=target))
        except GatewayError as error:
            self._missed(error, target, known, started)
            raise
        except BaseException as error:
            known.left(error)
            if isinstance(error, asyncio.CancelledError) and Outcome.CANCELLED in error.args:
                self._lost(target, known, clock() - started)  # `race` says so, because the other one won
            raise
        now = clock()
        known.answered(self._call.stream, reply.head.upstream_seconds or now - started, now)
        return reply

    def _missed(self, error: GatewayError, target: Target, known: Known, started: float) -> None:
        """It was asked, and ended in an error."""
        known.tally.failed += 1
        now = self._shared.clock()
        self.tries += error.tries or (() if isinstance(error, Unconfigured) else (Try(target.name, error.code, now - started),))
        if isinstance(error, UpstreamTimeout):
            self._speed(known).record(now - started, now)

    def _lost(self, target: Target, known: Known, seconds: float) -> None:
        self.tries += (Try(target.name, HEDGE_LOST, seconds),)
        # It was at least this slow: unless that is heard, the p95 of a target that always loses sinks for ever.
        if seconds > self._speed(known).average(self._shared.clock()):
            self._speed(known).record(seconds, self._shared.clock())

    def _speed(self, known: Known) -> Speed:
        return known.speed if self._call.stream else known.whole

    # The end

    def _moves_on(self, error: GatewayError) -> str:
        """Why the next target may be asked after this error; "" if it may not."""
        if not moves_on(error, self._shared.on):
            return ""
        if isinstance(error, CircuitOpen | Unconfigured):
            self._skipped.append(error)
        else:
            self._error = error
        return reason(error)

    def _nobody_asked(self) -> GatewayError:
        waits = [error.wait for error in self._skipped if isinstance(error, CircuitOpen)]
        if waits:
            return CircuitOpen(min(waits), count=self._count)
        return self._skipped[-1] if self._skipped else Unconfigured("No target of this model may be asked.")

    def _too_late(self) -> bool:
        deadline = self._call.deadline
        return deadline is not None and asyncio.get_running_loop().time() >= deadline
