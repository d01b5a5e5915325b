"""A reply behind its guardrails: batches in, what may go on out, and one end: the provider's own, or the rules'.

Strategy: it listens to the reply from the beginning, so that the first chunk is in hand, looked at, before there is a reply for
the client; a block until then is a plain 400. What cannot push is pulled by a task; who pulls is given what it pushes. The final
batch waits until every question about the reply is answered, each of which has a timeout.
The one rule: a reply that is blocked ends cleanly, as `content_filter`; its upstream is closed at once, and what was held is
never sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from middleware.guardrails.ends import filtered, finishes, with_findings
from middleware.guardrails.rounds import Gate, Gone
from middleware.guardrails.screen import Screen
from middleware.guardrails.verdict import ContentFiltered, Finding
from proxy.call import Call
from proxy.errors import GatewayError, Outcome
from proxy.reply import Batch, Ended, Item, Pulling, Receive, Reply, flow_of


class Guarded:
    """A flow (`proxy.reply.Flow`). screen: what patterns say. gates: who is asked beside it; the first may hold. found: what the
    request's rules have found so far, shown on the last chunk."""

    pushes = True

    def __init__(self, call: Call, reply: Reply, screen: Screen, found: list[Finding]) -> None:
        self._call, self._reply, self._screen, self._found = call, reply, screen, found
        self._trailer = reply.trailer
        self._flow = flow_of(reply.chunks) or Pulling(reply.chunks)
        self._close_upstream = reply.trailer.so_far()
        self._gates: Sequence[Gate] = ()
        self._holding: Gate | None = None
        self._ready: deque[Batch] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._receive: Receive | None = None
        self._ended: Ended | None = None
        self._final: Batch | None = None
        self._comment = b""
        self._latest = Batch([])
        self._started = self._inner_over = self._ending = False
        self._over = self._cut = self._closed = False
        self._error: Exception | None = None
        self._asked_to_wait = False
        self._trailer.own(self._close)

    def gated(self, gates: Sequence[Gate], holding: Gate | None) -> None:
        self._gates, self._holding = gates, holding

    async def start(self) -> None:
        """Until the first chunk may go, all of them for a client that does not stream. Raises what the reply ends in before that,
        `ContentFiltered` among it."""
        self._flow.push(self._take, self._inner_ended)
        while not self._over and not (self._ready and self._call.stream):
            await self._woken()
        if self._error is not None and not self._ready:
            raise self._error
        self._started = True
        if not self._over:
            self._hold_on()

    # In

    def _take(self, batch: Batch) -> None:
        if self._over or self._cut or self._closed:
            return
        try:
            self._see(batch)
        except Exception as error:
            self._close_upstream()
            self._end(error)

    def _see(self, batch: Batch) -> None:
        self._comment += batch.comment
        items = self._screen.see(batch)
        if self._screen.blocked:
            if self._holding is None:
                self._hand_on(items)
            self._block()
            return
        if batch.final:
            # What was held goes before the end, which is all that waits.
            ends = next((number for number, item in enumerate(items) if finishes(item)), len(items))
            self._final = Batch(items[ends:], final=True)
            items = items[:ends]
        if self._holding is not None:
            self._holding.holds_back(items)
        else:
            self._hand_on(items)
        for gate in self._gates:
            gate.turn(over=batch.final)
        self._try_to_end()

    def _inner_ended(self, error: Exception | None) -> None:
        if error is not None:
            self._end(self._screen.fault(error))
        self._inner_over = True
        self._try_to_end()

    # Out

    def gone(self, gone: Gone) -> None:
        """A gate's round is over."""
        if self._over or self._closed:
            return
        if gone.finding is not None:
            self._block()
            return
        self._hand_on(gone.items)
        self._try_to_end()

    def _hand_on(self, items: list[Item]) -> None:
        if items:
            comment, self._comment = self._comment, b""
            batch = Batch(items, comment=comment)
            self._pass(batch)

    def _pass(self, batch: Batch) -> None:
        self._latest = batch
        if self._receive is not None:
            self._receive(batch)
            return
        self._ready.append(batch)
        if self._call.stream:
            self._hold_on()
        self._awake()

    def _try_to_end(self) -> None:
        """The final batch goes when nobody is being asked, and the end behind it when the reply's own is in: what middleware
        further in does at a clean end comes first."""
        if self._cut or self._over or not all(gate.idle for gate in self._gates):
            return
        if self._final is not None:
            final, self._final = self._final, None
            self._pass(Batch(with_findings(final.items, self._found), final=True, comment=self._comment))
            self._ending = True
        if self._ending and self._inner_over:
            self._end(None)

    def _block(self) -> None:
        """Nothing more goes on. The upstream is closed, the trailer filled."""
        self._cut = True
        finding = next(found for found in reversed(self._found) if found.action == "block" and found.on == "output")
        self._close_upstream()
        if not self._started or not self._call.stream:
            self._ready.clear()
            self._end(ContentFiltered(finding))
            return
        trailer, call = self._trailer, self._call
        ends = filtered(call, self._latest.chunks[-1], self._found)
        trailer.finish_reasons = dict.fromkeys(range(len(ends)), "content_filter")
        trailer.clean_end = Outcome.FILTERED
        self._pass(Batch(ends, final=True))
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._over:
            return
        self._over, self._error = True, error
        for gate in self._gates:
            gate.close()
        if self._ended is not None:
            ended, self._ended, self._receive = self._ended, None, None
            ended(error)
        self._awake()

    # Pushed

    def push(self, receive: Receive, ended: Ended) -> None:
        self._receive, self._ended = receive, ended
        while self._ready and self._receive is not None:
            receive(self._ready.popleft())
        if self._over:
            if self._ended is not None:
                self._ended = self._receive = None
                ended(self._error)
        elif not self._asked_to_wait:
            self._go_on()

    def pause(self) -> None:
        self._asked_to_wait = True
        self._hold_on()

    def resume(self) -> None:
        self._asked_to_wait = False
        self._go_on()

    async def finished(self) -> None:
        if not self._cut:
            await self._flow.finished()

    def _hold_on(self) -> None:
        if not self._over:
            self._flow.pause()

    def _go_on(self) -> None:
        if not self._over and not self._closed:
            self._flow.resume()

    # Pulled

    def __aiter__(self) -> Guarded:
        return self

    async def __anext__(self) -> Batch:
        while not self._ready and not self._over:
            self._go_on()
            if not self._ready and not self._over:
                await self._woken()
        if self._ready:
            return self._ready.popleft()
        if self._error is not None:
            raise self._error
        await self.finished()
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._close()
        if isinstance(self._flow, Pulling):
            await self._flow.gone()
        if (aclose := getattr(self._reply.chunks, "aclose", None)) is not None:
            await aclose()

    async def _woken(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake

    def _awake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _close(self) -> None:
        """Nothing more goes out, and nobody is asked. Idempotent."""
        self._closed = True
        self._receive = self._ended = None
        for gate in self._gates:
            gate.close()
        if isinstance(self._flow, Pulling):
            self._flow.cancel()
        if not self._over:
            self._over, self._error = True, GatewayError("The stream was closed before its end.")
            self._awake()
