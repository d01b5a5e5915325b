"""Embeddings as bytes. Pure, and without numpy, which only a search needs.

Strategy: Python's own arrays, turned round on a machine that has it the other way.
The one rule: floats of 4 bytes, the least significant first, whatever the machine: a file may be carried to another.
"""

from __future__ import annotations

import sys
from array import array

from proxy.store import Vector


def packed(vector: Vector) -> bytes:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tobytes()


def unpacked(data: bytes) -> Vector:
    floats = array("f", data)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats
