"""A case, and what it has to work with: the gateway, the provider, and a name for every request of its own.

Strategy: a case is a coroutine over a `Trial`. Most only list variants (what the provider does, how the answer is judged) and
let `each` run them, some at once; the others hold the conversation themselves.
The one rule: every request has a token of its own, so that no cache, breaker or retry of a gateway mixes two of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.conformance.client import Conversation, Endpoint, Received
from proxy.conformance.provider import Answer, Exchange, Provider
from proxy.conformance.verdict import Judge, NotJudged, Result, Severity, Verdict, how

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One claim about a gateway. why: what it costs the client when the claim does not hold. alone: measured, so nothing else
    runs beside it."""

    id: str
    claim: str
    severity: Severity
    why: str
    run: Callable[[Trial], Awaitable[Verdict]]
    alone: bool = False


@dataclass(frozen=True)
class Variant:
    """One request of a case. label: what is particular about it; fields: further fields of the request."""

    label: str
    answer: Answer
    judge: Judge
    fields: Json = field(default_factory=dict)
    limit: float | None = None


@dataclass(frozen=True)
class Setting:
    """One run: the gateway, the provider, and how they are asked. model: a template with {model}. body: fields of every request.

    stall_limit, cancel_limit, wait: seconds to wait for the gateway's own timeout, for it to hang up on the provider, and for it
    to be there at all.
    nonce: differs from run to run, because gateways cache.
    """

    gateway: Endpoint
    provider: Provider
    nonce: str
    model: str = "openai/{model}"
    body: Json = field(default_factory=dict)
    stall_limit: float = 10.0
    cancel_limit: float = 5.0
    wait: float = 0.0
    at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(64))


class Trial:
    """One case at work."""

    def __init__(self, case_id: str, setting: Setting) -> None:
        self.setting = setting
        self._case_id = case_id
        self._count = 0

    @property
    def direct(self) -> Endpoint:
        """The provider itself, for comparison."""
        return Endpoint(self.setting.provider.url)

    def expect(self, answer: Answer, direct: bool = False, **fields: Any) -> tuple[Json, Exchange, str]:
        """Register a script; returns the request that will get it, the exchange, and its token."""
        self._count += 1
        token = f"conf-{self._case_id}-{self._count}-{self.setting.nonce}"
        exchange = self.setting.provider.exchanges[token] = Exchange(answer)
        model = token if direct else self.setting.model.replace("{model}", token)
        body = {"model": model, "messages": [{"role": "user", "content": token}], "stream": True}
        return {**body, **({} if direct else self.setting.body), **fields}, exchange, token

    async def open(self, answer: Answer, direct: bool = False, **fields: Any) -> tuple[Conversation, Exchange]:
        """Ask, and leave the answer to be read. Raises OSError."""
        body, exchange, _ = self.expect(answer, direct, **fields)
        return await (self.direct if direct else self.setting.gateway).open(body), exchange

    async def ask(self, answer: Answer, limit: float | None = None, **fields: Any) -> tuple[Received, Exchange]:
        """Ask, and read all."""
        body, exchange, token = self.expect(answer, **fields)
        async with self.setting.at_once:
            received = await self.setting.gateway.ask(body, limit)
        del self.setting.provider.exchanges[token]
        return received, exchange

    async def each(self, variants: Iterable[Variant], at_once: int = 24) -> Verdict:
        """Run all variants, `at_once` of them side by side; the verdict over all."""
        waiting = iter(variants)
        outcomes: list[tuple[str, str | None, str]] = []
        excuses: list[str] = []

        async def work() -> None:
            for variant in waiting:
                received, exchange = await self.ask(variant.answer, variant.limit, **variant.fields)
                try:
                    problem = variant.judge(received)
                except NotJudged as excuse:
                    excuses.append(f"{variant.label}: {excuse}" if variant.label else str(excuse))
                    continue
                if not exchange.attempts:
                    problem = f"the provider was not asked; the gateway says: {how(received)} {received.body[:80]!r}"
                outcomes.append((variant.label, problem, how(received)))

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        return _verdict(outcomes, excuses)


def _verdict(outcomes: Sequence[tuple[str, str | None, str]], excuses: Sequence[str]) -> Verdict:
    wrong = [(label, problem) for label, problem, _ in outcomes if problem]
    told = Counter(way for _, _, way in outcomes)
    figures = {"requests": len(outcomes), "failed": len(wrong), "told_by": dict(told)}
    if wrong:
        label, problem = wrong[0]
        share = f"{len(wrong)} of {len(outcomes)}: " if len(outcomes) > 1 else ""
        return Verdict(Result.FAIL, f"{share}{label}: {problem}" if label else f"{share}{problem}", figures)
    if excuses and not outcomes:
        return Verdict(Result.NOT_JUDGED, excuses[0], figures)
    return Verdict(Result.PASS, ", ".join(f"{way} ×{count}" if count > 1 else way for way, count in told.most_common()), figures)
