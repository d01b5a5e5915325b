"""A document cut into passages: nothing lost, nothing too large, cut where a reader would cut, in linear time."""

from __future__ import annotations

import sys
from itertools import pairwise
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


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(16, 60), st.integers(0, 30))
def test_what_is_said_again_is_whole_sentences_and_no_more_than_the_overlap(lengths: list[int], size: int, overlap: int) -> None:
    """Sentences of at most 60 bytes, none twice, so that each passage shows where it begins."""
    numbers = iter(range(1000))
    whole = [" ".join(f"W{next(numbers)}" for _ in range(length)) + "." for length in lengths]
    assert list(sentences(" ".join(whole))) == [*(f"{sentence} " for sentence in whole[:-1]), whole[-1]]
    reached = 0
    for passage in passages(document(" ".join(whole)), size, overlap):
        own = [sentence.strip() for sentence in sentences(passage.text)]
        begin = whole.index(own[0])
        assert own == whole[begin : begin + len(own)]
        assert begin <= reached < begin + len(own)
        assert tokens(" ".join(whole[begin:reached])) <= overlap
        reached = begin + len(own)
    assert reached == len(whole)


def test_sentences_that_leave_room_are_said_again() -> None:
    text = " ".join(f"Sentence number {number} is here." for number in range(40))
    found = passages(document(text), 40, 10)
    assert all(sentences_of(before)[-1] == sentences_of(after)[0] for before, after in pairwise(found))


def sentences_of(passage: Any) -> list[str]:
    return [sentence.strip() for sentence in sentences(passage.text)]


@pytest.mark.parametrize(
    "text",
    [
        "He met Dr. Smith at 3.14 p.m. on Jan. 5.| Then he left.",
        "J. R. R. Tolkien wrote it.| It is long.",
        "“Is it so?” he asked.| “It is.”| She went.",
        "See e.g. Fig. 3 and pp. 4 to 6.| That is all!| Is it?",
        "Das gilt z.B. auch hier, vgl. S. 3.| Danach nicht.",
        "天地玄黄。|宇宙洪荒！|日月盈昃？",
        "हम यहाँ हैं।| वे वहाँ हैं।",
        "Three things:\n|- one\n|- two\n|3. three",
        "1. The first.\n|2. The second.",
        "Wait... what?| Yes.",
        "version 2.0.1 of a.b.c is out",
        "(He left.)| Nobody knew.",
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text: str) -> None:
    assert [sentence.strip() for sentence in sentences(text.replace("|", ""))] == [part.strip() for part in text.split("|")]


@given(TEXT)
def test_the_sentences_joined_are_the_text(text: str) -> None:
    assert "".join(sentences(text)) == text


def test_headings_part_passages_and_are_told_with_them() -> None:
    blocks = (Block("One.", ("A",)), Block("Two.", ("A",)), Block("Three.", ("A", "B")), Block("Four.", ("A",), 7))
    found = passages(Document("md", blocks))
    assert [(passage.text, passage.heading, passage.page) for passage in found] == [
        ("One.\n\nTwo.", "A", None),
        ("Three.", "A > B", None),
        ("Four.", "A", 7),
    ]


def test_a_passage_has_the_page_that_its_own_text_begins_on() -> None:
    blocks = tuple(Block(f"Page {page} says this and that.", (), page) for page in range(1, 9))
    found = passages(Document("pdf", blocks), 16, 8)
    assert [passage.page for passage in found] == [1, 3, 4, 5, 6, 7, 8]
    assert found[1].text == "Page 2 says this and that.\n\nPage 3 says this and that."


def test_a_cut_is_made_between_paragraphs_where_one_is_near() -> None:
    text = "A one. A two. A three.\n\nB one. B two. B three. B four."
    assert [passage.text for passage in passages(document(text), 10, 0)] == [
        "A one. A two. A three.",
        "B one. B two. B three. B four.",
    ]


@pytest.mark.parametrize("shape", ["rows", "code"])
def test_tables_and_code_are_whole_where_they_fit_and_cut_between_lines_where_not(shape: Any) -> None:
    lines = [f"name: number {number}; value: {number}. Not an end. Nor this." for number in range(10)]
    table = "\n".join(lines)
    found = passages(Document("md", (Block("Before it. " * 12), Block(table, shape=shape))), tokens(table) + 1, 0)
    assert table in [passage.text for passage in found]
    cut = passages(document(table, shape=shape), 40, 10)
    assert [line for passage in cut for line in passage.text.split("\n")] == lines


def test_indented_code_keeps_its_first_indent() -> None:
    assert passages(document("    a\n    b", shape="code"))[0].text == "    a\n    b"


@pytest.mark.parametrize("cluster", ["e\u0301\u0323", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "한", "ก็"])
def test_a_long_word_is_not_cut_inside_what_is_read_as_one_sign(cluster: str) -> None:
    found = passages(document(cluster * 100), 16, 0)
    assert len(found) > 1
    assert all(passage.text.replace(cluster, "") == "" for passage in found)


HOSTILE = {
    "one word": "a",
    "dots": ".",
    "spaces": "a" + " " * 31,
    "lines": "\n",
    "quotes": '."',
    "short sentences": "A. ",
    "dots and words": "a.b",
    "accents": "a" + "\u0301" * 15,
    "Chinese": "天地。",
    "flags": "🇩🇪",
    "paragraphs": "A b.\n \n",
    "items": "\n- a",
    "blank lines with spaces": "\n       ",
}


def steps(text: str) -> int:
    """How many lines of Python it takes: the same on every machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        passages(document(text), 64, 16)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", HOSTILE)
def test_twice_the_text_takes_twice_the_steps(name: str) -> None:
    """Of the code here; the expressions are possessive, and pass over nothing twice."""
    unit = HOSTILE[name]
    once, twice = (steps(unit * (size // len(unit))) for size in (8_000, 16_000))
    assert twice < 2.2 * once + 500
