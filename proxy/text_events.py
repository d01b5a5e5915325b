"""Finds the text in encoded text events without parsing them: for who counts text, or joins it.

Strategy: a stream's text events differ in nothing but their text. One is parsed; from then on what stands before and after its
text finds the text of the next. What begins and ends like that and has only the inside of a JSON string between is that event
with another text: JSON leaves no other reading (see `proxy.wire.openai.template`, which makes such events).
The one rule: anything else, and any doubt, is parsed, or is None.

Measured: 0.25 us for the text of an event that is like the one before, 2.3 for one that has to be parsed.
"""

from __future__ import annotations

import re

import orjson

from proxy.reply import Chunk

INSIDE = re.compile(rb'[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*', re.DOTALL)
MARK = b'"content":"'


class TextEvents:
    """The text events of one stream. head, tail: what stands around the text of the latest kind, empty before the first."""

    __slots__ = ("head", "tail")

    def __init__(self) -> None:
        self.head = self.tail = b""

    def text(self, event: bytes) -> bytes | None:
        """The text of one encoded event (`data: {json}` and a blank line), escaped as it stands there; None where the event
        says anything beside it that a further text could not be joined to.
        """
        head, tail = self.head, self.tail
        if head and event.startswith(head) and event.endswith(tail):
            text = event[len(head) : -len(tail)]
            if text and INSIDE.fullmatch(text) is not None:
                return text
        return self._learned(event)

    def _learned(self, event: bytes) -> bytes | None:
        said = plain_text(orjson.loads(event[6:-2]))
        if said is None:
            return None
        before, found, rest = event.partition(MARK)
        text = escaped(said)
        if not found or b'"content"' in before or not rest.startswith(text + b'"'):
            return None
        self.head, self.tail = before + found, rest[len(text) :]
        return text


def plain_text(chunk: Chunk) -> str | None:
    """The text of a chunk that is nothing but a piece of one choice's text (what stands beside its choices may be anything)."""
    choices = chunk.get("choices")
    if not choices or len(choices) != 1:
        return None
    delta = choices[0]["delta"]
    text = delta.get("content")
    if not text or not isinstance(text, str) or len(delta) != 1 or chunk.get("usage") is not None:
        return None
    return text if bare(choices[0]) else None


def bare(choice: Chunk) -> bool:
    """Has a choice nothing beside its index and its delta?"""
    return all(value is None for name, value in choice.items() if name not in ("index", "delta"))


def escaped(text: str) -> bytes:
    """The inside of a JSON string, as it is written in events."""
    return orjson.dumps(text)[1:-1]
