"""One run: which cases, in what order, against which gateway.

Strategy: first one plain stream, so that a gateway that is not there or not pointed at the provider is said once and not sixty
times; then everything that can run side by side; then, one after another, what must not be disturbed.
The one rule: a case that fails to run is a failed case, never a failed run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from proxy.conformance import broken, calls, content, flow, framing, leaving
from proxy.conformance.content import STOP, said
from proxy.conformance.said import ROLE, chunk, heard, text
from proxy.conformance.trial import Case, Setting, Trial
from proxy.conformance.verdict import Result, Verdict, intact

CASES: tuple[Case, ...] = (
    *framing.CASES, *content.CASES, *calls.CASES, *broken.CASES, *flow.CASES, *leaving.CASES,
)  # fmt: skip


class Unreachable(Exception):
    """No plain stream comes through: in words, why."""


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[Case]:
    """The cases whose id matches a glob of `only` (all where it is empty) and none of `skip`."""
    wanted = [case for case in CASES if not only or any(fnmatchcase(case.id, glob) for glob in only)]
    return [case for case in wanted if not any(fnmatchcase(case.id, glob) for glob in skip)]


async def run(cases: Sequence[Case], setting: Setting, say: Callable[[str], None]) -> list[tuple[Case, Verdict]]:
    """Every case's verdict, in the order of `cases`. say: told of what goes on. Raises Unreachable."""
    await _ready(setting)
    say(f"{sum(not case.alone for case in cases)} cases side by side, then {sum(case.alone for case in cases)} alone")
    found: dict[str, Verdict] = {}

    async def judge(case: Case) -> None:
        found[case.id] = await _judged(case, setting)
        say(f"{case.id}: {found[case.id].result}")

    async with asyncio.TaskGroup() as group:
        for case in cases:
            if not case.alone:
                group.create_task(judge(case))
    for case in cases:
        if case.alone:
            await judge(case)
    return [(case, found[case.id]) for case in cases]


async def _judged(case: Case, setting: Setting) -> Verdict:
    try:
        return await case.run(Trial(case.id, setting))
    except Exception as error:
        return Verdict(Result.FAIL, f"broke off: {type(error).__name__} {error}".rstrip())


async def _ready(setting: Setting) -> None:
    """The gateway may start after us: some look for their provider first. Raises Unreachable after `setting.wait` seconds."""
    deadline = time.monotonic() + setting.wait
    while True:
        try:
            return await _greet(setting)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.5)


async def _greet(setting: Setting) -> None:
    """A plain stream must come through. Raises Unreachable."""
    plain = [chunk(ROLE), *text("Hello"), STOP]
    received, exchange = await Trial("hello", setting).ask(said(plain))
    if not exchange.attempts:
        faults = "; ".join(received.faults)
        answered = f"it answers {received.status}: {received.body[:200].decode(errors='replace')}" if received.status else faults
        raise Unreachable(f"the provider was not asked through {setting.gateway.url}; {answered}")
    problem = intact(heard(plain))(received)
    if problem and (received.end == "open" or received.status != 200):
        raise Unreachable(f"a plain stream does not come through {setting.gateway.url}: {problem}")
