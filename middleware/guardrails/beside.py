"""What stands in a chunk beside the texts that grow: annotations, citations, names of tools, vendors' own fields, log
probabilities.

Strategy: one walk over a chunk. A text in it that no later chunk goes on with is whole already and looked at by itself (`alone`).
Log probabilities are kept where their tokens spell the text that they came with, since that text is held and they would not be.
The one rule: what is passed over here is what `texts` takes for a text that grows, and what names or numbers something.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from middleware.guardrails.texts import OPAQUE, TOOL_TEXT, inside
from proxy.reply import Chunk

Json = dict[str, Any]
Alone = Callable[[str], str]
# Of a chunk, and of a choice: what the gateway wrote itself, and what has a place of its own below.
FIXED = frozenset({"id", "object", "created", "model", "choices"})
CHOICE = frozenset({"index", "finish_reason", "native_finish_reason", "delta", "logprobs"})
THOUGHT = ("text", "summary")


def looked(chunk: Chunk, alone: Alone, *, held: bool) -> Chunk:
    """The chunk with these texts as `alone` gives them; itself where none changed. held: its growing texts are held back."""
    seen = _each(chunk, alone, FIXED)
    choices = chunk["choices"]
    changed = [_choice(choice, alone, held=held) for choice in choices]
    if all(new is old for new, old in zip(changed, choices, strict=True)):
        return seen
    return {**seen, "choices": changed}


def _choice(choice: Json, alone: Alone, *, held: bool) -> Json:
    seen = _each(choice, alone, CHOICE)
    delta = _delta(choice["delta"], alone)
    if delta is not choice["delta"]:
        seen = {**seen, "delta": delta}
    if held and (logprobs := choice.get("logprobs")) and not _spells(logprobs, choice["delta"]):
        seen = {name: value for name, value in seen.items() if name != "logprobs"}
    return seen


def _delta(delta: Json, alone: Alone) -> Json:
    changed = {name: new for name, value in delta.items() if (new := _field(name, value, alone)) is not value}
    return {**delta, **changed} if changed else delta


def _field(name: str, value: Any, alone: Alone) -> Any:
    if isinstance(value, str):
        return value
    if name == "tool_calls":
        return _list(value, lambda call: _call(call, alone))
    if name == "reasoning_details":
        return _list(value, lambda entry: _each(entry, alone, THOUGHT) if isinstance(entry, dict) else _value(entry, alone))
    return _each(value, alone, inside(value)) if isinstance(value, dict) else _value(value, alone)


def _call(call: Json, alone: Alone) -> Json:
    """A tool call: all but the text that it is made with."""
    seen = _each(call, alone, TOOL_TEXT)
    for kind, text in TOOL_TEXT.items():
        if isinstance(found := call.get(kind), dict) and (new := _each(found, alone, (text,))) is not found:
            seen = {**seen, kind: new}
    return seen


def _value(value: Any, alone: Alone) -> Any:
    if isinstance(value, str):
        return alone(value)
    if isinstance(value, list):
        return _list(value, lambda entry: _value(entry, alone))
    return _each(value, alone, ()) if isinstance(value, dict) else value


def _each(found: Json, alone: Alone, but: Collection[str]) -> Json:
    """An object, but for some of its fields; itself where nothing changed."""
    changed: Json = {}
    for name, value in found.items():
        if name in but or (name in OPAQUE and isinstance(value, str)):
            continue
        if (new := _value(value, alone)) is not value:
            changed[name] = new
    return {**found, **changed} if changed else found


def _list(value: list[Any], seen: Callable[[Any], Any]) -> list[Any]:
    entries = [seen(entry) for entry in value]
    return value if all(new is old for new, old in zip(entries, value, strict=True)) else entries


def _spells(logprobs: Any, delta: Json) -> bool:
    """Do log probabilities name the tokens of a text in this delta, and no others?"""
    texts = {text.encode() for text in delta.values() if isinstance(text, str)} | {b""}
    lists = logprobs.values() if isinstance(logprobs, dict) else [logprobs]
    return all(tokens is None or _spelled(tokens) in texts for tokens in lists)


def _spelled(tokens: Any) -> bytes | None:
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        return None
    return b"".join(_bytes(token) for token in tokens)


def _bytes(token: Json) -> bytes:
    """A token may be part of a character; then only its bytes say which."""
    spelled = token.get("bytes")
    if isinstance(spelled, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in spelled):
        return bytes(spelled)
    return str(token.get("token")).encode()
