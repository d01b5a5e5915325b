"""An OpenAI-shaped chat request as Cohere's `POST /v2/chat`.

Strategy: the messages are `messages`' business; tools and formats have their own functions here, parameters go through one
table of names, and whatever nobody took is left to `Fields.leftover`.
The one rule: where a request has Cohere's own spelling of a field beside OpenAI's, Cohere's wins.

https://docs.cohere.com/reference/chat#request.body
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call, Target
from proxy.translation import Fields, endpoint, headers, invalid, json_body, messages_of, unsupported
from proxy.transport import UpstreamRequest
from proxy.wire.cohere.messages import encode_message

Json = dict[str, Any]

NATIVE = frozenset(
    {"documents", "citation_options", "safety_mode", "thinking", "k", "p", "priority", "strict_tools", "stop_sequences"}
)
SAME = frozenset({"temperature", "seed", "frequency_penalty", "presence_penalty", "logprobs"})
# The later name wins where a request has both.
RENAMED = (("max_tokens", "max_tokens"), ("max_completion_tokens", "max_tokens"), ("top_p", "p"), ("top_k", "k"))
STOP_LIMIT = 5
# Cohere's thinking has a budget where OpenAI has an effort; "high" and above are Cohere's own default: no bound.
EFFORT_BUDGETS = {"minimal": 512, "low": 1024, "medium": 4096, "high": None, "xhigh": None}


def encode(call: Call, target: Target) -> UpstreamRequest:
    """The request for one attempt. Raises Refused (400) with the path of what Cohere's format cannot carry."""
    if call.kind == "embeddings":
        unsupported(target, "model", "Embeddings")
    fields = Fields(call, target)
    fields.take("messages")
    body: Json = {"model": target.model, "messages": [encode_message(m, n, target) for n, m in enumerate(messages_of(call))]}
    body["stream"] = call.stream
    _sampling(fields, body)
    _tools(fields, body)
    _response_format(fields, body)
    _thinking(fields, body)
    fields.pass_on(body, NATIVE)
    dropped = fields.leftover()
    provider = target.provider
    return UpstreamRequest(endpoint(provider, target.model, "/chat"), headers(provider), json_body(body), dropped)


def _sampling(fields: Fields, body: Json) -> None:
    fields.pass_on(body, SAME)
    for name, theirs in RENAMED:
        value = fields.take(name)
        if value is not None:
            body[theirs] = value
    stop = fields.take("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if stops:
        if not isinstance(stops, list) or len(stops) > STOP_LIMIT:
            invalid("stop", f"must be a string or a list of at most {STOP_LIMIT} strings")
        body["stop_sequences"] = stops


def _tools(fields: Fields, body: Json) -> None:
    """Function tools. One `strict` function makes all of them strict: Cohere has one switch, and strict only promises more."""
    tools = fields.take("tools") or []
    if not isinstance(tools, list):
        invalid("tools", "must be a list")
    if tools:
        functions = [_function(tool, f"tools[{number}]", fields.target) for number, tool in enumerate(tools)]
        body["tools"] = [{"type": "function", "function": function} for function, _ in functions]
        if any(strict for _, strict in functions):
            body["strict_tools"] = True
    choice = fields.take("tool_choice")
    if choice in ("required", "none", "REQUIRED", "NONE"):
        if tools:
            body["tool_choice"] = choice.upper()
        elif choice.lower() == "required":
            invalid("tool_choice", "needs tools")
    elif choice not in (None, "auto"):
        unsupported(fields.target, "tool_choice", "A choice of certain tools")


def _function(tool: Any, path: str, target: Target) -> tuple[Json, bool]:
    if not isinstance(tool, dict) or not isinstance(tool.get("type", "function"), str):
        invalid(path, "must be a tool")
    if tool.get("type", "function") != "function":
        unsupported(target, f"{path}.type", f"A tool of type '{tool['type']}'")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        invalid(f"{path}.function.name", "must be a string")
    found: Json = {"name": function["name"]}
    if function.get("description") is not None:
        found["description"] = function["description"]
    # Cohere requires `parameters`; OpenAI reads their absence as an empty list.
    found["parameters"] = function.get("parameters") or {"type": "object", "properties": {}}
    return found, function.get("strict") is True


def _response_format(fields: Fields, body: Json) -> None:
    """`json_schema` stands directly under `json_object` here; Cohere's own spelling of it passes."""
    wanted = fields.take("response_format")
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_schema":
        outer = wanted.get("json_schema")
        if not isinstance(outer, dict):
            invalid("response_format.json_schema", "must be an object")
        body["response_format"] = {"type": "json_object"}
        if outer.get("schema") is not None:
            body["response_format"]["json_schema"] = outer["schema"]
    elif kind in ("json_object", "text"):
        body["response_format"] = wanted
    else:
        unsupported(fields.target, "response_format", "This response_format")


def _thinking(fields: Fields, body: Json) -> None:
    effort = fields.take("reasoning_effort")
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif isinstance(effort, str) and effort in EFFORT_BUDGETS:
        budget = EFFORT_BUDGETS[effort]
        body["thinking"] = {"type": "enabled"} if budget is None else {"type": "enabled", "token_budget": budget}
    elif effort is not None:
        invalid("reasoning_effort", f"must be one of none, {', '.join(EFFORT_BUDGETS)}")
