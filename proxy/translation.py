"""What the wire formats share when they turn an OpenAI-shaped request into their own.

Strategy: a format takes the fields it can carry out of the request one by one; what is left over at the end is either
refused (it would have changed the answer) or dropped and listed for the client (contract: X-Penstock-Dropped).
The one rule: nothing disappears silently, and every refusal names the path of its field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import quote

import orjson

from proxy.call import Call, Provider, Target
from proxy.errors import Refused

Json = dict[str, Any]

# Fields of the OpenAI request that change the answer: where a format cannot carry them, that is a 400, never a silent drop.
ANSWER_FIELDS = frozenset(
    {
        "tools",
        "tool_choice",
        "response_format",
        "functions",
        "function_call",
        "modalities",
        "audio",
        "web_search_options",
        "prediction",
    }
)


def unsupported(target: Target, param: str, what: str | None = None) -> NoReturn:
    """Refuse the request: its field `param` cannot be carried by the target's wire format."""
    raise Refused(
        f"{what or param} cannot be carried to '{target}' (wire format '{target.provider.api}').",
        code="unsupported_by_target",
        param=param,
    )


def invalid(param: str, message: str) -> NoReturn:
    """Refuse the request: its field `param` has the wrong shape."""
    raise Refused(f"{param}: {message}", code="invalid_value", param=param)


@dataclass(slots=True)
class Fields:
    """The request's fields, taken out one by one; `leftover` decides about those that nobody took.

    dropped: names of fields that were left out on purpose or by necessity, for X-Penstock-Dropped.
    """

    call: Call
    target: Target
    _left: Json = field(init=False)
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._left = {name: value for name, value in self.call.request.items() if value is not None}
        for name in ("model", "stream", "stream_options"):
            self._left.pop(name, None)

    def take(self, name: str) -> Any:
        """The field's value, or None where it is absent or null; it counts as carried."""
        return self._left.pop(name, None)

    def drop(self, name: str) -> None:
        """The field was understood but cannot be carried; refused instead where the client asked for strictness."""
        self._left.pop(name, None)
        if self.call.options.strict_params:
            unsupported(self.target, name)
        self.dropped.append(name)

    def pass_on(self, body: Json, names: frozenset[str]) -> None:
        """Copy fields that the target's own API documents under the very same name."""
        for name in names & self._left.keys():
            body[name] = self._left.pop(name)

    def leftover(self) -> tuple[str, ...]:
        """Nothing more will be taken: refuse what changes the answer, drop and list the rest."""
        n = self.take("n")
        if n not in (None, 1):
            unsupported(self.target, "n", "n > 1")
        for name in sorted(self._left):
            if name in ANSWER_FIELDS and self._left[name] not in ([], {}, "none"):
                unsupported(self.target, name)
            self.drop(name)
        return tuple(self.dropped)


def json_body(body: Json) -> bytes:
    """The body as bytes; what cannot be encoded (nested too deep) is the client's fault."""
    try:
        return orjson.dumps(body)
    except TypeError as error:
        raise Refused(f"The request cannot be encoded: {error}.", code="invalid_request") from None


DATA_URL = re.compile(r"data:(?P<media_type>[\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)


def data_url(url: str) -> tuple[str, str] | None:
    """(media type, base64 text) of a `data:` URL (RFC 2397), or None if it is no base64 data URL."""
    match = DATA_URL.match(url[:200])
    return (match["media_type"], url[match.end() :]) if match else None


def text_of(content: object, path: str) -> str:
    """The text of a message's content: a string, null, or a list of text parts; any other part is refused by path."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        invalid(path, "must be a string or a list of content parts")
    texts: list[str] = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal", "input_text", "output_text"):
            invalid(f"{path}[{number}]", "only text parts are possible here")
        texts.append(str(part.get("text") or part.get("refusal") or ""))
    return "".join(texts)


def messages_of(call: Call) -> list[Json]:
    """The request's messages, checked to be a list of objects with a role."""
    messages = call.request.get("messages")
    if not isinstance(messages, list) or not messages:
        invalid("messages", "must be a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            invalid(f"messages[{number}]", "must be an object")
        if not isinstance(message.get("role"), str):
            invalid(f"messages[{number}].role", "must be a string")
    return messages


def arguments_of(call: Json, path: str) -> Json:
    """The arguments of an assistant's earlier tool call as an object; "" stands for {}."""
    function = call.get("function")
    text = function.get("arguments") if isinstance(function, dict) else None
    if not text:
        return {}
    if isinstance(text, dict):
        return text
    try:
        found = orjson.loads(text)
    except (orjson.JSONDecodeError, TypeError):
        invalid(f"{path}.function.arguments", "must be a JSON object as text")
    if not isinstance(found, dict):
        invalid(f"{path}.function.arguments", "must be a JSON object as text")
    return found


def endpoint(provider: Provider, model: str, path: str, query: Mapping[str, str] | None = None) -> str:
    """base_url + path + the row's query; `{model}` in either becomes the model, each segment percent-encoded."""
    url = provider.base_url + path
    if "{model}" in url:
        url = url.replace("{model}", "/".join(quote(segment, safe="") for segment in model.split("/")))
    pairs = [*(query or {}).items(), *provider.query]
    return url + "?" + "&".join(f"{quote(name)}={quote(value)}" for name, value in pairs) if pairs else url


def headers(provider: Provider, key_header: str = "Authorization", extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Request headers: JSON, no compression (a compressed stream cannot be relayed as it comes), the key, the row's own."""
    found = {"Content-Type": "application/json", "Accept-Encoding": "identity", **(extra or {})}
    if provider.api_key:
        name = provider.key_header or key_header
        found[name] = f"Bearer {provider.api_key}" if name.lower() == "authorization" else provider.api_key
    found.update(provider.headers)
    return found
