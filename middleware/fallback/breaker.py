"""The circuit breaker of one target: whether it may be asked now, decided by how its recent replies ended.

Strategy: closed, it counts ends in a rolling window; too many failures open it for a cool-down; then it is half-open and lets a
bounded number of probes through, of which one success closes it and one failure opens it again. No timers: every transition
happens when somebody looks at the clock. Whoever enters holds a `Permit` and says how it went; a permit from before the last
transition says nothing about the time after it, and is not heard.
The one rule: what a client causes (its 4xx, its departure) is neither success nor failure.

https://martinfowler.com/bliki/CircuitBreaker.html
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from middleware.fallback.verdict import ended
from proxy.reply import Trailer

BUCKETS = 10
# Until a probe ends nobody knows how long that takes; who asks meanwhile may come back after this.
PROBE_SECONDS = 1.0


class State(IntEnum):
    """As `penstock_circuit_state` shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class Policy:
    """failure_rate: the share of failures that opens, once `min_requests` ended within `window` seconds. cool_down: seconds until
    probes. probes: how many at a time. max_park: the longest Retry-After that is obeyed, in seconds."""

    failure_rate: float = 0.5
    min_requests: int = 10
    window: float = 60.0
    cool_down: float = 30.0
    probes: int = 2
    max_park: float = 300.0


class Breaker:
    """clock: seconds, monotonic."""

    __slots__ = (
        "_buckets", "_clock", "_generation", "_latest", "_opened", "_parked_until", "_policy", "_probing", "_rate", "_until",
    )  # fmt: skip

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        # [slot, successes, failures], oldest first; `_latest` is the last one, or one of no slot.
        self._buckets: deque[list[int]] = deque()
        self._latest = [-1, 0, 0]
        self._rate = BUCKETS / policy.window
        self._generation = 0
        self._opened = False
        self._until = 0.0
        self._parked_until = 0.0
        self._probing = 0

    def follow(self, policy: Policy) -> None:
        """Judge by another policy from now on. An open circuit stays open for as long as it was to be."""
        if policy.window != self._policy.window:  # the buckets are numbered by it
            self._buckets.clear()
            self._latest = [-1, 0, 0]
        self._policy = policy
        self._rate = BUCKETS / policy.window

    @property
    def state(self) -> State:
        """Parked counts as open: nobody is let in."""
        now = self._clock()
        if now < self._parked_until or (self._opened and now < self._until):
            return State.OPEN
        return State.HALF_OPEN if self._opened else State.CLOSED

    @property
    def ready(self) -> bool:
        """Would `enter` let somebody in?"""
        state = self.state
        return state is State.CLOSED or (state is State.HALF_OPEN and self._probing < self._policy.probes)

    def enter(self) -> Permit | None:
        """A permit for one visit, or None while the target is not to be asked."""
        if (self._opened or self._parked_until) and not self.ready:
            return None
        if self._opened:
            self._probing += 1
        return Permit(self, self._generation)

    def wait(self) -> float:
        """Seconds after which it is worth asking again; 0 if it is now."""
        if self.ready:
            return 0.0
        until = max(self._parked_until, self._until if self._opened else 0.0)
        return max(until - self._clock(), 0.0) or PROBE_SECONDS

    def park(self, seconds: float) -> None:
        """Nobody enters for `seconds`, as the target itself asked (Retry-After); never shortens an earlier wish."""
        self._parked_until = max(self._parked_until, self._clock() + min(seconds, self._policy.max_park))

    def counts(self) -> tuple[int, int]:
        """(successes, failures) within the window."""
        self._forget()
        return sum(bucket[1] for bucket in self._buckets), sum(bucket[2] for bucket in self._buckets)

    def hear(self, generation: int, failed: bool | None) -> None:
        """How a visit ended; None: it says nothing about the target."""
        if generation != self._generation:
            return
        if self._opened:
            self._probing -= 1
            if failed is not None:
                self._turn(failed)
        elif failed is not None:
            slot = int(self._clock() * self._rate)
            bucket = self._latest
            if bucket[0] != slot:
                bucket = self._next_bucket(slot)
            bucket[1 + failed] += 1
            if failed and self._too_many():
                self._turn(True)

    def _too_many(self) -> bool:
        good, bad = self.counts()
        return good + bad >= self._policy.min_requests and bad >= self._policy.failure_rate * (good + bad)

    def _turn(self, opened: bool) -> None:
        self._generation += 1
        self._opened = opened
        self._until = self._clock() + self._policy.cool_down
        self._probing = 0
        self._buckets.clear()
        self._latest = [-1, 0, 0]

    def _next_bucket(self, slot: int) -> list[int]:
        self._forget()
        self._latest = [slot, 0, 0]
        self._buckets.append(self._latest)
        return self._latest

    def _forget(self) -> None:
        oldest = int(self._clock() * self._rate) - BUCKETS
        while self._buckets and self._buckets[0][0] <= oldest:
            self._buckets.popleft()


class Permit:
    """One visit to a target. The first word about it counts; saying nothing would keep a probe's place for ever."""

    __slots__ = ("_breaker", "_generation")

    def __init__(self, breaker: Breaker, generation: int) -> None:
        self._breaker: Breaker | None = breaker
        self._generation = generation

    def end(self, failed: bool | None) -> None:
        """failed: None says nothing about the target."""
        breaker, self._breaker = self._breaker, None
        if breaker is not None:
            breaker.hear(self._generation, failed)

    def ended(self, trailer: Trailer) -> None:
        """The visit gave a reply, and this is how it ended; a callback for `on_end`."""
        self.end(ended(trailer.outcome, trailer.error))
