"""Timers by themselves, on a loop whose clock a test moves, and on real ones: when each is called, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from proxy import timers
from proxy.timers import GRAIN, MOST_KEPT, after

MS = 1 / 1024  # exact in binary, so that sums of it are


class Handle:
    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when, self.callback, self.args, self.cancelled = when, callback, args, False

    def cancel(self) -> None:
        self.cancelled = True


class Scripted:
    """A loop whose clock stands still until `advance`. early: seconds by which its timers go off too early, as uvloop's may."""

    def __init__(self, early: float = 0.0) -> None:
        self.now = 1000.0
        self.early = early
        self.timers: list[tuple[float, int, Handle]] = []
        self.set = 0
        self.faults: list[BaseException] = []

    def time(self) -> float:
        return self.now

    def is_closed(self) -> bool:
        return False

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Handle:
        handle = Handle(when, callback, args)
        self.set += 1
        heapq.heappush(self.timers, (when - self.early, self.set, handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context["exception"])

    @property
    def pending(self) -> int:
        return sum(not handle.cancelled for _, _, handle in self.timers)

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self.timers and self.timers[0][0] <= until:
            when, _, handle = heapq.heappop(self.timers)
            self.now = max(self.now, when)
            if not handle.cancelled:
                handle.callback(*handle.args)
        self.now = until


@contextlib.contextmanager
def scripted(early: float = 0.0) -> Iterator[Scripted]:
    loop = Scripted(early)
    asyncio._set_running_loop(loop)  # type: ignore[arg-type]
    try:
        yield loop
    finally:
        asyncio._set_running_loop(None)
        timers._TABLES.pop(cast(asyncio.AbstractEventLoop, loop), None)


def table(loop: Scripted) -> Mapping[float, Any]:
    return timers._TABLES.get(cast(asyncio.AbstractEventLoop, loop), {})


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("after"), st.sampled_from([0, 1, 2, 5, 50]), st.sampled_from(["", "raise", "cancel", "after"])),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just("")),
        st.tuples(st.just("advance"), st.sampled_from([0, 1, 2, 3, 10, 60]), st.just("")),
    ),
    max_size=60,
)


class Model:
    """What may be expected of every expiry: when it is due, and whether it was called or cancelled."""

    def __init__(self, loop: Scripted) -> None:
        self.loop = loop
        self.asked: list[tuple[timers.Expiry, float, float]] = []
        self.called: list[int] = []
        self.cancelled: set[int] = set()

    def after(self, seconds: float, does: str = "") -> None:
        number = len(self.asked)
        self.asked.append((after(seconds, lambda: self.run(number, does)), self.loop.now + seconds, seconds))

    def cancel(self, number: int) -> None:
        if number < len(self.asked):
            self.asked[number][0].cancel()
            self.cancelled |= {number} - set(self.called)

    def run(self, number: int, does: str) -> None:
        assert number not in self.called, "called once"
        assert number not in self.cancelled, "never after it was cancelled"
        assert self.loop.now >= self.asked[number][1], "never early"
        self.called.append(number)
        if does == "cancel":
            self.cancel(number + 1)
        elif does == "after":
            self.after(self.asked[number][2])
        elif does == "raise":
            raise ValueError(number)

    def check(self) -> None:
        late = {number for number, (_, due, _) in enumerate(self.asked) if due + GRAIN + MS <= self.loop.now}
        assert late <= set(self.called) | self.cancelled, "at most a moment late"
        for seconds in {seconds for _, _, seconds in self.asked}:
            same = [number for number in self.called if self.asked[number][2] == seconds]
            assert same == sorted(same), "in the order in which they were asked for"
        waiting = {asked[2] for number, asked in enumerate(self.asked) if number not in self.cancelled | set(self.called)}
        assert len(waiting) <= self.loop.pending <= len({seconds for _, _, seconds in self.asked}), "one loop timer per duration"


class TestProperties:
    @given(STEPS, st.sampled_from([0.0, 0.0005, 0.0009]))
    def test_each_is_called_once_when_it_is_due_unless_it_was_cancelled(self, steps: list[Any], early: float) -> None:
        with scripted(early) as loop:
            model = Model(loop)
            for step, number, does in steps:
                if step == "after":
                    model.after(number * MS, does)
                elif step == "cancel":
                    model.cancel(number)
                else:
                    loop.advance(number * MS)
                model.check()
            for number in range(len(model.asked)):
                model.cancel(number)
            loop.advance(1.0)
            assert not loop.pending, "with nothing left to wait for, no loop timer is set again"
            assert not table(loop)


