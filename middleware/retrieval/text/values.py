"""JSON and JSON Lines: a line per value, with the path that leads to it (`orders[2].price: 9.50`).

Strategy: the elements of the outermost arrays are blocks of their own, so that a passage begins with one and not in the middle of
it. Numbers are kept as they were written, and a key that stands twice is there twice. A list of plain values is one line.
The one rule: every value and every key is in the text; how deep and how long is bounded while it is written, not after.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from middleware.retrieval.text.decoding import decoded
from middleware.retrieval.text.document import Document, ExtractionError, Limits, Outline, too_large


class _Object(tuple[tuple[str, Any], ...]):
    """The members of a JSON object, in order, none lost."""

    __slots__ = ()


_DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_int=str, parse_float=str, parse_constant=str)
_WORDS = {None: "null", True: "true", False: "false"}


def read(content: bytes, charset: str, limits: Limits) -> Document:
    outline, writing = Outline(limits), _Writing(limits)
    try:
        for record in _records(decoded(content, charset)):
            for block in writing.blocks(record, "", limits.depth):
                outline.add(block, "rows")
    except RecursionError:
        raise _too_deep(limits) from None
    return outline.document("json")


def _too_deep(limits: Limits) -> ExtractionError:
    return ExtractionError(f"The JSON is nested too deep; the most that is taken is {limits.depth} levels.")


def _records(text: str) -> list[Any]:
    """The one value, or one per line. Raises ExtractionError with the place of the fault."""
    try:
        return [_DECODER.decode(text)]
    except json.JSONDecodeError as error:
        return _of_lines(text, error)


def _of_lines(text: str, fault: json.JSONDecodeError) -> list[Any]:
    """fault: why the whole is no JSON. It is told where not even the first line is."""
    records: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(_DECODER.decode(line))
        except json.JSONDecodeError as error:
            number, fault = (number, error) if records else (fault.lineno, fault)
            raise ExtractionError(f"The JSON is broken in line {number}, column {fault.colno}: {fault.msg}.") from None
    return records


class _Writing:
    """Values as text. depth: how many levels a value may still have, wherever it is asked for."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lines: list[str] = []
        self._size = 0

    def blocks(self, value: Any, path: str, depth: int) -> Iterator[str]:
        """What makes a block each: the elements of arrays, found through objects; other members by themselves."""
        members = self._members(value, path, depth)
        if members is None:
            yield self._block(value, path, depth)
        elif isinstance(value, _Object):
            for member, place in members:
                yield from self.blocks(member, place, depth - 1)
        else:
            for element, place in members:
                yield self._block(element, place, depth - 1)

    def _block(self, value: Any, path: str, depth: int) -> str:
        self._lines, self._size = [], 0
        self._write(value, path, depth)
        return "\n".join(self._lines)

    def _write(self, value: Any, path: str, depth: int) -> None:
        members = self._members(value, path, depth)
        if members is None:
            self._add(f"{path}: {_plain(value)}" if path else _plain(value))
            return
        for member, place in members:
            self._write(member, place, depth - 1)

    def _members(self, value: Any, path: str, depth: int) -> Iterator[tuple[Any, str]] | None:
        """What a value consists of, with the paths; None for one that is written on one line."""
        if depth == 0 and isinstance(value, (list, _Object)):
            raise _too_deep(self._limits)
        if isinstance(value, _Object) and value:
            return ((member, f"{path}.{key}" if path else key) for key, member in value)
        if isinstance(value, list) and not _is_plain(value):
            return ((element, f"{path}[{number}]") for number, element in enumerate(value))
        return None

    def _add(self, line: str) -> None:
        self._size += len(line)
        if self._size > self._limits.characters:
            raise too_large(self._limits)
        self._lines.append(line)


def _is_plain(value: list[Any]) -> bool:
    return not any(isinstance(element, (list, _Object)) for element in value)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "[]"
    return "{}" if isinstance(value, _Object) else _WORDS[value]
