"""What comes back: a head that is known while the chunks are still coming, and a trailer that fills as they flow.

    Reply = head + chunks (an async iterator of batches, see `Flow`) + trailer

A batch is what one network read of the upstream yielded. Each chunk in it is an OpenAI `chat.completion.chunk` as a dict; a
reply that is not streamed is one batch of one item, the whole `chat.completion` (`reply.whole`).
The one rule: whoever takes a reply and does not return it closes it (`await reply.close()`), and sockets hang on the
trailer, not on a generator, because `aclose()` on a generator that never started runs none of its code.

Chunk shape: https://platform.openai.com/docs/api-reference/chat-streaming
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any, NamedTuple, Protocol, cast

import orjson

from proxy.errors import GatewayError, Outcome

log = logging.getLogger("penstock")

Json = dict[str, Any]
Chunk = Json
# The end of an event: JSON has no raw line break.
BLANK = b"\n\n"
# The lines of the first events, made once: a paced chunk's takes a third of the time (0.6 of 1.5 thousand instructions).
IDS = tuple(b"id: %d\n" % number for number in range(1024))
_new, _set = object.__new__, object.__setattr__
Item = Chunk | bytes
Completion = Json
Usage = Json

# List-valued fields of a delta. The SDKs' accumulators add lists up by each entry's `index`, and raise where there is none.
LISTS = frozenset({"annotations", "provider_blocks", "images"})


class Run(bytes):
    """Several chunks, encoded as complete events one after the other."""

    __slots__ = ()


class Batch:
    """The chunks of one upstream read.

    items: chunks, or chunks that are already encoded as complete events (`data: {json}` and a blank line, as bytes; several in a
    `Run`): most of a stream's chunks are never looked at by anyone, and then need not be decoded.
    final: it holds the finish chunks, and nothing follows it; the relay writes it together with usage and `[DONE]`.
    number: the `id:` of its first event, where the events of a stream are numbered (1, 2, 3…, so that a client can go on).
    comment: an SSE comment with its blank line (`: text`), which streams have before these events; it is in no event, so what is
    made of the chunks or of `sse` has none.
    seen: how many events of a final batch, usage and `[DONE]` counted, the reader has already.
    """

    __slots__ = ("_chunks", "_sse", "comment", "final", "items", "number", "seen")

    def __init__(self, items: Sequence[Item], *, final: bool = False, number: int | None = None, comment: bytes = b"") -> None:
        self.items = items
        self.final = final
        self.number = number
        self.comment = comment
        self.seen = 0
        self._chunks: list[Chunk] | None = None
        self._sse: bytes | None = None

    def numbered(self, number: int) -> Batch:
        """The same batch, its events numbered from `number` on."""
        twin = Batch(self.items, final=self.final, number=number, comment=self.comment)
        twin.seen = self.seen
        twin._chunks = self._chunks
        if self._sse is not None and self.number is None and not self.final:
            twin._sse = with_ids(self._sse, number)
        return twin

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks as dicts, decoded at most once, however many look at them. They may be shared: do not change them."""
        if self._chunks is None:
            self._chunks = [chunk for item in self.items for chunk in _decoded(item)]
        return self._chunks

    def sse(self) -> bytes:
        """The batch as server-sent events, encoded at most once, however many write it."""
        if self._sse is None:
            items, number = self.items, self.number
            if len(items) != 1 or not isinstance(event := items[0], bytes) or self.seen:
                self._sse = sse_events(items, number, self.seen)
            elif number is None:
                self._sse = event
            else:
                self._sse = with_id(event, number) if type(event) is bytes else with_ids(event, number)
        return self._sse


def _decoded(item: Item) -> list[Chunk]:
    if type(item) is bytes:
        return [orjson.loads(item[6:-2])]
    if isinstance(item, Run):
        return [orjson.loads(event[6:]) for event in single_events(item)]
    return [item]  # type: ignore[list-item]


def sse_events(items: Iterable[Item], number: int | None = None, seen: int = 0) -> bytes:
    """`data: {json}`, blank line, for each chunk (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    number: of the first event; the others count on from there. seen: how many of these are left out.
    """
    dumps = orjson.dumps
    events = [item if isinstance(item, bytes) else b"data: %b\n\n" % dumps(item) for item in items]
    if number is None:
        return b"".join(events)
    if any(type(event) is Run for event in events):
        events = [single for event in events for single in single_events(event)]
    return b"".join([with_id(event, at) for at, event in enumerate(events[seen:], number + seen)])


def with_id(event: bytes, number: int) -> bytes:
    """An event with its `id:` line before it."""
    return IDS[number] + event if number < len(IDS) else b"id: %d\n%b" % (number, event)


def with_ids(events: bytes, number: int) -> bytes:
    """Any number of events, each with its line; number: of the first."""
    bodies = events.split(BLANK)
    end = number + len(bodies) - 1
    lines = (*(IDS[number:end] if end <= len(IDS) else [b"id: %d\n" % at for at in range(number, end)]), b"")
    return BLANK.join(map(add, lines, bodies))


def single_events(events: bytes) -> list[bytes]:
    """The single events of a run; JSON has no raw line break, so a blank line only stands between them."""
    return [event + b"\n\n" for event in events.split(b"\n\n")[:-1]]


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


@dataclass(frozen=True, slots=True)
class Try:
    """An attempt that failed. target: `provider/model`. reason: the error's code. seconds: how long it took."""

    target: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Switch:
    """A reply that broke and went on from another target. source, target: `provider/model`, before and after. reason: the outcome
    that the break would have been. at: characters of text that stood before the seam; 0 where there were none and the reply was
    begun anew, of which the client saw nothing.
    """

    source: str
    target: str
    reason: str
    at: int


@dataclass(frozen=True)
class Head:
    """What is known before the first chunk goes out.

    headers: to be passed on to the client (rate limits of the upstream). dropped: request parameters that the target's wire
    could not carry. tries: the attempts that failed before the one that answered. upstream_seconds: from sending to the first
    chunk. cache: `hit`, `miss`, `bypass` or `joined`; None where no cache looked. age: seconds since a hit was stored.
    status: other than 200 only where a middleware answers by itself, with a JSON body of its own (`Reply.whole`) that goes out as
    it is, also to a client that streams.
    """

    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    tries: tuple[Try, ...] = ()
    upstream_seconds: float = 0.0
    cache: str | None = None
    age: float | None = None
    status: int = 200
    extensions: Mapping[type, object] = field(default_factory=dict)


class Sent(NamedTuple):
    """What went out of a stream before its final batch: bytes in all, the last batch, and its size among them."""

    bytes: int
    last: Batch
    last_bytes: int


# A gap in a stream that counts as a stall.
STALL_SECONDS = 1.0


class Trailer:
    """What is known at the end: usage, finish reasons, outcome. Filled as chunks flow; `end` runs once, whatever happens.

    usage: OpenAI's usage object, or None where the upstream gave none. finish_reasons: by choice index. longest_gap: seconds
    between two writes to the client, or from the last one to the end; stalls: how many of these gaps were over a second.
    clean_end: what a clean end is called where it is not the upstream's own, but one that the gateway makes on purpose. sent:
    known at the end of a stream that told no usage. source: where the reply is one client's part of another that may outlive it
    (a flight), the trailer of that: its usage is what was used, and it may be known later. switches: to other targets after the
    head was out, in order. number: the `id:` of the error chunk, where events are numbered and the error is the stream's own end;
    an error that only concerns one reader's connection has none, so that the reader can go on behind the last event it has.
    """

    __slots__ = (
        "_callbacks", "_resources", "chunks", "clean_end", "error", "finish_reasons", "longest_gap", "number", "outcome", "sent",
        "source", "stalls", "switches", "usage",
    )  # fmt: skip

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.finish_reasons: dict[int, str] = {}
        self.chunks = 0
        self.longest_gap = 0.0
        self.stalls = 0
        self.clean_end = Outcome.COMPLETED
        self.sent: Sent | None = None
        self.source: Trailer | None = None
        self.switches: tuple[Switch, ...] = ()
        self.number: int | None = None
        self.outcome: Outcome | None = None
        self.error: GatewayError | None = None
        self._callbacks: list[Callable[[Trailer], None]] = []
        self._resources: list[Callable[[], None]] = []

    def silences(self, longest: float, stalls: int, last: float) -> None:
        """Note the gaps between writes. last: the silence before the end, which is a gap too: a stream that timed out had its
        longest there."""
        self.longest_gap, self.stalls = max(longest, last), stalls + (last > STALL_SECONDS)

    def on_end(self, callback: Callable[[Trailer], None]) -> None:
        """Run `callback(trailer)` once when the reply has ended, however it ended; at once if it has already."""
        if self.outcome is not None:
            callback(self)
        else:
            self._callbacks.append(callback)

    def own(self, close: Callable[[], None]) -> None:
        """Take over a resource: `close()` is called when the reply ends or is closed. It must be idempotent."""
        self._resources.append(close)

    def so_far(self) -> Callable[[], None]:
        """What the reply holds open until now, that is further in than who asks: a function that closes just this."""
        inner, self._resources = self._resources, []

        def release() -> None:
            while inner:
                inner.pop()()

        self._resources.append(release)
        return release

    def release(self) -> None:
        """Close what the reply holds open, now. Synchronous, so that it also works while a task is being cancelled."""
        while self._resources:
            self._resources.pop()()

    def end(self, outcome: Outcome, error: GatewayError | None = None) -> None:
        """Name the outcome (the first one counts), close the resources, run the callbacks."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.error = error
        self.release()
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("A callback at the end of a reply failed.")
        self._callbacks.clear()


@dataclass(frozen=True)
class Reply:
    """An answer on its way. whole: the single batch holds one `chat.completion` (or embeddings) rather than chunks."""

    head: Head
    chunks: AsyncIterator[Batch]
    trailer: Trailer
    whole: bool = False

    def with_head(self, **changes: Any) -> Reply:
        """The same reply with its head altered. Every layer that has something to say does this: 0.55 us, where
        `altered(reply, head=altered(reply.head, ...))` takes 0.7 and `replace` 4.
        """
        head, twin = _new(Head), _new(Reply)
        _set(head, "__dict__", self.head.__dict__ | changes)
        fields = self.__dict__.copy()
        fields["head"] = head
        _set(twin, "__dict__", fields)
        return twin

    async def close(self, outcome: Outcome = Outcome.CANCELLED) -> None:
        """Give the reply up: its upstream is closed, its iterator is closed, its end callbacks run."""
        self.trailer.end(outcome)
        aclose = getattr(self.chunks, "aclose", None)
        if aclose is not None:
            await aclose()
