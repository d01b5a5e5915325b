"""Where text stands in chunks: a chunk is taken apart into parts with one text each, and a part gets another text.

Strategy: most chunks have one text and are their own part. One with several (a whole message as one delta) becomes several chunks
that fold to the same; what is no text stays with the first. Reasoning that stands in a chunk twice, for people and for the next
turn, is one text.
The one rule: what belongs to a text goes with it: log probabilities name its tokens, a signature vouches for it. Where the text
is changed they are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from proxy.reply import Chunk

Json = dict[str, Any]

TOOL_TEXT = {"function": "arguments", "custom": "input"}
REASONING = "reasoning_content"
# Never text: what names or numbers something, and what is encrypted or no text at all.
OPAQUE = frozenset({"id", "type", "format", "index", "data", "signature", "encrypted_content", "b64_json"})
# Which choice, which field, and which entry of it: one text of a reply, over all its chunks.
Key = tuple[int, str, int]


class Part(NamedTuple):
    """key: None where the chunk has no text that grows."""

    chunk: Chunk
    key: Key | None = None
    text: str = ""


def parts(chunk: Chunk) -> list[Part]:
    """The chunk taken apart; itself where it has one text or none."""
    found = [(position, key, text) for position, choice in enumerate(chunk["choices"]) for key, text in _texts(choice)]
    if len(found) < 2 and len(chunk["choices"]) < 2:
        return [Part(chunk, found[0][1], found[0][2]) if found else Part(chunk)]
    return list(_apart(chunk, found))


def _texts(choice: Json) -> list[tuple[Key, str]]:
    """The texts of a choice's delta, twins once."""
    index, delta = choice["index"], choice["delta"]
    found: list[tuple[Key, str]] = []
    for name, value in delta.items():
        if isinstance(value, str):
            if value and name != "role":
                found.append(((index, name, 0), value))
        elif name == "tool_calls":
            found += [((index, f"{name}.{kind}", call.get("index", 0)), text) for call in value for kind, text in _said(call)]
        elif isinstance(value, dict):
            found += [((index, f"{name}.{one}", 0), value[one]) for one in inside(value)]
        elif name == "reasoning_details":
            entries = [(entry.get("index") or 0, text) for entry in value for text in _thought(entry)]
            if [text for _, text in entries] != [delta.get(REASONING)]:
                found += [((index, name, number), text) for number, text in entries]
    return found


def inside(value: Json) -> list[str]:
    """The texts of an object that grows: arguments of the older `function_call`, the transcript of audio."""
    return [name for name, text in value.items() if isinstance(text, str) and text and name not in OPAQUE and name != "name"]


def _said(call: Json) -> Iterator[tuple[str, str]]:
    for kind, name in TOOL_TEXT.items():
        text = (call.get(kind) or {}).get(name)
        if text and isinstance(text, str):
            yield kind, text


def _thought(entry: Any) -> Iterator[str]:
    if isinstance(entry, dict):
        for name in ("text", "summary"):
            if (text := entry.get(name)) and isinstance(text, str):
                yield text


def _apart(chunk: Chunk, found: list[tuple[int, Key, str]]) -> Iterator[Part]:
    """First what is no text, then each text, then the ends of the choices."""
    around: Json = {name: value for name, value in chunk.items() if name != "choices"}
    bare: Json = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
    for choice in chunk["choices"]:
        delta = {name: value for name, value in choice["delta"].items() if not _is_text(name, value)}
        rest = {name: value for name, value in choice.items() if name not in ("delta", "logprobs", "finish_reason")}
        if delta or around != bare:
            kept = {name: value for name, value in rest.items() if name != "native_finish_reason"}
            yield Part({**around, "choices": [{**kept, "delta": delta, "finish_reason": None}]})
            around = bare
    for position, key, text in found:
        choice = chunk["choices"][position]
        one: Json = {"index": choice["index"], "delta": _delta(choice["delta"], key, text), "finish_reason": None}
        if key[1] == "content" and choice.get("logprobs"):
            one["logprobs"] = choice["logprobs"]
        yield Part({**bare, "choices": [one]}, key, text)
    for choice in chunk["choices"]:
        if choice.get("finish_reason"):
            yield Part({**bare, "choices": [{**choice, "delta": {}}]})


def _is_text(name: str, value: Any) -> bool:
    if name in ("tool_calls", "reasoning_details"):
        return True
    if isinstance(value, dict):
        return bool(inside(value))
    return isinstance(value, str) and name != "role" and bool(value)


def _delta(delta: Json, key: Key, text: str) -> Json:
    """The delta of one text alone."""
    _, field, number = key
    name, _, kind = field.partition(".")
    if name == "tool_calls":
        call = next(call for call in delta[name] if call.get("index", 0) == number and kind in call)
        return {name: [call]}
    if name == "reasoning_details":
        return {name: [entry for entry in delta[name] if (entry.get("index") or 0) == number and text in _thought(entry)][:1]}
    if kind:
        value, texts = delta[name], inside(delta[name])
        # What is no text goes with the first.
        beside = {one: found for one, found in value.items() if one not in texts} if kind == texts[0] else {}
        return {name: {**beside, kind: text}}
    twins = delta.get("reasoning_details") if name == REASONING else None
    if twins and [said for entry in twins for said in _thought(entry)] == [text]:
        return {name: text, "reasoning_details": twins}
    return {name: text}


def with_text(part: Part, text: str) -> Chunk | None:
    """The part's chunk with another text, a new one; None where nothing is left of it."""
    assert part.key is not None
    chunk, (_, field, _) = part.chunk, part.key
    choice = chunk["choices"][0]
    name, _, kind = field.partition(".")
    delta = dict(choice["delta"])
    if name == "tool_calls":
        delta[name] = [_call_with(call, kind, text) for call in delta[name]]
    elif kind:
        delta[name] = {**delta[name], kind: text}
    elif name != "reasoning_details":
        delta[name] = text
    if "reasoning_details" in delta and name in (REASONING, "reasoning_details"):
        delta["reasoning_details"] = [_thought_with(entry, text) for entry in delta["reasoning_details"]]
    if not text and not kind:
        delta = {key: value for key, value in delta.items() if key not in (name, "reasoning_details")}
        if not delta and not choice.get("finish_reason"):
            return None
    rest = {key: value for key, value in choice.items() if key != "logprobs"}
    return {**chunk, "choices": [{**rest, "delta": delta}]}


def _call_with(call: Json, kind: str, text: str) -> Json:
    return {**call, kind: {**call[kind], TOOL_TEXT[kind]: text}}


def _thought_with(entry: Json, text: str) -> Json:
    kept = {name: value for name, value in entry.items() if name != "signature"}
    return {**kept, **{name: text for name in ("text", "summary") if entry.get(name)}}
