"""Flows: iterators of batches that can also push, and looking at batches on their way (`tapped`).

Strategy: a reader gets a batch in the callback in which its bytes came; what lies between upstream and reader is called, not
woken. A single encoded event may come without a batch around it, to whoever asks for that.
The one rule: pushed or pulled, a reader gets the same batches in the same order, and one end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, cast

from proxy.errors import GatewayError
from proxy.reply.batch import Batch

Receive = Callable[[Batch], None]
Single = Callable[[bytes, int | None, float], None]
Ended = Callable[[Exception | None], None]


class Flow(Protocol):
    """An iterator of batches that can also push: each batch reaches its reader in the very callback in which its bytes came, and
    no task is woken per read (9 us per paced chunk). Either it is iterated or it is pushed, not both.

    pushes: False where what it reads from can only be pulled.
    """

    @property
    def pushes(self) -> bool: ...

    def push(self, receive: Receive, ended: Ended) -> None:
        """From now on `receive(batch)` for every batch, at once for those that are in hand; then `ended(None)`, or `ended(error)`
        with what broke the stream. After the reply was closed neither is called."""
        ...

    def pause(self) -> None:
        """The reader is slow: nothing is to be read of the upstream until `resume`."""
        ...

    def resume(self) -> None: ...

    async def finished(self) -> None:
        """What middleware does after a clean end (`Tapped`); the reader awaits it before it hands on the final batch."""
        ...


class SingleFlow(Flow, Protocol):
    """A flow that can hand over a single event without a batch around it, which is most of what a paced chunk costs here."""

    def singly(self, single: Single) -> None:
        """Said before `push`: an encoded event that would come alone, as `receive(Batch([event], number=number))`, comes as
        `single(event, number, now)` instead, with the loop's time; all else comes as ever."""
        ...


def push(flow: Flow, receive: Receive, ended: Ended, single: Single) -> None:
    """`flow.push`, for a reader that takes single events as well, if this flow has them."""
    if hasattr(flow, "singly"):
        cast(SingleFlow, flow).singly(single)
    flow.push(receive, ended)


def flow_of(chunks: AsyncIterator[Batch]) -> Flow | None:
    """The iterator as a flow, if it can push."""
    return cast(Flow, chunks) if getattr(chunks, "pushes", False) else None


class Pulling:
    """What can only be pulled, as a flow: a task reads it and hands each batch on. Whoever makes it closes the iterator."""

    pushes = True

    def __init__(self, chunks: AsyncIterator[Batch]) -> None:
        self._chunks = chunks
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._resumed: asyncio.Future[None] | None = None

    def push(self, receive: Receive, ended: Ended) -> None:
        self._task = asyncio.get_running_loop().create_task(self._pull(receive, ended))

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)

    async def finished(self) -> None:
        """An iterator does at its own end what there is to do."""

    def cancel(self) -> None:
        """Read no further. Idempotent."""
        if self._task is not None:
            self._task.cancel()

    async def gone(self) -> None:
        """Until the task is over; at once for the task itself."""
        if self._task is not None and self._task is not asyncio.current_task():
            await asyncio.gather(self._task, return_exceptions=True)

    async def _pull(self, receive: Receive, ended: Ended) -> None:
        try:
            async for batch in self._chunks:
                receive(batch)
                while self._paused:
                    self._resumed = asyncio.get_running_loop().create_future()
                    await self._resumed
        except Exception as error:
            ended(error)
        else:
            ended(None)


class Tapped:
    """Batches that are looked at on their way, pulled or pushed alike. Made by `tapped`."""

    def __init__(
        self,
        chunks: AsyncIterator[Batch],
        see: Callable[[Batch], Batch | None],
        finish: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._chunks = chunks
        self._see = see
        self._finish = finish
        self._flow = flow_of(chunks)
        self._receive: Receive | None = None
        self._ended: Ended | None = None
        self._over = False
        self._cut = False
        self._last: Batch | None = None

    def end(self, last: Batch) -> None:
        """End the stream now, cleanly, from outside `see` (by a timer): `last` is its final batch. What lies further in has been
        closed (`Trailer.so_far`), so that a read that is pending is over, too.
        """
        if self._over or self._cut:
            return
        self._cut = True
        if self._receive is None or self._ended is None:
            self._last = last
        else:
            self._over = True
            self._receive(last)
            self._ended(None)

    def __aiter__(self) -> Tapped:
        return self

    async def __anext__(self) -> Batch:
        while not self._over:
            try:
                if self._cut:
                    return self._at_the_cut()
                batch = await anext(self._chunks)
                if not self._cut and (seen := self._see(batch)) is not None:
                    self._cut = seen.final and not batch.final
                    return seen
            except StopAsyncIteration:
                await self.aclose()
                if self._finish is not None:
                    await self._finish()
            except GatewayError:
                if self._last is None:
                    await self.aclose()
                    raise
            except BaseException:
                await self.aclose()
                raise
        raise StopAsyncIteration

    def _at_the_cut(self) -> Batch:
        if self._last is None:
            raise StopAsyncIteration
        last, self._last = self._last, None
        return last

    async def aclose(self) -> None:
        self._over = True
        if (aclose := getattr(self._chunks, "aclose", None)) is not None:
            await aclose()

    @property
    def pushes(self) -> bool:
        return self._flow is not None

    def push(self, receive: Receive, ended: Ended) -> None:
        assert self._flow is not None
        self._receive, self._ended = receive, ended
        see = self._see

        def passed(batch: Batch) -> None:
            if self._over:
                return
            try:
                seen = see(batch)
            except Exception as error:
                self._over = True
                ended(error)
            else:
                if seen is None:
                    return
                if seen.final and not batch.final:
                    self._over = self._cut = True
                    receive(seen)
                    ended(None)
                else:
                    receive(seen)

        def over(error: Exception | None) -> None:
            if not self._over:
                self._over = True
                ended(error)

        self._flow.push(passed, over)

    def pause(self) -> None:
        if self._flow is not None:
            self._flow.pause()

    def resume(self) -> None:
        if self._flow is not None:
            self._flow.resume()

    async def finished(self) -> None:
        """What lies further in has had no end where the stream was cut here."""
        if self._flow is not None and not self._cut:
            await self._flow.finished()
        if self._finish is not None:
            await self._finish()


def tapped(
    chunks: AsyncIterator[Batch],
    see: Callable[[Batch], Batch | None],
    finish: Callable[[], Awaitable[None]] | None = None,
) -> Tapped:
    """`chunks`, each shown to `see` on its way. This is how a middleware looks at chunks without slowing them down.

    see: called synchronously for every batch in order; returns it, another one, or None to swallow it. It may raise: that ends
    the stream with that error (a GatewayError tells the client). A final batch in place of one that is not ends the stream there,
    cleanly; `see` has then closed what lies further in (`Trailer.so_far`) and named the end (`Trailer.clean_end`).
    finish: awaited once after a clean end, before the client gets the final batch; inner taps first, unless they had no end.
    """
    return Tapped(chunks, see, finish)
