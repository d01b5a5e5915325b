"""The batches of a reply that outlives its upstream: when it breaks, another reply's batches follow in the same stream.

Strategy: as long as nothing breaks, each batch costs one reference to what is encoded anyway, pulled or pushed alike. A break is
told in the socket's own callback, which must not wait: it starts a task that asks inward for a further reply and then goes on
pushing (or pumps, where that reply can only be pulled). A puller waits for the same task.
The one rule: the reply that broke hears how it ended at once (its socket, its circuit); the client hears nothing but the seam,
or, where nobody goes on, the error of the break itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from middleware.continuation.remedy import Remedy
from middleware.continuation.said import Said, Sent
from middleware.continuation.seam import Seam
from middleware.continuation.usage import Account
from proxy.errors import GatewayError, Outcome
from proxy.fold import unfolded
from proxy.reply import Batch, Ended, Flow, Receive, Reply, Switch, Trailer, flow_of

log = logging.getLogger("penstock")

# What to do about a break, if anything; and who is asked then: (the remedy, the targets that broke) -> the reply that follows.
Judge = Callable[[Said | None, GatewayError], Remedy | None]
Ask = Callable[[Remedy, Sequence[str]], Awaitable[Reply]]


@dataclass(slots=True)
class _Opening:
    """What a flow pushed before `push` returned. over: that was all of it; error: what broke it then."""

    batches: list[Batch] = field(default_factory=list)
    over: bool = False
    error: Exception | None = None


class Continued:
    """A flow (`proxy.reply.Flow`) over one reply after the other.

    streamed: the client gets chunks as they come; else nothing is handed on before the end, so that all may begin anew. judge:
    asked at each break. ask: gets the reply that follows. most: bytes of events that are kept to go on from.
    """

    def __init__(self, reply: Reply, *, streamed: bool, judge: Judge, ask: Ask, most: int) -> None:
        self._reply = reply
        self._chunks: AsyncIterator[Batch] = reply.chunks
        self._flow = flow_of(reply.chunks)
        self.pushes = streamed and self._flow is not None
        self._streamed = streamed
        self._judge, self._ask = judge, ask
        self._sent = Sent(most)
        self._seam: Seam | None = None
        self._held: list[Batch] = []
        self._gathered = False
        self._account = Account()
        self._before = 0
        self._broken: list[str] = []
        self._task: asyncio.Task[object] | None = None
        self._receive: Receive | None = None
        self._ended: Ended | None = None
        self._opening: _Opening | None = None
        self._paused = False
        self._gate: asyncio.Future[None] | None = None
        self._closed = False
        self.trailer = Trailer()
        self.trailer.own(self.close)
        self.trailer.on_end(self._over_for_good)

    def close(self) -> None:
        """Give up whatever is open or being asked for. Idempotent."""
        self._closed = True
        self._receive = self._ended = None
        if self._task is not None:
            self._task.cancel()
        self._reply.trailer.release()

    async def aclose(self) -> None:
        self.close()
        if self._task is not None and self._task is not asyncio.current_task():
            await asyncio.wait([self._task])  # it may be inside the iterator that is to be closed
        if (aclose := getattr(self._chunks, "aclose", None)) is not None:
            await aclose()

    # Pushed

    def push(self, receive: Receive, ended: Ended) -> None:
        self._receive, self._ended = receive, ended
        assert self._flow is not None
        self._listen(self._flow)

    def pause(self) -> None:
        self._paused = True
        if self._flow is not None:
            self._flow.pause()

    def resume(self) -> None:
        self._paused = False
        if self._flow is not None:
            self._flow.resume()
        if self._gate is not None and not self._gate.done():
            self._gate.set_result(None)

    async def finished(self) -> None:
        if self._flow is not None:
            await self._flow.finished()

    def _listen(self, flow: Flow) -> None:
        """Be pushed to. What comes within the call waits for its end: what broke in its first read was never handed on."""
        self._opening = opening = _Opening()
        flow.push(self._take, self._end)
        self._opening = None
        if (found := self._remedy(opening.error)) is not None:
            self._follow(found)
            return
        for batch in opening.batches:
            self._take(batch)
        if opening.over:
            self._tell(opening.error)
        elif self._paused:
            flow.pause()

    def _take(self, batch: Batch) -> None:
        """One batch of the current reply."""
        if self._opening is not None:
            self._opening.batches.append(batch)
            return
        try:
            seen = self._seen(batch)
        except Exception as error:
            self._tell(error)
            return
        if seen is not None and self._receive is not None:
            self._receive(seen)

    def _end(self, error: Exception | None) -> None:
        """The current reply is over; the client's may not be."""
        if self._opening is not None:
            self._opening.over, self._opening.error = True, error
        elif (found := self._remedy(error)) is not None:
            self._follow(found)
        else:
            self._tell(error)

    def _tell(self, error: Exception | None) -> None:
        if error is None:
            self._settle()
        ended, self._receive, self._ended = self._ended, None, None
        if ended is not None:
            ended(error)

    def _follow(self, found: Remedy) -> None:
        self._broke(found)
        self._flow = None
        self._task = asyncio.get_running_loop().create_task(self._go_on(found))

    async def _go_on(self, found: Remedy) -> None:
        """From a break to the next reply's batches; returns when they push, or after them."""
        if (reply := await self._next(found)) is None:
            self._tell(found.error)
            return
        self._adopt(reply, found)
        try:
            if self._flow is not None:
                self._listen(self._flow)
            else:
                await self._pump()
        except Exception:
            log.exception("going on with a broken reply failed")
            self._tell(found.error)

    async def _pump(self) -> None:
        error: Exception | None = None
        try:
            async for batch in self._chunks:
                self._take(batch)
                while self._paused:
                    self._gate = asyncio.get_running_loop().create_future()
                    await self._gate
        except Exception as raised:
            error = raised
        self._end(error)

    # Pulled

    def __aiter__(self) -> Continued:
        return self

    async def __anext__(self) -> Batch:
        if self._streamed:
            return await self._pulled()
        while not self._gathered:
            try:
                self._held.append(await self._pulled())
            except StopAsyncIteration:
                self._gathered = True
        if not self._held:
            raise StopAsyncIteration
        return self._held.pop(0)

    async def _pulled(self) -> Batch:
        while True:
            try:
                batch = await anext(self._chunks)
            except StopAsyncIteration:
                self._settle()
                raise
            except GatewayError as error:
                if (found := self._remedy(error)) is None:
                    raise
                await self._switch(found)
            else:
                if (seen := self._seen(batch)) is not None:
                    return seen

    async def _switch(self, found: Remedy) -> None:
        """Another reply instead of the one that broke; raises the error of the break where there is none."""
        self._broke(found)
        # A task of its own, so that who closes the reply while its reader waits ends the asking, and not the reader.
        self._task = asking = asyncio.ensure_future(self._next(found))
        try:
            await asyncio.wait([asking])
        except asyncio.CancelledError:
            asking.cancel()
            raise
        reply = None if asking.cancelled() else asking.result()
        if reply is None:
            raise found.error
        self._held.clear()
        self._adopt(reply, found)

    # Both

    def _seen(self, batch: Batch) -> Batch | None:
        """The batch as the client gets it; 0.3 us where nothing broke, most of it in `Sent.add`."""
        self.trailer.chunks = self._before + self._reply.trailer.chunks
        seen = batch if self._seam is None else self._seam.joined(batch)
        if seen is not None and self._streamed and not seen.final:
            self._sent.add(seen)
        return seen

    def _remedy(self, error: Exception | None) -> Remedy | None:
        if self._closed or not isinstance(error, GatewayError):
            return None
        return self._judge(self._sent.said(), error)

    def _broke(self, found: Remedy) -> None:
        """The reply that broke is over: its socket is closed, and its circuit told."""
        trailer = self._reply.trailer
        trailer.end(found.error.outcome, found.error)
        self._broken.append(self._reply.head.target)
        self._before += trailer.chunks

    async def _next(self, found: Remedy) -> Reply | None:
        """The reply that follows, if anybody gives one."""
        try:
            await self._reply.close()
            reply = await self._ask(found, self._broken)
        except GatewayError as error:
            log.info("nobody goes on with a broken reply: %s", error.code)
            return None
        except Exception:
            log.exception("going on with a broken reply failed")
            return None
        if self._closed:
            await reply.close()
            return None
        return reply

    def _adopt(self, reply: Reply, found: Remedy) -> None:
        """From now on `reply` is the one that is read."""
        said, broken = found.said, self._reply
        switch = Switch(broken.head.target, reply.head.target, found.error.outcome.value, len(said.text))
        self.trailer.switches += (switch,)
        if not found.anew:
            self._account.broke(broken, said.text)
        self._seam = Seam(said, switch) if said.id else None
        self._reply = reply
        self._chunks = unfolded(reply) if reply.whole else reply.chunks
        self._flow = flow_of(self._chunks)

    def _settle(self) -> None:
        """The last reply ended cleanly, or for good: what it says at its end is said of all."""
        trailer, last = self.trailer, self._reply.trailer
        trailer.finish_reasons = last.finish_reasons
        trailer.chunks = self._before + last.chunks
        trailer.usage = self._account.total(self._reply)

    def _over_for_good(self, trailer: Trailer) -> None:
        """Everything was closed; the current reply hears the same."""
        self._reply.trailer.end(trailer.outcome or Outcome.GATEWAY_ERROR, trailer.error)
        if trailer.usage is None:
            self._settle()
