"""An OpenAI-shaped request into a Messages request (https://docs.anthropic.com/en/api/messages).

Strategy: every field is taken out of the request by the function that knows it; what Anthropic documents under the very same
name passes as it is, and `Fields.leftover` refuses or lists the rest.
The one rule: what a client asked for natively (`thinking`, `output_config`, `stop_sequences`…) is sent as it stands; only what
the gateway itself derives from an OpenAI field is fitted to the model.
"""

from __future__ import annotations

from typing import Any

from proxy import translation
from proxy.call import Call, Target
from proxy.translation import Fields, invalid, unsupported
from proxy.transport import UpstreamRequest
from proxy.wire.anthropic.messages import conversation
from proxy.wire.anthropic.thinking import limit_and_thinking, sampling
from proxy.wire.anthropic.tools import tool_choice, tools

Json = dict[str, Any]

VERSION = "2023-06-01"

# Documented by Anthropic under these names, beta fields included; OpenAI has nothing of the kind.
PASSED = frozenset(
    {
        "cache_control",
        "container",
        "context_management",
        "inference_geo",
        "mcp_servers",
        "output_format",
        "speed",
        "stop_sequences",
    }
)

SERVICE_TIERS = {"auto": "auto", "default": "standard_only", "standard_only": "standard_only"}


def encode(call: Call, target: Target) -> UpstreamRequest:
    """The POST to `{base_url}/messages`. Raises Refused (400) with the path of what Anthropic has no place for."""
    if call.kind == "embeddings":
        unsupported(target, "model", "embeddings")
    fields = Fields(call, target)
    fields.take("messages")
    body: Json = {"model": target.model, "stream": call.stream}
    system, body["messages"] = conversation(fields, fields.take("system"))
    if system:
        body["system"] = system
    _tools(fields, body)
    fields.pass_on(body, PASSED)
    _stop(fields, body)
    _output_config(fields, body)
    limit_and_thinking(fields, body)
    sampling(fields, body)
    _bookkeeping(fields, body)
    dropped = fields.leftover()
    url = translation.endpoint(target.provider, target.model, "/messages")
    return UpstreamRequest(url, _headers(call, target), translation.json_body(body), dropped)


def _headers(call: Call, target: Target) -> dict[str, str]:
    extra = {"anthropic-version": VERSION}
    if beta := call.headers.get("anthropic-beta"):
        extra["anthropic-beta"] = beta
    return translation.headers(target.provider, "x-api-key", extra)


def _tools(fields: Fields, body: Json) -> None:
    offered = tools(fields)
    if offered:
        body["tools"] = offered
    choice = tool_choice(fields, offered)
    if choice is not None:
        body["tool_choice"] = choice


def _stop(fields: Fields, body: Json) -> None:
    """`stop` is a string or a list; sequences of nothing but white space are refused by Anthropic, so they are dropped."""
    stop = fields.take("stop")
    if stop is None:
        return
    sequences = [stop] if isinstance(stop, str) else stop
    if not isinstance(sequences, list) or not all(isinstance(sequence, str) for sequence in sequences):
        invalid("stop", "must be a string or a list of strings")
    kept = [sequence for sequence in sequences if sequence.strip()]
    if len(kept) < len(sequences):
        fields.drop("stop")
    if kept:
        body["stop_sequences"] = kept


def _output_config(fields: Fields, body: Json) -> None:
    """`response_format` -> `output_config.format` (https://docs.anthropic.com/en/docs/build-with-claude/structured-outputs)."""
    config = fields.take("output_config")
    if config is not None and not isinstance(config, dict):
        invalid("output_config", "must be an object")
    config = dict(config or {})
    schema = _schema(fields)
    if schema is not None:
        config.setdefault("format", {"type": "json_schema", "schema": schema})
    if config:
        body["output_config"] = config


def _schema(fields: Fields) -> Json | None:
    """The JSON schema that the answer must follow; `json_object` (any JSON) has no counterpart and is refused."""
    wanted = fields.take("response_format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        invalid("response_format", "must be an object")
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind != "json_schema":
        unsupported(fields.target, "response_format", f"response_format of type '{kind}'")
    holder = wanted.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict):
        invalid("response_format.json_schema.schema", "must be an object")
    return schema


def _bookkeeping(fields: Fields, body: Json) -> None:
    """Who asks, and how urgently. Anthropic's `metadata` has one field, `user_id`; other labels stay with the gateway."""
    metadata = fields.take("metadata")
    labels = metadata if isinstance(metadata, dict) else {}
    user = next((id for id in (fields.take("user"), fields.take("safety_identifier")) if id), None)
    user = labels.get("user_id") or user
    if user is not None:
        body["metadata"] = {"user_id": str(user)}
    if labels.keys() - {"user_id"}:
        fields.drop("metadata")
    tier = fields.take("service_tier")
    if tier in SERVICE_TIERS:
        body["service_tier"] = SERVICE_TIERS[tier]
    elif tier is not None:
        fields.drop("service_tier")
