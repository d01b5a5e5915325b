"""The golden matrix: every recorded exchange, and the repo's own, through the real gateway and through its decoder.

Strategy: one expectation per exchange, read off its bytes by `tests.support.expected`; a client is owed it however the bytes are
cut, framed and asked for. One id is one exchange and one delivery, so that a failure names both.
The one rule: the expectation knows the provider's format and the contract, and nothing of the gateway.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.wire import WIRES
from tests.support import gateway as gate
from tests.support.decoding import Decoded, byte_by_byte, decode, make_call, make_target, split_at
from tests.support.expected import Owed, Said, Tool, got, owed, texts
from tests.support.recordings import ABSENT, Exchange, own, recorded
from tests.support.upstream import Answer, Asked, Line, Upstream, http_head, stream, whole

Json = dict[str, Any]

EXCHANGES = [*recorded(), *own()]
KEY = "sk-upstream-0123456789"
SMALL = 2500  # bytes: beyond it, one read per byte costs a second and shows nothing new
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
# Gemini's stream without alt=sse, which the gateway never asks for: one JSON array.
ARRAYS = [exchange for exchange in EXCHANGES if exchange.streaming and exchange.body.lstrip().startswith(b"[")]
STREAMS = [exchange for exchange in EXCHANGES if exchange.streaming and not exchange.is_error and exchange not in ARRAYS]
BODIES = [exchange for exchange in EXCHANGES if not exchange.streaming and not exchange.is_error]
WHOLES = [exchange for exchange in BODIES if exchange.kind != "embeddings"]
EMBEDDINGS = [exchange for exchange in BODIES if exchange.kind == "embeddings"]
ERRORS = [exchange for exchange in EXCHANGES if exchange.is_error]


def test_recorded_traffic_is_at_hand() -> None:
    """The matrix covers recordings and not only the repo's own fixtures (skipped, so that it is seen, where there are none)."""
    if not recorded():
        pytest.skip(ABSENT)
    assert {exchange.wire for exchange in recorded()} == {"openai", "anthropic", "gemini", "cohere"}


def test_every_wire_has_fixtures_of_the_repos_own() -> None:
    assert {exchange.wire for exchange in own()} == {"openai", "anthropic", "gemini", "cohere"}


