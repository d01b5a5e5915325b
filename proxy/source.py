"""The chunks of one streamed reply, pulled out of a socket through a decoder.

Strategy: an object rather than a generator, because it owns a socket and must close it even if nobody ever iterates. It reads
only when asked, so a slow client slows the upstream. The idle limit is one timer per stream that looks at the clock when it
fires and moves itself; a timer per chunk would cost more than decoding the chunk.
The one rule: the idle limit counts content, not bytes (pings keep no stream alive), and only while somebody waits for it.
"""

from __future__ import annotations

import asyncio

from proxy.call import Provider
from proxy.decoder import SseDecoder
from proxy.errors import GatewayError, UpstreamTimeout
from proxy.faults import presentable
from proxy.reply import Batch, Item, Trailer
from proxy.transport import UpstreamResponse


class Source:
    """An async iterator of batches. trailer: filled when the decoder has seen the end; it owns the socket.

    idle: seconds without content after which the stream fails. settle: seconds of silence after the last finish reason that
    count as the upstream's end.
    """

    def __init__(
        self, response: UpstreamResponse, decoder: SseDecoder, idle: float | None, settle: float, provider: Provider
    ) -> None:
        self._response = response
        self._decoder = decoder
        self._idle = idle
        self._settle = settle
        self._provider = provider
        self._first: Batch | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self.trailer = Trailer()
        self.trailer.own(self.close)

    async def start(self, opening: bytes) -> None:
        """Read until the first real chunk; raises what went wrong before it."""
        self._first = self._batch(self._decoder.feed(opening)) or await self._next()
        if self._idle is not None and not self._decoder.ended:
            self._timer = self._loop.call_later(self._idle, self._check_idle)

    def close(self) -> None:
        """Close the socket (unless the stream has ended: then it may be reused) and forget the timer. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._decoder.ended:
            self._response.close()

    async def aclose(self) -> None:
        self.close()

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> Batch:
        if (first := self._first) is not None:
            self._first = None
            return first
        if self._decoder.ended:
            raise StopAsyncIteration
        self._waiting_since = self._loop.time()
        batch = await self._next()
        self._waiting_since = None
        return batch

    async def _next(self) -> Batch:
        """The next batch with content; pings and comments are read over. Raises the fault once the chunks before it are out."""
        decoder, read = self._decoder, self._response.read
        settled: float | None = None
        while decoder.fault is None:
            try:
                if decoder.stream.finishing and decoder.finished:
                    settled = settled or self._loop.time() + self._settle
                    async with asyncio.timeout_at(settled):
                        data = await read()
                else:
                    data = await read()
            except TimeoutError:
                self._response.close()
                chunks = decoder.settle()
            except GatewayError as error:
                decoder.fault = UpstreamTimeout("idle", self._idle or 0.0) if self._expired else error
                break
            else:
                chunks = decoder.feed(data) if data else decoder.close()
            batch = self._batch(chunks)
            if batch is not None:
                return batch
        raise presentable(decoder.fault, self._provider)

    def _batch(self, chunks: list[Item]) -> Batch | None:
        """What to hand on, if anything; notices the end."""
        decoder = self._decoder
        if decoder.ended:
            stream = decoder.stream
            self.trailer.usage = stream.usage
            self.trailer.finish_reasons = {index: choice.finish_reason or "stop" for index, choice in stream.choices.items()}
            self._response.done()
        elif decoder.fault is not None:
            self._response.close()
        if not chunks:
            return None
        self.trailer.chunks += len(chunks)
        return Batch(chunks, final=decoder.ended)

    def _check_idle(self) -> None:
        """The one timer: close the socket if the current read has waited too long, else look again when it might have."""
        self._timer = None
        if self._idle is None or self._decoder.ended or self._decoder.fault is not None:
            return
        now = self._loop.time()
        waited = 0.0 if self._waiting_since is None else now - self._waiting_since
        if waited >= self._idle:
            self._expired = True
            self._response.close()
        else:
            self._timer = self._loop.call_at(now - waited + self._idle + 0.001, self._check_idle)
