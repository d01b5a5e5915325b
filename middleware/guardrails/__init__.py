"""Guardrails: what may not go to a provider, and what may not come from a model, on a running stream as well.

Strategy: rules look at the text of the request before anything is asked (`asked`), and at the reply's as it passes (`flow`): what
could still become a match is held back, everything else goes on at once. What is redacted gets a placeholder, the same for the
same value; the reply may have the originals back.
Its place: below memory and retrieval, so that what they add is looked at, too; above the cache, so that its key has placeholders
instead of names, and what comes out of it is looked at like any reply.
Cost: nothing for requests without rules. With them see docs/guardrails.md.
The one rule: under `hold_back` no part of a match is ever sent; and nothing that was found is in a log, a metric or an error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any

from middleware.guardrails.edits import Vault
from middleware.guardrails.flow import Guarded
from middleware.guardrails.incoming import Passing, let_in
from middleware.guardrails.options import Kind, Rule, RuleOptions, rule
from middleware.guardrails.outside import Asker
from middleware.guardrails.policy import PLUGIN, Asked, Policy
from middleware.guardrails.rounds import Gate
from middleware.guardrails.rules.engine import installed
from middleware.guardrails.rules.words import Allowed
from middleware.guardrails.screen import Screen
from middleware.guardrails.verdict import Finding, header
from proxy.call import Call, altered
from proxy.errors import GatewayError, Outcome, why_cancelled
from proxy.fold import unfolded
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.reply import Reply, Try
from proxy.units import Between

HEADER = "X-Penstock-Guardrails"


class Guardrails:
    """Looks at what goes in and what comes out.

    rules: names of built-in ones, or objects; docs/guardrails.md has them all. restore: what was redacted on the way in is put
    back on the way out. at_once: questions to moderations and webhooks that may be open.
    """

    FIELDS = ("guardrails",)

    def __init__(
        self,
        *,
        rules: Sequence[Kind | RuleOptions],
        restore: bool = False,
        at_once: Annotated[int, Between(1, 10_000)] = 64,
    ) -> None:
        options = [RuleOptions(written) if isinstance(written, str) else written for written in rules]
        allowed = [word for one in options if one.kind == "allow" for word in one.words or ()]
        re2 = installed()
        made = [rule(one, re2) for one in options if one.kind != "allow"]
        if any(one.kind == "allow" and not one.words for one in options):
            raise ValueError("rule 'allow': needs words")
        ids = Counter(one.id for one in made)
        if twice := [name for name, count in ids.items() if count > 1]:
            raise ValueError(f"two rules are called '{twice[0]}'; give each an id")
        self._policy = Policy(made, Allowed(allowed), restore, re2)
        self._rules = made
        self._at_once = at_once
        self._asker: Asker | None = None
        self._counts: Counter[Finding] = Counter()

    def attach(self, surroundings: Surroundings) -> None:
        if self._asker is None:
            self._asker = Asker(surroundings.share(self._at_once))
        self._asker.attach(surroundings.transport, surroundings.route, self._rules)

    def adopt(self, previous: Guardrails) -> None:
        self._counts = previous._counts
        if self._asker is not None and previous._asker is not None:
            self._asker.figures = previous._asker.figures

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `guardrails` and `plugins`. Raises Refused with the path."""
        asked = self._policy.read(own)
        if asked is None:
            return call
        request = call.request
        if isinstance(plugins := request.get("plugins"), list) and asked.plugin:
            # The other plugins are the provider's.
            kept = [entry for entry in plugins if not isinstance(entry, dict) or entry.get("id") != PLUGIN]
            request = {name: value for name, value in request.items() if name != "plugins"} | ({"plugins": kept} if kept else {})
        return altered(call, request=request, extensions={**call.extensions, Asked: asked})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        asked = call.extension(Asked)
        rules = self._policy.rules(asked)
        if not rules:
            return await next(call)
        passing = Passing(rules, Vault(), [])
        report = partial(self._report, passing.found)
        call = await let_in(call, passing, self._policy, self._asker, report)
        try:
            reply = await next(call)
        except GatewayError as error:
            raise Screen(self._policy.looks(rules, "output", passing.vault, report)[0], None).fault(error) from None
        if reply.head.status != 200:
            return reply
        if passing.found:
            reply = reply.with_header(HEADER, header(passing.found))
        return reply if call.kind == "embeddings" else await self._let_out(call, reply, passing)

    # Out

    async def _let_out(self, call: Call, reply: Reply, passing: Passing) -> Reply:
        report = partial(self._report, passing.found)
        hold, watch = self._policy.looks(passing.rules, "output", passing.vault, report)
        outside = [one for one in passing.rules if one.outside is not None and one.output]
        if hold is None and watch is None and not outside:
            return reply
        if reply.whole:
            reply = altered(reply, chunks=unfolded(reply), whole=False)
        gates: list[Gate] = []

        def told(key: Any, text: str) -> None:
            for gate in gates:
                gate.hears(key, text)

        guarded = Guarded(call, reply, Screen(hold, watch, told if outside else None), passing.found)
        gates += self._gates(call, outside, report, guarded)
        guarded.gated(gates, next((gate for gate in gates if gate.holds), None))
        try:
            await guarded.start()
        except BaseException as error:
            await guarded.aclose()
            await reply.close(_why(error))
            if isinstance(error, GatewayError) and reply.head.cache not in ("hit", "joined"):
                # What was asked further in had its head already: nobody else knows of it any more.
                tried = Try(reply.head.target, error.code, reply.head.upstream_seconds)
                error.tries = error.tries or (*reply.head.tries, tried)
            raise
        return altered(reply, chunks=guarded)

    def _gates(self, call: Call, outside: Sequence[Rule], report: Any, guarded: Guarded) -> list[Gate]:
        """One gate for all that hold, one for each that looks beside the stream."""
        if (asker := self._asker) is None or not outside:
            return []

        async def ask(one: Rule, texts: Sequence[str]) -> Any:
            return await asker.ask(one, texts, "output", call.id)

        held = [one for one in outside if one.holds]
        made: list[tuple[list[Rule], float]] = [(held, min(_window(one) for one in held))] if held else []
        made += [([one], _window(one)) for one in outside if not one.holds]
        return [
            Gate(rules, holds=rules is held, window=window, ask=ask, report=report, gone=guarded.gone) for rules, window in made
        ]

    def _report(self, found: list[Finding], finding: Finding) -> None:
        found.append(finding)
        self._counts[finding] += 1

    def samples(self) -> Iterable[Sample]:
        words = "Matches and verdicts of guardrails, by rule, by what was done, and by side."
        for finding, count in sorted(self._counts.items()):
            labels = {"rule": finding.id, "action": finding.action, "on": finding.on}
            yield Sample("penstock_guardrails_total", "counter", words, count, labels)
        for name, figures in sorted(self._asker.figures.items() if self._asker else ()):
            for result, count in sorted(figures.count.items()):
                labels = {"rule": name, "result": result}
                yield Sample("penstock_guardrails_asked_total", "counter", "Questions to others, by result.", count, labels)
            words = "Seconds that questions to others took, in all."
            yield Sample("penstock_guardrails_asked_seconds_total", "counter", words, figures.seconds, {"rule": name})


def _why(error: BaseException) -> Outcome:
    if isinstance(error, GatewayError):
        return error.outcome
    return why_cancelled(error) if isinstance(error, asyncio.CancelledError) else Outcome.GATEWAY_ERROR


def _window(one: Rule) -> float:
    """Told at the end, it is asked once, at the end."""
    assert one.outside is not None
    return float("inf") if one.mode == "after" else one.outside.window


__all__ = ["Guardrails"]
