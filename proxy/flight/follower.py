"""One reader of a flight: a flow of its own over what the flight records.

Strategy: a follower has a position in the recording and moves on as its reader takes batches. While it is the only one and has
all that has come, the flight hands on to it by itself, and its position here stands still; `stand` sets it when that is over.
The one rule: a follower never slows the others. One that stays more than `max_lag` bytes behind for `patience` seconds is
dropped, with an error.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy.errors import GatewayError, Outcome
from proxy.flight.recording import Position, without
from proxy.reply import Batch, Ended, Receive, Single, Trailer
from proxy.timers import Expiry, after

if TYPE_CHECKING:
    from proxy.flight.flight import Flight
    from proxy.flight.straight import Straight


class TooFarBehind(GatewayError):
    """A follower that could not keep up."""

    status = 503
    code = "too_far_behind"
    type = "timeout_error"
    outcome = Outcome.CLIENT_GONE


class Follower:
    """A flow. place: the number of the batch that it gets next. behind: it has asked for a pause. pushes: all but whole replies,
    which have to be pulled. rider: the flight that reads it, if it is one.
    """

    __slots__ = (
        "_advancing", "_before", "_dropped", "_ended", "_flight", "_impatience", "_left", "_number", "_receive", "_single",
        "_skip", "_waiter", "behind", "place", "pushes", "rider", "trailer",
    )  # fmt: skip

    def __init__(self, flight: Flight, position: Position) -> None:
        self.place, self._before, self._number, self._skip = position
        self.behind = False
        self.pushes = not flight.reply.whole
        self.rider: Straight | None = None
        self.trailer = Trailer()
        self.trailer.source = flight.reply.trailer.source or flight.reply.trailer
        self.trailer.own(self._leave)
        self._flight = flight
        self._receive: Receive | None = None
        self._single: Single | None = None
        self._ended: Ended | None = None
        self._advancing = False
        self._waiter: asyncio.Future[None] | None = None
        self._impatience: Expiry | None = None
        self._dropped: GatewayError | None = None
        self._left = False

    def stand(self, place: int, before: int, number: int) -> None:
        """It has got all before that place, which were so many bytes; number: of the next event."""
        self.place, self._before, self._number, self._skip = place, before, number, 0

    def hand(self, batch: Batch) -> None:
        """The next batch, for one that is live."""
        if self._receive is not None:
            self._receive(batch)

    # As a flow

    def singly(self, single: Single) -> None:
        self._single = single

    def push(self, receive: Receive, ended: Ended) -> None:
        self._receive, self._ended = receive, ended
        self.advance()
        self._flight.caught_up()

    def pause(self) -> None:
        self.behind = True
        self._flight.fell_behind()

    def resume(self) -> None:
        if not self.behind:
            return
        self.behind = False
        self.advance()
        if not self.behind:
            self._flight.caught_up()

    @property
    def live(self) -> Single | None:
        """To whom single events can be handed on now, if it takes them as they come and has all before them."""
        ready = self._receive is not None and not self.behind and not self._advancing and self._dropped is None
        if not ready or self.place != self._flight.places:
            return None
        return self._single or self._batched

    def again(self) -> None:
        """The reader may take single events again."""
        if not self._left:
            self._flight.lift()

    def _batched(self, event: bytes, number: int | None, now: float) -> None:
        """For a reader that only takes batches."""
        if self._receive is not None:
            self._receive(Batch((event,), number=number))

    def takes_the_end(self) -> bool:
        """If it has all and is pushed to, it is told of the end at once, and its reader sees to what is done there."""
        if self._ended is None or self.behind or self._advancing or self.place != self._flight.places:
            return False
        self._flight.ending = self
        ended, self._receive, self._ended = self._ended, None, None
        ended(None)
        return True

    async def finished(self) -> None:
        """The flight has seen to that, or this is to."""
        if self._flight.ending is self:
            try:
                await self._flight.settled()
            finally:
                self._fill()

    def advance(self) -> None:
        """Hand on all that has come, if it is wanted now; the flight calls it for what is not a single event, and at the end."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._receive is None or self._advancing:
            return
        self._advancing = True
        try:
            while not self.behind and self._receive is not None and (batch := self._next()) is not None:
                self._receive(batch)
        finally:
            self._advancing = False
        if self.behind or self._impatience is not None:
            self._watch()
        if self._ended is not None and not self.behind and (self._flight.over or self._dropped is not None) and self._over():
            ended, self._receive, self._ended = self._ended, None, None
            ended(self._end())

    # As an iterator

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> Batch:
        while (batch := self._next()) is None:
            if self._over():
                if (error := self._end()) is not None:
                    raise error
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return batch

    async def aclose(self) -> None:
        self._leave()

    # Within

    def _next(self) -> Batch | None:
        if self._left or self._dropped is not None or (kept := self._flight.at(self.place, self._number)) is None:
            return None
        batch, size, events = kept
        self.place += 1
        self._before += size
        self._number += events
        if self._skip:
            batch, self._skip = without(batch, self._skip), 0
        if batch.final:
            self._fill()
        return batch

    def _fill(self) -> None:
        inner, own = self._flight.reply.trailer, self.trailer
        own.usage, own.finish_reasons, own.chunks = inner.usage, inner.finish_reasons, inner.chunks
        own.switches, own.clean_end = inner.switches, inner.clean_end

    def _over(self) -> bool:
        return self._dropped is not None or (self._flight.over and self.place == self._flight.places)

    def _end(self) -> GatewayError | None:
        self._fill()
        flight = self._flight
        if self._dropped is None and flight.error is not None and flight.numbered:
            self.trailer.number = flight.number
        error = self._dropped or flight.error
        return None if error is None else error.again()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._receive = self._ended = self._single = self.rider = None
            self._fill()
            if self._impatience is not None:
                self._impatience.cancel()
            self._flight.left(self)

    def _watch(self) -> None:
        """Begin, or stop, to lose patience with a follower that is too far behind."""
        bounds = self._flight.bounds
        late = self.behind and self._flight.total - self._before > bounds.max_lag
        if late and self._impatience is None:
            self._impatience = after(bounds.patience, self._drop)
        elif not late and self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def _drop(self) -> None:
        self._impatience = None
        self._dropped = TooFarBehind("The client is too far behind the stream that it shares.")
        ended, self._receive, self._ended = self._ended, None, None
        if ended is not None:
            ended(self._dropped)
