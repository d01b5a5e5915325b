"""What comes back: a head that is known while the chunks are still coming, and a trailer that fills as they flow.

    Reply = head + chunks (an async iterator of batches, see `Flow`) + trailer

A batch is what one network read of the upstream yielded. Each chunk in it is an OpenAI `chat.completion.chunk` as a dict; a
reply that is not streamed is one batch of one item, the whole `chat.completion` (`reply.whole`).
The one rule: whoever takes a reply and does not return it closes it (`await reply.close()`), and sockets hang on the
trailer, not on a generator, because `aclose()` on a generator that never started runs none of its code.

Chunk shape: https://platform.openai.com/docs/api-reference/chat-streaming
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import Outcome
from proxy.reply.batch import BLANK, IDS, Batch, Chunk, Item, Json, Run, noted, single_events, sse_events, with_id
from proxy.reply.flow import Ended, Flow, Pulling, Receive, Single, SingleFlow, Tapped, flow_of, push, tapped
from proxy.reply.trailer import STALL_SECONDS, Sent, Switch, Trailer, Usage

__all__ = [
    "BLANK", "IDS", "LISTS", "STALL_SECONDS", "Batch", "Chunk", "Completion", "Ended", "Flow", "Head", "Item", "Json", "Receive",
    "Pulling", "Reply", "Run", "Sent", "Single", "SingleFlow", "Switch", "Tapped", "Trailer", "Try", "Usage", "flow_of", "noted",
    "push",
    "single_events", "sse_events", "tapped", "with_id",
]  # fmt: skip

_new, _set = object.__new__, object.__setattr__
Completion = Json

# List-valued fields of a delta. The SDKs' accumulators add lists up by each entry's `index`, and raise where there is none.
LISTS = frozenset({"annotations", "provider_blocks", "images"})


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

    def with_header(self, name: str, value: str) -> Reply:
        """The same reply with one response header more."""
        return self.with_head(headers={**self.head.headers, name: value})

    async def close(self, outcome: Outcome = Outcome.CANCELLED) -> None:
        """Give the reply up: its upstream is closed, its iterator is closed, its end callbacks run."""
        self.trailer.end(outcome)
        aclose = getattr(self.chunks, "aclose", None)
        if aclose is not None:
            await aclose()
