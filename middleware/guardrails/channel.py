"""One text of a reply on its way: held back where it could still become something, let go where it cannot.

Strategy: pieces go in as they come; what the `Look` has decided comes out, in the pieces in which it came wherever nothing was
done to it. A piece waits whole for its last character, unless much of it is decided already and it can be split. A redacted
stretch comes out as its placeholder in the piece in which it began.
The one rule: no character leaves before everything that a rule could find with it is decided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from middleware.guardrails.edits import Edit, Look, Quotes, edited
from middleware.guardrails.rules.reading import Read, escaped, plain, whole
from middleware.guardrails.texts import TOOL_TEXT, Part, with_text
from proxy.reply import Item
from proxy.text_events import bare
from proxy.text_events import escaped as json_escaped

# Characters before what is looked at, which rules may want to see; and how many more there must be to be worth a cut.
CONTEXT, TRIMMED = 8, 64
# A match that is open for so many characters is only looked at again when it has grown by so many: a key of 16 KiB in single
# tokens would be read thousands of times.
LONG, GROWN = 1024, 256
# A piece is split where so many of its characters may go and the rest may not.
WORTH = 16


class Encoded(NamedTuple):
    """A text event that was never parsed: what stands before and after its text."""

    event: bytes
    head: bytes
    tail: bytes


class Piece:
    """One piece of a text. read: how it is looked at. start: where it stands in what the channel keeps. whole: nothing of it has
    gone, and it is spelled as it came."""

    __slots__ = ("end", "read", "source", "start", "whole")

    def __init__(self, source: Part | Encoded, read: Read, start: int, whole: bool) -> None:
        self.source, self.read, self.start, self.whole = source, read, start, whole
        self.end = start + len(read.text)

    def item(self, text: str) -> Item | None:
        source = self.source
        if isinstance(source, Encoded):
            return source.head + json_escaped(text) + source.tail if text else None
        return with_text(source, text)

    @property
    def original(self) -> Item:
        return self.source.event if isinstance(self.source, Encoded) else self.source.chunk

    @property
    def splits(self) -> bool:
        """Can its halves be two chunks? Not where something stands beside the text."""
        if isinstance(self.source, Encoded):
            return True
        assert self.source.key is not None
        choice = self.source.chunk["choices"][0]
        return bare(choice) and list(choice["delta"]) == [self.source.key[1].partition(".")[0]]


class Channel:
    """look: what is done. json: the text is JSON, so it is read and written escaped. told: hears what goes out, originals not put
    back in it; None where nobody listens."""

    def __init__(self, look: Look, *, json: bool = False, told: Callable[[str], None] | None = None) -> None:
        self._look, self._told = look, told
        self._quotes = Quotes() if json else None
        self._half = ""
        self._last: Part | Encoded | None = None
        self._text = ""
        self._seen = self._enough = 0
        self._edits: list[Edit] = []
        self._pieces: deque[Piece] = deque()
        self.blocked = False

    def add(self, source: Part | Encoded, text: str) -> None:
        """A further piece; `settle` says what may go."""
        self._last = source
        if self._quotes is None and not self._half and text.isascii():
            self._pieces.append(Piece(source, Read(text), len(self._text), True))
            self._text += text
            return
        came, json = text, self._quotes is not None
        text = self._half + text
        cut = whole(text, json=json)
        text, self._half = text[:cut], text[cut:]
        read = escaped(text) if json else plain(text)
        self._pieces.append(Piece(source, read, len(self._text), text == came))
        self._text += read.text

    def settle(self, *, over: bool = False) -> list[Item]:
        """What may go now. over: no piece follows, so everything may. Sets `blocked` where a rule ends the reply."""
        if over and self._half and self._last is not None:
            half, self._half = self._half, ""
            self._pieces.append(Piece(self._last, Read(half), len(self._text), False))
            self._text += half
        if not over and len(self._text) - self._seen > LONG and len(self._text) < self._enough:
            return []
        judged = self._look.judge(self._text, self._seen, over=over)
        self._enough = len(self._text) + GROWN
        if judged.edits:
            self._edits += judged.edits
        self._seen = judged.held
        out: list[Item] = []
        if judged.blocked is not None:
            self.blocked = True
            self._release(min(judged.blocked, judged.held), 1, out)
            return out
        self._release(judged.held, WORTH, out)
        self._forget()
        return out

    def _release(self, held: int, worth: int, out: list[Item]) -> None:
        """Let go what stands before `held`."""
        pieces = self._pieces
        while pieces and pieces[0].end <= held:
            self._go(pieces.popleft(), out)
        if pieces and pieces[0].splits and held - pieces[0].start >= worth:
            self._split(pieces[0], held, out)

    def _go(self, piece: Piece, out: list[Item]) -> None:
        if not self._edits and piece.whole and self._quotes is None and self._told is None:
            out.append(piece.original)  # nearly always
            return
        begin, end, size = piece.start, piece.end, len(piece.read.text)
        if piece.whole and not any(edit.start < end and edit.end > begin for edit in self._edits):
            if self._quotes is not None:
                self._quotes.passes(piece.read, 0, size)
            if self._told is not None:
                self._told(piece.read.text)
            out.append(piece.original)
            return
        text = self._said(piece, 0, size)
        if (item := piece.item(text)) is not None:
            out.append(item)

    def _split(self, piece: Piece, held: int, out: list[Item]) -> None:
        """The first part of a piece; the rest stays as one of its own."""
        cut = held - piece.start
        text = self._said(piece, 0, cut)
        if text and (item := piece.item(text)) is not None:
            out.append(item)
        read, source = piece.read, piece.source
        rest = Read(read.text[cut:], None if read.spelled is None else read.spelled[cut:])
        if isinstance(source, Part):
            source = _later(source)
        self._pieces[0] = Piece(source, rest, held, False)

    def _said(self, piece: Piece, first: int, last: int) -> str:
        shift = piece.start
        edits = [edit._replace(start=edit.start - shift, end=edit.end - shift) for edit in self._edits]
        if self._told is not None:
            told = [edit for edit in edits if not edit.restores]
            self._told(edited(piece.read, first, last, told, None))
        return edited(piece.read, first, last, edits, self._quotes)

    def _forget(self) -> None:
        """Keep what waits, and a little before it."""
        keep = min(self._pieces[0].start if self._pieces else len(self._text), self._seen)
        cut = keep - CONTEXT
        if cut < TRIMMED:
            return
        self._text = self._text[cut:]
        self._seen -= cut
        self._enough -= cut
        for piece in self._pieces:
            piece.start -= cut
            piece.end -= cut
        self._edits = [edit._replace(start=edit.start - cut, end=edit.end - cut) for edit in self._edits if edit.end > keep]


def _later(part: Part) -> Part:
    """What only the first piece of a tool call says, left out: it has gone with the first half."""
    assert part.key is not None
    _, field, number = part.key
    name, _, kind = field.partition(".")
    if name != "tool_calls":
        return part
    choice = part.chunk["choices"][0]
    call = {"index": number, kind: {TOOL_TEXT[kind]: ""}}
    return part._replace(chunk={**part.chunk, "choices": [{**choice, "delta": {name: [call]}}]})
