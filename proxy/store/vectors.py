"""Embeddings as bytes: floats of 4 bytes, the least significant first, whatever the machine. Pure, and without numpy."""

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
