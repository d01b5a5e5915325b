"""One representative stream per wire format, written after the providers' documentation, for the fault table.

Each has reasoning, text with characters of two to four bytes, a tool call in pieces, a finish reason and usage, in about 1.2 KB.
The one rule: the offsets at which a format is complete are computed from the format's definition, never from a decoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
TEXT = "Zürich ☂ 𝄞"
THOUGHT = "Hm… "
ARGUMENTS = '{"sea":"Öresund"}'


def dumped(found: Any) -> bytes:
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()


def data(found: Any, blank: bytes = b"\n\n") -> bytes:
    return b"data: " + dumped(found) + blank


def named(event: Json) -> bytes:
    """An event with its type as its name, as Anthropic and Cohere send them."""
    return b"event: %b\n" % str(event["type"]).encode() + data(event)


@dataclass(frozen=True)
class Format:
    """events: the stream, an event each. finish: the position of the event with the finish reason, end: of the end marker, None
    where only the HTTP end tells. opening: how many events hold nothing real. ping: what counts as no content.
    """

    api: str
    events: tuple[bytes, ...]
    opening: int
    finish: int
    end: int | None
    ping: bytes
    whole: bytes

    @property
    def body(self) -> bytes:
        return b"".join(self.events)

    @property
    def complete_at(self) -> int:
        """The first offset at which the end marker is in, blank line included; past the body where there is none."""
        return len(self.body) + 1 if self.end is None else self.edge(self.end)

    @property
    def closes_at(self) -> int:
        """The first event boundary from which on a clean HTTP end is the format's own end."""
        clean = self.api in ("openai", "gemini")
        return self.edge(self.finish if clean or self.end is None else self.end)

    @property
    def head(self) -> bytes:
        """The events without anything real, and the first with something."""
        return b"".join(self.events[: self.opening + 1])

    @property
    def silent(self) -> bytes:
        """The events without anything real."""
        return b"".join(self.events[: self.opening])

    def edge(self, number: int) -> int:
        """The offset behind an event."""
        return len(b"".join(self.events[: number + 1]))

    @property
    def edges(self) -> list[int]:
        return [self.edge(number) for number in range(len(self.events))]


