"""A reply out to its client, chunk by chunk: the one place that names the outcome.

Strategy: each batch leaves in one write as soon as it is decoded. A reply that can push is written in the very callback in which
its bytes came, and this task only wakes for the end, or while the client is behind; any other is pulled. The final batch (finish
chunks) is held until what middleware does at the end is done, before the client can turn away; then finish chunks, usage and
`[DONE]` leave in one write.
The one rule: a stream that did not complete never looks complete: it ends with an error chunk, without `[DONE]`.

A slow client slows the upstream: while it is behind, nothing is read for it. One that takes nothing for `write_timeout` is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
import structlog

from proxy.call import Call
from proxy.delivery import Delivery, Response
from proxy.errors import GatewayError, Outcome, UpstreamTimeout
from proxy.faces import Face
from proxy.fold import fold, unfolded
from proxy.http import STREAM_HEADERS
from proxy.keepalive import COMMENT, COMMENT_AMONG_IDS, KeepAlive, told_late
from proxy.reply import IDS, STALL_SECONDS, Batch, Completion, Flow, Reply, Sent, flow_of, push

log = structlog.get_logger("penstock")

Json = dict[str, Any]


class Relay:
    """One reply on its way out. `interrupt` ends it from outside, with an error that the client is told."""

    def __init__(self, delivery: Delivery, call: Call, reply: Reply, face: Face, write_timeout: float) -> None:
        self._delivery = delivery
        self._call = call
        self._reply = reply
        self._face = face
        self._write_timeout = write_timeout
        self._interruption: GatewayError | None = None
        self._flow: Flow | None = None
        self._sent: Batch | bytes | None = None
        self._number: int | None = None
        self._bytes = 0
        self._held = Batch([], final=True)
        self._wake: asyncio.Future[None] | None = None
        self._over = False
        self._error: Exception | None = None
        self._clock = asyncio.get_running_loop().time
        self._last = 0.0
        self._notable = self._longest = 0.0
        self._stalls = 0

    @property
    def buffered(self) -> int:
        """Bytes that were written to the client and that its connection has not yet taken."""
        return self._delivery.buffered

    def interrupt(self, error: GatewayError) -> None:
        """End the stream now: the upstream is closed, and the client gets `error` as its last chunk."""
        self._interruption = error
        self._reply.trailer.release()
        self._ended(error)

    async def run(self, headers: Mapping[str, str]) -> None:
        """Send the reply to its end, whichever it is. Raises GatewayError only as long as nothing was sent."""
        deadline = self._call.deadline
        timer = None if deadline is None else asyncio.get_running_loop().call_at(deadline, self._too_late)
        try:
            if self._reply.head.status != 200:
                await self._own_answer(headers)
            elif self._call.stream and self._call.kind != "embeddings":
                await self._stream(headers)
            else:
                await self._whole(headers)
        except asyncio.CancelledError:
            self._end(Outcome.CLIENT_GONE)
            raise
        except ConnectionError:
            self._end(Outcome.CLIENT_GONE)
            self._delivery.close = True
        except GatewayError as error:
            told = self._interruption or error
            self._end(told.outcome, told)
            raise told from None
        finally:
            if timer is not None:
                timer.cancel()
            await self._reply.close(Outcome.GATEWAY_ERROR)

    def _too_late(self) -> None:
        self.interrupt(UpstreamTimeout("total", self._call.limits.total or 0.0))

    async def _own_answer(self, headers: Mapping[str, str]) -> None:
        """What a middleware answers by itself. A status that comes too late to be told is an error."""
        if self._delivery.begun:
            raise too_late(self._reply.head.status, await self._completion())
        await self._json(self._reply.head.status, await self._completion(), headers)

    async def _whole(self, headers: Mapping[str, str]) -> None:
        await self._json(200, self._face.whole(await self._completion()), headers)

    async def _json(self, status: int, body: Json, headers: Mapping[str, str]) -> None:
        self._delivery.whole(Response(status, orjson.dumps(body), {**headers, "Content-Type": "application/json"}))
        if self._delivery.congested:
            await self._drained()
        self._completed()

    async def _completion(self) -> Completion:
        """The whole reply; folded where the upstream streamed it."""
        batches = [batch async for batch in self._reply.chunks]
        if self._reply.whole:
            return batches[0].chunks[0]
        return fold((chunk for batch in batches for chunk in batch.chunks), self._reply.trailer.usage)

    async def _stream(self, headers: Mapping[str, str]) -> None:
        delivery = self._delivery
        if delivery.begun:
            delivery.write(told_late(headers))
        else:
            delivery.start({**headers, **STREAM_HEADERS})
        self._last = self._clock()
        keepalive = KeepAlive(self._call.options.keepalive_interval, self._spoke, self._comment)
        keepalive.start()
        try:
            try:
                if (flow := flow_of(self._reply.chunks)) is not None:
                    await self._pushed(flow)
                else:
                    await self._pulled()
            finally:
                keepalive.stop()
                self._gaps()
            # The end of the stream and the end of the HTTP body, in one write.
            delivery.end(self._face.last(self._held, self._reply.trailer, self._call.options))
            if delivery.congested:
                await self._drained()
            self._completed()
        except GatewayError as error:
            self._fail(self._interruption or error)
        except ConnectionError:
            raise
        except Exception:
            log.exception("relay failed", id=self._call.id)
            self._fail(GatewayError("The gateway failed while it relayed the stream."))

    # Pushed: batches come by themselves

    async def _pushed(self, flow: Flow) -> None:
        """Relay all batches but the final one; returns when that is held and the reply has run to its end."""
        self._flow = flow
        if self._face.VERBATIM:
            push(flow, self._receive, self._ended, self._single)
        else:
            flow.push(self._receive, self._ended)
        loop = asyncio.get_running_loop()
        while not self._over:
            if self._delivery.congested:
                flow.pause()
                await self._drained()
                flow.resume()
            else:
                self._wake = loop.create_future()
                await self._wake
        if self._error is not None:
            raise self._error
        await flow.finished()

    def _single(self, event: bytes, number: int | None, now: float) -> None:
        """One encoded event, as in most reads of a paced stream: `_receive` without a batch."""
        if self._over:
            return
        if now - self._last > self._notable:
            self._note(now - self._last)
        self._last = now
        self._sent, self._number = event, number
        if number is not None:
            event = IDS[number] + event if number < len(IDS) else b"id: %d\n%b" % (number, event)
        self._bytes += len(event)
        try:
            if self._delivery.write(event):
                self._fell_behind()
        except Exception as error:
            self._ended(error)

    def _receive(self, batch: Batch) -> None:
        if self._over:
            return
        try:
            if self._write(batch):
                self._fell_behind()
        except Exception as error:
            self._ended(error)

    def _fell_behind(self) -> None:
        """At once: a flow may have much in hand, which a client that is behind must not be given all of."""
        assert self._flow is not None
        self._flow.pause()
        self._awake()

    def _ended(self, error: Exception | None) -> None:
        if not self._over:
            self._over = True
            self._error = error
            self._awake()

    def _awake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # Pulled: batches are asked for

    async def _pulled(self) -> None:
        """Relay all batches but the final one, which is held when the iterator has run to its end."""
        async for batch in unfolded(self._reply) if self._reply.whole else self._reply.chunks:
            if self._write(batch):
                await self._drained()

    # Both

    def _write(self, batch: Batch) -> bool:
        """Send a batch, or hold the final one. Is the client behind now?"""
        if batch.final:
            self._held = batch
            return False
        now = self._clock()
        self._note(now - self._last)
        self._last = now
        self._sent, self._number = batch, batch.number
        events = self._face.events(batch)
        self._bytes += len(events)
        return self._delivery.write(events)

    def _note(self, gap: float) -> None:
        """A gap between writes, which may be the longest, or a stall."""
        self._longest = max(self._longest, gap)
        self._stalls += gap > STALL_SECONDS
        self._notable = min(self._longest, STALL_SECONDS)

    def _spoke(self) -> float:
        return self._last

    def _comment(self) -> None:
        """A line for a long silence, unless the client has not even taken what was before it."""
        if not self._delivery.congested:
            self._delivery.write(COMMENT if self._number is None else COMMENT_AMONG_IDS)

    def _gaps(self) -> None:
        trailer = self._reply.trailer
        trailer.silences(self._longest, self._stalls, self._clock() - self._last)
        if trailer.usage is None and (last := self._last_batch()) is not None:
            trailer.sent = Sent(self._bytes, last, len(self._face.events(last)))

    def _last_batch(self) -> Batch | None:
        """What was written last, if anything was."""
        sent = self._sent
        return Batch((sent,), number=self._number) if isinstance(sent, bytes) else sent

    async def _drained(self) -> None:
        """Wait for a client that is behind. One that has taken nothing for `write_timeout` is gone: raises ConnectionError."""
        while True:
            queued = self._delivery.buffered
            try:
                async with asyncio.timeout(self._write_timeout):
                    await self._delivery.drained()
                return
            except TimeoutError:
                if self._delivery.buffered >= queued:
                    self._delivery.abort()
                    raise ConnectionResetError("The client takes nothing.") from None

    def _fail(self, error: GatewayError) -> None:
        """The error chunk instead of an end; the connection is closed behind it."""
        self._end(error.outcome, error)
        self._delivery.close = True
        last = self._last_batch()
        sent = None if last is None else last.chunks[-1]
        self._delivery.end(self._face.failure(error, self._call, sent, self._reply.trailer.number))

    def _completed(self) -> None:
        """The client has all of it; over a seam, if text of several targets was put together."""
        self._end(self._reply.trailer.clean)

    def _end(self, outcome: Outcome, error: GatewayError | None = None) -> None:
        self._reply.trailer.end(outcome, error)


def too_late(status: int, body: Json) -> GatewayError:
    """What is said of a middleware's own answer once the response has begun with status 200; its own error, if it is one."""
    found = body.get("error")
    if isinstance(found, dict) and isinstance(found.get("message"), str):
        kind, code = (str(found.get(name) or "own_answer") for name in ("type", "code"))
        return GatewayError(found["message"], status=status, type=kind, code=code)
    message = f"The answer has status {status}, which can no longer be told: keepalive_after had begun a stream."
    return GatewayError(message, code="answer_too_late")
