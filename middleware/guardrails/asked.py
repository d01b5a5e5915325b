"""The text of a request: every piece of it that goes to a provider, with its path.

Strategy: one walk over messages, prompt and input; `visit(path, text, json)` gives what stands there instead. Nothing is copied
where nothing changes.
The one rule: what a provider reads as text is visited: all parts of all messages, results and arguments of tools, earlier
reasoning. Signed reasoning of the assistant's stays as it is, because its signature would not hold; whatever else says that it is
signed is visited like anything. Images and files are no text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Visit = Callable[[str, str, bool], str]

PLACES = ("messages", "prompt", "input", "suffix", "prediction")
DEEPER = ("content", "tool_calls", "function", "custom", "function_call", "reasoning_details", "provider_blocks")
# Where the assistant's reasoning stands in a message, and what it is there.
THOUGHTS = ("content", "reasoning_details")
SIGNED = frozenset({"thinking", "reasoning.text", "reasoning.summary"})


def rewritten(request: Json, visit: Visit) -> Json:
    """The request with its texts as `visit` gives them; itself where none changed."""
    changed = {name: new for name in PLACES if (new := _value(name, request.get(name), visit)) is not request.get(name)}
    return {**request, **changed} if changed else request


def _value(path: str, value: Any, visit: Visit, thought: bool = False) -> Any:
    """A text, or a list of texts, messages and parts. thought: the assistant's reasoning may stand here."""
    if isinstance(value, str):
        return visit(path, value, False)
    if isinstance(value, list):
        entries = [_value(f"{path}[{number}]", entry, visit, thought) for number, entry in enumerate(value)]
        return value if all(new is old for new, old in zip(entries, value, strict=True)) else entries
    return _object(path, value, visit, thought) if isinstance(value, dict) else value


def _object(path: str, found: Json, visit: Visit, thought: bool) -> Json:
    """A message, a part of one, a tool call."""
    if thought and found.get("signature") and found.get("type") in SIGNED:
        return found
    assistants = found.get("role") == "assistant"
    changed: Json = {}
    for name, value in found.items():
        where = f"{path}.{name}"
        if name == "arguments" and isinstance(value, str):
            new: Any = visit(where, value, True)
        elif isinstance(value, str):
            new = visit(where, value, False) if name in TEXTS else value
        else:
            new = _value(where, value, visit, assistants and name in THOUGHTS) if name in DEEPER else value
        if new is not value:
            changed[name] = new
    return {**found, **changed} if changed else found


# Of messages and their parts, whatever the type: OpenAI's `text`, `refusal` and `input`, Anthropic's `thinking`, tool results.
TEXTS = frozenset({"content", "text", "refusal", "reasoning_content", "reasoning", "thinking", "input", "summary", "output"})
