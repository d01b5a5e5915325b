"""Resumable streams: a client whose line broke goes on where it was, while the provider's answer is read on without it.

Strategy: the reply becomes a flight (`proxy.flight`) whose events are numbered; the client that asked is merely its first reader,
and `GET /v1/streams/{id}` makes further ones. `streams` says how long a stream is kept, `position` what a reader asks for. It
belongs outermost: what lies further in counts the whole upstream call, once, whoever reads it.
The one rule: whoever may not read a stream cannot tell it from one that is not there.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson

from middleware.resume.position import Tokens, after
from middleware.resume.streams import Stream, Streams
from proxy.call import Call, altered
from proxy.errors import GatewayError, Outcome, Refused
from proxy.flight import Flight
from proxy.own_fields import OwnFields
from proxy.pipeline import Answer, Endpoint, Handler, Query, Sample, Streamed
from proxy.reply import Batch, Head, Reply, Trailer
from proxy.units import Between, ByteSize, Seconds

PATH = "/v1/streams/"
Size = Annotated[ByteSize, Between(2**16, 2**40)]
Time = Annotated[Seconds, Between(0, 86_400)]
COUNTERS = {
    "streams": "Streams that began resumable.",
    "reconnects": "Reads of a stream by GET, from the start or from an event on.",
    "cancelled": "Streams that a client ended with DELETE.",
    "abandoned": "Streams that were ended because nobody read them for `grace`.",
}


class Moved:
    """A mark beside a setting that stands elsewhere now."""

    def check(self, value: object) -> None:
        raise ValueError("has become server.cors, for all paths: {origins: [...]}; docs/browsers.md")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants of this middleware. background: the stream's name now, the stream itself later."""

    background: bool = False


