"""A document cut into passages: nothing lost, nothing too large, cut where a reader would cut, in linear time."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.retrieval.text import Block, Document
from middleware.retrieval.text.passages import passages, tokens
from middleware.retrieval.text.sentences import sentences

SIGNS = st.sampled_from(
    [*"aZ9 \n\t.!?。！-|`#é中", "\n\n", ". ", "e.g. ", "\u0301", "👩‍👩‍👧", "🇩🇪🇫🇷", "\u200d", "word", "\ud800"]
)
TEXT = st.one_of(st.text(max_size=300), st.lists(SIGNS, max_size=300).map("".join))
BLOCKS = st.lists(
    st.builds(
        Block,
        TEXT,
        st.sampled_from([(), ("A",), ("A", "B")]),
        st.sampled_from([None, 1, 2]),
        st.sampled_from(["text", "rows", "code"]),
    ),
    max_size=6,
)


def document(*texts: str, shape: Any = "text") -> Document:
    return Document("txt", tuple(Block(text, shape=shape) for text in texts))


def bare(text: str) -> str:
    return "".join(text.split())


@given(BLOCKS, st.integers(1, 60))
def test_the_passages_joined_are_the_text_but_for_white_space(blocks: list[Block], size: int) -> None:
    found = passages(Document("txt", tuple(blocks)), size, 0)
    assert bare("".join(passage.text for passage in found)) == bare("".join(block.text for block in blocks))


@given(BLOCKS, st.integers(1, 60), st.integers(0, 60))
def test_no_passage_is_above_the_size_and_all_are_numbered(blocks: list[Block], size: int, overlap: int) -> None:
    found = passages(Document("txt", tuple(blocks)), size, overlap)
    assert all(tokens(passage.text) <= size and passage.text.strip() for passage in found)
    assert [passage.number for passage in found] == list(range(len(found)))
    assert found == passages(Document("txt", tuple(blocks)), size, overlap)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(8, 60), st.integers(1, 30))
def test_what_is_said_again_is_whole_sentences_from_the_end_of_the_passage_before(
    lengths: list[int], size: int, overlap: int
) -> None:
    numbers = iter(range(1000))
    whole = [" ".join(f"w{next(numbers)}" for _ in range(length)) + "." for length in lengths]
    seen: list[str] = []
    for passage in passages(document(" ".join(whole)), size, overlap):
        own = list(sentences(passage.text + " "))
        own = [sentence.strip() for sentence in own]
        again = next(
            at for at in range(len(own) + 1) if own[:at] == seen[len(seen) - at :] and own[at:] != own[:0] and own[at] not in seen
        )
        assert tokens(" ".join(own[:again])) <= min(overlap, size // 2) and again < len(own)
        seen += own[again:]
    assert " ".join(seen) == " ".join(whole)
