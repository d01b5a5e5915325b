"""What has come of a reply that is followed: batches in order, each at its place, and which events and bytes they are.

Strategy: an event that came alone and encoded, which nearly all of a paced stream are, is kept as its bytes and nothing else: no
object around it, nothing for the garbage collector to look at, and one copy however many flights keep it. All else is kept as
the batch that it was. Numbers, sizes and places of single events are counted when somebody asks for them.
The one rule: bytes are counted without the `id:` lines, so that a numbered recording and one without are of the same size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from proxy.reply import BLANK, Batch, Item, Run, Sent

# What was not to be kept as bytes: a batch as its readers get it, its bytes without ids, its events.
Kept = tuple[Batch, int, int]
Entry = bytes | Kept


class Position(NamedTuple):
    """Where a reader stands. place: of the batch that it gets next. before: bytes of all that came before that. number: of that
    batch's first event. skip: how many of its events the reader has.
    """

    place: int
    before: int
    number: int
    skip: int = 0


class Recording:
    """Batches have the places 0, 1, 2…; those before `base` were let go of.

    numbered: events have the ids 1, 2, 3…. total: bytes that have come, without the ids. number: that of the next event.
    """

    __slots__ = ("_append", "_entries", "_first", "_gone", "_latest", "_parted", "base", "number", "numbered", "total")

    def __init__(self, *, numbered: bool = False) -> None:
        self._entries: deque[Entry] = deque()
        self._append = self._entries.append
        self.numbered = numbered
        self.total = 0
        self.number = 1
        self.base = 0
        self._gone = 0
        self._first = 1
        self._parted: Entry | None = None
        # The place of the batch that was added last, which several readers get at once.
        self._latest: tuple[int, Kept | None] = (-1, None)

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return self.total - self._gone

    @property
    def places(self) -> int:
        """How many batches have come."""
        return self.base + len(self._entries)

    @property
    def end(self) -> Position:
        """Where a reader stands who has all that has come."""
        return Position(self.places, self.total, self.number)

    def add(self, batch: Batch, whole: bool = False) -> Batch:
        """Keep the next batch; returns it as its readers get it. whole: of a reply that is not streamed."""
        plain = batch.sse()
        plainly = not (whole or batch.final or batch.comment) and batch.number is None
        events = 1
        if self.numbered:
            batch, events = batch.numbered(self.number), _events(batch.items)
        kept = batch, len(plain), events
        self._latest = self.base + len(self._entries), kept
        self._append(kept if not plainly else plain if len(batch.items) == 1 else Run(plain))
        self.total += len(plain)
        self.number += events
        return batch

    def at(self, place: int, number: int) -> Kept | None:
        """The batch at a place; None where it has not come yet. number: of its first event."""
        if place == self._latest[0]:
            return self._latest[1]
        at = place - self.base
        if at >= len(self._entries):
            return None
        entry = self._entries[at]
        if isinstance(entry, tuple):
            return entry
        return Batch((entry,), number=number if self.numbered else None), len(entry), _events((entry,))

    def find(self, after: int) -> Position | None:
        """Where a reader goes on who has the events up to number `after`; None where what follows was let go of."""
        if after <= 0 or not self.numbered:
            return None if self.base else Position(0, 0, 1)
        if after < self._first - 1:
            return None
        place, before, number = self.base, self._gone, self._first
        for entry in self._entries:
            size, events, final = _facts(entry)
            if final or after < number + events - 1:
                return Position(place, before, number, after - number + 1)
            place, before, number = place + 1, before + size, number + events
        return Position(place, before, number)

    def trim(self, keep: int, needed: int) -> None:
        """Let go of the oldest batches that are beyond `keep` bytes and stand before the place `needed`."""
        spare = self.total - keep
        while self._gone < spare and self.base < needed:
            entry = self._entries.popleft()
            size, events, final = (len(entry), 1, False) if type(entry) is bytes else _facts(entry)
            self._gone += size
            self._first += events
            self.base += 1
            if not final:
                self._parted = entry

    def sent(self) -> Sent | None:
        """What came before the final batch; None where nothing did."""
        last, size = self._parted, self.total
        for entry in reversed(self._entries):
            its_size, _, final = _facts(entry)
            if not final:
                last = entry
                break
            size -= its_size
        if last is None:
            return None
        return Sent(size, *last[:2]) if isinstance(last, tuple) else Sent(size, Batch((last,)), len(last))


def _facts(entry: Entry) -> tuple[int, int, bool]:
    """Its bytes without ids, its events, and whether it is the final batch."""
    if isinstance(entry, tuple):
        batch, size, events = entry
        return size, events, batch.final
    return len(entry), _events((entry,)), False


def _events(items: Sequence[Item]) -> int:
    """How many events the items of a batch are."""
    count = 0
    for item in items:
        count += item.count(BLANK) if type(item) is Run else 1
    return count


def without(batch: Batch, skip: int) -> Batch:
    """A batch without its first events. What stands behind the final one's, usage and the end, is made of them, later."""
    if batch.final:
        rest = Batch(batch.items, final=True, number=batch.number)
        rest.seen = skip
        return rest
    return Batch(batch.chunks[skip:], number=None if batch.number is None else batch.number + skip)
