"""One thing to look for: an expression, and what an expression cannot say.

Strategy: `source` finds candidates; `extend` says how much further one goes (a key of any length, a PEM block to its end marker);
`fit` judges it in its context and says where it ends, or that it is none (Luhn, mod 97). `Scanner` looks for several at once: one
search for anything at all, one for the earliest text that could still become a match; only what is found is looked at rule by
rule.
The one rule: nothing is decided on text whose continuation could change it. A candidate that touches the end of the text is open,
unless the text is over; `Seen.held` is the first character that may still belong to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from middleware.guardrails.rules.engine import Expression, any_of, compiled

Fit = Callable[[str, int, int], int]
Extend = Callable[[str, int], int]
# Characters of a match; what could become a longer one is decided as it stands.
MOST = 1000


# Scripts that set no blanks between words, by their first and last characters: Thai and Lao, Burmese, Khmer, Chinese and Japanese
# with what stands between them, Hangul, whose particles are joined to words, and the further planes of Chinese.
UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF),
            (0x20000, 0x3FFFF))  # fmt: skip


def joins(character: str) -> bool:
    """Would it be part of the same word? "" is no character."""
    if character.isascii():
        return character.isalnum()
    return character.isalnum() and not any(first <= ord(character) <= last for first, last in UNSPACED)


def alone(text: str, start: int, end: int) -> int:
    """A match that no letter, digit or underscore touches; between scripts without blanks words touch each other."""
    before, behind = text[start - 1 : start] if start else "", text[end : end + 1]
    return 0 if joins(before) or before == "_" or joins(behind) or behind == "_" else end


def anywhere(text: str, start: int, end: int) -> int:
    return end


@dataclass(frozen=True, slots=True)
class Detector:
    """name: of what it finds, as placeholders have it (`EMAIL`). fit: the end of the match, which may come before the
    candidate's; 0: it is none. extend: where a candidate that ends here really ends. most: characters, at most.
    ahead: characters behind a match that `fit` may look at."""

    name: str
    source: str
    fit: Fit = alone
    extend: Extend | None = None
    most: int = MOST
    ahead: int = 1


class Match(NamedTuple):
    """Where it stands, and which of the scanner's detectors found it."""

    start: int
    end: int
    which: int


class Seen(NamedTuple):
    """matches: decided, in order, none over another. held: what stands before is decided."""

    matches: list[Match]
    held: int


class Scanner:
    """Looks for all of some detectors. Where two find something at one place, the longer one counts, then the earlier in
    order."""

    def __init__(self, detectors: Sequence[Detector], re2: ModuleType | None) -> None:
        self.detectors = tuple(detectors)
        self._each: list[Expression] = [compiled(detector.source, re2) for detector in detectors]
        self._all = any_of([detector.source for detector in detectors], re2)
        self._least = min(detector.most for detector in detectors)

    def scan(self, text: str, start: int, *, over: bool) -> Seen:
        """Look at `text` from `start` on; before it stands context. over: nothing follows the text."""
        if over:
            if self._all.full.search(text, start) is None:
                return Seen([], len(text))
        elif (span := self._all.either.search(text, start)) is None:
            return Seen([], len(text))
        elif span[1] == len(text) and len(text) - span[0] <= self._least:
            return Seen([], span[0])  # the usual case, with one search
        return self._one_by_one(text, start, over)

    def _one_by_one(self, text: str, start: int, over: bool) -> Seen:
        """The leftmost match of all, the longest of those, then from its end on the next: the same whatever the pieces were."""
        matches: list[Match] = []
        nexts = [self._next(which, text, start, over) for which in range(len(self._each))]
        unseen = len(text) if over else self._open(text, start)
        while True:
            held = min([unseen, *(match.start for match in nexts if match is not None and match.end < 0)])
            decided = [match for match in nexts if match is not None and match.end >= 0]
            first = min(decided, key=lambda match: (match.start, -match.end, match.which), default=None)
            if first is None or first.start >= held:
                return Seen(matches, held)
            matches.append(first)
            nexts = [
                self._next(which, text, first.end, over) if match is not None and match.start < first.end else match
                for which, match in enumerate(nexts)
            ]
            if unseen < first.end:
                unseen = self._open(text, first.end)

    def _open(self, text: str, start: int) -> int:
        """The first character that a match may begin with which the text does not yet show."""
        if (span := self._all.partial.search(text, start)) is None:
            return len(text)
        if len(text) - span[0] <= self._least:
            return span[0]
        return min(self._open_for(which, text, start) for which in range(len(self._each)))

    def _open_for(self, which: int, text: str, start: int) -> int:
        # Longer than a match can be: what it begins with is none any more.
        first = max(start, len(text) - self.detectors[which].most)
        span = self._each[which].partial.search(text, first)
        return len(text) if span is None else span[0]

    def _next(self, which: int, text: str, start: int, over: bool) -> Match | None:
        """One detector's next match; its end is negative where it is still open."""
        detector, search = self.detectors[which], self._each[which].full.search
        while (span := search(text, start)) is not None:
            first, last = span
            if detector.extend is not None:
                last = detector.extend(text, last)
            if last - first > detector.most:
                last = first + detector.most  # it is taken as it stands
            elif not over and last + detector.ahead > len(text):
                return Match(first, -1, which)
            if end := detector.fit(text, first, last):
                return Match(first, end, which)
            start = first + 1
        return None
