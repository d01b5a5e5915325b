"""The circuit breaker as a state machine: any order of ends, parkings and waits, against a model written the plain way."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from middleware.fallback.breaker import BUCKETS, Breaker, Permit, Policy, State
from middleware.fallback.verdict import ended
from proxy.errors import Outcome, UpstreamError

POLICY = Policy(failure_rate=0.5, min_requests=4, window=10.0, cool_down=5.0, probes=2, max_park=20.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        permit = breaker.enter()
        assert permit is not None
        permit.end(True)


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(POLICY, clock)
    fail(breaker, POLICY.min_requests)
    assert breaker.state is State.OPEN
    return breaker


def half_open(clock: Clock) -> Breaker:
    breaker = opened(clock)
    clock.now += POLICY.cool_down
    return breaker


def test_fewer_failures_than_the_minimum_volume_never_open() -> None:
    breaker = Breaker(POLICY, Clock())
    fail(breaker, POLICY.min_requests - 1)
    assert breaker.state is State.CLOSED


def test_failures_below_the_rate_never_open() -> None:
    breaker = Breaker(POLICY, Clock())
    for number in range(90):
        permit = breaker.enter()
        assert permit is not None
        permit.end(number % 3 == 2)
    assert breaker.state is State.CLOSED


def test_failures_that_left_the_window_do_not_count() -> None:
    clock = Clock()
    breaker = Breaker(POLICY, clock)
    fail(breaker, POLICY.min_requests - 1)
    clock.now += POLICY.window + POLICY.window / BUCKETS
    fail(breaker, 1)
    assert breaker.state is State.CLOSED


def test_exactly_so_many_probes_at_a_time() -> None:
    breaker = half_open(Clock())
    assert [breaker.enter() is not None for _ in range(20)] == [True] * POLICY.probes + [False] * (20 - POLICY.probes)


def test_a_probe_that_says_nothing_gives_its_place_to_another() -> None:
    breaker = half_open(Clock())
    permits = [breaker.enter() for _ in range(POLICY.probes)]
    assert permits[0] is not None
    permits[0].end(None)
    permits[0].end(None)
    assert breaker.state is State.HALF_OPEN
    assert [breaker.enter() is not None for _ in range(2)] == [True, False]


def test_a_probes_success_closes_and_forgets_the_failures() -> None:
    breaker = half_open(Clock())
    probe = breaker.enter()
    assert probe is not None
    probe.end(False)
    assert breaker.state is State.CLOSED
    fail(breaker, POLICY.min_requests - 1)
    assert breaker.state is State.CLOSED


def test_a_probes_failure_opens_for_another_cool_down() -> None:
    clock = Clock()
    breaker = half_open(clock)
    fail(breaker, 1)
    assert (breaker.state, breaker.wait()) == (State.OPEN, POLICY.cool_down)


def test_what_began_before_the_circuit_opened_says_nothing_about_it_now() -> None:
    clock = Clock()
    breaker = Breaker(POLICY, clock)
    early = breaker.enter()
    fail(breaker, POLICY.min_requests)
    clock.now += POLICY.cool_down
    assert early is not None
    early.end(False)
    assert breaker.state is State.HALF_OPEN


def test_retry_after_parks_up_to_a_cap() -> None:
    clock = Clock()
    breaker = Breaker(POLICY, clock)
    breaker.park(7)
    assert (breaker.enter(), breaker.wait(), breaker.state) == (None, 7, State.OPEN)
    breaker.park(3600)
    assert breaker.wait() == POLICY.max_park
    clock.now += POLICY.max_park
    assert breaker.enter() is not None


@pytest.mark.parametrize("outcome", Outcome)
def test_only_completion_is_a_success_and_only_an_upstreams_end_a_failure(outcome: Outcome) -> None:
    """Mid-stream: a cut, a broken event, silence count; the client's going away, draining and our own faults do not."""
    failures = {"upstream_error", "upstream_cut", "malformed"} | {
        f"timeout_{which}" for which in ("connect", "call", "first_chunk", "idle")
    }
    wanted = False if outcome in ("completed", "continued") else True if outcome.value in failures else None
    assert ended(outcome, None) is wanted


def test_an_upstreams_4xx_inside_a_stream_is_the_clients() -> None:
    assert ended(Outcome.UPSTREAM_ERROR, UpstreamError("bad words", status=400)) is None


class Circuit(RuleBasedStateMachine):
    """The model: a list of (bucket, failed) since the last transition, and when it may be asked again."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(POLICY, self.clock)
        self.out: list[tuple[Permit, int]] = []
        self.generation = 0
        self.opened_at: float | None = None
        self.parked_until = 0.0
        self.ends: list[tuple[int, bool]] = []

    @property
    def expected(self) -> State:
        now = self.clock.now
        if now < self.parked_until or (self.opened_at is not None and now < self.opened_at + POLICY.cool_down):
            return State.OPEN
        return State.CLOSED if self.opened_at is None else State.HALF_OPEN

    def probing(self) -> int:
        return sum(generation == self.generation for _, generation in self.out) if self.opened_at is not None else 0

    def slot(self) -> int:
        return int(self.clock.now * BUCKETS / POLICY.window)

    @rule()
    def enter(self) -> None:
        full = self.expected is State.HALF_OPEN and self.probing() >= POLICY.probes
        permit = self.breaker.enter()
        assert (permit is None) == (self.expected is State.OPEN or full)
        if permit is not None:
            self.out.append((permit, self.generation))

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 50), failed=st.sampled_from([True, True, False, None]))
    def end(self, which: int, failed: bool | None) -> None:
        permit, generation = self.out.pop(which % len(self.out))
        permit.end(failed)
        permit.end(True)  # only the first word counts
        if failed is None or generation != self.generation:
            return
        if self.opened_at is not None:
            self.turn(failed)
            return
        self.ends.append((self.slot(), failed))
        recent = [bad for slot, bad in self.ends if slot > self.slot() - BUCKETS]
        if failed and len(recent) >= POLICY.min_requests and sum(recent) / len(recent) >= POLICY.failure_rate:
            self.turn(True)

    def turn(self, failed: bool) -> None:
        self.generation += 1
        self.opened_at = self.clock.now if failed else None
        self.ends = []

    @rule(seconds=st.floats(0, 100))
    def park(self, seconds: float) -> None:
        self.breaker.park(seconds)
        self.parked_until = max(self.parked_until, self.clock.now + min(seconds, POLICY.max_park))

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0, 11.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def the_state_is_the_models(self) -> None:
        assert self.breaker.state is self.expected

    @invariant()
    def whoever_may_not_enter_is_told_how_long_to_wait(self) -> None:
        assert (self.breaker.wait() == 0) == self.breaker.ready

    @invariant()
    def never_more_probes_than_allowed(self) -> None:
        assert self.probing() <= POLICY.probes


Circuit.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=timedelta(seconds=2))
TestCircuit = Circuit.TestCase
