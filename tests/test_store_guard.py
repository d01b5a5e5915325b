"""The guard: nobody waits longer than they should, and a store that fails again and again is left alone for a while."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from proxy.store import Conversations, Library, Session, Store, StoreUnavailable, Where
from proxy.store.guard import FAILURES, REST_SECONDS, Circuit, Guard
from proxy.store.guarded import Guards, guarded


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Home:
    """Conversations that do as they are told. asked: how often. ended: what was cancelled."""

    def __init__(self) -> None:
        self.do: Callable[[], Any] = self.answer
        self.asked = 0
        self.ended = 0
        self.stubborn = asyncio.Event()

    async def session(self, owner: str, session: str) -> Session | None:
        self.asked += 1
        return await self.do()  # type: ignore[no-any-return]

    async def answer(self) -> Session:
        return Session("s", 1.0, 1.0, 1, 1)

    async def fail(self) -> None:
        raise StoreUnavailable("the disk is on fire")

    async def hang(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1

    async def hang_on(self) -> None:
        """Not even being cancelled ends it, as with a driver that tells a dead server so."""
        try:
            await self.hang()
        finally:
            await self.stubborn.wait()

    async def err(self) -> None:
        raise ZeroDivisionError


class Guarded:
    def __init__(self, patience: float = 0.005) -> None:
        self.clock, self.home, self.told = Clock(), Home(), list[tuple[str, str | None]]()
        self.guard = Guard("conversations", lambda name, why: self.told.append((name, why)), self.clock)
        self.patience = patience

    async def ask(self) -> Session | None:
        return await self.guard.call(self.patience, self.home.session, "o", "s")

    async def fails(self, times: int = 1) -> None:
        for _ in range(times):
            with pytest.raises(StoreUnavailable):
                await self.ask()


async def test_an_answer_is_passed_on_and_counted_with_its_time() -> None:
    guarded = Guarded(patience=60.0)

    async def slowly() -> Session:
        guarded.clock.now += 0.25
        return await guarded.home.answer()

    guarded.home.do = slowly
    assert await guarded.ask() == Session("s", 1.0, 1.0, 1, 1)
    assert guarded.guard.calls == {("session", "success"): 1}
    assert guarded.guard.seconds == {"session": 0.25}


async def test_a_home_that_hangs_is_left_behind_in_time_and_cancelled() -> None:
    guarded = Guarded()
    guarded.home.do = guarded.home.hang
    with pytest.raises(StoreUnavailable, match=r"session took longer than 0\.005 s"):
        await guarded.ask()
    await guarded.guard.close()
    assert guarded.home.ended == 1
    assert guarded.guard.calls == {("session", "timeout"): 1}


async def test_a_home_that_hangs_while_it_is_cancelled_holds_nobody() -> None:
    guarded = Guarded()
    guarded.home.do = guarded.home.hang_on
    await guarded.fails()
    guarded.home.stubborn.set()
    await guarded.guard.close()


async def test_patience_is_counted_by_the_loops_clock_and_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = Guarded(patience=3600.0)
    guarded.home.do = guarded.home.hang
    waits: list[float | None] = []
    wait = asyncio.wait

    async def at_once(tasks: Any, **fields: Any) -> Any:
        waits.append(fields["timeout"])
        return await wait(tasks, timeout=0.001)

    monkeypatch.setattr(asyncio, "wait", at_once)
    await guarded.fails()
    assert waits == [3600.0]


async def test_after_so_many_failures_in_a_row_it_is_not_asked_until_the_rest_is_over() -> None:
    guarded = Guarded()
    guarded.home.do = guarded.home.fail
    await guarded.fails(FAILURES)
    assert guarded.told == [("conversations", "the disk is on fire")]
    guarded.clock.now += REST_SECONDS - 0.001
    await guarded.fails(10)
    assert guarded.home.asked == FAILURES
    assert guarded.guard.calls == {("session", "unavailable"): FAILURES, ("session", "refused"): 10}


async def test_after_the_rest_one_may_try_and_the_others_wait_for_what_becomes_of_it() -> None:
    guarded = Guarded(patience=60.0)
    guarded.home.do = guarded.home.fail
    await guarded.fails(FAILURES)
    guarded.clock.now += REST_SECONDS
    gate = asyncio.Event()

    async def later() -> Session:
        await gate.wait()
        return await guarded.home.answer()

    guarded.home.do = later
    trying = asyncio.create_task(guarded.ask())
    await asyncio.sleep(0)
    await guarded.fails(5)
    gate.set()
    assert await trying
    assert guarded.home.asked == FAILURES + 1
    assert await guarded.ask()
    assert guarded.told == [("conversations", "the disk is on fire"), ("conversations", None)]


async def test_a_try_that_fails_is_the_beginning_of_another_rest_and_is_not_told_again() -> None:
    guarded = Guarded()
    guarded.home.do = guarded.home.fail
    await guarded.fails(FAILURES)
    for _ in range(3):
        guarded.clock.now += REST_SECONDS
        await guarded.fails(4)
    assert guarded.home.asked == FAILURES + 3
    assert len(guarded.told) == 1


async def test_slow_counts_like_dead_and_one_answer_in_between_begins_anew() -> None:
    guarded = Guarded()
    for _ in range(3):
        guarded.home.do = guarded.home.hang
        await guarded.fails(FAILURES - 1)
        guarded.home.do = guarded.home.answer
        assert await guarded.ask()
    assert not guarded.guard.circuit.open
    guarded.home.do = guarded.home.hang
    await guarded.fails(FAILURES)
    assert guarded.guard.circuit.open


async def test_a_mistake_of_ours_is_raised_as_it_is_and_no_failure_of_the_store() -> None:
    guarded = Guarded()
    guarded.home.do = guarded.home.err
    for _ in range(2 * FAILURES):
        with pytest.raises(ZeroDivisionError):
            await guarded.ask()
    assert guarded.guard.calls == {("session", "error"): 2 * FAILURES}


async def test_a_caller_that_goes_ends_the_call_and_says_nothing_about_the_store() -> None:
    guarded = Guarded(patience=60.0)
    guarded.home.do = guarded.home.fail
    await guarded.fails(FAILURES)
    guarded.clock.now += REST_SECONDS
    guarded.home.do = guarded.home.hang
    trying = asyncio.create_task(guarded.ask())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    trying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trying
    await guarded.guard.close()
    assert (guarded.home.ended, guarded.guard.circuit.open) == (1, True)
    guarded.home.do = guarded.home.answer
    assert await guarded.ask(), "the next one may try"


def test_a_late_failure_prolongs_the_rest_and_a_late_success_ends_it() -> None:
    clock = Clock()
    circuit = Circuit(clock)
    for _ in range(FAILURES):
        circuit.failed()
    clock.now += REST_SECONDS / 2
    circuit.failed()
    clock.now += REST_SECONDS / 2
    assert not circuit.admits()
    circuit.succeeded()
    assert circuit.admits()


# The protocols


class Recorder:
    """Any method of both protocols; notes its arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        async def method(*args: Any) -> str:
            self.seen.append((name, args))
            return name

        method.__name__ = name
        return method


