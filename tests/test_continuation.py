"""Mid-stream failover over real sockets: providers of every format break as each test says, and what the client gets then.

Strategy: one server speaks all formats, told apart by the path; per provider a list of what it does, one entry per request.
The one rule: whatever breaks, the client's text is what the providers said, each word once, or it ends with an error chunk.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from middleware import TABLE
from proxy.app import Gateway
from proxy.config import parse
from tests.support.gateway import Answer, Json, answer_of, ask, chat, gateway, until
from tests.support.rawclient import connected
from tests.support.upstream import Answer as Reaction
from tests.support.upstream import Asked, Line, Upstream, whole

CONFIG = """
server: {{port: 0, drain_timeout: 300ms}}
providers:
  openai: {{api: openai, base_url: "{url}/openai/v1", api_key: "sk-upstream-0123456789"}}
  second: {{api: openai, base_url: "{url}/second/v1", api_key: "sk-upstream-0123456789", completions: ["text*"]}}
  anthropic: {{api: anthropic, base_url: "{url}/anthropic/v1", api_key: "sk-upstream-0123456789"}}
  gemini: {{api: gemini, base_url: "{url}/gemini/v1beta", api_key: "sk-upstream-0123456789"}}
  cohere: {{api: cohere, base_url: "{url}/cohere/v2", api_key: "sk-upstream-0123456789"}}
  demo: {{api: demo}}
models:
  two: [openai/m, second/m]
  every: [openai/m, anthropic/m, gemini/m, cohere/m]
  text: [openai/m, second/text]
  pulled: [openai/m, demo/fast]
  pushed: [demo/cut, second/m]
  stalled: [demo/stall-midstream, second/m]
