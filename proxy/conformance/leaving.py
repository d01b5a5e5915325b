"""Cases about clients that leave: whatever the gateway was waiting for, it hangs up on the provider.

The one rule: judged is whether it does so at all within a few seconds; how long it took is reported.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

from proxy.conformance.flow import within
from proxy.conformance.provider import Answer, Exchange, Line
from proxy.conformance.said import ROLE, chunk, event, events, text
from proxy.conformance.trial import Case, Trial
from proxy.conformance.verdict import Result, Severity, Verdict

ROUNDS = 5  # times that each way of leaving is tried


async def _says_nothing(line: Line) -> None:
    await line.silence()


async def _opens(line: Line) -> None:
    await line.open()
    await line.silence()


async def _falls_silent(line: Line) -> None:
    await line.open()
    await line.chunk(*events([chunk(ROLE), *text("x")]))
    await line.silence()


async def _talks_on(line: Line) -> None:
    await line.open()
    await line.chunk(event(chunk(ROLE)))
    while True:
        await line.chunk(*events(text("x")))
        await asyncio.sleep(0.02)


def leaving(
    answer: Answer, *, after_text: bool = False, reset: bool = False, stream: bool = True
) -> Callable[[Trial], Awaitable[Verdict]]:
    """The client leaves; the provider must see the gateway hang up."""

    async def run(trial: Trial) -> Verdict:
        took = []
        for _ in range(ROUNDS):
            found = await _leave(trial, answer, after_text, reset, stream)
            if isinstance(found, str):
                return Verdict(Result.FAIL, found)
            took.append(found * 1e3)
        figures = {"median_ms": round(statistics.median(took), 2), "max_ms": round(max(took), 2)}
        return Verdict(Result.PASS, f"after {figures['median_ms']:.1f} ms (at most {figures['max_ms']:.1f})", figures)

    return run


async def _leave(trial: Trial, answer: Answer, after_text: bool, reset: bool, stream: bool) -> float | str:
    """Seconds between the client's leaving and the gateway's, or what went wrong."""
    conversation, exchange = await trial.open(answer, stream=stream)
    if not await within(trial.setting.cancel_limit, exchange.arrived.wait()):
        await conversation.leave()
        return "the provider was never asked"
    if after_text and not await within(trial.setting.cancel_limit, anext(aiter(conversation))):
        await conversation.leave()
        return "no first chunk while the provider waited"
    left = time.perf_counter()
    await conversation.leave(reset)
    return await _gone(exchange, left, trial.setting.cancel_limit)


async def _gone(exchange: Exchange, left: float, limit: float) -> float | str:
    if not await within(limit, exchange.gone.wait()):
        return f"the provider's connection was still open {limit:g} s after the client had left"
    return exchange.gone_at - left


COST = Severity.COST
PAID = "what nobody reads is generated on, and paid for"
CASES = (
    Case("cancel-talking", "the client leaves in mid-stream: the provider is hung up on", COST, PAID,
         leaving(_talks_on, after_text=True), alone=True),
    Case("cancel-silent", "the same while the provider is silent", COST, PAID,
         leaving(_falls_silent, after_text=True), alone=True),
    Case("cancel-reset", "the same when the client resets the connection", COST, PAID,
         leaving(_falls_silent, after_text=True, reset=True), alone=True),
    Case("cancel-first", "the client leaves before the first chunk: the provider is hung up on", COST, PAID, leaving(_opens),
         alone=True),
    Case("cancel-head", "the same before the provider has answered at all", COST, PAID, leaving(_says_nothing), alone=True),
    Case("cancel-whole", "the same where no stream was asked for", COST, PAID, leaving(_says_nothing, stream=False), alone=True),
)  # fmt: skip
