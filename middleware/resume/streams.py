"""The streams that are kept: from when they begin until nobody can want them any more.

Life of a stream: (waiting for its head, in the background) · running, with readers or for `grace` without · over, for `keep`.
Strategy: each stream is a flight that reads its reply whoever follows; here are its timers and the bounds on memory. Beyond
`max_bytes` the streams that are over go first, the oldest before the others; then running ones let go of their beginnings.
The one rule: memory is bounded at every moment by what was counted; a bound never breaks the stream of a reader who keeps up.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from functools import partial
from operator import attrgetter

from proxy.call import Call, Route, altered
from proxy.errors import Draining, GatewayError, Outcome, UpstreamTimeout, why_cancelled
from proxy.flight import GROWTH, Bounds, Flight
from proxy.fold import unfolded
from proxy.pipeline import Handler
from proxy.reply import Head, Reply
from proxy.timers import Expiry, after

log = logging.getLogger("penstock")

# What a stream takes beside its events: call, reply, decoder, timers.
STREAM_BYTES = 4096
# An event of 200 bytes takes 250 in memory, with its place; one of 50, or one that came decoded, up to twice its bytes.
EVENT_FACTOR = 2


class Stream:
    """One kept stream. scope: whose it is. call: in which form it is written to readers, without what only the provider needed.

    flight: None while its head is awaited. failed: what came instead of a head. waiting: readers who wait for the head.
    size: bytes that it takes, as counted in the total.
    """

    __slots__ = ("call", "ending", "expiry", "failed", "flight", "head", "id", "ready", "scope", "size", "task", "waiting")

    def __init__(self, call: Call) -> None:
        self.id = f"str_{secrets.token_urlsafe(24)}"
        self.scope = call.principal.scope
        request = {"n": call.request["n"]} if "n" in call.request else {}
        self.call = altered(
            call, request=request, stream=True, deadline=None, headers={}, extensions={}, targets=(), target=None,
            route=Route(None, ()),
        )  # fmt: skip
        self.flight: Flight | None = None
        self.failed: GatewayError | None = None
        self.head = Head("")
        self.ready = asyncio.Event()
        self.waiting = 0
        self.size = STREAM_BYTES
        self.task: asyncio.Task[None] | None = None
        self.expiry: Expiry | None = None
        self.ending: asyncio.TimerHandle | None = None

    @property
    def over(self) -> bool:
        return self.failed is not None or (self.flight is not None and self.flight.over)

    @property
    def readers(self) -> int:
        return self.waiting + (self.flight.followers if self.flight is not None else 0)


class Streams:
    """All of them. grace: seconds that one is read on without readers. keep: seconds that one stays after its end.

    max_bytes: of memory for all; max_stream_bytes: for one, which then lets go of its oldest events.
    """

    def __init__(self, grace: float, keep: float, max_bytes: int, max_stream_bytes: int) -> None:
        self._grace = grace
        self._keep = keep
        self._most = max_bytes
        self._bounds = Bounds(keep=max_stream_bytes // EVENT_FACTOR)
        self._streams: dict[str, Stream] = {}
        self.bytes = 0
        self.counts: Counter[str] = Counter()

    def all(self) -> list[Stream]:
        return list(self._streams.values())

    def find(self, identity: str) -> Stream | None:
        return self._streams.get(identity)

    # Beginning

    def open(self, call: Call) -> Stream:
        stream = Stream(call)
        self._streams[stream.id] = stream
        self.counts["streams"] += 1
        self._count(stream.size)
        return stream

    def begin(self, call: Call, stream: Stream, next: Handler) -> None:
        """Make the call in a task of its own; the stream's readers get the reply, or what comes instead."""
        stream.task = asyncio.get_running_loop().create_task(self._answered(call, stream, next))
        self._watch(stream)

    async def _answered(self, call: Call, stream: Stream, next: Handler) -> None:
        task, timer = stream.task, None
        assert task is not None
        if call.deadline is not None:
            timer = asyncio.get_running_loop().call_at(call.deadline, task.cancel, Outcome.TIMEOUT_TOTAL)
        try:
            reply = await next(call)
        except GatewayError as error:
            self._fail(stream, error)
        except asyncio.CancelledError as error:
            self._fail(stream, _ended(call, why_cancelled(error)))
        except Exception:
            log.exception("a stream in the background failed")
            self._fail(stream, GatewayError("The gateway failed on this request."))
        else:
            if stream.over:
                await reply.close()
            else:
                self.fly(call, stream, reply)
        finally:
            if timer is not None:
                timer.cancel()

    def fly(self, call: Call, stream: Stream, reply: Reply) -> Flight:
        """The reply has begun: it is read to its end from here on. The call's deadline is that of the stream, of no reader."""
        if reply.whole:
            reply = altered(reply, chunks=unfolded(reply), whole=False)
        stream.head = altered(reply.head, headers={**reply.head.headers, "X-Stream-Id": stream.id})
        if call.deadline is not None:
            stop = partial(self.end, stream, _ended(call, Outcome.TIMEOUT_TOTAL))
            stream.ending = asyncio.get_running_loop().call_at(call.deadline, stop)
        watch, over = partial(self._left, stream), partial(self._over, stream)
        grown = partial(self._grown, stream)
        stream.flight = flight = Flight(reply, self._bounds, numbered=True, emptied=watch, grown=grown, ended=over)
        stream.ready.set()
        return flight

    # Readers

    def attend(self, stream: Stream) -> None:
        """Somebody reads it: it need not be given up."""
        if not stream.over and stream.expiry is not None:
            stream.expiry.cancel()
            stream.expiry = None

    async def head(self, stream: Stream) -> None:
        """Wait until the stream has begun, or failed."""
        self.attend(stream)
        stream.waiting += 1
        try:
            await stream.ready.wait()
        finally:
            stream.waiting -= 1
            if not stream.readers and not stream.over:
                self._watch(stream)

    def _left(self, stream: Stream, flight: Flight) -> None:
        if not stream.waiting:
            self._watch(stream)

    def _watch(self, stream: Stream) -> None:
        """Nobody reads it: it is given up after a while."""
        self.attend(stream)
        stream.expiry = after(self._grace, partial(self._abandon, stream))

    def _abandon(self, stream: Stream) -> None:
        stream.expiry = None
        if not stream.over and not stream.readers:
            self.counts["abandoned"] += 1
            message = f"Nobody read the stream for {self._grace:g} s, so it was ended."
            error = GatewayError(message, code="stream_abandoned")
            error.outcome = Outcome.CLIENT_GONE
            self.end(stream, error)

    # Ends

    def end(self, stream: Stream, error: GatewayError) -> None:
        """End it from outside, if it is not over: the upstream is closed, readers get the error."""
        if stream.over:
            return
        if stream.flight is not None:
            stream.flight.close(error.outcome, error)
        else:
            self._fail(stream, error)
        if stream.task is not None and not stream.task.done():
            stream.task.cancel(error.outcome)

    def forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            self.bytes -= stream.size
        if stream.expiry is not None:
            stream.expiry.cancel()

    def close(self) -> None:
        """The gateway stops: what still runs ends as draining."""
        for stream in self.all():
            self.end(stream, Draining("The gateway is shutting down."))
            self.forget(stream)

    def _fail(self, stream: Stream, error: GatewayError) -> None:
        """It ended before it began."""
        if not stream.over:
            stream.failed = error
            stream.ready.set()
            self._kept(stream)

    def _over(self, stream: Stream, flight: Flight) -> None:
        if stream.ending is not None:
            stream.ending.cancel()
        self._grown(stream, flight)
        self._kept(stream)

    def _kept(self, stream: Stream) -> None:
        """It is over: it stays for those who come back, for a while."""
        if stream.expiry is not None:
            stream.expiry.cancel()
        stream.expiry = after(self._keep, partial(self._expire, stream, "age")) if stream.id in self._streams else None

    def _expire(self, stream: Stream, why: str) -> None:
        self.counts[f"expired_{why}"] += 1
        self.forget(stream)

    # Memory

    def _grown(self, stream: Stream, flight: Flight) -> None:
        """While it runs, what it may grow by before the next call is counted already."""
        more = 0 if flight.over else GROWTH
        before, stream.size = stream.size, (flight.size + more) * EVENT_FACTOR + STREAM_BYTES
        self._count(stream.size - before)

    def _count(self, more: int) -> None:
        self.bytes += more
        if self.bytes > self._most:
            self._shrink()

    def _shrink(self) -> None:
        """Make room: to nine tenths, so that it is not done for every batch."""
        wanted = self._most * 9 // 10
        for stream in [stream for stream in self._streams.values() if stream.over]:
            if self.bytes <= wanted:
                return
            self._expire(stream, "size")
        for stream in sorted(self._streams.values(), key=attrgetter("size"), reverse=True):
            if self.bytes <= wanted:
                return
            if (flight := stream.flight) is None:
                continue
            flight.keep(flight.size // 2)
            before, stream.size = stream.size, (flight.size + GROWTH) * EVENT_FACTOR + STREAM_BYTES
            self.bytes += stream.size - before


def _ended(call: Call, why: Outcome) -> GatewayError:
    """Why a call ended that was cancelled from outside."""
    if why is Outcome.TIMEOUT_TOTAL:
        return UpstreamTimeout("total", call.limits.total or 0.0)
    error = GatewayError("The stream was ended.", code="cancelled")
    error.outcome = why
    return error
