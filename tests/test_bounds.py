"""Bounds of one reply: it ends cleanly, as `length`, its upstream is closed, the outcome is `truncated`; pushed and pulled."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import openai
import orjson
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from middleware.bounds import estimated
from tests.support.gateway import CONFIG, Answer, ask, chat, gateway, until
from tests.support.upstream import Asked, Line, Upstream, stream

Json = dict[str, Any]
LAYERS = """  - metrics
  - tracking
  - smooth
  - bounds{options}
  - cache
"""
BOUNDED = CONFIG.replace("  - tracking\n", LAYERS)
WORDS = [f" w{number:02d}" for number in range(40)]


def chunk(delta: Json, finish: str | None = None, index: int = 0) -> bytes:
    choices = [{"index": index, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % orjson.dumps({"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": choices})


USAGE = b'data: {"id":"c","created":1,"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":40,"total_tokens":43}}\n\n'
EVENTS = [*(chunk({"content": word}) for word in WORDS), chunk({}, "stop"), USAGE, b"data: [DONE]\n\n"]


async def endless(asked: Asked, line: Line) -> None:
    await line.head()
    while not line.closed.is_set():
        await line.chunk(chunk({"content": " word"}))


async def talks_then_silent(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(chunk({"content": "Hello"}))
    await line.forever()


def ending(answer: Answer) -> tuple[str, str, bool]:
    """Finish reason, the word beside it, and whether `[DONE]` follows."""
    choice = next(chunk["choices"][0] for chunk in answer.chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"])
    return choice["finish_reason"], choice["native_finish_reason"], answer.done


async def answered(pieces: list[bytes], options: str = "", **fields: Any) -> Answer:
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, BOUNDED, options=options) as running:
        return await ask(running.port, chat(**fields))


@pytest.mark.parametrize(
    ("options", "fields", "why"),
    [
        (": {max_stream_bytes: 1000}", {}, "max_stream_bytes"),
        ("", {"max_stream_bytes": 1000}, "max_stream_bytes"),
        (": {max_output_tokens_hard: 8}", {}, "max_output_tokens_hard"),
        (": {max_output_tokens_hard: 100}", {"penstock": {"max_output_tokens_hard": 8}}, "max_output_tokens_hard"),
        (": {max_stream_seconds: 50ms}", {}, "max_stream_seconds"),
        ("", {"max_stream_seconds": 0.05}, "max_stream_seconds"),
    ],
)
@pytest.mark.parametrize("smooth", [False, True])
async def test_an_endless_stream_ends_cleanly_and_its_upstream_is_closed(
    options: str, fields: Json, why: str, smooth: bool
) -> None:
    async with Upstream(endless) as upstream, gateway(upstream.url, BOUNDED, options=options) as running:
        with structlog.testing.capture_logs() as lines:
            answer = await ask(running.port, chat(smooth=smooth, stream_options={"include_usage": True}, **fields))
        assert ending(answer) == ("length", f"penstock:{why}", True)
        assert answer.text.startswith(" word")
        await until(lambda: upstream.open == 0)
        (line,) = (line for line in lines if line["event"] == "request")
        assert (line["outcome"], line["status"], line["finish_reasons"]) == ("truncated", 200, ["length"])
        usage = answer.chunks[-1]["usage"]
        assert usage["estimated"] is True
        assert usage["completion_tokens"] == -(-len(answer.text) // 4)
        assert f'penstock_truncated_total{{bound="{why}"}} 1.0' in await metrics(running.port)


async def metrics(port: int) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
        return await response.text()


@pytest.mark.parametrize("smooth", [False, True])
async def test_seconds_end_a_stream_that_has_gone_silent(smooth: bool) -> None:
    async with Upstream(talks_then_silent) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        answer = await ask(running.port, chat(max_stream_seconds=0.05, smooth=smooth))
        assert (answer.text, ending(answer)) == ("Hello", ("length", "penstock:max_stream_seconds", True))
        await until(lambda: upstream.open == 0)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("demo/stall-midstream", {"max_stream_seconds": 0.2}),
        ("demo/fast", {"max_stream_bytes": 700}),
        ("demo/fast", {"max_output_tokens_hard": 5}),
    ],
)
async def test_a_reply_that_can_only_be_pulled_is_bounded_too(model: str, fields: Json, smooth: bool) -> None:
    async with gateway(config=BOUNDED, options="") as running:
        answer = await ask(running.port, chat(model, smooth=smooth, **fields))
        assert ending(answer) == ("length", f"penstock:{next(iter(fields))}", True)
        assert 0 < len(answer.text) < 80


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(1, 3000), max_size=8), bound=st.sampled_from(["max_stream_bytes", "max_output_tokens_hard"]))
async def test_the_cut_is_at_the_same_chunk_however_the_bytes_were_split(cuts: list[int], bound: str) -> None:
    whole = b"".join(EVENTS)
    ends = sorted({cut for cut in cuts if cut < len(whole)})
    pieces = [whole[start:end] for start, end in zip([0, *ends], [*ends, len(whole)], strict=True)]
    most = 2000 if bound == "max_stream_bytes" else 20
    asked: Json = {bound: most}
    answer = await answered(pieces, **asked)
    assert ending(answer)[1] == f"penstock:{bound}"
    if bound == "max_output_tokens_hard":
        assert answer.text == "".join(WORDS[:20])
    else:
        content = [event for event in answer.body.split(b"\n\n") if b'"content"' in event]
        size = sum(len(event) + 2 for event in content)
        assert size <= most < size + len(content[-1]) + 2


async def test_the_provider_s_own_end_is_not_counted_and_a_reply_that_fits_is_complete() -> None:
    async with Upstream(stream(EVENTS)) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        plain = await ask(running.port, chat())
        size = sum(len(event) + 2 for event in plain.body.split(b"\n\n") if b'"content"' in event)
        fitting: list[Json] = [{"max_stream_bytes": size}, {"max_output_tokens_hard": len(WORDS)}, {"max_stream_seconds": 60}]
        for fields in fitting:
            with structlog.testing.capture_logs() as lines:
                answer = await ask(running.port, chat(**fields))
            assert answer.body == plain.body
            assert [line["outcome"] for line in lines if line["event"] == "request"] == ["completed"]
        answer = await ask(running.port, chat(max_stream_bytes=size - 1))
        assert ending(answer)[0] == "length"


async def test_a_burst_is_cut_with_the_provider_s_own_usage_where_it_came() -> None:
    """The reply's end was in the same read."""
    answer = await answered([b"".join(EVENTS)], max_output_tokens_hard=5, stream_options={"include_usage": True})
    assert (answer.text, ending(answer)) == ("".join(WORDS[:5]), ("length", "penstock:max_output_tokens_hard", True))
    assert answer.chunks[-1]["usage"]["total_tokens"] == 43


