"""Tracking by itself, around a hand-made next, and in a real gateway: one line per call, whatever its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from middleware.tracking import Noted, Tracking
from proxy.call import Call, Principal, Route
from proxy.errors import GatewayError, Outcome, Refused, UpstreamError, UpstreamTimeout
from proxy.own_fields import OwnFields
from proxy.reply import Batch, Head, Reply, Trailer, Try
from tests.support.decoding import make_call, make_target
from tests.support.gateway import ask, chat, gateway
from tests.support.handmade import KEY, SECRET, Clock, Json, answers, asked, reply
from tests.support.upstream import Asked, Line, Upstream, stream


@pytest.fixture
def tracking(lines: list[Json]) -> Tracking:
    made = Tracking()
    made.clock = Clock()
    return made


class TestTracking:
    async def test_a_completed_stream_is_one_line_when_it_has_ended(self, tracking: Tracking, lines: list[Json]) -> None:
        clock = tracking.clock
        assert isinstance(clock, Clock)
        given = reply(tries=(Try("a/b", "upstream_error", 0.1),))

        async def next(call: Call) -> Reply:
            clock.now += 0.25
            return given

        got = await tracking(asked(), next)
        assert got.chunks is given.chunks, "nothing per chunk"
        assert got.head.headers == {"X-Penstock-Name": "bot"}
        assert lines == [], "the stream is still flowing"
        clock.now += 1.0
        got.trailer.usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        got.trailer.finish_reasons = {0: "stop", 1: "length"}
        got.trailer.end(Outcome.COMPLETED)
        got.trailer.end(Outcome.CLIENT_GONE)
        assert lines == [
            {
                "event": "request",
                "log_level": "info",
                "id": "req_1",
                "key": "anonymous",
                "kind": "chat",
                "model": "public-model",
                "name": "bot",
                "stream": True,
                "outcome": "completed",
                "status": 200,
                "total_ms": 1250.0,
                "target": "acme/m",
                "attempts": 2,
                "tries": [{"target": "a/b", "reason": "upstream_error", "ms": 100.0}],
                "first_chunk_ms": 250.0,
                "longest_gap_ms": 0.0,
                "finish_reasons": ["stop", "length"],
                "prompt_tokens": 10,
                "completion_tokens": 5,
            }
        ]

    @pytest.mark.parametrize("outcome", list(Outcome))
    async def test_every_outcome_of_a_stream_is_named(self, tracking: Tracking, lines: list[Json], outcome: Outcome) -> None:
        got = await tracking(asked(), answers(reply()))
        got.trailer.end(outcome, UpstreamError("no", code="why"))
        (line,) = lines
        assert (line["outcome"], line["code"], line["target"]) == (outcome.value, "why", "acme/m")

    @pytest.mark.parametrize(
        "error",
        [
            UpstreamError("no", status=429, code="slow_down"),
            Refused("no"),
            UpstreamTimeout("first_chunk", 3),
            UpstreamTimeout("connect", 3),
            GatewayError("no"),
        ],
    )
    async def test_an_error_before_the_first_chunk_is_a_line_and_goes_on(
        self, tracking: Tracking, lines: list[Json], error: GatewayError
    ) -> None:
        with pytest.raises(GatewayError) as caught:
            await tracking(asked(), answers(error))
        assert caught.value is error
        (line,) = lines
        assert (line["outcome"], line["status"], line["code"]) == (error.outcome.value, error.status, error.code)

    async def test_a_client_that_leaves_before_the_first_chunk_is_a_line(self, tracking: Tracking, lines: list[Json]) -> None:
        entered = asyncio.Event()

        async def next(call: Call) -> Reply:
            entered.set()
            await asyncio.Event().wait()
            raise AssertionError

        task = asyncio.create_task(tracking(asked(), next))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [line["outcome"] for line in lines] == ["client_gone"]

    async def test_a_fault_of_the_gateways_own_is_a_line(self, tracking: Tracking, lines: list[Json]) -> None:
        """Section 3.9: each stream ends in exactly one outcome, which the log line names."""
        with pytest.raises(ZeroDivisionError):
            await tracking(asked(), answers(ZeroDivisionError()))
        assert [line["outcome"] for line in lines] == ["gateway_error"]

    async def test_a_reply_that_has_already_ended_is_a_line(self, tracking: Tracking, lines: list[Json]) -> None:
        given = reply()
        given.trailer.end(Outcome.COMPLETED)
        await tracking(asked(), answers(given))
        assert [line["outcome"] for line in lines] == ["completed"]

    async def test_prompts_replies_and_keys_are_in_no_line(self, tracking: Tracking, lines: list[Json]) -> None:
        got = await tracking(asked(), answers(reply()))
        got.trailer.end(Outcome.UPSTREAM_ERROR, UpstreamError(f"echo: {SECRET} {KEY}"))
        with pytest.raises(UpstreamError):
            await tracking(asked(), answers(UpstreamError(f"echo: {SECRET} {KEY}")))
        assert len(lines) == 2
        assert SECRET not in json.dumps(lines)
        assert KEY not in json.dumps(lines)

    async def test_what_is_not_known_is_left_out(self, tracking: Tracking, lines: list[Json]) -> None:
        got = await tracking(make_call(), answers(reply()))
        got.trailer.end(Outcome.COMPLETED)
        assert not {"name", "prompt_tokens", "completion_tokens", "code"} & set(lines[0])

    async def test_the_attempts_and_their_reasons_are_told_of_an_error_too(self, tracking: Tracking, lines: list[Json]) -> None:
        error = UpstreamError("no", status=503, code="overloaded")
        error.tries = (Try("a/b", "timeout_connect", 0.5), Try("c/d", "overloaded", 0.25))
        with pytest.raises(UpstreamError):
            await tracking(asked(), answers(error))
        (line,) = lines
        assert line["tries"] == [
            {"target": "a/b", "reason": "timeout_connect", "ms": 500.0},
            {"target": "c/d", "reason": "overloaded", "ms": 250.0},
        ]
        assert (line["attempts"], line["target"]) == (2, "c/d")

    async def test_who_was_asked_is_told_where_nothing_was_retried_and_nobody_where_it_was_refused(
        self, tracking: Tracking, lines: list[Json]
    ) -> None:
        call = asked(targets=(make_target("openai", "m"),))
        for error in (UpstreamError("no"), Refused("no")):
            with pytest.raises(GatewayError):
                await tracking(call, answers(error))
        assert [(line.get("target"), line.get("attempts")) for line in lines] == [("openai/m", 1), (None, None)]

    async def test_key_route_cache_identity_and_all_kinds_of_tokens_are_in_the_line(
        self, tracking: Tracking, lines: list[Json]
    ) -> None:
        call = asked(principal=Principal("web"), route=Route("fast", ()), identity="user-7")
        got = await tracking(call, answers(reply(cache="hit", age=3.0)))
        got.trailer.usage = {
            "prompt_tokens": 9,
            "completion_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 7},
            "completion_tokens_details": {"reasoning_tokens": 6},
        }
        got.trailer.end(Outcome.COMPLETED)
        wanted = {"key": "web", "route": "fast", "cache": "hit", "identity": "user-7", "cached_tokens": 7, "reasoning_tokens": 6}
        assert wanted.items() <= lines[0].items()

    async def test_a_deadline_of_the_edges_is_no_departure(self, tracking: Tracking, lines: list[Json]) -> None:
        """Both come as a cancellation; the edge's says what it is."""
        for words in ((Outcome.TIMEOUT_TOTAL,), ()):
            with pytest.raises(asyncio.CancelledError):
                await tracking(asked(), answers(asyncio.CancelledError(*words)))
        assert [(line["outcome"], line["status"]) for line in lines] == [("timeout_total", 504), ("client_gone", 499)]

    @pytest.mark.parametrize(
        ("name", "sent"), [("bot 1", "bot 1"), ("a\r\nb: c", "a%0D%0Ab%3A%20c"), ("é", "%C3%A9"), ("\udc80", "%3F")]
    )
    async def test_the_client_is_told_its_name_and_nothing_breaks_out_of_the_header(
        self, tracking: Tracking, name: str, sent: str
    ) -> None:
        got = await tracking(replace(asked(), name=name), answers(reply(headers={"retry-after": "1"})))
        assert got.head.headers == {"retry-after": "1", "X-Penstock-Name": sent}

    async def test_without_a_name_the_reply_goes_through_as_it_is(self, tracking: Tracking) -> None:
        given = reply()
        assert await tracking(make_call(), answers(given)) is given


