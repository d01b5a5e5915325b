"""Regular expressions in linear time: google-re2 where it is installed, else the standard library's, for built-in rules alone.

Strategy: `compiled` writes an expression twice (`prefix`), whole and as its beginnings, and compiles both. re2 takes time linear
in the text whatever the expression; `re` does not, so without re2 an operator's own expressions are refused, and the built-in
ones are written so that two readings of one text are never possible: classes that follow one another do not overlap.
The one rule: positions are those of characters, whatever the engine counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from middleware.guardrails.rules.prefix import written

INSTALL = "needs google-re2, which matches in linear time: pip install 'penstock[guardrails]'"
Span = tuple[int, int]
# What re2 may keep of an automaton, at most; with its own 8 MiB all built-in rules together have no room and are four times
# slower.
AUTOMATON = 2**26


class Search(Protocol):
    """Finds the leftmost match from a position on; what stands before it counts as context."""

    def search(self, text: str, start: int) -> Span | None: ...


@dataclass(frozen=True, slots=True)
class Expression:
    """full: finds matches. partial: finds the leftmost text up to the end that could still become one."""

    full: Search
    partial: Search


def compiled(source: str, re2: ModuleType | None) -> Expression:
    """Raises ValueError in words for the operator."""
    found = written(source, re2=re2 is not None)
    return Expression(searcher(found.full, re2), searcher(found.partial, re2))


@dataclass(frozen=True, slots=True)
class Several(Expression):
    """Several at once, for a first look. either: finds the leftmost of both, at one place what could still become a match; so
    where what it finds reaches the end, no match begins before it."""

    either: Search


def any_of(sources: list[str], re2: ModuleType | None) -> Several:
    found = [written(source, re2=re2 is not None) for source in sources]
    full = "|".join(f"(?:{_inline(one.full)})" for one in found)
    partial = "|".join(f"(?:{_inline(one.partial)})" for one in found)
    return Several(searcher(full, re2), searcher(partial, re2), searcher(f"{partial}|{full}", re2))


def _inline(text: str) -> str:
    """An expression's global flags as those of a group."""
    flags = re.match(r"\(\?([is]+)\)", text)
    return f"(?{flags[1]}:{text[flags.end() :]})" if flags else text


def searcher(source: str, re2: ModuleType | None) -> Search:
    return _Standard(source) if re2 is None else _Linear(source, re2)


class _Standard:
    __slots__ = ("_pattern",)

    def __init__(self, source: str) -> None:
        self._pattern = re.compile(source, re.ASCII)

    def search(self, text: str, start: int) -> Span | None:
        found = self._pattern.search(text, start)
        return None if found is None else found.span()


class _Linear:
    """re2 on UTF-8: its own wrapper for text takes three times as long."""

    __slots__ = ("_pattern",)

    def __init__(self, source: str, re2: Any) -> None:
        options = re2.Options()
        options.longest_match = True
        options.log_errors = False
        options.never_capture = True
        options.max_mem = AUTOMATON
        try:
            self._pattern = re2.compile(source.encode(), options)
        except re2.error:
            raise ValueError("is too large, or nothing that google-re2 takes") from None

    def search(self, text: str, start: int) -> Span | None:
        if text.isascii():
            found = self._pattern.search(text.encode(), start)
            return None if found is None else found.span()
        data = text.encode(errors="replace")
        found = self._pattern.search(data, len(text[:start].encode(errors="replace")))
        if found is None:
            return None
        first, last = found.span()
        begin = len(data[:first].decode())
        return begin, begin + len(data[first:last].decode())


def installed() -> ModuleType | None:
    """google-re2, if it is there; loaded only where somebody configures guardrails."""
    try:
        import re2  # type: ignore[import-untyped]
    except ImportError:
        return None
    return re2  # type: ignore[no-any-return]
