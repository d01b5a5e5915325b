"""How long conversations are kept: by age, by number of sessions per owner, by number of turns per session.

Strategy: one task sweeps the whole store from time to time; requests have no part in it. Where several workers serve, the first
one sweeps for all.
The one rule: a sweep that fails changes nothing for anybody; the next one comes as it would have.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from proxy.store import Conversations, StoreUnavailable

# Seconds between two sweeps.
EVERY = 600.0

log: Any = structlog.get_logger("penstock.memory")


@dataclass(frozen=True, slots=True)
class Bounds:
    """keep: seconds since a session's last turn. sessions: of an owner. turns: of a session. 0 is no bound."""

    keep: float
    sessions: int
    turns: int


class Retention:
    """now: Unix seconds. expired: turns that went."""

    def __init__(self, bounds: Bounds, now: Callable[[], float], sleep: Callable[[float], Awaitable[None]]) -> None:
        self.expired = 0
        self._bounds = bounds
        self._now = now
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None

    def start(self, conversations: Conversations) -> None:
        if self._bounds != Bounds(0, 0, 0):
            self._task = asyncio.get_running_loop().create_task(self._sweep(conversations))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _sweep(self, conversations: Conversations) -> None:
        bounds = self._bounds
        while True:
            before = self._now() - bounds.keep if bounds.keep else 0.0
            try:
                self.expired += await conversations.expire(before, bounds.sessions, bounds.turns)
            except StoreUnavailable as error:
                log.warning("old turns could not be deleted", why=str(error))
            except Exception:
                log.exception("old turns could not be deleted")
            await self._sleep(EVERY)