class TestAdmit:
    def test_thread_and_metadata_are_noted_from_wherever_they_may_stand(self) -> None:
        body = {"orq": {"thread": {"id": "conv-1", "tags": ["a", "b"]}}, "metadata": {"team": "x", "deep": {"no": 1}}}
        call = Tracking().admit(asked(), OwnFields(body, {}))
        assert call.extension(Noted) == Noted("conv-1", ("a", "b"), {"team": "x"})

    def test_without_them_the_call_stays_as_it_is(self) -> None:
        call = asked()
        assert Tracking().admit(call, OwnFields({}, {})) is call

    @pytest.mark.parametrize(
        ("body", "path"),
        [
            ({"thread": "t"}, "thread"),
            ({"thread": {"id": 5}}, "thread.id"),
            ({"thread": {"id": "x" * 129}}, "thread.id"),
            ({"orq": {"thread": {"tags": "a"}}}, "orq.thread.tags"),
            ({"thread": {"tags": ["a", 1]}}, "thread.tags[1]"),
            ({"metadata": ["a"]}, "metadata"),
        ],
    )
    def test_another_shape_is_refused_with_its_path(self, body: Json, path: str) -> None:
        with pytest.raises(Refused) as caught:
            Tracking().admit(asked(), OwnFields(body, {}))
        assert caught.value.param == path

    def test_metadata_is_bounded(self) -> None:
        body = {"metadata": {f"{number:02}" + "k" * 500: "v" * 5000 for number in range(99)}}
        noted = Tracking().admit(asked(), OwnFields(body, {})).extension(Noted)
        assert noted is not None
        assert len(noted.metadata) == 16
        assert len(json.dumps(dict(noted.metadata))) < 16 * 700


