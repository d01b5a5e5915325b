"""What keeps a silent stream's connection open: comments between chunks, and a stream that begins before its first chunk.

Strategy: real sockets on either side. A provider stays silent until the gateway has written so many comments, so no test waits
for a time; the pauses are short by config. How comments may lie among events is shown by properties, with two parsers: one
written from the standard, and the OpenAI SDK's own.
The one rule: a comment changes nothing but the time until something is heard: no event, no limit, no outcome, no figure.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from proxy import keepalive, timers
from proxy.app import Gateway
from proxy.call import Call
from proxy.errors import GatewayError
from proxy.keepalive import COMMENT, COMMENT_AMONG_IDS, KeepAlive, told_late
from proxy.pipeline import Handler
from proxy.relay import Relay
from proxy.reply import Batch, Head, Reply, Trailer, sse_events, tapped
from tests.support.gateway import Answer, RawClient, ask, chat, gateway, raw_request, until
from tests.support.rawclient import WAYS, connected
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
CONFIG = """
server: {{port: 0, drain_timeout: 1s, keepalive_after: {after}, keepalive_interval: {interval}}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - metrics
  - tracking
{own}  - timeout: {{connect_timeout: 30s, first_chunk_timeout: {first}, idle_timeout: {idle}, call_timeout: 30s}}
"""
SOON = "20ms"


def word(text: str = "word ") -> bytes:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices}).encode()


ENDING = b'data: {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
ERROR = json.dumps({"error": {"message": "too many", "type": "rate_limit_error", "param": None, "code": "slow_down"}}).encode()
Provider = Callable[[Asked, Line], Awaitable[None]]


@asynccontextmanager
async def serving(
    answer: Provider,
    *,
    after: str = "off",
    interval: str = SOON,
    first: str = "30s",
    idle: str = "30s",
    own: type | None = None,
) -> AsyncIterator[tuple[Gateway, Upstream]]:
    """own: a middleware between tracking and the provider."""
    table = {"own": own} if own else {}
    named = "  - own\n" if own else ""
    async with (
        Upstream(answer) as upstream,
        gateway(upstream.url, CONFIG, table=table, after=after, interval=interval, first=first, idle=idle, own=named) as running,
    ):
        yield running, upstream


def silent_before(comments: list[bytes], count: int, then: Provider) -> Provider:
    """A provider that says nothing until so many comments were written, and then what `then` says."""

    async def answer(asked: Asked, line: Line) -> None:
        await until(lambda: len(comments) >= count)
        await then(asked, line)

    return answer


def silent_between(comments: list[bytes], count: int) -> Provider:
    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(word("one "))
        await until(lambda: len(comments) >= count)
        await line.chunk(word("two "), ENDING)
        await line.end()

    return answer


WORDS = stream([word("one "), word("two "), ENDING])


async def mute(asked: Asked, line: Line) -> None:
    await line.forever()


def comment_lines(answer: Answer) -> list[str]:
    return re.findall(r"^: .*$", answer.body.decode(), re.MULTILINE)


def penstock(answer: Answer) -> Json:
    """The headers that came late."""
    (found,) = [line.removeprefix(": penstock ") for line in comment_lines(answer) if line.startswith(": penstock ")]
    told: Json = json.loads(found)
    return told


# Between chunks


async def test_a_long_silence_between_chunks_is_filled_with_comments(comments: list[bytes]) -> None:
    async with serving(silent_between(comments, 3)) as (running, _):
        answer = await ask(running.port, chat())
    assert (answer.text, answer.done, answer.clean) == ("one two ", True, True)
    found = comment_lines(answer)
    assert len(found) >= 3
    assert set(found) == {": keep-alive"}
    assert answer.body.index(b"one ") < answer.body.index(b": keep-alive") < answer.body.index(b"two ")


def test_comments_between_chunks_are_on_by_default_after_15_s_and_late_commits_are_off() -> None:
    from proxy.shape import Server

    assert (Server().keepalive_interval, Server().keepalive_after) == (15.0, 0.0)


@pytest.mark.parametrize("off", ["off", "0", "false"])
async def test_no_comment_is_written_where_the_interval_is_off(off: str) -> None:
    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(word())
        await line.forever()

    async with serving(answer, interval=off, idle="100ms") as (running, _):
        found = await ask(running.port, chat())
    assert found.error is not None
    assert found.error["code"] == "timeout_idle"
    assert comment_lines(found) == []


async def test_a_request_may_switch_them_off(comments: list[bytes]) -> None:
    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(word())
        await line.forever()

    async with serving(answer, idle="100ms") as (running, upstream):
        found = await ask(running.port, chat(keepalive_interval=False))
        assert "keepalive_interval" not in upstream.asked[0].json
    assert found.error is not None
    assert comments == []


async def test_comments_do_not_count_as_content_for_the_idle_limit(comments: list[bytes]) -> None:
    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(word())
        await line.forever()

    async with serving(answer, idle="200ms") as (running, _):
        found = await ask(running.port, chat())
    assert found.error is not None
    assert found.error["code"] == "timeout_idle"
    assert comments


async def test_comments_do_not_shorten_the_gap_that_metrics_and_the_log_tell(comments: list[bytes], lines: list[Json]) -> None:
    async with serving(silent_between(comments, 4)) as (running, _):
        await ask(running.port, chat())
    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["longest_gap_ms"] >= 4 * 20 * 0.9


async def test_a_stream_whose_chunks_come_in_time_gets_none_and_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks it has: the timer looks at the time of the last write."""
    asked_for: list[float] = []

    def counted(seconds: float, callback: Callable[[], object]) -> timers.Expiry:
        asked_for.append(seconds)
        return timers.after(seconds, callback)

    monkeypatch.setattr(keepalive, "after", counted)

    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        for _ in range(50):
            await line.chunk(word())
        await line.chunk(ENDING)
        await line.end()

    async with serving(answer, interval="7s") as (running, _):
        found = await ask(running.port, chat())
    assert found.text == "word " * 50
    assert comment_lines(found) == []
    assert asked_for == [7.0]


async def test_nothing_is_written_for_a_client_that_is_behind(comments: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer looks, and looks again, and says nothing on top of what the client has not taken."""
    looks: list[bool] = []
    comment = Relay._comment

    def looked(relay: Relay) -> None:
        looks.append(relay._delivery.congested)
        comment(relay)

    monkeypatch.setattr(Relay, "_comment", looked)
    big = word("x" * 2**16)

    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        while True:
            await line.chunk(big)

    async with serving(answer) as (running, _):
        with await connected(running.port, receive_buffer=4096) as client:
            await client.post(chat())
            await until(lambda: running.edge.buffered > 2**16)
            before, said = len(looks), len(comments)
            await until(lambda: len(looks) >= before + 3)
            assert all(looks[before:])
            assert len(comments) == said


@pytest.mark.parametrize("after", ["off", SOON])
async def test_nothing_is_written_behind_the_end_of_a_stream(comments: list[bytes], after: str) -> None:
    """On a connection that is kept, while another stream has many comments."""

    async def answer(asked: Asked, line: Line) -> None:
        before = len(comments)
        if after != "off":
            await until(lambda: len(comments) >= before + 2)
        await line.head()
        await line.chunk(word("one "))
        before = len(comments)
        await until(lambda: len(comments) >= before + 4)
        await line.chunk(ENDING)
        await line.end()

    async with serving(answer, after=after) as (running, _):
        with await connected(running.port) as kept:
            await kept.post(chat())
            stream_ = await kept.read_until(b"\r\n0\r\n\r\n")
            assert stream_.count(b": keep-alive") >= 4
            await ask(running.port, chat())
            kept.received = b""
            await kept.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await kept.read_until(b"ok")).startswith(b"HTTP/1.1 200 OK\r\n")


class Numbered:
    """Numbers the events, as resumable streams do."""

    async def __call__(self, call: Call, next: Handler) -> Reply:
        reply = await next(call)
        count = 0

        def see(batch: Batch) -> Batch:
            nonlocal count
            first, count = count + 1, count + len(batch.chunks)
            return batch.numbered(first)

        return replace(reply, chunks=tapped(reply.chunks, see))


async def test_no_blank_line_follows_a_comment_among_numbered_events(comments: list[bytes]) -> None:
    async with serving(silent_between(comments, 2), own=Numbered) as (running, _):
        answer = await ask(running.port, chat())
    assert b": keep-alive\n: keep-alive\n" in answer.body
    assert b": keep-alive\n\n" not in answer.body
    assert [event.id for event in standard_events(answer.body)] == ["1", "2", "3", "4"]


# A late commit


@pytest.mark.parametrize("odd", ["", "trailers"], ids=["lane", "aiohttp"])
@pytest.mark.parametrize(("path", "kind"), [("chat/completions", "chat"), ("completions", "text")])
async def test_after_so_much_silence_the_stream_begins_and_its_headers_follow_when_known(
    comments: list[bytes], path: str, kind: str, odd: str
) -> None:
    body = chat() if kind == "chat" else {"model": "openai/m", "prompt": "Hi", "stream": True}
    async with serving(silent_before(comments, 3, WORDS), after=SOON) as (running, _), RawClient(running.port) as client:
        await client.send(raw_request(body, f"/v1/{path}", X_Request_Id="mine", TE=odd))
        answer = await client.answer()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["X-Request-Id"] == "mine"
    assert not {"X-Penstock-Target", "X-Penstock-Attempts", "Server-Timing"} & set(answer.headers)
    told = penstock(answer)
    assert told["X-Penstock-Target"] == "openai/m"
    assert told["X-Penstock-Attempts"] == "1"
    assert float(re.findall(r"upstream;dur=([\d.]+)", told["Server-Timing"])[0]) >= 40
    assert not {"X-Request-Id", "Content-Type"} & set(told)
    assert comment_lines(answer)[:3] == [": keep-alive"] * 3
    said = answer.text if kind == "chat" else "".join(chunk["choices"][0]["text"] for chunk in answer.chunks)
    assert (said, answer.done, answer.clean) == ("one two ", True, True)


async def test_until_then_nothing_is_sent_and_an_error_keeps_its_status() -> None:
    async with serving(whole(ERROR, 429), after="20s") as (running, _):
        answer = await ask(running.port, chat())
    assert answer.status == 429
    assert answer.error is not None
    assert answer.error["message"] == "too many"


async def test_a_first_chunk_in_time_keeps_the_early_beginning_off(comments: list[bytes]) -> None:
    """Also when the time has come in a silence behind it."""
    async with serving(silent_between(comments, 5), after="30ms") as (running, _):
        answer = await ask(running.port, chat())
    assert answer.headers["X-Penstock-Target"] == "openai/m"
    assert (answer.text, answer.done, answer.clean) == ("one two ", True, True)
    assert set(comment_lines(answer)) == {": keep-alive"}


async def test_by_default_a_stream_never_begins_early() -> None:
    async with serving(mute, first="100ms") as (running, _):
        answer = await ask(running.port, chat())
    assert answer.status == 504


async def test_a_request_may_ask_for_it(comments: list[bytes]) -> None:
    async with serving(silent_before(comments, 1, WORDS)) as (running, upstream):
        answer = await ask(running.port, chat(keepalive_after=100))
        assert "keepalive_after" not in upstream.asked[0].json
    assert comment_lines(answer)[0] == ": keep-alive"
    assert penstock(answer)["X-Penstock-Target"] == "openai/m"
    assert answer.done


@pytest.mark.parametrize("no", [False, 0])
async def test_a_request_may_refuse_it(no: Any, comments: list[bytes]) -> None:
    async with serving(mute, after=SOON, first="100ms") as (running, _):
        answer = await ask(running.port, chat(penstock={"keepalive_after": no}))
    assert answer.status == 504
    assert comments == []


async def test_a_whole_reply_never_begins_early(comments: list[bytes]) -> None:
    async with serving(mute, after=SOON, first="100ms", idle="100ms") as (running, _):
        asking = asyncio.create_task(ask(running.port, chat(stream=False, timeout={"call_timeout": 150})))
        answer = await asking
    assert answer.status == 504
    assert comments == []


def assert_late_error(answer: Answer, status: int, code: str) -> None:
    """The one error chunk at the end, no `[DONE]`, and what its status would have been."""
    assert answer.status == 200
    assert answer.clean, "the HTTP body is ended as HTTP wants it"
    assert b"[DONE]" not in answer.body
    assert answer.error is not None
    assert answer.error["code"] == code
    assert penstock(answer)["Status"] == str(status)
    assert answer.chunks[-1]["choices"][0]["finish_reason"] == "error"


@pytest.mark.parametrize(("path", "kind"), [("chat/completions", "chat.completion.chunk"), ("completions", "text_completion")])
async def test_an_error_after_the_commit_is_an_error_chunk_and_the_connection_is_closed(
    comments: list[bytes], path: str, kind: str, lines: list[Json]
) -> None:
    refusal = whole(ERROR, 429, headers={"Retry-After": "7"})
    body = {**chat(), "prompt": "Hi"}
    async with serving(silent_before(comments, 2, refusal), after=SOON) as (running, _), RawClient(running.port) as client:
        await client.send(raw_request(body, f"/v1/{path}"))
        answer = await client.answer()
        assert await client.closed()
        page = await ask_metrics(running)
    assert_late_error(answer, 429, "slow_down")
    assert answer.chunks[-1]["object"] == kind
    assert answer.chunks[-1]["model"] == "openai/m"
    assert {name.lower(): text for name, text in penstock(answer).items()}["retry-after"] == "7"
    (line,) = [line for line in lines if line["event"] == "request"]
    assert (line["outcome"], line["status"]) == ("upstream_error", 429), "the log tells the error's own status"
    assert re.search(r'penstock_requests_total\{[^}]*outcome="upstream_error"[^}]*status="429"[^}]*\} 1\.0', page)


async def ask_metrics(running: Gateway) -> str:
    async with RawClient(running.port) as client:
        await client.send(raw_request(b"", "/metrics", "GET", Content_Length="", Content_Type=""))
        return (await client.answer()).body.decode()


async def test_a_timeout_after_the_commit_is_an_error_chunk(comments: list[bytes]) -> None:
    async with serving(mute, after=SOON, first="150ms") as (running, upstream):
        answer = await ask(running.port, chat())
        await until(lambda: upstream.open == 0)
    assert_late_error(answer, 504, "timeout_first_chunk")
    assert comments


async def test_the_total_limit_after_the_commit_is_an_error_chunk() -> None:
    async with serving(mute, after=SOON) as (running, _):
        answer = await ask(running.port, chat(timeout={"total_timeout": 150}))
    assert_late_error(answer, 504, "timeout_total")


async def test_a_stream_that_is_cut_after_a_late_commit_ends_as_any_other(comments: list[bytes]) -> None:
    async def cut(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(word())
        line.hang_up()

    async with serving(silent_before(comments, 1, cut), after=SOON) as (running, _):
        answer = await ask(running.port, chat())
    assert answer.error is not None
    assert answer.error["code"] == "upstream_cut"
    assert answer.text == "word "
    assert b"[DONE]" not in answer.body


async def test_a_drain_after_the_commit_is_an_error_chunk(comments: list[bytes]) -> None:
    async with serving(mute, after=SOON) as (running, _):
        asking = asyncio.create_task(ask(running.port, chat()))
        await until(lambda: comments)
        running.edge.end_all()
        answer = await asking
    assert_late_error(answer, 503, "draining")


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_after_the_commit_takes_its_upstream_with_it(
    way: str, comments: list[bytes], lines: list[Json]
) -> None:
    async with serving(mute, after=SOON) as (running, upstream):
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b": keep-alive")
            client.leave(way)
            await until(lambda: upstream.open == 0 and running.edge.open_calls == 0)
    assert [line["outcome"] for line in lines if line["event"] == "request"] == ["client_gone"]


class Fails:
    async def __call__(self, call: Call, next: Handler) -> Reply:
        await (await next(call)).close()
        raise RuntimeError("a bug")


async def test_a_bug_after_the_commit_is_an_error_chunk_without_its_text(comments: list[bytes]) -> None:
    async with serving(silent_before(comments, 1, WORDS), after=SOON, own=Fails) as (running, _):
        answer = await ask(running.port, chat())
    assert_late_error(answer, 500, "gateway_error")
    assert b"a bug" not in answer.body


class OwnAnswer:
    """Answers by itself, once the provider has let it wait."""

    body: Json = {"stream": "s-1"}
    status = 202

    async def __call__(self, call: Call, next: Handler) -> Reply:
        await (await next(call)).close()

        async def chunks() -> AsyncIterator[Batch]:
            yield Batch([self.body], final=True)

        return Reply(Head("openai/m", status=self.status), chunks(), Trailer(), whole=True)


class OwnRefusal(OwnAnswer):
    body: Json = {"error": {"message": "not now", "type": "own_error", "code": "own_code", "param": None}}
    status = 409


@pytest.mark.parametrize(
    ("own", "status", "code"), [(OwnAnswer, 500, "answer_too_late"), (OwnRefusal, 409, "own_code")], ids=["answer", "error"]
)
async def test_a_middlewares_own_answer_after_the_commit_is_an_error_chunk(
    own: type, status: int, code: str, comments: list[bytes]
) -> None:
    async with serving(silent_before(comments, 1, WORDS), after=SOON, own=own) as (running, _):
        assert_late_error(await ask(running.port, chat()), status, code)


async def test_a_middlewares_own_answer_in_time_goes_out_as_it_is() -> None:
    async with serving(WORDS, after="20s", own=OwnAnswer) as (running, _):
        answer = await ask(running.port, chat())
    assert (answer.status, answer.json) == (202, {"stream": "s-1"})


async def test_pings_of_the_provider_do_not_keep_the_commit_off(comments: list[bytes]) -> None:
    async def pinging(asked: Asked, line: Line) -> None:
        await line.head()
        while not comments:
            await line.chunk(b": ping\n\n")
        await line.chunk(word(), ENDING)
        await line.end()

    async with serving(pinging, after=SOON) as (running, _):
        answer = await ask(running.port, chat())
    assert comment_lines(answer)[0] == ": keep-alive"
    assert answer.done


async def test_without_an_interval_a_late_commit_says_one_comment(comments: list[bytes]) -> None:
    async with serving(mute, after=SOON, interval="off", first="150ms") as (running, _):
        await ask(running.port, chat())
    assert comments == [COMMENT]


# The framing


class Event:
    def __init__(self, data: str, id: str) -> None:
        self.data = data
        self.id = id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and (self.data, self.id) == (other.data, other.id)

    def __hash__(self) -> int:
        return hash((self.data, self.id))


def standard_events(body: bytes) -> list[Event]:
    """As an EventSource dispatches them: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation"""
    events: list[Event] = []
    found: list[str] = []
    last = ""
    for line in body.decode().split("\n"):
        if not line:
            if found:
                events.append(Event("\n".join(found), last))
            found = []
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                found.append(value)
            elif name == "id":
                last = value
    return events


def sdk_events(body: bytes) -> list[Event]:
    return [Event(event.data, event.id or "") for event in SSEDecoder().iter_bytes(iter([body]))]


CHUNKS = st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=2), max_size=6)


@given(chunks=CHUNKS, numbered=st.booleans(), draw=st.data())
def test_comments_anywhere_between_events_change_no_event(chunks: list[Json], numbered: bool, draw: st.DataObject) -> None:
    events = [sse_events([chunk], number if numbered else None) for number, chunk in enumerate(chunks, 1)]
    plain = b"".join(events)
    commented = b""
    for place, event in enumerate([*events, b""]):
        # What the relay writes: no number has been seen before the first event.
        comment = COMMENT_AMONG_IDS if numbered and place else COMMENT
        late = [told_late({"X-Penstock-Target": "a/b", "X-Odd": "\u2028\r\n\udcff"})] * (place == 0)
        said = draw.draw(st.lists(st.sampled_from([comment, *late]), max_size=3))
        commented += b"".join(said) + event
    assert standard_events(commented) == standard_events(plain)
    assert sdk_events(commented) == sdk_events(plain)


def test_a_blank_line_after_a_comment_among_ids_would_be_an_event_to_the_sdk() -> None:
    """Why there are two forms; when this fails, one is enough."""
    assert len(sdk_events(sse_events([{}], 1) + COMMENT)) == 2


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=20), max_size=4))
def test_late_headers_are_one_line_of_json_whatever_is_in_them(headers: dict[str, str]) -> None:
    line = told_late(headers)
    assert line.isascii()
    assert line.endswith(b"\n\n")
    assert len(line[:-2].splitlines()) == 1
    told = json.loads(line.removeprefix(b": penstock "))
    assert told == {name: text for name, text in headers.items() if name not in keepalive.KNOWN}


# The timer by itself


class Loop:
    """A clock and one timer, both moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[float] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        self.due.append(due)
        return asyncio.TimerHandle(due, callback, (), asyncio.get_running_loop())


@given(st.lists(st.floats(0.1, 40.0), max_size=8))
async def test_a_comment_comes_when_nothing_was_written_for_the_interval_and_not_before(gaps: list[float]) -> None:
    """Whatever was written when: never within 15 s of a write or of another comment, never later than that."""
    loop, said, writes = Loop(), [0.0], [0.0]
    kept = KeepAlive(15.0, lambda: writes[-1], lambda: said.append(loop.now))
    kept._loop = loop  # type: ignore[assignment]
    due = 15.0
    for gap in [*gaps, 100.0]:
        upcoming = writes[-1] + gap
        while due <= upcoming:
            loop.now = due
            before = max(said[-1], writes[-1])
            count = len(said)
            kept._look()
            due = loop.due[-1]
            if len(said) > count:
                assert loop.now - before >= 15.0
            else:
                assert loop.now - before < 15.0
            assert due - max(said[-1], writes[-1]) <= 15.0 + 2 * timers.GRAIN
        loop.now = upcoming
        writes.append(upcoming)
    assert len(said) > 6


async def test_a_client_that_has_gone_stops_the_timer() -> None:
    def gone() -> None:
        raise ConnectionResetError

    kept = KeepAlive(1.0, lambda: -5.0, gone)
    kept._look()
    assert kept._timer is None


def test_an_answer_that_comes_too_late_is_an_error_with_a_way_out() -> None:
    from proxy.relay import too_late

    error = too_late(202, {})
    assert isinstance(error, GatewayError)
    assert "keepalive_after" in error.message
