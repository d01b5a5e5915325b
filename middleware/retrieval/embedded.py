"""The vectors in a reply of an embeddings API, in either of its spellings.

Strategy: base64 is asked for, because it is a quarter of the bytes and of the work (64 vectors of 1,536 numbers take 1.5 ms
instead of 5.5, in which no stream moves); servers that do not know it send lists of numbers, which are taken as well.
The one rule: pure, and what is not one vector of finite numbers for each text, all of one length, is no reply.

Shape: https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import math
import sys
from array import array
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

from proxy.store import Vector

Json = dict[str, Any]


def read(found: Json, count: int) -> Sequence[Vector]:
    """The vectors of `count` texts, in the order of the texts. Raises ValueError, in words for the operator."""
    try:
        entries = sorted(found["data"], key=lambda entry: entry["index"])
        vectors = [_vector(entry["embedding"]) for entry in entries]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("the reply has no list of vectors") from None
    if len(vectors) != count or len({len(vector) for vector in vectors}) != 1:
        raise ValueError("the reply has not one vector of one length for each text")
    return vectors


def tokens(found: Json) -> int:
    """What was counted; 0 where nothing was told."""
    usage = found.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return counted if type(counted) is int and counted > 0 else 0


def _vector(written: Any) -> Vector:
    """Of base64 (little-endian floats of four bytes), or of a list. An array is a third of a list's memory."""
    vector = array("f")
    if isinstance(written, str):
        vector.frombytes(b64decode(written, validate=True))
        if sys.byteorder == "big":
            vector.byteswap()
    else:
        vector.extend(written)
    if not vector or not math.isfinite(sum(vector)):
        raise ValueError
    return vector
