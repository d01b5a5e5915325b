"""The gateway's own fields of a request, found where they may stand, read with their paths.

Strategy: `OwnFields` merges the places (top level before `penstock` before `orq`, null counts as absent); a `Field` knows its
path and hands out its value in one of a few shapes, or refuses it.
The one rule: a value of the wrong type or range is a 400 whose `param` is the path under which the client sent it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any, NoReturn

from proxy.errors import Refused

Json = dict[str, Any]
PLACES = ("orq", "penstock")


class Field:
    """One value and where it stands, e.g. `orq.cache.ttl`. Every reader raises Refused for another shape."""

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: str) -> None:
        self.value = value
        self.path = path

    def refuse(self, message: str) -> NoReturn:
        """`path: message.` as a 400."""
        raise Refused(f"{self.path}: {message}.", code="invalid_value", param=self.path)

    def flag(self) -> bool:
        return self.value if isinstance(self.value, bool) else self.refuse("must be true or false")

    def text(self, longest: int = 256) -> str:
        if not isinstance(self.value, str) or len(self.value) > longest:
            self.refuse(f"must be a text of at most {longest} characters")
        return self.value

    def one_of(self, words: Collection[str]) -> str:
        if not isinstance(self.value, str) or self.value not in words:
            self.refuse(f"must be one of {', '.join(words)}")
        return self.value

    def number(self, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            self.refuse(f"must be a number from {low:.15g} to {high:.15g}")
        return float(value)

    def integer(self, low: int, high: int) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            self.refuse(f"must be a whole number from {low} to {high}")
        return self.value

    def object(self) -> Field:
        """Itself, if it is an object; `get` then finds what is inside."""
        return self if isinstance(self.value, dict) else self.refuse("must be an object")

    def get(self, name: str) -> Field | None:
        """A field inside an object; None where it is absent or null."""
        value = self.object().value.get(name)
        return None if value is None else Field(value, f"{self.path}.{name}")

    def items(self, most: int = 64) -> Iterator[Field]:
        """The entries of a list."""
        if not isinstance(self.value, list) or len(self.value) > most:
            self.refuse(f"must be a list of at most {most} entries")
        for number, value in enumerate(self.value):
            yield Field(value, f"{self.path}[{number}]")


class OwnFields:
    """All fields of a request that may be the gateway's. headers: the client's, whatever the case of their names."""

    __slots__ = ("_body", "_found", "headers")

    def __init__(self, body: Json, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self._found: dict[str, Field] = {}
        for place in PLACES:
            if place in body and (inside := body[place]) is not None:
                Field(inside, place).object()
                self._found.update({name: Field(value, f"{place}.{name}") for name, value in inside.items() if value is not None})
        self._body = body

    def any(self, names: Set[str]) -> bool:
        """Does one of these stand anywhere? 0.2 us, which asking for one takes as well."""
        return not (names.isdisjoint(self._body) and names.isdisjoint(self._found))

    def get(self, name: str) -> Field | None:
        """The field from the first place that has it; None where it is absent or null everywhere."""
        value = self._body.get(name)
        return Field(value, name) if value is not None else self._found.get(name)
