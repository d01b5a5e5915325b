"""What is found, in both homes: by words, whatever is asked, and by vectors, exactly."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy.store import Passage, Store, Where
from tests.test_store_library import EVERYWHERE, added, found, indexed

FLOATS = st.integers(-50, 50).map(float)


async def test_what_has_more_of_the_words_comes_first(store: Store) -> None:
    await indexed(store, "o", "a", "The harbour pilot is asleep.", "A pilot light.", "Nothing of it here.")
    await indexed(store, "o", "b", "The harbour pilot took the ship past the harbour wall, as a pilot does.")
    texts = await found(store, "o", "where is the harbour pilot?")
    assert texts[-1] == "A pilot light."
    assert len(texts) == 3


async def test_words_are_found_in_other_forms_and_in_any_case(store: Store) -> None:
    await indexed(store, "o", "a", "Three SHIPS were sailing.")
    assert await found(store, "o", "ship") == ["Three SHIPS were sailing."]
    assert await found(store, "o", "SAILED") == ["Three SHIPS were sailing."]
    assert await found(store, "o", "boat") == []


async def test_headings_are_searched_and_come_with_the_page(store: Store) -> None:
    await added(store, "o", "a", name="handbook.pdf")
    await store.files.claim("w", 60.0, 1000.0)
    kept = Passage(0, "Four weeks.", "Handbook > Holidays", 7)
    await store.files.keep("a", "w", [kept], 1.0, 1000.0)
    await store.files.settle("a", "w", None)
    [hit] = await store.files.search_text("o", "holidays", 10, EVERYWHERE)
    assert (hit.file, hit.name, hit.passage) == ("a", "handbook.pdf", kept)
    assert hit.score > 0


async def test_other_languages_are_searched_by_their_words(store: Store) -> None:
    await indexed(store, "o", "a", "Der Lotse schläft.", "Лоцман спит.")
    assert await found(store, "o", "lotse") == ["Der Lotse schläft."]
    assert await found(store, "o", "schläft?") == ["Der Lotse schläft."]
    assert await found(store, "o", "ЛОЦМАН") == ["Лоцман спит."]


async def test_no_more_come_than_were_asked_for_and_the_best_of_them(store: Store) -> None:
    vectors = [[math.cos(angle), math.sin(angle)] for angle in (0.5, 0.1, 0.4, 0.2, 0.3)]
    await indexed(store, "o", "a", *(f"text {number}" for number in range(5)), vectors=vectors)
    assert len(await store.files.search_text("o", "text", 2, EVERYWHERE)) == 2
    hits = await store.files.search_vectors("o", [1.0, 0.0], 3, EVERYWHERE)
    assert [hit.passage.number for hit in hits] == [1, 3, 4]
    assert [hit.score for hit in hits] == pytest.approx([math.cos(angle) for angle in (0.1, 0.2, 0.3)], abs=1e-5)
    assert await store.files.search_text("o", "text", 0, EVERYWHERE) == []
    assert await store.files.search_vectors("o", [1.0, 0.0], 0, EVERYWHERE) == []


async def test_only_the_files_and_the_collections_that_are_named_are_searched(store: Store) -> None:
    await indexed(store, "o", "a", "text a", vectors=[[1.0]])
    await indexed(store, "o", "b", "text b", vectors=[[1.0]], knowledge="kb")
    await indexed(store, "o", "c", "text c", vectors=[[1.0]], knowledge="other")
    for where, expected in [
        (Where(), "abc"),
        (Where(files=["a"]), "a"),
        (Where(knowledge=["kb"]), "b"),
        (Where(files=["a"], knowledge=["kb"]), "ab"),
        (Where(files=["a", "c", "none"]), "ac"),
        (Where(files=["none"]), ""),
    ]:
        assert sorted(await found(store, "o", where=where)) == [f"text {name}" for name in expected]
        hits = await store.files.search_vectors("o", [1.0], 10, where)
        assert sorted(hit.passage.text for hit in hits) == [f"text {name}" for name in expected]


async def test_vectors_of_another_length_and_of_no_length_are_passed_over(store: Store) -> None:
    vectors = [[1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]
    await indexed(store, "o", "a", "two", "three", "nowhere", "behind", vectors=vectors)
    hits = await store.files.search_vectors("o", [2.0, 0.0], 10, EVERYWHERE)
    assert [hit.passage.text for hit in hits] == ["two", "behind"]
    assert [hit.score for hit in hits] == pytest.approx([1.0, -1.0])
    assert await store.files.search_vectors("o", [0.0, 0.0], 10, EVERYWHERE) == []
    assert await store.files.search_vectors("o", [], 10, EVERYWHERE) == []


async def test_passages_with_and_without_vectors_stand_side_by_side(store: Store) -> None:
    await indexed(store, "o", "a", "plain text")
    await indexed(store, "o", "b", "text with a vector", vectors=[[1.0]])
    assert len(await found(store, "o")) == 2
    assert [hit.file for hit in await store.files.search_vectors("o", [1.0], 10, EVERYWHERE)] == ["b"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vectors=st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=20),
    wanted=st.lists(FLOATS, min_size=3, max_size=3),
)
async def test_the_nearest_are_those_that_a_plain_sum_finds(
    store: Store, vectors: list[list[float]], wanted: list[float]
) -> None:
    await indexed(store, "o", "a", *(f"text {number}" for number in range(len(vectors))), vectors=vectors)
    try:
        hits = await store.files.search_vectors("o", wanted, 5, EVERYWHERE)
    finally:
        await store.files.remove("o", "a")
    expected = sorted((cosine(vector, wanted) for vector in vectors if long(vector) and long(wanted)), reverse=True)[:5]
    assert [hit.score for hit in hits] == pytest.approx(expected, abs=1e-4)


def long(vector: list[float]) -> bool:
    return math.hypot(*vector) > 0


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(st.characters(), max_size=60) | st.text("\"'()*:^-+&|!<> ANDORNEAR\\\0a_%", max_size=40))
@example("harbour" * 1000)
@example(" ".join(f"word{number}" for number in range(5000)))
@example('text" OR scope : "o')
@example("NEAR(a b) AND NOT c*")
@example("'; DROP TABLE files; --")
@example("_ __ \0 \ud800")
async def test_any_text_is_a_valid_query(store: Store, query: str) -> None:
    if await store.files.file("o", "a") is None:
        await indexed(store, "o", "a", "some text")
        await indexed(store, "p", "b", "any or and not near text scope heading")
    hits = await store.files.search_text("o", query, 10, EVERYWHERE)
    assert all(hit.file == "a" for hit in hits)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(), max_size=200))
async def test_any_text_can_be_kept_and_the_words_beside_it_are_found(store: Store, text: str) -> None:
    await indexed(store, "o", "a", f"{text} harbour")
    try:
        [hit] = await store.files.search_text("o", "harbour", 10, EVERYWHERE)
    finally:
        await store.files.remove("o", "a")
    assert hit.passage.text == f"{text} harbour".encode("utf-8", "replace").decode().replace("\0", "\ufffd")
