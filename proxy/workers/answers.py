"""How the JSON answers of several workers become one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def added(values: Sequence[Any]) -> Any:
    """Values of the same shape: numbers added up, objects key by key; of anything else (text, lists, flags) the first.

    >>> added([{"deleted": 3, "scope": "key"}, {"deleted": 2, "scope": "key"}])
    {'deleted': 5, 'scope': 'key'}
    """
    if all(isinstance(value, dict) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: added([value[name] for value in values if name in value]) for name in names}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return sum(values)
    return values[0]
