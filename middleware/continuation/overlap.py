"""What a continuation repeats of the text before it, taken away.

Strategy: models that are asked to go on often say the last words again, or begin anew. The new text is held back only as long as
all of it stands in the text before (near its end, or at its very beginning); then the longest end of the old text that the new
one begins with is the repetition.
The one rule: letters are not taken out of the middle of a word: a repetition begins where a word does, or has `SURE` characters.
"""

from __future__ import annotations

NEAR = 1024  # characters before the seam in which a repetition may begin, beside the whole text
SURE = 8
IDEOGRAPHS = "\u2e80"  # from here on scripts have no blanks between words


def overlap(said: str, more: str) -> int:
    """How many characters at the beginning of `more` repeat the end of `said`: the most that can be."""
    if more.startswith(said):
        return len(said)
    sizes = range(min(len(said), len(more), NEAR), 0, -1)
    return next((size for size in sizes if said.endswith(more[:size]) and _is_repetition(said, size)), 0)


def _is_repetition(said: str, size: int) -> bool:
    if size == len(said) or size >= SURE:
        return True
    before, first = said[-size - 1], said[-size]
    one_word = before.isalnum() and first.isalnum() and before < IDEOGRAPHS and first < IDEOGRAPHS
    return not one_word


class Overlap:
    """The same over a stream of pieces. said: the text before the seam. open: something is, or may yet be, held back."""

    def __init__(self, said: str) -> None:
        self._said = said
        self._near = said[-NEAR:]
        self._held = ""
        self.open = bool(said)

    def feed(self, piece: str) -> str:
        """What of all pieces so far is new and was not handed out; "" while that cannot be told."""
        if not self.open:
            return piece
        self._held += piece
        if self._held in self._near or self._said.startswith(self._held):
            return ""
        return self.close()

    def close(self) -> str:
        """Nothing more comes that could belong to the repetition."""
        held, self._held, self.open = self._held, "", False
        return held[overlap(self._said, held) :]
