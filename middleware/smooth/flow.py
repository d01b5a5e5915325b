"""A stream whose batches wait a little on their way: in at the moment they come, out when they are due.

Strategy: what comes in is held (`waiting`), and one timer per stream, set only while something waits, lets it out. It pushes,
whatever it reads from: a flow pushes into it, anything else is pulled by a task. Who pulls it is given what it pushes, through a
short queue.
The one rule: the first chunk and the end never wait. With the final batch, or an error, everything that is held leaves at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from middleware.smooth.waiting import GRAIN, Waiting
from proxy.errors import GatewayError
from proxy.reply import Batch, Ended, Pulling, Receive, Trailer, flow_of

# Who pulls is given this many batches in advance, then the upstream is paused.
AHEAD = 4


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """What an event loop knows of time."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer: ...


class Smoothed:
    """A flow of batches (see `proxy.reply.Flow`). trailer: of the reply; it owns the timer and the task. clock: the loop."""

    pushes = True

    def __init__(self, chunks: AsyncIterator[Batch], waiting: Waiting, trailer: Trailer, clock: Clock | None = None) -> None:
        self._chunks = chunks
        self._flow = flow_of(chunks) or Pulling(chunks)
        self._waiting = waiting
        self._clock = clock or asyncio.get_running_loop()
        self._timer: Timer | None = None
        self._receive: Receive | None = None
        self._ended: Ended | None = None
        self._paused = False
        self._closed = False
        # Where it is pulled.
        self._out: _Queue | None = None
        trailer.own(self._close)

    # Pushed

    def push(self, receive: Receive, ended: Ended) -> None:
        self._receive, self._ended = receive, ended
        self._flow.push(self._take, self._over)

    def pause(self) -> None:
        self._paused = True
        self._stop_timer()
        self._flow.pause()

    def resume(self) -> None:
        self._paused = False
        self._let_out()
        self._flow.resume()

    async def finished(self) -> None:
        await self._flow.finished()

    def _take(self, batch: Batch) -> None:
        """A batch has come. Numbered ones have their numbers written down elsewhere, and a comment stands before its own events:
        these pass as they are."""
        if batch.final or batch.number is not None or batch.comment:
            self._let_all_out()
            self._hand_on(batch)
            return
        now = self._clock.time()
        try:
            self._waiting.hold(batch, now)
        except Exception as error:
            self._over(error)
            return
        if self._timer is None or (self._waiting.due() or now) <= now:
            self._let_out()

    def _over(self, error: Exception | None) -> None:
        self._let_all_out()
        ended, self._ended, self._receive = self._ended, None, None
        if ended is not None:
            ended(error)

    def _let_out(self) -> None:
        """What is due, and the timer for the rest."""
        self._stop_timer()
        due = self._waiting.due()
        if due is None or self._paused or self._closed:
            return
        now = self._clock.time()
        if due <= now + GRAIN:
            self._hand_on(Batch(self._waiting.take(now)))
            due = self._waiting.due()
        # The reader may have paused or closed meanwhile.
        if due is not None and not self._paused and not self._closed:
            self._timer = self._clock.call_at(due, self._let_out)

    def _let_all_out(self) -> None:
        self._stop_timer()
        if items := self._waiting.take_all():
            self._hand_on(Batch(items))

    def _hand_on(self, batch: Batch) -> None:
        if self._receive is not None and not self._closed:
            self._receive(batch)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        """Nothing more goes out. Idempotent."""
        self._closed = True
        self._stop_timer()
        self._receive = self._ended = None
        if isinstance(self._flow, Pulling):
            self._flow.cancel()
        if self._out is not None:
            self._out.end(GatewayError("The stream was closed before its end."))

    # Pulled

    def __aiter__(self) -> Smoothed:
        return self

    async def __anext__(self) -> Batch:
        if self._out is None:
            self._out = _Queue(self)
            self.push(self._out.put, self._out.end)
        batch = await self._out.get()
        if batch is None:
            await self.finished()
            await self.aclose()
            raise StopAsyncIteration
        return batch

    async def aclose(self) -> None:
        self._close()
        if isinstance(self._flow, Pulling):
            await self._flow.gone()
        if (aclose := getattr(self._chunks, "aclose", None)) is not None:
            await aclose()


class _Queue:
    """What was pushed and has not been asked for. flow: is paused while that is much."""

    def __init__(self, flow: Smoothed) -> None:
        self._flow = flow
        self._ready: deque[Batch] = deque()
        self._asked: asyncio.Future[None] | None = None
        self._over = False
        self._error: Exception | None = None

    def put(self, batch: Batch) -> None:
        self._ready.append(batch)
        if len(self._ready) >= AHEAD:
            self._flow.pause()
        self._wake()

    def end(self, error: Exception | None) -> None:
        if not self._over:
            self._over, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)

    async def get(self) -> Batch | None:
        """The next one; None at a clean end. Raises what broke the stream."""
        while not self._ready and not self._over:
            self._flow.resume()
            if not self._ready and not self._over:
                self._asked = asyncio.get_running_loop().create_future()
                await self._asked
        if self._ready:
            return self._ready.popleft()
        if self._error is not None:
            raise self._error
        return None
