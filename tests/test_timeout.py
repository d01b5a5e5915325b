"""Timeouts: a request's own within the operator's bounds, each one named wherever it fires, its socket closed at once.

The limits are real and short (tens of ms), because sockets know no injected clock; nothing here waits without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from middleware import timeout
from middleware.timeout import AttemptLimits, Timeout
from proxy.app import Gateway
from proxy.call import Call
from proxy.errors import GatewayError, Outcome, Refused, UpstreamTimeout, why_cancelled
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler
from proxy.reply import Reply
from tests.support.decoding import make_call
from tests.support.gateway import ask, chat, gateway, until
from tests.support.handmade import reply
from tests.support.upstream import Asked, Line, Upstream, stream

CONFIG = """
server: {{port: 0}}
providers: {{openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}}}
middleware: [outcomes, timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: 5s, call_timeout: 5s{more}}}]
"""
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Outcomes:
    """Notes how calls ended, where metrics and logs would look."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __call__(self, call: Call, next: Handler) -> Reply:
        try:
            reply = await next(call)
        except GatewayError as error:
            self.seen.append(error.outcome.value)
            raise
        except asyncio.CancelledError as error:  # by the edge, whose deadline was first on a busy loop
            self.seen.append(why_cancelled(error).value)
            raise
        reply.trailer.on_end(lambda trailer: self.seen.append(str(trailer.outcome)))
        return reply


TABLE = {"outcomes": Outcomes}


def ended(here: Gateway) -> list[str]:
    return next(layer.seen for layer in here.layers if isinstance(layer, Outcomes))


async def silent(asked: Asked, line: Line) -> None:
    await line.forever()


