"""Cases about time: who waits for whom, and what the gateway adds.

Strategy: provider and checker share one process and one clock, so that a chunk's way is a difference of two readings, and the
provider can wait for the checker to have seen a chunk before it sends the next (lock step): a gateway that holds chunks back
stops that conversation, however fast the machine is.
The one rule: only what cannot depend on the machine's speed is judged; times are reported.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Iterator, Sequence

from proxy.conformance.calls import TOOL_STOP
from proxy.conformance.content import STOP, same
from proxy.conformance.framing import over
from proxy.conformance.provider import Answer, Line
from proxy.conformance.said import DONE, ROLE, Json, chunk, event, events, heard, text, tool
from proxy.conformance.trial import Case, Trial, Variant
from proxy.conformance.verdict import Result, Severity, Verdict, how

PATIENCE = 2.0  # seconds within which a chunk must have come through, before it counts as held back
STEPS = 100
OPENINGS = 40


class LockStep:
    """A stream whose provider waits for each chunk to be seen. sent, seen: times per chunk; held: the first that did not come
    through while the provider waited."""

    def __init__(self, chunks: Sequence[Json], last: Json) -> None:
        self._written, self._last = events(chunks), event(last)
        self.sent = [0.0] * len(chunks)
        self.seen = [0.0] * len(chunks)
        self.held: int | None = None
        self._arrivals = [asyncio.Event() for _ in chunks]

    async def answer(self, line: Line) -> None:
        await line.open()
        await line.chunk(event(chunk(ROLE)))
        for number, written in enumerate(self._written):
            self.sent[number] = time.perf_counter()
            await line.chunk(written)
            if self.held is None and not await within(PATIENCE, self._arrivals[number].wait()):
                self.held = number
        await line.chunk(self._last + DONE)
        await line.end()

    def note(self, number: int, at: float) -> None:
        """Chunk `number` is seen, and so is every one before it."""
        for passed in range(number, -1, -1):
            if self.seen[passed]:
                break
            self.seen[passed] = at
            self._arrivals[passed].set()


async def within(seconds: float, waited: Awaitable[object]) -> bool:
    """Did it come about in time?"""
    try:
        async with asyncio.timeout(seconds):
            await waited
    except TimeoutError:
        return False
    return True


async def _step(trial: Trial, steps: LockStep, direct: bool = False) -> str | None:
    """Hold one such conversation; what is wrong with it in words."""
    conversation, _ = await trial.open(steps.answer, direct)
    got, count = heard(()), 0
    async with asyncio.timeout(trial.setting.gateway.limit):
        async for one in conversation:
            got.add(one.text, one.name)
            choice = got.choice()
            marks = choice.text.count("·") + sum(call.arguments.count("·") for call in choice.tools.values())
            if marks > count:
                count = marks
                steps.note(marks - 1, one.at)
    await conversation.leave()
    if steps.held is not None:
        return f"chunk {steps.held} was held back until the provider sent more"
    if count != len(steps.seen) or got.done != 1:
        return f"{count} of {len(steps.seen)} chunks; {how(conversation.received)}"
    return None


def _texts(count: int) -> LockStep:
    return LockStep(text(*(f"{number}·" for number in range(count))), STOP)


async def lock_step(trial: Trial) -> Verdict:
    problem = await _step(trial, _texts(STEPS))
    return Verdict(Result.FAIL, problem) if problem else Verdict(Result.PASS, f"{STEPS} chunks, one at a time")


async def lock_step_tools(trial: Trial) -> Verdict:
    pieces = [tool(0, '{"a": "·', "call_a", "f"), *(tool(0, "·") for _ in range(20)), tool(0, '·"}')]
    problem = await _step(trial, LockStep(pieces, TOOL_STOP))
    return Verdict(Result.FAIL, problem) if problem else Verdict(Result.PASS, f"{len(pieces)} pieces, one at a time")


def quantiles(figures: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    return statistics.median(figures), statistics.quantiles(figures, n=100, method="inclusive")[98]


def _added(through: Sequence[float], direct: Sequence[float]) -> Verdict:
    """What the way through the gateway takes more than the direct one. Both in seconds, told in milliseconds."""
    (p50, p99), (own50, own99) = quantiles(through), quantiles(direct)
    added = {"p50_ms": (p50 - own50) * 1e3, "p99_ms": (p99 - own99) * 1e3}
    figures = {**{name: round(value, 3) for name, value in added.items()}, "direct_p50_ms": round(own50 * 1e3, 3)}
    return Verdict(Result.MEASURED, f"p50 {added['p50_ms']:.2f} ms, p99 {added['p99_ms']:.2f} ms over direct", figures)


async def latency_chunk(trial: Trial) -> Verdict:
    """From the provider's write to the checker's read, through the gateway and direct, in turn."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for direct in (False, True) * 3:
        steps = _texts(STEPS)
        if problem := await _step(trial, steps, direct):
            return Verdict(Result.NOT_JUDGED, problem)
        found[direct] += [seen - sent for sent, seen in zip(steps.sent, steps.seen, strict=True)]
    return _added(found[False], found[True])


