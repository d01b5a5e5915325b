"""Turns on their way into the store, behind the back of whoever was answered.

Strategy: per session a queue and, while there is something in it, a task that writes one turn after the other; what fails is
tried again a few times and then counted and logged, without its content. The queues outlive a reload, so both middlewares hold
the same.
The one rule: turns of a session are written in the order in which their answers ended, and whoever asks for the session in this
process can wait for those that have ended before, unless the store has refused them more than once.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from proxy.store import Conversations, StoreUnavailable, Turn

# Seconds before the second try, the third…; the last comes when a store that was left alone for a moment is asked again.
PAUSES = (0.1, 1.0, 6.0)
# Turns that may wait at a time; beyond, the store has been away for long, and memory is not endless.
MOST_WAITING = 1000

Key = tuple[str, str]
log: Any = structlog.get_logger("penstock.memory")


class Saves:
    """counts: `saved`, `partial` and `failed` turns. waiting: how many are not written yet."""

    def __init__(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep, most: int = MOST_WAITING) -> None:
        self.counts: Counter[str] = Counter()
        self.waiting = 0
        self._sleep = sleep
        self._most = most
        self._queues: dict[Key, deque[tuple[Conversations, Turn]]] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._failing: set[Key] = set()

    def add(self, conversations: Conversations, key: Key, turn: Turn) -> None:
        """Write a turn, soon. key: the owner and the session."""
        if self.waiting >= self._most:
            self._failed(turn, "too many turns are waiting to be written")
            return
        self.waiting += 1
        self._queues.setdefault(key, deque()).append((conversations, turn))
        if key not in self._tasks:
            self._tasks[key] = asyncio.get_running_loop().create_task(self._write_all(key))

    async def settled(self, owner: str, session: str) -> None:
        """Returns when no turn of this session waits any more; at once where none does. Raises StoreUnavailable where that is
        not to be waited for."""
        if (owner, session) in self._failing:
            raise StoreUnavailable("the session's last turn could not be written yet")
        if (task := self._tasks.get((owner, session))) is not None:
            await asyncio.wait((task,))

    async def all_settled(self, owner: str) -> None:
        """The same for all sessions of an owner, but those that are not to be waited for."""
        if tasks := [task for key, task in self._tasks.items() if key[0] == owner and key not in self._failing]:
            await asyncio.wait(tasks)

    async def close(self, seconds: float) -> None:
        """Write what waits, for at most so long; what is left then has failed."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=seconds)
        left = list(self._tasks.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _write_all(self, key: Key) -> None:
        queue = self._queues[key]
        try:
            while queue:
                conversations, turn = queue[0]
                await self._write(conversations, key, turn)
                queue.popleft()
                self.waiting -= 1
        finally:
            del self._tasks[key], self._queues[key]
            self._failing.discard(key)
            self.waiting -= len(queue)
            for _, turn in queue:
                self._failed(turn, "the gateway was stopped")

    async def _write(self, conversations: Conversations, key: Key, turn: Turn) -> None:
        for number, pause in enumerate((*PAUSES, None)):
            try:
                await conversations.append(*key, turn)
            except StoreUnavailable as error:
                if pause is None:
                    self._failed(turn, str(error))
                    return
                if number:
                    self._failing.add(key)
                await self._sleep(pause)
            except Exception as error:
                self._failed(turn, type(error).__name__)
                return
            else:
                self._failing.discard(key)
                self.counts["partial" if turn.partial else "saved"] += 1
                return

    def _failed(self, turn: Turn, why: str) -> None:
        self.counts["failed"] += 1
        log.warning("a turn was not saved", request=turn.request, why=why)
