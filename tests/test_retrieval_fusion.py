"""Ranked lists made into one: what reciprocal rank promises, for any lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from middleware.retrieval.fusion import above, fuse
from proxy.store import Hit, Passage


def hit(number: int, score: float = 1.0, file: str = "f") -> Hit:
    return Hit(file, "name", Passage(number, f"text {number}"), score)


def numbers(hits: list[Hit]) -> list[int]:
    return [hit.passage.number for hit in hits]


LISTS = st.lists(st.lists(st.integers(0, 12).map(hit), max_size=10), max_size=4)


@given(LISTS)
def test_the_order_of_the_lists_changes_nothing(lists: list[list[Hit]]) -> None:
    assert fuse(lists) == fuse(lists[::-1]) == fuse(lists[1:] + lists[:1])


@given(LISTS)
def test_every_passage_is_there_once_and_the_best_comes_first(lists: list[list[Hit]]) -> None:
    fused = fuse(lists)
    assert sorted(numbers(fused)) == sorted({found.passage.number for hits in lists for found in hits})
    assert [found.score for found in fused] == sorted((found.score for found in fused), reverse=True)


@given(st.lists(st.integers(0, 12), unique=True, max_size=10), st.integers(1, 4))
def test_one_list_or_the_same_one_again_keeps_its_order(order: list[int], times: int) -> None:
    assert numbers(fuse([[hit(number) for number in order]] * times)) == order


@given(LISTS, st.integers(0, 12))
def test_a_vote_more_never_lowers_a_passage(lists: list[list[Hit]], number: int) -> None:
    before, after = numbers(fuse(lists)), numbers(fuse([*lists, [hit(number)]]))
    assert number not in before or after.index(number) <= before.index(number)


@given(LISTS)
def test_a_passage_that_stands_twice_in_a_list_counts_once_at_its_first_place(lists: list[list[Hit]]) -> None:
    distinct = [[found for at, found in enumerate(hits) if found not in hits[:at]] for hits in lists]
    assert fuse(lists) == fuse(distinct)


def test_scores_are_sums_of_reciprocal_ranks_and_agreement_beats_one_first_place() -> None:
    fused = fuse([[hit(1), hit(2), hit(3)], [hit(3), hit(2)]], k=60)
    assert [(found.passage.number, found.score) for found in fused] == [
        (3, 1 / 63 + 1 / 61),
        (2, 1 / 62 + 1 / 62),
        (1, 1 / 61),
    ]


def test_ties_go_by_file_and_number() -> None:
    assert [found.file for found in fuse([[hit(1, file="b")], [hit(1, file="a")]])] == ["a", "b"]
    assert numbers(fuse([[hit(2)], [hit(1)]])) == [1, 2]


def test_a_threshold_keeps_what_reaches_it() -> None:
    assert numbers(above([hit(1, 0.8), hit(2, 0.7), hit(3, 0.69)], 0.7)) == [1, 2]
