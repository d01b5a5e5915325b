"""Takes an answer down as it passes, folded, so that a long one costs the memory of its text and not of its events.

Strategy: `see` keeps each batch's items; whenever these have grown by GRAIN bytes of events they are folded into one delta, and
the rest when the reply is over. Only the first choice is kept: a conversation goes on from one answer.
Cost: 0.14 us per batch, and 1.5 us per chunk for the fold, in portions of half a millisecond.
The one rule: an answer that has grown beyond `most` is let go of at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import orjson

from proxy.fold import fold, unfold
from proxy.reply import Batch, Chunk, Item

Json = dict[str, Any]

GRAIN = 64 * 2**10


class Recorder:
    """One reply's. whole: it is no stream. most: bytes of the answer as JSON. without: fields of deltas that are not wanted.

    too_large: it was let go of.
    """

    __slots__ = ("_items", "_most", "_since", "_whole", "_without", "too_large")

    def __init__(self, *, whole: bool, most: int, without: Collection[str] = ()) -> None:
        self._whole = whole
        self._most = most
        self._without = without
        self._items: list[Item] = []
        self._since = 0
        self.too_large = False

    def see(self, batch: Batch) -> Batch:
        """The next batch, as it is."""
        if self.too_large:
            return batch
        self._items += batch.items
        if not self._whole:
            self._since += len(batch.sse())
            if self._since > GRAIN:
                self._fold()
        return batch

    def choice(self) -> Json | None:
        """The first choice, as in a whole reply, as far as it has come; None where it is too large, or nothing has come."""
        choices: list[Json] = self._completion()["choices"] if self._items and not self.too_large else []
        choice = next((found for found in choices if found["index"] == 0), None)
        if choice is not None and len(orjson.dumps(choice["message"])) > self._most:
            self._let_go()
            return None
        return choice

    def _completion(self) -> Json:
        if self._whole:
            found: Json = Batch(self._items).chunks[0]
            return found
        return fold(self._wanted(Batch(self._items).chunks), None)

    def _wanted(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The first choice's deltas. Adjacent text is joined here, once: added delta by delta it would be copied as often."""
        texts: list[str] = []
        for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0):
            delta, finish = choice["delta"], choice.get("finish_reason")
            if len(delta) == 1 and finish is None and isinstance(text := delta.get("content"), str):
                texts.append(text)
                continue
            if texts:
                yield _chunk({"content": "".join(texts)})
                texts.clear()
            yield _chunk({name: value for name, value in delta.items() if name not in self._without}, finish)
        if texts:
            yield _chunk({"content": "".join(texts)})

    def _fold(self) -> None:
        self._since = 0
        choice = self.choice()
        content, finish, _ = unfold({"choices": [] if choice is None else [choice]})
        self._items = [*content, *finish]

    def _let_go(self) -> None:
        self.too_large = True
        self._items = []


def _chunk(delta: Json, finish: str | None = None) -> Chunk:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
