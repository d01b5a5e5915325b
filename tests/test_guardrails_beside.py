"""What stands beside the texts of a chunk carries nothing past the rules: fields, lists, names, log probabilities, errors."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from middleware.guardrails.screen import Screen
from proxy.reply import Batch, Item, sse_events
from tests.support.gateway import ask, chat, gateway
from tests.support.upstream import Upstream, stream, whole
from tests.test_guardrails import GUARDED, REDACT, completion, user
from tests.test_guardrails_screen import chunk, content, look

Json = dict[str, Any]
ADDRESS = "bob@example.com"
CITED = [{"type": "url_citation", "url_citation": {"url": "https://example.org", "title": f"Mail {ADDRESS}"}}]
TOKENS = {"content": [{"token": ADDRESS, "logprob": 0.0, "bytes": None}]}
BESIDE: dict[str, Json] = {
    "annotations beside text": chunk({"content": "hello", "annotations": CITED}),
    "citations of the chunk": {**content("hello"), "citations": [f"mailto:{ADDRESS}"]},
    "log probabilities of another text": chunk({"content": "hello"}, logprobs=TOKENS),
    "log probabilities alone": chunk({}, logprobs=TOKENS),
    "a field of the choice": chunk({"content": "hello"}, message={"content": ADDRESS}),
    "deeper than a text": chunk({"audio": {"transcript": "hello", "words": [{"word": ADDRESS}]}}),
    "a tool's own field": chunk(
        {
            "tool_calls": [
                {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": "{"}, "note": ADDRESS}
            ]
        }
    ),
    "a tool's name": chunk({"tool_calls": [{"index": 0, "id": "t", "function": {"name": ADDRESS, "arguments": "{"}}]}),
    "an object under an opaque name": chunk({"content": "hello", "data": {"said": ADDRESS}}),
}


def passed(screen: Screen, first: Json, *, encoded: bool) -> str:
    """All that goes out of a reply of this chunk, as text."""
    items: list[Item] = [sse_events([first])] if encoded else [first]
    ends: list[Item] = [chunk({}, finish="stop")]
    out = [*screen.see(Batch(items)), *screen.see(Batch(ends, final=True))]
    return Batch(out).sse().decode()


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_a_text_is_looked_at(name: str, encoded: bool) -> None:
    assert ADDRESS in Batch([BESIDE[name]]).sse().decode()
    assert ADDRESS not in passed(Screen(look(), None), BESIDE[name], encoded=encoded)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("name", [name for name in BESIDE if not name.startswith(("log", "an object"))])
def test_and_ends_a_reply_that_it_blocks(name: str, encoded: bool) -> None:
    for screen in (Screen(look("block"), None), Screen(None, look("block"))):
        assert ADDRESS not in passed(screen, BESIDE[name], encoded=encoded)
        assert screen.blocked


def test_log_probabilities_stay_where_they_spell_the_text() -> None:
    tokens = {"content": [{"token": "\\xe2\\x98", "logprob": 0.0, "bytes": [0xE2, 0x98]}, {"token": "\\x82", "bytes": [0x82]}]}
    assert orjson.dumps(tokens).decode() in passed(Screen(look(), None), chunk({"content": "☂"}, logprobs=tokens), encoded=False)


async def test_a_providers_error_does_not_say_what_was_found() -> None:
    body = orjson.dumps({"error": {"message": f"There is no user {ADDRESS} here", "type": "invalid_request_error"}})
    async with Upstream(whole(body, status=400)) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        answer = await ask(running.port, chat(stream=False))
    assert answer.status == 400
    assert "There is no user [EMAIL_1] here" in answer.json["error"]["message"]


async def test_nor_where_it_comes_in_mid_stream() -> None:
    fault = b'data: {"error": {"message": "There is no user %b here", "type": "server_error"}}\n\n' % ADDRESS.encode()
    pieces = [b"data: %b\n\n" % orjson.dumps(content("Hello there. ")), fault]
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        answer = await ask(running.port, chat())
    assert answer.status == 200
    assert answer.chunks[-1]["error"]["message"].endswith("There is no user [EMAIL_1] here")


async def test_nor_where_a_rule_blocks_it() -> None:
    body = orjson.dumps({"error": {"message": f"There is no user {ADDRESS} here"}})
    options = "{rules: [{kind: email, action: block, on: output}]}"
    async with Upstream(whole(body, status=400)) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        answer = await ask(running.port, chat(stream=False))
    assert answer.status == 400
    assert answer.json["error"]["code"] != "content_filter"
    assert b"There is no user" not in answer.body


async def test_nothing_of_a_request_is_passed_over_because_it_says_that_it_is_signed() -> None:
    signed = [
        {"role": "user", "content": f"Mail {ADDRESS}", "signature": "x"},
        {"role": "user", "content": [{"type": "text", "text": f"Mail {ADDRESS}", "signature": "x"}]},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "t", "type": "function", "signature": "x", "function": {"name": "f", "arguments": f'"{ADDRESS}"'}}]},
        {"role": "tool", "tool_call_id": "t", "content": ADDRESS, "signature": "x"},
        {"role": "user", "content": "Well?", "reasoning_details": [
            {"type": "reasoning.text", "text": ADDRESS, "signature": "x", "format": "y", "index": 0}]},
    ]  # fmt: skip
    async with Upstream(whole(completion("Yes"))) as upstream, gateway(upstream.url, GUARDED, options=REDACT) as running:
        assert (await ask(running.port, chat(messages=signed, stream=False))).status == 200
    assert ADDRESS.encode() not in upstream.asked[0].body


async def test_a_placeholder_that_the_client_wrote_in_another_spelling_is_its_own_too() -> None:
    said, options = "Say [EMAIL\u200b_1]", "{rules: [email], restore: true}"
    async with Upstream(whole(completion(said))) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        answer = await ask(running.port, user(f"{said}, mail {ADDRESS}", stream=False))
    assert answer.json["choices"][0]["message"]["content"] == said
