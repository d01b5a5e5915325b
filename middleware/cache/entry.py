"""A reply as it came, kept as bytes: every chunk, which of them came together, and how long each batch was waited for.

Strategy: one run of server-sent events (`batch.sse()`, which the relay needs anyway), the offset where each batch ends, the
seconds before each, and the offset where the finish chunks begin, for they always leave last. So a replay hands over slices.
The one rule: recording costs an append and two looks at the clock per batch, and what has grown too large is forgotten at once.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import orjson

from proxy.call import Call
from proxy.reply import Batch, Reply, Usage, sse_events

# What an entry costs beside its bytes: the objects around them and the store's own bookkeeping. A test measures it.
OVERHEAD = 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded reply. Nothing in it names the question; its repr shows nothing of the answer.

    key_name: the name of the key it was recorded for; name: the tracking name. Entries are deleted by them.
    target, dropped: as in the reply's head. whole: it is one `chat.completion` (or embeddings), not a stream.
    events: all chunks as server-sent events. ends: where each batch ends in them; gaps: the seconds waited for each, the first
    from asking on. finish: where the finish chunks begin. chunks: how many a stream had. usage: JSON. ttl: seconds.
    """

    key_name: str
    name: str | None
    target: str
    dropped: tuple[str, ...]
    whole: bool
    events: bytes = field(repr=False)
    ends: array[int] = field(repr=False)
    gaps: array[float] = field(repr=False)
    finish: int
    chunks: int
    usage: bytes | None
    finish_reasons: tuple[tuple[int, str], ...]
    ttl: float

    @property
    def size(self) -> int:
        """Bytes of memory, not less than it takes."""
        arrays = self.ends.itemsize * len(self.ends) + self.gaps.itemsize * len(self.gaps)
        words = 4 * sum(len(word) + 64 for word in (*self.dropped, self.key_name, self.name or "", self.target))
        return OVERHEAD + len(self.events) + arrays + len(self.usage or b"") + words + 160 * len(self.finish_reasons)

    def first_usage(self) -> Usage | None:
        """The usage as the provider counted it, a fresh object."""
        found: Usage | None = orjson.loads(self.usage) if self.usage is not None else None
        return found


class Recorder:
    """Takes batches down as they pass. most: bytes; a longer reply is given up, and its memory with it."""

    __slots__ = ("_ends", "_final", "_finish", "_gaps", "_most", "_parts", "_size", "_whole", "over")

    def __init__(self, most: int, whole: bool) -> None:
        self.over = False
        self._most = most
        self._whole = whole
        self._parts: list[bytes] = []
        self._ends = array("Q")
        self._gaps = array("d")
        self._size = 0
        self._finish = 0
        self._final = False

    def add(self, batch: Batch, gap: float) -> None:
        """The next batch. gap: the seconds that it was waited for."""
        if self.over:
            return
        events = batch.sse()
        self._size += len(events)
        if self._size > self._most:
            self.over = True
            self._parts.clear()
            return
        self._parts.append(events)
        self._ends.append(self._size)
        self._gaps.append(gap)
        if batch.final:
            self._final = True
            self._finish = self._size - (0 if self._whole else _finish_size(batch))

    def entry(self, call: Call, reply: Reply, ttl: float) -> Entry | None:
        """The entry, after the reply's clean end; None where it has none or grew too large."""
        if not self._final:
            return None
        trailer = reply.trailer
        return Entry(
            key_name=call.principal.name,
            name=call.name,
            target=reply.head.target,
            dropped=reply.head.dropped,
            whole=self._whole,
            events=b"".join(self._parts),
            ends=self._ends,
            gaps=self._gaps,
            finish=self._finish,
            chunks=trailer.chunks,
            usage=orjson.dumps(trailer.usage) if trailer.usage is not None else None,
            finish_reasons=tuple(trailer.finish_reasons.items()),
            ttl=ttl,
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