METHODS = [
    (part, name) for part, protocol in (("conversations", Conversations), ("files", Library))
    for name in vars(protocol) if not name.startswith("_")
]  # fmt: skip


class Patience(Guard):
    """Notes for whom somebody waits how long."""

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda name, why: None)
        self.waits: dict[str, float] = {}

    async def call(self, patience: float, home: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.waits[home.__name__] = patience
        return await super().call(patience, home, *args, **kwargs)


@pytest.mark.parametrize(("part", "name"), METHODS)
async def test_each_method_passes_its_arguments_on_through_its_parts_guard(part: str, name: str) -> None:
    home = Recorder()
    parts = [Patience(one) for one in ("conversations", "files", "search")]
    store = guarded(Store("x", home, home), Guards(parts[0], parts[1], parts[2], 0.5, 10.0))
    method = getattr(getattr(store, part), name)
    args = tuple(object() for _ in inspect.signature(method).parameters)
    assert await method(*args) == name
    assert home.seen == [(name, args)]
    expected = "search" if name.startswith("search") else part
    waits = {one.name: one.waits for one in parts if one.waits}
    looks = {"turns", "session", "sessions", "file", "files", "held", "waiting", "search_text", "search_vectors", "vectors"}
    assert waits == {expected: {name: 0.5 if name in looks else 10.0}}


async def test_a_search_that_fails_does_not_take_the_rest_away() -> None:
    class Failing(Recorder):
        async def search_text(self, *args: Any) -> None:
            raise StoreUnavailable("too many passages")

    home = Failing()
    one, two, three = (Guard(name, lambda name, why: None) for name in "abc")
    guards = Guards(one, two, three, 0.5, 10.0)
    store = guarded(Store("x", home, home), guards)  # type: ignore[arg-type]
    for _ in range(FAILURES + 1):
        with pytest.raises(StoreUnavailable):
            await store.files.search_text("o", "q", 1, Where())
    assert guards.search.circuit.open
    assert await store.files.held("o") == "held"  # type: ignore[comparison-overlap]
    assert await store.conversations.session("o", "s") == "session"  # type: ignore[comparison-overlap]
