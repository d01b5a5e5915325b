"""Which models a request names, and whether a key may use them.

Strategy: a model may be named as `model`, and anywhere in `models`, `fallbacks` and `load_balancer`. Those fields are searched
for names in every shape that they may have, rather than in the one that some routing middleware reads today: what is searched
too widely is refused too early, what is searched too narrowly is let through.
The one rule: a route is allowed by its own name; any other model by the name it was asked by, or by its `provider/model`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fnmatch import translate
from functools import lru_cache
from itertools import islice
from typing import Any

from proxy.call import Call, Principal, Route
from proxy.errors import Refused
from proxy.own_fields import OwnFields

FIELDS = ("models", "fallbacks", "load_balancer")
MOST_NAMES = 64


def check(call: Call, own: OwnFields, route: Callable[[str], Route] | None) -> None:
    """Raises Refused (403) with the path of the first model that the caller's key may not use."""
    globs = call.principal.facts.get("models")
    if not globs:
        return
    if not allowed(globs, call.model, call.route):
        raise _forbidden(call.model, "model")
    for name, path in islice(_named(own), MOST_NAMES + 1):
        if not allowed(globs, name, _leads(name, route)):
            raise _forbidden(name, path)
    if next(islice(_named(own), MOST_NAMES, None), None) is not None:
        raise Refused(f"A request may name at most {MOST_NAMES} models.", code="invalid_value", param="fallbacks")


def may_use(principal: Principal, name: str, route: Route) -> bool:
    """May this principal use the model of this name?"""
    globs = principal.facts.get("models")
    return not globs or allowed(globs, name, route)


def allowed(globs: tuple[str, ...], name: str, route: Route) -> bool:
    """Does one of the globs match? `*` matches slashes too; case counts."""
    matches = _pattern(globs).match
    if matches(name):
        return True
    return route.name is None and any(matches(str(target)) for target in route.targets)


@lru_cache(maxsize=1024)
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, globs)))


def _leads(name: str, route: Callable[[str], Route] | None) -> Route:
    """Where a name leads; nowhere, where there is no such model: that is for whoever uses it to say."""
    try:
        return route(name) if route is not None else Route(None, ())
    except Refused:
        return Route(None, ())


def _named(own: OwnFields) -> Iterator[tuple[str, str]]:
    """Every model that the request names beside `model`, with its path."""
    for name in FIELDS:
        if (found := own.get(name)) is not None:
            yield from _names(found.value, found.path)


def _names(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Texts, in lists, under `model` and `models`. As deep as the body may be nested."""
    if isinstance(value, str):
        yield value, path
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _names(item, f"{path}[{number}]")
    elif isinstance(value, dict):
        for name in ("model", "models"):
            if name in value:
                yield from _names(value[name], f"{path}.{name}")


def _forbidden(name: str, path: str) -> Refused:
    return Refused(
        f"{path}: this key may not use the model '{name[:128]}'.",
        status=403,
        type="permission_error",
        code="model_not_allowed",
        param=path,
    )
