"""Between the two forms of one reply: chunks folded into a `chat.completion`, a completion unfolded into chunks.

Strategy: a delta's fields are added to the message by their kind (text is joined, lists grow, tool calls by index), so fields
that nobody here knows survive as well.
The one rule: fold(unfold(x)) is x; nothing is lost on the way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from proxy.reply import LISTS, Batch, Chunk, Completion, Reply, Usage

Json = dict[str, Any]

CHUNK_FIELDS = frozenset({"choices", "object"})
CHOICE_FIELDS = frozenset({"delta", "index"})


def fold(chunks: Iterable[Chunk], usage: Usage | None) -> Completion:
    """One `chat.completion` out of all chunks of a stream that completed."""
    completion: Completion = {}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        completion.update({name: value for name, value in chunk.items() if name not in CHUNK_FIELDS})
        for choice in chunk["choices"]:
            _add_choice(choices, choice)
    whole = {**completion, "object": "chat.completion", "choices": [_closed(choices[index]) for index in sorted(choices)]}
    if usage is not None:
        whole["usage"] = usage
    return whole


def _add_choice(choices: dict[int, Json], choice: Json) -> None:
    index = choice["index"]
    if index not in choices:
        choices[index] = {"index": index, "message": {"role": "assistant", "content": None}}
    whole = choices[index]
    _add_delta(whole["message"], choice["delta"])
    for name, value in choice.items():
        if name == "logprobs" and value and whole.get("logprobs"):
            whole["logprobs"] = dict(whole["logprobs"])  # chunks may be shared: theirs stays as it is
            _join(whole["logprobs"], value)
        elif name not in CHOICE_FIELDS and (value is not None or name not in whole):
            whole[name] = value


def _add_delta(message: Json, delta: Json) -> None:
    for name, value in delta.items():
        if name == "role":
            continue
        if value is None or value == []:
            message.setdefault(name, value)
        elif name == "tool_calls":
            for call in value:
                _add_tool_call(_list(message, name), call)
        elif name == "reasoning_details":
            for entry in value:
                _add_detail(_list(message, name), entry)
        elif isinstance(value, str):
            message[name] = (message.get(name) or "") + value
        elif isinstance(value, list):
            # The index of an entry is for adding deltas up; a whole reply's lists have none.
            message[name] = [*(message.get(name) or []), *(map(_without_index, value) if name in LISTS else value)]
        elif isinstance(value, dict):
            message[name] = dict(message.get(name) or {})
            _join(message[name], value)
        else:
            message[name] = value


def _list(message: Json, name: str) -> list[Json]:
    if not message.get(name):
        message[name] = []
    found: list[Json] = message[name]
    return found


def _without_index(entry: Any) -> Any:
    return {name: value for name, value in entry.items() if name != "index"} if isinstance(entry, dict) else entry


def _join(into: Json, more: Json) -> None:
    """Add one object's fields to another's: text joined, lists appended, other values replaced."""
    for name, value in more.items():
        known = into.get(name)
        if isinstance(known, str) and isinstance(value, str):
            into[name] = known + value
        elif isinstance(known, list) and isinstance(value, list):
            into[name] = [*known, *value]
        elif value is not None or name not in into:
            into[name] = value


def _add_tool_call(calls: list[Json], delta: Json) -> None:
    """A call's first delta opens it; later ones add to the text of its `function` (or `custom`)."""
    if delta["index"] == len(calls):
        fields = {name: value for name, value in delta.items() if name != "index"}
        calls.append({name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()})
        return
    call = calls[delta["index"]]
    for name, value in delta.items():
        if name in ("function", "custom"):
            _join(call[name], value)


def _add_detail(details: list[Json], entry: Json) -> None:
    """Pieces of one block (same type, format and index, not yet signed) become one entry, as they stand in a whole reply."""
    last = details[-1] if details else None
    same = last is not None and all(last.get(key) == entry.get(key) for key in ("type", "format", "index"))
    if last is None or not same or "signature" in last or "data" in entry:
        details.append(dict(entry))
        return
    for name in ("text", "summary"):
        if name in entry:
            last[name] = (last.get(name) or "") + (entry[name] or "")
    last.update({name: value for name, value in entry.items() if name not in ("text", "summary") and value is not None})


def _closed(choice: Json) -> Json:
    return {"index": choice["index"], "message": choice["message"], **choice}


def _numbered(entries: Any) -> Any:
    """List entries with the index by which the SDKs add deltas up."""
    return [
        {**entry, "index": number} if isinstance(entry, dict) else entry for number, entry in enumerate(entries or [])
    ] or entries


def unfold(completion: Completion) -> tuple[list[Chunk], list[Chunk], Usage | None]:
    """(content chunks, finish chunks, usage): each choice's whole message as one delta, then its finish reason."""
    usage = completion.get("usage")
    head = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    content: list[Chunk] = []
    finish: list[Chunk] = []
    for choice in completion["choices"]:
        rest = {
            name: value
            for name, value in choice.items()
            if name not in ("message", "index", "finish_reason", "native_finish_reason")
        }
        message = {"role": "assistant", **choice["message"]}
        if message.get("content") is None:
            message.pop("content", None)
        if message.get("tool_calls"):
            message["tool_calls"] = [{"index": number, **call} for number, call in enumerate(message["tool_calls"])]
        for name in LISTS & message.keys():
            message[name] = _numbered(message[name])
        content.append({**head, "choices": [{"index": choice["index"], "delta": message, "finish_reason": None, **rest}]})
        last = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
        last["native_finish_reason"] = choice.get("native_finish_reason")
        finish.append({**head, "choices": [last]})
    return content, finish, usage


async def unfolded(reply: Reply) -> AsyncIterator[Batch]:
    """The chunks of a whole reply, as a stream has them."""
    async for batch in reply.chunks:
        content, finish, reply.trailer.usage = unfold(batch.chunks[0])
        yield Batch(content)
        yield Batch(finish, final=True)
