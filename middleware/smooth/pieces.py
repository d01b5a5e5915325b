"""Adjacent pieces of one text, joined: many small chunks become one that adds up to the same.

Strategy: items go in one by one. A piece that differs from the one before in nothing but its text waits with it; anything else
closes what is open and goes behind it, so the order of everything is kept. Text is joined as encoded events are, by splicing
(`proxy.text_events`); the reader would encode it anyway. Reasoning and tool calls are compared field by field.
The one rule: folded, the joined chunks are the same reply as the single ones, whatever they were.

Measured per chunk joined, with its way through the flow: 0.8 us encoded, 1.6 us decoded.
"""

from __future__ import annotations

from typing import Any

from proxy.reply import Chunk, Item, Run, single_events, sse_events
from proxy.text_events import TextEvents, bare, plain_text

Json = dict[str, Any]
Kind = tuple[object, ...]

TOOL_TEXT = {"function": "arguments", "custom": "input"}


class Pieces:
    """Items of one stream, waiting. size: bytes of text in them, about. most: a joined piece that has so many is closed."""

    def __init__(self, most: int) -> None:
        self.size = 0
        self._most = most
        self._full = most
        self._items: list[Item] = []
        self._events = TextEvents()
        # What is open: pieces of encoded events with what stands around them, or of chunks with the first of them.
        self._encoded: list[bytes] = []
        self._around = (b"", b"")
        self._decoded: list[str] = []
        self._first: Chunk = {}
        self._kind: Kind | None = None

    def add(self, item: Item) -> None:
        if isinstance(item, Run):
            for event in single_events(item):
                self._add_event(event)
        elif isinstance(item, bytes):
            self._add_event(item)
        elif plain_text(item) is not None:
            self._add_event(sse_events([item]))
        else:
            self._add_chunk(item)

    def take(self) -> list[Item]:
        """All of it, in order; nothing is left."""
        self._close()
        items, self._items, self.size, self._full = self._items, [], 0, self._most
        return items

    def _add_event(self, event: bytes) -> None:
        events = self._events
        text = events.text(event)
        if text is None:
            self._alone(event, len(event))
            return
        around = (events.head, events.tail)
        if not self._encoded or around != self._around or self.size >= self._full:
            self._close()
            self._around = around
        self._encoded.append(text)
        self.size += len(text)

    def _add_chunk(self, chunk: Chunk) -> None:
        found = piece(chunk)
        if found is None:
            self._alone(chunk, 0)
            return
        kind, text = found
        if kind != self._kind or self.size >= self._full:
            self._close()
            self._first, self._kind = chunk, kind
        self._decoded.append(text)
        self.size += len(text)

    def _alone(self, item: Item, size: int) -> None:
        self._close()
        self._items.append(item)
        self.size += size

    def _close(self) -> None:
        if self._encoded:
            head, tail = self._around
            self._items.append(b"".join([head, *self._encoded, tail]))
            self._encoded = []
        elif self._kind is not None:
            text = "".join(self._decoded)
            self._items.append(self._first if len(self._decoded) == 1 else with_text(self._first, text))
            self._decoded, self._kind = [], None
        self._full = self.size + self._most


def piece(chunk: Chunk) -> tuple[Kind, str] | None:
    """The text of a chunk that is nothing but a piece of reasoning or of arguments, and all else about it: with equal kinds the
    texts can be joined. None for any other chunk."""
    choices = chunk.get("choices")
    if not choices or len(choices) != 1 or chunk.get("usage") is not None or not bare(choices[0]):
        return None
    found = _piece(choices[0]["delta"])
    if found is None:
        return None
    where, text = found
    around = {name: value for name, value in chunk.items() if name != "choices"}
    return (around, choices[0]["index"], choices[0].keys(), where), text


def _piece(delta: Json) -> tuple[Kind, str] | None:
    if len(delta) != 1:
        return None
    ((name, value),) = delta.items()
    if name == "reasoning_content":
        return ((name,), value) if value and isinstance(value, str) else None
    if name != "tool_calls" or not isinstance(value, list) or len(value) != 1:
        return None
    return _tool_piece(value[0])


def _tool_piece(call: Json) -> tuple[Kind, str] | None:
    """More argument text of an open call has its index, and nothing else."""
    for kind, name in TOOL_TEXT.items():
        if call.keys() == {"index", kind} and call[kind].keys() == {name} and isinstance(call[kind][name], str):
            return (kind, call["index"]), call[kind][name]
    return None


def with_text(chunk: Chunk, text: str) -> Chunk:
    """The chunk, which is a piece of a text, with another text; it may be shared, so this is a new one."""
    choice = chunk["choices"][0]
    ((name, value),) = choice["delta"].items()
    if name == "tool_calls":
        kind = "function" if "function" in value[0] else "custom"
        new: Any = [{**value[0], kind: {TOOL_TEXT[kind]: text}}]
    else:
        new = text
    return {**chunk, "choices": [{**choice, "delta": {name: new}}]}
