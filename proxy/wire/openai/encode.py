"""Requests: nearly a pass-through, because the client speaks this format too.

Strategy: the body goes on as it came, unknown fields included, with the target's own model name. Only three things are the
gateway's: asking for usage in streams, the fields that the gateway itself invented on assistant messages, and the way in
which a vendor takes earlier reasoning back (`Provider.reasoning`).
The one rule: nothing is copied that need not change; a prompt may be large.
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call, Provider, Target
from proxy.translation import endpoint, headers, json_body
from proxy.transport import UpstreamRequest

Json = dict[str, Any]

PATHS = {"chat": "/chat/completions", "completions": "/completions", "embeddings": "/embeddings"}


def encode(call: Call, target: Target) -> UpstreamRequest:
    """The request for `target`, streamed if the client wants a stream."""
    provider = target.provider
    body = {**call.request, "model": target.model}
    if call.kind != "embeddings":
        _ask_for_usage(body, call.stream, provider)
    if call.kind == "chat":
        body["messages"] = [_message(message, provider) for message in body.get("messages") or []]
    return UpstreamRequest(endpoint(provider, target.model, PATHS[call.kind]), headers(provider), json_body(body))


def _ask_for_usage(body: Json, stream: bool, provider: Provider) -> None:
    """`stream_options` where the row allows them; a vendor that refuses the field must not see it."""
    asked = body.pop("stream_options", None)
    if not stream:
        body.pop("stream", None)
    elif provider.usage == "stream_options":
        body["stream_options"] = {**asked, "include_usage": True} if isinstance(asked, dict) else {"include_usage": True}


GATEWAY_FIELDS = frozenset({"reasoning_content", "reasoning", "reasoning_details", "provider_blocks", "native_finish_reason"})
OTHER_WIRES = frozenset({"cohere-v2"})


def _message(message: Any, provider: Provider) -> Any:
    """An assistant's message without what the gateway added to it, but with its reasoning, if this vendor takes it back."""
    if not isinstance(message, dict) or GATEWAY_FIELDS.isdisjoint(message):
        return message
    kept = {name: value for name, value in message.items() if name not in GATEWAY_FIELDS}
    text = message.get("reasoning_content") or message.get("reasoning")
    details = message.get("reasoning_details")
    if provider.reasoning == "reasoning_details":
        if details := [entry for entry in details or () if isinstance(entry, dict) and entry.get("format") not in OTHER_WIRES]:
            kept["reasoning_details"] = details
        elif text:
            kept["reasoning"] = text
    elif provider.reasoning == "thinking_parts":
        if isinstance(text, str) and text:
            kept["content"] = [{"type": "thinking", "thinking": [{"type": "text", "text": text}]}, *_parts(kept.get("content"))]
    elif provider.reasoning != "none" and text is not None:
        kept[provider.reasoning] = text
    return kept


def _parts(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []
