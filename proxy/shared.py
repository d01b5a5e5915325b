"""One call into the pipeline for several clients, or for one that may leave before its reply: each gets a reply of its own.

Strategy: the call runs in a task of its own, so that nobody's leaving ends it for the others. Clients take a seat and wait; when
the head is there, the reply becomes a flight, and each seat gets a follower of it, as do those who come later. What is in hand
at once and whole goes to the only one who waits as it is.
The one rule: of the clients one leads. Its call is the one that is made, and what the reply used is counted for it alone, also
when it has left: by its trailer's `source`, or, where it left before the head, by those who are told that its reply outlived it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from proxy.call import Call, altered
from proxy.errors import GatewayError, Outcome, why_cancelled
from proxy.flight import Bounds, Flight
from proxy.pipeline import Handler
from proxy.reply import Reply

Seat = asyncio.Future[Reply | None]
# About the leader, not about the question: whoever has another scope may be answered otherwise.
PERSONAL = frozenset({Outcome.REFUSED, Outcome.LIMITED, Outcome.BLOCKED})


def without_deadline(call: Call) -> Call:
    """The call for several clients: how long each of them waits in all is that client's own business."""
    if call.deadline is None:
        return call
    return altered(call, deadline=None, limits=replace(call.limits, total=None))


class SharedCall:
    """Made and joined in the event loop's thread. `join(leads=True)` comes first, in the same turn.

    over: called once, when nobody can join any more. left: called when the last client has left before the end, with the outcome
    of its own; it ends the call, or reads on. outlived: told of the call and its reply, where its client left before the head.
    """

    __slots__ = (
        "__weakref__", "_bounds", "_lead", "_left", "_loop", "_outlived", "_seats", "_task", "_told", "_usage_only", "call",
        "flight", "over",
    )  # fmt: skip

    def __init__(
        self,
        call: Call,
        next: Handler,
        bounds: Bounds,
        *,
        over: Callable[[SharedCall], None],
        left: Callable[[SharedCall, Outcome], None] | None = None,
        outlived: Sequence[Callable[[Call, Reply], None]] = (),
    ) -> None:
        self.call = call
        self.flight: Flight | None = None
        self.over = False
        self._bounds = bounds
        self._told = over
        self._left = left
        self._outlived = outlived
        self._usage_only = False
        self._loop = asyncio.get_running_loop()
        self._lead: Seat | None = None
        self._seats: dict[Seat, tuple[Call, float]] = {}
        self._task = self._loop.create_task(self._run(next))

    @property
    def joinable(self) -> bool:
        return not self.over and (self.flight is None or self.flight.joinable)

    async def join(self, call: Call, *, leads: bool = False) -> Reply | None:
        """The client's reply; None where it must ask by itself. Raises what the call raised."""
        if self.flight is not None:
            return self._follower(self.flight, 0.0)
        seat: Seat = self._loop.create_future()
        if leads:
            self._lead = seat
        self._seats[seat] = call, self._loop.time()
        try:
            return await seat
        except asyncio.CancelledError as error:
            await self._leave(seat, why_cancelled(error))
            raise

    def read_on(self, *, usage_only: bool) -> None:
        """Nobody waits for it any more, and it is finished all the same; usage_only: until its usage is known."""
        self._usage_only = usage_only
        if self.flight is not None:
            self.flight.usage_only = usage_only

    def end(self, outcome: Outcome = Outcome.CLIENT_GONE) -> None:
        """End it, whatever its state."""
        if self.flight is not None:
            self.flight.close(outcome)
        else:
            self._task.cancel(outcome)
            self._close()

    # Before the head

    async def _run(self, next: Handler) -> None:
        try:
            reply = await next(without_deadline(self.call))
        except asyncio.CancelledError:
            self._failed(GatewayError("The call was ended.", code="cancelled"))
            raise
        except Exception as error:
            self._failed(error)
        else:
            await self._arrived(reply)

    def _failed(self, error: Exception) -> None:
        self._close()
        seats, told = self._waiting(), error if isinstance(error, GatewayError) else GatewayError("The gateway failed.")
        for seat in seats:
            if seat is self._lead:
                seat.set_exception(error)
            elif told.outcome in PERSONAL and self._seats[seat][0].principal.scope != self.call.principal.scope:
                seat.set_result(None)
            else:
                seat.set_exception(told.again())
        self._seats.clear()

    async def _arrived(self, reply: Reply) -> None:
        seats, head = self._waiting(), reply.head
        # An answer that was there already, or a middleware's own, is each client's to ask for, at its own pace.
        if head.cache == "hit" or head.status != 200 or (reply.whole and seats == [self._lead]):
            self._close()
            for number, seat in enumerate(seats):
                seat.set_result(None if number else reply)
            self._seats.clear()
            if not seats:
                await reply.close(Outcome.CLIENT_GONE)
            return
        flight = Flight(reply, self._bounds, emptied=self._emptied, ended=self._ended, start=False)
        flight.usage_only = self._usage_only
        self.flight = flight
        now = self._loop.time()
        for seat in seats:
            seat.set_result(flight.follow() if seat is self._lead else self._follower(flight, now - self._seats[seat][1]))
        if self._lead not in seats:
            for told in self._outlived:
                told(self.call, reply)
        self._seats.clear()
        flight.start()

    def _waiting(self) -> list[Seat]:
        return [seat for seat in self._seats if not seat.done()]

    async def _leave(self, seat: Seat, why: Outcome) -> None:
        """A client has left before it had its reply."""
        if not seat.cancelled():
            # It came in the same turn.
            if seat.exception() is None and (reply := seat.result()) is not None:
                await reply.close(why)
        elif not self.over and not self._waiting() and (self.flight is None or not self.flight.followers):
            self._empty(why)

    # After it

    def _follower(self, flight: Flight, waited: float) -> Reply | None:
        return flight.follow(head=altered(flight.reply.head, cache="joined", upstream_seconds=waited))

    def _emptied(self, flight: Flight) -> None:
        self._empty(flight.parting or Outcome.CANCELLED)

    def _empty(self, why: Outcome) -> None:
        if self._left is None:
            self.end(why)
        else:
            self._left(self, why)

    def _ended(self, flight: Flight) -> None:
        self._close()

    def _close(self) -> None:
        if not self.over:
            self.over = True
            self._told(self)
