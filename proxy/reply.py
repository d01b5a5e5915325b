"""What comes back: a head that is known while the chunks are still coming, and a trailer that fills as they flow.

    Reply = head + chunks (an async iterator of batches) + trailer

A batch is what one network read of the upstream yielded. Each chunk in it is an OpenAI `chat.completion.chunk` as a dict; a
reply that is not streamed is one batch of one item, the whole `chat.completion` (`reply.whole`).
The one rule: whoever takes a reply and does not return it closes it (`await reply.close()`), and sockets hang on the
trailer, not on a generator, because `aclose()` on a generator that never started runs none of its code.

Chunk shape: https://platform.openai.com/docs/api-reference/chat-streaming
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from proxy.errors import GatewayError, Outcome

log = logging.getLogger("penstock")

Json = dict[str, Any]
Chunk = Json
Item = Chunk | bytes
Completion = Json
Usage = Json

# List-valued fields of a delta. The SDKs' accumulators add lists up by each entry's `index`, and raise where there is none.
LISTS = frozenset({"annotations", "provider_blocks", "images"})


class Batch:
    """The chunks of one upstream read.

    items: chunks, or chunks that are already encoded as a complete event (`data: {json}` and a blank line, as bytes): most of
    a stream's chunks are never looked at by anyone, and then need not be decoded.
    final: it holds the finish chunks, and nothing follows it; the relay writes it together with usage and `[DONE]`.
    """

    __slots__ = ("_chunks", "_sse", "final", "items")

    def __init__(self, items: Sequence[Item], *, final: bool = False) -> None:
        self.items = items
        self.final = final
        self._chunks: list[Chunk] | None = None
        self._sse: bytes | None = None

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks as dicts, decoded at most once, however many look at them. They may be shared: do not change them."""
        if self._chunks is None:
            self._chunks = [orjson.loads(item[6:-2]) if type(item) is bytes else item for item in self.items]  # type: ignore[misc]
        return self._chunks

    def sse(self) -> bytes:
        """The batch as server-sent events, encoded at most once, however many write it."""
        if self._sse is None:
            self._sse = sse_events(self.items)
        return self._sse


def sse_events(items: Iterable[Item]) -> bytes:
    """`data: {json}`, blank line, for each chunk (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    dumps = orjson.dumps
    return b"".join([item if type(item) is bytes else b"data: %b\n\n" % dumps(item) for item in items])


@dataclass(frozen=True, slots=True)
class Try:
    """An attempt that failed. target: `provider/model`. reason: the error's code. seconds: how long it took."""

    target: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Head:
    """What is known before the first chunk goes out.

    headers: to be passed on to the client (rate limits of the upstream). dropped: request parameters that the target's wire
    could not carry. tries: the attempts that failed before the one that answered. upstream_seconds: from sending to the first
    chunk. cache: `hit`, `miss`, `bypass` or `joined`; None where no cache looked. age: seconds since a hit was stored.
    """

    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    tries: tuple[Try, ...] = ()
    upstream_seconds: float = 0.0
    cache: str | None = None
    age: float | None = None
    extensions: Mapping[type, object] = field(default_factory=dict)


class Trailer:
    """What is known at the end: usage, finish reasons, outcome. Filled as chunks flow; `end` runs once, whatever happens.

    usage: OpenAI's usage object, or None where the upstream gave none. finish_reasons: by choice index. longest_gap: seconds
    between two writes to the client, or from the last one to the end; stalls: how many of these gaps were over a second.
    """

    __slots__ = (
        "_callbacks", "_resources", "chunks", "error", "finish_reasons", "longest_gap", "outcome", "stalls", "usage",
    )  # fmt: skip

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.finish_reasons: dict[int, str] = {}
        self.chunks = 0
        self.longest_gap = 0.0
        self.stalls = 0
        self.outcome: Outcome | None = None
        self.error: GatewayError | None = None
        self._callbacks: list[Callable[[Trailer], None]] = []
        self._resources: list[Callable[[], None]] = []

    def on_end(self, callback: Callable[[Trailer], None]) -> None:
        """Run `callback(trailer)` once when the reply has ended, however it ended; at once if it has already."""
        if self.outcome is not None:
            callback(self)
        else:
            self._callbacks.append(callback)

    def own(self, close: Callable[[], None]) -> None:
        """Take over a resource: `close()` is called when the reply ends or is closed. It must be idempotent."""
        self._resources.append(close)

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

    async def close(self, outcome: Outcome = Outcome.CANCELLED) -> None:
        """Give the reply up: its upstream is closed, its iterator is closed, its end callbacks run."""
        self.trailer.end(outcome)
        aclose = getattr(self.chunks, "aclose", None)
        if aclose is not None:
            await aclose()
