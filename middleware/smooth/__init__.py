"""Smooth streams: many small chunks as fewer larger ones, or bursts spread in time. Off, unless config or request asks.

Strategy: a flow of its own (`flow`) between the reply and its reader holds chunks back (`waiting`) and lets them go on one timer.
Cost: 1.5 us per paced chunk merged for 50 ms, 0.8 for 500, less what fewer writes save; see docs/smoothing.md.
The one rule: folded, the reply is the same with and without it; the first chunk and the end never wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from middleware.smooth.flow import Smoothed
from middleware.smooth.waiting import Merging, Spreading, Waiting
from proxy.call import Call, altered
from proxy.own_fields import Field, OwnFields
from proxy.pipeline import Handler
from proxy.reply import Reply
from proxy.units import Between, Seconds

INTERVAL, SIZE, MAX_DELAY = 0.05, 200, 1.0
SHORTEST, LONGEST = 0.001, 10.0
LARGEST = 65_536
SLOWEST, FASTEST = 1.0, 1000.0


@dataclass(frozen=True, slots=True)
class Way:
    """How a stream is smoothed. rate: chunks per second, spread; None: merged, for up to `interval` seconds or `size` bytes of
    text. most: seconds that a chunk may wait where they are spread."""

    interval: float = INTERVAL
    size: int = SIZE
    rate: float | None = None
    most: float = MAX_DELAY

    def waiting(self) -> Waiting:
        return Merging(self.interval, self.size) if self.rate is None else Spreading(1 / self.rate, self.most)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asked for; way: None for none."""

    way: Way | None


class Smooth:
    """Merges small deltas, or spreads bursts, in streamed replies.

    interval, size: merge for at most so long, or up to so many bytes of text (50 ms and 200 where only one is given).
    chunks_per_second: spread instead. max_delay: no spread chunk waits longer than that. With none of the first three only
    requests that ask (`smooth`) are smoothed; a request may also refuse (`smooth: false`).
    """

    FIELDS = ("smooth",)

    def __init__(
        self,
        *,
        interval: Annotated[Seconds, Between(SHORTEST, LONGEST)] | None = None,
        size: Annotated[int, Between(1, LARGEST)] | None = None,
        chunks_per_second: Annotated[float, Between(SLOWEST, FASTEST)] | None = None,
        max_delay: Annotated[Seconds, Between(SHORTEST, LONGEST)] = MAX_DELAY,
    ) -> None:
        merge = interval is not None or size is not None
        if merge and chunks_per_second is not None:
            raise ValueError("merges (interval, size) or spreads (chunks_per_second), not both")
        self._own = Way(interval or INTERVAL, size or SIZE, chunks_per_second, max_delay)
        self._always = self._own if merge or chunks_per_second is not None else None

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `smooth`: true, false, `{interval, size}` (ms, bytes) or `{chunks_per_second, max_delay}` (…, ms). Raises
        Refused with the path."""
        field = own.get("smooth")
        if field is None:
            return call
        if isinstance(field.value, bool):
            asked = Asked(self._own if field.value else None)
        elif isinstance(field.value, dict):
            asked = Asked(self._way(field))
        else:
            field.refuse("must be true, false or an object such as {interval: 50, size: 200} or {chunks_per_second: 30}")
        return altered(call, extensions={**call.extensions, Asked: asked})

    def _way(self, field: Field) -> Way:
        interval, size, rate, most = (field.get(name) for name in ("interval", "size", "chunks_per_second", "max_delay"))
        if rate is not None and (interval is not None or size is not None):
            field.refuse("merges (interval, size) or spreads (chunks_per_second), not both")
        own = self._own
        return Way(
            interval.number(SHORTEST * 1000, LONGEST * 1000) / 1000 if interval else own.interval,
            size.integer(1, LARGEST) if size else own.size,
            rate.number(SLOWEST, FASTEST) if rate else None if interval or size else own.rate,
            most.number(SHORTEST * 1000, LONGEST * 1000) / 1000 if most else own.most,
        )

    async def __call__(self, call: Call, next: Handler) -> Reply:
        reply = await next(call)
        asked = call.extension(Asked)
        way = asked.way if asked else self._always
        if way is None or not call.stream or reply.whole or reply.head.status != 200:
            return reply
        return altered(reply, chunks=Smoothed(reply.chunks, way.waiting(), reply.trailer))