async def pings(asked: Asked, line: Line) -> None:
    """A head, then signs of life without content, for as long as somebody listens."""
    await line.head()
    while not line.closed.is_set():
        await line.chunk(b": ping\n\n", b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n')
        await asyncio.sleep(0.005)


async def a_word_then_pings(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD)
    while not line.closed.is_set():
        await line.chunk(b": ping\n\n")
        await asyncio.sleep(0.005)


async def words_without_end(asked: Asked, line: Line) -> None:
    await line.head()
    while not line.closed.is_set():
        await line.chunk(WORD)
        await asyncio.sleep(0.005)


async def half_a_json(asked: Asked, line: Line) -> None:
    await line.head(content_type="application/json")
    await line.chunk(b'{"choices": [')
    await line.forever()


class TestNamed:
    @pytest.mark.parametrize(
        ("answer", "streamed", "limits", "code"),
        [
            (silent, True, {"call_timeout": 40}, "timeout_call"),
            (silent, True, {"first_chunk_timeout": 40}, "timeout_first_chunk"),
            (silent, True, {"total_timeout": 40}, "timeout_total"),
            (silent, False, {"call_timeout": 40, "first_chunk_timeout": 1}, "timeout_call"),
            (pings, True, {"first_chunk_timeout": 40}, "timeout_first_chunk"),
            (pings, True, {"call_timeout": 40}, "timeout_call"),
            (half_a_json, False, {"call_timeout": 40}, "timeout_call"),
            (half_a_json, False, {"total_timeout": 40}, "timeout_total"),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )  # fmt: skip
    async def test_before_the_first_chunk_it_is_a_504_and_the_socket_is_closed(
        self, answer: Any, streamed: bool, limits: dict[str, int], code: str
    ) -> None:
        async with Upstream(answer) as upstream, gateway(upstream.url, CONFIG, more="", table=TABLE) as here:
            found = await ask(here.port, chat(stream=streamed, timeout=limits))
            assert found.error is not None
            assert (found.status, found.error["code"], found.error["type"]) == (504, code, "timeout_error")
            assert "0.04 s" in found.error["message"]
            await until(lambda: upstream.lines[0].closed.is_set())
            assert ended(here) == [code]

    @pytest.mark.parametrize(
        ("answer", "limits", "code"),
        [
            (a_word_then_pings, {"idle_timeout": 40}, "timeout_idle"),
            (a_word_then_pings, {"total_timeout": 60}, "timeout_total"),
            (words_without_end, {"total_timeout": 60, "idle_timeout": 50}, "timeout_total"),
        ],
        ids=["idle: pings do not count", "total while idle", "total while flowing"],
    )
    async def test_in_the_stream_it_is_the_error_chunk_and_the_socket_is_closed(
        self, answer: Any, limits: dict[str, int], code: str
    ) -> None:
        async with Upstream(answer) as upstream, gateway(upstream.url, CONFIG, more="", table=TABLE) as here:
            found = await ask(here.port, chat(timeout=limits))
            assert (found.status, found.done, found.text[:1]) == (200, False, "x")
            assert found.error is not None
            assert found.error["code"] == code
            await until(lambda: upstream.lines[0].closed.is_set())
            assert ended(here) == [code]

    async def test_a_loop_that_was_busy_past_the_deadline_still_answers(self) -> None:
        """The attempt's timer and the edge's then go off in one turn; neither is taken for the client's leaving."""

        class Busy:
            async def __call__(self, call: Call, next: Handler) -> Reply:
                assert call.deadline is not None
                asyncio.get_running_loop().call_at(call.deadline - 0.02, time.sleep, 0.06)
                return await next(call)

        config = CONFIG.replace("{more}}}]", "{more}}}, busy]")
        async with Upstream(silent) as upstream, gateway(upstream.url, config, more="", table={**TABLE, "busy": Busy}) as here:
            found = await ask(here.port, chat(timeout={"total_timeout": 60}))
            assert found.error is not None
            assert (found.status, found.error["code"], ended(here)) == (504, "timeout_total", ["timeout_total"])

    async def test_a_connection_that_does_not_stand_in_time_is_timeout_connect(self) -> None:
        with contextlib.ExitStack() as stack:
            full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            for _ in range(4):  # Linux drops the SYN once the queue of a listener that accepts nobody is full
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            async with gateway(f"http://127.0.0.1:{full.getsockname()[1]}", CONFIG, more="", table=TABLE) as here:
                found = await ask(here.port, chat(timeout={"connect_timeout": 40, "call_timeout": 4000}))
                assert found.error is not None
                assert (found.status, found.error["code"], ended(here)) == (504, "timeout_connect", ["timeout_connect"])

    async def test_content_keeps_a_stream_alive_for_longer_than_every_limit_but_total(self) -> None:
        async def slowly(asked: Asked, line: Line) -> None:
            await line.head()
            for _ in range(12):
                await line.chunk(WORD)
                await asyncio.sleep(0.02)
            await line.chunk(END)
            await line.end()

        limits = {"idle_timeout": 150, "call_timeout": 150, "first_chunk_timeout": 150}
        async with Upstream(slowly) as upstream, gateway(upstream.url, CONFIG, more="", table=TABLE) as here:
            found = await ask(here.port, chat(timeout=limits))
        assert (found.text, found.done) == ("x" * 12, True)

    async def test_the_operators_total_holds_without_a_word_of_the_request(self) -> None:
        more = ", total_timeout: 50ms"
        async with Upstream(words_without_end) as upstream, gateway(upstream.url, CONFIG, more=more, table=TABLE) as here:
            found = await ask(here.port, chat())
        assert found.error is not None
        assert found.error["code"] == "timeout_total"


BAD: list[Any] = [0, -1, True, "30", float("nan"), float("inf"), [], {}]


class TestRequest:
    def admitted(self, body: Any, **options: Any) -> tuple[Call, AttemptLimits]:
        call = Timeout(**options).admit(make_call(), OwnFields(body, {}))
        attempt = call.extension(AttemptLimits)
        assert attempt is not None
        return call, attempt

    async def test_milliseconds_of_the_request_go_before_the_configured_seconds(self) -> None:
        asked = {"call_timeout": 1500, "connect_timeout": 10, "first_chunk_timeout": 20, "idle_timeout": 30, "total_timeout": 40}
        before = asyncio.get_running_loop().time()
        call, attempt = self.admitted({"timeout": asked}, call_timeout=9)
        assert attempt == AttemptLimits(0.02, 1.5)
        assert (call.limits.connect, call.limits.idle, call.limits.total) == (0.01, 0.03, 0.04)
        assert call.deadline is not None
        assert call.deadline - before == pytest.approx(0.04, abs=0.02)

    def test_what_the_request_leaves_out_is_as_configured_and_total_is_off(self) -> None:
        call, attempt = self.admitted(
            {"timeout": {"call_timeout": 1500, "idle_timeout": None}}, idle_timeout=7, connect_timeout=3
        )
        assert attempt == AttemptLimits(300.0, 1.5)
        assert (call.limits.connect, call.limits.idle, call.limits.total, call.deadline) == (3, 7, None, None)

    def test_the_top_level_goes_before_orq(self) -> None:
        body = {"orq": {"timeout": {"call_timeout": 1000}}, "timeout": {"call_timeout": 2000}}
        assert self.admitted(body)[1].call == 2.0
        assert self.admitted({"orq": body["orq"]})[1].call == 1.0
        assert self.admitted({"penstock": body["orq"]})[1].call == 1.0

    @pytest.mark.parametrize("which", ["connect", "first_chunk", "idle", "call", "total"])
    async def test_a_request_may_not_exceed_the_operators_bound(self, which: str) -> None:
        name = f"{which}_timeout"
        self.admitted({"timeout": {name: 2000}}, **{f"max_{name}": 2})
        with pytest.raises(Refused, match="from 1 to 2000") as caught:
            self.admitted({"orq": {"timeout": {name: 2001}}}, **{f"max_{name}": 2})
        assert (caught.value.status, caught.value.param) == (400, f"orq.timeout.{name}")

    @pytest.mark.parametrize(
        ("value", "path"),
        [
            (30000, "timeout"), ("30s", "timeout"), (True, "timeout"), ([], "timeout"),
            *(({"call_timeout": bad}, "timeout.call_timeout") for bad in BAD),
        ],
    )  # fmt: skip
    def test_what_it_cannot_be_is_refused_with_its_path(self, value: object, path: str) -> None:
        with pytest.raises(Refused) as caught:
            self.admitted({"timeout": value})
        assert caught.value.param == path

    async def test_over_http_a_bad_one_reaches_nobody_and_a_good_one_is_not_passed_on(self) -> None:
        async with Upstream(stream([WORD, END])) as upstream, gateway(upstream.url, CONFIG, more="", table=TABLE) as here:
            bad = await ask(here.port, chat(orq={"timeout": {"call_timeout": "1"}}))
            assert (bad.status, bad.json["error"]["param"], upstream.asked) == (400, "orq.timeout.call_timeout", [])
            good = await ask(here.port, chat(timeout={"call_timeout": 5000}))
            assert (good.status, good.text) == (200, "x")
            assert "timeout" not in upstream.asked[0].json


class TestDeadline:
    async def attempt(self, left: float, **options: Any) -> UpstreamTimeout:
        """What an attempt that never answers ends in, `left` seconds before the deadline."""
        layer = Timeout(total_timeout=60, **options)
        call = layer.admit(make_call({"stream": True}), OwnFields({}, {}))
        object.__setattr__(call, "deadline", asyncio.get_running_loop().time() + left)

        async def never(call: Call) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError

        with pytest.raises(UpstreamTimeout) as caught:
            await layer(call, never)
        return caught.value

    async def test_an_attempt_never_lasts_beyond_it(self) -> None:
        assert (await self.attempt(0.02)).which == "total"

    async def test_an_attempt_after_it_ends_at_once(self) -> None:
        assert (await self.attempt(-1.0)).which == "total"

    async def test_the_tighter_limit_is_the_one_that_is_named(self) -> None:
        assert (await self.attempt(5.0, first_chunk_timeout=0.02)).which == "first_chunk"
        assert (await self.attempt(5.0, call_timeout=0.02)).which == "call"


class Rung:
    """Stands in for the timer: it goes off when a test says so."""

    def __init__(self, seconds: float, callback: Callable[[], object]) -> None:
        self.seconds, self.ring, self.cancelled = seconds, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class TestRaces:
    """What happens within one turn of the loop: the limit runs out, the reply comes, the client leaves, in any order."""

    @pytest.fixture(autouse=True)
    def timers(self, monkeypatch: pytest.MonkeyPatch) -> list[Rung]:
        made: list[Rung] = []

        def after(seconds: float, callback: Callable[[], object]) -> Rung:
            made.append(Rung(seconds, callback))
            return made[-1]

        monkeypatch.setattr(timeout, "after", after)
        return made

    async def attempt(self, *happens: Callable[[], object], layers: int = 1) -> tuple[Any, int]:
        """How the attempt ends when all of this happens at once, and how many cancellations the task is left with."""
        waiting: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        async def next(call: Call) -> Reply:
            return await waiting

        handler: Handler = next
        for _ in range(layers):
            handler = functools.partial(Timeout().__call__, next=handler)

        async def attempt() -> tuple[Any, int]:
            task = asyncio.current_task()
            assert task is not None
            try:
                return await handler(make_call()), task.cancelling()
            except BaseException as error:
                return error, task.cancelling()

        self.task, self.waiting = asyncio.create_task(attempt()), waiting
        await asyncio.sleep(0)
        for happen in happens:
            happen()
        return await self.task

    def leave(self) -> None:
        self.task.cancel(Outcome.DRAINING)

    async def test_a_limit_that_runs_out_is_an_error_and_leaves_no_cancellation_behind(self, timers: list[Rung]) -> None:
        found, left = await self.attempt(lambda: timers[0].ring())
        assert isinstance(found, UpstreamTimeout)
        assert (found.which, left, timers[0].cancelled) == ("call", 0, True)
        assert found.__suppress_context__

    async def test_a_limit_that_runs_out_as_the_reply_comes_is_one_that_ran_out(self, timers: list[Rung]) -> None:
        found, left = await self.attempt(lambda: self.waiting.set_result(reply()), lambda: timers[0].ring())
        assert isinstance(found, UpstreamTimeout)
        assert left == 0

    async def test_a_reply_stops_the_timer(self, timers: list[Rung]) -> None:
        given = reply()
        found, left = await self.attempt(lambda: self.waiting.set_result(given))
        assert (found, left, timers[0].cancelled) == (given, 0, True)

    async def test_a_client_that_leaves_first_has_left_and_its_reason_stands(self, timers: list[Rung]) -> None:
        found, left = await self.attempt(self.leave, lambda: timers[0].ring())
        assert isinstance(found, asyncio.CancelledError)
        assert (why_cancelled(found), left) == (Outcome.DRAINING, 1)

    async def test_a_client_that_leaves_second_has_left_as_well(self, timers: list[Rung]) -> None:
        found, left = await self.attempt(lambda: timers[0].ring(), self.leave)
        assert isinstance(found, asyncio.CancelledError)
        assert left == 1

    async def test_without_the_timer_a_client_has_left(self, timers: list[Rung]) -> None:
        found, left = await self.attempt(self.leave)
        assert isinstance(found, asyncio.CancelledError)
        assert (why_cancelled(found), left, timers[0].cancelled) == (Outcome.DRAINING, 1, True)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    async def test_of_two_attempts_one_in_the_other_the_outer_limit_counts(
        self, timers: list[Rung], order: tuple[int, int]
    ) -> None:
        found, left = await self.attempt(*(lambda one=one: timers[one].ring() for one in order), layers=2)
        assert isinstance(found, UpstreamTimeout)
        assert left == 0

    async def test_a_timeout_error_of_somebody_elses_stays_what_it_is(self) -> None:
        given = TimeoutError()
        assert await self.attempt(lambda: self.waiting.set_exception(given)) == (given, 0)

    @pytest.mark.parametrize("ending", [None, GatewayError("no"), TimeoutError()], ids=repr)
    async def test_what_comes_of_the_cancellation_leaves_none_behind(
        self, timers: list[Rung], ending: BaseException | None
    ) -> None:
        """Who is cancelled may still answer, or fail otherwise; where it says that time ran out, it did."""
        given = reply()

        async def next(call: Call) -> Reply:
            with contextlib.suppress(asyncio.CancelledError):
                timers[0].ring()
                await asyncio.Event().wait()
            if ending is not None:
                raise ending
            return given

        task = asyncio.current_task()
        assert task is not None
        if ending is None:
            assert await Timeout()(make_call(), next) is given
        else:
            with pytest.raises(UpstreamTimeout if isinstance(ending, TimeoutError) else GatewayError):
                await Timeout()(make_call(), next)
        assert task.cancelling() == 0

    async def test_a_task_that_was_cancelled_before_can_still_time_out(self, timers: list[Rung]) -> None:
        """A fallback after a swallowed cancellation: only what comes during the attempt counts."""
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)

        async def next(call: Call) -> Reply:
            timers[0].ring()
            await asyncio.Event().wait()
            raise AssertionError

        with pytest.raises(UpstreamTimeout):
            await Timeout()(make_call(), next)
        assert task.uncancel() == 0
