"""Limits: never more than allowed under any concurrency, every ending gives back what it held, clients learn when to return."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from multidict import CIMultiDict

from middleware.limits import Limited, Limits
from middleware.limits.bounds import wanted_output
from middleware.limits.client import Proxies
from middleware.limits.meters import Meters
from middleware.limits.subjects import IDLE_SECONDS, Subjects
from proxy.call import Call, Peer, Principal, Route
from proxy.config import ConfigError
from proxy.errors import Outcome, Refused, UpstreamError
from proxy.estimate import estimated_input
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Surroundings
from proxy.reply import Batch, Head, Reply, Trailer
from tests.support.decoding import make_call
from tests.support.gateway import Answer, RawClient, ask, chat, gateway, raw_request, until
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":20,"total_tokens":30}}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n' + USAGE + b"data: [DONE]\n\n"
GOOD = stream([WORD, END])


class Clock:
    """The clock of the rate-limit library; seconds pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1024.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("throttled.utils.now_mono_f", made)
    return made


async def chunks() -> AsyncIterator[Batch]:
    yield Batch([{"choices": []}], final=True)


def answers(reply: Reply | BaseException | None = None) -> Handler:
    async def handler(call: Call) -> Reply:
        if isinstance(reply, BaseException):
            raise reply
        return reply or Reply(Head("openai/m"), chunks(), Trailer())

    return handler


def call_of(key: str = "web", **fields: Any) -> Call:
    facts = fields.pop("facts", {})
    return make_call(fields.pop("request", {"messages": []}), principal=Principal(key, facts=facts), **fields)


def at(address: str) -> dict[type, object]:
    """The extensions of a call from there."""
    return {Peer: Peer(lambda: address)}


async def settled(limits: Limits) -> None:
    await limits.close()


def sampled(limits: Limits, name: str) -> dict[str, float]:
    return {next(iter(sample.labels.values())): sample.value for sample in limits.samples() if sample.name == name}


async def admitted(limits: Limits, call: Call, times: int = 1) -> int:
    """How many of so many calls at once get in."""
    found = await asyncio.gather(*(limits(call, answers()) for _ in range(times)), return_exceptions=True)
    assert all(isinstance(one, Reply | Limited) for one in found)
    return sum(isinstance(one, Reply) for one in found)


