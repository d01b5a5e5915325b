"""The question set and what is found for it: figures may rise, and may not fall without anybody seeing it."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from bench.retrieval import hashed
from bench.retrieval.measure import recalls
from bench.retrieval.questions import cut, embedded, questions, texts, to_embed
from middleware.retrieval.text.passages import OVERLAP, SIZE


def test_every_question_is_answered_by_the_text_and_by_one_passage_of_it_at_least() -> None:
    whole = " ".join(content.decode() for content in texts().values())
    lines = " ".join(whole.split())
    passages = [passage.text for found in cut(SIZE, OVERLAP).values() for passage in found]
    assert len(questions()) >= 40
    for question in questions():
        assert all(lines.count(answer) == 1 for answer in question.answers), question.text
        assert any(question.is_answered_by(passage) for passage in passages), question.text


async def test_recall_does_not_fall() -> None:
    """Bounds a little below what docs/retrieval-quality.md states; the same on every machine, so a fall has a cause."""
    pytest.importorskip("numpy", reason="vectors are searched with numpy")
    found = cut(SIZE, OVERLAP)
    vectors = hashed.embed([to_embed(passage) for passages in found.values() for passage in passages])
    result = await recalls(embedded(found, vectors), questions(), hashed.embed([question.text for question in questions()]))
    assert result["full text"].at_5 >= 0.73
    assert result["vectors"].at_5 >= 0.60
    assert result["hybrid"].at_5 >= 0.66


def test_the_docs_state_what_was_measured() -> None:
    root = Path(__file__).parent.parent
    runs = orjson.loads((root / "bench" / "results" / "retrieval-2026-11-21.json").read_bytes())["runs"]
    page = (root / "docs" / "retrieval-quality.md").read_text(encoding="utf-8")
    for way in runs[0]["recall"]:
        cells = [f"{run['recall'][way]['at_1']:.1%} / {run['recall'][way]['at_5']:.1%}" for run in runs]
        assert f"| {way} | {' | '.join(cells)} |" in page
