"""A flight: a reply that is read to its end whoever follows it, and what becomes of it when followers come and leave.

Strategy: whoever makes one is told when the last follower has left, when it has grown, and when it is over, and decides; without
anybody to tell, the reply ends with the last follower. What middleware further in does after a clean end is seen to by the only
follower's reader, whose task is awake then anyway, or else in a task of the flight's own.
The one rule: the reply is read no further while all followers are behind, and ends once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from proxy.call import altered
from proxy.errors import GatewayError, Outcome
from proxy.flight.follower import Follower
from proxy.flight.straight import Bounds, Straight
from proxy.reply import Head, Reply, flow_of, push

log = logging.getLogger("penstock")


class Flight(Straight):
    """Reads `reply` to its end, or until `close`. Everything here happens in the event loop's thread.

    numbered: the events carry ids, 1, 2, 3…. emptied: called whenever the last follower has left before the end; without it the
    reply is then closed. grown: called before `size` is GROWTH bytes beyond what it was at the call before. ended: called once,
    when all is over. start: False where followers are to be there before the first batch; then `start` is called.
    joinable: a follower can still have it from the start. over: no batch will come any more. error: what broke it, if so.
    ending: the follower that sees to the end. parting: with which outcome the last follower left. usage_only: once nobody
    follows, only usage is waited for: the reply is closed behind its final batch, before what middleware further in does at a
    clean end.
    """

    __slots__ = (
        "__weakref__", "_emptied", "_flow", "_go", "_grown", "_held", "_task", "_told", "ending", "error", "parting", "reply",
        "usage_only",
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
        under = reply.chunks if isinstance(reply.chunks, Follower) else None
        super().__init__(bounds, numbered=numbered, under=under, whole=reply.whole)
        self.reply = reply
        self.error: GatewayError | None = None
        self.ending: Follower | None = None
        self.parting: Outcome | None = None
        self.usage_only = False
        self._emptied = emptied
        self._grown = grown
        self._told = ended
        self._flow = flow_of(reply.chunks)
        self._held = False
        self._go: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        if start:
            self.start()

    def start(self) -> None:
        """Begin to read."""
        if self._flow is not None:
            push(self._flow, self._receive, self._ended, self._single)
        else:
            self._go = asyncio.Event()
            self._go.set()
            self._task = asyncio.get_running_loop().create_task(self._pull())

    @property
    def joinable(self) -> bool:
        return self.base == 0

    @property
    def followers(self) -> int:
        return len(self._followers)

    def follow(self, after: int = 0, head: Head | None = None) -> Reply | None:
        """A reply of its own for a further reader, which must read it or close it; None where what it wants is kept no more.

        after: the number of the last event that it has. head: instead of the flight's own.
        """
        self._land()
        position = self.find(after)
        if position is None:
            return None
        follower = Follower(self, position)
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

    # Within

    def _has_all(self) -> None:
        if self.usage_only and not self._followers:
            self.close(Outcome.CLIENT_GONE)

    def _look(self) -> None:
        super()._look()
        if self._grown is not None:
            self._grown(self)

    # Ends

    def _ended(self, error: Exception | None) -> None:
        if self.over:
            return
        if error is not None:
            known = error if isinstance(error, GatewayError) else GatewayError("The gateway failed on this stream.")
            if known is not error:
                log.error("A shared stream failed.", exc_info=error)
            self._finish(known, known.outcome)
            return
        self._land()
        if len(self._followers) == 1 and self._followers[0].takes_the_end():
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
            self._finish(None, self.reply.trailer.clean)

    async def _settle(self) -> None:
        """What middleware further in does after a clean end comes before the followers' end."""
        assert self._flow is not None
        try:
            await self._flow.finished()
        except Exception as error:
            self._ended(error)
        else:
            self._finish(None, self.reply.trailer.clean)

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
            self._finish(None, self.reply.trailer.clean)

    def _finish(self, error: GatewayError | None, outcome: Outcome) -> None:
        if self.over:
            return
        self._land()
        self.over, self.error = True, error
        trailer = self.reply.trailer
        # Nobody writes what this trailer would tell of: the gaps are those between its batches.
        trailer.silences(self._longest, self._stalls, self._clock() - self._came)
        if trailer.usage is None:
            trailer.sent = self.sent()
        trailer.end(outcome, error)
        if self._task is not None and self._task is not _current():
            self._task.cancel()
        for follower in tuple(self._followers):
            follower.advance()
        told, self._told = self._told, None
        # Whoever keeps flights is not kept by them: no cycle, so memory is free as soon as the last one lets go.
        self._emptied = self._grown = None
        if told is not None:
            told(self)

    # What followers say

    def left(self, follower: Follower) -> None:
        """A follower has gone."""
        if follower not in self._followers:
            return
        self._land()
        self._followers.remove(follower)
        self.parting = follower.trailer.outcome
        if self.ending is follower and self._followers:
            self.settle()
        if self._followers or self.over:
            self.caught_up()
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

    def fell_behind(self) -> None:
        """A follower wants no more for now."""
        self._land()
        self._trim()
        self._steer()

    def caught_up(self) -> None:
        """A follower has taken what there was, or one less is there to wait for."""
        self._trim()
        self._steer()
        self.lift()

    def _steer(self) -> None:
        """Read on, unless there are followers and all of them are behind."""
        held = bool(self._followers) and all(follower.behind for follower in self._followers)
        if held == self._held or self.over:
            return
        self._held = held
        if self._go is not None:
            (self._go.clear if held else self._go.set)()
        elif self._flow is not None:
            (self._flow.pause if held else self._flow.resume)()


def _current() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
