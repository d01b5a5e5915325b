"""The run: a warm-up that counts as the start, the storm, a rest, and a drain with streams open.

Strategy: provider and clients live in this process, the gateway in one of its own. In the storm the config is reloaded and a
provider is out for a while. At rest, when nothing is going on any more or `REST` is over, the gateway is asked for its state.
The one rule: what is waited for is bounded, and what is not there by then is for the invariants to find.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chaos.clients import Clients, listen
from chaos.features import config, features
from chaos.gateway import Gateway, running
from chaos.line import Line
from chaos.plan import Plan, Visit
from chaos.provider import Provider
from chaos.records import Evidence, Heard, Json, State

WARM = 0.4  # of the time
REST = 20.0
DRAINED = 12  # streams that are open at SIGTERM
BROKEN = "middleware: [nothing]\n"
FILE = (
    b'--of-chaos\r\nContent-Disposition: form-data; name="file"; filename="chaos.md"\r\n\r\n'
    b"# What is asked in chaos\n\nIts own questions, questions of a crowd, and huge ones.\n\r\n--of-chaos--\r\n"
)
# Steps of the storm, at which part of it.
OUT, RELOAD, BACK, BROKEN_FILE, RELOAD_AGAIN = 0.2, 0.35, 0.4, 0.5, 0.7


@dataclass(frozen=True)
class Wanted:
    seed: int
    seconds: float = 60.0
    clients: int = 300


@dataclass(frozen=True)
class Found:
    """left_out: features that this gateway has not. counts: what happened, for the report."""

    evidence: Evidence
    left_out: list[str]
    counts: Counter[str]


async def run(wanted: Wanted, scratch: Path) -> Found:
    """scratch: where the gateway's config and log are written."""
    there, left_out = features()
    plan = Plan(wanted.seed, there)
    async with Provider(plan) as provider, running(config(provider.url, scratch, there), scratch) as gateway:
        clients = Clients(plan, gateway.port, "wild")
        if "retrieval" in there:
            await _upload(gateway)
        await _visited(clients, 3, 0.3)  # what is loaded late
        await _at_rest(gateway, provider)
        await _visited(clients, wanted.clients, wanted.seconds * WARM)
        if "reload" in there:
            await gateway.reload(config(provider.url, scratch, there, 999))
        before = await _at_rest(gateway, provider)
        storm = wanted.seconds * (1 - WARM)
        texts = [config(provider.url, scratch, there, idle) for idle in (1001, 1000)]
        steps = asyncio.create_task(_steps(gateway, provider, texts if "reload" in there else None, storm))
        await _visited(clients, wanted.clients, storm)
        await steps
        after = await _at_rest(gateway, provider)
        unfinished, at_rest = provider.unfinished, len(gateway.lines()[0])
        reloads = await _reloads(gateway) if "reload" in there else None
        drained = await _drained(gateway, clients)
        lines, words = gateway.lines()
        evidence = Evidence(
            lambda question: plan.question(question).text, clients.heard, provider.called, lines, at_rest, before, after,
            unfinished, reloads, drained, gateway.process.returncode, _unexpected(words), [*clients.faults, *provider.faults],
        )  # fmt: skip
    return Found(evidence, left_out, _counts(evidence, clients) + provider.seen)


async def _upload(gateway: Gateway) -> None:
    """What passages are taken from; at rest it is indexed."""
    line = await Line.open(gateway.port)
    answer = await line.ask("POST", "/v1/files", FILE, Content_Type="multipart/form-data; boundary=of-chaos")
    assert answer.status == 200, await answer.body()
    line.leave()


async def _visited(clients: Clients, count: int, seconds: float) -> None:
    """So many clients come and go for so long."""
    until = time.monotonic() + seconds
    over: Callable[[], bool] = lambda: time.monotonic() >= until  # noqa: E731
    await asyncio.gather(*(clients.visits(over) for _ in range(count)))


