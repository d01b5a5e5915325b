"""Which passages answer a question: full text and vectors side by side, merged.

Strategy: both searches run at the same time, the one over words at once, the other when the question has its vector; `fusion`
merges them. Several searches of one request (orq's knowledge bases) run at the same time too, and no passage is given twice.
The one rule: vectors that cannot be had cost a note in the answer, never the answer; what only the store can give raises
StoreUnavailable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from middleware.retrieval.asked import Wanted
from middleware.retrieval.fusion import above, fuse
from middleware.retrieval.refusals import missing
from middleware.retrieval.text.passages import tokens
from middleware.retrieval.vectors import NoVectors, Vectors
from proxy.store import Hit, Library

T = TypeVar("T")
# How many of each list are merged: more than are wanted, because what both lists have comes first.
DEPTH, LEAST = 4, 20


@dataclass(frozen=True, slots=True)
class Found:
    """The best first. without_vectors: they were wanted, and their target gave none."""

    hits: Sequence[Hit]
    without_vectors: bool = False


class Search:
    """Looks for passages. vectors: None where there are none. patience: seconds that a question's vector may take."""

    def __init__(self, vectors: Vectors | None, patience: float) -> None:
        self._vectors, self._patience = vectors, patience

    async def all(self, library: Library, owner: str, searches: Sequence[tuple[str, Wanted]]) -> Found:
        """For each (query, what is wanted); what several find is there once.

        Raises StoreUnavailable, and Refused (404) where a file is named that this owner has not.
        """
        for _, wanted in searches:
            for number, file in enumerate(wanted.where.files):
                if await library.file(owner, file) is None:
                    raise missing(f"{wanted.path}[{number}]")
        found = await together([self.one(library, owner, query, wanted) for query, wanted in searches])
        seen: dict[tuple[str, int], Hit] = {}
        for hit in (hit for one in found for hit in one.hits):
            seen.setdefault(_key(hit), hit)
        return Found(list(seen.values()), any(one.without_vectors for one in found))

    async def one(self, library: Library, owner: str, query: str, wanted: Wanted) -> Found:
        if not query.strip():
            return Found(())
        most = max(LEAST, DEPTH * wanted.top_k)
        by_words = wanted.how != "vector_search" or self._vectors is None
        words, near = await together([
            library.search_text(owner, query, most, wanted.where) if by_words else _nothing(),
            self._near(library, owner, query, most, wanted),
        ])  # fmt: skip
        down = near is None
        if down and not by_words:
            words = await library.search_text(owner, query, most, wanted.where)
        return Found(merged(words or (), near or (), most, wanted), down)

    async def _near(self, library: Library, owner: str, query: str, most: int, wanted: Wanted) -> Sequence[Hit] | None:
        """By vectors; none where they are not wanted, None where they are not to be had."""
        if self._vectors is None or wanted.how == "keyword_search":
            return ()
        try:
            vector = await self._vectors.of_question(query, self._patience)
        except NoVectors:
            return None
        return await library.search_vectors(owner, vector, most, wanted.where)


def merged(words: Sequence[Hit], near: Sequence[Hit], most: int, wanted: Wanted) -> list[Hit]:
    """The best of both lists, at most `top_k`. most: the length of a list that may have been cut.

    Where there are vectors, what is not among those near enough is not near enough, whatever words it shares: so a threshold
    holds for both lists. Where the list of vectors is full there may be more behind its end, and words have the benefit.
    """
    close = above(near, wanted.threshold)
    if near and wanted.threshold and len(close) < most:
        enough = {_key(hit) for hit in close}
        words = [hit for hit in words if _key(hit) in enough]
    return fuse([words, close])[: wanted.top_k]


def within(hits: Sequence[Hit], most: int) -> list[Hit]:
    """The first of them, as many as have room in so many tokens."""
    rooms = accumulate(tokens(hit.passage.text) + tokens(hit.passage.heading) for hit in hits)
    return [hit for hit, room in zip(hits, rooms, strict=True) if room <= most]


def _key(hit: Hit) -> tuple[str, int]:
    return hit.file, hit.passage.number


async def _nothing() -> Sequence[Hit]:
    return ()


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all give; the first that raises ends the others, and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