def _openai() -> Format:
    def chunk(delta: Json, finish: str | None = None) -> bytes:
        return data({"id": "c1", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def call(**fields: Any) -> bytes:
        return chunk({"tool_calls": [{"index": 0, **fields}]})

    usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    events = (
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": THOUGHT}),
        chunk({"content": TEXT[:3]}),
        chunk({"content": TEXT[3:]}),
        call(id="t1", type="function", function={"name": "get_tide", "arguments": ""}),
        call(function={"arguments": ARGUMENTS[:8]}),
        call(function={"arguments": ARGUMENTS[8:]}),
        chunk({}, "tool_calls"),
        data({"id": "c1", "model": "m", "choices": [], "usage": usage}),
        b"data: [DONE]\n\n",
    )
    message = {"role": "assistant", "content": TEXT}
    whole = {"id": "c1", "object": "chat.completion", "model": "m", "usage": usage}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return Format("openai", events, 1, 7, 9, b": keep-alive\n\n", dumped({**whole, "choices": choices}))


def _anthropic() -> Format:
    def start(index: int, **block: Any) -> bytes:
        return named({"type": "content_block_start", "index": index, "content_block": block})

    def delta(index: int, kind: str, **fields: Any) -> bytes:
        return named({"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}})

    def stop(index: int) -> bytes:
        return named({"type": "content_block_stop", "index": index})

    message: Json = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None}
    usage = {"input_tokens": 7, "output_tokens": 1}
    events = (
        named({"type": "message_start", "message": {**message, "usage": usage}}),
        named({"type": "ping"}),
        start(0, type="thinking", thinking="", signature=""),
        delta(0, "thinking_delta", thinking=THOUGHT),
        delta(0, "signature_delta", signature="c2ln"),
        stop(0),
        start(1, type="text", text=""),
        delta(1, "text_delta", text=TEXT[:3]),
        delta(1, "text_delta", text=TEXT[3:]),
        stop(1),
        start(2, type="tool_use", id="t1", name="get_tide", input={}),
        delta(2, "input_json_delta", partial_json=ARGUMENTS[:8]),
        delta(2, "input_json_delta", partial_json=ARGUMENTS[8:]),
        stop(2),
        named({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}}),
        named({"type": "message_stop"}),
    )
    whole = {**message, "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn", "usage": usage}
    return Format("anthropic", events, 3, 14, 15, named({"type": "ping"}), dumped(whole))


def _gemini() -> Format:
    def reply(*parts: Json, **candidate: Any) -> Json:
        content = {"parts": list(parts), "role": "model"}
        return {"candidates": [{"content": content, "index": 0, **candidate}], "modelVersion": "m"}

    def chunk(*parts: Json, **candidate: Any) -> bytes:
        return data(reply(*parts, **candidate), b"\r\n\r\n")

    usage = {"promptTokenCount": 7, "candidatesTokenCount": 6, "thoughtsTokenCount": 3, "totalTokenCount": 16}
    last = {**reply({"text": ""}, finishReason="STOP"), "usageMetadata": usage}
    call = {"functionCall": {"name": "get_tide", "args": json.loads(ARGUMENTS)}, "thoughtSignature": "c2ln"}
    events = (
        data({"usageMetadata": {"promptTokenCount": 7}, "modelVersion": "m"}, b"\r\n\r\n"),
        chunk({"text": THOUGHT, "thought": True}),
        chunk({"text": TEXT[:3]}),
        chunk({"text": TEXT[3:]}),
        chunk(call),
        data(last, b"\r\n\r\n"),
    )
    whole = {**reply({"text": TEXT}, finishReason="STOP"), "usageMetadata": usage}
    return Format("gemini", events, 1, 5, None, b": keep-alive\r\n\r\n", dumped(whole))


def _cohere() -> Format:
    def event(kind: str, index: int, **message: Any) -> bytes:
        return named({"type": kind, "index": index, "delta": {"message": message}})

    def content(kind: str, index: int, **block: Any) -> bytes:
        return event(kind, index, content=block)

    usage = {"billed_units": {"input_tokens": 7, "output_tokens": 9}, "tokens": {"input_tokens": 7, "output_tokens": 9}}
    call = {"id": "t1", "type": "function", "function": {"name": "get_tide", "arguments": ""}}
    events = (
        named({"id": "r1", "type": "message-start", "delta": {"message": {"role": "assistant"}}}),
        content("content-start", 0, type="thinking", thinking=""),
        content("content-delta", 0, thinking=THOUGHT),
        named({"type": "content-end", "index": 0}),
        content("content-start", 1, type="text", text=""),
        content("content-delta", 1, text=TEXT[:3]),
        content("content-delta", 1, text=TEXT[3:]),
        named({"type": "content-end", "index": 1}),
        event("tool-call-start", 0, tool_calls=call),
        event("tool-call-delta", 0, tool_calls={"function": {"arguments": ARGUMENTS[:8]}}),
        event("tool-call-delta", 0, tool_calls={"function": {"arguments": ARGUMENTS[8:]}}),
        named({"type": "tool-call-end", "index": 0}),
        named({"type": "message-end", "delta": {"finish_reason": "TOOL_CALL", "usage": usage}}),
    )
    message = {"role": "assistant", "content": [{"type": "text", "text": TEXT}]}
    whole = {"id": "r1", "finish_reason": "COMPLETE", "message": message, "usage": usage}
    return Format("cohere", events, 2, 12, 12, b": keep-alive\n\n", dumped(whole))


FORMATS = {made.api: made for made in (_openai(), _anthropic(), _gemini(), _cohere())}