async def latency_first(trial: Trial) -> Verdict:
    """From the request to the first text, where the provider answers at once."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * OPENINGS):
        direct = bool(number % 2)
        conversation, _ = await trial.open(_at_once, direct)
        received = await conversation.finish(trial.setting.gateway.limit)
        first = next((one.at for one in received.events if '"x"' in one.text), None)
        if first is None:
            return Verdict(Result.NOT_JUDGED, how(received))
        found[direct].append(first - received.sent_at)
    return _added(found[False], found[True])


async def _at_once(line: Line) -> None:
    await line.open()
    await line.chunk(b"".join(events([chunk(ROLE), *text("x"), STOP])) + DONE)
    await line.end()


def _side_by_side() -> Iterator[Variant]:
    for number in range(50):
        words = [f"stream {number} word {word}; " for word in range(20)]
        told = [chunk(ROLE), *text(*words), STOP]
        plain = same(told, f"stream {number}")
        yield Variant(plain.label, _paced(events(told)), plain.judge)


def _paced(written: Sequence[bytes]) -> Answer:
    async def answer(line: Line) -> None:
        await line.open()
        for one in written:
            await line.chunk(one)
            await asyncio.sleep(0.01)
        await line.chunk(DONE)
        await line.end()

    return answer


async def slow_reader(trial: Trial) -> Verdict:
    """The client takes nothing; how much does the gateway take from the provider meanwhile?"""
    written, stopped = 0, asyncio.Event()

    async def answer(line: Line) -> None:
        nonlocal written
        await line.open()
        try:
            # Each event differs: some gateways take a stream that repeats itself for a model gone astray, and end it.
            while written < FLOOD and await within(PATIENCE, line.chunk(event(text(f"{written} {'x' * LONG}")[0]))):
                written += LONG
        finally:  # also where the gateway hangs up
            stopped.set()
        await line.silence()

    conversation, _ = await trial.open(answer)
    in_time = await within(trial.setting.gateway.limit, stopped.wait())
    await conversation.leave()
    if not in_time:
        return Verdict(Result.NOT_JUDGED, "neither stopped nor taken within --timeout")
    megabytes = written / 2**20
    if written >= FLOOD:
        return Verdict(Result.FAIL, f"took all {megabytes:.0f} MiB from the provider for a client that reads none")
    return Verdict(Result.PASS, f"stopped the provider after {megabytes:.1f} MiB", {"mib": round(megabytes, 1)})


FLOOD, LONG = 64 * 2**20, 2**16  # bytes in all, and per event
LEAK, COST, LOSS = Severity.LEAK, Severity.COST, Severity.LOSS
CASES = (
    Case("concurrent", "50 streams at once do not mix", LEAK, "one client would read another's answer", over(_side_by_side, 50)),
    Case("lock-step", "each chunk reaches the client before the provider sends the next", COST,
         "a gateway that buffers is no streaming gateway", lock_step, alone=True),
    Case("lock-step-tools", "so does each piece of a tool call's arguments", COST, "long arguments are shown as they come",
         lock_step_tools, alone=True),
    Case("slow-reader", "a client that reads nothing stops the provider, not the gateway's memory", LEAK,
         "one stalled phone must not fill a server", slow_reader, alone=True),
    Case("latency-chunk", "added time per chunk", COST, "measured, not judged", latency_chunk, alone=True),
    Case("latency-first", "added time to the first text", COST, "measured, not judged", latency_first, alone=True),
)  # fmt: skip
