"""A reply as it came, kept as bytes: every chunk, which of them came together, and how long each batch was waited for.

Strategy: one run of server-sent events (`batch.sse()`, which the relay needs anyway), the offset where each batch ends, the
seconds before each, and the offset where the finish chunks begin, for they always leave last. So a replay hands over slices.
The one rule: an entry never changes; many replies read it at the same time.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import orjson

from proxy.reply import Usage

# What an entry costs beside its bytes: the objects around them and the store's own bookkeeping. A test measures it.
OVERHEAD = 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded reply. Nothing in it names the question; its repr shows nothing of the answer.

    key_name: the name of the key it was recorded for; name: the tracking name. Entries are deleted by them.
    target, dropped: as in the reply's head. whole: it is one `chat.completion` (or embeddings), not a stream.
    events: all chunks as server-sent events. ends: where each batch ends in them; gaps: the seconds before each came, the first
    from asking on. finish: where the finish chunks begin. chunks: how many a stream had. usage: JSON; tokens: its total. ttl:
    seconds.
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
    tokens: int = 0

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