class Resume:
    """Makes streams resumable.

    mode: opt_in makes those resumable that ask for it (`resume: true`), all those that do not refuse. grace: how long a stream is
    read on that nobody reads. keep: how long one stays after its end. max_bytes: of memory for all streams; max_stream_bytes: for
    one. allow_origins: refused; it has become server.cors.
    """

    FIELDS = ("resume", "background")
    NEEDS_ONE_WORKER = "its streams are known to one process only"

    def __init__(
        self,
        *,
        mode: Literal["opt_in", "all"] = "opt_in",
        grace: Time = 60.0,
        keep: Time = 300.0,
        max_bytes: Size = 256 * 2**20,
        max_stream_bytes: Size = 4 * 2**20,
        allow_origins: Annotated[Any, Moved()] = None,
    ) -> None:
        self._all = mode == "all"
        self._streams = Streams(grace, keep, max_bytes, max_stream_bytes)
        self._tokens = Tokens(secrets.token_bytes(32))
        self.endpoints = (
            Endpoint("GET", PATH + "{id}", self._read, signed=True),
            Endpoint("DELETE", PATH + "{id}", self._cancel),
        )

    # Calls

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `resume` and `background`. Raises Refused (400) with the path."""
        resume, background = own.get("resume"), own.get("background")
        wanted = resume.flag() if resume is not None else self._all
        behind = background is not None and background.flag()
        if behind and call.kind == "embeddings":
            raise Refused("background: embeddings are not streamed.", code="invalid_value", param="background")
        if behind and resume is not None and not wanted:
            raise Refused("resume: a stream in the background is resumable.", code="invalid_value", param=resume.path)
        if not behind and not (wanted and call.stream and call.kind != "embeddings"):
            return call
        return altered(call, extensions={**call.extensions, Asked: Asked(behind)})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        asked = call.extension(Asked)
        if asked is None:
            return await next(call)
        if asked.background:
            return self._accepted(call, next)
        reply = await next(call)
        if reply.head.status != 200:
            return reply
        stream = self._streams.open(call)
        followed = self._streams.fly(call, stream, reply).follow(head=stream.head)
        assert followed is not None, "nothing was let go of yet"
        return followed

    def _accepted(self, call: Call, next: Handler) -> Reply:
        """202: where the stream can be read. The URL is for a browser's EventSource, which can send no key."""
        stream = self._streams.open(call)
        self._streams.begin(altered(call, stream=True, request={**call.request, "stream": True}), stream, next)
        url = f"{PATH}{stream.id}?token={self._tokens.sign(stream.id)}"
        told = {"id": stream.id, "object": "stream", "created": call.created, "model": call.model, "url": url}
        head = Head("", headers={"X-Stream-Id": stream.id, "Cache-Control": "no-store"}, status=202)
        return Reply(head, _batches(Batch([told])), Trailer(), whole=True)

    # Readers

    async def _read(self, query: Query) -> Answer:
        """`GET /v1/streams/{id}`: what comes behind the event that the reader has. Raises Refused."""
        stream, has = self._found(query), after(query)
        if query.method == "HEAD":
            return Answer(content_type="text/event-stream; charset=utf-8", headers={"X-Stream-Id": stream.id})
        self._streams.counts["reconnects"] += 1
        await self._streams.head(stream)
        if stream.failed is not None:
            return self._failed(stream, stream.failed, has, query)
        flight = stream.flight
        assert flight is not None, "it has begun"
        number = flight.counted().number
        if has >= number and not (flight.over and has < _last(stream, flight)):
            if flight.over:
                return Answer(status=204)
            raise Refused(f"The stream has only {number - 1} events yet.", code="invalid_value")
        reply = flight.follow(has, stream.head)
        if reply is None:
            message = f"What follows event {has} was let go of: the stream is longer than resume.max_stream_bytes keeps."
            raise Refused(message, status=410, code="stream_position_gone")
        self._streams.attend(stream)
        return Streamed(call=stream.call, reply=reply)

    def _failed(self, stream: Stream, error: GatewayError, has: int, query: Query) -> Answer:
        """The call failed before its first event. An EventSource sees no status: who reads with a token gets an event, once."""
        if "token" not in query.params:
            raise _again(error)
        if has:
            return Answer(status=204)
        trailer = Trailer()
        trailer.number = 1
        head = Head("", headers={"X-Stream-Id": stream.id})
        return Streamed(call=stream.call, reply=Reply(head, _batches(error=_again(error)), trailer))

    async def _cancel(self, query: Query) -> Answer:
        """`DELETE /v1/streams/{id}`: the upstream is closed, readers get an error chunk, the stream is forgotten."""
        stream = self._found(query)
        running = not stream.over
        if running:
            self._streams.counts["cancelled"] += 1
            error = GatewayError("The stream was cancelled.", code="cancelled")
            error.outcome = Outcome.CANCELLED
            self._streams.end(stream, error)
        self._streams.forget(stream)
        return Answer(orjson.dumps({"id": stream.id, "object": "stream", "deleted": True, "cancelled": running}))

    def _found(self, query: Query) -> Stream:
        """The stream, if who asks may have it. All three ways of not having it take the same steps to the same answer."""
        identity = query.path.removeprefix(PATH)
        token = None if query.method == "DELETE" else query.params.get("token")
        right = self._tokens.right(identity, token or "")
        stream = self._streams.find(identity)
        if stream is None or not (right if token is not None else stream.scope == query.principal.scope):
            raise Refused("There is no such stream, or not any more.", status=404, code="stream_not_found")
        return stream

    # With the gateway

    async def close(self) -> None:
        self._streams.close()

    def health(self) -> dict[str, Any]:
        streams = self._streams.all()
        return {"running": sum(not stream.over for stream in streams), "streams": len(streams), "bytes": self._streams.bytes}

    def samples(self) -> Iterable[Sample]:
        streams = self._streams.all()
        running = sum(not stream.over for stream in streams)
        for state, count in (("running", running), ("over", len(streams) - running)):
            yield Sample("penstock_resume_kept", "gauge", "Streams that can be read again, by state.", count, {"state": state})
        words = "Memory that the kept streams take, in bytes."
        yield Sample("penstock_resume_bytes", "gauge", words, self._streams.bytes)
        readers = sum(stream.readers for stream in streams)
        yield Sample("penstock_resume_readers", "gauge", "Clients that read a resumable stream now.", readers)
        counts = self._streams.counts
        for name, words in COUNTERS.items():
            yield Sample(f"penstock_resume_{name}_total", "counter", words, counts[name])
        for why in ("age", "size"):
            words = "Streams that were let go of, by reason."
            yield Sample("penstock_resume_expired_total", "counter", words, counts[f"expired_{why}"], {"reason": why})


def _last(stream: Stream, flight: Flight) -> int:
    """The number of the last event of a stream that is over: of `[DONE]`, before which usage may stand, or of the error chunk."""
    usage, options = flight.reply.trailer.usage, stream.call.options
    shown = flight.error is None and usage is not None and options.include_usage and not options.usage_on_finish
    return flight.number + shown


async def _batches(*batches: Batch, error: GatewayError | None = None) -> AsyncIterator[Batch]:
    """These, then the end, whichever it is."""
    for batch in batches:
        yield batch
    if error is not None:
        raise error


def _again(error: GatewayError) -> GatewayError:
    """The error once more: one exception cannot be raised to several readers at the same time."""
    told = GatewayError(
        error.message, status=error.status, type=error.type, code=error.code, param=error.param, headers=error.headers
    )  # fmt: skip
    told.outcome, told.tries = error.outcome, error.tries
    return told
