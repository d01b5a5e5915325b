"""A Messages stream into chunks (https://docs.anthropic.com/en/docs/build-with-claude/streaming).

Strategy: a message is a list of content blocks; each is started, fed with deltas and stopped under its index. Text, thinking and
calls of the client's own tools become deltas at once; every other block, also of a type unknown today, is put together and
handed over whole at its stop. Types of events and deltas that are in no table are ignored, as Anthropic's versioning asks.
The one rule: only `message_stop` is the end. A stop reason alone is not, and neither is the end of the HTTP body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from proxy.call import Call, Target
from proxy.chunks import ToolCall
from proxy.decoder import SseDecoder
from proxy.errors import Malformed
from proxy.faults import error_words, parse_error_body
from proxy.wire.anthropic.terms import FORMAT, annotation, choice_extras, finish_reason, merge_usage, reported, usage

Json = dict[str, Any]


class Block:
    """One content block while it is open.

    raw: as the provider started it. pieces: its `input` so far, as JSON text. number: which reasoning block of the message it is.
    start: where its text begins in the message's content, in characters.
    """

    __slots__ = ("citations", "kind", "number", "pieces", "raw", "start", "tool")

    def __init__(self, raw: Json) -> None:
        self.kind = raw.get("type")
        self.raw = raw
        self.pieces: list[str] = []
        self.citations: list[Json] = []
        self.number = 0
        self.start = 0
        self.tool: ToolCall | None = None


class Decoder(SseDecoder):
    """Bytes of a Messages stream in, normalized chunks out."""

    def __init__(self, call: Call, target: Target) -> None:
        super().__init__(call, target)
        self._blocks: dict[object, Block] = {}
        self._counts: Json = {}
        self._reasoning = 0
        self._characters = 0

    def event(self, event: Json) -> None:
        handle = EVENTS.get(event.get("type", ""))
        if handle is not None:
            handle(self, event)

    def end(self) -> None:
        """Blocks that were never stopped (cut by max_tokens) are handed over before the finish chunk."""
        for index in list(self._blocks):
            self._close(index)
        super().end()

    def _odd(self, payload: bytes) -> Json:
        raise reported(parse_error_body(bytes(payload)))  # orjson takes no subclass of bytes

    # Events

    def _message_start(self, event: Json) -> None:
        message = event.get("message") or {}
        self.stream.identify(message.get("id"))
        self._count(message)

    def _block_start(self, event: Json) -> None:
        index = event.get("index")
        self._close(index)
        self._open(index, event["content_block"])

    def _block_delta(self, event: Json) -> None:
        delta = event["delta"]
        kind = delta.get("type")
        block = self._blocks.get(event.get("index")) or self._unannounced(event.get("index"), kind)
        if block is None:
            return
        feed = DELTAS.get((block.kind, kind))
        if feed is not None:
            feed(self, block, delta)
        elif block.kind not in TRANSLATED:
            extend(block, delta)

    def _block_stop(self, event: Json) -> None:
        self._close(event.get("index"))

    def _message_delta(self, event: Json) -> None:
        delta = event.get("delta") or {}
        native = delta.get("stop_reason")
        self.stream.choice().extras.update(choice_extras(delta))
        if native:
            self.stream.finish(finish_reason(native), native)
        self._count(event)

    def _message_stop(self, event: Json) -> None:
        self.end()

    def _error(self, event: Json) -> None:
        raise reported(error_words(event))

    def _count(self, event: Json) -> None:
        merge_usage(self._counts, event)
        self.stream.usage = usage(self._counts)

    # Blocks

    def _open(self, index: object, raw: Json) -> Block:
        block = self._blocks[index] = Block(raw)
        block.start = self._characters
        if block.kind in ("thinking", "redacted_thinking"):
            block.number = self._reasoning
            self._reasoning += 1
        start = STARTS.get(block.kind)
        if start is not None:
            start(self, block)
        return block

    def _unannounced(self, index: object, kind: object) -> Block | None:
        """A delta whose block was never started: text is kept; arguments of a call without a name cannot be."""
        if kind == "input_json_delta":
            raise Malformed("The provider sent arguments of a tool call that it had not begun.")
        implied = UNANNOUNCED.get(kind)
        return self._open(index, {"type": implied}) if implied else None

    def _close(self, index: object) -> None:
        block = self._blocks.pop(index, None)
        if block is None:
            return
        if block.citations:
            spans = [annotation(citation, block.start, self._characters) for citation in block.citations]
            self.stream.put({"annotations": spans})
        if block.tool is not None:
            self._close_tool(block, block.tool)
        elif block.kind not in TRANSLATED:
            self.stream.put({"provider_blocks": [complete(block)]})

    def _close_tool(self, block: Block, tool: ToolCall) -> None:
        """Input that came whole in the start event counts when no deltas came; no input at all is {}."""
        if not tool.arguments:
            self.stream.tool_text(tool, orjson.dumps(block.raw.get("input") or {}).decode())

    def _start_text(self, block: Block) -> None:
        self._text(block, block.raw)
        block.citations += block.raw.get("citations") or []

    def _start_tool(self, block: Block) -> None:
        block.tool = self.stream.open_tool(block, block.raw.get("id"), block.raw["name"])

    def _start_thinking(self, block: Block) -> None:
        self._thinking(block, block.raw)
        self._signature(block, block.raw)

    def _start_redacted(self, block: Block) -> None:
        entry = {"type": "reasoning.encrypted", "data": block.raw["data"], "format": FORMAT, "index": block.number}
        self.stream.put({"reasoning_details": [entry]})

    def _text(self, block: Block, delta: Json) -> None:
        text = delta.get("text")
        if text:
            self._characters += len(text)
            self.stream.put({"content": text})

    def _citation(self, block: Block, delta: Json) -> None:
        block.citations.append(delta["citation"])

    def _thinking(self, block: Block, delta: Json) -> None:
        text = delta.get("thinking")
        if text:
            entry = {"type": "reasoning.text", "text": text, "format": FORMAT, "index": block.number}
            self.stream.put({"reasoning_content": text, "reasoning_details": [entry]})

    def _signature(self, block: Block, delta: Json) -> None:
        signature = delta.get("signature")
        if signature:
            entry = {"type": "reasoning.text", "signature": signature, "format": FORMAT, "index": block.number}
            self.stream.put({"reasoning_details": [entry]})

    def _arguments(self, block: Block, delta: Json) -> None:
        if block.tool is not None:
            self.stream.tool_text(block.tool, delta.get("partial_json") or "")


def extend(block: Block, delta: Json) -> None:
    """A delta of a block that is kept whole: `input` comes as JSON text, other fields (compaction's content) as text."""
    for name, value in delta.items():
        if name == "partial_json":
            block.pieces.append(value or "")
        elif name != "type" and isinstance(value, str):
            block.raw[name] = (block.raw.get(name) or "") + value


def complete(block: Block) -> Json:
    """The block as Anthropic has it in a whole reply; input that was cut off in the middle stays text."""
    text = "".join(block.pieces)
    if text:
        try:
            block.raw["input"] = orjson.loads(text)
        except orjson.JSONDecodeError:
            block.raw["input"] = text
    return block.raw


TRANSLATED = frozenset({"text", "tool_use", "thinking", "redacted_thinking"})

UNANNOUNCED: Mapping[object, str] = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "thinking"}

EVENTS: Mapping[object, Callable[[Decoder, Json], None]] = {
    "content_block_delta": Decoder._block_delta,
    "content_block_start": Decoder._block_start,
    "content_block_stop": Decoder._block_stop,
    "message_start": Decoder._message_start,
    "message_delta": Decoder._message_delta,
    "message_stop": Decoder._message_stop,
    "error": Decoder._error,
}

STARTS: Mapping[object, Callable[[Decoder, Block], None]] = {
    "text": Decoder._start_text,
    "tool_use": Decoder._start_tool,
    "thinking": Decoder._start_thinking,
    "redacted_thinking": Decoder._start_redacted,
}

DELTAS: Mapping[tuple[object, object], Callable[[Decoder, Block, Json], None]] = {
    ("text", "text_delta"): Decoder._text,
    ("text", "citations_delta"): Decoder._citation,
    ("thinking", "thinking_delta"): Decoder._thinking,
    ("thinking", "signature_delta"): Decoder._signature,
    ("tool_use", "input_json_delta"): Decoder._arguments,
}