class TestRequests:
    @pytest.mark.parametrize("share", ["per_key", "per_identity", "per_name", "per_client"])
    async def test_the_minutes_worth_gets_in_and_then_one_by_one(self, clock: Clock, share: str) -> None:
        rates: Json = {share: {"requests_per_minute": 6}}
        limits = Limits(**rates)
        call = call_of(identity="anna", name="bot")
        assert await admitted(limits, call, 20) == 6
        clock.now += 9.0
        assert await admitted(limits, call, 5) == 0
        clock.now += 1.0
        assert await admitted(limits, call, 5) == 1
        clock.now += 3600
        assert await admitted(limits, call, 20) == 6

    async def test_several_workers_let_in_together_what_one_would(self, clock: Clock) -> None:
        """Requests and slots, of the config and of the key's own entry."""
        got_in = []
        for worker in range(3):
            limits = Limits(per_identity={"concurrent": 4})
            limits.attach(Surroundings([limits], lambda model: Route(None, ()), {}, workers=3, worker=worker))
            got_in.append((
                await admitted(limits, call_of(facts={"limits": {"requests_per_minute": 8}}), 20),
                await admitted(limits, call_of(identity="anna"), 20),
            ))  # fmt: skip
        assert got_in == [(3, 2), (3, 1), (2, 1)]

    async def test_the_refusal_says_whose_limit_it_was_and_when_to_return(self, clock: Clock) -> None:
        limits = Limits(per_identity={"requests_per_minute": 2})
        call = call_of(identity="secret-anna")
        await admitted(limits, call, 2)
        with pytest.raises(Limited) as caught:
            await limits(call, answers())
        error = caught.value
        assert (error.status, error.code, error.type, error.outcome) == (
            429,
            "rate_limit_exceeded",
            "rate_limit_error",
            "limited",
        )
        assert error.headers == {
            "Retry-After": "30",
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "60s",
        }
        assert "2 requests per minute of this identity" in error.message
        assert "anna" not in error.message
        assert sampled(limits, "penstock_limited_total") == {"identity_requests": 1}

    async def test_retry_after_is_enough_and_a_second_less_is_not(self, clock: Clock) -> None:
        limits = Limits(per_key={"requests_per_minute": 4})
        await admitted(limits, call_of(), 4)
        with pytest.raises(Limited) as caught:
            await limits(call_of(), answers())
        wait = int(caught.value.headers["Retry-After"])
        clock.now += wait - 1
        assert await admitted(limits, call_of()) == 0
        clock.now += 1
        assert await admitted(limits, call_of()) == 1

    async def test_a_reply_tells_what_is_left_of_the_tightest_limit(self, clock: Clock) -> None:
        limits = Limits(per_key={"requests_per_minute": 60}, per_name={"requests_per_minute": 3})
        given = Reply(Head("openai/m", {"x-ratelimit-remaining-requests": "999", "x-other": "1"}), chunks(), Trailer())
        found = await limits(call_of(name="bot"), answers(given))
        assert found.head.headers == {
            "x-other": "1",
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": "2",
            "x-ratelimit-reset-requests": "20s",
        }

    async def test_what_one_limit_refuses_costs_the_others_nothing(self, clock: Clock) -> None:
        limits = Limits(per_key={"requests_per_minute": 10}, per_name={"requests_per_minute": 2})
        assert await admitted(limits, call_of(name="a"), 8) == 2
        assert await admitted(limits, call_of(), 20) == 8

    async def test_keys_identities_and_names_are_apart_and_count_within_their_key(self, clock: Clock) -> None:
        limits = Limits(per_identity={"requests_per_minute": 1}, per_name={"requests_per_minute": 1})
        calls = [call_of(key, identity=label) for key in "ab" for label in "xy"] + [call_of(key, name="x") for key in "ab"]
        for call in calls:
            assert await admitted(limits, call, 3) == 1

    async def test_a_keys_own_figures_go_before_those_for_every_key(self, clock: Clock) -> None:
        limits = Limits(per_key={"requests_per_minute": 2})
        assert await admitted(limits, call_of("big", facts={"limits": {"requests_per_minute": 5}}), 9) == 5
        assert await admitted(limits, call_of("small"), 9) == 2
        assert await admitted(limits, call_of("no", facts={"limits": {"requests_per_minute": 0}}), 9) == 0
        assert await admitted(limits, call_of("x", facts={"limits": {"concurrent": 3}}), 9) == 2

    async def test_an_upstreams_failure_still_counts_as_a_request(self, clock: Clock) -> None:
        limits = Limits(per_key={"requests_per_minute": 2})
        for _ in range(2):
            with pytest.raises(UpstreamError):
                await limits(call_of(), answers(UpstreamError("no")))
        assert await admitted(limits, call_of()) == 0

    async def test_where_no_limit_holds_the_reply_goes_through_as_it_is(self) -> None:
        given = Reply(Head("openai/m"), chunks(), Trailer())
        assert await Limits()(call_of(name="bot"), answers(given)) is given
        assert await Limits(per_identity={"concurrent": 1})(call_of(), answers(given)) is given


