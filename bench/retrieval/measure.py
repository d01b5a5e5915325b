"""Recall over the question set: the store's own search in a file of its own, by words, by vectors, and both fused.

The one rule: what is measured is what the gateway runs: the SQLite home's library, and `fuse`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.retrieval.questions import Question
from middleware.retrieval.fusion import fuse
from proxy.store import File, Hit, Library, Passage, Vector, Where
from proxy.store.sqlite import opened

OWNER, WORKER = "bench", "bench"
DEPTH = 30  # hits of each list that are fused


@dataclass(frozen=True, slots=True)
class Recall:
    """The share of questions whose answer is first, and among the first five. missed: those not among the five."""

    at_1: float
    at_5: float
    missed: tuple[str, ...]


async def full_text(found: Mapping[str, Sequence[Passage]], asked: Sequence[Question]) -> Recall:
    """By words alone."""
    return (await recalls(found, asked, None))["full text"]


async def recalls(
    found: Mapping[str, Sequence[Passage]], asked: Sequence[Question], vectors: Sequence[Vector] | None
) -> dict[str, Recall]:
    """Of each way to search. vectors: of the questions; without them, by words alone."""
    with tempfile.TemporaryDirectory() as folder:
        home = await opened(Path(folder))
        try:
            await _filled(home.store.files, found)
            return await _searched(home.store.files, asked, vectors)
        finally:
            await home.close()


async def _filled(library: Library, found: Mapping[str, Sequence[Passage]]) -> None:
    for name, passages in found.items():
        await library.add(OWNER, File(name, name, "text/plain", 0, name, 0.0), b"")
        assert await library.claim(WORKER, 60.0, 0.0) is not None
        assert await library.keep(name, WORKER, passages, 1.0, 0.0)
        assert await library.settle(name, WORKER, None)


async def _searched(library: Library, asked: Sequence[Question], vectors: Sequence[Vector] | None) -> dict[str, Recall]:
    words = [await library.search_text(OWNER, question.text, DEPTH, Where()) for question in asked]
    if vectors is None:
        return {"full text": _recall(asked, words)}
    near = [await library.search_vectors(OWNER, vector, DEPTH, Where()) for vector in vectors]
    fused = [fuse(lists) for lists in zip(words, near, strict=True)]
    return {"full text": _recall(asked, words), "vectors": _recall(asked, near), "hybrid": _recall(asked, fused)}


def _recall(asked: Sequence[Question], hits: Sequence[Sequence[Hit]]) -> Recall:
    places = [_place(question, found) for question, found in zip(asked, hits, strict=True)]
    missed = tuple(question.text for question, place in zip(asked, places, strict=True) if place > 5)
    return Recall(sum(place == 1 for place in places) / len(asked), 1 - len(missed) / len(asked), missed)


def _place(question: Question, hits: Sequence[Hit]) -> int:
    """From 1; beyond all where nothing answers it."""
    return next((place for place, hit in enumerate(hits, 1) if question.is_answered_by(hit.passage.text)), DEPTH * 2 + 1)
