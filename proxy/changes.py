"""In words, what is different in another config: names and places, for the log. Pure.

The one rule: no value is said, only whose it is; it may be a secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxy.config import Config, MiddlewareSpec


def changes(before: Config, after: Config) -> list[str]:
    """One entry per section that differs: `providers +new -gone ~changed`. Empty where nothing does."""
    server = [name for name in type(after.server).model_fields if getattr(before.server, name) != getattr(after.server, name)]
    found = [
        _entry("server", [f"~{name}" for name in server]),
        "default_provider" if before.default_provider != after.default_provider else "",
        _entry("providers", _signed(before.providers, after.providers)),
        _entry("models", _signed(before.routes, after.routes)),
        *_middleware(before.middleware, after.middleware),
    ]
    return [entry for entry in found if entry]


def changed_providers(before: Config, after: Config) -> frozenset[str]:
    """The names of the rows that were added, removed or altered."""
    return frozenset(name[1:] for name in _signed(before.providers, after.providers))


def numbered(specs: Sequence[MiddlewareSpec]) -> dict[str, MiddlewareSpec]:
    """Entries by their name; a second one of the same name is `name#2`."""
    found: dict[str, MiddlewareSpec] = {}
    for spec in specs:
        count = 1 + sum(other.name == spec.name for other in found.values())
        found[spec.name if count == 1 else f"{spec.name}#{count}"] = spec
    return found


def _middleware(before: Sequence[MiddlewareSpec], after: Sequence[MiddlewareSpec]) -> list[str]:
    old, new = numbered(before), numbered(after)
    moved = [name for name in old if name in new] != [name for name in new if name in old]
    return [
        _entry("middleware", _signed(old, new)),
        f"middleware order: {', '.join(new)}" if moved else "",
    ]


def _signed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`+` added, `-` removed, `~` altered."""
    return [
        *(f"+{name}" for name in after if name not in before),
        *(f"-{name}" for name in before if name not in after),
        *(f"~{name}" for name in after if name in before and before[name] != after[name]),
    ]


def _entry(section: str, names: Sequence[str]) -> str:
    return f"{section} {' '.join(names)}" if names else ""
