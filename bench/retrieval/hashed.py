"""Vectors without a model: words and parts of words, hashed into a fixed number of places.

Strategy: every word, its stem of five letters and its trigrams count with the logarithm of how often they come, at a place and
with a sign that a hash gives (Weinberger et al., 2009). It finds spellings, not meanings: it stands in where no model can be had.
The one rule: the same text gives the same vector on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import log, sqrt

PLACES = 1024
_WORD = re.compile(r"\w+")


def embed(texts: Sequence[str]) -> list[list[float]]:
    return [_vector(text) for text in texts]


def _vector(text: str) -> list[float]:
    vector = [0.0] * PLACES
    for feature, times in Counter(_features(text)).items():
        place, sign = _place(feature)
        vector[place] += sign * (1 + log(times))
    length = sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


@lru_cache(maxsize=100_000)
def _place(feature: str) -> tuple[int, int]:
    number = int.from_bytes(blake2b(feature.encode(), digest_size=8).digest())
    return number % PLACES, 1 if number >> 63 else -1


def _features(text: str) -> Iterator[str]:
    for word in _WORD.findall(text.casefold()):
        if len(word) > 3:  # the short ones are in every text
            yield word
            yield word[:5] + "*"
            padded = f" {word} "
            yield from (padded[at : at + 3] for at in range(len(padded) - 2))
