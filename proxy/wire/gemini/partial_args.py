"""Function arguments that come as pieces with a JSON path each (Vertex AI, `streamFunctionCallArguments`), as JSON text.

Strategy: pieces come in document order, so the text is written as they come, with the containers on the way to the last
piece still open. Beside it the value is kept: a piece that belongs where the text is closed already makes its top-level
member late, and `close` writes that member once more, whole (of two equal names every JSON parser takes the last).
The one rule: after `close` the text is one JSON object, and it says what the pieces said.

https://docs.cloud.google.com/vertex-ai/generative-ai/docs/multimodal/function-calling; paths are RFC 9535's singular queries.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

Json = dict[str, Any]
Path = tuple[str | int, ...]

SEGMENT = re.compile(
    r"""
    \.(?P<name>[^.\[\]]+) | \[(?P<index>\d+)\]
    | \['(?P<single>(?:[^'\\]|\\.)*)'\] | \[(?P<double>"(?:[^"\\]|\\.)*")\]
    """,
    re.VERBOSE,
)
VALUES = ("stringValue", "numberValue", "boolValue", "nullValue")


def parse_path(path: str) -> Path:
    """("foo", 0, "bar") of `$.foo[0].bar`. Raises ValueError for what names no member of an object."""
    found: list[str | int] = []
    at = 1
    while at < len(path):
        match = SEGMENT.match(path, at)
        if match is None:
            break
        at = match.end()
        if match["index"] is not None:
            found.append(int(match["index"]))
        elif match["single"] is not None:
            found.append(re.sub(r"\\(.)", r"\1", match["single"]))
        else:
            found.append(match["name"] or orjson.loads(match["double"]))
    if path[:1] != "$" or at < len(path) or not found or not isinstance(found[0], str):
        raise ValueError("a JSON path that the gateway does not know")
    return tuple(found)


class GrowingText:
    """A string that is still coming; joined once, when it is written again."""

    __slots__ = ("parts",)

    def __init__(self, text: str) -> None:
        self.parts = [text]


class PartialArguments:
    """The arguments of one function call. `add`, `put` and `close` return the text to be appended."""

    __slots__ = ("_growing", "_late", "_path", "_string_open", "_value")

    def __init__(self) -> None:
        self._value: Json = {}
        self._path: Path = ()  # where the text stands: at this member, with all containers above it open
        self._string_open = False
        self._growing: tuple[Path, GrowingText] | None = None
        self._late: dict[str, None] = {}

    def add(self, piece: Json) -> str:
        """One PartialArg: {jsonPath, stringValue | numberValue | boolValue | nullValue, willContinue?}."""
        path = parse_path(piece["jsonPath"])
        more = piece.get("willContinue") is True
        name = next((name for name in VALUES if name in piece), None)
        if name is None:  # it only ends its string
            return self.put(path, "", more=more) if self._growing and self._growing[0] == path else ""
        return self.put(path, None if name == "nullValue" else piece[name], more=more)

    def put(self, path: Path, value: Any, *, more: bool = False) -> str:
        """A value at a path; `more`: it is a string, and its next piece has the same path."""
        if self._growing and self._growing[0] == path and isinstance(value, str):
            return self._grow(path, value, more)
        leaf = GrowingText(value) if more and isinstance(value, str) else value
        self._growing = (path, leaf) if isinstance(leaf, GrowingText) else None
        fresh = self._store(path, leaf)
        if path[0] in self._late:
            return ""
        if fresh is None or fresh > len(self._path) - 1 > -1 or path[:fresh] != self._path[:fresh]:
            self._late[str(path[0])] = None
            return ""
        return self._write(path, fresh, value, still_open=self._growing is not None)

    def close(self) -> str:
        """Nothing more comes: what is missing to one JSON object."""
        text = self._leave(1) if self._path else "{"
        for name in self._late:
            text += f",{_dump(name)}:{_dump(self._value[name])}"
        return text + "}"

    def _grow(self, path: Path, text: str, more: bool) -> str:
        assert self._growing is not None
        self._growing[1].parts.append(text)
        if not more:
            self._growing = None
        if path[0] in self._late:
            return ""
        self._string_open = more
        return _dump(text)[1:-1] + ("" if more else '"')

    def _store(self, path: Path, leaf: object) -> int | None:
        """Keep the value; the depth of the first segment that was not there yet, or None."""
        fresh: int | None = None
        container: Any = self._value
        for depth, segment in enumerate(path):
            known = _has(container, segment)
            if not known and fresh is None:
                fresh = depth
            if depth + 1 == len(path):
                item = leaf
            elif known:
                item = container[segment]
            else:
                item = [] if isinstance(path[depth + 1], int) else {}
            if known or isinstance(container, dict):
                container[segment] = item
            else:
                container.append(item)
            container = item
        return fresh

    def _write(self, path: Path, fresh: int, value: object, *, still_open: bool) -> str:
        """From the container at depth `fresh`, which is open, down to the value."""
        text = self._leave(fresh + 1) + "," if self._path else "{"
        for depth in range(fresh, len(path)):
            segment = path[depth]
            opener = "" if depth == fresh else "[" if isinstance(segment, int) else "{"
            text += opener if isinstance(segment, int) else f"{opener}{_dump(segment)}:"
        self._path = path
        self._string_open = still_open
        written = _dump(value)
        return text + (written[:-1] if still_open else written)

    def _leave(self, depth: int) -> str:
        """The end of an open string, and of the open containers from `depth` on."""
        text = '"' if self._string_open else ""
        self._string_open = False
        return text + "".join("]" if isinstance(segment, int) else "}" for segment in reversed(self._path[depth:]))


def _has(container: object, segment: str | int) -> bool:
    """Is the member there already? Raises ValueError where it cannot be: another kind of container, or a gap in a list."""
    if isinstance(container, dict) and isinstance(segment, str):
        return segment in container
    if isinstance(container, list) and isinstance(segment, int) and segment <= len(container):
        return segment < len(container)
    raise ValueError("a JSON path that does not fit the others")


def _dump(value: object) -> str:
    return orjson.dumps(value, default=_joined).decode()


def _joined(value: object) -> str:
    if isinstance(value, GrowingText):
        return "".join(value.parts)
    raise TypeError(type(value).__name__)
