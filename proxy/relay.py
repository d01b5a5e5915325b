"""A reply out to its client, chunk by chunk: the one place that names the outcome.

Strategy: each batch leaves in one write as soon as it is decoded. The final batch (finish chunks) is held until the iterator has
run to its end, so that what middleware does after its loop is done before the client can turn away; then finish chunks, usage
and `[DONE]` leave in one write.
The one rule: a stream that did not complete never looks complete: it ends with an error chunk, without `[DONE]`.

A slow client slows the upstream, because every write is awaited. One that takes nothing for `write_timeout` is noticed by one
timer per stream that looks at the clock when it fires (`_Patience`), never by a timer per write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import orjson
import structlog
from aiohttp import web

from proxy.call import Call
from proxy.errors import GatewayError, Outcome, UpstreamTimeout
from proxy.faces import Face
from proxy.fold import fold, unfold
from proxy.reply import Batch, Completion, Reply

log = structlog.get_logger("penstock")

STALL_SECONDS = 1.0
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Relay:
    """One reply on its way out. `interrupt` ends it from outside, with an error that the client is told."""

    def __init__(self, request: web.BaseRequest, call: Call, reply: Reply, face: Face, write_timeout: float) -> None:
        self._request = request
        self._call = call
        self._reply = reply
        self._face = face
        self._interruption: GatewayError | None = None
        self._sent: Batch | None = None
        self._patience = _Patience(request, write_timeout)

    @property
    def buffered(self) -> int:
        """Bytes that were written to the client and that its connection has not yet taken."""
        transport = self._request.transport
        return transport.get_write_buffer_size() if transport is not None else 0

    def interrupt(self, error: GatewayError) -> None:
        """End the stream now: the upstream is closed, and the client gets `error` as its last chunk."""
        self._interruption = error
        self._reply.trailer.release()

    async def run(self, headers: Mapping[str, str]) -> web.StreamResponse:
        """Send the reply to its end, whichever it is. Raises GatewayError only as long as nothing was sent."""
        loop = asyncio.get_running_loop()
        deadline = self._call.deadline
        timer = None if deadline is None else loop.call_at(deadline, self._too_late)
        try:
            if self._call.stream and self._call.kind != "embeddings":
                return await self._stream(headers)
            return await self._whole(headers)
        except asyncio.CancelledError:
            self._end(Outcome.CLIENT_GONE)
            raise
        except GatewayError as error:
            told = self._interruption or error
            self._end(told.outcome, told)
            raise told from None
        finally:
            if timer is not None:
                timer.cancel()
            self._patience.stop()
            await self._reply.close(Outcome.GATEWAY_ERROR)

    def _too_late(self) -> None:
        self.interrupt(UpstreamTimeout("total", self._call.limits.total or 0.0))

    async def _whole(self, headers: Mapping[str, str]) -> web.StreamResponse:
        completion = await self._completion()
        body = orjson.dumps(self._face.whole(completion))
        response = web.Response(body=body, headers={**headers, "Content-Type": "application/json"})
        await self._deliver(response)
        self._end(Outcome.COMPLETED)
        return response

    async def _deliver(self, response: web.Response) -> None:
        self._patience.start()
        self._patience.writing()
        await response.prepare(self._request)
        await response.write_eof()
        self._patience.written()

    async def _completion(self) -> Completion:
        """The whole reply; folded where the upstream streamed it."""
        batches = [batch async for batch in self._reply.chunks]
        if self._reply.whole:
            return batches[0].chunks[0]
        return fold((chunk for batch in batches for chunk in batch.chunks), self._reply.trailer.usage)

    async def _stream(self, headers: Mapping[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={**headers, **STREAM_HEADERS})
        self._patience.start()
        try:
            await response.prepare(self._request)
            held = await self._chunks(response)
            # The end of the stream and the end of the HTTP body, in one write.
            self._patience.writing()
            await response.write_eof(self._face.last(held, self._reply.trailer, self._call.options))
            self._end(Outcome.COMPLETED)
            return response
        except GatewayError as error:
            await self._fail(response, self._interruption or error)
        except (ConnectionError, TimeoutError):
            self._end(Outcome.CLIENT_GONE)
            response.force_close()
            return response
        except Exception:
            log.exception("relay failed", id=self._call.id)
            await self._fail(response, GatewayError("The gateway failed while it relayed the stream."))
        await self._finish(response)
        return response

    async def _chunks(self, response: web.StreamResponse) -> Batch:
        """Relay all batches but the final one, which is returned when the iterator has run to its end."""
        held = Batch([], final=True)
        events, write, patience = self._face.events, response.write, self._patience
        clock = patience.clock
        longest, stalls, last = 0.0, 0, clock()
        try:
            async for batch in _unfolded(self._reply) if self._reply.whole else self._reply.chunks:
                if batch.final:
                    held = batch
                    continue
                self._sent = batch
                patience.since = now = clock()
                if (gap := now - last) > longest:
                    longest = gap
                if gap > STALL_SECONDS:
                    stalls += 1
                last = now
                await write(events(batch))
                patience.since = None
            return held
        finally:
            # The silence before the end is a gap too: a stream that timed out had its longest there.
            gap, trailer = clock() - last, self._reply.trailer
            trailer.longest_gap, trailer.stalls = max(longest, gap), stalls + (gap > STALL_SECONDS)

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        self._patience.writing()
        await response.write(data)
        self._patience.written()

    async def _fail(self, response: web.StreamResponse, error: GatewayError) -> None:
        """The error chunk instead of an end; the connection is closed behind it."""
        self._end(error.outcome, error)
        response.force_close()
        try:
            await self._write(response, self._face.failure(error, self._call, self._sent.chunks[-1] if self._sent else None))
        except (ConnectionError, TimeoutError):
            return

    async def _finish(self, response: web.StreamResponse) -> None:
        try:
            await response.write_eof()
        except (ConnectionError, TimeoutError):
            response.force_close()

    def _end(self, outcome: Outcome, error: GatewayError | None = None) -> None:
        self._reply.trailer.end(outcome, error)


async def _unfolded(reply: Reply) -> AsyncIterator[Batch]:
    """A whole reply as the chunks of a stream."""
    async for batch in reply.chunks:
        content, finish, reply.trailer.usage = unfold(batch.chunks[0])
        yield Batch(content)
        yield Batch(finish, final=True)


class _Patience:
    """Ends a connection whose client takes nothing: one timer per stream, moved by looking at the clock when it fires.

    since: when the pending write began, None while none is pending.
    """

    def __init__(self, request: web.BaseRequest, seconds: float) -> None:
        self._request = request
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        self.since: float | None = None
        self._looked = 0.0
        self._queued = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_later(self._seconds, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def writing(self) -> None:
        self.since = self.clock()

    def written(self) -> None:
        self.since = None

    def _check(self) -> None:
        """The timer: what is queued must have shrunk since the last look, or the write must be younger than the limit."""
        transport = self._request.transport
        queued = transport.get_write_buffer_size() if transport is not None else 0
        now = self.clock()
        if self.since is None or queued != self._queued:
            self._queued = queued
            self._looked = now
        waited = 0.0 if self.since is None else now - max(self.since, self._looked)
        if waited < self._seconds:
            self._timer = self._loop.call_later(self._seconds - waited + 0.001, self._check)
        elif transport is not None:
            transport.abort()
