"""What a request says about targets: `fallbacks`, OpenRouter's `models`, orq's `load_balancer`.

Strategy: every name is resolved while the request is read, into a `Plan` of routes; the targets of all of them become the call's,
so that layers further in or out see each one.
The one rule: a name that leads nowhere is refused with the path under which it stands, before any upstream is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxy.call import Route, Target
from proxy.errors import Refused
from proxy.own_fields import Field, OwnFields

MOST_FALLBACKS = 5
LOWEST_WEIGHT, DEFAULT_WEIGHT = 0.001, 0.5
KIND = ("weight_based",)

Lookup = Callable[[str], Route]


@dataclass(frozen=True, slots=True)
class Plan:
    """first: where the call goes; with `weights` (one each) one of them is drawn, and the others follow. then: the fallbacks.

    impatient: the client set a time limit of its own.
    """

    first: tuple[Route, ...]
    weights: tuple[float, ...] = ()
    then: tuple[Route, ...] = ()
    impatient: bool = False

    @property
    def routes(self) -> tuple[Route, ...]:
        return self.first + self.then

    @property
    def targets(self) -> tuple[Target, ...]:
        """Each target of all routes, once."""
        return tuple({target.name: target for route in self.routes for target in route.targets}.values())


def read_plan(own: OwnFields, route: Route, lookup: Lookup, most: int) -> Plan | None:
    """None where the request says nothing. most: models that one request may name. Raises Refused (400, 404)."""
    balancer, fallbacks, models = own.get("load_balancer"), own.get("fallbacks"), own.get("models")
    impatient = own.get("timeout") is not None
    if balancer is None and fallbacks is None and models is None:
        return Plan((route,), impatient=True) if impatient else None
    first, weights = _balanced(balancer, lookup, most) if balancer is not None else ((route,), ())
    then = [_route(name, lookup) for name in _names(fallbacks, MOST_FALLBACKS)]
    then += [_route(name, lookup) for name in _names(models, most)]
    if 1 + len(weights) + len(then) > most:
        field = models or fallbacks or balancer
        assert field is not None
        field.refuse(f"a request may name at most {most} models in all")
    return Plan(first, weights, tuple(then), impatient)


def _names(field: Field | None, most: int) -> Iterator[Field]:
    """The names in a list of strings or of {model}."""
    for item in field.items(most) if field is not None else ():
        yield item if isinstance(item.value, str) else _model(item)


def _model(item: Field) -> Field:
    if not isinstance(item.value, dict):
        item.refuse("must be the name of a model, or an object with `model`")
    return item.get("model") or Field(None, f"{item.path}.model")


def _balanced(field: Field, lookup: Lookup, most: int) -> tuple[tuple[Route, ...], tuple[float, ...]]:
    """`{type, models: [{model, weight}]}`, or the older list `[{type, model, weight}]`."""
    listed = isinstance(field.value, list)
    if not listed:
        _check_type(field)
    entries = list((field if listed else field.get("models") or Field(None, f"{field.path}.models")).items(most))
    if not entries:
        field.refuse("must name at least one model")
    routes, weights = [], []
    for entry in entries:
        if listed:
            _check_type(entry)
        routes.append(_route(_model(entry), lookup))
        weight = entry.get("weight")
        weights.append(DEFAULT_WEIGHT if weight is None else weight.number(LOWEST_WEIGHT, 1))
    return tuple(routes), tuple(weights)


def _check_type(field: Field) -> None:
    if (kind := field.get("type")) is not None:
        kind.one_of(KIND)


def _route(field: Field, lookup: Lookup) -> Route:
    if not isinstance(field.value, str) or not field.value:
        field.refuse("must be the name of a model")
    try:
        return lookup(field.value)
    except Refused as error:
        message = f"{field.path}: {error.message.removeprefix('model: ')}"
        raise Refused(message, status=error.status, type=error.type, code=error.code, param=field.path) from None
