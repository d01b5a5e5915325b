"""Batches: the chunks of one upstream read, decoded or as the events that they are written as.

Strategy: most of a stream's chunks are never looked at by anyone; they travel encoded, and are decoded for who asks. What a batch
is written as is made once, however many write it.
The one rule: a batch may be shared, and is not changed by who gets it.

Events: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import add
from typing import Any

import orjson

Json = dict[str, Any]
Chunk = Json
Item = Chunk | bytes

# The end of an event: JSON has no raw line break.
BLANK = b"\n\n"
# The lines of the first events, made once: a paced chunk's takes a third of the time (0.6 of 1.5 thousand instructions).
IDS = tuple(b"id: %d\n" % number for number in range(1024))


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


def noted(chunk: Chunk, name: str, found: object) -> Chunk:
    """The chunk (or completion) with what one middleware has to say in its field `penstock`, beside what others say there."""
    return {**chunk, "penstock": {**(chunk.get("penstock") or {}), name: found}}