class TestTokens:
    def limits(self, per_minute: int = 6000) -> Limits:
        return Limits(per_key={"tokens_per_minute": per_minute})

    def call(self, **request: Any) -> Call:
        return call_of(request={"messages": [{"role": "user", "content": "x" * 400}], **request})

    async def left(self, limits: Limits, limit: int = 6000) -> int:
        return (await limits._meters.look("key:tokens:web", limit, 1)).remaining

    async def ended(self, limits: Limits, usage: Json | None, *, seen: int = 0, call: Call | None = None, **head: Any) -> None:
        reply = await limits(call or self.call(), answers(Reply(Head("openai/m", **head), chunks(), Trailer())))
        reply.trailer.usage, reply.trailer.chunks = usage, seen
        reply.trailer.end(Outcome.COMPLETED)
        await settled(limits)

    async def test_the_estimate_is_held_while_the_reply_flows(self, clock: Clock) -> None:
        limits = self.limits()
        found = await limits(self.call(max_tokens=900), answers())
        assert found.head.headers["x-ratelimit-remaining-tokens"] == "5000"
        assert await self.left(limits) == 5000

    @pytest.mark.parametrize(
        ("usage", "seen", "used"),
        [
            ({"total_tokens": 130}, 7, 130),
            ({"total_tokens": 2500}, 7, 2500),
            (None, 7, 107),
            ({"total_tokens": "many"}, 7, 107),
            ({}, 0, 100),
        ],
    )
    async def test_at_the_end_it_is_what_it_was(self, clock: Clock, usage: Json | None, seen: int, used: int) -> None:
        limits = self.limits()
        await self.ended(limits, usage, seen=seen, call=self.call(max_tokens=900))
        assert await self.left(limits) == 6000 - used

    async def test_what_nobody_generated_is_given_back(self, clock: Clock) -> None:
        limits = self.limits()
        with pytest.raises(UpstreamError):
            await limits(self.call(max_tokens=900), answers(UpstreamError("no")))
        await settled(limits)
        assert await self.left(limits) >= 5999, "the library keeps at most one token behind"
        await self.ended(limits, {"total_tokens": 500}, cache="hit")
        assert await self.left(limits) >= 5998, "a cache hit costs nobody anything"

    async def test_a_reply_longer_than_a_minutes_worth_is_paid_for_by_the_next_ones(self, clock: Clock) -> None:
        limits = self.limits(600)
        await self.ended(limits, {"total_tokens": 1200})
        clock.now += 60.0
        assert await admitted(limits, self.call()) == 0, "600 of 1,200 have come back, which is none"
        clock.now += 10.0
        assert await admitted(limits, self.call(), 3) == 1

    async def test_a_request_of_more_than_a_minutes_worth_needs_a_full_bucket_and_gets_in(self, clock: Clock) -> None:
        limits = self.limits(600)
        assert await admitted(limits, self.call(max_tokens=10**6), 3) == 1
        clock.now += 59.0
        assert await admitted(limits, self.call(max_tokens=10**6)) == 0
        clock.now += 1.0
        assert await admitted(limits, self.call(max_tokens=10**6)) == 1

    @pytest.mark.parametrize(
        ("request_", "tokens"),
        [
            ({"messages": [{"role": "user", "content": "x" * 41}]}, 11),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 40}]}]}, 10),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x" * 9999}}]}]}, 1000),
            ({"messages": [{"role": "assistant", "content": None, "tool_calls": ["x" * 36]}]}, 10),
            ({"prompt": "x" * 40}, 10), ({"prompt": ["x" * 40, "x" * 40]}, 20), ({"prompt": [1, 2, 3]}, 3),
            ({"input": [[1, 2], [3]]}, 3), ({"messages": [], "tools": ["x" * 36]}, 10),
            ({"messages": None}, 0), ({"messages": [None, 5.5, {}]}, 1000), ({}, 0),
        ],
    )  # fmt: skip
    def test_the_input_is_about_a_quarter_of_its_characters(self, request_: Json, tokens: int) -> None:
        assert estimated_input(request_) == tokens

    @pytest.mark.parametrize(
        ("request_", "tokens"),
        [
            ({}, 0), ({"max_tokens": 50}, 50), ({"max_completion_tokens": 60, "max_tokens": 50}, 60),
            ({"max_tokens": 50, "n": 3}, 150), ({"max_tokens": "x"}, 0), ({"max_tokens": -5}, 0), ({"max_tokens": True}, 0),
        ],
    )  # fmt: skip
    def test_the_output_is_what_the_request_allows(self, request_: Json, tokens: int) -> None:
        assert wanted_output(request_) == tokens