async def test_every_choice_that_was_asked_for_gets_its_finish_reason_once() -> None:
    pieces = [chunk({"content": " word"}, index=number % 2) for number in range(40)]
    answer = await answered(
        [*pieces, chunk({}, "stop"), chunk({}, "stop", 1), b"data: [DONE]\n\n"], n=2, max_output_tokens_hard=10
    )
    found = [choice for chunk in answer.chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert [(choice["index"], choice["finish_reason"]) for choice in found] == [(0, "length"), (1, "length")]


async def test_reasoning_refusals_and_tool_calls_count_as_tokens() -> None:
    call = {"index": 0, "id": "t", "type": "function", "function": {"name": "fname", "arguments": ""}}
    pieces = [
        chunk({"reasoning_content": "12345678"}),
        chunk({"refusal": "12345678"}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1234567"}}]}),
        chunk({"content": "over"}),
    ]
    answer = await answered([*pieces, *EVENTS[-3:]], max_output_tokens_hard=7)
    deltas = [chunk["choices"][0]["delta"] for chunk in answer.chunks]
    assert [sorted(delta) for delta in deltas] == [["reasoning_content", "role"], ["refusal"], ["tool_calls"], ["tool_calls"], []]


async def test_a_request_that_is_not_streamed_is_cut_where_its_upstream_streams_and_left_alone_where_not() -> None:
    whole = b'{"id":"c","object":"chat.completion","created":1,"choices":[{"index":0,"message":{"role":"assistant",' + (
        b'"content":"a long text"},"finish_reason":"stop"}]}'
    )
    folded = await answered(EVENTS, stream=False, max_output_tokens_hard=5)
    choice = folded.json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("".join(WORDS[:5]), "length")
    assert (choice["native_finish_reason"], folded.json["usage"]["estimated"]) == ("penstock:max_output_tokens_hard", True)

    async def answer(asked: Asked, line: Line) -> None:
        await line.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(whole), whole)
        )

    async with Upstream(answer) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        left = await ask(running.port, chat(stream=False, max_output_tokens_hard=1, max_stream_bytes=1))
        assert left.json["choices"][0]["message"]["content"] == "a long text"


