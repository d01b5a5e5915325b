"""The calls that are open, each from when it is let in to the end of its answer: how many there may be, and their ends.

Strategy: a dict of tasks and a count; a bound is a comparison, and nothing waits. Who ends a call from outside cancels its task
and says why, so that whoever the cancellation passes through does not take it for the client's leaving.
The one rule: an end from outside is told to the client: by a status as long as nothing was sent, else by an error chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, TypeVar

from proxy.call import Call
from proxy.errors import Draining, Outcome, Overloaded, UpstreamTimeout, why_cancelled
from proxy.generation import Generation
from proxy.pipeline import Handler
from proxy.relay import Relay
from proxy.reply import Reply

T = TypeVar("T")


class OpenCalls:
    """generation: what serves the next request, and bounds it. draining: no further call is let in."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.draining = False
        self._active: dict[asyncio.Task[Any], Relay | None] = {}
        self._relaying = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending = False

    @property
    def open_calls(self) -> int:
        return len(self._active)

    @property
    def waiting_calls(self) -> int:
        """Calls that have been let in and whose reply is not there yet."""
        return len(self._active) - self._relaying

    @property
    def max_streams(self) -> int:
        return self.generation.settings.max_streams

    @property
    def max_waiting(self) -> int:
        return self.generation.settings.max_waiting

    @property
    def buffered(self) -> int:
        """Bytes that are waiting for clients to take them, over all streams."""
        return sum(relay.buffered for relay in self._active.values() if relay is not None)

    def enter(self) -> asyncio.Task[Any]:
        """The current task is open from now on, unless that is one too many. Nothing has been read of a call's body yet."""
        task, settings = asyncio.current_task(), self.generation.settings
        assert task is not None
        if self.draining:
            raise Draining("The gateway is shutting down.", headers={"Retry-After": "1"})
        if 0 < settings.max_streams <= len(self._active):
            raise _overloaded("max_streams", settings.max_streams)
        if 0 < settings.max_waiting <= self.waiting_calls:
            raise _overloaded("max_waiting", settings.max_waiting)
        self._active[task] = None
        self._idle.clear()
        return task

    def leave(self, task: asyncio.Task[Any]) -> None:
        del self._active[task]
        if not self._active:
            self._idle.set()

    def relays(self, relay: Relay) -> None:
        """The current task's call has its reply."""
        task = asyncio.current_task()
        assert task is not None
        self._active[task] = relay
        self._relaying += 1

    def relayed(self) -> None:
        """It is out, or will not be."""
        self._relaying -= 1

    async def unless_ended(self, waiting: Awaitable[T]) -> T:
        """What is waited for. A cancellation that `end_all` caused is told to the client; any other means that it is gone."""
        try:
            return await waiting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._ending or task is None:
                raise
            task.uncancel()
            raise Draining("The gateway is shutting down.", headers={"Retry-After": "1"}) from None

    async def drained(self, seconds: float) -> bool:
        """Wait until no call is open, at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return not self._active

    def end_all(self) -> None:
        """End every open call as `draining`: streams get an error chunk, calls without a reply a 503."""
        self._ending = True
        for task, relay in list(self._active.items()):
            if relay is None:
                task.cancel(Outcome.DRAINING)
            else:
                relay.interrupt(Draining("The gateway is shutting down."))


async def in_time(handler: Handler, call: Call) -> Reply:
    """The pipeline's reply, before the call's deadline."""
    task = asyncio.current_task()
    assert task is not None
    assert call.deadline is not None
    # The cancellation says why, so that whoever it passes through on its way does not take it for the client's leaving.
    timer = asyncio.get_running_loop().call_at(call.deadline, task.cancel, Outcome.TIMEOUT_TOTAL)
    try:
        return await handler(call)
    except asyncio.CancelledError as error:
        if why_cancelled(error) is not Outcome.TIMEOUT_TOTAL:
            raise
        task.uncancel()
        raise UpstreamTimeout("total", call.limits.total or 0.0) from None
    finally:
        timer.cancel()


def _overloaded(bound: str, most: int) -> Overloaded:
    return Overloaded(f"The gateway has as many open calls as server.{bound} allows ({most}).", headers={"Retry-After": "1"})
