"""One reply that several readers follow, each at its own pace: what single flight and resumable streams are made of.

Strategy: the flight reads its reply as soon as it is made and keeps the batches; a follower has a place among them. Who has
caught up gets each batch in the callback in which it came; who is behind, or came later, gets what it has missed when it asks.
The reply is read no further while all followers are behind.
The one rule: a follower never slows the others. One that stays more than `max_lag` bytes behind for `patience` seconds is
dropped, with an error.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from math import inf

from proxy.call import altered
from proxy.errors import GatewayError, Outcome
from proxy.reply import STALL_SECONDS, Batch, Ended, Head, Receive, Reply, Run, Sent, Trailer, flow_of
from proxy.timers import Expiry, after

log = logging.getLogger("penstock")

GROWTH = 4096


@dataclass(frozen=True, slots=True)
class Bounds:
    """keep: bytes that are kept for followers who come later; beyond, the oldest are let go once all followers have them.

    max_lag: bytes that a follower may be behind; patience: for how many seconds it may be further behind than that.
    """

    keep: int = 0
    max_lag: int = 2**20
    patience: float = 60.0


class TooFarBehind(GatewayError):
    """A follower that could not keep up."""

    status = 503
    code = "too_far_behind"
    type = "timeout_error"
    outcome = Outcome.CLIENT_GONE


class Flight:
    """Reads `reply` to its end, or until `close`. Everything here happens in the event loop's thread.

    numbered: the events carry ids, 1, 2, 3…. emptied: called whenever the last follower has left before the end; without it the
    reply is then closed. grown: called before `size` is GROWTH bytes beyond what it was at the call before. ended: called once,
    when all is over. start: False where followers are to be there before the first batch; then `start` is called.
    joinable: a follower can still have it from the start. over: no batch will come any more. error: what broke it, if so.
    size: bytes kept; total: bytes that have come. number: that of the next event. ending: the follower that sees to the end.
    parting: with which outcome the last follower left. usage_only: once nobody follows, only usage is waited for: the reply is
    closed behind its final batch, before what middleware further in does at a clean end.
    """

    __slots__ = (
        "__weakref__", "_base", "_came", "_clock", "_emptied", "_final", "_flow", "_followers", "_go", "_grown", "_held", "_kept",
        "_last", "_longest", "_numbered", "_stalls", "_task", "_told", "_told_size", "bounds", "ending", "error", "number",
        "over", "parting", "reply", "size", "total", "usage_only",
    )  # fmt: skip

    def __init__(
        self,
        reply: Reply,
        bounds: Bounds,
        *,
        numbered: bool = False,
        emptied: Callable[[Flight], None] | None = None,
        grown: Callable[[Flight], None] | None = None,
        ended: Callable[[Flight], None] | None = None,
        start: bool = True,
    ) -> None:
        self.reply = reply
        self.bounds = bounds
        self.over = False
        self.error: GatewayError | None = None
        self.size = 0
        self.total = 0
        self.number = 1
        self.parting: Outcome | None = None
        self.usage_only = False
        self._numbered = numbered
        self._emptied = emptied
        self._grown = grown
        self._told_size: float = 0 if grown is not None else inf
        self._told = ended
        self._kept: deque[Batch] = deque()
        self._base = 0
        self._followers: list[Follower] = []
        self._flow = flow_of(reply.chunks)
        self._held = False
        self._go: asyncio.Event | None = None
        self._clock = asyncio.get_running_loop().time
        self._came = self._clock()
        self._longest = 0.0
        self._stalls = 0
        self._task: asyncio.Task[None] | None = None
        self.ending: Follower | None = None
        self._last: Batch | None = None
        self._final = 0
        if start:
            self.start()

    def start(self) -> None:
        """Begin to read."""
        if self._flow is not None:
            self._flow.push(self._receive, self._ended)
        else:
            self._go = asyncio.Event()
            self._go.set()
            self._task = asyncio.get_running_loop().create_task(self._pull())

    @property
    def joinable(self) -> bool:
        return self._base == 0

    @property
    def end(self) -> int | None:
        """The `id:` of what ends the stream behind its last event: the error chunk, or the first of usage and [DONE]."""
        return self.number if self._numbered else None

    @property
    def followers(self) -> int:
        return len(self._followers)

    def follow(self, after: int = 0, head: Head | None = None) -> Reply | None:
        """A reply of its own for a further reader, which must read it or close it; None where what it wants is kept no more.

        after: the number of the last event that it has. head: instead of the flight's own.
        """
        place, skip = self._place(after)
        if place is None:
            return None
        follower = Follower(self, place, skip)
        self._followers.append(follower)
        if self._held:
            self._steer()
        return altered(self.reply, head=head or self.reply.head, chunks=follower, trailer=follower.trailer)

    def keep(self, most: int) -> None:
        """Keep at most so many bytes from now on, whatever the bounds said; what a follower still needs stays."""
        self.bounds = replace(self.bounds, keep=most)
        self._trim()

    def close(self, outcome: Outcome = Outcome.CANCELLED, error: GatewayError | None = None) -> None:
        """End it from outside: the reply is closed, and followers get `error` (or a general one) where it was not over."""
        if not self.over:
            self._finish(error or GatewayError("The stream was ended.", code="cancelled"), outcome)

    # Batches in

    def _receive(self, batch: Batch) -> None:
        if self.over:
            return
        now = self._clock()
        gap = now - self._came
        self._came = now
        if gap > self._longest:
            self._longest = gap
        if gap > STALL_SECONDS:
            self._stalls += 1
        if self._numbered:
            items, number = batch.items, self.number
            batch = batch.numbered(number)
            self.number = number + (1 if len(items) == 1 and type(items[0]) is bytes else _events(batch))
        size = len(batch.sse())
        if batch.final:
            self._final = size
        else:
            self._last = batch
        kept, followers = self._kept, self._followers
        place = self._base + len(kept)
        kept.append(batch)
        self.size += size
        self.total += size
        follower = followers[0] if len(followers) == 1 else None
        if follower is not None and follower.place == place and follower.live is not None and not batch.final:
            # The only one, who has caught up: by the short way, 0.1 us instead of 1.
            follower.place = place + 1
            follower.got += size
            follower.live(batch)
        else:
            for follower in followers[:]:  # one may leave meanwhile
                follower.advance()
        if self.size > self.bounds.keep:
            self._trim()
        if self.size > self._told_size:
            self._tell()
        if self.usage_only and batch.final and not self._followers:
            self.close(Outcome.CLIENT_GONE)

    def _ended(self, error: Exception | None) -> None:
        if self.over:
            return
        if error is not None:
            known = error if isinstance(error, GatewayError) else GatewayError("The gateway failed on this stream.")
            if known is not error:
                log.error("A shared stream failed.", exc_info=error)
            self._finish(known, known.outcome)
        elif len(self._followers) == 1 and self._followers[0].takes_the_end():
            pass
        elif self._task is None and self.ending is None:
            self.settle()

    def settle(self) -> None:
        """See to what middleware further in does after a clean end, in a task of its own."""
        self.ending = None
        self._task = asyncio.get_running_loop().create_task(self._settle())

    async def settled(self) -> None:
        """The same in the task of the only follower, which is awake at the end anyway. Raises what it raises."""
        assert self._flow is not None
        self.ending = None
        try:
            await self._flow.finished()
        except Exception as error:
            self._ended(error)
            raise
        finally:
            self._finish(None, Outcome.COMPLETED)

    async def _settle(self) -> None:
        """What middleware further in does after a clean end comes before the followers' end."""
        assert self._flow is not None
        try:
            await self._flow.finished()
        except Exception as error:
            self._ended(error)
        else:
            self._finish(None, Outcome.COMPLETED)

    async def _pull(self) -> None:
        assert self._go is not None
        try:
            async for batch in self.reply.chunks:
                self._receive(batch)
                if self.over:
                    return
                await self._go.wait()
        except Exception as error:
            self._ended(error)
        else:
            self._finish(None, Outcome.COMPLETED)

    def _finish(self, error: GatewayError | None, outcome: Outcome) -> None:
        if self.over:
            return
        self.over, self.error = True, error
        self._gaps()
        trailer = self.reply.trailer
        if self._last is not None and trailer.usage is None:
            trailer.sent = Sent(self.total - self._final, self._last, len(self._last.sse()))
        trailer.end(outcome, error)
        if self._task is not None and self._task is not _current():
            self._task.cancel()
        for follower in tuple(self._followers):
            follower.advance()
        told, self._told = self._told, None
        # Whoever keeps flights is not kept by them: no cycle, so memory is free as soon as the last one lets go.
        self._emptied, self._grown, self._told_size = None, None, inf
        if told is not None:
            told(self)

    def _tell(self) -> None:
        self._told_size = self.size + GROWTH
        if self._grown is not None:
            self._grown(self)

    def _gaps(self) -> None:
        """Nobody writes what the reply's own trailer would tell of: the gaps are those between its batches."""
        self.reply.trailer.silences(self._longest, self._stalls, self._clock() - self._came)

    def _trim(self) -> None:
        """Let go of the oldest batches that are beyond what is kept and that no follower still needs."""
        followers = self._followers
        if len(followers) == 1:
            needed = followers[0].place
        else:
            needed = min((follower.place for follower in followers), default=self._base + len(self._kept))
        while self.size > self.bounds.keep and self._base < needed:
            self.size -= len(self._kept.popleft().sse())
            self._base += 1

    # Followers

    def batch(self, place: int) -> Batch | None:
        """The batch at a place; None where it has not come yet."""
        at = place - self._base
        return self._kept[at] if at < len(self._kept) else None

    def before(self, place: int) -> int:
        """How many bytes came before the batch at a place."""
        if place == self._base:
            return self.total - self.size
        return self.total - sum(len(batch.sse()) for batch in islice(self._kept, place - self._base, None))

    def left(self, follower: Follower) -> None:
        """A follower has gone."""
        if follower in self._followers:
            self._followers.remove(follower)
            self.parting = follower.trailer.outcome
            if self.ending is follower and self._followers:
                self.settle()
            if self._followers or self.over:
                self._trim()
                self._steer()
            elif self._emptied is not None:
                self._steer()
                self._emptied(self)
                self._end_alone()
            else:
                self.close(Outcome.CLIENT_GONE)

    def _end_alone(self) -> None:
        """The one that was to see to the end has left before it did."""
        if self.ending is not None and not self.over:
            if self.usage_only:
                self.close(Outcome.CLIENT_GONE)
            else:
                self.settle()

    def steer(self) -> None:
        """A follower has fallen behind, or caught up."""
        self._trim()
        self._steer()

    def _steer(self) -> None:
        """Read on, unless there are followers and all of them are behind."""
        held = bool(self._followers)
        for follower in self._followers:
            if not follower.behind:
                held = False
                break
        if held == self._held or self.over:
            return
        self._held = held
        if self._go is not None:
            (self._go.clear if held else self._go.set)()
        elif self._flow is not None:
            (self._flow.pause if held else self._flow.resume)()

    def _place(self, after: int) -> tuple[int | None, int]:
        """Where a follower begins who has the events up to `after`, and how many events of that batch it has."""
        if after <= 0 or not self._numbered:
            return (0 if self._base == 0 else None), 0
        if after >= self.number and not (self._kept and self._kept[-1].final):
            return self._base + len(self._kept), 0
        for place, batch in enumerate(self._kept, self._base):
            first = batch.number or 0
            if after < first:
                # All before it were let go of; it must follow on what the reader has.
                return (place if after == first - 1 else None), 0
            if batch.final or after < first + _events(batch) - 1:
                return place, after - first + 1
            if after == first + _events(batch) - 1:
                return place + 1, 0
        return self._base + len(self._kept), 0


