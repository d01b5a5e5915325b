"""Text chunks that differ from an earlier one in nothing but their text, recognized and rewritten without parsing JSON.

Strategy: vendors build these chunks from a template, so after one was decoded the long way, what stands before and after its text
is known, in the provider's bytes and in ours. A payload that begins and ends with the same bytes and has nothing between but
printable text without quotes and backslashes is that chunk with another text: JSON leaves no other reading.
The one rule: anything else, and any doubt, goes the long way.

Measured on 100 chunks in one read: 0.7 us per chunk instead of 1.7 (decode and encode).
"""

from __future__ import annotations

import orjson

from proxy.reply import Chunk

MARK = b'"content":"'
SPACED_MARK = b'"content": "'
LESSONS = 4


class Template:
    """What surrounds the text of a stream's text chunks. Learning is tried a few times: some vendors put a clock in."""

    __slots__ = ("_lessons", "after", "before", "head", "least", "tail")

    def __init__(self) -> None:
        self._lessons = LESSONS
        self.least = 0
        self.before = self.after = self.head = self.tail = b""

    def fill(self, payload: bytes) -> bytes | None:
        """The event for a payload of this template, or None."""
        if not self.least or len(payload) <= self.least or not (payload.startswith(self.before) and payload.endswith(self.after)):
            return None
        text = payload[len(self.before) : len(payload) - len(self.after)]
        try:
            readable = text.decode()
        except UnicodeDecodeError:
            return None
        if '"' in readable or "\\" in readable or not readable.isprintable():
            return None
        return b"%b%b%b" % (self.head, text, self.tail)

    def learn(self, payload: bytes, chunk: Chunk) -> None:
        """Take a text chunk as the template. payload: the provider's bytes; chunk: the same, decoded and stamped."""
        if not self._lessons:
            return
        self._lessons -= 1
        text = chunk["choices"][0]["delta"]["content"].encode()
        theirs, ours = _around(payload, text), _around(b"data: %b\n\n" % orjson.dumps(chunk), text)
        if theirs is None or ours is None:
            return
        self.before, self.after = theirs
        self.head, self.tail = ours
        self.least = len(self.before) + len(self.after)


def _around(payload: bytes, text: bytes) -> tuple[bytes, bytes] | None:
    """What stands before and after the one content text of a payload; None where it is not plainly there once."""
    mark = SPACED_MARK if SPACED_MARK in payload else MARK
    before, found, rest = payload.partition(mark)
    if not found or b'"content"' in before or not rest.startswith(text + b'"') or b'"content"' in rest[len(text) :]:
        return None
    return before + found, rest[len(text) :]
