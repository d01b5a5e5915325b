"""Text chunks that differ from an earlier one in nothing but their text, recognized and rewritten without parsing JSON.

Strategy: vendors build these chunks from a template, so after one was decoded the long way, what stands before and after its text
is known, in the provider's bytes and in ours. A payload that begins and ends with the same bytes and has nothing between but
the inside of a JSON string is that chunk with another text: JSON leaves no other reading. Where one read brings many of them,
what stands between two texts is the same each time too, and one regular expression and one join rewrite them all.
The one rule: anything else, and any doubt, goes the long way.
"""

from __future__ import annotations

import re
from functools import lru_cache

import orjson

from proxy.reply import Chunk, Run

NAME = b'"content"'
MARK = b'"content":"'
SPACED_MARK = b'"content": "'
LESSONS = 4
# As numbers: `b"\\" in text` first tries to take the bytes for one, and fails, at ten times the cost.
BACKSLASH, NEWLINE = 0x5C, 0x0A
# The inside of a JSON string, in the one spelling in which it is written again: no needless escapes.
SIMPLE = bytes(byte for byte in range(0x20, 0x100) if byte not in b'"\\')
TEXT = re.compile(rb'[^"\\\x00-\x1f]*(?:\\["\\bfnrt][^"\\\x00-\x1f]*)*')


class Template:
    """What surrounds the text of a stream's text chunks. Learning is tried a few times: some vendors put a clock in."""

    __slots__ = (
        "_after", "_back", "_before", "_closing", "_front", "_lessons", "_opening", "_ours", "_quoted", "_theirs",
        "after", "before", "head", "least", "tail",
    )  # fmt: skip

    def __init__(self) -> None:
        self._lessons = LESSONS
        self.least = 0
        self.before = self.after = self.head = self.tail = b""
        self._before = self._after = self._theirs = self._ours = self._opening = self._closing = b""
        self._front = self._back = self._quoted = slice(0, 0)

    @property
    def teachable(self) -> bool:
        """Lessons are left."""
        return self._lessons > 0

    def fill(self, payload: bytes) -> bytes | None:
        """The event for a payload of this template, or None."""
        if not self.least or len(payload) <= self.least or not (payload.startswith(self.before) and payload.endswith(self.after)):
            return None
        text = payload[len(self.before) : len(payload) - len(self.after)]
        return b"%b%b%b" % (self.head, text, self.tail) if _plain(text) else None

    def single(self, data: bytes) -> bytes | None:
        """The event for a read that is one event of this template, as in a paced stream; None for any other."""
        if not self.least or data[self._front] != self._before or data[self._back] != self._after:
            return None
        text = data[self._quoted]
        if NEWLINE in text:
            return None  # several events
        # orjson proves quotes, control characters and UTF-8 in half the instructions of `_plain` (1.6 of 3.5 thousand).
        if BACKSLASH in text:
            if not _plain(text[1:-1]):
                return None
        else:
            try:
                if not orjson.loads(text):
                    return None
            except orjson.JSONDecodeError:
                return None
        return self._opening + text + self._closing

    def run(self, data: bytes) -> tuple[Run, int, bytes] | None:
        """The events that `data` begins with and that are of this template, rewritten; their number; what follows them.

        data: begins with an event. None is looked at singly: cut to their texts, they must give the same bytes when put together
        again, which also proves what stands between them. A text is looked for up to its quote, and from there a regular
        expression jumps over what is the same each time (0.13 us per chunk of a read of a hundred; cut at the line breaks 0.2,
        one by one 1.0).
        """
        before = self._before
        if not data.startswith(before):
            return None
        last = data.rfind(before) + len(before)
        # Backslashes are looked for in the whole read, which takes no time; only few reads have any.
        texts = _cut(data[len(before) : last], len(self._theirs), quoting=BACKSLASH in data)
        if (end := data.find(self._after, last)) >= 0:
            texts.append(data[last:end])
        found = self._rewritten(data, texts)
        return found or self._rewritten(data, self._one_by_one(data))

    def _rewritten(self, data: bytes, texts: list[bytes]) -> tuple[Run, int, bytes] | None:
        """`run` of a `data` that begins with the events of these texts; None where it does not, or they are not all plain."""
        together = b"%b%b%b" % (self._before, self._theirs.join(texts), self._after)
        if not texts or not data.startswith(together) or not _all_plain(texts):
            return None
        return Run(self.head + self._ours.join(texts) + self.tail), len(texts), data[len(together) :]

    def _one_by_one(self, data: bytes) -> list[bytes]:
        """The texts of the events before the first that is not of this template."""
        events = data.split(b"\n")[:-1:2]
        good = next((number for number, event in enumerate(events) if self.fill(event[6:]) is None), len(events))
        return [event[len(self._before) : -len(self.after)] for event in events[:good]]

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
        self._before, self._after = b"data: " + self.before, self.after + b"\n\n"
        self._front, self._back = slice(len(self._before)), slice(-len(self._after), None)
        # With the quotes around it.
        self._quoted = slice(len(self._before) - 1, 1 - len(self._after))
        self._opening, self._closing = self.head[:-1], self.tail[1:]
        self._theirs = b"%b\n\ndata: %b" % (self.after, self.before)
        self._ours = self.tail + self.head


def _cut(data: bytes, gap: int, *, quoting: bool) -> list[bytes]:
    """The texts behind each of which stand `gap` bytes, the first of them a quote. quoting: the texts may have quotes, too."""
    unquoted, any_text = _patterns(gap)
    return any_text.findall(data) if quoting else unquoted.split(data)[:-1]


@lru_cache(256)
def _patterns(gap: int) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    between = b'"(?s:.{%d})' % (gap - 1)
    return re.compile(between), re.compile(rb'([^"\\]*(?:\\.[^"\\]*)*)' + between)


def _all_plain(texts: list[bytes]) -> bool:
    """Is each of them? Looked at together, with a byte between them that is in none, and completes no character and no escape."""
    joined = b"\0".join(texts)
    if joined.count(b"\0") != len(texts) - 1 or joined.find(b"\0\0") >= 0 or joined[:1] == b"\0" or joined[-1:] == b"\0":
        return False
    return _plain(joined.replace(b"\0", b" "))


def _plain(text: bytes) -> bool:
    """Is this the inside of a JSON string, not empty, in UTF-8, without needless escapes?"""
    if not text or (text.translate(None, SIMPLE) and TEXT.fullmatch(text) is None):
        return False
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _around(payload: bytes, text: bytes) -> tuple[bytes, bytes] | None:
    """What stands before and after the one content text of a payload; None where it is not plainly there once."""
    mark = SPACED_MARK if payload.find(SPACED_MARK) >= 0 else MARK
    before, found, rest = payload.partition(mark)
    if not found or before.find(NAME) >= 0 or not rest.startswith(text + b'"') or rest.find(NAME, len(text)) >= 0:
        return None
    return before + found, rest[len(text) :]
