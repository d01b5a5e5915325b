"""A document cut into passages: at headings, then between paragraphs, then between sentences, then words, then signs.

Strategy: the text under one heading is taken apart into atoms, the sentences, and tables and code whole where they fit; then
atoms are put together up to the size, and the cut is made at the strongest boundary in the later half. What is carried into the
next passage is the last atoms again, as whole ones. All in one pass, in time and memory that grow with the text alone.
The one rule: every sign of the text is in a passage, in order, and no passage is above the size.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, zip_longest
from typing import NamedTuple

from middleware.retrieval.text.document import Block, Document, Shape
from middleware.retrieval.text.sentences import sentences
from proxy.estimate import BYTES_PER_TOKEN
from proxy.store import Passage

SIZE, OVERLAP = 320, 48  # tokens
SEPARATOR = " > "
PARAGRAPH, SENTENCE, PIECE = 3, 2, 1

_BREAK = re.compile(r"\n[^\S\n]*\n\s*")
_SPACES = " \n\t\u3000"
_LONGEST_CLUSTER = 16  # code points; beyond, it is a joke at the reader's expense
_JOINER = "\u200d"
_FLAGS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
_GOING_ON = (("\u1160", "\u11ff"), ("\U0001f3fb", "\U0001f3ff"), ("\U000e0020", "\U000e007f"))
_ENCODING = ("utf-8", "surrogatepass")


class Atom(NamedTuple):
    """What is not cut any more. bytes: of UTF-8. strength: of the boundary before it. carried: may be said twice."""

    text: str
    bytes: int
    strength: int
    page: int | None
    carried: bool


def passages(document: Document, size: int = SIZE, overlap: int = OVERLAP) -> list[Passage]:
    """The passages of a document, numbered. size, overlap: in estimated tokens; the overlap is at most half of the size."""
    most, again = size * BYTES_PER_TOKEN, min(overlap, size // 2) * BYTES_PER_TOKEN
    found: list[Passage] = []
    for heading, blocks in groupby(document.blocks, key=lambda block: block.heading):
        atoms = list(_atoms(tuple(blocks), most))
        for carried, fresh in _packed(atoms, most, again):
            text = "".join(atom.text for atom in [*carried, *fresh]).strip("\n").rstrip()
            if any(atom.text.strip() for atom in fresh):
                found.append(Passage(len(found), text, SEPARATOR.join(heading), fresh[0].page))
    return found


def tokens(text: str) -> int:
    """About how many tokens a text is."""
    return -(-_bytes(text) // BYTES_PER_TOKEN)


def _packed(atoms: Sequence[Atom], most: int, again: int) -> Iterator[tuple[Sequence[Atom], Sequence[Atom]]]:
    """What goes into each passage: atoms said again, and new ones."""
    begin, carried = 0, 0  # carried: how many atoms before `begin`
    while begin < len(atoms):
        end = _filled(atoms, begin, most - sum(atom.bytes for atom in atoms[begin - carried : begin]))
        yield atoms[begin - carried : begin], atoms[begin:end]
        if end < len(atoms):
            first = begin if carried else begin + 1  # a passage is never said again as a whole
            carried = _carried(atoms[first:end], min(again, most - atoms[end].bytes))
        begin = end


def _filled(atoms: Sequence[Atom], begin: int, room: int) -> int:
    """The end of the passage that begins here: at the strongest boundary in the later half of what fits."""
    end, total = begin, 0
    while end < len(atoms) and total + atoms[end].bytes <= room:
        total += atoms[end].bytes
        end += 1
    if end == len(atoms):
        return end
    best, kept = end, total
    for cut in range(end - 1, begin, -1):
        kept -= atoms[cut].bytes
        if kept * 2 < total:
            break
        if atoms[cut].strength > atoms[best].strength:
            best = cut
    return best


def _carried(atoms: Sequence[Atom], room: int) -> int:
    """How many of a passage's last atoms are said again in the next."""
    count = 0
    for atom in reversed(atoms):
        room -= atom.bytes
        if room < 0 or not atom.carried:
            break
        count += 1
    return count


def _atoms(blocks: Sequence[Block], most: int) -> Iterator[Atom]:
    """Of the blocks under one heading, with blank lines between all but rows."""
    for block, following in zip_longest(blocks, blocks[1:]):
        end = "\n" if following and block.shape == following.shape == "rows" else "\n\n"
        for text, strength in _pieces(block.text + end, block.shape, most):
            yield Atom(text, _bytes(text), strength, block.page, block.shape == "text")


def _pieces(text: str, shape: Shape, most: int) -> Iterator[tuple[str, int]]:
    """The texts of a block's atoms, with the strength of the boundary before each."""
    if shape == "text":
        for paragraph in _paragraphs(text):
            yield from _weakening(sentences(paragraph), most, PARAGRAPH, SENTENCE)
    elif _bytes(text) <= most:
        yield text, PARAGRAPH
    else:
        yield from _weakening(text.splitlines(keepends=True), most, PARAGRAPH, SENTENCE)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, each with the blank lines behind it."""
    begin = 0
    for found in _BREAK.finditer(text):
        yield text[begin : found.end()]
        begin = found.end()
    if begin < len(text):
        yield text[begin:]


def _weakening(texts: Iterable[str], most: int, first: int, others: int) -> Iterator[tuple[str, int]]:
    """The texts, each cut further where it is too large."""
    strength = first
    for text in texts:
        for piece in _small(text, most):
            yield piece, strength
            strength = PIECE
        strength = others


def _small(text: str, most: int) -> Iterator[str]:
    if _bytes(text) <= most:
        yield text
        return
    for line in text.splitlines(keepends=True):
        yield from [line] if _bytes(line) <= most else _cut(line, most)


def _cut(text: str, most: int) -> Iterator[str]:
    """A text without sentences, in pieces that end between words where there are any: small ones, so that some can be carried."""
    length, begin = max(most // 4, min(most, 64)), 0
    while begin < len(text):
        window = text[begin : begin + length]
        # Counting what was decoded, not slicing it: an unpaired surrogate is not decoded, and must not be lost.
        end = begin + (len(window.encode(*_ENCODING)[:length].decode(errors="ignore")) or 1)
        if end < len(text):
            end -= _unfinished(text[begin:end], text[end])
        yield text[begin:end]
        begin = end


def _unfinished(piece: str, following: str) -> int:
    """How many signs at the end of a piece belong to what follows: part of a word, else of what readers see as one sign."""
    space = max(piece.rfind(sign) for sign in _SPACES)
    if space > 0:
        return len(piece) - space - 1
    for back in range(min(_LONGEST_CLUSTER, len(piece))):
        end = len(piece) - back
        if not _joined(piece[:end][-_LONGEST_CLUSTER:], following):
            return back
        following = piece[end - 1]
    return 0


def _joined(before: str, after: str) -> bool:
    """Whether a sign goes on from the one before it: accents, joiners, skin tones, tags, vowels of Hangul, halves of flags."""
    if after == _JOINER or before.endswith(_JOINER) or unicodedata.category(after).startswith("M"):
        return True
    if after in _FLAGS:
        return (len(before) - len(before.rstrip(_FLAGS))) % 2 == 1
    return any(first <= after <= last for first, last in _GOING_ON)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(*_ENCODING))
