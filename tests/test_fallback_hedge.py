"""The race of two lanes by itself: who wins, and that whatever does not win is cancelled, awaited and closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.fallback.hedge import SAVED, Budget, Hedge, race
from proxy.errors import GatewayError, Outcome, UpstreamError
from proxy.reply import Batch, Head, Reply, Trailer


async def no_chunks() -> AsyncIterator[Batch]:
    return
    yield


def reply(name: str) -> Reply:
    return Reply(Head(name), no_chunks(), Trailer())


class Lanes:
    """Two lanes, each ended by the test. cancelled: what each lost one was told."""

    def __init__(self) -> None:
        self.ends: list[asyncio.Future[Reply]] = []
        self.cancelled: list[tuple[object, ...]] = []

    async def __call__(self) -> Reply:
        end: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.ends.append(end)
        try:
            return await end
        except asyncio.CancelledError as error:
            self.cancelled.append(error.args)
            raise


def at_once() -> float | None:
    return 0.0


async def started(lanes: Lanes, count: int = 2) -> None:
    while len(lanes.ends) < count:  # noqa: ASYNC110 - a test waits for what nobody announces
        await asyncio.sleep(0)


async def test_the_first_reply_wins_and_the_other_is_cancelled_and_over_by_then() -> None:
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: True))
    await started(lanes)
    lanes.ends[1].set_result(second := reply("second"))
    assert await racing == (second, "second")
    assert lanes.cancelled == [(Outcome.CANCELLED,)]
    assert second.trailer.outcome is None, "the winner is open"


async def test_of_two_replies_at_once_one_wins_and_the_other_is_closed() -> None:
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: True))
    await started(lanes)
    first, second = reply("first"), reply("second")
    lanes.ends[0].set_result(first)
    lanes.ends[1].set_result(second)
    assert await racing == (first, "first")
    assert (first.trailer.outcome, second.trailer.outcome) == (None, Outcome.CANCELLED)


@pytest.mark.parametrize("failing", [0, 1])
async def test_an_error_waits_for_the_other_lane(failing: int) -> None:
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: True))
    await started(lanes)
    lanes.ends[failing].set_exception(UpstreamError("no"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not racing.done()
    lanes.ends[1 - failing].set_result(good := reply("good"))
    assert (await racing)[0] is good


async def test_when_both_fail_the_last_error_is_raised() -> None:
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: True))
    await started(lanes)
    lanes.ends[1].set_exception(UpstreamError("earlier"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lanes.ends[0].set_exception(last := UpstreamError("later"))
    with pytest.raises(GatewayError) as caught:
        await racing
    assert caught.value is last


async def test_without_leave_no_second_lane_is_begun() -> None:
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: False))
    await started(lanes, 1)
    lanes.ends[0].set_result(only := reply("only"))
    assert await racing == (only, "")
    assert len(lanes.ends) == 1


async def test_a_lane_that_is_never_late_is_simply_awaited() -> None:
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, lambda: None, lambda: True))
    await started(lanes, 1)
    lanes.ends[0].set_exception(UpstreamError("no"))
    with pytest.raises(UpstreamError):
        await racing
    assert len(lanes.ends) == 1


@pytest.mark.parametrize("why", [(), (Outcome.DRAINING,)], ids=["client gone", "draining"])
async def test_a_cancellation_reaches_both_lanes_with_its_reason_and_leaves_no_task(why: tuple[Outcome, ...]) -> None:
    before = asyncio.all_tasks()
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: True))
    await started(lanes)
    racing.cancel(*why)
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert lanes.cancelled == [why, why]
    assert asyncio.all_tasks() == before


async def test_a_cancellation_in_the_moment_of_the_win_closes_the_reply() -> None:
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: True))
    await started(lanes)
    lanes.ends[0].set_result(won := reply("won"))
    await asyncio.sleep(0)
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert won.trailer.outcome is Outcome.CANCELLED


@pytest.mark.parametrize("turns", range(8))
async def test_at_whichever_moment_it_is_cancelled_no_reply_stays_open(turns: int) -> None:
    """The client leaves 0, 1, 2… loop turns after the win: the reply is the caller's, or it is closed."""
    lanes = Lanes()
    racing = asyncio.create_task(race(lanes, at_once, lambda: True))
    await started(lanes)
    lanes.ends[1].set_result(won := reply("won"))
    for _ in range(turns):
        await asyncio.sleep(0)
    racing.cancel()
    [found] = await asyncio.gather(racing, return_exceptions=True)
    assert (won.trailer.outcome is None) == isinstance(found, tuple)


@given(st.floats(0.01, 1), st.lists(st.booleans(), max_size=300))
def test_hedges_are_never_more_than_their_share_of_requests(share: float, late: list[bool]) -> None:
    budget, hedges = Budget(share), 0
    for requests, is_late in enumerate(late, start=1):
        budget.earn()
        hedges += is_late and budget.spend()
        assert hedges <= share * requests + 1e-6


def test_what_is_saved_up_is_bounded() -> None:
    budget = Budget(1.0)
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(1000)) == SAVED


def test_ten_requests_pay_for_one_hedge_of_ten_percent() -> None:
    budget = Budget(Hedge(max_extra="10%").share)
    spent = 0
    for _ in range(10):
        budget.earn()
        spent += budget.spend()
    assert spent == 1
