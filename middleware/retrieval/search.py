"""Which passages answer a question: full text and vectors side by side, merged.

Strategy: both searches run at the same time, the one over words at once, the other when the question has its vector; `fusion`
merges them. Several searches of one request (orq's knowledge bases) run at the same time too, their questions embedded in one
request, and no passage is given twice.
The one rule: vectors that cannot be had cost a note in the answer, never the answer; what only the store can give raises
StoreUnavailable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from middleware.retrieval.asked import Wanted
from middleware.retrieval.fusion import above, fuse
from middleware.retrieval.refusals import missing
from middleware.retrieval.text.passages import tokens
from middleware.retrieval.vectors import NoVectors, Vectors
from proxy.store import Hit, Library, Vector

T = TypeVar("T")
Meant = Mapping[str, Vector] | None
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
        searches = [(query, wanted) for query, wanted in searches if query.strip()]
        near = asyncio.ensure_future(self._meant([query for query, wanted in searches if wanted.how != "keyword_search"]))
        try:
            found = await together([_one(library, owner, query, wanted, near) for query, wanted in searches])
            return Found(found[0] if len(found) == 1 else fuse(found), await near is None)
        finally:
            near.cancel()

    async def _meant(self, queries: Sequence[str]) -> Meant:
        """The vectors of these queries; none where there are no embeddings, None where they are not to be had."""
        if self._vectors is None or not queries:
            return {}
        try:
            return await self._vectors.of_questions(queries, self._patience)
        except NoVectors:
            return None


async def _one(library: Library, owner: str, query: str, wanted: Wanted, meant: asyncio.Future[Meant]) -> Sequence[Hit]:
    """One search: words at once, vectors when they are there. Where they are not to be had, words stand in for them."""
    most = max(LEAST, DEPTH * wanted.top_k)

    async def by_words() -> Sequence[Hit]:
        alone = wanted.how == "vector_search" and await asyncio.shield(meant) is not None
        return () if alone else await library.search_text(owner, query, most, wanted.where)

    async def by_vector() -> Sequence[Hit]:
        vector = None if wanted.how == "keyword_search" else (await asyncio.shield(meant) or {}).get(query)
        return () if vector is None else await library.search_vectors(owner, vector, most, wanted.where)

    words, near = await together([by_words(), by_vector()])
    return merged(words, near, most, wanted)


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


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all give; the first that raises ends the others, and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
