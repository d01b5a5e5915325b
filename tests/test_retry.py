"""Retries: what is tried again, when, how often, and what the client and the metrics learn of it. Nobody sleeps here."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.retry import NEVER, Retry, may_repeat
from middleware.retry.budget import MAX_TARGETS, Budgets
from middleware.retry.hints import hinted_seconds, seconds_until
from proxy.call import Call, Limits, Route
from proxy.errors import (
    Draining,
    GatewayError,
    Malformed,
    Outcome,
    Refused,
    Unconfigured,
    UpstreamCut,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.own_fields import OwnFields
from proxy.pipeline import Surroundings
from proxy.reply import Batch, Head, Reply, Trailer, Try
from proxy.transport import UpstreamRequest
from proxy.upstream import HttpTransport
from tests.support.decoding import make_call, make_target
from tests.support.gateway import Answer, ask, chat, gateway, until
from tests.support.upstream import Answer as Answering
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
TARGET = make_target("openai", "m")
NOW = 1_750_000_000.0


async def chunks() -> Any:
    yield Batch([], final=True)


def reply(**head: Any) -> Reply:
    return Reply(Head("openai/m", **head), chunks(), Trailer())


def status(code: int, native: int | None = None, **headers: Any) -> UpstreamError:
    error = UpstreamError("no", status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})
    error.native_status = native or code
    return error


class Script:
    """A handler that answers in order, and the clock, waits and dice of the middleware before it."""

    def __init__(self, *answers: GatewayError | Reply, dice: float = 1.0, **options: Any) -> None:
        self.left = list(answers)
        self.calls = 0
        self.now = 1000.0
        self.waits: list[float] = []
        self.retry = Retry(**options)
        self.retry.clock = self.retry.loop_time = lambda: self.now
        self.retry.wall = lambda: NOW
        self.retry.random = lambda: dice
        self.retry.sleep = self.sleep

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def next(self, call: Call) -> Reply:
        self.calls += 1
        self.now += 0.25
        found = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if isinstance(found, GatewayError):
            raise found
        return found

    async def run(self, call: Call | None = None) -> Reply:
        return await self.retry(call or make_call(target=TARGET), self.next)

    async def fails(self, call: Call | None = None) -> GatewayError:
        with pytest.raises(GatewayError) as caught:
            await self.run(call)
        return caught.value

    def sample(self, name: str) -> dict[str, float]:
        return {next(iter(s.labels.values()), ""): s.value for s in self.retry.samples() if s.name == name}


def asking(script: Script, **retry: Any) -> Call:
    return script.retry.admit(make_call(target=TARGET), OwnFields({"retry": retry}, {}))


class TestWhat:
    @pytest.mark.parametrize(
        "error",
        [
            *(status(code) for code in (429, 500, 502, 503, 504)),
            UpstreamUnreachable("no"), UpstreamCut("cut"), Malformed("html"),
            UpstreamTimeout("connect", 1), UpstreamTimeout("call", 1), UpstreamTimeout("first_chunk", 1),
        ],
        ids=lambda error: f"{error.code}-{error.status}",
    )  # fmt: skip
    async def test_what_may_pass_is_tried_again_and_the_reply_says_how_often(self, error: GatewayError) -> None:
        script = Script(error, reply(tries=(Try("further/in", "x", 0.1),)))
        found = await script.run()
        assert script.calls == 2
        assert found.head.tries == (Try("openai/m", error.code, 0.25), Try("further/in", "x", 0.1))

    @pytest.mark.parametrize(
        "error",
        [
            status(408), status(409), status(413), status(529), status(502, native=401), status(502, native=403),
            UpstreamTimeout("total", 1), UpstreamTimeout("idle", 1), Refused("no"), Unconfigured("no"), Draining("no"),
            GatewayError("ours"),
        ],
        ids=lambda error: f"{error.code}-{error.status}-{getattr(error, 'native_status', None)}",
    )  # fmt: skip
    async def test_what_cannot_pass_is_not(self, error: GatewayError) -> None:
        script = Script(error, reply())
        assert await script.fails() is error
        assert (script.calls, script.waits) == (1, [])

    @pytest.mark.parametrize("code", sorted(NEVER))
    async def test_never_is_never_whatever_on_codes_says(self, code: int) -> None:
        script = Script(status(code), on_codes=[code, 500])
        await script.fails()
        await script.fails(asking(script, count=5, on_codes=[code]))
        hidden = Script(status(502, native=code), on_codes=[code, 502])
        await hidden.fails()
        assert (script.calls, hidden.calls) == (2, 1)

    async def test_on_codes_adds_and_takes_away(self) -> None:
        assert (await Script(status(529), reply(), on_codes=[529]).run()).head.tries
        assert (await Script(status(500), reply(), on_codes=[529]).fails()).status == 500

    async def test_network_errors_do_not_need_a_code(self) -> None:
        assert (await Script(UpstreamCut("cut"), reply(), on_codes=[]).run()).head.tries

    async def test_after_the_last_retry_the_error_carries_all_tries(self) -> None:
        script = Script(status(503), status(500), status(429))
        error = await script.fails()
        assert (script.calls, error.status) == (3, 429)
        assert error.tries == (Try("openai/m", "upstream_error", 0.25),) * 3

    async def test_tries_that_an_inner_layer_counted_are_kept_and_not_counted_again(self) -> None:
        inner = status(500)
        inner.tries = (Try("a/b", "x", 1.0), Try("a/c", "y", 2.0))
        error = await Script(inner, status(500), count=1).fails()
        assert [found.target for found in error.tries] == ["a/b", "a/c", "openai/m"]

    async def test_what_never_reached_an_upstream_is_no_try(self) -> None:
        assert (await Script(Refused("no")).fails()).tries == ()

    async def test_a_reply_at_once_goes_through_as_it_is(self) -> None:
        given_reply = reply()
        assert await Script(given_reply).run() is given_reply

    async def test_count_zero_tries_once(self) -> None:
        script = Script(status(500), count=0)
        await script.fails()
        assert script.calls == 1

    async def test_a_cancellation_while_waiting_passes_through_at_once(self) -> None:
        script = Script(status(500), reply())
        waiting = asyncio.Event()

        async def forever(seconds: float) -> None:
            waiting.set()
            await asyncio.Event().wait()

        script.retry.sleep = forever
        task = asyncio.create_task(script.run())
        await waiting.wait()
        task.cancel(Outcome.DRAINING)
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert caught.value.args == (Outcome.DRAINING,)
        assert script.calls == 1


class TestRequest:
    async def test_a_count_alone_retries_429_only(self) -> None:
        script = Script(status(429), count=0, max_retry_after=1)
        await script.fails(asking(script, count=3))
        assert script.calls == 4
        other = Script(status(500))
        await other.fails(asking(other, count=3))
        assert other.calls == 1

    async def test_codes_alone_keep_the_configured_count(self) -> None:
        script = Script(status(500), count=1)
        await script.fails(asking(script, on_codes=[500]))
        assert script.calls == 2

    @pytest.mark.parametrize("place", ["orq", "penstock"])
    async def test_it_is_read_in_every_place(self, place: str) -> None:
        script = Script(status(429))
        call = script.retry.admit(make_call(target=TARGET), OwnFields({place: {"retry": {"count": 4}}}, {}))
        await script.fails(call)
        assert script.calls == 5

    @pytest.mark.parametrize(
        ("value", "path"),
        [
            (3, "retry"), (True, "retry"), ([1], "retry"),
            ({"count": 0}, "retry.count"), ({"count": 6}, "retry.count"), ({"count": 1.5}, "retry.count"),
            ({"count": True}, "retry.count"), ({"on_codes": 429}, "retry.on_codes"), ({"on_codes": ["429"]}, "retry.on_codes[0]"),
            ({"on_codes": [500, 200]}, "retry.on_codes[1]"), ({"on_codes": [500] * 65}, "retry.on_codes"),
        ],
    )  # fmt: skip
    def test_what_it_cannot_be_is_refused_with_its_path(self, value: object, path: str) -> None:
        with pytest.raises(Refused) as caught:
            Retry().admit(make_call(), OwnFields({"orq": {"retry": value}}, {}))
        assert (caught.value.status, caught.value.param) == (400, f"orq.{path}")

    def test_the_operator_bounds_the_count(self) -> None:
        with pytest.raises(Refused, match="from 1 to 2"):
            Retry(max_count=2).admit(make_call(), OwnFields({"retry": {"count": 3}}, {}))


class TestWaits:
    async def test_the_backoff_doubles_up_to_its_cap(self) -> None:
        script = Script(status(500), count=5, base=0.5, cap=3.0)
        await script.fails()
        assert script.waits == [0.5, 1.0, 2.0, 3.0, 3.0]

    @given(st.integers(0, 4), st.floats(0, 1, exclude_max=True), st.floats(0, 60), st.floats(0, 600))
    async def test_the_jitter_is_full(self, attempt: int, dice: float, base: float, cap: float) -> None:
        """Any wait between nothing and the bound may come, and none beyond it."""
        script = Script(status(500), count=5, base=base, cap=cap, dice=dice)
        await script.fails()
        bound = min(cap, base * 2.0**attempt)
        assert script.waits[attempt] == dice * bound <= bound <= cap

    @pytest.mark.parametrize(
        ("headers", "wait"),
        [
            ({"retry_after": "3"}, 3.0),
            ({"Retry_After": "2.5"}, 2.5),
            ({"retry_after_ms": "1500", "retry_after": "9"}, 1.5),
            ({"retry_after": format_datetime(datetime.fromtimestamp(NOW + 4, UTC), usegmt=True)}, 4.0),
            ({"retry_after": format_datetime(datetime.fromtimestamp(NOW - 400, UTC), usegmt=True)}, 0.5),
            ({"retry_after": "soon", "x_ratelimit_reset": "2"}, 2.0),
            ({"x_ratelimit_reset_requests": "1m", "x_ratelimit_remaining_requests": "7", "x_ratelimit_reset_tokens": "6s",
              "x_ratelimit_remaining_tokens": "0"}, 6.0),
            ({"x_ratelimit_reset_requests": "3s", "x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_tokens": "6s",
              "x_ratelimit_remaining_tokens": "0"}, 6.0),
            ({"x_ratelimit_reset_requests": "3s", "x_ratelimit_remaining_requests": "5", "x_ratelimit_reset_tokens": "6s",
              "x_ratelimit_remaining_tokens": "9"}, 3.0),
            ({"x_ratelimit_reset": str(int((NOW + 5) * 1000))}, 5.0),
            ({"anthropic_ratelimit_input_tokens_reset": datetime.fromtimestamp(NOW + 7, UTC).isoformat(),
              "anthropic_ratelimit_input_tokens_remaining": "0"}, 7.0),
            ({"x_ratelimit_limit_requests": "8"}, 0.5),
            ({}, 0.5),
        ],
    )  # fmt: skip
    async def test_the_providers_hint_is_obeyed(self, headers: dict[str, Any], wait: float) -> None:
        script = Script(status(429, **headers), reply(), base=0.5)
        await script.run()
        assert script.waits == [pytest.approx(wait)]

    async def test_a_reset_says_nothing_on_other_errors(self) -> None:
        script = Script(status(500, x_ratelimit_reset="9"), reply(), base=0.5)
        await script.run()
        assert script.waits == [0.5]

    async def test_a_longer_wait_than_the_cap_is_not_waited(self) -> None:
        script = Script(status(429, retry_after="11"), reply(), max_retry_after=10)
        error = await script.fails()
        assert (script.calls, script.waits, error.headers) == (1, [], {"retry-after": "11"})

    @pytest.mark.parametrize(("deadline", "calls"), [(1000.24, 1), (1003.25, 1), (1003.26, 2)])
    async def test_no_wait_reaches_the_deadline(self, deadline: float, calls: int) -> None:
        script = Script(status(429, retry_after="3"), reply(), base=0)
        call = make_call(target=TARGET, deadline=deadline)
        if calls == 1:
            await script.fails(call)
        else:
            await script.run(call)
        assert script.calls == calls

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("12", 12), ("0.25", 0.25), (" 7 ", 7), ("1m30s", 90), ("6ms", 0.006), ("1h2m3.5s", 3723.5), ("1d", 86400),
            (f"{NOW + 3:.0f}", 3), (f"{(NOW + 3) * 1000:.0f}", 3), ("2025-06-15T15:06:43Z", 3), ("2025-06-15T15:06:43+00:00", 3),
            ("2025-06-15T15:06:00Z", 0), ("", None), ("-1", None), ("soon", None), ("1x", None), ("2025-06-15", None),
            ("nan", None), ("1e9", None), ("٣", None), ("9" * 400, None),
        ],
    )  # fmt: skip
    def test_every_spelling_of_a_wait_is_read(self, text: str, seconds: float | None) -> None:
        found = seconds_until(text, NOW)
        assert found == (None if seconds is None else pytest.approx(seconds))

    @given(
        st.dictionaries(st.sampled_from(["Retry-After", "retry-after-ms", "X-RateLimit-Reset", "x-ratelimit-reset-a"]), st.text())
    )
    def test_no_header_breaks_it(self, headers: dict[str, str]) -> None:
        assert hinted_seconds(UpstreamError("no", status=429, headers=headers), NOW) >= 0


class TestBudget:
    async def test_an_outage_is_not_multiplied(self) -> None:
        script = Script(status(503), count=2, floor=3, budget=0.2)
        script.retry.clock = lambda: 0.0
        for _ in range(100):
            await script.fails()
        assert script.calls == 100 + 20 + 3, "20 % of the requests, and a floor of three"
        assert script.sample("penstock_retries_total") == {"503": script.calls - 100}
        assert script.sample("penstock_retry_budget_exhausted_total")[""] > 50

    @given(st.lists(st.tuples(st.booleans(), st.floats(0, 30)), max_size=200), st.floats(0, 1), st.integers(0, 20))
    def test_retries_are_never_more_than_the_share_and_the_floor(
        self, steps: list[tuple[bool, float]], share: float, floor: int
    ) -> None:
        """In any stretch of time; only the floor grows with it."""
        budgets, now, requested, retried = Budgets(share, floor), 0.0, 0, 0
        for retry, pause in steps:
            now += pause
            if retry:
                retried += budgets.spend("t", now)
            else:
                budgets.requested("t", now)
                requested += 1
            assert retried <= floor * (1 + now / 60) + share * requested + 1e-6

    def test_it_comes_back_with_time(self) -> None:
        budgets = Budgets(0.0, 2)
        assert [budgets.spend("t", 0.0) for _ in range(3)] == [True, True, False]
        assert not budgets.spend("t", 20.0)
        assert budgets.spend("t", 60.0)

    @given(st.lists(st.floats(0, 10), max_size=100), st.floats(0, 60))
    def test_requests_fade_as_they_age_to_a_sixtieth(self, pauses: list[float], later: float) -> None:
        """Against the sum of the exact weights; those of one second count as if they had come at its beginning."""
        budgets, moments, now = Budgets(1.0, 0), [], 0.0
        for pause in pauses:
            now += pause
            budgets.requested("t", now)
            moments.append(now)
        now += later
        exact = sum(math.exp((moment - now) / Budgets.FADE_SECONDS) for moment in moments)
        allowed = sum(budgets.spend("t", now) for _ in range(len(moments) + 1))
        assert exact * math.exp(-1 / 60) - 1 < allowed <= exact + 1e-6

    def test_several_workers_divide_the_floor(self) -> None:
        """The share is of what each is asked, so it is divided already. A reload says again how many there are."""
        allowed = []
        for worker in range(2):
            retry = Retry(budget=0.0, floor=3)
            for _ in range(2):
                retry.attach(Surroundings([retry], lambda model: Route(None, ()), {}, workers=2, worker=worker))
            allowed.append(sum(retry._budgets.spend("t", 0.0) for _ in range(9)))
        assert allowed == [2, 1]

    def test_each_target_has_its_own(self) -> None:
        budgets = Budgets(0.0, 1)
        assert budgets.spend("a", 0.0)
        assert budgets.spend("b", 0.0)
        assert not budgets.spend("a", 0.0)

    def test_invented_models_fill_no_memory(self) -> None:
        budgets = Budgets(0.2, 1)
        for number in range(MAX_TARGETS + 500):
            budgets.requested(f"openai/{number}", 0.0)
        assert len(budgets) == MAX_TARGETS

    async def test_reasons_are_few_whatever_providers_call_their_errors(self) -> None:
        script = Script(*(UpstreamError("x", status=500, code=f"made-up-{n}") for n in range(20)), count=5, floor=1000)
        for _ in range(5):
            await script.fails()
        assert set(script.sample("penstock_retries_total")) == {"500"}


@given(st.integers(400, 599), st.frozensets(st.integers(400, 599)))
def test_a_status_is_repeated_if_asked_for_and_not_forbidden(code: int, codes: frozenset[int]) -> None:
    assert may_repeat(status(code), codes) == (code in codes and code not in NEVER)


# Over real sockets

CONFIG = """
server: {{port: 0}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - retry: {{base: 0s, {retry}}}
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: {first}, idle_timeout: 5s, call_timeout: 10s}}
"""
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
GOOD = stream([WORD, END])


def refuses(code: int, **headers: str) -> Answering:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return whole(b'{"error": {"message": "no"}}', code, headers=fields)


async def silent(asked: Asked, line: Line) -> None:
    await line.forever()


async def stalls_after_the_head(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(b": ping\n\n", b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n')
    await line.forever()


async def cut(asked: Asked, line: Line) -> None:
    await line.head()
    line.hang_up()


async def cut_after_a_chunk(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD)
    line.hang_up()


async def error_inside_200(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(b'data: {"error": {"message": "overloaded", "code": 503}}\n\n')
    await line.end()


def in_turn(answers: Iterable[Answering]) -> Callable[[Asked, Line], Any]:
    following = iter(answers)

    async def answer(asked: Asked, line: Line) -> None:
        await next(following)(asked, line)

    return answer


async def served(*answers: Answering, retry: str = "count: 2", first: str = "5s", **fields: Any) -> tuple[Answer, Upstream]:
    """What the client gets where the provider answers so, in turn; the last answer is repeated."""
    turns = itertools.chain(answers, itertools.repeat(answers[-1]))
    async with Upstream(in_turn(turns)) as upstream, gateway(upstream.url, CONFIG, retry=retry, first=first) as here:
        return await ask(here.port, chat(**fields)), upstream


@pytest.mark.parametrize(
    "fault", [refuses(500), refuses(429), cut, error_inside_200, refuses(429, retry_after="0")],
    ids=["500", "429", "cut before a chunk", "error inside a 200", "429 with Retry-After"],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_fault_before_the_first_chunk_is_unseen_but_for_the_count(fault: Answering, streamed: bool) -> None:
    good = GOOD if streamed else whole(b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}]}')
    found, upstream = await served(fault, good, stream=streamed)
    assert (found.status, found.headers["X-Penstock-Attempts"], len(upstream.asked)) == (200, "2", 2)
    assert (found.text == "x" and found.done) if streamed else found.json["choices"][0]["message"]["content"] == "x"
    assert upstream.asked[0].body == upstream.asked[1].body


async def test_the_second_attempt_gets_its_own_first_chunk_limit_and_the_stalled_socket_is_closed() -> None:
    found, upstream = await served(stalls_after_the_head, GOOD, first="60ms")
    assert (found.status, found.text, found.headers["X-Penstock-Attempts"]) == (200, "x", "2")
    assert upstream.lines[0].closed.is_set()


async def test_nothing_is_retried_after_the_first_chunk() -> None:
    found, upstream = await served(cut_after_a_chunk, GOOD)
    assert (found.status, found.text, found.done, len(upstream.asked)) == (200, "x", False, 1)
    assert found.error is not None
    assert found.error["code"] == "upstream_cut"


async def test_when_all_attempts_fail_the_sdk_is_told_not_to_try_again() -> None:
    found, upstream = await served(refuses(500))
    assert (found.status, len(upstream.asked)) == (500, 3)
    assert (found.headers["X-Penstock-Attempts"], found.headers["x-should-retry"]) == ("3", "false")


async def test_a_400_is_asked_once() -> None:
    found, upstream = await served(refuses(400), retry="on_codes: [400, 500]")
    assert (found.status, len(upstream.asked)) == (400, 1)


async def test_our_refused_key_is_asked_once() -> None:
    found, upstream = await served(refuses(401))
    assert (found.status, len(upstream.asked)) == (502, 1)


async def test_the_request_decides_and_its_field_goes_no_further() -> None:
    found, upstream = await served(refuses(500), GOOD, orq={"retry": {"count": 1, "on_codes": [500]}}, retry="count: 0")
    assert (found.status, found.text, len(upstream.asked)) == (200, "x", 2)
    assert not {"orq", "retry"} & set(upstream.asked[0].json)


async def test_a_bad_field_is_a_400_before_anybody_is_asked() -> None:
    found, upstream = await served(GOOD, retry="count: 0", penstock={"retry": {"count": 9}})
    assert found.error is not None
    assert (found.status, found.error["param"], upstream.asked) == (400, "penstock.retry.count", [])


async def test_the_total_timeout_ends_the_attempts() -> None:
    found, upstream = await served(silent, timeout={"total_timeout": 60, "call_timeout": 50}, retry="count: 5")
    assert found.error is not None
    assert (found.status, found.error["code"]) == (504, "timeout_total")
    assert len(upstream.asked) == 2


# A kept connection that died unseen

SECOND = whole(b"second")


async def fetched(transport: HttpTransport, url: str) -> bytes:
    response = await transport.send(UpstreamRequest(url, {}, b"{}"), Limits())
    found = b""
    while data := await response.read():
        found += data
    response.done()
    return found


@asynccontextmanager
async def kept(answer: Callable[[Upstream], Answering], connections: int = 1) -> AsyncIterator[tuple[HttpTransport, Upstream]]:
    """A transport with idle connections to a provider that answers with `answer` from then on."""
    together = asyncio.Barrier(connections)

    async def first(asked: Asked, line: Line) -> None:
        await together.wait()
        await whole(b"first")(asked, line)

    async with Upstream(first) as upstream:
        transport = HttpTransport.open()
        try:
            await asyncio.gather(*(fetched(transport, upstream.url) for _ in range(connections)))
            assert len(upstream.lines) == upstream.open == connections
            upstream.answer = answer(upstream)
            upstream.asked.clear()
            yield transport, upstream
        finally:
            await transport.close()


def dies(how: Callable[[Line], None], *, said: bytes = b"", then: Answering | None = SECOND) -> Callable[[Upstream], Answering]:
    """The kept connections die when the next request arrives, having `said` something; new ones do what comes `then`."""

    def made(upstream: Upstream) -> Answering:
        old = list(upstream.lines)

        async def answer(asked: Asked, line: Line) -> None:
            if then is None or line in old:
                await line.send(said)
                how(line)
            else:
                await then(asked, line)

        return answer

    return made


@pytest.mark.parametrize("how", [Line.hang_up, Line.reset])
@pytest.mark.parametrize("connections", [1, 3])
async def test_a_kept_connection_that_died_unseen_costs_one_further_request(
    how: Callable[[Line], None], connections: int
) -> None:
    """Also where all kept ones have died: the second request gets a new connection."""
    async with kept(dies(how), connections) as (transport, upstream):
        assert await fetched(transport, upstream.url) == b"second"
        assert (len(upstream.asked), len(upstream.lines)) == (2, connections + 1)
        assert transport.connections == 0


@pytest.mark.parametrize("how", [Line.hang_up, Line.reset])
async def test_when_the_new_connection_dies_too_that_is_an_error(how: Callable[[Line], None]) -> None:
    async with kept(dies(how, then=None)) as (transport, upstream):
        with pytest.raises(UpstreamCut):
            await fetched(transport, upstream.url)
        assert len(upstream.asked) == 2


@pytest.mark.parametrize("how", [Line.hang_up, Line.reset])
async def test_a_new_connection_that_dies_is_no_stale_one(how: Callable[[Line], None]) -> None:
    """Also in a task whose earlier request had a kept one."""
    async with kept(dies(how, then=None)) as (transport, upstream):
        for line in upstream.lines:
            line.hang_up()
        await until(lambda: upstream.open == 0)
        await asyncio.sleep(0)
        with pytest.raises(UpstreamCut):
            await fetched(transport, upstream.url)
        assert len(upstream.asked) == 1


async def test_a_connection_that_had_begun_to_answer_was_not_stale() -> None:
    async with kept(dies(Line.hang_up, said=b"HTTP/1.1 200 OK\r\nContent-")) as (transport, upstream):
        with pytest.raises(UpstreamCut):
            await fetched(transport, upstream.url)
        assert len(upstream.asked) == 1


async def test_a_stale_connection_is_no_attempt() -> None:
    async with Upstream(GOOD) as upstream, gateway(upstream.url, CONFIG, retry="count: 0", first="5s") as here:
        assert (await ask(here.port, chat())).done
        upstream.answer = dies(Line.hang_up, then=GOOD)(upstream)
        found = await ask(here.port, chat())
        assert (found.status, found.done, found.headers["X-Penstock-Attempts"]) == (200, True, "1")
        assert (len(upstream.asked), len(upstream.lines)) == (3, 2)
