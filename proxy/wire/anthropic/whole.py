"""A whole Messages reply into one `chat.completion` (https://docs.anthropic.com/en/api/messages).

Strategy: one pass over the content blocks, each kind with its own line in a table, all adding to one assistant message.
The one rule: what a client reads here is what it would have put together from the stream of the same answer; only a thinking
block, which a stream gives in pieces, is one entry of `reasoning_details` here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from proxy.call import Call, Target
from proxy.errors import Malformed
from proxy.faults import error_words
from proxy.reply import Completion
from proxy.wire.anthropic.terms import FORMAT, annotation, choice_extras, finish_reason, merge_usage, reported, usage

Json = dict[str, Any]


def decode_whole(call: Call, target: Target, body: bytes) -> Completion:
    """One `chat.completion`. Raises UpstreamError for an error inside a 200, Malformed for anything that is no message."""
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Malformed("The provider's reply is not JSON.") from None
    if isinstance(reply, dict) and (reply.get("type") == "error" or reply.get("error")):
        raise reported(error_words(reply))
    try:
        return _completion(call, reply)
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise Malformed(f"The provider's reply has an unexpected shape ({type(fault).__name__}).") from None


def _completion(call: Call, reply: Json) -> Completion:
    message = _message(call, reply["content"])
    native = reply.get("stop_reason")
    implied = "tool_calls" if "tool_calls" in message else "stop"
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": finish_reason(native) if native else implied,
        "native_finish_reason": native,
        **choice_extras(reply),
    }
    completion: Completion = {
        "id": reply.get("id") or f"chatcmpl-{call.nonce}",
        "object": "chat.completion",
        "created": call.created,
        "model": call.model,
        "choices": [choice],
    }
    counts: Json = {}
    merge_usage(counts, reply)
    if counts:
        completion["usage"] = usage(counts)
    return completion


class _Parts:
    """What the blocks add up to."""

    __slots__ = ("annotations", "blocks", "call", "characters", "details", "reasoning", "texts", "tools")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.texts: list[str] = []
        self.characters = 0
        self.reasoning: list[str] = []
        self.details: list[Json] = []
        self.tools: list[Json] = []
        self.annotations: list[Json] = []
        self.blocks: list[Json] = []

    def text(self, block: Json) -> None:
        start = self.characters
        self.texts.append(block.get("text") or "")
        self.characters += len(self.texts[-1])
        self.annotations += [annotation(citation, start, self.characters) for citation in block.get("citations") or []]

    def thinking(self, block: Json) -> None:
        text = block.get("thinking") or ""
        entry = {"type": "reasoning.text", "text": text, "format": FORMAT, "index": len(self.details)}
        if block.get("signature"):
            entry["signature"] = block["signature"]
        self.reasoning.append(text)
        self.details.append(entry)

    def redacted(self, block: Json) -> None:
        entry = {"type": "reasoning.encrypted", "data": block["data"], "format": FORMAT, "index": len(self.details)}
        self.details.append(entry)

    def tool(self, block: Json) -> None:
        function = {"name": block["name"], "arguments": orjson.dumps(block.get("input") or {}).decode()}
        id = block.get("id") or f"call_{self.call.nonce}_0_{len(self.tools)}"
        self.tools.append({"id": str(id), "type": "function", "function": function})

    def kept(self, block: Json) -> None:
        self.blocks.append(block)


KINDS: Mapping[object, Callable[[_Parts, Json], None]] = {
    "text": _Parts.text,
    "thinking": _Parts.thinking,
    "redacted_thinking": _Parts.redacted,
    "tool_use": _Parts.tool,
}


def _message(call: Call, content: list[Json]) -> Json:
    parts = _Parts(call)
    for block in content:
        KINDS.get(block.get("type"), _Parts.kept)(parts, block)
    optional = {
        "reasoning_content": "".join(parts.reasoning),
        "reasoning_details": parts.details,
        "tool_calls": parts.tools,
        "annotations": parts.annotations,
        "provider_blocks": parts.blocks,
    }
    found = {name: value for name, value in optional.items() if value}
    return {"role": "assistant", "content": "".join(parts.texts) or None, **found}
