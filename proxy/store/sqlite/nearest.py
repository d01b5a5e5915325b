"""The nearest of many vectors, by going through all of them with numpy: exact, and no index to build or keep.

Strategy: rows come in pieces, so that memory is bounded by a piece and not by how many there are; of each piece only what is
better than the best so far is kept. 50,000 vectors of 384 floats take about a tenth of a second, most of it reading.
The one rule: numpy is imported here alone, and this module only when somebody searches by vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

PIECE_BYTES = 16 * 2**20
Row = tuple[int, bytes]


def nearest(wanted: bytes, rows: Iterable[Row], most: int) -> list[tuple[int, float]]:
    """The keys of the vectors that are nearest by cosine, the best first, each with its cosine. All are as long as `wanted`."""
    target = np.frombuffer(wanted, dtype="<f4")
    length = float(np.linalg.norm(target))
    if not length or most <= 0:
        return []
    best: list[tuple[float, int]] = []
    for piece in _pieces(rows, max(1, PIECE_BYTES // len(wanted))):
        matrix = np.frombuffer(b"".join(data for _, data in piece), dtype="<f4").reshape(len(piece), -1)
        norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = np.where(norms > 0, (matrix @ target) / (norms * length), -np.inf)
        top = [at for at in np.argsort(-scores, kind="stable")[:most] if np.isfinite(scores[at])]
        best = sorted([*best, *((float(scores[at]), piece[at][0]) for at in top)], key=lambda found: (-found[0], found[1]))[:most]
    return [(key, score) for score, key in best]


def _pieces(rows: Iterable[Row], size: int) -> Iterator[Sequence[Row]]:
    source = iter(rows)
    while piece := list(islice(source, size)):
        yield piece