class TestTimers:
    def test_what_was_cancelled_before_any_timer_went_off_cost_one_loop_timer_in_all(self) -> None:
        with scripted() as loop:
            for _ in range(1000):
                after(300.0, print).cancel()
            assert loop.set == 1

    def test_an_early_timer_is_set_again_for_the_oldest_that_is_left(self) -> None:
        with scripted() as loop:
            called: list[float] = []
            gone = after(10.0, print)
            loop.advance(4.0)
            after(10.0, lambda: called.append(loop.now))
            gone.cancel()
            loop.advance(9.0)
            assert (called, loop.pending) == ([], 1)
            loop.advance(2.0)
            assert called == [pytest.approx(1014.0, abs=2 * GRAIN)]

    def test_cancelling_twice_or_too_late_changes_nothing(self) -> None:
        with scripted() as loop:
            called: list[int] = []
            one, two = (after(1.0, lambda number=number: called.append(number)) for number in (1, 2))  # type: ignore[misc]
            one.cancel()
            one.cancel()
            loop.advance(2.0)
            two.cancel()
            assert called == [2]

    def test_an_exception_is_told_to_the_loop_and_stops_no_other(self) -> None:
        def fails() -> None:
            raise asyncio.CancelledError

        with scripted() as loop:
            called: list[int] = []
            after(1.0, fails)
            after(1.0, lambda: called.append(1))
            loop.advance(2.0)
            assert called == [1]
            assert [type(fault) for fault in loop.faults] == [asyncio.CancelledError]

    def test_an_exit_of_the_process_goes_on_and_loses_nobody(self) -> None:
        def exits() -> None:
            raise SystemExit

        with scripted() as loop:
            called: list[int] = []
            after(1.0, exits)
            after(1.0, lambda: called.append(1))
            with pytest.raises(SystemExit):
                loop.advance(2.0)
            loop.advance(0.0)
            assert called == [1]

    def test_durations_of_clients_do_not_pile_up(self) -> None:
        """Each may last a day, and its loop timer with it."""
        with scripted() as loop:
            kept = [after(86400.0 + number, print) for number in range(10)]
            for number in range(5000):
                after(1000.0 + number, print).cancel()
            assert loop.pending <= MOST_KEPT
            loop.advance(86411.0)
            assert all(expiry not in queue for expiry in kept for queue in table(loop).values())

    def test_many_durations_in_use_at_once_are_all_kept(self) -> None:
        with scripted() as loop:
            called: list[int] = []
            for number in range(4 * MOST_KEPT):
                after(1.0 + number, lambda number=number: called.append(number))  # type: ignore[misc]
            loop.advance(4.0 * MOST_KEPT + 2)
            assert called == list(range(4 * MOST_KEPT))


class TestLoops:
    @pytest.mark.parametrize("made", [asyncio.new_event_loop, uvloop.new_event_loop])
    def test_on_a_real_loop_they_come_when_they_are_due_and_in_order(self, made: Callable[[], Any]) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            called: list[tuple[float, float]] = []
            done = asyncio.Event()
            for seconds in (0.0, 0.0014, 0.003, 0.0106):
                due = loop.time() + seconds
                after(seconds, lambda due=due: called.append((due, loop.time())))  # type: ignore[misc]
            after(0.02, done.set)
            await done.wait()
            assert len(called) == 4
            assert all(now >= due for due, now in called)

        with asyncio.Runner(loop_factory=made) as runner:
            runner.run(main())

    @pytest.mark.parametrize("made", [asyncio.new_event_loop, uvloop.new_event_loop])
    def test_a_closed_loop_is_let_go_of(self, made: Callable[[], Any]) -> None:
        """Also with an expiry pending, whose callback knows the loop."""
        seen = []
        for _ in range(3):
            loop = made()

            async def main() -> None:
                after(300.0, asyncio.get_running_loop().stop)
                after(200.0, print).cancel()

            loop.run_until_complete(main())
            seen.append(weakref.ref(loop))
            loop.close()
            del loop
        gc.collect()
        assert [found() is None for found in seen[:-1]] == [True, True]
        assert sum(loop.is_closed() for loop in timers._TABLES) == 1

    def test_two_loops_do_not_disturb_one_another(self) -> None:
        with scripted() as one:
            called: list[str] = []
            after(1.0, lambda: called.append("one"))
            with scripted() as other:
                after(1.0, lambda: called.append("other"))
                other.advance(2.0)
            assert called == ["other"]
            one.advance(2.0)
            assert called == ["other", "one"]
