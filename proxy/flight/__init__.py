"""One reply that several readers follow, each at its own pace: what single flight and resumable streams are made of.

Strategy: the flight reads its reply as soon as it is made and keeps what comes (`recording`); a follower has a position in it
(`follower`). While there is only one, who has all that has come, a single event goes straight on to it, and nothing more is done
than to keep its bytes. Who is behind, or came later, gets what it has missed when it asks. The reply is read no further while
all followers are behind.
The one rule: beyond what is kept and what followers still need, at most GROWTH bytes are held; nothing that costs more than an
addition is done for each chunk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from proxy.call import altered
from proxy.errors import GatewayError, Outcome
from proxy.flight.follower import Follower, TooFarBehind
from proxy.flight.recording import Recording
from proxy.reply import STALL_SECONDS, Batch, Head, Reply, Single, flow_of, push

__all__ = ["GROWTH", "Bounds", "Flight", "TooFarBehind"]

log = logging.getLogger("penstock")

# What comes between two looks at what is to be let go of, or told.
GROWTH = 4096


@dataclass(frozen=True, slots=True)
class Bounds:
    """keep: bytes that are kept for followers who come later; beyond, the oldest are let go once all followers have them.

    max_lag: bytes that a follower may be behind; patience: for how many seconds it may be further behind than that.
    """

    keep: int = 0
    max_lag: int = 2**20
    patience: float = 60.0


class Flight(Recording):
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
        "__weakref__", "_came", "_clock", "_due", "_emptied", "_flow", "_followers", "_go", "_grown", "_held", "_live",
        "_longest", "_notable", "_stalls", "_task", "_told", "bounds", "ending", "error", "over", "parting", "reply",
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
        super().__init__(numbered=numbered)
        self.reply = reply
        self.bounds = bounds
        self.over = False
        self.error: GatewayError | None = None
        self.ending: Follower | None = None
        self.parting: Outcome | None = None
        self.usage_only = False
        self._emptied = emptied
        self._grown = grown
        self._told = ended
        self._followers: list[Follower] = []
        self._live: Single | None = None
        self._due = 0
        self._flow = flow_of(reply.chunks)
        self._held = False
        self._go: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._clock = asyncio.get_running_loop().time
        self._came = self._clock()
        self._notable = self._longest = 0.0
        self._stalls = 0
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

    # Batches in

    def _single(self, event: bytes, number: int | None, now: float) -> None:
        """One encoded event, alone. With one follower, who has caught up, this is all that is done for it."""
        live = self._live
        if live is None or number is not None:
            self._receive(Batch((event,), number=number))
            return
        if now - self._came > self._notable:
            self._note(now - self._came)
        self._came = now
        self._append(event)
        self.total = total = self.total + len(event)
        if total > self._due:
            self._look()
        if self.numbered:
            number = self.number
            self.number = number + 1
        live(event, number, now)

    def _receive(self, batch: Batch) -> None:
        """Any other batch, and any reader."""
        if self.over:
            return
        now = self._clock()
        self._note(now - self._came)
        self._came = now
        self._land()
        self.add(batch, self.reply.whole)
        for follower in self._followers[:]:  # one may leave meanwhile
            follower.advance()
        if self.total > self._due:
            self._look()
        if batch.final:
            if self.usage_only and not self._followers:
                self.close(Outcome.CLIENT_GONE)
        else:
            self._lift()

    def _lift(self) -> None:
        """From now on single events go straight to the only follower, if it has all before them."""
        if len(self._followers) == 1 and not self.over:
            self._live = self._followers[0].live

    def _land(self) -> None:
        """No longer: the follower stands behind all that it was handed."""
        if self._live is not None:
            self._live = None
            self._followers[0].stand(self.end)

    def _look(self) -> None:
        """Let go of what need not be kept, and tell what there is."""
        self._due = self.total + GROWTH
        if self.size > self.bounds.keep:
            self._trim()
        if self._grown is not None:
            self._grown(self)

    def _trim(self) -> None:
        """Let go of the oldest batches that are beyond what is kept and that no follower still needs."""
        needed = self.places
        if self._live is None:
            needed = min((follower.place for follower in self._followers), default=needed)
        self.trim(self.bounds.keep, needed)

    def _note(self, gap: float) -> None:
        """A gap between batches, which may be the longest, or a stall."""
        self._longest = max(self._longest, gap)
        self._stalls += gap > STALL_SECONDS
        self._notable = min(self._longest, STALL_SECONDS)

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
        self._lift()

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