class TestSlots:
    async def test_a_slot_is_held_until_the_reply_ends(self) -> None:
        limits = Limits(per_key={"concurrent": 2})
        first = await limits(call_of(), answers())
        assert (first.head.headers["x-ratelimit-limit-concurrent"], first.head.headers["x-ratelimit-remaining-concurrent"]) == (
            "2",
            "1",
        )
        second = await limits(call_of(), answers())
        with pytest.raises(Limited) as caught:
            await limits(call_of(), answers())
        assert (caught.value.headers["Retry-After"], caught.value.headers["x-ratelimit-remaining-concurrent"]) == ("1", "0")
        assert sampled(limits, "penstock_concurrent") == {"key": 2, "identity": 0, "name": 0, "client": 0}
        await first.close()
        assert await admitted(limits, call_of()) == 1
        second.trailer.end(Outcome.COMPLETED)

    @pytest.mark.parametrize("outcome", list(Outcome))
    async def test_every_outcome_frees_it_once(self, outcome: Outcome) -> None:
        one: Any = {"concurrent": 1}
        limits = Limits(per_key=one, per_name=one, per_identity=one, per_client=one)
        call = call_of(name="bot", identity="anna", extensions=at("192.0.2.1"))
        reply = await limits(call, answers())
        reply.trailer.end(outcome)
        reply.trailer.end(Outcome.CANCELLED)
        await reply.close()
        assert sampled(limits, "penstock_concurrent") == {"key": 0, "identity": 0, "name": 0, "client": 0}

    @pytest.mark.parametrize(
        "error", [UpstreamError("no"), Refused("no"), ValueError("bug"), asyncio.CancelledError(), GeneratorExit()]
    )
    async def test_every_exception_frees_it_and_passes(self, error: BaseException) -> None:
        limits = Limits(per_key={"concurrent": 1, "tokens_per_minute": 10})
        with pytest.raises(type(error)) as caught:
            await limits(call_of(), answers(error))
        assert caught.value is error
        assert sampled(limits, "penstock_concurrent")["key"] == 0

    async def test_a_client_that_leaves_before_the_head_frees_it(self) -> None:
        limits, entered = Limits(per_key={"concurrent": 1}), asyncio.Event()

        async def forever(call: Call) -> Reply:
            entered.set()
            await asyncio.Event().wait()
            raise AssertionError

        task = asyncio.ensure_future(limits(call_of(), forever))
        await entered.wait()
        assert sampled(limits, "penstock_concurrent")["key"] == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert sampled(limits, "penstock_concurrent")["key"] == 0

    async def test_a_refusal_by_another_limit_frees_it(self, clock: Clock) -> None:
        limits = Limits(per_key={"concurrent": 5}, per_name={"requests_per_minute": 1})
        given = await limits(call_of(name="a"), answers())
        assert await admitted(limits, call_of(name="a"), 5) == 0
        assert sampled(limits, "penstock_concurrent")["key"] == 1, "the one that got in"
        await given.close()

    async def test_a_reply_that_an_outer_layer_drops_unclosed_frees_it_when_it_dies(self) -> None:
        limits = Limits(per_key={"concurrent": 1})

        async def drops(call: Call) -> Reply:
            await limits(call, answers())
            raise ValueError("a layer with a bug")

        with pytest.raises(ValueError, match="bug"):
            await drops(call_of())
        gc.collect()
        assert await admitted(limits, call_of()) == 1


class TestSubjects:
    def made(self, most: int) -> tuple[Subjects, Clock]:
        clock = Clock()
        return Subjects(most, clock), clock

    def test_invented_labels_share_one_place_per_key_and_fill_no_memory(self) -> None:
        subjects, _ = self.made(100)
        found = {subjects.subject("web", f"label-{number}") for number in range(10_000)}
        assert len(found) == 101
        assert len(subjects) == 100
        assert subjects.subject("other", "late") not in found, "one key's flood is not another's limit"

    def test_those_who_are_known_stay_known_during_a_flood(self) -> None:
        subjects, _ = self.made(10)
        anna = subjects.subject("web", "anna")
        for number in range(1000):
            subjects.subject("web", f"label-{number}")
        assert subjects.subject("web", "anna") == anna != subjects.subject("web", "new")

    def test_the_idle_make_room_the_busy_do_not(self) -> None:
        subjects, clock = self.made(2)
        busy = subjects.subject("web", "busy")
        subjects.subject("web", "idle")
        assert subjects.enter(busy, 1) == 0
        clock.now += IDLE_SECONDS
        others = [subjects.subject("web", f"new-{number}") for number in range(3)]
        assert others == ["web\0", "web\0new-1", "web\0"]
        assert subjects.subject("web", "busy") == busy

    async def test_a_flood_of_identities_gets_no_more_than_the_shared_allowance(self, clock: Clock) -> None:
        limits = Limits(per_identity={"requests_per_minute": 3}, max_tracked=5)
        found = [await admitted(limits, call_of(identity=f"id-{number}")) for number in range(50)]
        assert sum(found) == 5 + 3


