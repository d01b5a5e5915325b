"""Files in both homes: kept once, listed, counted, claimed by one worker at a time, indexed whole or not at all."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import pytest

from proxy.store import File, Passage, Store, Where

EVERYWHERE = Where()


def file(id: str, content: bytes | None = None, *, created: float = 1000.0, name: str = "a.txt", **fields: Any) -> File:
    content = id.encode() if content is None else content
    return File(id, name, "text/plain", len(content), sha256(content).hexdigest(), created, **fields)


async def added(store: Store, owner: str, id: str, **fields: Any) -> File:
    return await store.files.add(owner, file(id, **fields), id.encode())


def passages(*texts: str, start: int = 0, vectors: Sequence[Sequence[float]] | None = None) -> list[Passage]:
    found = vectors or [None] * len(texts)  # type: ignore[list-item]
    return [Passage(start + at, text, vector=vector) for at, (text, vector) in enumerate(zip(texts, found, strict=True))]


async def indexed(
    store: Store, owner: str, id: str, *texts: str, vectors: Sequence[Sequence[float]] | None = None, **fields: Any
) -> None:
    """A file that has gone the whole way."""
    await added(store, owner, id, **fields)
    job = await store.files.claim("w", 60.0, 1000.0)
    assert job is not None
    assert job.file.id == id
    assert await store.files.keep(id, "w", passages(*texts, vectors=vectors), 1.0, 1000.0)
    assert await store.files.settle(id, "w", None)


async def found(store: Store, owner: str, query: str = "text", where: Where = EVERYWHERE) -> list[str]:
    return [hit.passage.text for hit in await store.files.search_text(owner, query, 100, where)]


# Files


async def test_a_file_comes_back_as_it_was_kept_with_its_content(store: Store) -> None:
    kept = file("f", b"\0\xff" * 1000, name='Bericht "2026".txt', purpose="user_data", knowledge="kb")
    assert await store.files.add("o", kept, b"\0\xff" * 1000) == kept
    assert await store.files.file("o", "f") == kept
    assert await store.files.content("o", "f") == b"\0\xff" * 1000
    assert await store.files.file("o", "g") is None
    assert await store.files.content("o", "g") is None


async def test_the_same_content_is_kept_once_in_a_collection(store: Store) -> None:
    first = await store.files.add("o", file("a", b"same"), b"same")
    assert await store.files.add("o", file("b", b"same"), b"same") == first
    assert (await store.files.add("o", file("c", b"same", knowledge="kb"), b"same")).id == "c"
    assert (await store.files.add("p", file("d", b"same"), b"same")).id == "d"
    assert await store.files.held("o") == (2, 8)


async def test_the_same_content_at_the_same_time_is_kept_once(store: Store) -> None:
    adds = [store.files.add("o", file(f"f{number}", b"same"), b"same") for number in range(10)]
    assert len({kept.id for kept in await asyncio.gather(*adds)}) == 1
    assert await store.files.held("o") == (1, 4)


async def test_files_come_newest_first_a_page_at_a_time(store: Store) -> None:
    for number, name in enumerate("abcde"):
        await added(store, "o", name, created=1000.0 + number // 2)
    pages: list[list[str]] = []
    after: str | None = None
    while page := await store.files.files("o", 2, after):
        pages.append([kept.id for kept in page])
        after = page[-1].id
    assert pages == [["e", "d"], ["c", "b"], ["a"]]
    assert await store.files.files("o", 10, "nothing") == []


async def test_files_are_listed_by_their_purpose(store: Store) -> None:
    await added(store, "o", "a", purpose="assistants")
    await added(store, "o", "b", purpose="user_data")
    assert [kept.id for kept in await store.files.files("o", 10, purpose="user_data")] == ["b"]
    assert [kept.id for kept in await store.files.files("o", 10, "b", "assistants")] == ["a"]


async def test_a_removed_file_is_gone_with_all_that_was_made_of_it(store: Store) -> None:
    await indexed(store, "o", "a", "some text", vectors=[[1.0, 0.0]])
    assert await store.files.remove("o", "a") is True
    assert await store.files.remove("o", "a") is False
    assert await store.files.file("o", "a") is None
    assert await store.files.content("o", "a") is None
    assert await found(store, "o") == []
    assert await store.files.search_vectors("o", [1.0, 0.0], 10, EVERYWHERE) == []
    assert await store.files.held("o") == (0, 0)
    assert (await added(store, "o", "a")).status == "uploaded"


# Indexing


async def test_files_are_claimed_in_the_order_in_which_they_came(store: Store) -> None:
    await added(store, "o", "a", created=2000.0)
    await added(store, "p", "b", created=1000.0)
    assert await store.files.waiting() == 2
    first = await store.files.claim("w", 60.0, 1000.0)
    assert await store.files.waiting() == 1
    second = await store.files.claim("w", 60.0, 1000.0)
    assert first is not None
    assert second is not None
    assert await store.files.waiting() == 0
    assert (first.owner, first.file.id, first.content, first.done) == ("o", "a", b"a", 0)
    assert (second.owner, second.file.id, second.content, second.done) == ("p", "b", b"b", 0)
    assert first.file.status == "processing"
    assert await store.files.claim("w", 60.0, 1000.0) is None


async def test_each_file_goes_to_one_worker_however_many_ask_at_once(store: Store) -> None:
    for number in range(5):
        await added(store, "o", f"f{number}")
    jobs = await asyncio.gather(*(store.files.claim(f"w{number}", 60.0, 1000.0) for number in range(12)))
    assert sorted(job.file.id for job in jobs if job is not None) == [f"f{number}" for number in range(5)]


async def test_a_worker_that_is_silent_for_its_lease_loses_its_file_to_another_that_goes_on_behind_it(store: Store) -> None:
    await added(store, "o", "a")
    await store.files.claim("slow", 60.0, 1000.0)
    assert await store.files.keep("a", "slow", passages("one", "two"), 0.5, 1050.0)
    assert await store.files.claim("other", 60.0, 1110.0) is None, "it was heard of at 1050"
    job = await store.files.claim("other", 60.0, 1110.5)
    assert job is not None
    assert (job.file.id, job.done, job.file.progress) == ("a", 2, 0.5)
    assert await store.files.keep("a", "slow", passages("zwei", "drei", start=2), 0.9, 1111.0) is False
    assert await store.files.settle("a", "slow", None) is False
    assert await store.files.settle("a", "slow", "broken") is False
    assert await store.files.keep("a", "other", passages("three", start=2), 1.0, 1111.0)
    assert await store.files.settle("a", "other", None)
    assert sorted(await found(store, "o", "one two three zwei drei")) == ["one", "three", "two"]


async def test_passages_that_are_kept_again_are_kept_once(store: Store) -> None:
    await added(store, "o", "a")
    await store.files.claim("w", 60.0, 1000.0)
    for _ in range(2):
        assert await store.files.keep("a", "w", passages("some text", "more text", vectors=[[1.0], [0.5]]), 1.0, 1000.0)
    assert await store.files.settle("a", "w", None)
    kept = await store.files.file("o", "a")
    assert kept is not None
    assert (kept.status, kept.passages, kept.progress) == ("processed", 2, 1.0)
    assert len(await found(store, "o")) == 2


async def test_a_removed_file_stops_its_worker(store: Store) -> None:
    await added(store, "o", "a")
    await store.files.claim("w", 60.0, 1000.0)
    await store.files.remove("o", "a")
    assert await store.files.keep("a", "w", passages("text"), 1.0, 1000.0) is False
    assert await store.files.settle("a", "w", None) is False


async def test_a_settled_file_is_nobodys(store: Store) -> None:
    await indexed(store, "o", "a", "text")
    assert await store.files.keep("a", "w", passages("more text", start=1), 1.0, 1000.0) is False
    assert await store.files.settle("a", "w", "broken") is False
    assert await store.files.claim("w", 0.0, 9999.0) is None


async def test_a_file_that_cannot_be_indexed_says_why_and_has_no_passages(store: Store) -> None:
    await added(store, "o", "a")
    await store.files.claim("w", 60.0, 1000.0)
    await store.files.keep("a", "w", passages("text", vectors=[[1.0]]), 0.5, 1000.0)
    assert await store.files.settle("a", "w", "The PDF is broken.\0")
    kept = await store.files.file("o", "a")
    assert kept is not None
    assert (kept.status, kept.error, kept.passages) == ("error", "The PDF is broken.\ufffd", 0)
    assert await found(store, "o") == []
    assert await store.files.claim("w", 0.0, 9999.0) is None


async def test_what_is_not_processed_is_not_found(store: Store) -> None:
    await added(store, "o", "a")
    await store.files.claim("w", 60.0, 1000.0)
    await store.files.keep("a", "w", passages("text", vectors=[[1.0]]), 0.5, 1000.0)
    assert await found(store, "o") == []
    assert await store.files.search_vectors("o", [1.0], 10, EVERYWHERE) == []
    await store.files.settle("a", "w", None)
    assert await found(store, "o") == ["text"]


# Tenants


async def test_no_owner_gets_anothers_file(store: Store) -> None:
    await added(store, "o", "a")
    assert await store.files.file("p", "a") is None


async def test_no_owner_gets_anothers_content(store: Store) -> None:
    await added(store, "o", "a")
    assert await store.files.content("p", "a") is None


async def test_no_owner_lists_anothers_files_nor_pages_by_them(store: Store) -> None:
    await added(store, "o", "a", created=2000.0)
    await added(store, "p", "b")
    assert [kept.id for kept in await store.files.files("p", 10)] == ["b"]
    assert await store.files.files("p", 10, "a") == []


async def test_no_owner_removes_anothers_file(store: Store) -> None:
    await indexed(store, "o", "a", "text")
    assert await store.files.remove("p", "a") is False
    assert await found(store, "o") == ["text"]


async def test_no_owner_is_counted_anothers_files(store: Store) -> None:
    await added(store, "o", "a")
    assert await store.files.held("p") == (0, 0)


async def test_no_owner_is_told_by_a_duplicate_that_another_has_the_file(store: Store) -> None:
    await store.files.add("o", file("a", b"secret", name="theirs.txt"), b"secret")
    kept = await store.files.add("p", file("b", b"secret", name="mine.txt"), b"secret")
    assert (kept.id, kept.name, kept.status) == ("b", "mine.txt", "uploaded")


async def test_no_owner_finds_anothers_words_even_by_the_files_id(store: Store) -> None:
    await indexed(store, "o", "a", "their text", knowledge="kb")
    await indexed(store, "p", "b", "my text", knowledge="other")
    assert await found(store, "p") == ["my text"]
    assert await found(store, "p", "their") == []
    assert await found(store, "p", where=Where(files=["a"])) == []
    assert await found(store, "p", where=Where(knowledge=["kb"])) == []


async def test_no_owner_finds_anothers_vectors_even_by_the_files_id(store: Store) -> None:
    await indexed(store, "o", "a", "their text", vectors=[[1.0, 0.0]], knowledge="kb")
    await indexed(store, "p", "b", "my text", vectors=[[0.0, 1.0]])
    for where, expected in ((EVERYWHERE, ["my text"]), (Where(files=["a"]), []), (Where(knowledge=["kb"]), [])):
        hits = await store.files.search_vectors("p", [1.0, 0.0], 10, where)
        assert [hit.passage.text for hit in hits] == expected


# Embeddings that were made before


async def test_embeddings_are_remembered_by_model_and_digest(store: Store) -> None:
    await store.files.remember("m", {"a": [0.5, -2.0], "b": array("f", [1.0])})
    await store.files.remember("m", {"a": [9.0, 9.0]})
    await store.files.remember("n", {"a": [3.0]})
    kept = await store.files.vectors("m", ["a", "b", "c"])
    assert {digest: list(vector) for digest, vector in kept.items()} == {"a": [0.5, -2.0], "b": [1.0]}
    assert await store.files.vectors("m", []) == {}
    await store.files.remember("m", {})


async def test_of_embeddings_the_last_that_were_made_are_remembered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("proxy.store.sqlite.files.MOST_EMBEDDINGS", "proxy.store.postgres.files.MOST_EMBEDDINGS"):
        monkeypatch.setattr(module, 3)
    for name in "abcdef":
        await store.files.remember("m", {name: [1.0]})
    assert sorted(await store.files.vectors("m", list("abcdef"))) == ["d", "e", "f"]
