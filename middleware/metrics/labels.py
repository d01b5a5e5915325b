"""Which label values a request may have: those of the config, and the first few of those that clients invent.

Strategy: a model gets a label of its own when the config names it, or when a provider has answered for it; a name when it is
among its key's first `max_names`. What comes later is `other`.
The one rule: no client can make the number of series grow without bound, whatever it sends.
"""

from __future__ import annotations

from proxy.call import Call

OTHER = "other"
DIRECT = "direct"
LONGEST = 160


class FirstSeen:
    """The first `most` values keep their labels."""

    __slots__ = ("_most", "_seen")

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: set[str] = set()

    def __contains__(self, value: str) -> bool:
        return value in self._seen

    def adopt(self, previous: FirstSeen) -> None:
        self._seen = previous._seen

    def label(self, value: str) -> str:
        if value in self._seen:
            return value
        # What cannot be printed (half a character, out of a header's bytes) could not be scraped either.
        if len(self._seen) >= self._most or len(value) > LONGEST or not value.isprintable():
            return OTHER
        self._seen.add(value)
        return value


class Labels:
    """The label values of calls. max_names: per key. max_sets: combinations of route, target, key and name, over all of which
    target and name become `other` in new ones.
    """

    def __init__(self, max_names: int, max_models: int, max_sets: int) -> None:
        self._max_names = max_names
        self._max_sets = max_sets
        self._targets = FirstSeen(max_models)
        self._routes = FirstSeen(max_models)
        self._names: dict[str, FirstSeen] = {}
        self._sets: set[tuple[str, str, str, str]] = set()

    def adopt(self, previous: Labels) -> None:
        """Whatever has a label keeps it, whatever the bounds are now: a reload must not let in as many again."""
        self._targets.adopt(previous._targets)
        self._routes.adopt(previous._routes)
        self._sets = previous._sets
        for key, seen in previous._names.items():
            self._names.setdefault(key, FirstSeen(self._max_names)).adopt(seen)

    def route(self, call: Call) -> str:
        """The route's name in config.yaml; `direct` for a model that was named as provider/model."""
        return DIRECT if call.route.name is None else self._routes.label(call.route.name)

    def target(self, call: Call, target: str, *, answered: bool) -> str:
        """`provider/model`, or `provider/other`. answered: the provider knows the model, for it replied."""
        if target in self._targets:
            return target
        if (answered or _configured(call, target)) and (found := self._targets.label(target)) != OTHER:
            return found
        provider, slash, _ = target.partition("/")
        return f"{provider}/{OTHER}" if slash else OTHER

    def name(self, call: Call) -> str:
        """The tracking name; empty where there is none."""
        if call.name is None:
            return ""
        names = self._names.get(call.principal.name)
        if names is None:
            names = self._names[call.principal.name] = FirstSeen(self._max_names)
        return names.label(call.name)

    def asked(self, call: Call, route: str, target: str) -> tuple[str, str, str, str]:
        """(route, target, key, name) for the counters."""
        found = (route, target, call.principal.name, self.name(call))
        if found in self._sets:
            return found
        if len(self._sets) < self._max_sets:
            self._sets.add(found)
            return found
        return (route, OTHER, call.principal.name, OTHER)


def _configured(call: Call, target: str) -> bool:
    """Does config.yaml name this target, in a route or in its provider's `models`?"""
    route = call.route
    return any(str(one) == target and (route.name is not None or one.model in one.provider.models) for one in route.targets)
