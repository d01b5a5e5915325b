"""Ranked lists of passages made into one, by reciprocal rank.

Strategy: a passage gets 1 / (k + its rank) from every list that has it (Cormack, Clarke and Büttcher, 2009), because the scores
of full text and of vectors have no common unit and their ranks have. k = 60 lets no first place of one list outdo agreement.
A threshold is a cosine. It bounds the list of vectors before that is fused; what full text found is not bounded by it, for the
engine's score means nothing outside of one query, and a fused score says how high a passage ranks, not how well it fits.
The one rule: the order of the lists changes nothing, and equal input gives equal output, ties included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import fsum

from proxy.store import Hit

K = 60
Key = tuple[str, int]


def fuse(ranked: Sequence[Sequence[Hit]], k: int = K) -> list[Hit]:
    """The hits of all lists, each passage once, the best first. score: the sum of 1 / (k + rank), ranks from 1.

    Of a passage that stands in a list more than once, the first place counts. Ties go to the better best rank, then by file and
    number.
    """
    hits: dict[Key, Hit] = {}
    ranks: dict[Key, list[int]] = {}
    for found in ranked:
        for rank, (key, hit) in enumerate(_distinct(found).items(), 1):
            hits.setdefault(key, hit)
            ranks.setdefault(key, []).append(rank)
    # fsum, because it is exact: the sum must not depend on the order of the lists.
    fused = [replace(hits[key], score=fsum(1 / (k + rank) for rank in places)) for key, places in ranks.items()]
    return sorted(fused, key=lambda hit: (-hit.score, min(ranks[_key(hit)]), _key(hit)))


def above(hits: Iterable[Hit], threshold: float) -> list[Hit]:
    """Those of the list of vectors whose cosine is at least the threshold."""
    return [hit for hit in hits if hit.score >= threshold]


def _distinct(hits: Sequence[Hit]) -> dict[Key, Hit]:
    found: dict[Key, Hit] = {}
    for hit in hits:
        found.setdefault(_key(hit), hit)
    return found


def _key(hit: Hit) -> Key:
    return hit.file, hit.passage.number