async def test_what_was_cut_is_not_cached_and_a_hit_is_bounded_as_well() -> None:
    async with Upstream(stream(EVENTS)) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        cached: Json = {"cache": {"ttl": 60}}
        cut = await ask(running.port, chat(**cached, max_output_tokens_hard=5))
        full = await ask(running.port, chat(**cached))
        hit = await ask(running.port, chat(**cached, max_output_tokens_hard=5))
        assert [answer.headers["X-Cache"] for answer in (cut, full, hit)] == ["miss", "miss", "hit"]
        assert (full.text, hit.text) == ("".join(WORDS), cut.text)


async def test_the_sdk_sees_a_reply_that_ended_for_its_length() -> None:
    async with Upstream(endless) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any", max_retries=0) as sdk:
            reply = await sdk.chat.completions.create(
                model="openai/m",
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                extra_body={"max_output_tokens_hard": 5},
            )
            chunks = [chunk async for chunk in reply]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " word" * 4


async def test_text_completions_are_bounded_too() -> None:
    async with Upstream(endless) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        body = {"model": "openai/m", "prompt": "Hi", "stream": True, "max_output_tokens_hard": 5}
        answer = await ask(running.port, body, "/v1/completions")
        assert "".join(chunk["choices"][0]["text"] for chunk in answer.chunks) == " word" * 4
        assert ending(answer)[0] == "length"


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ("", "max_stream_bytes", 0),
        ("", "max_stream_bytes", "1MiB"),
        ("", "max_stream_seconds", 0),
        ("", "max_output_tokens_hard", 1.5),
        (": {max_stream_bytes: 1000}", "max_stream_bytes", 1001),
        (": {max_stream_seconds: 1s}", "max_stream_seconds", 1.5),
        (": {max_output_tokens_hard: 10}", "max_output_tokens_hard", 11),
    ],
)
async def test_a_wrong_value_or_one_beyond_the_operator_s_bound_is_a_400(options: str, field: str, value: Any) -> None:
    async with gateway(config=BOUNDED, options=options) as running:
        answer = await ask(running.port, chat("demo/fast", **{field: value}))
        assert answer.error is not None
        assert (answer.status, answer.error["param"]) == (400, field)


async def test_none_of_the_fields_goes_upstream() -> None:
    async with Upstream(stream(EVENTS)) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        await ask(running.port, chat(max_stream_bytes=10**6, max_stream_seconds=60, max_output_tokens_hard=10**6, smooth=True))
        assert set(upstream.asked[0].json) == {"model", "messages", "stream", "stream_options"}


async def test_a_client_that_leaves_a_bounded_stream_leaves_nothing_behind() -> None:
    async with Upstream(endless) as upstream, gateway(upstream.url, BOUNDED, options="") as running:
        before = len(asyncio.all_tasks())
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        body = orjson.dumps(chat(max_stream_seconds=60, smooth=True))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"word")
        writer.close()
        await until(lambda: upstream.open == 0 and len(asyncio.all_tasks()) <= before)


def test_an_estimate_is_marked_and_adds_up() -> None:
    usage = estimated({"messages": [{"role": "user", "content": "x" * 400}]}, 41)
    assert (usage["completion_tokens"], usage["estimated"]) == (11, True)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 100 <= usage["prompt_tokens"] <= 120
