"""The question set: real text that anybody may have, and questions asked in other words than it uses.

Strategy: a question names the words that answer it, not a passage, so that the set holds however the text is cut. It is answered
by a passage that has them, whatever its line ends.
The one rule: the set is only ever added to; a question that a search fails on stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from middleware.retrieval.text import extract
from middleware.retrieval.text.passages import passages
from proxy.store import Passage

HERE = Path(__file__).parent
TEXTS = ("constitution.md", "declaration.txt", "jargon.txt")


@dataclass(frozen=True, slots=True)
class Question:
    """answers: words of the text, any of which answers it."""

    text: str
    answers: tuple[str, ...]

    def is_answered_by(self, passage: str) -> bool:
        line = " ".join(passage.split())
        return any(answer in line for answer in self.answers)


def questions() -> list[Question]:
    asked = orjson.loads((HERE / "questions.json").read_bytes())
    return [Question(entry["question"], tuple(entry["answers"])) for entry in asked]


def texts() -> dict[str, bytes]:
    return {name: (HERE / "texts" / name).read_bytes() for name in TEXTS}


def cut(size: int, overlap: int) -> dict[str, Sequence[Passage]]:
    """The passages of each text."""
    return {name: passages(extract(content, name), size, overlap) for name, content in texts().items()}


def embedded(found: dict[str, Sequence[Passage]], vectors: Sequence[Sequence[float]]) -> dict[str, Sequence[Passage]]:
    """The passages with their vectors, in order."""
    rest = iter(vectors)
    return {name: [replace(passage, vector=next(rest)) for passage in of_file] for name, of_file in found.items()}


def to_embed(passage: Passage) -> str:
    """What is embedded of a passage: its headings say what it is about."""
    return f"{passage.heading}\n{passage.text}" if passage.heading else passage.text
