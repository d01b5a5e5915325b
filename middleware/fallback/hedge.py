"""Hedging: a second target is asked when the first is late; the first real chunk wins.

Strategy: `race` runs one lane (a way through the targets), and a second one when the first is due and the budget allows. A lane
that fails waits for the other; only a reply, which has its first real chunk in hand, can win.
The one rule: whatever happens, a lane that is not returned is cancelled, awaited, and its reply closed.

"The Tail at Scale", https://research.google/pubs/the-tail-at-scale/
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from proxy.errors import Outcome
from proxy.reply import Reply
from proxy.units import seconds

Lane = Callable[[], Coroutine[Any, Any, Reply]]
# Hedges that may be saved up in quiet times and spent in a burst.
SAVED = 10.0


@dataclass(frozen=True)
class Hedge:
    """after: `p95`, the target's own, or a fixed delay (`2s`). max_extra: hedges per request at most (`10%`, or 0.1)."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    after: str | float = "p95"
    max_extra: str | float = "10%"

    def __post_init__(self) -> None:
        if self.delay is not None and not 0.001 <= self.delay <= 3600:
            raise ValueError("after must be p95 or from 1ms to 1h")
        if not 0 < self.share <= 1:
            raise ValueError("max_extra must be above 0 % and at most 100 %")

    @property
    def delay(self) -> float | None:
        """Seconds; None for the target's p95. Raises ValueError."""
        return None if self.after == "p95" else seconds(self.after)

    @property
    def share(self) -> float:
        """From 0 to 1. Raises ValueError."""
        if isinstance(self.max_extra, str):
            match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?) ?%", self.max_extra.strip(), re.ASCII)
            if match is None:
                raise ValueError("max_extra must be a share such as 10%")
            return float(match[1]) / 100
        return float(self.max_extra)


class Budget:
    """At most `share` extra requests, counted over all: each request earns a share of a hedge."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._saved = 0.0

    def earn(self) -> None:
        self._saved = min(SAVED, self._saved + self._share)

    def spend(self) -> bool:
        """May there be one more? If so it is paid for."""
        if self._saved < 1 - 1e-9:  # ten tenths are not quite one
            return False
        self._saved -= 1
        return True


async def race(lane: Lane, due: Callable[[], float | None], may_hedge: Callable[[], bool]) -> tuple[Reply, str]:
    """(the reply, which lane won: `first`, `second`, or "" where there was no hedge).

    due: seconds until the first lane is late, asked again when they have passed; None: never. may_hedge: asked once, then.
    Raises what the last lane to fail raised.
    """
    tasks = [asyncio.create_task(lane())]
    why: tuple[Any, ...] = (Outcome.CANCELLED,)
    winner = None
    try:
        await _late(tasks[0], due)
        if not tasks[0].done() and may_hedge():
            tasks.append(asyncio.create_task(lane()))
        winner = await _first_reply(tasks)
        return winner.result(), ("first", "second")[tasks.index(winner)] if len(tasks) > 1 else ""
    except asyncio.CancelledError as error:
        why = error.args
        raise
    finally:
        try:
            await _abandon([task for task in tasks if task is not winner], why)
        except asyncio.CancelledError:
            if winner is not None:
                _release(winner)
            raise


async def _late(task: asyncio.Task[Reply], due: Callable[[], float | None]) -> None:
    """Returns when the lane has ended, or is late."""
    while not task.done():
        left = due()
        if left is not None and left <= 0:
            return
        await asyncio.wait([task], timeout=left)


async def _first_reply(tasks: list[asyncio.Task[Reply]]) -> asyncio.Task[Reply]:
    pending = set(tasks)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done and not task.cancelled() and task.exception() is None:
                return task
        if not pending:
            done.pop().result()  # raises


async def _abandon(tasks: list[asyncio.Task[Reply]], why: tuple[Any, ...]) -> None:
    if not tasks:
        return
    for task in tasks:
        task.cancel(*why)
        # Also if this very coroutine is cancelled below: no reply stays open.
        task.add_done_callback(_release)
    for found in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(found, Reply):
            await found.close()


def _release(task: asyncio.Task[Reply]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().trailer.end(Outcome.CANCELLED)