@given(
    limit=st.sampled_from([1, 2, 3, 5, 10, 60]),
    bursts=st.lists(st.tuples(st.integers(0, 15), st.floats(0, 90)), max_size=20),
)
@settings(deadline=None)
def test_in_no_stretch_of_time_more_get_in_than_the_bucket_and_its_refill(limit: int, bursts: list[tuple[int, float]]) -> None:
    """Over all pairs of moments: at most `limit` at once, and `limit` a minute on top; and nobody waits who need not."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("throttled.utils.now_mono_f", clock)
        seen: list[tuple[float, int]] = []

        async def run() -> None:
            limits = Limits(per_key={"requests_per_minute": limit}, per_name={"requests_per_minute": 10**6})
            for many, pause in bursts:
                clock.now += pause
                seen.append((clock.now, await admitted(limits, call_of(name="bot"), many)))
                assert seen[-1][1] <= min(many, limit)
                if pause > 60.1:
                    assert seen[-1][1] == min(many, limit)

        asyncio.run(run())
    for first, last in itertools.combinations_with_replacement(range(len(seen)), 2):
        got_in = sum(count for _, count in seen[first : last + 1])
        assert got_in <= limit + limit * (seen[last][0] - seen[first][0]) / 60 + 1e-6


class SlotMachine(RuleBasedStateMachine):
    """Calls begin, end, fail and are cancelled in any order: what is open is what is counted, and never beyond the limit."""

    MOST = 3

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.limits = Limits(per_key={"concurrent": self.MOST}, per_name={"concurrent": 2})
        self.waiting: list[tuple[asyncio.Task[Reply], asyncio.Future[Reply]]] = []
        self.flowing: list[Reply] = []

    def turn(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.run_until_complete(asyncio.sleep(0))

    @rule(name=st.sampled_from([None, "a", "b"]))
    def begin(self, name: str | None) -> None:
        head: asyncio.Future[Reply] = self.loop.create_future()

        async def next(call: Call) -> Reply:
            return await head

        task = self.loop.create_task(self.limits(call_of(name=name), next))
        self.turn()
        if task.done():
            assert isinstance(task.exception(), Limited)
        else:
            self.waiting.append((task, head))

    @precondition(lambda self: self.waiting)
    @rule(pick=st.integers(0), how=st.sampled_from(["answer", "fail", "leave"]))
    def head_comes(self, pick: int, how: str) -> None:
        task, head = self.waiting.pop(pick % len(self.waiting))
        if how == "answer":
            head.set_result(Reply(Head("openai/m"), chunks(), Trailer()))
        elif how == "fail":
            head.set_exception(UpstreamError("no"))
        else:
            task.cancel()
        self.turn()
        assert task.done()
        if how == "answer":
            self.flowing.append(task.result())
        elif not task.cancelled():
            assert isinstance(task.exception(), UpstreamError)

    @precondition(lambda self: self.flowing)
    @rule(pick=st.integers(0), outcome=st.sampled_from(list(Outcome)))
    def end(self, pick: int, outcome: Outcome) -> None:
        self.flowing.pop(pick % len(self.flowing)).trailer.end(outcome)

    @invariant()
    def what_is_open_is_counted_and_bounded(self) -> None:
        held = sampled(self.limits, "penstock_concurrent")
        assert held["key"] == len(self.waiting) + len(self.flowing) <= self.MOST
        assert held["name"] <= min(held["key"], 4)

    def teardown(self) -> None:
        for task, _ in self.waiting:
            task.cancel()
        self.turn()
        for reply in self.flowing:
            reply.trailer.end(Outcome.COMPLETED)
        assert set(sampled(self.limits, "penstock_concurrent").values()) == {0}
        self.loop.close()


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class TestBounds:
    @pytest.mark.parametrize(
        ("request_", "path"),
        [
            ({"messages": [{}] * 4}, "messages"), ({"tools": [{}] * 3}, "tools"), ({"functions": [{}] * 3}, "functions"),
            ({"n": 3}, "n"), ({"messages": ["x" * 200]}, "messages"), ({"prompt": "x" * 200}, "prompt"),
            ({"input": ["é" * 60]}, "input"),
        ],
    )  # fmt: skip
    def test_too_much_is_a_400_with_its_path(self, request_: Json, path: str) -> None:
        limits = Limits(max_messages=3, max_tools=2, max_choices=2, max_input_bytes=100)
        with pytest.raises(Refused) as caught:
            limits.admit(replace(make_call(), request=request_), OwnFields(request_, {}))
        assert (caught.value.status, caught.value.param) == (400, path)
        assert "xx" not in caught.value.message

    def test_what_just_fits_passes(self) -> None:
        limits = Limits(max_messages=3, max_tools=2, max_choices=2, max_input_bytes=100)
        request_ = {"messages": [{}] * 3, "tools": [{}] * 2, "n": 2, "prompt": "x" * 98}
        call = replace(make_call(), request=request_)
        assert limits.admit(call, OwnFields(request_, {})) is call


OWN = ("127.0.0.1", "10.0.0.0/8", "2001:db8:1::/48")


class TestClients:
    @pytest.mark.parametrize(
        ("peer", "forwarded", "trusted", "counted"),
        [
            ("192.0.2.1", [], (), "192.0.2.1"),
            ("192.0.2.1", ["198.51.100.9"], (), "192.0.2.1"),
            ("192.0.2.1", ["198.51.100.9"], OWN, "192.0.2.1"),
            ("10.1.2.3", [], OWN, "10.1.2.3"),
            ("10.1.2.3", ["198.51.100.9"], OWN, "198.51.100.9"),
            ("10.1.2.3", ["1.1.1.1, 198.51.100.9"], OWN, "198.51.100.9"),
            ("10.1.2.3", ["1.1.1.1, 198.51.100.9, 10.9.9.9"], OWN, "198.51.100.9"),
            ("10.1.2.3", ["1.1.1.1", "198.51.100.9"], OWN, "198.51.100.9"),
            ("10.1.2.3", ["198.51.100.9:4711"], OWN, "198.51.100.9"),
            ("10.1.2.3", ["198.51.100.9, nonsense"], OWN, "10.1.2.3"),
            ("10.1.2.3", ["198.51.100.9,"], OWN, "10.1.2.3"),
            ("10.1.2.3", ["10.0.0.1, 10.0.0.2"], OWN, "10.0.0.1"),
            ("::ffff:10.1.2.3", ["::ffff:198.51.100.9"], OWN, "198.51.100.9"),
            ("2001:db8:1::5", ["2001:db8:2:3:4:5:6:7"], OWN, "2001:db8:2:3::/64"),
            ("2001:db8:1::5", ["[2001:db8:2:3::1]:80"], OWN, "2001:db8:2:3::/64"),
            ("2001:db8:2:3::9", [], (), "2001:db8:2:3::/64"),
            ("", ["198.51.100.9"], OWN, ""),
        ],
    )
    def test_the_address_is_the_last_one_that_no_proxy_of_ours_has(
        self, peer: str, forwarded: list[str], trusted: tuple[str, ...], counted: str
    ) -> None:
        headers = CIMultiDict(("X-Forwarded-For", line) for line in forwarded)
        assert Proxies(trusted).client(peer, headers) == counted

    @given(st.text(max_size=60).filter(lambda text: "\n" not in text))
    def test_what_a_client_writes_changes_nothing(self, words: str) -> None:
        headers = CIMultiDict([("X-Forwarded-For", words), ("X-Forwarded-For", "198.51.100.9")])
        assert Proxies(OWN).client("10.1.2.3", headers) == "198.51.100.9"
        assert Proxies(OWN).client("192.0.2.1", headers) == "192.0.2.1"

    async def test_a_keys_figures_for_its_clients_go_before_those_for_all(self, clock: Clock) -> None:
        limits = Limits(per_client={"requests_per_minute": 3, "concurrent": 50})
        own = {"limits": {"requests_per_minute": 8, "per_client": {"requests_per_minute": 5}}}
        one, two = (call_of("page", facts=own, extensions=at(f"192.0.2.{host}")) for host in (1, 2))
        assert await admitted(limits, one, 9) == 5
        assert await admitted(limits, two, 9) == 3, "all that is left of the key's own eight"
        assert await admitted(limits, call_of("server", extensions=at("192.0.2.1")), 9) == 3

    async def test_where_only_a_keys_entry_asks_for_it_others_are_not_counted(self, clock: Clock) -> None:
        limits = Limits()
        own = {"limits": {f"per_{kind}": {"requests_per_minute": 2} for kind in ("client", "identity", "name")}}
        assert await admitted(limits, call_of("server", identity="anna", name="bot"), 9) == 9
        assert await admitted(limits, call_of("page", facts=own, identity="anna", name="bot"), 9) == 2


# Over real sockets

CONFIG = """
server: {{port: 0, drain_timeout: 0s}}
providers: {{openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}}}
middleware:
{outer}  - limits: {{{limits}}}
{inner}  - timeout: {{first_chunk_timeout: {first}, idle_timeout: 60ms}}
"""


class Breaks:
    """A layer with a bug. where: before the others, or after they have replied (it closes the reply, as it must)."""

    def __init__(self, *, where: str) -> None:
        self.where = where

    async def __call__(self, call: Call, next: Handler) -> Reply:
        if self.where == "before":
            raise RuntimeError("a bug")
        reply = await next(call)
        if self.where == "after":
            await reply.close()
            raise RuntimeError("a bug")

        async def broken() -> AsyncIterator[Batch]:
            async for batch in reply.chunks:
                yield batch
                raise RuntimeError("a bug")

        return replace(reply, chunks=broken())


async def cuts(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD)
    line.hang_up()


async def stalls(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD)
    await line.forever()


async def silent(asked: Asked, line: Line) -> None:
    await line.forever()


async def garbage(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD, b"data: {nonsense\n\n")
    await line.end()


def layer(here: Any) -> Limits:
    return next(found for found in here.layers if isinstance(found, Limits))


ENDINGS: dict[str, tuple[Any, Json, str, str]] = {
    "completed": (GOOD, {}, "", ""),
    "whole": (whole(b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}]}'), {"stream": False}, "", ""),
    "cut": (cuts, {}, "", ""),
    "idle timeout": (stalls, {}, "", ""),
    "first chunk timeout": (silent, {}, "", ""),
    "total timeout in the stream": (stalls, {"timeout": {"total_timeout": 30}}, "", ""),
    "total timeout before the head": (silent, {"timeout": {"total_timeout": 30}}, "", ""),
    "malformed": (garbage, {}, "", ""),
    "error status": (whole(b"{}", 500), {}, "", ""),
    "refused further in": (GOOD, {"messages": 5}, "", ""),
    "bug further in": (GOOD, {}, "", "  - tests.test_limits:Breaks: {where: before}\n"),
    "bug on the chunks": (GOOD, {}, "", "  - tests.test_limits:Breaks: {where: chunks}\n"),
    "bug further out": (GOOD, {}, "  - tests.test_limits:Breaks: {where: after}\n", ""),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_every_ending_gives_the_slot_back(ending: str) -> None:
    answer, fields, outer, inner = ENDINGS[ending]
    config: Json = {"limits": "per_key: {concurrent: 1}", "outer": outer, "inner": inner, "first": "60ms"}
    async with Upstream(answer) as upstream, gateway(upstream.url, CONFIG, **config) as here:
        for _ in range(3):
            found = await ask(here.port, chat(**{"stream": True, **fields}))
            assert found.status != 429
        assert sampled(layer(here), "penstock_concurrent")["key"] == 0


@pytest.mark.parametrize("answer", [stalls, silent], ids=["after the head", "before the head"])
async def test_a_client_that_goes_away_gives_its_slot_back(answer: Any) -> None:
    config: Json = {"limits": "per_key: {concurrent: 1}", "outer": "", "inner": "", "first": "9s"}
    async with Upstream(answer) as upstream, gateway(upstream.url, CONFIG.replace("60ms", "9s"), **config) as here:
        for number in range(3):
            async with RawClient(here.port) as client:
                await client.send(raw_request(chat()))
                await until(lambda number=number: len(upstream.asked) == number + 1)
                if answer is stalls:
                    await client.first_byte()
                assert sampled(layer(here), "penstock_concurrent")["key"] == 1
            await until(lambda: sampled(layer(here), "penstock_concurrent")["key"] == 0)


async def test_a_drained_stream_gives_its_slot_back() -> None:
    config: Json = {"limits": "per_key: {concurrent: 1}", "outer": "", "inner": "", "first": "9s"}
    async with Upstream(stalls) as upstream, gateway(upstream.url, CONFIG.replace("60ms", "9s"), **config) as here:
        async with RawClient(here.port) as client:
            await client.send(raw_request(chat()))
            await client.first_byte()
            await here.drain()
            assert (await client.answer()).error["code"] == "draining"  # type: ignore[index]
        assert sampled(layer(here), "penstock_concurrent")["key"] == 0


async def both(port: int, **fields: Any) -> tuple[Answer, Answer]:
    return await ask(port, chat(**fields)), await ask(port, chat(**fields))


async def test_over_http_the_second_is_a_429_that_no_provider_sees() -> None:
    config: Json = {"limits": "per_name: {requests_per_minute: 1}", "outer": "", "inner": "", "first": "1s"}
    async with Upstream(GOOD) as upstream, gateway(upstream.url, CONFIG, **config) as here:
        first, second = await both(here.port, name="bot")
        assert (first.status, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        assert (second.status, second.json["error"]["code"], second.json["error"]["type"]) == (
            429, "rate_limit_exceeded", "rate_limit_error",
        )  # fmt: skip
        assert 1 <= int(second.headers["Retry-After"]) <= 60
        assert second.headers["x-ratelimit-limit-requests"] == "1"
        assert len(upstream.asked) == 1


async def test_over_http_the_tokens_of_the_usage_are_what_counts() -> None:
    config: Json = {"limits": "per_key: {tokens_per_minute: 1000}", "outer": "", "inner": "", "first": "1s"}
    async with Upstream(GOOD) as upstream, gateway(upstream.url, CONFIG, **config) as here:
        first, second = await both(here.port, max_tokens=499)
        assert first.headers["x-ratelimit-remaining-tokens"] == "500"
        assert 469 <= int(second.headers["x-ratelimit-remaining-tokens"]) <= 480, "30 were used, 500 are held"


async def test_over_http_a_client_is_counted_by_what_the_operators_proxy_says() -> None:
    limits = "per_client: {requests_per_minute: 1}, trusted_proxies: [127.0.0.1]"
    config: Json = {"limits": limits, "outer": "", "inner": "", "first": "1s"}
    async with Upstream(GOOD) as upstream, gateway(upstream.url, CONFIG, **config) as here:
        found = [
            await ask(here.port, chat(), headers={"X-Forwarded-For": forwarded} if forwarded else {})
            for forwarded in ("192.0.2.1", "1.1.1.1, 192.0.2.1", "192.0.2.2", "", "")
        ]
    assert [answer.status for answer in found] == [200, 429, 200, 200, 429]
    assert found[1].json["error"]["message"] == "The limit of 1 requests per minute of this address is reached."
    assert found[1].headers["Retry-After"] == "60"


async def test_over_http_too_many_messages_are_a_400() -> None:
    config: Json = {"limits": "max_messages: 1", "outer": "", "inner": "", "first": "1s"}
    async with Upstream(GOOD) as upstream, gateway(upstream.url, CONFIG, **config) as here:
        found = await ask(here.port, chat(messages=[{"role": "user", "content": "x"}] * 2))
        assert (found.status, found.json["error"]["param"], upstream.asked) == (400, "messages", [])


@pytest.mark.parametrize(
    ("limits", "path"),
    [
        ("per_key: {requests_per_hour: 1}", "requests_per_hour"), ("per_key: {concurrent: 0}", "concurrent"),
        ("per_key: 5", "per_key"), ("trusted_proxies: [10.0.0.1/8]", "trusted_proxies: must be addresses or networks"),
        ("per_client: {burst: 1}", "burst"),
        ("per_name: {tokens_per_minute: x}", "tokens_per_minute"), ("max_choices: 129", "max_choices"),
    ],
)  # fmt: skip
async def test_a_faulty_limit_is_found_in_the_config(limits: str, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        async with gateway(config=CONFIG, limits=limits, outer="", inner="", first="1s"):
            pass


async def test_a_meter_in_two_hands_stays_within_its_limit(clock: Clock) -> None:
    """Two gateways on one store, as a shared one will be."""
    shared = Meters(100)
    both = [Limits(per_key={"requests_per_minute": 10}, _meters=shared) for _ in range(2)]
    found = await asyncio.gather(*(admitted(limits, call_of(), 10) for limits in both))
    assert sum(found) == 10
