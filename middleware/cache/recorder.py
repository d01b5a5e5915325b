"""Takes a reply down as it passes, and makes an entry of it after its clean end.

Strategy: `see` is shown every batch in order, whether it is pulled by the client's side or pushed by the upstream's, and notes
its bytes and the moment; all else is worked out in `finish`, which runs on a clean end alone.
The one rule: recording costs two appends and a look at the clock per batch (0.2 us), and what has grown too large is forgotten
at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable
from itertools import accumulate, pairwise
from typing import Any

import orjson

from middleware.cache.entry import Entry
from proxy.call import Call
from proxy.reply import Batch, Reply, sse_events


class Recorder:
    """One reply's. began: when it was asked for, by `clock`. ttl: the entry's. most: bytes; a longer reply is given up, and its
    memory with it. worth: the finish reasons with which a reply is kept. keep: takes the entry.

    A gap is the time between two batches as they came from the upstream: the first from asking on. What a slow client holds up
    counts only where the upstream was not read for so long that nothing more came.
    """

    __slots__ = (
        "_began",
        "_call",
        "_clock",
        "_final",
        "_in_hand",
        "_keep",
        "_left",
        "_parts",
        "_reply",
        "_times",
        "_ttl",
        "_worth",
        "over",
    )

    def __init__(
        self,
        call: Call,
        reply: Reply,
        ttl: float,
        began: float,
        *,
        most: int,
        worth: frozenset[str],
        clock: Callable[[], float],
        keep: Callable[[Entry], Awaitable[None]],
    ) -> None:
        self.over = False
        self._call, self._reply, self._ttl = call, reply, ttl
        self._worth, self._clock, self._keep = worth, clock, keep
        self._left = most
        self._parts: list[bytes] = []
        # The first batch is in hand when a reply is: it came before it is seen.
        self._began, self._in_hand = began, clock()
        self._times = array("d")
        self._final: Batch | None = None

    def see(self, batch: Batch) -> Batch:
        """The next batch, as it is."""
        if self.over:
            return batch
        events = batch.sse()
        self._left -= len(events)
        if self._left < 0:
            self._give_up()
            return batch
        self._parts.append(events)
        self._times.append(self._clock())
        if batch.final:
            self._final = batch
        return batch

    def _give_up(self) -> None:
        self.over = True
        self._parts.clear()
        del self._times[:]

    async def finish(self) -> None:
        """After a clean end: hand the entry over, if the reply has one and is worth it."""
        if self._final is not None and not self.over and self._worth_keeping():
            await self._keep(self._entry(self._final))

    def _worth_keeping(self) -> bool:
        reasons = self._reply.trailer.finish_reasons.values()
        return (bool(reasons) or self._call.kind == "embeddings") and self._worth.issuperset(reasons)

    def _entry(self, final: Batch) -> Entry:
        call, head, trailer, whole = self._call, self._reply.head, self._reply.trailer, self._reply.whole
        ends = array("Q", accumulate(map(len, self._parts)))
        came = (self._began, self._in_hand, *self._times[1:])
        return Entry(
            key_name=call.principal.name,
            name=call.name,
            target=head.target,
            dropped=head.dropped,
            whole=whole,
            events=b"".join(self._parts),
            ends=ends,
            gaps=array("d", [later - earlier for earlier, later in pairwise(came)]),
            finish=ends[-1] - (0 if whole else _finish_size(final)),
            chunks=trailer.chunks,
            usage=orjson.dumps(trailer.usage) if trailer.usage is not None else None,
            finish_reasons=tuple(trailer.finish_reasons.items()),
            ttl=self._ttl,
            tokens=_tokens(trailer.usage),
        )


def _finish_size(batch: Batch) -> int:
    """How many bytes the finish chunks at the end of a final batch take; content may stand before them."""
    size = 0
    for item in reversed(batch.items):
        # Finish chunks are made last of all; what came encoded already is content.
        if isinstance(item, bytes) or not any(choice.get("finish_reason") for choice in item["choices"]):
            break
        size += len(sse_events([item]))
    return size


def _tokens(usage: Any) -> int:
    found = usage.get("total_tokens") if isinstance(usage, dict) else None
    return found if isinstance(found, int) else 0
