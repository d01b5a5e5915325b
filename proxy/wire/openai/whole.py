"""Whole replies: one `chat.completion`, `text_completion` or list of embeddings, in the promised form.

The one rule: the same quirks as in streams, so that a whole reply says what the folded stream would have said.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxy.call import Call, Target
from proxy.errors import Malformed
from proxy.faults import error_words, in_band_error
from proxy.reply import Completion
from proxy.wire.openai import quirks

Json = dict[str, Any]


def decode_whole(call: Call, target: Target, body: bytes) -> Completion:
    """The completion, with the model as the client spelled it. Raises UpstreamError for an error inside a 200, Malformed."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Malformed("The provider's reply is not JSON.") from None
    if not isinstance(found, dict):
        raise Malformed("The provider's reply is not a JSON object.")
    if found.get("error") or found.get("object") == "error" or found.get("type") == "error":
        raise in_band_error(error_words(found))
    try:
        return _embeddings(found, call) if call.kind == "embeddings" else _completion(found, call)
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise Malformed(f"The provider's reply has an unexpected shape ({type(fault).__name__}).") from None


def _embeddings(found: Json, call: Call) -> Json:
    if not isinstance(found["data"], list):
        raise TypeError
    return {"object": "list", **found, "model": call.model}


def _completion(found: Json, call: Call) -> Completion:
    completion = {
        **found,
        "id": str(found.get("id") or f"chatcmpl-{call.nonce}"),
        "object": "chat.completion",
        "created": _time(found.get("created")) or call.created,
        "model": call.model,
        "choices": [_choice(choice, position, call) for position, choice in enumerate(found["choices"])],
    }
    if not completion["choices"]:
        raise Malformed("The provider's reply has no choices.")
    if annotations := quirks.annotations_of(found):
        message = completion["choices"][0]["message"]
        message["annotations"] = [*(message.get("annotations") or []), *annotations]
    if usage := quirks.usage_of(found):
        completion["usage"] = quirks.usage(usage)
    return completion


# A message with nothing to see to; vendors that follow OpenAI send no other where there is only text.
PLAIN = frozenset({"role", "content", "refusal"})
LEFT_OUT = frozenset({"delta", "text", "usage"})


def _choice(choice: Json, position: int, call: Call) -> Json:
    message, reason = choice.get("message"), choice.get("finish_reason")
    if type(message) is dict and message.keys() <= PLAIN and reason == "stop" and LEFT_OUT.isdisjoint(choice):
        content = message.get("content")
        if type(content) is str and content and message.get("role") and type(choice.get("index")) is int:
            return {**choice, "native_finish_reason": choice.get("native_finish_reason") or reason}
    return _any_choice(choice, position, call)


def _any_choice(choice: Json, position: int, call: Call) -> Json:
    """Any choice, part by part."""
    message = dict(choice.get("message") or choice.get("delta") or {"content": choice["text"]})
    index = choice["index"] if type(choice.get("index")) is int else position
    text, thinking, other = quirks.split_content(message.get("content"))
    message["role"] = message.get("role") or "assistant"
    message["content"] = text or (None if message.get("content") is None or thinking else "")
    if reasoning := quirks.reasoning_of(message) or thinking:
        message["reasoning_content"] = reasoning
    message.pop("reasoning", None)
    if other:
        message["provider_blocks"] = other
    calls = [_tool_call(tool, number, index, call) for number, tool in enumerate(message.get("tool_calls") or ())]
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
    native = choice.get("finish_reason")
    reason = quirks.finish_reason(native) if native else ("tool_calls" if calls else "stop")
    kept = {name: value for name, value in choice.items() if name not in LEFT_OUT}
    return {
        **kept,
        "index": index,
        "message": message,
        "finish_reason": reason,
        "native_finish_reason": choice.get("native_finish_reason") or native,
    }


def _time(created: object) -> int:
    """Unix seconds, or 0 for what is none."""
    return int(created) if isinstance(created, int | float) and 0 < created < 2**53 else 0


def _tool_call(tool: Json, number: int, index: int, call: Call) -> Json:
    """A call with an id (Gemini's compatible API leaves it empty) and its arguments as text."""
    if tool.get("custom"):
        return {name: value for name, value in tool.items() if name != "index"}
    function = tool.get("function") or {}
    arguments = quirks.arguments_text(function.get("arguments")) or "{}"
    return {
        **{name: value for name, value in tool.items() if name != "index"},
        "id": str(tool.get("id") or f"call_{call.nonce}_{index}_{number}"),
        "type": tool.get("type") or "function",
        "function": {**function, "name": function.get("name") or "", "arguments": arguments},
    }