def ids(exchanges: list[Exchange]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exchange", exchanges, ids=[exchange.name for exchange in exchanges])


# --- how a provider's bytes come over the network


def slices(exchange: Exchange, seed: int = 1) -> list[bytes]:
    dice = random.Random(f"{exchange.name}{seed}")
    return split_at(exchange.body, [dice.randrange(len(exchange.body)) for _ in range(12)])


def at_once(exchange: Exchange) -> Answer:
    return stream([exchange.body])


def sliced(exchange: Exchange) -> Answer:
    return stream(slices(exchange))


def by_byte(exchange: Exchange) -> Answer:
    return stream(byte_by_byte(exchange.body))


def by_length(exchange: Exchange) -> Answer:
    return whole(exchange.body, exchange.status, exchange.content_type, other_headers(exchange))


def by_eof(exchange: Exchange) -> Answer:
    """Neither chunked nor with a length: the body ends where the connection does."""

    async def answer(asked: Asked, line: Line) -> None:
        await line.send(http_head(exchange.status, {"Content-Type": exchange.content_type, "Connection": "close"}))
        await line.send(*slices(exchange, 2))
        line.hang_up()

    return answer


def other_headers(exchange: Exchange) -> dict[str, str]:
    own = {"content-type", "content-length", "transfer-encoding", "connection"}
    return {name: value for name, value in exchange.headers.items() if name.lower() not in own}


@dataclass(frozen=True)
class Delivery:
    """How the provider sends (`frame`) and what the client asks for (`fields` of its request)."""

    name: str
    frame: Callable[[Exchange], Answer]
    fields: tuple[tuple[str, Any], ...] = ()
    limit: int | None = None

    @property
    def usage(self) -> str | None:
        """Where the client wants usage: `chunk`, `finish`, or nowhere."""
        asked = dict(self.fields)
        return "finish" if asked.get("usage_placement") == "finish" else "chunk" if asked.get("stream_options") else None


USAGE = (("stream_options", {"include_usage": True}),)
STREAMED = [
    Delivery("at_once", at_once, USAGE),
    Delivery("sliced", sliced, (("usage_placement", "finish"),)),
    Delivery("by_byte", by_byte, USAGE, limit=SMALL),
    Delivery("by_length", by_length),
    Delivery("by_eof", by_eof, USAGE),
]
FOLDED = [Delivery("sliced", sliced), Delivery("by_byte", by_byte, limit=SMALL)]


def matrix(exchanges: list[Exchange], deliveries: list[Delivery]) -> pytest.MarkDecorator:
    """One id per exchange and delivery."""
    cells = [
        pytest.param(exchange, delivery, id=f"{exchange.name}-{delivery.name}")
        for exchange in exchanges
        for delivery in deliveries
        if delivery.limit is None or len(exchange.body) <= delivery.limit
    ]
    return pytest.mark.parametrize(("exchange", "delivery"), cells)


# --- one gateway for the whole matrix; no request leaves anything behind


@dataclass
class Bench:
    """A gateway and the one provider behind it."""

    port: int
    upstream: Upstream

    async def ask(self, exchange: Exchange, answer: Answer, face: str | None = None, **fields: Any) -> gate.Answer:
        self.upstream.answer = answer
        return await gate.ask(self.port, request_for(exchange, **fields), PATHS[face or exchange.kind])


def request_for(exchange: Exchange, **fields: Any) -> Json:
    provider = "text" if exchange.kind == "completions" else exchange.wire
    contents: dict[str, Json] = {
        "chat": {"messages": [{"role": "user", "content": "Hi"}]},
        "completions": {"prompt": "Hi"},
        "embeddings": {"input": "Hi"},
    }
    wanted = choices_asked(exchange)
    content = {**contents["chat"], **contents["completions"]} if fields.get("prompt") else contents[exchange.kind]
    return {"model": f"{provider}/m", **content, **({"n": wanted} if wanted > 1 else {}), **fields}


def choices_asked(exchange: Exchange) -> int:
    """As many choices as the recording has, for its client had asked for them."""
    return 1 if exchange.is_error or exchange.kind == "embeddings" else len(owed(exchange).choices)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench() -> AsyncIterator[Bench]:
    async with Upstream() as upstream, gate.gateway(upstream.url) as running:
        yield Bench(running.port, upstream)


in_one_loop = pytest.mark.asyncio(loop_scope="module")


# --- through the gateway, streamed


@in_one_loop
@matrix(STREAMS, STREAMED)
async def test_a_stream_gives_its_client_all_of_it(bench: Bench, exchange: Exchange, delivery: Delivery) -> None:
    """Text, tool calls, reasoning, finish reasons and usage are those of the recording, in the promised shape."""
    answer = await bench.ask(exchange, delivery.frame(exchange), stream=True, **dict(delivery.fields))
    check_stream(answer, owed(exchange), exchange.kind, request_for(exchange)["model"], delivery.usage)


@in_one_loop
@matrix(WHOLES, [Delivery("by_length", by_length, USAGE), Delivery("sliced", sliced, (("usage_placement", "finish"),))])
async def test_a_whole_reply_is_unfolded_for_a_client_that_streams(bench: Bench, exchange: Exchange, delivery: Delivery) -> None:
    """Content and promise are the same where the provider did not stream, though it was asked to."""
    answer = await bench.ask(exchange, delivery.frame(exchange), stream=True, **dict(delivery.fields))
    expected = owed(exchange)
    if expected.error:
        return check_envelope(answer, expected)
    check_stream(answer, expected, exchange.kind, request_for(exchange)["model"], delivery.usage)


TEXTS = [
    exchange
    for exchange in [*STREAMS, *WHOLES]
    if exchange.kind == "chat" and any(said.text for said in owed(exchange).choices.values())
]


@in_one_loop
@ids(TEXTS)
async def test_a_chat_reply_is_rewritten_as_text_chunks(bench: Bench, exchange: Exchange) -> None:
    """`/v1/completions` of an upstream that only chats: `choices[].text` is the reply's text, and its error chunk is one, too."""
    answer = await bench.ask(exchange, by_length(exchange), "completions", stream=True, prompt="Hi", **dict(USAGE))
    expected = owed(exchange)
    assert answer.status == 200, answer.body
    check_identity(answer.chunks, "completions", f"{exchange.wire}/m")
    check_deltas(answer.chunks, "completions")
    if expected.error:
        return check_broken(answer, expected)
    assert answer.done
    check_finish(answer.chunks)
    assert {index: said.text for index, said in got(answer.chunks).items()} == {i: s.text for i, s in expected.choices.items()}
    return check_usage(answer.chunks, expected, "chunk")


def check_stream(answer: gate.Answer, expected: Owed, kind: str, model: str, usage: str | None) -> None:
    """Section 3 of the contract, sentence by sentence."""
    if expected.error and not expected.began:
        return check_envelope(answer, expected)
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["X-Penstock-Target"] == model
    assert answer.clean
    chunks = answer.chunks
    check_identity(chunks, kind, model)
    check_deltas(chunks, kind)
    if expected.error:
        return check_broken(answer, expected)
    assert answer.events.count("[DONE]") == 1
    assert answer.done
    assert not any("error" in chunk for chunk in chunks)
    check_finish(chunks)
    check_content(got(chunks), expected.choices, kind)
    check_kept(chunks, expected)
    check_usage(chunks, expected, usage)
    return None


def check_identity(chunks: list[Json], kind: str, model: str) -> None:
    assert {chunk["object"] for chunk in chunks} == {"text_completion" if kind == "completions" else "chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {model}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert type(chunks[0]["id"]) is str
    assert chunks[0]["id"]
    assert type(chunks[0]["created"]) is int
    assert chunks[0]["created"] > 0
    assert all(type(chunk["choices"]) is list for chunk in chunks)


def check_deltas(chunks: list[Json], kind: str) -> None:
    """The role on the first delta of each choice; tool calls numbered 0, 1, 2… with their names at first, and only text later."""
    seen: Counter[int] = Counter()
    tools: Counter[int] = Counter()
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            seen[index] += 1
            if kind == "completions":
                assert type(choice["text"]) is str
                continue
            delta = choice["delta"]
            if choice["finish_reason"] != "error":
                assert seen[index] > 1 or delta["role"] == "assistant"
            assert delta.get("role", "assistant") == "assistant"
            assert delta.get("content") is None or type(delta["content"]) is str
            for call in delta.get("tool_calls") or ():
                if call["index"] == tools[index]:
                    tools[index] += 1
                    assert call["id"]
                    assert type(call["id"]) is str
                    assert call["type"] == "function"
                    assert call["function"]["name"]
                else:
                    assert call["index"] < tools[index]
                    assert set(call) == {"index", "function"}
                    assert set(call["function"]) == {"arguments"}
                assert type(call["function"]["arguments"]) is str


def check_finish(chunks: list[Json]) -> None:
    """Exactly one finish reason per choice; behind the first of them come only other finish chunks and usage."""
    reasons = Counter(choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"] is not None)
    assert reasons
    assert set(reasons.values()) == {1}
    assert set(reasons) == {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    first = next(n for n, chunk in enumerate(chunks) for choice in chunk["choices"] if choice["finish_reason"] is not None)
    for chunk in chunks[first:]:
        assert all(choice["finish_reason"] is not None and "native_finish_reason" in choice for choice in chunk["choices"])


def check_content(given: dict[int, Said], expected: dict[int, Said], kind: str) -> None:
    assert sorted(given) == sorted(expected)
    for index, said in expected.items():
        check_said(given[index], said)
        if kind == "chat":
            check_tools(given[index].tools, said)


def check_said(given: Said, said: Said) -> None:
    assert given.text == said.text
    assert given.reasoning == said.reasoning
    assert given.refusal == said.refusal
    assert given.function == said.function
    assert given.tokens == said.tokens
    assert (given.finish, given.native) == (said.finish, said.native)


def check_tools(given: list[Tool], said: Said) -> None:
    assert [tool.name for tool in given] == [tool.name for tool in said.tools]
    assert [tool.parsed for tool in given] == [tool.parsed for tool in said.tools]
    assert [tool.id for tool in given] == [tool.id or mine.id for tool, mine in zip(said.tools, given, strict=True)]
    assert len({tool.id for tool in given}) == len(given)
    if said.finish == "tool_calls":
        assert all(isinstance(json.loads(tool.arguments), dict) for tool in given), "arguments that parse"


def check_kept(replies: list[Json], expected: Owed) -> None:
    """Signatures, encrypted reasoning, citations, images and the blocks of the provider's own tools reach the client."""
    choices = [choice for reply in replies for choice in reply["choices"]]
    # A text completion has no message: there the same fields stand in the choice.
    deltas = [(choice["index"], choice.get("delta") or choice.get("message") or choice) for choice in choices]
    assert missing(expected.kept, replies) == []
    assert missing(expected.blocks, [delta.get("provider_blocks") for _, delta in deltas]) == []
    details = [(index, entry) for index, delta in deltas for entry in delta.get("reasoning_details") or ()]
    for _, entry in details:
        said = {"reasoning.text": "text", "reasoning.summary": "summary", "reasoning.encrypted": "data"}[entry["type"]]
        assert said in entry or "signature" in entry
        assert {"format", "index"} <= set(entry)
    given = got(replies)
    for (index, number), signature in expected.signed.items():
        # Section 3.2: a Gemini signature on a call carries that tool call's id.
        id = given[index].tools[number].id
        assert [entry for at, entry in details if at == index and entry.get("id") == id and signature in entry.values()]


def missing(wanted: set[str], found: Any) -> list[str]:
    given = list(texts(found))
    return [text for text in sorted(wanted) if not any(text in mine for mine in given)]


def check_usage(chunks: list[Json], expected: Owed, placement: str | None) -> None:
    carriers = [number for number, chunk in enumerate(chunks) if chunk.get("usage") is not None]
    if placement is None or expected.usage is None:
        assert not [n for n in carriers if placement is None or any(chunks[n]["usage"].values())], "usage that nobody gave"
        return
    assert carriers == [len(chunks) - 1]
    assert bool(chunks[-1]["choices"]) == (placement == "finish")
    check_counts(chunks[-1]["usage"], expected)


def check_counts(usage: Json, expected: Owed) -> None:
    assert expected.usage is not None
    prompt, completion, cached, reasoning = expected.usage
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, completion)
    assert usage["total_tokens"] == prompt + completion
    assert ((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0) == cached
    assert ((usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0) == reasoning


def check_broken(answer: gate.Answer, expected: Owed) -> None:
    """A stream that did not complete never looks complete: all that came before, an error chunk, and no [DONE]."""
    assert "[DONE]" not in answer.events
    *chunks, last = answer.chunks
    assert expected.error is not None
    assert expected.error in last["error"]["message"]
    assert set(last["error"]) == {"message", "type", "code", "param"}
    assert last["error"]["param"] is None
    assert last["choices"]
    assert {choice["finish_reason"] for choice in last["choices"]} == {"error"}
    assert not [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"] is not None]
    assert not any("error" in chunk for chunk in chunks)
    for index, said in got(chunks).items():
        assert (said.text, said.reasoning) == (expected.choices[index].text, expected.choices[index].reasoning)


# --- through the gateway, whole


@in_one_loop
@matrix(WHOLES, [Delivery("by_length", by_length), Delivery("sliced", sliced), Delivery("by_eof", by_eof)])
async def test_a_whole_reply_gives_its_client_all_of_it(bench: Bench, exchange: Exchange, delivery: Delivery) -> None:
    answer = await bench.ask(exchange, delivery.frame(exchange), stream=False)
    check_completion(answer, owed(exchange), exchange.kind, request_for(exchange)["model"])


@in_one_loop
@matrix(STREAMS, FOLDED)
async def test_a_stream_is_folded_for_a_client_that_does_not_stream(bench: Bench, exchange: Exchange, delivery: Delivery) -> None:
    """`stream: false` gets the same reply in one JSON body, though the provider streams unasked; a broken stream is an error."""
    answer = await bench.ask(exchange, delivery.frame(exchange), stream=False)
    check_completion(answer, owed(exchange), exchange.kind, request_for(exchange)["model"])


def check_completion(answer: gate.Answer, expected: Owed, kind: str, model: str) -> None:
    if expected.error:
        return check_envelope(answer, expected)
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"].startswith("application/json")
    completion = answer.json
    assert completion["object"] == ("text_completion" if kind == "completions" else "chat.completion")
    assert completion["model"] == model
    assert answer.headers["X-Penstock-Target"] == model
    assert completion["id"]
    assert type(completion["created"]) is int
    assert completion["created"] > 0
    assert [choice["index"] for choice in completion["choices"]] == sorted(expected.choices)
    assert all("native_finish_reason" in choice for choice in completion["choices"])
    if kind == "chat":
        assert {choice["message"]["role"] for choice in completion["choices"]} == {"assistant"}
        assert not any("delta" in choice for choice in completion["choices"])
    check_content(got([completion]), expected.choices, kind)
    check_kept([completion], expected)
    if expected.usage is not None:
        check_counts(completion["usage"], expected)
    return None


def check_envelope(answer: gate.Answer, expected: Owed) -> None:
    """An error before anything was sent: an HTTP status with the OpenAI envelope that has the provider's words."""
    assert 400 <= answer.status <= 599, answer.body
    assert answer.headers["Content-Type"].startswith("application/json")
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert expected.error is not None
    assert expected.error in answer.json["error"]["message"]
    assert expected.status in (None, answer.status)


@in_one_loop
@ids(EMBEDDINGS)
async def test_embeddings_arrive_as_the_provider_made_them(bench: Bench, exchange: Exchange) -> None:
    answer = await bench.ask(exchange, by_length(exchange))
    assert answer.status == 200
    sent = json.loads(exchange.body)
    assert answer.json["data"] == sent["data"]
    assert answer.json["object"] == "list"
    assert answer.json["usage"]["prompt_tokens"] == sent["usage"]["prompt_tokens"]


@in_one_loop
@ids(ARRAYS)
@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "whole"])
async def test_a_json_array_for_a_stream_never_looks_like_half_a_reply(bench: Bench, exchange: Exchange, streaming: bool) -> None:
    """The gateway asks for alt=sse; a provider that sends an array all the same is understood whole, or is an error."""
    answer = await bench.ask(exchange, sliced(exchange), stream=streaming)
    if answer.status == 200:
        assert got(answer.chunks if streaming else [answer.json])[0].text == owed(exchange).choices[0].text
    else:
        assert answer.status == 502


# --- errors


@in_one_loop
@ids(ERRORS)
@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("frame", ["by_length", "sliced"])
async def test_an_error_of_a_provider_reaches_the_client_in_the_envelope(
    bench: Bench, exchange: Exchange, frame: str, streaming: bool
) -> None:
    """With its own status and words; what is said about the gateway's own key stays inside."""
    framed = by_length(exchange) if frame == "by_length" else error_in_chunks(exchange)
    fields: Json = {} if exchange.kind == "embeddings" else {"stream": streaming}
    answer = await bench.ask(exchange, framed, **fields)
    words = error_words(json.loads(exchange.body))
    if exchange.status in (401, 403):
        assert answer.status == 502
        assert answer.json["error"]["code"] == "upstream_auth"
        assert words not in answer.body.decode()
        return
    check_envelope(answer, Owed(error=words))
    # Section 5 passes 4xx on, and says 502 where the upstream failed; its own 5xx would say the same.
    assert answer.status in ({exchange.status} if exchange.status < 500 else {exchange.status, 502})
    passed = {name.lower(): value for name, value in exchange.headers.items()}
    for name in passed:
        if name == "retry-after" or name.startswith("x-ratelimit-"):
            assert answer.headers[name] == passed[name]


def error_in_chunks(exchange: Exchange) -> Answer:
    return stream(slices(exchange), exchange.status, other_headers(exchange))


def error_words(body: Any) -> str:
    error = body.get("error", body)
    return str(error if isinstance(error, str) else error.get("message") or error["detail"])


# --- the decoder alone


def pure(exchange: Exchange, pieces: list[bytes]) -> Decoded:
    target = make_target(exchange.wire)
    call = make_call({"stream": True, **({"n": n} if (n := choices_asked(exchange)) > 1 else {})}, kind=exchange.kind)
    return decode(WIRES[exchange.wire].Decoder(call, target), pieces)


def splits(exchange: Exchange) -> Iterator[list[bytes]]:
    yield byte_by_byte(exchange.body)
    for seed in range(3):
        yield slices(exchange, seed)
    for width in (2, 3, 7):  # cuts pairs (CR LF), triplets and UTF-8 sequences at every phase
        yield [exchange.body[at : at + width] for at in range(0, len(exchange.body), width)]


@ids(STREAMS)
def test_a_decoder_gives_all_of_it(exchange: Exchange) -> None:
    """The whole body in one read: the same content as the simple reading finds, and a fault exactly where it has an error."""
    expected, decoded = owed(exchange), pure(exchange, [exchange.body])
    if expected.error:
        assert decoded.fault is not None
        assert expected.error in decoded.fault.message
        return
    assert decoded.fault is None
    check_content(got(decoded.chunks), expected.choices, exchange.kind)
    check_kept(decoded.chunks, expected)
    if expected.usage is not None:
        assert decoded.usage is not None
        check_counts(decoded.usage, expected)


@ids(STREAMS)
def test_any_fixed_split_gives_the_same_chunks(exchange: Exchange) -> None:
    """Byte by byte, in twos, threes and sevens, and in a few random slices."""
    at_once = pure(exchange, [exchange.body])
    for pieces in splits(exchange):
        assert same(pure(exchange, pieces), at_once)


@ids(STREAMS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cuts=st.lists(st.integers(0, 80_000), max_size=24))
def test_any_split_gives_the_same_chunks(exchange: Exchange, cuts: list[int]) -> None:
    assert same(pure(exchange, split_at(exchange.body, cuts)), pure(exchange, [exchange.body]))


@ids(STREAMS)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_line_ends_make_no_difference(exchange: Exchange, newline: bytes) -> None:
    """LF, CRLF and CR frame the same events."""
    plain = exchange.body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    body = plain.replace(b"\n", newline)
    assert same(pure(exchange, [body]), pure(exchange, [exchange.body]))
    assert same(pure(exchange, split_at(body, range(0, len(body), 5))), pure(exchange, [exchange.body]))


def opening(exchange: Exchange) -> Exchange:
    """The stream up to its second event."""
    starts = [found.start() for found in re.finditer(rb"^data:(?! *\[DONE)", exchange.body, re.MULTILINE)]
    return replace(exchange, body=exchange.body[: starts[1]] if len(starts) > 1 else b"")


def promising(exchange: Exchange) -> bool:
    """Is the reply not over with its first event?"""
    first = owed(opening(exchange))
    return not first.error and not any(said.native for said in first.choices.values())


@ids([exchange for exchange in STREAMS if promising(exchange)])
def test_a_clean_end_before_the_reply_is_over_is_a_fault(exchange: Exchange) -> None:
    """The first event, then the end of the body: never the end of a reply."""
    decoded = pure(exchange, [opening(exchange).body])
    assert decoded.fault is not None
    assert decoded.fault.outcome in ("upstream_cut", "malformed")
    assert not decoded.finish


def same(one: Decoded, other: Decoded) -> bool:
    faults = [(type(d.fault), d.fault.message if d.fault else None) for d in (one, other)]
    return one.chunks == other.chunks and one.usage == other.usage and faults[0] == faults[1]