PIECES = ["He", "llo", " wörld"]


def spoken(*texts: str) -> Reply:
    async def chunks() -> AsyncIterator[Batch]:
        for text in texts:
            yield Batch([{"choices": [{"index": 0, "delta": {"content": text}}]}])

    return Reply(Head("acme/m"), chunks(), Trailer())


class TestContent:
    async def logged(self, lines: list[Json], given: Reply, **options: Any) -> Json:
        got = await Tracking(**options)(asked(), answers(given))
        passed = [chunk async for batch in got.chunks for chunk in batch.chunks]
        got.trailer.end(Outcome.COMPLETED)
        assert len(passed) == len(PIECES), "every chunk goes on"
        return lines[-1]

    async def test_messages_and_the_reply_are_logged_once_that_is_switched_on(self, lines: list[Json]) -> None:
        line = await self.logged(lines, spoken(*PIECES), log_content=True)
        assert line["messages"] == [{"role": "user", "content": SECRET}]
        assert line["reply"] == ["Hello wörld"]

    async def test_off_is_the_default(self, lines: list[Json]) -> None:
        line = await self.logged(lines, spoken(*PIECES))
        assert not {"messages", "reply"} & set(line)
        assert "wörld" not in json.dumps(line, ensure_ascii=False)

    @pytest.mark.parametrize(("most", "reply_text"), [(1, "H"), (8, "Hello w"), (9, "Hello wö"), (1000, "Hello wörld")])
    async def test_neither_is_longer_than_its_bound_and_no_character_is_halved(
        self, lines: list[Json], most: int, reply_text: str
    ) -> None:
        line = await self.logged(lines, spoken(*PIECES), log_content=True, max_content_bytes=most)
        assert line["reply"] == [reply_text]
        assert most == 1000 or len(line["messages"].encode()) <= most

    async def test_what_came_before_a_break_is_logged_and_the_upstream_is_closed(self, lines: list[Json]) -> None:
        given = spoken(*PIECES)
        got = await Tracking(log_content=True)(asked(), answers(given))
        await anext(aiter(got.chunks))
        await got.close(Outcome.CLIENT_GONE)
        assert (lines[0]["reply"], lines[0]["outcome"]) == (["He"], "client_gone")
        with pytest.raises(StopAsyncIteration):
            await anext(aiter(given.chunks))

    async def test_a_whole_reply_is_logged_too(self, lines: list[Json]) -> None:
        async def chunks() -> AsyncIterator[Batch]:
            yield Batch([{"choices": [{"index": 0, "message": {"content": "Hi"}}]}], final=True)

        got = await Tracking(log_content=True)(asked(), answers(Reply(Head("a/m"), chunks(), Trailer(), whole=True)))
        assert [batch.final async for batch in got.chunks] == [True]
        got.trailer.end(Outcome.COMPLETED)
        assert lines[0]["reply"] == ["Hi"]


class TestGateway:
    """In a real gateway."""

    async def test_what_a_request_says_of_itself_is_logged_and_stays_here(self, lines: list[Json]) -> None:
        own: Json = {
            "name": "bot",
            "thread": {"id": "conv-1", "tags": ["t"]},
            "identity": {"id": "user-1"},
            "metadata": {"team": "x"},
        }
        async with Upstream(stream([SAID, b"data: [DONE]\n\n"])) as upstream, gateway(upstream.url) as running:
            answer = await ask(running.port, chat(**own))
            assert (answer.done, answer.headers["X-Penstock-Name"]) == (True, "bot")
            sent = upstream.asked[0].json
        assert {"name", "thread", "identity"} & set(sent) == set()
        assert sent["metadata"] == {"team": "x"}, "which providers know as well"
        (line,) = [line for line in lines if line["event"] == "request"]
        wanted = {"name": "bot", "thread": "conv-1", "tags": ("t",), "identity": "user-1", "metadata": {"team": "x"}}
        assert wanted.items() <= line.items()
        assert (line["outcome"], line["target"], line["status"]) == ("completed", "openai/m", 200)
        assert line["longest_gap_ms"] >= 0

    async def test_a_gap_between_writes_is_measured(self, lines: list[Json]) -> None:
        """The upstream pauses for longer than anything else here takes."""

        async def answer(asked: Asked, line: Line) -> None:
            await line.head()
            await line.chunk(SAID)
            await asyncio.sleep(0.1)
            await line.chunk(SAID)
            await line.chunk(b"data: [DONE]\n\n")
            await line.end()

        async with Upstream(answer) as upstream, gateway(upstream.url) as running:
            await ask(running.port, chat())
        assert [50 <= line["longest_gap_ms"] < 5000 for line in lines] == [True]


SAID = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}\n\n'
