"""One file from standard input to JSON on standard output, within bounds: the other side of `apart`.

The one rule: the bounds are set before the file is looked at, and whatever happens then is an answer, as far as one can be given.
"""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

import orjson

from middleware.retrieval.text import ExtractionError, Limits, extract
from middleware.retrieval.text.passages import passages

Json = dict[str, Any]


def main() -> None:
    question: Json = orjson.loads(sys.stdin.buffer.readline())
    limits = Limits(**question["limits"])
    _bound(limits)
    sys.stdout.buffer.write(orjson.dumps(_answer(question, limits)))


def _bound(limits: Limits) -> None:
    """The system's own, where it has them: it stops what does not stop by itself. A core would hold the file: none is made."""
    seconds = math.ceil(limits.seconds) + 1
    bounds = (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    )
    for which, most in bounds:
        try:
            resource.setrlimit(which, (most, most))
        except (ValueError, OSError):  # not on this system, or stricter already
            continue


def _answer(question: Json, limits: Limits) -> Json:
    try:
        document = extract(sys.stdin.buffer.read(), question["name"], question["media_type"], limits)
        if "size" not in question:
            blocks = [(block.text, block.heading, block.page, block.shape) for block in document.blocks]
            return {"kind": document.kind, "blocks": blocks}
        found = passages(document, question["size"], question["overlap"])
        return {"passages": [(passage.text, passage.heading, passage.page) for passage in found]}
    except ExtractionError as error:
        return {"error": str(error)}
    except (MemoryError, RecursionError):
        return {"error": "The file takes more memory to read than is given to one file."}


if __name__ == "__main__":
    main()
