"""A whole Cohere reply as one `chat.completion`.

Strategy: the message's parts are read in the order in which a stream would have sent them, so both forms add up to the same.
The one rule: a reply whose finish reason is a failure is an error here too, whatever text came with it.

https://docs.cohere.com/reference/chat#response.body
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call, Target
from proxy.chunks import ChunkStream
from proxy.decoder import parse_event
from proxy.errors import Malformed
from proxy.faults import error_words, in_band_error
from proxy.reply import Completion
from proxy.wire.cohere import parts

Json = dict[str, Any]


def decode_whole(call: Call, target: Target, body: bytes) -> Completion:
    """The reply as OpenAI's `chat.completion`. Raises UpstreamError for an error inside a 200, Malformed for another shape."""
    reply = parse_event(body)
    if not isinstance(reply.get("message"), dict):
        if reply.get("message") or reply.get("error"):
            raise in_band_error(error_words(reply))
        raise Malformed("The provider sent a reply without a message.")
    try:
        return _completion(call, reply)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as fault:
        raise Malformed(f"The provider sent a reply of an unexpected shape ({type(fault).__name__}).") from None


def _completion(call: Call, reply: Json) -> Completion:
    message = _message(call, reply["message"])
    native = reply.get("finish_reason")
    reason = parts.finish_reason(native, reply.get("error")) or ("tool_calls" if "tool_calls" in message else "stop")
    choice: Json = {"index": 0, "message": message, "finish_reason": reason, "native_finish_reason": native or None}
    if reply.get("logprobs"):
        choice["logprobs"] = parts.logprobs(reply["logprobs"])
    completion: Completion = {
        "id": str(reply.get("id") or f"chatcmpl-{call.nonce}"),
        "object": "chat.completion",
        "created": call.created,
        "model": call.model,
        "choices": [choice],
    }
    counted = parts.usage(reply.get("usage"))
    return {**completion, "usage": counted} if counted else completion


def _message(call: Call, found: Json) -> Json:
    contents = found.get("content") or []
    if isinstance(contents, str):
        contents = [{"type": "text", "text": contents}]
    texts = [part["text"] for part in contents if isinstance(part.get("text"), str)]
    calls = _tool_calls(call, found.get("tool_calls") or [])
    message: Json = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    details = _reasoning(contents, found.get("tool_plan"))
    notes = [note for citation in found.get("citations") or [] for note in parts.citation_notes(citation)]
    blocks = [part for part in contents if part.get("type") not in (None, "text", "thinking")]
    extras = {
        "reasoning_content": "".join(detail["text"] for detail in details),
        "reasoning_details": details,
        "tool_calls": calls,
        "annotations": notes,
        "provider_blocks": blocks,
    }
    return message | {name: value for name, value in extras.items() if value}


def _reasoning(contents: list[Json], plan: Any) -> list[Json]:
    texts = [(part["thinking"], False) for part in contents if part.get("thinking")]
    if plan:
        texts.append((plan, True))
    return [parts.reasoning_detail(text, index, is_plan) for index, (text, is_plan) in enumerate(texts)]


def _tool_calls(call: Call, calls: list[Json]) -> list[Json]:
    """The calls as a stream would have numbered and named them."""
    stream = ChunkStream(call)
    found = []
    for number, item in enumerate(calls):
        tool = stream.open_tool(number, item.get("id"), item["function"]["name"], item["function"].get("arguments") or "")
        function = {"name": tool.name, "arguments": tool.arguments}
        found.append({"id": tool.id, "type": "function", "function": function})
    return found
