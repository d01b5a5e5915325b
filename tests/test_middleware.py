"""The middlewares by themselves, around a hand-made next: what tracking says of each end, and which limit timeout names."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import middleware
from middleware.timeout import Timeout
from middleware.tracking import Tracking
from proxy.call import Call
from proxy.errors import Refused, UpstreamError, UpstreamTimeout
from proxy.pipeline import compose
from proxy.reply import Reply
from tests.support.decoding import make_call
from tests.support.handmade import Clock, Json, answers, asked, reply


@pytest.fixture
def tracking(lines: list[Json]) -> Tracking:
    made = Tracking()
    made.clock = Clock()
    return made


async def forever(call: Call) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


SHORT = 0.005


class TestTimeout:
    @pytest.mark.parametrize(
        ("stream", "limits", "which", "seconds"),
        [
            (True, {"first_chunk_timeout": SHORT, "call_timeout": 60}, "first_chunk", SHORT),
            (True, {"first_chunk_timeout": 60, "call_timeout": SHORT}, "call", SHORT),
            (False, {"first_chunk_timeout": 60, "call_timeout": SHORT}, "call", SHORT),
            (False, {"first_chunk_timeout": 0.001, "call_timeout": SHORT}, "call", SHORT),
        ],
        ids=["stream: first chunk", "stream: call is shorter", "whole", "whole: first_chunk is for streams"],
    )
    async def test_the_limit_that_ran_out_is_named(self, stream: bool, limits: Any, which: str, seconds: float) -> None:
        with pytest.raises(UpstreamTimeout) as caught:
            await Timeout(**limits)(make_call({"stream": stream}), forever)
        error = caught.value
        assert (error.which, error.status, error.code, error.outcome.value) == (
            which,
            504,
            f"timeout_{which}",
            f"timeout_{which}",
        )
        assert f"{seconds:g} s" in error.message

    async def test_what_waited_is_cancelled(self) -> None:
        cancelled = asyncio.Event()

        async def next(call: Call) -> Reply:
            try:
                return await forever(call)
            finally:
                cancelled.set()

        with pytest.raises(UpstreamTimeout):
            await Timeout(call_timeout=SHORT)(make_call(), next)
        assert cancelled.is_set()

    async def test_limits_on_the_stream_are_handed_inward(self) -> None:
        seen: list[Call] = []

        async def next(call: Call) -> Reply:
            seen.append(call)
            return reply()

        call = make_call({"stream": True})
        await Timeout(connect_timeout=1, idle_timeout=2, first_chunk_timeout=3, call_timeout=4)(call, next)
        assert (seen[0].limits.connect, seen[0].limits.idle) == (1, 2)
        assert seen[0].request is call.request
        assert (call.limits.connect, call.limits.idle) == (None, None)

    async def test_a_reply_in_time_goes_through_as_it_is_and_no_timer_runs_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Counted:
            cancelled = 0

            def cancel(self) -> None:
                self.cancelled += 1

        timers: list[Counted] = []

        def after(seconds: float, callback: object) -> Counted:
            timers.append(Counted())
            return timers[-1]

        monkeypatch.setattr("middleware.timeout.after", after)
        given = reply()
        assert await Timeout()(make_call({"stream": True}), answers(given)) is given
        assert [timer.cancelled for timer in timers] == [1], "a stream may last longer than its first chunk may take"

    @pytest.mark.parametrize("error", [UpstreamError("no"), Refused("no"), UpstreamTimeout("connect", 1), ValueError("x")])
    async def test_other_errors_pass(self, error: Exception) -> None:
        with pytest.raises(type(error)) as caught:
            await Timeout()(make_call(), answers(error))
        assert caught.value is error

    async def test_a_timeout_error_of_somebody_else_is_not_taken_for_ours(self) -> None:
        error = TimeoutError("socket")
        with pytest.raises(TimeoutError) as caught:
            await Timeout()(make_call(), answers(error))
        assert caught.value is error

    async def test_a_client_that_leaves_is_not_a_timeout(self) -> None:
        entered = asyncio.Event()

        async def next(call: Call) -> Reply:
            entered.set()
            return await forever(call)

        task = asyncio.create_task(Timeout()(make_call(), next))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_under_tracking_the_timeout_is_the_lines_outcome(self, tracking: Tracking, lines: list[Json]) -> None:
        with pytest.raises(UpstreamTimeout):
            await compose([tracking, Timeout(call_timeout=SHORT)], forever)(asked())
        assert [(line["outcome"], line["status"]) for line in lines] == [("timeout_call", 504)]


def test_the_table_names_every_middleware_of_the_folder() -> None:
    assert middleware.TABLE["tracking"] is Tracking
    assert middleware.TABLE["timeout"] is Timeout
