"""Which rules hold for a request, and what they make of its two sides.

Strategy: the operator's rules always hold (or, with `when: asked`, for requests that name them); a request adds to them by id, in
orq's form (`guardrails: [{id, execute_on}]`, `plugins: [{id: pii_redaction}]`). Scanners are made once per combination of rules.
The one rule: a request adds rules and never takes one away; an id that nobody knows is a 400 with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from middleware.guardrails.edits import OWN, Look, Vault, Watched
from middleware.guardrails.options import Rule
from middleware.guardrails.rules import BUILT_IN
from middleware.guardrails.rules.detector import Detector, Scanner
from middleware.guardrails.rules.words import Allowed
from middleware.guardrails.verdict import Finding, Side
from proxy.own_fields import Field, OwnFields

Report = Callable[[Finding], None]
SIDES = ("input", "output", "both")
PLUGIN = "pii_redaction"
# orq's, which need no configuration; those for moderations need a rule that says who is asked.
KNOWN: dict[str, Rule] = {
    "orq_pii_detection": Rule("orq_pii_detection", "block", True, True, detectors=BUILT_IN["pii"]),
    "orq_secret_detection": Rule("orq_secret_detection", "block", True, True, detectors=BUILT_IN["secrets"]),
}
# By id: the categories that count (none: all), and those that do not.
MODERATED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "orq_sexual_moderation": (("sexual",), ()),
    "orq_harmful_moderation": ((), ("sexual",)),
}
REDACTION = Rule(PLUGIN, "redact", True, False, detectors=BUILT_IN["pii"])
# Combinations of rules whose scanners are kept; a client can name few.
MOST_KEPT = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request adds. plugin: it came with one that is ours."""

    rules: tuple[Rule, ...]
    plugin: bool = False


class Policy:
    """rules: the operator's. allowed: values that no rule finds. restore: redacted input is put back on the way out."""

    def __init__(self, rules: Sequence[Rule], allowed: Allowed, restore: bool, re2: ModuleType | None) -> None:
        self._rules, self._allowed, self._restore, self._re2 = tuple(rules), allowed, restore, re2
        self.always = tuple(rule for rule in rules if rule.always)
        self._scanners: dict[tuple[Detector, ...], Scanner] = {}
        moderated = next((rule for rule in rules if rule.outside is not None and rule.outside.target is not None), None)
        self._known = {**KNOWN, **(_moderations(moderated) if moderated else {}), **{rule.id: rule for rule in rules}}

    def read(self, own: OwnFields) -> Asked | None:
        """`guardrails` and `plugins` of a request; None where it adds nothing. Raises Refused with the path."""
        field, plugins = own.get("guardrails"), own.get("plugins")
        added = [self._named(entry) for entry in field.items()] if field is not None else []
        redacts = plugins is not None and any(_redacts(entry) for entry in _entries(plugins))
        if redacts:
            added.append(REDACTION)
        return Asked(tuple(added), redacts) if added else None

    def _named(self, entry: Field) -> Rule:
        named = entry if isinstance(entry.value, str) else entry.get("id") or entry.refuse("must have an id")
        rule = self._known.get(named.text())
        if rule is None:
            named.refuse("is no guardrail that is configured here")
        where = entry.get("execute_on") if isinstance(entry.value, dict) else None
        return rule if where is None else rule.sided(where.one_of(SIDES))

    def rules(self, asked: Asked | None) -> tuple[Rule, ...]:
        return self.always if asked is None else tuple(dict.fromkeys((*self.always, *asked.rules)))

    def looks(self, rules: Sequence[Rule], side: Side, vault: Vault, report: Report) -> tuple[Look | None, Look | None]:
        """What changes or blocks the text of a side, and what only looks at it. Originals that the vault has are put back in
        output."""
        mine = [rule for rule in rules if rule.detectors and (rule.input if side == "input" else rule.output)]
        holds = [rule for rule in mine if rule.action != "flag" and (rule.holds or side == "input")]
        # Rules that block before those that change: where both find the same, it is blocked.
        ordered = [*(rule for rule in holds if rule.action == "block"), *(rule for rule in holds if rule.action != "block")]
        watched = [one for rule in ordered for one in self._watched(rule, side)]
        if side == "output" and vault.originals:
            watched.append(Watched(OWN, None, "redact"))
        others = [one for rule in mine if rule not in holds for one in self._watched(rule, side)]
        return self._look(watched, side, vault, report), self._look(others, side, vault, report)

    def _watched(self, rule: Rule, side: Side) -> list[Watched]:
        """A rule's detectors. What is told at the end of output blocks nothing. What is redacted on the way out is never put
        back, and of the input only what the operator lets be, or what is redacted because the request itself asks for it."""
        action = "flag" if side == "output" and rule.mode == "after" and rule.action == "block" else rule.action
        back = side == "input" and (self._restore or rule.id == PLUGIN)
        return [Watched(detector, rule.id, action, back) for detector in rule.detectors]

    def _look(self, watched: list[Watched], side: Side, vault: Vault, report: Report) -> Look | None:
        if not watched:
            return None
        key = tuple(one.detector for one in watched)
        if (scanner := self._scanners.get(key)) is None:
            if len(self._scanners) >= MOST_KEPT:
                self._scanners.clear()
            scanner = self._scanners[key] = Scanner(key, self._re2)
        return Look(side, scanner, watched, self._allowed, vault, report)


def _moderations(rule: Rule) -> dict[str, Rule]:
    """orq's ids, asked where the operator's own rule asks."""
    assert rule.outside is not None
    found: dict[str, Rule] = {}
    for name, (categories, without) in MODERATED.items():
        outside = replace(rule.outside, categories=categories, without=without)
        found[name] = replace(rule, id=name, action="block", input=True, output=True, always=False, outside=outside)
    return found


def _entries(plugins: Field) -> list[Field]:
    # Other shapes are the provider's business, as all plugins but this one are.
    return list(plugins.items(1024)) if isinstance(plugins.value, list) else []


def _redacts(entry: Field) -> bool:
    return isinstance(entry.value, dict) and entry.value.get("id") == PLUGIN
