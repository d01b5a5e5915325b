"""Cases about content: what the provider says reaches the client, all of it and in a form that clients can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from proxy.conformance.client import Received
from proxy.conformance.framing import ASKED, one, over, streamed
from proxy.conformance.provider import Answer, Line
from proxy.conformance.said import (
    CREATED,
    DONE,
    ID,
    RICH,
    ROLE,
    USAGE,
    Heard,
    chunk,
    envelope,
    event,
    events,
    heard,
    text,
    tool,
    usage,
)  # fmt: skip
from proxy.conformance.trial import Case, Variant
from proxy.conformance.verdict import Judge, Severity, heard_of, how, intact

Json = dict[str, Any]
STOP = chunk(finish="stop")
NO_USAGE: Json = {"stream_options": {"include_usage": False}}


def said(chunks: Sequence[Json], *, also: Json | None = None, done: bytes = DONE) -> Answer:
    """These chunks as a stream, each in a write of its own."""
    return streamed(*events(chunks), *([event(also)] if also else []), *([done] if done else []))


def same(chunks: list[Json], label: str = "", like: list[Json] | None = None) -> Variant:
    """A stream that must arrive as it was said, or as `like` says it."""
    return Variant(label, said(chunks), intact(heard(like or chunks)))


def also(judge: Judge, check: Any) -> Judge:
    """`judge`, and then `check(heard)`: a problem in words, or None."""
    return lambda received: judge(received) or check(heard_of(received))


def _as_asked(line: Line) -> Json | None:
    """The usage chunk, as OpenAI sends it: only where the request that arrived asks for it."""
    return usage() if (line.asked.get("stream_options") or {}).get("include_usage") else None


async def _openai_like(line: Line) -> None:
    await said([chunk(ROLE), *text("Hel", "lo"), STOP], also=_as_asked(line))(line)


def _usages() -> Iterator[Variant]:
    plain = heard([chunk(ROLE), *text("Hel", "lo"), STOP])
    yield Variant("asked for", _openai_like, intact(plain, usage=True), ASKED)
    on_finish = [chunk(ROLE), *text("Hel", "lo"), chunk(finish="stop", usage=USAGE)]
    yield Variant("asked for, and sent with the finish reason", said(on_finish), intact(plain, usage=True), ASKED)
    nulls = [{**found, "usage": None} for found in [chunk(ROLE), *text("Hel", "lo"), STOP]]
    yield Variant("asked for, with usage: null before it", said(nulls, also=usage()), intact(plain, usage=True), ASKED)


def _unasked() -> Iterator[Variant]:
    plain = heard([chunk(ROLE), *text("Hel", "lo"), STOP])
    yield Variant("not mentioned", _openai_like, intact(plain, usage=False))
    yield Variant("declined", _openai_like, intact(plain, usage=False), NO_USAGE)


def _empty_choices() -> Iterator[Variant]:
    plain = [chunk(ROLE), *text("Hel", "lo"), STOP]
    filters = envelope([], prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}])
    yield same([filters, *plain], "before the first chunk", plain)
    yield same([*plain[:2], envelope([]), *plain[2:]], "between two chunks", plain)


def _reasoning() -> Iterator[Variant]:
    for name in ("reasoning_content", "reasoning"):
        chunks = [chunk({"role": "assistant", name: "Let me "}), chunk({name: "think"}), *text("4", "2"), STOP]
        yield same(chunks, name)


def _unknown(got: Heard) -> str | None:
    written = orjson.dumps(got.chunks).decode()
    lost = [name for name in ("x_chunk", "x_choice", "x_delta", "system_fingerprint") if f'"{name}"' not in written]
    return f"lost: {', '.join(lost)}" if lost else None


def _with_unknown() -> list[Json]:
    marked = chunk({"content": "b", "x_delta": {"k": 1}}, x_chunk=[1], system_fingerprint="fp_1", service_tier="default")
    marked["choices"][0]["x_choice"] = "kept"
    return [chunk(ROLE), *text("a"), marked, *text("c"), STOP]


def _likely() -> list[Json]:
    found = [chunk(ROLE), *text("a", "b", "c"), STOP]
    for part in found[1:4]:
        choice = part["choices"][0]
        token = choice["delta"]["content"]
        choice["logprobs"] = {"content": [{"token": token, "logprob": -1.5, "bytes": [97], "top_logprobs": []}], "refusal": None}
    return found


def _empties() -> Iterator[Variant]:
    plain = [chunk(ROLE), *text("a", "b"), STOP]
    for label, found in (
        ("{}", {}),
        ('""', {"content": ""}),
        ("null", {"content": None}),
        ("tool_calls: []", {"tool_calls": []}),
    ):
        between = [plain[0], chunk(found), plain[1], chunk(found), plain[2], chunk(found), STOP]
        yield same(between, f"delta {label}", plain)


def _reasons() -> Iterator[Variant]:
    for reason in ("stop", "length", "content_filter"):
        yield same([chunk(ROLE), *text("a"), chunk(finish=reason)], reason)
        yield same([chunk(ROLE), *text("a"), chunk({"content": "b"}, finish=reason)], f"{reason}, with text beside it")
    yield same([chunk(ROLE), tool(0, "{}", "call_a", "f"), chunk(finish="tool_calls")], "tool_calls")


def _identity(got: Heard) -> str | None:
    for name in ("id", "created", "model", "object"):
        found = {str(part.get(name)) for part in got.chunks}
        if len(found) != 1:
            return f"{name} changes: {sorted(found)[:3]}"
    return None


def _quoted() -> Iterator[Variant]:
    for label, quoted in (
        ("data: [DONE]", "data: [DONE]"), ("with line ends", "\n\ndata: [DONE]\n\n"),
        ("an error in text", '\n\ndata: {"error":{}}\n\n'),
        ("JSON escapes", "\\u00e9 \" \\ / \b\f\n\r\t\u0001"), ("odd line ends", "a\u2028b\u2029c\u0085d"),
    ):  # fmt: skip
        yield same([chunk(ROLE), *text("a ", quoted, " b"), STOP], label)
    plain = [chunk(ROLE), *text("é👩‍👧日"), STOP]
    escaped = orjson.dumps(plain[1]).decode().replace("é👩‍👧日", "\\u00e9\\ud83d\\udc69\\u200d\\ud83d\\udc67\\u65e5")
    yield Variant("ASCII escapes", streamed(event(plain[0]), event(escaped), event(STOP), DONE), intact(heard(plain)))


def _endings() -> Iterator[Variant]:
    plain = [chunk(ROLE), *text("Hel", "lo"), STOP]
    yield Variant("no [DONE]", said(plain, done=b""), intact(heard(plain), done=False))
    yield Variant(
        "no [DONE], after usage", said(plain, also=usage(), done=b""), intact(heard(plain), usage=True, done=False), ASKED
    )


MEGABYTE = "0123456789abcdéf" * (2**20 // 17)
MANY = [chunk(ROLE), *text(*(f"{number} " for number in range(10_000))), STOP]
MANY_WRITTEN = events(MANY)


def _batched() -> Answer:
    parts = [b"".join(MANY_WRITTEN[at : at + 10]) for at in range(0, len(MANY_WRITTEN), 10)]
    return streamed(*parts, DONE)


def _whole_reply() -> Json:
    call = {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    message = {
        "role": "assistant",
        "content": "né 日本 👩‍👧 \n",
        "reasoning_content": "hm",
        "tool_calls": [call],
        "refusal": None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    row = {"id": ID, "object": "chat.completion", "created": CREATED, "model": "conformance", "choices": [choice]}
    return {**row, "usage": USAGE, "system_fingerprint": "fp_1", "x_top": {"k": [1]}}


async def _whole(line: Line) -> None:
    await line.whole(orjson.dumps(_whole_reply()))


def _whole_judge(received: Received) -> str | None:
    body, wanted = received.json, _whole_reply()
    if received.status != 200 or received.end != "clean" or not isinstance(body, dict) or not body.get("choices"):
        return f"{how(received)}: {received.body[:80]!r}"
    choice, right = body["choices"][0], wanted["choices"][0]
    message = choice.get("message") or {}
    for name in ("content", "reasoning_content", "tool_calls", "role"):
        if message.get(name) != right["message"][name]:
            return f"message.{name} is {str(message.get(name))[:80]!r}"
    for name in ("system_fingerprint", "x_top"):
        if body.get(name) != wanted[name]:
            return f"{name} is {body.get(name)!r}"
    if choice.get("finish_reason") != "tool_calls":
        return f"finish_reason is {choice.get('finish_reason')!r}"
    counts = body.get("usage") or {}
    return (
        None if all(counts.get(name) == USAGE[name] for name in ("prompt_tokens", "completion_tokens")) else f"usage is {counts}"
    )


LIE, LOSS, SHAPE = Severity.LIE, Severity.LOSS, Severity.SHAPE
CASES = (
    Case("empty-choices", "a chunk with choices: [] does no harm", LOSS, "Azure opens with one, usage closes with one",
         over(_empty_choices)),
    Case("reasoning", "reasoning arrives, apart from the text", LOSS, "it is paid for, and some models want it back",
         over(_reasoning)),
    Case("unknown-fields", "fields that nobody knows are passed on", LOSS, "new features arrive as unknown fields",
         one(said(_with_unknown()), also(intact(heard(_with_unknown())), _unknown), n=1)),
    Case("logprobs", "logprobs arrive, each with its token", LOSS, "evaluations are built on them",
         one(said(_likely()), intact(heard(_likely())), logprobs=True)),
    Case("empty-deltas", "empty deltas change nothing", LOSS, "providers send them as pings", over(_empties)),
    Case("finish-reason", "the finish reason is the provider's: length stays length", LIE,
         "it says whether the text was cut short", over(_reasons)),
    Case("identity", "id, created, model and object stay the same over a stream", SHAPE, "clients group chunks by id",
         one(said(RICH), also(intact(heard(RICH)), _identity), n=1)),
    Case("usage", "usage that was asked for arrives, with the provider's figures", LOSS, "clients are billed by it",
         over(_usages)),
    Case("usage-unasked", "usage that was not asked for stays away", SHAPE,
         "clients that read choices[0] crash on its chunk", over(_unasked)),
    Case("quoted", "text that looks like framing is text", LIE, "a model that explains SSE must not end its own stream",
         over(_quoted)),
    Case("no-done", "a finish reason and a clean HTTP end are an end, with or without [DONE]", LIE,
         "several compatible providers send no [DONE]", over(_endings)),
    Case("big-event", "an event of 1 MB arrives whole", LOSS, "images and long tool arguments come in one event",
         one(said([chunk(ROLE), *text(MEGABYTE), STOP]), intact(heard([chunk(ROLE), *text(MEGABYTE), STOP])), n=1)),
    Case("many-chunks", "10,000 chunks arrive, in order", LOSS, "long answers are long",
         one(_batched(), intact(heard(MANY)), n=1)),
    Case("whole-reply", "a reply that is not streamed arrives whole, unknown fields included", LOSS, "half of all calls are such",
         one(_whole, _whole_judge, stream=False)),
)  # fmt: skip
