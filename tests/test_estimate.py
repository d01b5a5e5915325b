"""Token estimates: of the right size for whatever script, and nothing where nothing is known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.estimate import estimated_input, estimated_usage
from proxy.reply import Batch, Sent, Trailer
from tests.support.decoding import make_call

CALL = make_call({"messages": [{"role": "user", "content": "Hi"}]})


def streamed(texts: list[str], **delta: Any) -> Trailer:
    """The trailer of a stream that said these, one chunk each, and then broke."""
    trailer, size, last = Trailer(), 0, Batch([])
    for number, text in enumerate(texts):
        said = {"content": text, **delta, **({} if number else {"role": "assistant"})}
        last = Batch([{"id": "c", "model": "m", "choices": [{"index": 0, "delta": said, "finish_reason": None}]}])
        size += len(last.sse())
    trailer.chunks = len(texts)
    trailer.sent = Sent(size, last, len(last.sse()))
    return trailer


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("word" * 100, 100), ("漢字" * 100, 150), ("Привет " * 100, 325), ("", 0), ("a", 1)],
)
def test_a_token_is_about_four_bytes_of_the_question(text: str, tokens: int) -> None:
    assert estimated_input({"messages": [{"role": "user", "content": text}]}) == tokens


@given(st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=60), st.sampled_from([1, 3]))
def test_what_was_streamed_is_known_by_its_size(texts: list[str], repeats: int) -> None:
    said = sum(len(text.encode(errors="replace")) for text in texts * repeats)
    usage = estimated_usage(CALL, streamed(texts * repeats))
    assert usage is not None
    # JSON's escapes make some characters longer than they are, at most six bytes for one.
    assert max(1, said // 4) <= usage["completion_tokens"] <= max(1, -(-said * 6 // 4))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_where_nothing_was_streamed_nothing_is_estimated() -> None:
    assert estimated_usage(CALL, Trailer()) is None
