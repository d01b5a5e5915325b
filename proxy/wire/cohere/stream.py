"""The events of a streamed Cohere reply.

Strategy: one small method per event type, found in a table; contents and tool calls are told apart by the event's `index`.
The one rule: only `message-end` ends a reply. Event types that the table does not know (Cohere's `debug`, and whatever comes
next) are passed over; an object without a type is an error that Cohere reports in the stream.

https://docs.cohere.com/reference/chat-stream
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxy.call import Call, Target
from proxy.decoder import SseDecoder
from proxy.errors import Malformed
from proxy.faults import error_words, in_band_error
from proxy.wire.cohere import parts

Json = dict[str, Any]


class Decoder(SseDecoder):
    """Cohere's chat events in, normalized chunks out."""

    def __init__(self, call: Call, target: Target) -> None:
        super().__init__(call, target)
        self._reasoning: dict[object, int] = {}

    def event(self, event: Json) -> None:
        kind = event.get("type")
        if not isinstance(kind, str) or kind == "error":
            if not event.get("message") and not event.get("error"):
                raise Malformed("The provider sent an event without a type.")
            raise in_band_error(error_words(event))
        handler = HANDLERS.get(kind)
        if handler is not None:
            handler(self, event)

    def message_start(self, event: Json) -> None:
        self.stream.identify(event.get("id"))

    def content(self, event: Json) -> None:
        """content-start and content-delta: the first may hold text already. Contents of other types are kept as blocks."""
        content = event["delta"]["message"]["content"]
        if event.get("logprobs"):
            self._logprobs(_list(event["logprobs"]))
        if isinstance(content.get("text"), str):
            self._text(content["text"])
        elif isinstance(content.get("thinking"), str):
            self._reason(event.get("index"), content["thinking"])
        elif content.get("type") not in (None, "text", "thinking"):
            self.stream.put({"provider_blocks": [content]})

    def tool_plan(self, event: Json) -> None:
        self._reason(parts.TOOL_PLAN, event["delta"]["message"]["tool_plan"])

    def tool_call_start(self, event: Json) -> None:
        call = _list(event["delta"]["message"]["tool_calls"])[0]
        function = call["function"]
        self.stream.open_tool(event.get("index"), call.get("id"), function["name"], function.get("arguments") or "")

    def tool_call_delta(self, event: Json) -> None:
        call = _list(event["delta"]["message"]["tool_calls"])[0]
        tool = self.stream.choice().by_key[event.get("index")]
        self.stream.tool_text(tool, call["function"].get("arguments") or "")

    def citation(self, event: Json) -> None:
        found = [note for citation in _list(event["delta"]["message"]["citations"]) for note in parts.citation_notes(citation)]
        if found:
            self.stream.put({"annotations": found})

    def message_end(self, event: Json) -> None:
        delta = event.get("delta") or {}
        self.stream.usage = parts.usage(delta.get("usage"))
        native = delta.get("finish_reason")
        reason = parts.finish_reason(native, delta.get("error"))
        self.stream.choice()
        if reason:
            self.stream.finish(reason, native)
        self.end()

    def _logprobs(self, items: list[Json]) -> None:
        """They ride along with the next chunk of the choice; those of an empty delta wait for it."""
        extras = self.stream.choice().extras
        found = parts.logprobs(items)
        found["content"] = [*extras.get("logprobs", {}).get("content", []), *found["content"]]
        extras["logprobs"] = found

    def _text(self, text: str) -> None:
        if text:
            self.stream.put({"content": text})

    def _reason(self, key: object, text: str) -> None:
        if text:
            index = self._reasoning.setdefault(key, len(self._reasoning))
            detail = parts.reasoning_detail(text, index, key == parts.TOOL_PLAN)
            self.stream.put({"reasoning_content": text, "reasoning_details": [detail]})

    def _payload(self, payload: bytes) -> None:
        """`[DONE]` is no event of this format: whatever stands before `message-end` is still incomplete."""
        if payload != b"[DONE]":
            super()._payload(payload)


def _list(found: Any) -> list[Json]:
    """Version 2 documents one object where the message itself has a list; both are read."""
    return found if isinstance(found, list) else [found]


HANDLERS: dict[str, Callable[[Decoder, Json], None]] = {
    "message-start": Decoder.message_start,
    "content-start": Decoder.content,
    "content-delta": Decoder.content,
    "tool-plan-delta": Decoder.tool_plan,
    "tool-call-start": Decoder.tool_call_start,
    "tool-call-delta": Decoder.tool_call_delta,
    "citation-start": Decoder.citation,
    "message-end": Decoder.message_end,
}
