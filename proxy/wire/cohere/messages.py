"""The messages of an OpenAI-shaped request as Cohere's.

Strategy: one function per role, one per type of content part, found in tables.
The one rule: a part that Cohere does not document is refused with its path, never sent on and never left out.

https://docs.cohere.com/reference/chat#request.body.messages
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import orjson

from proxy.call import Target
from proxy.translation import invalid, text_of, unsupported
from proxy.wire.cohere.parts import FORMAT, TOOL_PLAN

Json = dict[str, Any]
PartKinds = dict[str, Callable[[Json, str], Json]]


def encode_message(message: Json, number: int, target: Target) -> Json:
    """Message `number` of the request as Cohere's. Raises Refused with the path of what it cannot carry."""
    path = f"messages[{number}]"
    convert = ROLES.get(message["role"])
    if convert is None:
        unsupported(target, f"{path}.role", f"A message of the role '{message['role']}'")
    return convert(message, path, target)


def _system(message: Json, path: str, target: Target) -> Json:
    return {"role": "system", "content": text_of(message.get("content"), f"{path}.content")}


def _user(message: Json, path: str, target: Target) -> Json:
    content = _parts(message.get("content"), f"{path}.content", target, {"text": _text, "image_url": _image})
    return {"role": "user", "content": content}


def _tool(message: Json, path: str, target: Target) -> Json:
    """A tool's result: a string as it is, or a list of texts and documents (these are what Cohere can cite)."""
    if not isinstance(message.get("tool_call_id"), str):
        invalid(f"{path}.tool_call_id", "must be a string")
    content = _parts(message.get("content"), f"{path}.content", target, {"text": _text, "document": _document})
    return {"role": "tool", "tool_call_id": message["tool_call_id"], "content": content}


def _assistant(message: Json, path: str, target: Target) -> Json:
    """An earlier answer. Thinking and plan come from the message's own fields, else from its `reasoning_details`."""
    for name in ("function_call", "audio"):
        if message.get(name):
            unsupported(target, f"{path}.{name}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        invalid(f"{path}.tool_calls", "must be a list")
    found: Json = {"role": "assistant"}
    content = _assistant_content(message, path, target)
    if content or not calls:
        found["content"] = content
    if calls:
        found["tool_calls"] = [_call(item, f"{path}.tool_calls[{number}]", target) for number, item in enumerate(calls)]
    plan = _plan(message)
    if plan:
        found["tool_plan"] = plan
    if message.get("citations"):
        found["citations"] = message["citations"]
    return found


def _assistant_content(message: Json, path: str, target: Target) -> str | list[Json]:
    kinds: PartKinds = {"text": _text, "refusal": _refusal, "thinking": _thought}
    content = _parts(message.get("content"), f"{path}.content", target, kinds)
    thoughts: list[Json] = [{"type": "thinking", "thinking": text} for text in _thoughts(message)]
    if isinstance(content, str):
        return [*thoughts, *([{"type": "text", "text": content}] if content else [])] if thoughts else content
    given = any(part["type"] == "thinking" for part in content)
    return content if given else [*thoughts, *content]


def _details(message: Json) -> list[Json]:
    """The entries that a reply of this format made; others are of no use here."""
    details = message.get("reasoning_details")
    entries = details if isinstance(details, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and entry.get("format") == FORMAT and entry.get("text")]


def _thoughts(message: Json) -> list[str]:
    """The thinking, one text per content; deltas that a client merely collected are joined by their `index`."""
    entries = [entry for entry in _details(message) if entry.get("id") != TOOL_PLAN]
    return ["".join(str(entry["text"]) for entry in group) for _, group in groupby(entries, lambda entry: entry.get("index"))]


def _plan(message: Json) -> str:
    """The plan that came before the calls. Where a client kept only the text of the reasoning, that stands in for it."""
    if isinstance(message.get("tool_plan"), str):
        return str(message["tool_plan"])
    text = message.get("reasoning_content")
    if message.get("tool_calls") and "reasoning_details" not in message and isinstance(text, str):
        return text
    return "".join(str(entry["text"]) for entry in _details(message) if entry.get("id") == TOOL_PLAN)


def _call(item: Any, path: str, target: Target) -> Json:
    if not isinstance(item, dict) or not isinstance(item.get("id"), str):
        invalid(f"{path}.id", "must be a string")
    if item.get("type", "function") != "function":
        unsupported(target, f"{path}.type", "A call of this type")
    function = item.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        invalid(f"{path}.function.name", "must be a string")
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    return {"id": item["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parts(content: Any, path: str, target: Target, kinds: PartKinds) -> str | list[Json]:
    """A string stays one (None is ""); of a list, each part by the function for its type."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        invalid(path, "must be a string or a list of content parts")
    found = []
    for number, part in enumerate(content):
        here = f"{path}[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            invalid(here, "must be a content part with a type")
        convert = kinds.get(part["type"])
        if convert is None:
            unsupported(target, here, f"A content part of type '{part['type']}'")
        found.append(convert(part, here))
    return found


def _text(part: Json, path: str) -> Json:
    return {"type": "text", "text": _string(part.get("text"), f"{path}.text")}


def _refusal(part: Json, path: str) -> Json:
    return {"type": "text", "text": _string(part.get("refusal"), f"{path}.refusal")}


def _thought(part: Json, path: str) -> Json:
    return {"type": "thinking", "thinking": _string(part.get("thinking"), f"{path}.thinking")}


def _document(part: Json, path: str) -> Json:
    if not isinstance(part.get("document"), dict | str):
        invalid(f"{path}.document", "must be an object or a string")
    return {"type": "document", "document": part["document"]}


def _image(part: Json, path: str) -> Json:
    """Cohere fetches http(s) URLs itself and takes `data:` URLs as they are."""
    image = part.get("image_url")
    image = {"url": image} if isinstance(image, str) else image
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str) or not url.startswith(("data:", "http://", "https://")):
        invalid(f"{path}.image_url.url", "must be an http(s) or data: URL")
    return {"type": "image_url", "image_url": image}


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        invalid(path, "must be a string")
    return value


ROLES: dict[str, Callable[[Json, str, Target], Json]] = {
    "system": _system,
    "developer": _system,
    "user": _user,
    "assistant": _assistant,
    "tool": _tool,
}
