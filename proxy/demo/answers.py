"""What the demo says: a pure function of the request.

Strategy: `answer` finds the words for the model's name and cuts them to size; a delta of OpenAI's stream is a token.
The one rule: what a provider would refuse is refused (`ProviderError`), with OpenAI's words and status.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import orjson

Json = dict[str, Any]
Break = Literal["", "error", "cut", "stall", "stall-first"]

PACE = 0.05
PACES = {"fast": 0.0, "slow": 0.5}
BREAKS: Mapping[str, Break] = {"fail-midstream": "error", "cut": "cut", "stall": "stall-first", "stall-midstream": "stall"}
MODELS = ("echo", *PACES, "long-100", "reason", "tool", "json", "inspect", "embed", "fail-429", "fail-500", *BREAKS)
LOREM = ("Water", "that", "runs", "through", "a", "penstock", "turns", "the", "wheel", "below", "and", "goes", "its", "way.")


class ProviderError(Exception):
    """An error that the demo answers with, as a provider would."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": None}}


@dataclass(frozen=True)
class Answer:
    """What will be said.

    pieces: one delta per token. pace: seconds before each. breaks: what happens after the first few of them, or before.
    """

    pieces: list[Json]
    finish: str
    pace: float = PACE
    breaks: Break = ""


def words(text: str) -> list[str]:
    """The text in pieces of one word each, blanks included: joined, they are the text."""
    return re.findall(r"\s*\S+\s*\Z|\s*\S+|\s+", text)


def answer(body: Json) -> Answer:
    """The answer to a chat request. Raises ProviderError."""
    model, messages = str(body.get("model")), body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ProviderError(400, "'messages' must be a list of at least one message.", "messages")
    if body.get("n") not in (None, 1):
        raise ProviderError(400, "The demo gives one choice only.", "n")
    pieces, finish = _pieces(model, body, messages)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if isinstance(limit, int) and len(pieces) > limit:
        pieces, finish = pieces[:limit], "length"
    pace = PACES.get(model, 0.0 if model.startswith("long-") else PACE)
    return Answer(pieces, finish, pace, BREAKS.get(model, ""))


def _pieces(model: str, body: Json, messages: list[Json]) -> tuple[list[Json], str]:
    last = messages[-1]
    said = next((text_of(message) for message in reversed(messages) if message.get("role") == "user"), "")
    echo = f"This is Penstock's demo provider; it has no model behind it. You said: {said}"
    if model == "tool" and last.get("role") != "tool":
        return _tool_call(body), "tool_calls"
    if number := re.fullmatch(r"long-([1-9]\d{0,4})", model):
        return _content("".join(f"{word} " for word in islice(cycle(LOREM), int(number[1]))), body), "stop"
    if model == "tool":
        return _content(f"The tool answered: {text_of(last)}", body), "stop"
    if model == "inspect":
        return _content(orjson.dumps(body).decode(), body), "stop"
    if model == "json":
        return _content(orjson.dumps(_json(body, said)).decode(), body), "stop"
    if model == "reason":
        thoughts = f"Words in the last message: {len(said.split())}. I shall repeat them."
        return [{"reasoning_content": word} for word in words(thoughts)] + _content(echo, body), "stop"
    if model in ("echo", *PACES, *BREAKS):
        return _content(echo, body), "stop"
    raise ProviderError(404, f"The model '{model}' does not exist. There are: {', '.join(MODELS)}.", "model")


def _content(text: str, body: Json) -> list[Json]:
    """The text up to the first stop sequence, in words."""
    stop = body.get("stop") or []
    for sequence in [stop] if isinstance(stop, str) else stop:
        text = text.partition(sequence)[0] if sequence else text
    return [{"content": word} for word in words(text)]


def _tool_call(body: Json) -> list[Json]:
    """A call of the first tool: its name, then its arguments in pieces of eight characters."""
    tools = body.get("tools")
    function = tools[0].get("function") if isinstance(tools, list) and tools and isinstance(tools[0], dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise ProviderError(400, "demo/tool needs a function in 'tools'.", "tools")
    schema = function.get("parameters") or {}
    text = orjson.dumps(sample({**schema, "type": "object"}, schema)).decode()
    named = {"name": function["name"], "arguments": ""}
    opening = {"index": 0, "id": f"call_{digest(body)}", "type": "function", "function": named}
    rest = [{"index": 0, "function": {"arguments": text[at : at + 8]}} for at in range(0, len(text), 8)]
    return [{"tool_calls": [call]} for call in (opening, *rest)]


def _json(body: Json, said: str) -> Any:
    wanted = body.get("response_format") or {}
    schema = (wanted.get("json_schema") or {}).get("schema")
    return sample(schema, schema) if schema else {"answer": said}


def sample(schema: Any, root: Any, depth: int = 0) -> Any:
    """A value that fits the schema, as far as its types, enums and required properties go (https://json-schema.org)."""
    if not isinstance(schema, dict) or depth > 16:
        return None
    if isinstance(schema.get("$ref"), str):
        found = root
        for name in schema["$ref"].removeprefix("#").strip("/").split("/"):
            found = found.get(name, {}) if name and isinstance(found, dict) else found
        return sample(found, root, depth + 1)
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    for name in ("enum", "examples"):
        if schema.get(name):
            return schema[name][0]
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return sample(schema[name][0], root, depth + 1)
    kind = schema.get("type") or ("object" if "properties" in schema else None)
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: sample(properties.get(name, {}), root, depth + 1) for name in schema.get("required") or []}
    if kind == "array":
        return [sample(schema.get("items"), root, depth + 1) for _ in range(schema.get("minItems", 1))]
    if kind in ("integer", "number"):
        return schema.get("minimum", 1)
    return {"string": "demo".ljust(schema.get("minLength", 0), "."), "boolean": True}.get(str(kind))


def digest(body: Json) -> str:
    """What ids are made of: the same for the same request."""
    return hashlib.sha256(orjson.dumps(body)).hexdigest()[:24]


def text_of(message: Json) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")
