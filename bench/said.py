"""What the fake provider says, known to both ends: the provider writes it, the load generator requires it.

Strategy: the model names the answer. `bench-N-D` is N content chunks, D milliseconds apart; with D = 0 all leave in one write,
and the text is the same each time. With D > 0 each chunk carries the time at which it was written, so that its way to the client
can be measured, and the last one carries a checksum of the text before it.
The one rule: a text is right only if it is, to the byte, what was said.
"""

from __future__ import annotations

import re
import zlib
from functools import cache

MODEL = re.compile(rb'"model"\s*:\s*"(?:[\w.-]+/)*bench-(\d+)-(\d+)"')
# time.monotonic_ns() in hexadecimal: one clock for all processes of a machine.
STAMP = re.compile(rb" token\d+@([0-9a-f]{15})")


def shape(model: str) -> tuple[int, int]:
    """Chunks and milliseconds of a model name, whatever prefix a gateway wants before it. Raises ValueError."""
    if found := re.fullmatch(r"(?:[\w.-]+/)*bench-(\d+)-(\d+)", model):
        return int(found[1]), int(found[2])
    raise ValueError(f"{model} is not bench-N-D")


def word(number: int) -> bytes:
    return b" token%d" % number


@cache
def text(count: int) -> bytes:
    """All that is said at once."""
    return b"".join(map(word, range(count)))


def stamped(number: int, now: int) -> bytes:
    """Chunk `number` of a paced answer, written at `now` (time.monotonic_ns)."""
    return b" token%d@%015x" % (number, now)


def seal(checksum: int) -> bytes:
    """The last chunk of a paced answer. checksum: zlib.crc32 of all text before it."""
    return b" end@%08x" % checksum


def split(text: bytes) -> list[bytes]:
    """A text in the pieces in which it was said; each begins with a blank and has no other."""
    return [b" " + piece for piece in text[1:].split(b" ")] if text.startswith(b" ") else [text]


def wrong(parts: list[bytes], count: int, paced: bool) -> str | None:
    """What is wrong with the content chunks of a whole answer, or None."""
    if len(parts) != count:
        return f"{len(parts)} content chunks instead of {count}"
    said = b"".join(parts)
    if not paced:
        return None if said == text(count) else "the text is not what the provider said"
    if parts[-1] != seal(zlib.crc32(said[: -len(parts[-1])])):
        return "the text is not what the provider said: its checksum differs"
    return wrong_start(parts[:-1])


def wrong_start(parts: list[bytes]) -> str | None:
    """What is wrong with the first chunks of a paced answer that is still under way, or None."""
    for number, part in enumerate(parts):
        if not (part.startswith(b" token%d@" % number) and STAMP.fullmatch(part)):
            return f"chunk {number} is {part[:40]!r}"
    return None
