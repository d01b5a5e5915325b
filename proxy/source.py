"""The chunks of one streamed reply, out of a socket through a decoder: pushed on as they arrive, or pulled.

Strategy: an object rather than a generator, because it owns a socket and must close it even if nobody ever iterates. Pushed, the
decoder runs in the callback that brings the bytes; a reader that is slow pauses the socket. Pulled, it reads only when asked. The
idle limit is one timer per stream that looks at the clock when it fires and moves itself; a timer per chunk would cost more than
decoding the chunk.
The one rule: the idle limit counts content, not bytes (pings keep no stream alive), and only while somebody waits for it.
"""

from __future__ import annotations

import asyncio
from typing import cast

from proxy.call import Provider
from proxy.decoder import SseDecoder
from proxy.errors import GatewayError, UpstreamTimeout
from proxy.faults import presentable
from proxy.reply import Batch, Ended, Item, Receive, Single, Trailer
from proxy.transport import PushingResponse, UpstreamResponse


class Source:
    """A flow of batches. trailer: filled when the decoder has seen the end; it owns the socket.

    idle: seconds without content after which the stream fails. settle: seconds of silence after the last finish reason that
    count as the upstream's end.
    """

    def __init__(
        self, response: UpstreamResponse, decoder: SseDecoder, idle: float | None, settle: float, provider: Provider
    ) -> None:
        self._response = response
        self._pushed = cast(PushingResponse, response) if hasattr(response, "listen") else None
        self._decoder = decoder
        self._idle = idle
        self._settle = settle
        self._provider = provider
        self._first: Batch | None = None
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._waiting_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._expired = False
        self._closed = False
        self._receive: Receive | None = None
        self._single: Single | None = None
        self._ended: Ended | None = None
        self.trailer = Trailer()
        self.trailer.own(self.close)

    async def start(self, opening: bytes) -> None:
        """Read until the first real chunk; raises what went wrong before it."""
        self._first = self._batch(self._decoder.feed(opening)) or await self._next()
        if self._idle is not None and not self._decoder.ended:
            self._timer = self._loop.call_later(self._idle, self._check_idle)

    def close(self) -> None:
        """Close the socket (unless the stream has ended: then it may be reused) and forget the timers. Idempotent."""
        self._closed = True
        for timer in (self._timer, self._settling):
            if timer is not None:
                timer.cancel()
        self._timer = self._settling = self._receive = self._single = self._ended = None
        if not self._decoder.ended:
            self._response.close()

    async def aclose(self) -> None:
        self.close()

    # Pushed

    @property
    def pushes(self) -> bool:
        return self._pushed is not None

    def singly(self, single: Single) -> None:
        self._single = single

    def push(self, receive: Receive, ended: Ended) -> None:
        assert self._pushed is not None
        self._receive, self._ended = receive, ended
        self._waiting_since = self._loop.time()
        if (first := self._first) is not None:
            self._first = None
            receive(first)
        if not self._over():
            self._pushed.listen(self._data, self._http_end)
            self._await_end()

    def pause(self) -> None:
        """A slow reader is not the upstream's silence: the idle limit stands still."""
        self._waiting_since = None
        if self._pushed is not None:
            self._pushed.pause()

    def resume(self) -> None:
        self._waiting_since = self._loop.time()
        if self._pushed is not None and not self._closed:
            self._pushed.resume()

    async def finished(self) -> None:
        """Nothing is left to do."""

    def _data(self, data: bytes) -> None:
        """One network read."""
        decoder, receive, single = self._decoder, self._receive, self._single
        if single is not None and (event := decoder.single(data)) is not None:
            # Most reads of a paced stream.
            now = self._clock()
            if self._waiting_since is not None:
                self._waiting_since = now
            self.trailer.chunks = decoder.stream.sent
            single(event, None, now)
            return
        if receive is None or decoder.ended or decoder.fault is not None:
            return
        chunks = decoder.feed(data)
        if chunks:
            if self._waiting_since is not None:
                self._waiting_since = self._clock()
            if not decoder.ended and decoder.fault is None and not decoder.stream.finishing:
                # The usual read, by the shortest way.
                self.trailer.chunks = decoder.stream.sent
                receive(Batch(chunks))
                return
        batch = self._batch(chunks)
        if batch is not None:
            receive(batch)
        if not self._over():
            self._await_end()

    def _await_end(self) -> None:
        """Behind the last finish reason silence is an end; pings do not put it off."""
        decoder = self._decoder
        if self._settling is None and decoder.stream.finishing and decoder.finished and not self._closed and not decoder.over():
            self._settling = self._loop.call_later(self._settle, self._settled)

    def _http_end(self, error: GatewayError | None) -> None:
        """The HTTP body is over, cleanly or not."""
        decoder = self._decoder
        if self._receive is None or decoder.ended or decoder.fault is not None:
            return
        if error is not None:
            decoder.fault = error
        else:
            self._last(decoder.close())
        self._over()

    def _settled(self) -> None:
        self._settling = None
        self._response.close()
        self._last(self._decoder.settle())
        self._over()

    def _last(self, chunks: list[Item]) -> None:
        batch = self._batch(chunks)
        if batch is not None and self._receive is not None:
            self._receive(batch)

    def _over(self) -> bool:
        """Tell the reader, once, if nothing more will come."""
        decoder, ended = self._decoder, self._ended
        if not decoder.ended and decoder.fault is None:
            return False
        if ended is not None:
            self._ended = None
            ended(None if decoder.fault is None else presentable(decoder.fault, self._provider))
        return True

    # Pulled

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

    # Both

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
        self.trailer.chunks = decoder.stream.sent
        return Batch(chunks, final=decoder.ended)

    def _check_idle(self) -> None:
        """The one timer: close the socket if the current read has waited too long, else look again when it might have."""
        self._timer = None
        if self._idle is None or self._decoder.ended or self._decoder.fault is not None:
            return
        now = self._loop.time()
        waited = 0.0 if self._waiting_since is None else now - self._waiting_since
        if waited < self._idle:
            self._timer = self._loop.call_at(now - waited + self._idle + 0.001, self._check_idle)
            return
        self._expired = True
        self._response.close()
        if self._ended is not None:
            # Nobody is told of a closed socket; a pulled stream hears it from its pending read.
            self._decoder.fault = UpstreamTimeout("idle", self._idle)
            self._over()
