"""The keys file: the entries of `keys:` in a file of its own, that may change while the gateway runs.

Strategy: look at the path's stat; where that differs, or is so young that a second write could hide behind it, hash the content;
where that differs, parse. Each look opens the path anew, so a rename over it and a swapped symlink are seen.
The one rule: a file with any fault gives no keys at all, and what is said of a fault is its place and kind, never its content.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import orjson
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from middleware.auth.keys import Key

# A file written less than this before it was read may have been written again within its timestamp's granularity.
YOUNG_SECONDS = 2.0
T = TypeVar("T")
KINDS: dict[Any, str] = {
    str: "text; put it in quotes", bool: "true or false", tuple: "a list of texts", dict: "a mapping", int: "a whole number",
}  # fmt: skip


class KeysFile:
    """A file of keys, YAML or (`.json`) JSON: a list of entries, or a mapping with the list under `keys`. now: Unix seconds."""

    def __init__(self, path: str, now: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._now = now
        self._stat: tuple[int, ...] | None = None
        self._hash = b""

    def changed(self) -> tuple[Key, ...] | None:
        """The keys, if the file is another than at the last look, else None. Raises ValueError in words for the operator.

        It blocks; what raised is not read again before the file has changed, but for a file that could not be read.
        """
        try:
            content = self._new_content()
        except OSError as error:
            self._stat, self._hash = None, b""
            raise ValueError(f"cannot be read ({error.strerror or type(error).__name__})") from None
        return None if content is None else entries(_parsed(content, json=self.path.suffix == ".json"))

    def _new_content(self) -> bytes | None:
        found = os.stat(self.path)
        stat = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if stat == self._stat:
            return None
        content = self.path.read_bytes()
        self._stat = None if self._now() - found.st_mtime < YOUNG_SECONDS else stat
        seen, self._hash = self._hash, sha256(content).digest()
        return content if seen != self._hash else None


def _parsed(content: bytes, *, json: bool) -> object:
    """The parsers' own words are left out: they quote the file."""
    try:
        return orjson.loads(content) if json else YAML(typ="safe", pure=True).load(content.decode())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is no valid JSON (line {error.lineno})") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"is no valid YAML (line {mark.line + 1 if mark else 1})") from None
    except (YAMLError, ValueError, RecursionError):
        raise ValueError("is no valid YAML") from None


def entries(found: object) -> tuple[Key, ...]:
    """The keys of a parsed file. Raises ValueError for the first fault: its path, and what is wrong."""
    if isinstance(found, dict) and set(found) == {"keys"}:
        found = found["keys"]
    if not isinstance(found, list):
        raise ValueError("must be a list of keys, or a mapping with the list under 'keys'")
    return tuple(_section(Key, entry, f"keys[{number}]") for number, entry in enumerate(found))


def _section(made: type[T], written: object, path: str) -> T:
    """A dataclass out of a mapping. Raises ValueError for the first fault."""
    if not isinstance(written, dict):
        raise ValueError(f"{path}: must be a mapping")
    hints = get_type_hints(made, include_extras=True)
    # A mistyped setting is not repeated: where the mapping is garbled, a key may stand in its place.
    if not set(written) <= set(hints):
        raise ValueError(f"{path}: unknown setting; known: {', '.join(hints)}")
    for name in ("name", "key"):
        if name in hints and name not in written:
            raise ValueError(f"{path}.{name}: is required")
    return made(**{name: _setting(hints[name], value, f"{path}.{name}") for name, value in written.items()})


def _setting(hint: Any, value: Any, path: str) -> Any:
    """The value, of the type and form that an annotation declares."""
    if isinstance(value, date):  # YAML reads an unquoted date as one
        value = value.isoformat()
    if isinstance(value, list):
        value = tuple(value)
    if get_origin(hint) in (Union, UnionType):  # `… | None`: to leave a setting out is how None is written
        hint = get_args(hint)[0]
    declared, *marks = (get_args(hint)[0], *hint.__metadata__) if hasattr(hint, "__metadata__") else (hint,)
    kind = get_origin(declared) or declared
    if isinstance(kind, type) and is_dataclass(kind):
        return _section(kind, value, path)
    right = type(value) is int if kind is int else isinstance(value, kind)  # to Python True is a number
    if not right or (kind is tuple and not all(isinstance(item, str) for item in value)):
        raise ValueError(f"{path}: must be {KINDS[kind]}")
    if path.endswith("].key") and "${" in value:
        raise ValueError(f"{path}: variables are filled in only in config.yaml")
    try:
        for mark in marks:
            mark.check(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return value