async def _steps(gateway: Gateway, provider: Provider, texts: Sequence[str] | None, seconds: float) -> None:
    """What happens to gateway and provider in the storm. texts: the good files; None: nothing is reloaded."""
    began = time.monotonic()

    async def at(part: float) -> None:
        await asyncio.sleep(began + part * seconds - time.monotonic())

    async def reload(part: float, text: str) -> None:
        await at(part)
        if texts is not None:
            await gateway.reload(text)

    first, second = texts or ("", "")
    await at(OUT)
    provider.outage = "a"
    await reload(RELOAD, first)
    await at(BACK)
    provider.outage = ""
    await reload(BROKEN_FILE, BROKEN)
    await reload(RELOAD_AGAIN, second)


async def _at_rest(gateway: Gateway, provider: Provider) -> State:
    """The gateway's state when all is over; the least memory of two looks."""
    limit = time.monotonic() + REST

    async def until(quiet: Callable[[], Awaitable[bool]]) -> None:
        while not await quiet() and time.monotonic() < limit:  # noqa: ASYNC110 - another process is asked
            await asyncio.sleep(0.1)

    async def nothing_runs() -> bool:
        gauges = dict((await gateway.state()).gauges)
        gauges.pop("penstock_upstream_connections", None)
        return not provider.unfinished and not any(gauges.values())

    async def nothing_stands() -> bool:
        return not any((await gateway.state()).gauges.values())

    await until(nothing_runs)
    provider.hang_up()
    await until(nothing_stands)
    await asyncio.sleep(0.3)  # lines are written within a tenth of a second
    first, second = await gateway.state(), await gateway.state()
    return replace(second, resident=min(first.resident, second.resident))


async def _reloads(gateway: Gateway) -> tuple[int, int]:
    """Generations that there should be, and are: the first, and three good files."""
    return 4, int((await gateway.verbose())["config"]["generation"])


async def _drained(gateway: Gateway, clients: Clients) -> list[Heard]:
    """SIGTERM with streams open that are far from their end; what they got."""
    ways: tuple[Json, ...] = (
        {},
        {"resume": True},
        {"on_disconnect": "finish_and_cache"},
        {"coalesce": True},
        {"on_break": "continue"},
        {"smooth": True},
        {"sessionId": "drained"},
        {"useRAG": True},
        {"plugins": [{"id": "pii_redaction"}]},
    )
    visits = [Visit(10**9 + n, "drained", f"endless-{n % len(ways)}", fields=dict(ways[n % len(ways)])) for n in range(DRAINED)]
    heard = [clients.new(visit) for visit in visits]
    lines = [await Line.open(gateway.port) for _ in visits]
    answers = [await clients.ask(*one) for one in zip(visits, heard, lines, strict=True)]
    for one, answer in zip(heard, answers, strict=True):
        await listen(one, answer, most=1)
    gateway.drain()
    try:
        async with asyncio.timeout(REST):
            await asyncio.gather(*(listen(one, answer) for one, answer in zip(heard, answers, strict=True)))
            await gateway.process.wait()
    except TimeoutError:
        clients.faults.append(f"the gateway had not ended {REST:.0f} s after SIGTERM")
    for line in lines:
        line.leave()
    return heard


def _unexpected(words: list[str]) -> list[str]:
    """What of the log nobody expects: neither the greeting nor the broken file's refusal."""
    known = ("penstock: ", "    curl ", "config not reloaded")
    return [word for word in words if word.strip() and not word.startswith(known[:2]) and known[2] not in word]


def _counts(evidence: Evidence, clients: Clients) -> Counter[str]:
    found: Counter[str] = Counter()
    found["requests"], found["calls"] = len(evidence.lines), len(evidence.called)
    found.update(f"outcome {line['outcome']}" for line in evidence.lines)
    found.update(f"x-cache {one.cache}" for one in evidence.heard if one.cache)
    found.update(f"client {name}" for name in clients.seen.elements())
    found["lines read on"] = sum(one.lines - 1 for one in evidence.heard)
    return found
