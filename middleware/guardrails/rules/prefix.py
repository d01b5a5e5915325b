"""What the beginning of a match looks like: from a regular expression, the one of everything that could still become a match.

Strategy: the expression is read by the standard library's parser, and written again from its syntax tree, twice: as it is, in the
syntax that google-re2 and `re` share, and as its prefixes. The prefixes of `ab` are `(?:a(?:b)?)?`; those of an alternation are
the prefixes of its branches; those of a repeat are some rounds and the prefix of one more. Both are linear in the expression's
size. A boundary at the very end is still open, so there its prefix is fulfilled.
The one rule: every beginning of every match is matched by `partial` up to the end of the text; a few other texts may be, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

Node = tuple[Any, Any]

LETTERS = {re.IGNORECASE: "i", re.DOTALL: "s"}
CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d",
    ops.CATEGORY_NOT_DIGIT: r"\D",
    ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S",
    ops.CATEGORY_WORD: r"\w",
    ops.CATEGORY_NOT_WORD: r"\W",
}
BOUNDARIES = {ops.AT_BOUNDARY: r"\b", ops.AT_NON_BOUNDARY: r"\B"}
REPEATS = {ops.MAX_REPEAT: "", ops.MIN_REPEAT: "?"}
# The end of the text, for either engine.
END = {True: r"\z", False: r"\Z"}


@dataclass(frozen=True, slots=True)
class Written:
    """An expression anew. full: the same; partial: its prefixes, to be matched up to the end of the text."""

    full: str
    partial: str


def written(source: str, *, re2: bool) -> Written:
    """Raises ValueError, in words for the operator, where it is no expression, or one that no linear engine takes."""
    try:
        tree = parser.parse(source)
    except re.error:
        raise ValueError("is no regular expression") from None
    except RecursionError:
        raise ValueError("is nested too deep") from None
    if tree.getwidth()[0] == 0:
        raise ValueError("matches the empty text, so it would match everywhere")
    writer = _Writer(END[re2])
    flags = _flags(tree.state.flags)
    return Written(f"{flags}{writer.full(tree)}", f"{flags}(?:{writer.prefixes(list(tree))}){END[re2]}")


def _flags(flags: int) -> str:
    letters = "".join(letter for flag, letter in LETTERS.items() if flags & flag)
    return f"(?{letters})" if letters else ""


def _no(what: str) -> ValueError:
    return ValueError(f"{what} cannot be matched in linear time, or mean nothing in a stream; leave them out")


class _Writer:
    """end: how this engine writes the end of the text."""

    def __init__(self, end: str) -> None:
        self._end = end

    def full(self, nodes: Iterable[Node]) -> str:
        return "".join(map(self._node, nodes))

    def prefixes(self, nodes: list[Node]) -> str:
        """All beginnings of a sequence, the empty one included."""
        found = ""
        for node in reversed(nodes):
            found = self._before(node, found)
        return found

    def _before(self, node: Node, rest: str) -> str:
        op, value = node
        if op is ops.AT:
            return f"(?:(?:{self._node(node)}|{self._end}){rest})?"
        if op in REPEATS:
            _, most, body = value
            again = "*" if most is ops.MAXREPEAT else f"{{0,{max(0, int(most) - 1)}}}"
            return f"(?:{self._node(node)}{rest}|(?:{self.full(body)}){again}{self.prefixes(list(body))})"
        if op is ops.BRANCH:
            inside = "|".join(self.prefixes(list(branch)) for branch in value[1])
            return f"(?:{self._node(node)}{rest}|{inside})"
        if op is ops.SUBPATTERN:
            return f"(?:{self._node(node)}{rest}|{_scoped(value, self.prefixes(list(value[-1])))})"
        return f"(?:{self._node(node)}{rest})?"

    def _node(self, node: Node) -> str:
        op, value = node
        if op is ops.LITERAL:
            return _character(value)
        if op is ops.NOT_LITERAL:
            return f"[^{_character(value)}]"
        if op is ops.ANY:
            return "."
        if op is ops.IN:
            return _set(value)
        if op is ops.BRANCH:
            return f"(?:{'|'.join(map(self.full, value[1]))})"
        if op is ops.SUBPATTERN:
            return _scoped(value, self.full(value[-1]))
        if op in REPEATS:
            least, most, body = value
            return f"(?:{self.full(body)}){_count(least, most)}{REPEATS[op]}"
        if op is ops.AT:
            if value not in BOUNDARIES:
                raise _no("anchors (^, $, \\A, \\Z)")
            return BOUNDARIES[value]
        raise _no("look-around, back-references, atomic groups and possessive repeats")


def _count(least: int, most: Any) -> str:
    return f"{{{least},}}" if most is ops.MAXREPEAT else f"{{{least},{most}}}"


def _scoped(value: Any, inside: str) -> str:
    """A group; its name and number are of no use here, its flags are."""
    _, add, drop, _ = value
    on, off = (("".join(letter for flag, letter in LETTERS.items() if flags & flag)) for flags in (add, drop))
    return f"(?{on}{'-' if off else ''}{off}:{inside})"


def _character(code: int) -> str:
    return re.escape(chr(code)) if code > 32 else f"\\x{code:02x}"


def _set(value: list[Node]) -> str:
    negated = value[0][0] is ops.NEGATE
    inside = "".join(map(_member, value[negated:]))
    return f"[{'^' if negated else ''}{inside}]"


def _member(node: Node) -> str:
    op, value = node
    if op is ops.CATEGORY:
        return CATEGORIES[value]
    if op is ops.RANGE:
        return f"{_in_set(value[0])}-{_in_set(value[1])}"
    return _in_set(value)


def _in_set(code: int) -> str:
    character = chr(code)
    return f"\\x{code:02x}" if code < 128 and not character.isalnum() else character
