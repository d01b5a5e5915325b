"""A recorded reply, coming again: at once, as it came, or at so many chunks per second.

Strategy: a replay is a plan, `[(seconds since the hit, offset)]`, and an iterator that walks it and hands over slices of the
entry's events. Nothing is decoded, unless somebody looks at the chunks.
The one rule: a wait can be ended from outside at any time: the relay releases the trailer's resources when it must stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Protocol

import orjson

from middleware.cache.asked import Pace, Usage
from middleware.cache.entry import Entry
from proxy.errors import GatewayError
from proxy.reply import Batch, Item, Trailer, single_events

Plan = list[tuple[float, int]]


class Timer(Protocol):
    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], None]], Timer]


def call_later(seconds: float, wake: Callable[[], None]) -> Timer:
    """The running event loop's."""
    return asyncio.get_running_loop().call_later(seconds, wake)


class Replayed(Batch):
    """A batch that was encoded long ago; it is taken apart only for those who look at its items or chunks."""

    __slots__ = ()

    def __init__(self, events: bytes, *, final: bool = False) -> None:
        self._sse = events
        self._chunks = None
        self.final = final
        self.number = None
        self.comment = b""
        self.seen = 0

    def __getattr__(self, name: str) -> Any:
        # Only asked for a slot that is still empty: `items` is filled by the first who wants it.
        if name != "items":
            raise AttributeError(name)
        self.items = self._taken_apart()
        return self.items

    def _taken_apart(self) -> list[Item]:
        items: list[Item] = [*single_events(self._sse or b"")]
        if self.final and items:
            # Usage goes on or behind the last chunk, which therefore must be one.
            items[-1] = orjson.loads(items[-1][6:-2])  # type: ignore[index]
        return items


def plan(entry: Entry, pace: Pace) -> Plan:
    """When each slice is due, in seconds since the hit, and where it ends; the last one is the final batch."""
    end = len(entry.events)
    if pace == "recorded":
        return list(zip(accumulate(entry.gaps), entry.ends, strict=True))
    if pace == "instant":
        return [(0.0, entry.finish), (0.0, end)] if entry.finish else [(0.0, end)]
    ends = list(accumulate(map(len, single_events(entry.events[: entry.finish]))))
    return [(number / pace, at) for number, at in enumerate([*ends, end])]


class Pauses:
    """Waits for points in time after its making. `release` ends the current wait and all later ones with an error."""

    def __init__(self, clock: Callable[[], float], later: Later) -> None:
        self._clock = clock
        self._later = later
        self._began = clock()
        self._waking: asyncio.Future[None] | None = None
        self._released = False

    def release(self) -> None:
        self._released = True
        self._wake()

    async def until(self, seconds: float) -> None:
        """Wait until `seconds` after the beginning. Raises GatewayError once released; whoever released says why."""
        left = self._began + seconds - self._clock()
        if left > 0 and not self._released:
            self._waking = asyncio.get_running_loop().create_future()
            timer = self._later(left, self._wake)
            try:
                await self._waking
            finally:
                timer.cancel()
                self._waking = None
        if self._released:
            raise GatewayError("The replay was ended before its end.")

    def _wake(self) -> None:
        if self._waking is not None and not self._waking.done():
            self._waking.set_result(None)


class Replay:
    """The entry's batches, an async iterator. steps: see `plan`. trailer: filled when the final batch is handed over.

    A class, because the event loop keeps a list of the generators that were started, at a microsecond each.
    """

    __slots__ = ("_entry", "_pauses", "_start", "_steps", "_trailer", "_usage")

    def __init__(self, entry: Entry, steps: Plan, pauses: Pauses | None, usage: Usage, trailer: Trailer) -> None:
        self._entry = entry
        self._steps = steps[::-1]
        self._pauses = pauses
        self._usage = usage
        self._trailer = trailer
        self._start = 0

    def __aiter__(self) -> Replay:
        return self

    async def __anext__(self) -> Batch:
        if not self._steps:
            raise StopAsyncIteration
        if self._pauses is not None:
            await self._pauses.until(self._steps[-1][0])
        entry, start = self._entry, self._start
        if entry.whole:
            self._steps.clear()
            return _completion(entry, self._usage, self._trailer)
        _, self._start = self._steps.pop()
        if not self._steps:
            _fill(self._trailer, entry, self._usage)
        return Replayed(entry.events[start : self._start], final=not self._steps)

    async def aclose(self) -> None:
        self._steps.clear()


def _completion(entry: Entry, usage: Usage, trailer: Trailer) -> Batch:
    """A whole reply; its usage stands in it."""
    _fill(trailer, entry, usage)
    completion = orjson.loads(entry.events[6:-2])
    if completion.get("usage") is not None:
        completion["usage"] = as_asked(completion["usage"], usage)
    return Batch([completion], final=True)


def _fill(trailer: Trailer, entry: Entry, usage: Usage) -> None:
    trailer.usage = as_asked(entry.first_usage(), usage)
    trailer.finish_reasons = dict(entry.finish_reasons)
    trailer.chunks = entry.chunks


def as_asked(found: Any, usage: Usage) -> Any:
    """Usage as the provider counted it, or with every number in it 0, for a hit cost nothing."""
    if usage == "original":
        return found
    if isinstance(found, dict):
        return {name: as_asked(value, usage) for name, value in found.items()}
    if isinstance(found, list):
        return [as_asked(value, usage) for value in found]
    return 0 if isinstance(found, int | float) and not isinstance(found, bool) else found
