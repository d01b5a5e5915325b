"""The way in: what becomes of a request before anybody is asked.

Strategy: first its length, then patterns, text by text, then others who are asked, all texts in one question. Each step sees what
the one before has left.
The one rule: a request that is blocked is a 400 with the path of the text, and no upstream has heard of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from middleware.guardrails.asked import rewritten
from middleware.guardrails.edits import PLACEHOLDER, Look, Vault
from middleware.guardrails.options import Rule
from middleware.guardrails.outside import Asker, Said
from middleware.guardrails.policy import Policy
from middleware.guardrails.rules.reading import plain
from middleware.guardrails.verdict import Action, ContentFiltered, Finding
from proxy.call import Call, altered
from proxy.estimate import estimated_input

Report = Callable[[Finding], None]


@dataclass(slots=True)
class Passing:
    """One request on its way: what holds for it, what was found, and what its placeholders stand for."""

    rules: tuple[Rule, ...]
    vault: Vault
    found: list[Finding]


async def let_in(call: Call, passing: Passing, policy: Policy, asker: Asker | None, report: Report) -> Call:
    """The call with its texts as the rules want them. Raises ContentFiltered."""
    if not any(rule.input for rule in passing.rules):
        return call
    _measure(call, passing.rules, report)
    passing.vault = Vault(_placeholders(call))
    hold, watch = policy.looks(passing.rules, "input", passing.vault, report)
    if hold is not None or watch is not None:
        call = _changed(call, partial(_visited, hold, watch, passing.found))
    for rule in passing.rules:
        if rule.outside is not None and rule.input:
            assert asker is not None
            call = await _asked_about(call, rule, asker, report)
    return call


def _changed(call: Call, visit: Callable[[str, str, bool], str]) -> Call:
    request = rewritten(call.request, visit)
    return call if request is call.request else altered(call, request=request)


def _measure(call: Call, rules: Sequence[Rule], report: Report) -> None:
    for rule in rules:
        if rule.longest is None:
            continue
        characters, tokens = rule.longest
        long = characters is not None and sum(map(len, _texts(call).values())) > characters
        if long or (tokens is not None and estimated_input(call.request) > tokens):
            finding = Finding(rule.id, rule.action, "input")
            report(finding)
            if rule.action == "block":
                raise ContentFiltered(finding, PLACES[call.kind])


PLACES = {"chat": "messages", "completions": "prompt", "embeddings": "input"}


async def _asked_about(call: Call, rule: Rule, asker: Asker, report: Report) -> Call:
    """Ask somebody about all texts of the request."""
    texts = {path: text for path, text in _texts(call).items() if text}
    if not texts:
        return call
    answers = dict(zip(texts, await asker.ask(rule, list(texts.values()), "input", call.id), strict=True))
    for path, answer in answers.items():
        if answer.caught:
            finding = Finding(rule.id, _action(rule, answer), "input")
            report(finding)
            if finding.action == "block":
                raise ContentFiltered(finding, path)

    def instead(path: str, text: str, json: bool) -> str:
        answer = answers.get(path)
        redacts = answer is not None and answer.caught and _action(rule, answer) == "redact"
        return answer.text if answer is not None and redacts and answer.text is not None else text

    return _changed(call, instead)


def _action(rule: Rule, answer: Said) -> Action:
    """What becomes of a text that somebody else has caught."""
    if rule.action == "flag":
        return "flag"
    return "redact" if answer.text is not None else "block"


def _visited(hold: Look | None, watch: Look | None, found: list[Finding], path: str, text: str, json: bool) -> str:
    """One text of a request."""
    if watch is not None:
        watch.settled(text, json=json)
    if hold is None or (settled := hold.settled(text, json=json)) is text:
        return text
    if settled is None:
        raise ContentFiltered(found[-1], path)
    return settled


def _texts(call: Call) -> dict[str, str]:
    """All texts of a request by their paths."""
    found: dict[str, str] = {}
    rewritten(call.request, lambda path, text, json: found.setdefault(path, text))
    return found


def _placeholders(call: Call) -> set[str]:
    """What looks like a placeholder of ours, in whatever spelling, and is the client's own."""
    return {name for text in _texts(call).values() for name in PLACEHOLDER.findall(plain(text).text)}
