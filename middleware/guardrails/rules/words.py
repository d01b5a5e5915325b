"""What an operator writes: words that are denied, values that are allowed, expressions of one's own.

The one rule: a word is found as a word, whatever its case and its script; `ass` is not in `class`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate

from middleware.guardrails.rules.detector import Detector, anywhere, joins

LONGEST_WORD = 100


def word(text: str, start: int, end: int) -> int:
    """A word of a script with blanks that no further letter touches."""
    before, behind = text[start - 1 : start] if start else "", text[end : end + 1]
    inside = (joins(text[start]) and (joins(before) or before == "_"), joins(text[end - 1]) and (joins(behind) or behind == "_"))
    return 0 if any(inside) else end


def denied(name: str, words: Sequence[str]) -> Detector:
    """Words and phrases; white space in them is one or more of any. Raises ValueError in words for the operator."""
    if not words or any(not word.strip() or len(word) > LONGEST_WORD for word in words):
        raise ValueError(f"words: must be words or phrases of at most {LONGEST_WORD} characters")
    phrases = [r"\s{1,8}".join(map(re.escape, word.split())) for word in words]
    return Detector(name, f"(?i)(?:{'|'.join(phrases)})", word, most=max(map(len, words)) + 80)


def own(name: str, pattern: str, most: int) -> Detector:
    """An expression of the operator's. most: characters of a match."""
    return Detector(name, pattern, anywhere, most=most)


class Allowed:
    """Values that no rule finds: as they stand, or with `*` (`*@example.com`), whatever their case."""

    def __init__(self, values: Sequence[str]) -> None:
        self._exact = frozenset(value.casefold() for value in values if "*" not in value)
        globs = "|".join(translate(value.casefold()) for value in values if "*" in value)
        self._globs = re.compile(globs) if globs else None

    def __contains__(self, value: str) -> bool:
        folded = value.casefold()
        return folded in self._exact or (self._globs is not None and self._globs.match(folded) is not None)

    def __bool__(self) -> bool:
        return bool(self._exact) or self._globs is not None
