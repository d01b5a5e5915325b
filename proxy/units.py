"""Durations and sizes as people write them, and the marks that a setting's annotation carries.

Strategy: pure functions from text to a number; `Annotated` marks that say which function a setting is read with. The marks
are plain strings and one small class, so that middleware can annotate its keywords without knowing pydantic:

    def __init__(self, *, ttl: Annotated[Seconds, Between(1, 259200)] = 1800.0, max_bytes: ByteSize = 2**28) -> None

The one rule: a message says what is expected and never repeats what was given, which may be a secret in the wrong place.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

Seconds = Annotated[float, "seconds"]
ByteSize = Annotated[int, "bytes"]

SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# IEC 80000-13: KiB is 1024, kB is 1000; upper and lower case are not told apart.
BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# At most 15 digits: what a float holds exactly, and more than any setting needs.
QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]*)", re.ASCII)

DURATION_WORDS = "must be a duration such as 500ms, 30s, 5m, 1h or a plain number of seconds"
SIZE_WORDS = "must be a size such as 64KiB, 32MiB, 10MB or a plain number of bytes"


@dataclass(frozen=True, slots=True)
class Between:
    """A mark beside a number's annotation: both ends are allowed, in the setting's own unit (seconds, bytes)."""

    low: float
    high: float

    def check(self, value: float) -> None:
        """Raises ValueError, in words for the operator, unless low <= value <= high."""
        if not self.low <= value <= self.high:
            raise ValueError(f"must be from {self.low:.15g} to {self.high:.15g}")


def seconds(written: object) -> float:
    """`30s`, `500ms`, `5m`, `1h`, `2d` or plain seconds -> seconds. Raises ValueError."""
    return _quantity(written, SECONDS, DURATION_WORDS)


def byte_size(written: object) -> int:
    """`32MiB`, `10MB`, `1KiB` or plain bytes -> bytes. Raises ValueError, also where it is no whole number of bytes."""
    found = _quantity(written, BYTES, SIZE_WORDS)
    if not found.is_integer():
        raise ValueError(SIZE_WORDS)
    return int(found)


def _quantity(written: object, units: dict[str, float] | dict[str, int], words: str) -> float:
    if isinstance(written, int | float) and not isinstance(written, bool):
        if math.isfinite(written) and written >= 0:
            return float(written)
        raise ValueError(words)
    match = QUANTITY.fullmatch(written.strip()) if isinstance(written, str) else None
    if match is None or match[2].lower() not in units:
        raise ValueError(words)
    return float(match[1]) * units[match[2].lower()]