class Follower:
    """One reader of a flight: a flow. place: the number of the batch that it gets next. behind: it has asked for a pause.

    pushes: all but whole replies, which have to be pulled. got: bytes that came before its place. live: to whom batches can be
    handed on now, if it has caught up.
    """

    __slots__ = (
        "_advancing", "_dropped", "_ended", "_flight", "_impatience", "_left", "_receive", "_skip", "_waiter", "behind", "got",
        "live", "place", "pushes", "trailer",
    )  # fmt: skip

    def __init__(self, flight: Flight, place: int, skip: int) -> None:
        self.place = place
        self.behind = False
        self.pushes = not flight.reply.whole
        self.trailer = Trailer()
        self.trailer.source = flight.reply.trailer.source or flight.reply.trailer
        self.trailer.own(self._leave)
        self._flight = flight
        self._skip = skip
        self.got = flight.before(place)
        self.live: Receive | None = None
        self._receive: Receive | None = None
        self._ended: Ended | None = None
        self._advancing = False
        self._waiter: asyncio.Future[None] | None = None
        self._impatience: Expiry | None = None
        self._dropped: GatewayError | None = None
        self._left = False

    # As a flow

    def push(self, receive: Receive, ended: Ended) -> None:
        self._receive, self._ended = receive, ended
        self.advance()
        self.live = None if self.behind else self._receive
        if self._flight.size > self._flight.bounds.keep:
            self._flight.steer()

    def pause(self) -> None:
        self.behind, self.live = True, None
        self._flight.steer()

    def resume(self) -> None:
        self.behind = False
        self.advance()
        self.live = None if self.behind else self._receive
        if not self.behind:
            self._flight.steer()

    def takes_the_end(self) -> bool:
        """If it has all and is pushed to, it is told of the end at once, and its reader sees to what is done there."""
        if self._ended is None or self.behind or self._advancing or self._flight.batch(self.place) is not None:
            return False
        self._flight.ending = self
        ended, self.live, self._receive, self._ended = self._ended, None, None, None
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
        """Hand on all that has come, if it is wanted now; the flight calls it for every batch, and at the end."""
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
        if self._left or self._dropped is not None or (batch := self._flight.batch(self.place)) is None:
            return None
        self.place += 1
        self.got += len(batch.sse())
        if self._skip:
            batch, self._skip = _without(batch, self._skip), 0
        if batch.final:
            self._fill()
        return batch

    def _fill(self) -> None:
        inner, own = self._flight.reply.trailer, self.trailer
        own.usage, own.finish_reasons, own.chunks = inner.usage, inner.finish_reasons, inner.chunks
        own.switches, own.clean_end = inner.switches, inner.clean_end

    def _over(self) -> bool:
        return self._dropped is not None or (self._flight.over and self._flight.batch(self.place) is None)

    def _end(self) -> GatewayError | None:
        self._fill()
        flight = self._flight
        if self._dropped is None and flight.error is not None:
            self.trailer.number = flight.end
        error = self._dropped or flight.error
        return None if error is None else error.again()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self.live = self._receive = self._ended = None
            self._fill()
            if self._impatience is not None:
                self._impatience.cancel()
            self._flight.left(self)

    def _watch(self) -> None:
        """Begin, or stop, to lose patience with a follower that is too far behind."""
        late = self.behind and self._flight.total - self.got > self._flight.bounds.max_lag
        if late and self._impatience is None:
            self._impatience = after(self._flight.bounds.patience, self._drop)
        elif not late and self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def _drop(self) -> None:
        self._impatience = None
        self.live = None
        self._dropped = TooFarBehind("The client is too far behind the stream that it shares.")
        ended, self._receive, self._ended = self._ended, None, None
        if ended is not None:
            ended(self._dropped)


def _current() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _events(batch: Batch) -> int:
    """How many events the items of a batch are."""
    if len(batch.items) == 1 and type(batch.items[0]) is not Run:
        return 1
    return sum(item.count(b"\n\n") if isinstance(item, Run) else 1 for item in batch.items)


def _without(batch: Batch, skip: int) -> Batch:
    """A batch without its first events. What stands behind the final one's, usage and the end, is made of them, later."""
    if batch.final:
        rest = Batch(batch.items, final=True, number=batch.number)
        rest.seen = skip
        return rest
    return Batch(batch.chunks[skip:], number=None if batch.number is None else batch.number + skip)
