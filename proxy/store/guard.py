"""How long anybody waits for the store: each call for so long, and none at all for some seconds once it failed again and again.

Strategy: a call runs as a task of its own and is left behind when its time is over, since a driver that is being cancelled may
wait for a dead server, too. Conversations, files and searches have a circuit each: somebody's slow search does not take memory
away from everybody. A slow store is worse than a dead one, so both count alike.
The one rule: whoever waits gets an answer or StoreUnavailable in time. Behind a timeout a change may be made all the same, whole;
every change may be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from proxy.store import StoreUnavailable

P = ParamSpec("P")
T = TypeVar("T")
Changed = Callable[[str, str | None], None]
Home = Callable[P, Coroutine[Any, Any, T]]

FAILURES = 5  # in a row
REST_SECONDS = 5.0
PATIENCE_SECONDS = 1.0  # at the end, for calls that were left behind


class Circuit:
    """Open: nobody asks. After a rest one may try, and what becomes of it decides. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._until = 0.0
        self._trying = False

    @property
    def open(self) -> bool:
        return self._failures >= FAILURES

    def admits(self) -> bool:
        """May somebody ask now? Who is told so says what became of it."""
        if not self.open:
            return True
        if self._trying or self._clock() < self._until:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        self._failures, self._trying = 0, False

    def failed(self) -> None:
        self._failures += 1
        self._trying = False
        self._until = self._clock() + REST_SECONDS

    def abandoned(self) -> None:
        """The caller has gone: nothing is known."""
        self._trying = False


class Guard:
    """The calls of one part of the store. name: of the part. changed: told its name and why, or None, when its circuit opens or
    closes. calls, seconds: how many calls there were by method and outcome, and how long they took by method.
    """

    def __init__(self, name: str, changed: Changed, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.circuit = Circuit(clock)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._changed = changed
        self._clock = clock
        self._running: set[asyncio.Task[Any]] = set()

    async def call(self, patience: float, home: Home[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the home answers within `patience` seconds. Raises StoreUnavailable."""
        method = home.__name__
        if not self.circuit.admits():
            self.calls[method, "refused"] += 1
            raise StoreUnavailable(f"the store failed {FAILURES} times in a row and is not asked for a moment")
        started = self._clock()
        outcome, why = "error", ""
        try:
            found = await self._within(patience, home(*args, **kwargs), method)
            outcome = "success"
            return found
        except TimeoutError:
            outcome, why = "timeout", f"{method} took longer than {patience:g} s"
            raise StoreUnavailable(why) from None
        except StoreUnavailable as error:
            outcome, why = "unavailable", str(error)
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.calls[method, outcome] += 1
            self.seconds[method] += self._clock() - started
            self._learn(outcome, why)

    async def close(self) -> None:
        """Let go of the calls that were left behind."""
        if self._running:
            await asyncio.wait(self._running, timeout=PATIENCE_SECONDS)

    async def _within(self, patience: float, call: Coroutine[Any, Any, T], method: str) -> T:
        task = asyncio.get_running_loop().create_task(call, name=f"store {method}")
        self._running.add(task)
        task.add_done_callback(self._over)
        try:
            done, _ = await asyncio.wait({task}, timeout=patience)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            raise TimeoutError
        return task.result()

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, though the caller may have gone

    def _learn(self, outcome: str, why: str) -> None:
        before = self.circuit.open
        if outcome in ("timeout", "unavailable"):
            self.circuit.failed()
        elif outcome == "cancelled":
            self.circuit.abandoned()
        else:
            # An error of ours is an answer of the store's.
            self.circuit.succeeded()
        if self.circuit.open != before:
            self._changed(self.name, why or None)