middleware:
  - metrics
  - tracking
  - cache
  - continuation: {{{options}}}
  - fallback: {{min_requests: {broken}, failure_rate: 0.5}}
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: {idle}, call_timeout: 10s}}
"""
USAGE = {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}
NATIVE = {"openai": "stop", "second": "stop", "anthropic": "end_turn", "gemini": "STOP", "cohere": "COMPLETE"}


def data(found: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(found).encode()


def openai_chunk(delta: Json, finish: str | None = None, id: str = "first", **fields: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return data({"id": id, "created": 1, "model": "m", "choices": choices, **fields})


def named(kind: str, **fields: Any) -> bytes:
    return b"event: %b\n" % kind.encode() + data({"type": kind, **fields})


def opening(api: str) -> list[bytes]:
    if api == "anthropic":
        message = {
            "id": "msg_1",
            "role": "assistant",
            "content": [],
            "model": "m",
            "usage": {"input_tokens": 20, "output_tokens": 1},
        }
        block = {"type": "text", "text": ""}
        return [named("message_start", message=message), named("content_block_start", index=0, content_block=block)]
    if api == "cohere":
        content = {"content": {"type": "text", "text": ""}}
        start = named("message-start", id="r1", delta={"message": {"role": "assistant"}})
        return [start, named("content-start", index=0, delta={"message": content})]
    return []


def word(api: str, text: str) -> bytes:
    if api == "anthropic":
        return named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
    if api == "gemini":
        return data({"candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}]})
    if api == "cohere":
        return named("content-delta", index=0, delta={"message": {"content": {"text": text}}})
    return openai_chunk({"content": text}, id=api)


def ending(api: str) -> list[bytes]:
    if api == "anthropic":
        stop = named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})
        return [named("content_block_stop", index=0), stop, named("message_stop")]
    if api == "gemini":
        usage = {"promptTokenCount": 20, "candidatesTokenCount": 3, "totalTokenCount": 23}
        return [data({"candidates": [{"content": {"parts": []}, "index": 0, "finishReason": "STOP"}], "usageMetadata": usage})]
    if api == "cohere":
        tokens = {"tokens": {"input_tokens": 20, "output_tokens": 3}}
        return [named("content-end", index=0), named("message-end", delta={"finish_reason": "COMPLETE", "usage": tokens})]
    last: Json = {"id": api, "choices": [], "usage": USAGE}
    return [openai_chunk({}, "stop", id=api), data(last), b"data: [DONE]\n\n"]


def said_by(api: str, words: Sequence[str]) -> list[bytes]:
    return [*opening(api), *(word(api, text) for text in words)]


def says(*words: str, gate: asyncio.Event | None = None) -> Reaction:
    """A whole stream of these words. gate: awaited before the last one."""

    async def answer(asked: Asked, line: Line) -> None:
        api = api_of(asked)
        await line.head()
        await line.chunk(*said_by(api, words[:-1]))
        if gate is not None:
            await gate.wait()
        await line.chunk(word(api, words[-1]) if len(words) > 1 else b"".join(said_by(api, words)), *ending(api))
        await line.end()

    return answer


def breaks(how: str, *words: str, events: Sequence[bytes] = (), gate: asyncio.Event | None = None) -> Reaction:
    """These words (and OpenAI events), then no end. gate: awaited before the break."""

    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(*said_by(api_of(asked), words), *events)
        if gate is not None:
            await gate.wait()
        if how == "cut":
            await line.end()
        elif how == "torn":
            line.hang_up()
        elif how == "reset":
            line.reset()
        elif how == "malformed":
            await line.chunk(b"data: {no json\n\n")
            await line.forever()
        elif how == "error":
            await line.chunk(data({"error": {"message": "Overloaded", "type": "overloaded_error", "code": None}}))
            await line.forever()
        elif how == "filtered":
            await line.chunk(data({"error": {"message": "No.", "type": "invalid_request_error", "code": "content_filter"}}))
            await line.forever()
        else:
            await line.forever()

    return answer


def at_once(*pieces: bytes) -> Reaction:
    """All of it in one write, and the line left open."""

    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(b"".join(pieces))
        await line.forever()

    return answer


def api_of(asked: Asked) -> str:
    return asked.path.split("/")[1]


class Providers(Upstream):
    """plays: by provider, what it does with each request; the last entry is repeated."""

    def __init__(self, **plays: Reaction | list[Reaction]) -> None:
        super().__init__(self._play)
        self.plays = {name: play if isinstance(play, list) else [play] for name, play in plays.items()}

    async def _play(self, asked: Asked, line: Line) -> None:
        plays = self.plays[api_of(asked)]
        await (plays.pop(0) if len(plays) > 1 else plays[0])(asked, line)

    @property
    def order(self) -> list[str]:
        return [api_of(asked) for asked in self.asked]


@asynccontextmanager
async def running(
    providers: Providers, options: str = "on_break: continue", idle: str = "5s", broken: int = 1000
) -> AsyncIterator[Gateway]:
    async with providers, gateway(providers.url, CONFIG, options=options, idle=idle, broken=str(broken)) as running:
        yield running


async def asked_of(providers: Providers, options: str = "on_break: continue", idle: str = "5s", **body: Any) -> Answer:
    async with running(providers, options, idle) as it:
        return await ask(it.port, chat(body.pop("model", "two"), **body))


def whole_stream(answer: Answer, text: str) -> None:
    """It has this text, one role, one finish reason, one id and time, and an end."""
    assert answer.text == text
    assert answer.done
    assert answer.error is None
    choices = [choice for chunk in answer.chunks for choice in chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert sum("role" in choice["delta"] for choice in choices) == 1
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in answer.chunks}) == 1


def comments(answer: Answer) -> list[str]:
    return [block for block in answer.body.decode().split("\n\n") if block.startswith(":")]


# Whether at all


async def test_off_by_default() -> None:
    providers = Providers(openai=breaks("cut", "Hello"), second=says(" world"))
    answer = await asked_of(providers, options="")
    assert answer.error is not None
    assert answer.error["code"] == "upstream_cut"
    assert providers.order == ["openai"]


@pytest.mark.parametrize("place", ["top", "penstock", "orq"])
async def test_a_request_switches_it_on_and_the_provider_never_sees_the_field(place: str) -> None:
    providers = Providers(openai=breaks("cut", "Hello"), second=says(" world"))
    own: Json = {"on_break": "continue"}
    answer = await asked_of(providers, options="", **(own if place == "top" else {place: own}))
    whole_stream(answer, "Hello world")
    assert all(b"on_break" not in asked.body for asked in providers.asked)


async def test_a_request_switches_it_off() -> None:
    answer = await asked_of(Providers(openai=breaks("cut", "Hello"), second=says(" world")), on_break="error")
    assert answer.error is not None


async def test_an_operator_forbids_it() -> None:
    providers = Providers(openai=breaks("cut", "Hello"), second=says(" world"))
    assert (await asked_of(providers, options="max_continues: 0", on_break="continue")).error is not None


async def test_another_word_is_a_400_by_its_path() -> None:
    providers = Providers(openai=says("Hello"))
    answer = await asked_of(providers, penstock={"on_break": "go on"})
    assert (answer.status, answer.json["error"]["param"]) == (400, "penstock.on_break")
    assert providers.asked == []


# The seam


@pytest.mark.parametrize("how", ["cut", "torn", "malformed", "error", "stall"])
async def test_every_abnormal_end_is_gone_on_from(how: str) -> None:
    providers = Providers(openai=breaks(how, "Hello", " wide"), second=says(" world", "!"))
    answer = await asked_of(providers, idle="300ms")
    whole_stream(answer, "Hello wide world!")
    reason = {"cut": "upstream_cut", "torn": "upstream_cut", "malformed": "malformed"}
    reason |= {"error": "upstream_error", "stall": "timeout_idle"}
    seam = {"continued": {"from": "openai/m", "to": "second/m", "reason": reason[how]}}
    assert [chunk.get("penstock") for chunk in answer.chunks] == [None, None, seam, *[None] * (len(answer.chunks) - 3)]
    assert comments(answer) == [": penstock continued by second/m"]


async def test_a_reset_is_gone_on_from() -> None:
    """It drops what is still queued, so it comes when the client has the words."""
    seen = asyncio.Event()
    providers = Providers(openai=breaks("reset", "Hello", " wide", gate=seen), second=says(" world"))
    async with running(providers) as it:
        with await connected(it.port) as client:
            await client.post(chat("two"))
            await client.read_until(b" wide")
            seen.set()
            body = await client.read_until(b"[DONE]")
    assert b'"penstock":{"continued":{"from":"openai/m","to":"second/m","reason":"upstream_cut"}}' in body
    assert body.count(b" world") == 1


@pytest.mark.parametrize("last", ["anthropic", "gemini", "cohere"])
async def test_every_format_breaks_and_goes_on(last: str) -> None:
    """One reply in four pieces, of four formats."""
    order = {"anthropic": [], "gemini": ["anthropic"], "cohere": ["anthropic", "gemini"]}[last]
    plays = {name: breaks("cut", f" {name}") for name in ["openai", *order]}
    answer = await asked_of(
        Providers(**plays, **{last: says(f" {last}", " end")}), "on_break: continue, max_continues: 3", model="every"
    )
    whole_stream(answer, "".join(f" {name}" for name in ["openai", *order, last, "end"]))
    assert answer.chunks[-1]["choices"][0]["native_finish_reason"] == NATIVE[last]
    assert len(comments(answer)) == len(order) + 1


async def test_the_comment_stands_right_before_the_first_chunk_of_the_other() -> None:
    answer = await asked_of(Providers(openai=breaks("cut", "Hello"), second=says(" world")))
    blocks = answer.body.decode().split("\n\n")
    place = blocks.index(": penstock continued by second/m")
    assert '"Hello"' in blocks[place - 1]
    assert '" world"' in blocks[place + 1]


async def test_the_next_target_is_told_what_was_said_and_to_go_on() -> None:
    providers = Providers(openai=breaks("cut", "Hello", " "), second=says("world"))
    await asked_of(providers, options="on_break: continue, instruction: Go on.", temperature=0.5, max_tokens=100)
    first, then = (asked.json for asked in providers.asked)
    told = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Go on."}]
    assert then["messages"] == [*first["messages"], *told]
    assert {name: then[name] for name in ("temperature", "max_tokens")} == {"temperature": 0.5, "max_tokens": 98}


@pytest.mark.parametrize(
    ("style", "mark", "further"),
    [("message", {}, {}), ("prefix", {"prefix": True}, {}), ("final", {}, {"continue_final_message": True})],
)
async def test_a_model_that_takes_prefill_gets_the_text_to_go_on_from(style: str, mark: Json, further: Json) -> None:
    providers = Providers(openai=breaks("cut", "Hello "), second=says(" world"))
    answer = await asked_of(providers, f'on_break: continue, prefill: {{"second/*": {style}}}')
    whole_stream(answer, "Hello world")
    body = providers.asked[1].json
    assert body["messages"][1:] == [{"role": "assistant", "content": "Hello", **mark}]
    assert {name: body[name] for name in further} == further


async def test_prefill_reaches_anthropic_as_its_last_turn() -> None:
    providers = Providers(openai=breaks("cut", "Hello"), anthropic=says(" world"))
    whole_stream(await asked_of(providers, 'on_break: continue, prefill: {"anthropic/*": message}', model="every"), "Hello world")
    assert [turn["role"] for turn in providers.asked[1].json["messages"]] == ["user", "assistant"]


async def test_a_prefill_of_the_clients_own_is_lengthened() -> None:
    providers = Providers(openai=breaks("cut", " two"), second=says(" three"))
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One"}]
    await asked_of(providers, 'on_break: continue, prefill: {"second/m": message}', messages=messages)
    assert providers.asked[1].json["messages"] == [messages[0], {"role": "assistant", "content": "One two"}]


@pytest.mark.parametrize(
    "pieces", [[" wide world", " again"], [" wi", "de", " wor", "ld", " again"], ["Hello wide", " world again"]]
)
async def test_what_the_other_repeats_is_removed_however_it_is_split(pieces: list[str]) -> None:
    answer = await asked_of(Providers(openai=breaks("cut", "Hello", " wide", " world"), second=says(*pieces)))
    whole_stream(answer, "Hello wide world again")


async def test_a_reply_that_only_repeats_ends_the_text_as_it_was() -> None:
    answer = await asked_of(Providers(openai=breaks("cut", "Hello", " world"), second=says(" wor", "ld")))
    whole_stream(answer, "Hello world")
    assert answer.chunks[-1]["penstock"]["continued"]["to"] == "second/m"
    assert len(comments(answer)) == 1


async def test_the_same_target_goes_on_where_there_is_no_other() -> None:
    providers = Providers(openai=[breaks("cut", "Hello"), says(" world")])
    answer = await asked_of(providers, model="openai/m")
    whole_stream(answer, "Hello world")
    assert providers.order == ["openai", "openai"]


async def test_the_same_target_is_not_asked_while_its_circuit_is_open() -> None:
    providers = Providers(openai=[breaks("cut", "Hello"), says(" world")])
    async with running(providers, broken=1) as it:
        answer = await ask(it.port, chat("openai/m"))
    assert answer.error is not None
    assert answer.error["code"] == "upstream_cut"
    assert providers.order == ["openai"]


async def test_a_target_that_refuses_prefill_is_asked_with_the_instruction() -> None:
    refuses = whole(b'{"error":{"message":"no prefill"}}', 400)
    providers = Providers(openai=breaks("cut", "Hello"), second=[refuses, says(" world")])
    answer = await asked_of(providers, 'on_break: continue, prefill: {"second/*": message}')
    whole_stream(answer, "Hello world")
    assert [asked.json["messages"][-1]["role"] for asked in providers.asked] == ["user", "assistant", "user"]


async def test_a_target_that_cannot_go_on_is_passed_over() -> None:
    refuses = whole(b'{"error":{"message":"too long"}}', 400)
    providers = Providers(openai=breaks("cut", "a"), anthropic=refuses, gemini=breaks("cut", " b"), cohere=says(" c"))
    whole_stream(await asked_of(providers, "on_break: continue", model="every"), "a b c")
    assert providers.order == ["openai", "anthropic", "gemini", "cohere"]


async def test_not_more_often_than_max_continues() -> None:
    first, second = [breaks("cut", " a"), breaks("error", " c")], [breaks("torn", " b"), breaks("cut", " d")]
    providers = Providers(openai=first, second=second)
    answer = await asked_of(providers, "on_break: continue, max_continues: 3")
    assert answer.text == " a b c d"
    assert (answer.error or {})["code"] == "upstream_cut"
    assert not answer.done
    assert len(providers.asked) == 4


async def test_where_nobody_goes_on_the_client_hears_of_the_break_itself() -> None:
    providers = Providers(openai=breaks("malformed", "Hello"), second=whole(b'{"error":{"message":"no"}}', 500))
    answer = await asked_of(providers)
    assert answer.text == "Hello"
    assert (answer.error or {})["code"] == "upstream_malformed"


async def test_a_provider_that_answers_whole_goes_on_too() -> None:
    message = {"role": "assistant", "content": " world"}
    body = {"id": "w", "created": 9, "model": "m", "usage": USAGE}
    body["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
    whole_stream(await asked_of(Providers(openai=breaks("cut", "Hello"), second=whole(json.dumps(body).encode()))), "Hello world")


async def test_a_provider_that_can_only_be_pulled_goes_on_in_a_stream_that_is_pushed() -> None:
    providers = Providers(openai=breaks("cut", "This is Penstock's"))
    answer = await asked_of(providers, 'on_break: continue, prefill: {"demo/*": message}', model="pulled")
    whole_stream(answer, "This is Penstock's demo provider; it has no model behind it. You said: Hi")


async def test_a_provider_that_pushes_goes_on_in_a_stream_that_is_pulled() -> None:
    whole_stream(await asked_of(Providers(second=says(" own", " words")), model="pushed"), "This is Penstock's own words")


@pytest.mark.parametrize("model", ["two", "text"])
async def test_text_completions_go_on_in_both_ways(model: str) -> None:
    async def completes(asked: Asked, line: Line) -> None:
        choice = {"index": 0, "text": " world", "finish_reason": "stop"}
        await line.head()
        await line.chunk(data({"id": "t", "created": 3, "model": "m", "choices": [choice]}), b"data: [DONE]\n\n")
        await line.end()

    providers = Providers(openai=breaks("cut", "Hello"), second=says(" world") if model == "two" else completes)
    async with running(providers) as it:
        answer = await ask(it.port, {"model": model, "prompt": "Say: ", "stream": True}, "/v1/completions")
    assert "".join(choice["text"] for chunk in answer.chunks for choice in chunk["choices"]) == "Hello world"
    assert answer.done
    assert comments(answer) == [f": penstock continued by second/{'m' if model == 'two' else 'text'}"]
    assert (providers.asked[1].json.get("prompt") == "Say: Hello") is (model == "text")


# When not


TOOL = openai_chunk({"tool_calls": [{"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a'}}]})
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
THOUGHT = openai_chunk({"reasoning_content": "Hm"})


@pytest.mark.parametrize(
    ("body", "events"),
    [
        ({}, [TOOL]),
        ({"response_format": SCHEMA}, []),
        ({"response_format": {"type": "json_object"}}, []),
        ({"guided_json": {"type": "object"}}, []),
        ({"n": 2}, []),
        ({"logprobs": True}, []),
        ({"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "wav"}}, []),
        ({}, [openai_chunk({"refusal": "I"})]),
    ],
    ids=["tool-call", "json_schema", "json_object", "guided", "n", "logprobs", "audio", "refusal"],
)
async def test_what_is_no_plain_text_ends_with_its_break(body: Json, events: list[bytes]) -> None:
    providers = Providers(openai=breaks("cut", "Hello", events=events), second=says(" world"))
    answer = await asked_of(providers, **body)
    assert (answer.error or {})["code"] == "upstream_cut"
    assert providers.order == ["openai"]


async def test_thoughts_without_text_are_not_gone_on_from() -> None:
    providers = Providers(openai=breaks("cut", events=[THOUGHT]), second=says("Hello"))
    assert (await asked_of(providers)).error is not None
    assert providers.order == ["openai"]


async def test_thoughts_before_text_stay_and_those_about_going_on_are_left_out() -> None:
    async def thinks(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(THOUGHT, word("second", " world"), *ending("second"))
        await line.end()

    async def breaks_off(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(THOUGHT, openai_chunk({"content": "Hello"}))
        await line.end()

    answer = await asked_of(Providers(openai=breaks_off, second=thinks))
    whole_stream(answer, "Hello world")
    assert [c["choices"][0]["delta"].get("reasoning_content") for c in answer.chunks if c["choices"]].count("Hm") == 1


async def test_a_filters_verdict_is_no_break() -> None:
    providers = Providers(openai=breaks("filtered", "Hello"), second=says(" world"))
    assert (await asked_of(providers)).error is not None
    assert providers.order == ["openai"]


async def test_the_total_timeout_is_no_break_and_bounds_the_asking() -> None:
    providers = Providers(openai=breaks("cut", "Hello"), second=breaks("stall", " world"))
    answer = await asked_of(providers, timeout={"total_timeout": 1000})
    assert answer.text == "Hello world"
    assert (answer.error or {})["code"] == "timeout_total"
    assert providers.order == ["openai", "second"]


async def test_a_reply_that_is_too_long_ends_with_its_break() -> None:
    providers = Providers(openai=breaks("cut", *["word "] * 20), second=says("end"))
    assert (await asked_of(providers, "on_break: continue, max_text: 1KiB")).error is not None


@pytest.mark.parametrize(
    ("model", "when"), [("two", "before"), ("two", "asking"), ("two", "after"), ("pushed", "asking"), ("pushed", "after")]
)
async def test_a_client_that_leaves_ends_whatever_is_open(model: str, when: str, lines: list[Json]) -> None:
    """In a stream that is pushed, and in one that is pulled."""
    never = asyncio.Event()

    async def silent(asked: Asked, line: Line) -> None:
        await never.wait()

    then: Reaction = silent if when == "asking" else says(" wide", " world", gate=never)
    providers = Providers(openai=breaks("stall" if when == "before" else "cut", "Hello"), second=then)
    asked = 1 if when == "before" or model == "pushed" else 2
    async with running(providers) as it:
        with await connected(it.port) as client:
            await client.post(chat(model))
            await client.read_until(b" wide" if when == "after" else b"content")
            await until(lambda: len(providers.asked) == asked)
        await until(lambda: not providers.open)
        await until(lambda: any(line.get("event") == "request" for line in lines))
    assert len(providers.asked) == asked
    assert [line["outcome"] for line in lines if line["event"] == "request"] == ["client_gone"]


@pytest.mark.parametrize(("model", "when"), [("two", "before"), ("stalled", "before"), ("two", "asking"), ("pushed", "asking")])
async def test_draining_is_no_break_and_ends_the_asking(model: str, when: str) -> None:
    never = asyncio.Event()

    async def silent(asked: Asked, line: Line) -> None:
        await never.wait()

    providers = Providers(openai=breaks("stall" if when == "before" else "cut", "Hello"), second=silent)
    asked = {"two": 1, "stalled": 0, "pushed": 0}[model] + (when == "asking")
    async with running(providers) as it:
        with await connected(it.port) as client:
            await client.post(chat(model))
            await client.read_until(b"content")
            await until(lambda: len(providers.asked) == asked)
            await it.drain()
            assert b'"code":"draining"' in await client.read_to_end()
        await until(lambda: not providers.open)
    assert len(providers.asked) == asked


# Nothing sent yet


@pytest.mark.parametrize("on_break", ["restart_if_unsent", "continue"])
async def test_what_broke_before_any_of_it_was_handed_on_is_asked_again_silently(on_break: str, lines: list[Json]) -> None:
    """The first chunk and the fault come in one read."""
    providers = Providers(openai=at_once(word("openai", "Hello"), b"data: {no json\n\n"), second=says("Good", " day"))
    answer = await asked_of(providers, f"on_break: {on_break}", stream_options={"include_usage": True})
    whole_stream(answer, "Good day")
    assert comments(answer) == []
    assert all("penstock" not in chunk for chunk in answer.chunks)
    assert providers.asked[1].json["messages"] == providers.asked[0].json["messages"]
    line = next(line for line in lines if line["event"] == "request")
    assert line["outcome"] == "completed"
    assert line["switches"] == [{"from": "openai/m", "to": "second/m", "reason": "malformed", "at": 0}]


async def test_restart_if_unsent_never_goes_on_from_text() -> None:
    providers = Providers(openai=breaks("cut", "Hello"), second=says(" world"))
    assert (await asked_of(providers, "on_break: restart_if_unsent")).error is not None
    assert providers.order == ["openai"]


async def test_a_client_that_does_not_stream_has_nothing_before_the_end() -> None:
    """The provider streams although it was not asked to; all that came is forgotten."""
    providers = Providers(openai=breaks("cut", "Hello", " wide"), second=says("Good", " day"))
    answer = await asked_of(providers, "on_break: restart_if_unsent", stream=False)
    assert answer.json["choices"][0]["message"]["content"] == "Good day"
    assert answer.json["id"] == "second"


# What is told


async def test_usage_is_the_sum_and_says_what_is_an_estimate() -> None:
    providers = Providers(openai=breaks("cut", "Hello", " wide"), second=says(" world"))
    answer = await asked_of(providers, "on_break: continue, instruction: Continue", stream_options={"include_usage": True})
    # 10 bytes were said: 3 tokens; the instruction is 2 more that the first prompt did not have.
    first = {"target": "openai/m", "prompt_tokens": 15, "completion_tokens": 3, "total_tokens": 18, "estimated": True}
    usage = answer.chunks[-1]["usage"]
    assert usage["penstock"]["calls"] == [first, {"target": "second/m", **USAGE}]
    assert {name: usage[name] for name in USAGE} == {"prompt_tokens": 35, "completion_tokens": 6, "total_tokens": 41}


async def test_log_line_metric_and_trailer_tell_what_the_head_could_not(lines: list[Json]) -> None:
    async with running(Providers(openai=breaks("cut", "Hello"), second=says(" world"))) as it:
        answer = await ask(it.port, chat("two"))
        page = (await ask_for(it.port, "/metrics")).decode()
    assert (answer.headers["X-Penstock-Target"], answer.headers["X-Penstock-Attempts"]) == ("openai/m", "1")
    line = next(line for line in lines if line["event"] == "request")
    assert line["outcome"] == "continued"
    assert line["switches"] == [{"from": "openai/m", "to": "second/m", "reason": "upstream_cut", "at": 5}]
    assert 'penstock_continuations_total{reason="upstream_cut",result="continued"} 1.0' in page
    assert 'outcome="continued"' in page
    assert 'error_type="",' in page or 'error_type=""}' in page


async def test_the_circuit_of_the_one_that_broke_hears_of_it_and_the_others_of_success() -> None:
    async with running(Providers(openai=breaks("cut", "Hello"), second=says(" world"))) as it:
        await ask(it.port, chat("two"))
        shown = json.loads(await ask_for(it.port, "/readyz?verbose"))
    targets = find(shown, "targets")
    assert (targets["openai/m"]["completed"], targets["openai/m"]["failed"]) == (0, 1)
    assert (targets["second/m"]["completed"], targets["second/m"]["failed"]) == (1, 0)


async def test_a_continued_reply_is_one_entry_of_the_cache_without_its_comment() -> None:
    providers = Providers(openai=breaks("cut", "Hello"), second=says(" world"))
    async with running(providers) as it:
        for hit in ("miss", "hit"):
            answer = await ask(it.port, chat("two", cache={"ttl": 60}))
            assert answer.headers["X-Cache"] == hit
            whole_stream(answer, "Hello world")
        folded = await ask(it.port, chat("two", stream=False, cache={"ttl": 60}))
    assert comments(answer) == []
    assert folded.json["choices"][0]["message"]["content"] == "Hello world"
    assert len(providers.asked) == 2


async def test_the_official_sdk_reads_a_continued_stream() -> None:
    async with running(Providers(openai=breaks("cut", "Hello"), second=says(" wide", " world"))) as it:
        sdk = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{it.port}/v1", api_key="sk-anything", max_retries=0)
        async with sdk, sdk.chat.completions.stream(
            model="two", messages=[{"role": "user", "content": "Hi"}], stream_options={"include_usage": True}
        ) as stream:  # fmt: skip
            told = [getattr(e.chunk, "penstock", None) async for e in stream if e.type == "chunk"]
            completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == "Hello wide world"
    assert completion.usage is not None
    assert completion.usage.total_tokens > USAGE["total_tokens"]
    assert [found["continued"]["to"] for found in told if found] == ["second/m"]


async def test_a_slow_client_holds_up_the_one_that_goes_on_too() -> None:
    """Paused over the seam: nothing is lost, and what the gateway holds stays bounded."""
    long = ["x" * 2000 + " "] * 400
    providers = Providers(openai=breaks("cut", *long), second=says(*["y" * 2000 + " "] * 400))
    async with running(providers, "on_break: continue, max_text: 8MiB") as it:
        with await connected(it.port, receive_buffer=8192) as client:
            await client.post(chat("two"))
            body = await client.read_until(b"data: [DONE]")
    assert body.count(b"x" * 2000) == 400
    assert body.count(b"y" * 2000) == 400


async def test_nothing_is_left_over() -> None:
    providers = Providers(openai=breaks("cut", "Hello"), second=says(" world"))
    async with running(providers) as it:
        await ask(it.port, chat("two"))
        before = len(asyncio.all_tasks())
        for _ in range(5):
            await ask(it.port, chat("two"))
        await until(lambda: len(asyncio.all_tasks()) <= before)


async def ask_for(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    found = await reader.read()
    writer.close()
    return found.split(b"\r\n\r\n", 1)[1]


def find(shown: Any, name: str) -> Any:
    """The first value under `name`, at any depth."""
    if isinstance(shown, dict):
        if name in shown:
            return shown[name]
        return next((found for value in shown.values() if (found := find(value, name)) is not None), None)
    if isinstance(shown, list):
        return next((found for value in shown if (found := find(value, name)) is not None), None)
    return None


async def test_the_curl_of_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "continuation.md").read_text()
    config = next(block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "demo/cut" in block)
    curl = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0]
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    async with Gateway(parse("server: {port: 0}\n" + config, {}, TABLE)) as it:
        command = curl.replace("127.0.0.1:8080", f"127.0.0.1:{it.port}")
        process = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
    answer = answer_of(200, {"Content-Type": "text/event-stream"}, out)
    whole_stream(answer, "This is Penstock's demo provider; it has no model behind it. You said: Hello")
    assert comments(answer) == [": penstock continued by demo/echo"]
