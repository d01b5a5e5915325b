"""What a file says, as blocks of text under headings, and how much of it there may be.

Strategy: every format hands its text to one `Outline`, which cleans it, keeps the path of headings, and counts; so the bound on
the extracted text holds while a file is being read, not after. A heading with nothing under it is text itself: nothing is lost.
The one rule: whatever is wrong with a file is an ExtractionError, whose sentence is meant for the client who sent it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Shape = Literal["text", "rows", "code"]
LONGEST_HEADING = 200  # characters; beyond, it is a paragraph in a heading's clothes, and is kept whole as text too

# What no store or prompt wants: control characters (Postgres refuses NUL), soft hyphens, byte order marks inside a text.
_DROPPED = {code: None for code in [*range(32), 0x7F, *range(0x80, 0xA0), 0xAD, 0xFEFF] if code not in (9, 10)}
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_LINE_ENDS = {0x85: "\n", 0x0B: "\n", 0x0C: "\n\n", 0x2028: "\n", 0x2029: "\n\n"}
_CLEANED = _DROPPED | _LIGATURES | _LINE_ENDS
_SURROGATE = re.compile("[\ud800-\udfff]")


class ExtractionError(Exception):
    """A file that cannot be taken, and why: one sentence for the client."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a file may be. bytes: as sent. characters: of extracted text. pages: of a PDF. inflated: bytes of a docx file's
    parts, unpacked. entries: their number. depth: of nested JSON. seconds, memory (bytes): what `extract_apart` gives it."""

    bytes: int = 32 * 2**20
    characters: int = 10_000_000
    pages: int = 2000
    inflated: int = 128 * 2**20
    entries: int = 2000
    depth: int = 100
    seconds: float = 60.0
    memory: int = 2**30


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph or several, a table, a piece of code. heading: what it stands under, outermost first. page: from 1, where the
    format has pages. shape: `rows` are lines that stand for themselves, `code` is lines that belong together."""

    text: str
    heading: tuple[str, ...] = ()
    page: int | None = None
    shape: Shape = "text"


@dataclass(frozen=True, slots=True)
class Document:
    """A file's text. kind: the format that it was read as."""

    kind: str
    blocks: tuple[Block, ...]


def clean(text: str) -> str:
    """One form for line ends and composed letters, without what cannot be stored."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CLEANED)
    return unicodedata.normalize("NFC", _SURROGATE.sub("\ufffd", text))


def too_large(limits: Limits) -> ExtractionError:
    return ExtractionError(f"The file has more than {limits.characters:,} characters of text, which is the most that is taken.")


class Outline:
    """The blocks of one file as they are found. page: the one that is being read."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._left = limits.characters
        self._blocks: list[Block] = []
        self._path: list[tuple[int, str]] = []
        self._bare = False  # the last heading has nothing under it so far
        self.page: int | None = None

    def heading(self, level: int, text: str) -> None:
        """Everything that follows stands under it, until the next of its level or a higher one (a smaller number)."""
        line = " ".join(clean(text).split())
        if not line:
            return
        self._spend(line)
        if self._bare and self._path[-1][0] >= level:
            self._keep_bare()
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        if len(line) > LONGEST_HEADING:
            self.add(line)
            line = line[: LONGEST_HEADING - 1] + "…"
        self._path.append((level, line))
        self._bare = True

    def add(self, text: str, shape: Shape = "text") -> None:
        """Text under the present headings."""
        text = clean(text).strip("\n").rstrip()
        if not text.strip():
            return
        self._spend(text)
        self._bare = False
        self._blocks.append(Block(text, self._headings(), self.page, shape))

    def document(self, kind: str) -> Document:
        """All of it. Raises ExtractionError where there is none."""
        if self._bare:
            self._keep_bare()
            self._bare = False
        if not self._blocks:
            raise ExtractionError("The file has no text.")
        return Document(kind, tuple(self._blocks))

    def _headings(self) -> tuple[str, ...]:
        return tuple(text for _, text in self._path)

    def _keep_bare(self) -> None:
        *above, last = self._headings()
        self._blocks.append(Block(last, tuple(above), self.page))

    def _spend(self, text: str) -> None:
        self._left -= len(text)
        if self._left < 0:
            raise too_large(self._limits)
