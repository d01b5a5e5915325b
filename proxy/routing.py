"""Where a model name leads: a route, `provider/model`, or a bare name at the default provider.

Strategy: one frozen directory built from the config; look-ups are exact, and only a failed one looks for close matches. What was
found is kept, by the name that led there.
The one rule: a name is checked for its form before anything is looked up, so that no path or URL is ever built from
anything but plain segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn

from proxy.call import Provider, Route, Target
from proxy.errors import Refused

Json = dict[str, Any]

MODEL = re.compile(r"[\w.:@+-]+(?:/[\w.:@+-]+)*", re.ASCII)
# Longer than any model's name; looking for close matches takes quadratic time.
LONGEST_NAME = 256
OWN = "penstock"
# Names that were found are kept, because checking one and making its route takes 1.5 us. Clients can think of any number.
MOST_KNOWN = 128


def well_formed(model: str) -> bool:
    """Is this a name that a model can have: segments of `[\\w.:@+-]`, none of them `.` or `..`?"""
    if len(model) > LONGEST_NAME or not MODEL.fullmatch(model):
        return False
    return not any(segment in (".", "..") for segment in model.split("/"))


@dataclass(frozen=True, slots=True)
class Directory:
    """Every name that a client may use.

    created: Unix seconds that `/v1/models` reports for every entry; the providers' own dates are not known.
    """

    providers: Mapping[str, Provider]
    routes: Mapping[str, Route] = field(default_factory=dict)
    default_provider: str | None = None
    created: int = 0
    _known: dict[str, Route] = field(default_factory=dict, init=False, repr=False, compare=False)

    def resolve(self, model: str) -> tuple[Target, ...]:
        """The targets of `route(model)`."""
        return self.route(model).targets

    def route(self, model: str) -> Route:
        """Where a model as a client spelled it leads: at least one target. A disabled provider resolves like any other.

        Raises Refused: 400 for a malformed name, 404 `model_not_found` with close matches for an unknown one.
        """
        known = self._known.get(model)
        if known is None:
            known = self._looked_up(model)
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[model] = known
        return known

    def _looked_up(self, model: str) -> Route:
        if not well_formed(model):
            raise Refused(f"model: {WORDS}", code="invalid_value", param="model")
        route = self.routes.get(model)
        if route is not None:
            return route
        name, slash, rest = model.partition("/")
        if slash and name in self.providers:
            return Route(None, (Target(self.providers[name], rest),))
        if not slash and self.default_provider is not None:
            return Route(None, (Target(self.providers[self.default_provider], model),))
        self._unknown(model)

    def listing(self) -> list[Json]:
        """The entries of `GET /v1/models`: the routes, then the models that the rows of enabled providers list."""
        return [self._entry(name, owner) for name, owner in self._listed()]

    def find(self, model: str) -> Json:
        """The entry of `GET /v1/models/{id}`; a bare name is looked for at the default provider. Raises Refused (400, 404)."""
        targets = self.resolve(model)
        names = {model, *(str(target) for target in targets)}
        for name, owner in self._listed():
            if name in names:
                return self._entry(model, owner)
        self._unknown(model)

    def _listed(self) -> Iterator[tuple[str, str]]:
        for name in self.routes:
            yield name, OWN
        for provider in self.providers.values():
            if provider.missing is None:
                for model in provider.models:
                    yield f"{provider.name}/{model}", provider.name

    def _entry(self, name: str, owner: str) -> Json:
        return {"id": name, "object": "model", "created": self.created, "owned_by": owner}

    def _unknown(self, model: str) -> NoReturn:
        raise Refused(
            f"The model '{model}' does not exist.{self._reason(model)}{self._hint(model)}",
            status=404,
            code="model_not_found",
            param="model",
        )

    def _reason(self, model: str) -> str:
        name, slash, _ = model.partition("/")
        if not slash:
            return "" if self.default_provider else " It is no route and names no provider; write it as provider/model."
        return "" if name in self.providers else f" There is no provider '{name}'."

    def _hint(self, model: str) -> str:
        close = self._close(model)
        return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""

    def _close(self, model: str) -> list[str]:
        """Up to three names: the same model at a provider, then what is spelled alike, then a provider spelled alike."""
        listed = [f"{provider.name}/{name}" for provider in self.providers.values() for name in provider.models]
        same = [name for name in listed if name.endswith(f"/{model}")]
        alike = get_close_matches(model, [*self.routes, *listed], n=3)
        name, slash, rest = model.partition("/")
        renamed = [f"{close}/{rest}" for close in get_close_matches(name, list(self.providers), n=3)] if slash else []
        return [found for found in dict.fromkeys([*same, *alike, *renamed]) if found != model][:3]


WORDS = "must be made of letters, digits and _ . : @ + - in segments separated by '/', none of them '.' or '..'"
