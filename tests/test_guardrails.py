"""Guardrails at the socket: every wire format, streamed and whole, in and out; what is blocked, redacted, put back, and told."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import aiohttp
import openai
import orjson
import pytest
import structlog

from middleware import TABLE
from middleware.guardrails import Guardrails
from middleware.guardrails.options import RuleOptions
from proxy.call import Call
from proxy.config import ConfigError, parse
from proxy.reply import Batch, Head, Reply, Trailer
from tests.support.formats import ARGUMENTS, FORMATS, TEXT, THOUGHT
from tests.support.gateway import CONFIG, Answer, ask, chat, gateway, until
from tests.support.guardrails import PEM
from tests.support.rawclient import connected
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
LAYERS = """  - metrics
  - tracking
  - guardrails: {options}
  - cache
  - fallback
"""
GUARDED = CONFIG.replace("  - tracking\n", LAYERS)
REDACT = "{rules: [pii, secrets]}"
RESTORE = "{rules: [pii, secrets], restore: true}"
DENY = "{rules: [{kind: deny, id: titan, words: [Project Titan]}]}"
CARD = "4111 1111 1111 1111"


def event(delta: Json, finish: str | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % orjson.dumps({"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": choices})


END = [event({}, "stop"), b"data: [DONE]\n\n"]


def words(*texts: str) -> list[bytes]:
    return [*(event({"content": text}) for text in texts), *END]


def completion(text: str, **message: Any) -> bytes:
    choices = [{"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}]
    return orjson.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices})


def user(text: str, **fields: Any) -> Json:
    return chat(messages=[{"role": "user", "content": text}], **fields)


async def answered(pieces: list[bytes], options: str, body: Json | None = None) -> tuple[Answer, Upstream]:
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        return await ask(running.port, body or chat()), upstream


def told(answer: Answer) -> list[Json]:
    """What the last chunk says of guardrails."""
    found: list[Json] = (answer.chunks[-1] if answer.events else answer.json).get("penstock", {}).get("guardrails", [])
    return found


# Out: every wire format


def with_secrets(body: bytes) -> bytes:
    """The representative stream, with things in it that may not come through."""
    for part, secret in ((TEXT[:3], "Mail jo@exa"), (TEXT[3:], "mple.com now"), (TEXT, "Mail jo@example.com now"),
                         (THOUGHT, f"Card {CARD}. "), (ARGUMENTS[8:-2], "DE89370400440532013000")):  # fmt: skip
        body = body.replace(part.encode(), secret.encode())
    return body


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("api", FORMATS)
async def test_nothing_that_matches_comes_through_in_any_wire_format(api: str, size: int) -> None:
    body = with_secrets(FORMATS[api].body)
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        answer = await ask(running.port, chat(f"{api}/m"))
        assert (answer.status, answer.done) == (200, True)
        for secret in (b"jo@", b"exa", b"4111", b"1111", b"DE89", b"3704"):
            assert secret not in answer.body
        deltas = [choice["delta"] for one in answer.chunks for choice in one["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert answer.text == "Mail [EMAIL_1] now"
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Card [CARD_1]. "
        assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"sea": "[IBAN_1]"}
        assert {one["id"] for one in told(answer)} == {"pii"}


@pytest.mark.parametrize("api", FORMATS)
async def test_whole_replies_are_looked_at_like_streams(api: str) -> None:
    body = with_secrets(FORMATS[api].whole)
    async with Upstream(whole(body)) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        answer = await ask(running.port, chat(f"{api}/m", stream=False))
        assert answer.json["choices"][0]["message"]["content"] == "Mail [EMAIL_1] now"
        assert told(answer) == [{"id": "pii", "action": "redact", "on": "output"}]
        assert answer.json["choices"][0]["finish_reason"]


@pytest.mark.parametrize("stream_it", [True, False])
async def test_a_reply_without_any_match_is_what_it_is_without_guardrails(stream_it: bool) -> None:
    options: Json = {"stream_options": {"include_usage": True}} if stream_it else {}
    body = chat(stream=stream_it, **options)
    answers = []
    for rules in (REDACT, "{rules: []}"):
        async with Upstream(stream(FORMATS["openai"].events)) as upstream, gateway(upstream.url, GUARDED, options=rules) as run:
            answers.append(await ask(run.port, body))
    first, second = ([{**one, "created": 0} for one in (answer.chunks or [answer.json])] for answer in answers)
    assert first == second
    assert answers[0].done is stream_it


async def test_completions_are_looked_at_on_their_own_face() -> None:
    async with Upstream(stream(words("It is jo@", "x.com."))) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as run:
        answer = await ask(run.port, {"model": "openai/m", "prompt": "mail a@b.io", "stream": True}, "/v1/completions")
        assert "".join(one["choices"][0]["text"] for one in answer.chunks if one["choices"]) == "It is [EMAIL_2]."
        assert upstream.asked[0].json["messages"] == [{"role": "user", "content": "mail [EMAIL_1]"}]


# Out: blocked


async def test_a_block_before_the_first_chunk_is_a_400_and_the_upstream_is_closed() -> None:
    async def talks(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "Project"}), event({"content": " Titan "}))
        await line.forever()

    for stream_it in (True, False):
        async with Upstream(talks) as upstream, gateway(upstream.url, GUARDED, options=DENY) as running:
            with structlog.testing.capture_logs() as lines:
                answer = await ask(running.port, chat(stream=stream_it))
            assert (answer.status, answer.error) == (400, {
                "message": "The guardrail 'titan' does not let the reply through.",
                "type": "content_filter", "param": None, "code": "content_filter",
            })  # fmt: skip
            await until(lambda upstream=upstream: upstream.open == 0)
            assert [line["outcome"] for line in lines if line["event"] == "request"] == ["blocked"]


async def test_a_block_in_the_stream_ends_it_cleanly_and_closes_the_upstream() -> None:
    async def talks(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "We call it"}), event({"content": " the"}))
        await until(lambda: received)
        await line.chunk(event({"content": " Pro"}), event({"content": "ject Ti"}), event({"content": "tan now"}))
        await line.forever()

    received = bytearray()
    async with Upstream(talks) as upstream, gateway(upstream.url, GUARDED, options=DENY) as running:
        with structlog.testing.capture_logs() as lines, await connected(running.port) as client:
            await client.post(chat())
            received += await client.read_until(b"call it")
            text = (await client.read_until(b"[DONE]")).decode().partition("\r\n\r\n")[2]
            await until(lambda: upstream.open == 0)
            await until(lambda: any(line["event"] == "request" for line in lines))
        for part in ("Pro", "ject Ti", "Ti", "tan now"):
            assert part not in text, "no part of the match was ever sent"
        last = json.loads(text.split("data: ")[-2])
        assert last["choices"][0] == {
            "index": 0, "delta": {}, "finish_reason": "content_filter", "native_finish_reason": "penstock:guardrails",
        }  # fmt: skip
        assert last["penstock"] == {"guardrails": [{"id": "titan", "action": "block", "on": "output"}]}
        (line,) = (line for line in lines if line["event"] == "request")
        assert (line["outcome"], line["status"], line["finish_reasons"]) == ("filtered", 200, ["content_filter"])
        assert 'penstock_guardrails_total{action="block",on="output",rule="titan"} 1.0' in await metrics(running.port)


async def metrics(port: int) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
        return await response.text()


async def test_the_sdk_sees_a_content_filter_and_a_bad_request() -> None:
    seen: list[str | None] = []

    async def talks(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "It is called"}), event({"content": " Pro"}))
        if asked.json.get("stream"):
            await until(lambda: seen)
        await line.chunk(*words("ject Titan ", "and "))
        await line.end()

    async with (
        Upstream(talks) as upstream,
        gateway(upstream.url, GUARDED, options=DENY) as running,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any", max_retries=0) as sdk,
    ):
        request: Json = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}]}
        async for chunk in await sdk.chat.completions.create(stream=True, **request):
            seen.append(chunk.choices[0].delta.content)
            reason = chunk.choices[0].finish_reason
        assert (seen, reason) == (["It is called", " ", None], "content_filter")
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.chat.completions.create(**request)
        assert caught.value.code == "content_filter"
        request["messages"][0]["content"] = "What is Project Titan?"
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content"):
            await sdk.chat.completions.create(**request)


@pytest.mark.parametrize("stream_it", [True, False])
async def test_a_reply_that_can_only_be_pulled_is_looked_at_too(stream_it: bool) -> None:
    async with gateway(config=GUARDED, options="{rules: [{kind: email, on: output}]}") as running:
        answer = await ask(running.port, user("Please write to jo@example.com today", model="demo/fast", stream=stream_it))
        assert b"jo@" not in answer.body
        text = answer.text if stream_it else answer.json["choices"][0]["message"]["content"]
        assert text.endswith("You said: Please write to [EMAIL_1] today")
        assert answer.done is stream_it


async def test_a_broken_stream_stays_broken_and_what_was_held_is_not_sent() -> None:
    async def breaks(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "Hello you, "}), event({"content": "jo@example"}))
        line.hang_up()

    async with Upstream(breaks) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        answer = await ask(running.port, chat())
        assert answer.error is not None
        assert (answer.error["code"], answer.done, b"jo@" in answer.body) == ("upstream_cut", False, False)


async def test_a_client_that_leaves_closes_the_upstream() -> None:
    async def talks(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "Hello"}), event({"content": " you"}))
        await line.forever()

    async with Upstream(talks) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b"Hello")
        await until(lambda: upstream.open == 0)

    async def holds(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "Hello"}))
        await line.forever()

    async with Upstream(holds) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        with await connected(running.port) as client:
            await client.post(chat())
            await until(lambda: upstream.open == 1)
        await until(lambda: upstream.open == 0)


async def test_the_next_target_s_reply_is_looked_at_as_well() -> None:
    async def answer(asked: Asked, line: Line) -> None:
        fails = asked.json["model"] == "bad"
        await (whole(b"{}", 500) if fails else stream(words("I am jo@", "x.com.")))(asked, line)

    async with Upstream(answer) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        found = await ask(running.port, chat("openai/bad", fallbacks=["openai/good"]))
        assert (found.text, found.headers["X-Penstock-Target"]) == ("I am [EMAIL_1].", "openai/good")


# In

EVERYWHERE: Json = {
    "messages": [
        {"role": "system", "content": "Reply to a@b.io."},
        {"role": "user", "content": [{"type": "text", "text": f"Card {CARD}"},
                                     {"type": "image_url", "image_url": {"url": "a@b.io"}}]},
        {"role": "assistant", "content": None, "reasoning_content": "a@b.io",
         "reasoning_details": [{"type": "reasoning.text", "text": "a@b.io", "signature": "s"}],
         "tool_calls": [{"id": "t", "type": "function",
                         "function": {"name": "f", "arguments": '{"to":"a@b.io","n":4111111111111111}'}}]},
        {"role": "tool", "tool_call_id": "t", "content": "sent to c@d.io"},
        {"role": "user", "content": f"Again a@b.io, [EMAIL_2]\n{PEM}"},
    ],
}  # fmt: skip


async def test_all_text_of_a_request_is_redacted_and_the_same_value_is_the_same_placeholder() -> None:
    async with Upstream(stream(words("Ok "))) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        answer = await ask(running.port, chat("openai/m", **EVERYWHERE))
        sent = upstream.asked[0].json["messages"]
    assert sent[0]["content"] == "Reply to [EMAIL_1]."
    assert sent[1]["content"][0]["text"] == "Card [CARD_1]"
    assert sent[1]["content"][1] == EVERYWHERE["messages"][1]["content"][1]
    assert json.loads(sent[2]["tool_calls"][0]["function"]["arguments"]) == {"to": "[EMAIL_1]", "n": "[CARD_2]"}
    assert sent[3]["content"] == "sent to [EMAIL_3]", "the second is the client's own"
    assert sent[4]["content"] == "Again [EMAIL_1], [EMAIL_2]\n[PRIVATE_KEY_1]"
    assert answer.headers["X-Penstock-Guardrails"] == "pii;action=redact;on=input, secrets;action=redact;on=input"


@pytest.mark.parametrize(
    ("body", "path", "param"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": f"x {CARD}"}]}, "chat/completions",
         "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": CARD}]}]}, "chat/completions",
         "messages[0].content[0].text"),
        ({"prompt": f"My card is {CARD}"}, "completions", "prompt"),
        ({"input": ["fine", CARD]}, "embeddings", "input[1]"),
    ],
)  # fmt: skip
async def test_a_blocked_request_is_a_400_with_the_path_and_nobody_is_asked(body: Json, path: str, param: str) -> None:
    options = "{rules: [{kind: card, action: block}]}"
    async with Upstream(stream(words("Hi"))) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        with structlog.testing.capture_logs() as lines:
            answer = await ask(running.port, {"model": "openai/m", **body}, f"/v1/{path}")
        assert answer.error is not None
        assert (answer.status, answer.error["code"], answer.error["type"]) == (400, "content_filter", "content_filter")
        assert answer.error["param"] == param
        assert upstream.asked == []
        assert "4111" not in answer.body.decode() + repr(lines) + await metrics(running.port)


async def test_embeddings_are_redacted_and_their_reply_passes() -> None:
    body = b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.1]}],"model":"m"}'
    async with Upstream(whole(body)) as upstream, gateway(upstream.url, GUARDED, options=RESTORE) as running:
        answer = await ask(running.port, {"model": "openai/m", "input": ["a@b.io", "x"]}, "/v1/embeddings")
        assert upstream.asked[0].json["input"] == ["[EMAIL_1]", "x"]
        assert answer.json["data"][0]["embedding"] == [0.1]


async def test_what_is_only_flagged_passes_and_is_told() -> None:
    options = "{rules: [{kind: email, action: flag}]}"
    async with Upstream(stream(words("a@", "b.io."))) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        answer = await ask(running.port, user("I am me@x.com"))
        assert upstream.asked[0].json["messages"][0]["content"] == "I am me@x.com"
        assert (answer.text, answer.headers["X-Penstock-Guardrails"]) == ("a@b.io.", "email;action=flag;on=input")
        assert told(answer) == [{"id": "email", "action": "flag", "on": side} for side in ("input", "output")]
        body = await metrics(running.port)
        for side in ("input", "output"):
            assert f'penstock_guardrails_total{{action="flag",on="{side}",rule="email"}} 1.0' in body


@pytest.mark.parametrize(
    ("options", "text", "status"),
    [
        ("{rules: [{kind: length, max_characters: 5}]}", "12345", 200),
        ("{rules: [{kind: length, max_characters: 5}]}", "123456", 400),
        ("{rules: [{kind: length, max_tokens: 2}]}", "12345678", 200),
        ("{rules: [{kind: length, max_tokens: 2}]}", "123456789", 400),
        ("{rules: [{kind: length, max_tokens: 2, action: flag}]}", "123456789", 200),
    ],
)
async def test_the_length_of_the_input(options: str, text: str, status: int) -> None:
    answer, _ = await answered(words("Ok"), options, user(text))
    assert answer.status == status
    if status == 400:
        assert answer.error is not None
        assert answer.error["param"] == "messages"


# Put back


async def test_redacted_input_is_put_back_wherever_the_placeholder_is_split() -> None:
    arguments = [event({"tool_calls": [{"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": ""}}]})]
    arguments += [event({"tool_calls": [{"index": 0, "function": {"arguments": text}}]}) for text in ('{"to":"[EM', 'AIL_1]"}')]
    thought = [event({"reasoning_content": "It is [EMAIL_1]"})]
    pieces = [*thought, event({"content": "Dear [EMAIL"}), event({"content": "_1], and [EMAIL_7]"}), *arguments, *END]
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, GUARDED, options=RESTORE) as running:
        answer = await ask(running.port, user("I am me@x.com"))
        assert upstream.asked[0].json["messages"][0]["content"] == "I am [EMAIL_1]"
        deltas = [choice["delta"] for one in answer.chunks for choice in one["choices"]]
        assert answer.text == "Dear me@x.com, and [EMAIL_7]"
        calls = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
        assert json.loads("".join(calls)) == {"to": "me@x.com"}
        assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == ["It is [EMAIL_1]"]


async def test_what_is_redacted_on_the_way_out_is_never_put_back() -> None:
    pieces = words("jo@x.com ", "and [EMAIL_2], [EMAIL_1].")
    answer, _ = await answered(pieces, RESTORE, user("I am me@x.com"))
    assert answer.text == "[EMAIL_2] and [EMAIL_2], me@x.com."


async def test_a_cached_reply_is_shared_by_those_whose_names_are_redacted_and_each_has_its_own_back() -> None:
    async with Upstream(stream(words("Dear [EMAIL_1], card ", CARD, "."))) as upstream:
        async with gateway(upstream.url, GUARDED, options=RESTORE) as running:
            first = await ask(running.port, user("I am me@x.com", cache=True))
            second = await ask(running.port, user("I am you@y.org", cache=True))
            third = await ask(running.port, user("I am you@y.org", cache=True, stream=False))
        assert len(upstream.asked) == 1
    assert [one.headers["X-Cache"] for one in (first, second, third)] == ["miss", "hit", "hit"]
    assert [one.text for one in (first, second)] == ["Dear me@x.com, card [CARD_1].", "Dear you@y.org, card [CARD_1]."]
    assert third.json["choices"][0]["message"]["content"] == "Dear you@y.org, card [CARD_1]."


async def test_a_reply_that_was_cached_without_a_rule_is_blocked_by_a_request_that_has_it() -> None:
    asked = [{"id": "orq_pii_detection", "execute_on": "output"}]
    async with (
        Upstream(stream(words("It is jo@", "x.com."))) as upstream,
        gateway(upstream.url, GUARDED, options="{rules: []}") as run,
    ):
        free = await ask(run.port, chat(cache=True))
        caught = await ask(run.port, chat(cache=True, guardrails=asked))
    assert (free.text, caught.status) == ("It is jo@x.com.", 400)


# What a request may add


@pytest.mark.parametrize("place", ["", "orq", "penstock"])
async def test_a_request_adds_rules_by_orq_s_ids(place: str) -> None:
    asked: Json = {"guardrails": [{"id": "orq_pii_detection", "execute_on": "input"}]}
    async with Upstream(stream(words("Hi "))) as upstream, gateway(upstream.url, GUARDED, options="{rules: []}") as running:
        blocked = await ask(running.port, user("I am me@x.com", **({place: asked} if place else asked)))
        assert (blocked.status, blocked.error and blocked.error["param"]) == (400, "messages[0].content")
        assert (await ask(running.port, user("I am me", **asked))).status == 200
        assert "guardrails" not in upstream.asked[0].json


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guardrails": [{"id": "nobody"}]}, "guardrails[0].id"),
        ({"orq": {"guardrails": [{"id": "orq_sexual_moderation"}]}}, "orq.guardrails[0].id"),
        ({"guardrails": [{"id": "orq_pii_detection", "execute_on": "later"}]}, "guardrails[0].execute_on"),
        ({"guardrails": [{}]}, "guardrails[0]"),
        ({"guardrails": {"id": "x"}}, "guardrails"),
    ],
)
async def test_a_guardrail_that_nobody_configured_is_a_400_with_its_path(fields: Json, param: str) -> None:
    answer, upstream = await answered(words("Hi"), "{rules: []}", chat(**fields))
    assert (answer.status, answer.error and answer.error["param"]) == (400, param)
    assert upstream.asked == []


async def test_a_request_takes_no_rule_of_the_operator_s_away() -> None:
    """Naming it with another side adds; it still holds on both."""
    for asked in ([], [{"id": "card", "execute_on": "output"}], None):
        answer, _ = await answered(words("Hi"), "{rules: [{kind: card, action: block}]}", user(CARD, guardrails=asked))
        assert answer.status == 400


async def test_a_rule_that_waits_to_be_asked_for() -> None:
    options = "{rules: [{kind: deny, id: legal, words: [lawsuit], when: asked}]}"
    assert (await answered(words("Hi"), options, user("a lawsuit")))[0].status == 200
    assert (await answered(words("Hi"), options, user("a lawsuit", guardrails=[{"id": "legal"}])))[0].status == 400


async def test_the_pii_plugin_redacts_and_puts_back_and_the_other_plugins_are_the_provider_s() -> None:
    plugins = [{"id": "pii_redaction", "on_failure": "block"}, {"id": "web"}]
    async with (
        Upstream(stream(words("Dear [EMAIL_1].", " "))) as upstream,
        gateway(upstream.url, GUARDED, options="{rules: []}") as run,
    ):
        answer = await ask(run.port, user("I am me@x.com", plugins=plugins))
        orq = await ask(run.port, user("I am me@x.com", orq={"plugins": plugins[:1]}))
        await ask(run.port, user("me@x.com", plugins=plugins[1:]))
        first, second, third = (asked.json for asked in upstream.asked)
    assert (first["messages"][0]["content"], first["plugins"]) == ("I am [EMAIL_1]", [{"id": "web"}])
    assert (second["messages"][0]["content"], "plugins" in second) == ("I am [EMAIL_1]", False)
    assert (third["messages"][0]["content"], third["plugins"]) == ("me@x.com", [{"id": "web"}])
    assert answer.text == orq.text == "Dear me@x.com. "


async def test_the_plugin_does_not_put_back_what_the_operator_redacts_for_good() -> None:
    plugins = [{"id": "pii_redaction"}]
    body = user("a@b.io 4111 1111 1111 1111", plugins=plugins)
    answer, upstream = await answered(words("[EMAIL_1] [CARD_1]", "."), "{rules: [card]}", body)
    assert upstream.asked[0].json["messages"][0]["content"] == "[EMAIL_1] [CARD_1]"
    assert answer.text == "a@b.io [CARD_1]."


async def test_what_is_only_told_at_the_end_of_a_reply_is_blocked_on_the_way_in() -> None:
    options = "{rules: [{kind: deny, id: titan, words: [titan], mode: after}]}"
    assert (await answered(words("Hi"), options, user("titan")))[0].status == 400
    answer, _ = await answered(words("titan ", "it is"), options)
    assert (answer.text, told(answer)) == ("titan it is", [{"id": "titan", "action": "flag", "on": "output"}])


async def test_calls_with_other_guardrails_do_not_share_a_flight() -> None:
    config = GUARDED.replace("  - guardrails", "  - coalesce: {{mode: all}}\n  - guardrails")
    async with (
        Upstream(stream(words("It is jo@", "x.com."))) as upstream,
        gateway(upstream.url, config, options="{rules: []}") as run,
    ):
        free, caught = await asyncio.gather(ask(run.port, chat()), ask(run.port, chat(guardrails=[{"id": "orq_pii_detection"}])))
    assert (free.text, caught.status) == ("It is jo@x.com.", 400)


# Configuration


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("[emial]", "email"),
        ("[email, email]", "two rules are called 'email'"),
        ("[{kind: deny}]", "needs words"),
        ("[{kind: email, words: [x]}]", "words: belongs to allow, deny"),
        ("[{kind: regex, pattern: '('}]", "is no regular expression"),
        ("[{kind: regex, pattern: '(?=a)b'}]", "linear time"),
        ("[{kind: email, mode: parallel}]", "redacts only with mode: hold_back"),
        ("[{kind: length}]", "needs max_characters or max_tokens"),
        ("[{kind: length, max_tokens: 1, action: redact}]", "nothing to redact"),
        ("[{kind: webhook, url: 'ftp://x'}]", "http:// or https:// URL"),
        ("[{kind: moderations}]", "needs moderations"),
        ("[{kind: email, id: 'a b'}]", "letters, digits"),
        ("[{kind: moderations, moderations: nope/m}]", "rules[0].moderations (line"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_start(rules: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GUARDED.format(url="http://127.0.0.1:9", options="{rules: " + rules + "}"), {}, TABLE)
    assert words in str(caught.value)


def test_a_rule_with_a_fault_is_told_of_that_and_not_that_it_is_no_word() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GUARDED.format(url="http://127.0.0.1:9", options="{rules: [{kind: email, moed: after}]}"), {}, TABLE)
    assert [fault.partition(": ")[2] for fault in str(caught.value).splitlines()] == ["unknown key; did you mean 'mode'?"]


async def test_without_re2_built_in_rules_serve_and_own_expressions_are_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[guardrails\]'"):
        parse(GUARDED.format(url="http://127.0.0.1:9", options="{rules: [{kind: regex, pattern: x}]}"), {}, TABLE)
    assert (await answered(words("Mail jo@", "x.com."), REDACT))[0].text == "Mail [EMAIL_1]."


async def test_allowed_values_pass_every_rule() -> None:
    options = "{rules: [{kind: email, action: block}, {kind: allow, words: ['*@example.com']}]}"
    assert (await answered(words("Write to jo@", "example.com."), options))[0].text == "Write to jo@example.com."
    assert (await answered(words("Write to jo@", "example.org."), options))[0].status == 400


async def test_who_has_no_rules_has_no_cost_on_the_reply() -> None:
    """The very same reply goes through, also where rules are only of the input."""
    call = Call(id="r", nonce="n", created=1, kind="chat", request=chat(), model="m", stream=True)
    reply = Reply(Head("openai/m"), Empty(), Trailer())

    async def handler(call: Call) -> Reply:
        return reply

    for rules in ([], [RuleOptions("email", on="input")]):
        assert await Guardrails(rules=rules)(call, handler) is reply


class Empty:
    def __aiter__(self) -> Empty:
        return self

    async def __anext__(self) -> Batch:
        raise StopAsyncIteration
