"""The memory store: never over its bytes, least recently used goes first, nothing outlives its time."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from middleware.cache.entry import OVERHEAD, Entry
from middleware.cache.store import Found, MemoryStore


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def entry(size: int = 100, ttl: float = 60.0, key_name: str = "web", name: str | None = None, **fields: Any) -> Entry:
    row: dict[str, Any] = {
        "key_name": key_name,
        "name": name,
        "target": "openai/m",
        "dropped": (),
        "whole": False,
        "events": b"x" * size,
        "ends": array("Q", [size]),
        "gaps": array("d", [0.0]),
        "finish": 0,
        "chunks": 1,
        "usage": None,
        "finish_reasons": ((0, "stop"),),
        "ttl": ttl,
        **fields,
    }
    return Entry(**row)


ONE = entry().size


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_what_was_stored_is_found_with_its_age(clock: Clock) -> None:
    store, kept = MemoryStore(2**20, clock), entry()
    assert await store.set("k", kept)
    clock.now += 12.5
    assert await store.get("k") == Found(kept, 12.5)
    assert await store.get("other") is None


async def test_an_entry_lives_as_long_as_it_says_itself(clock: Clock) -> None:
    store = MemoryStore(2**20, clock)
    await store.set("short", entry(ttl=1))
    await store.set("long", entry(ttl=100))
    clock.now += 0.999
    assert await store.get("short")
    clock.now += 0.001
    assert await store.get("short") is None
    assert await store.get("long")
    figures = store.figures()
    assert (figures.entries, figures.bytes, figures.evictions) == (1, ONE, {"size": 0, "expired": 1})


async def test_looking_does_not_prolong(clock: Clock) -> None:
    store = MemoryStore(2**20, clock)
    await store.set("k", entry(ttl=10))
    for _ in range(10):
        assert await store.get("k")
        clock.now += 1
    assert await store.get("k") is None


async def test_storing_anew_does(clock: Clock) -> None:
    store = MemoryStore(2**20, clock)
    await store.set("k", entry(ttl=10))
    clock.now += 9
    await store.set("k", entry(ttl=10))
    clock.now += 9
    found = await store.get("k")
    assert found is not None
    assert found.age == 9
    assert store.figures().entries == 1


async def test_the_least_recently_used_goes_first(clock: Clock) -> None:
    store = MemoryStore(3 * ONE, clock)
    for key in "abc":
        await store.set(key, entry())
    await store.get("a")
    await store.set("d", entry())
    assert [key for key in "abcd" if await store.get(key)] == ["a", "c", "d"]
    assert store.figures().evictions == {"size": 1, "expired": 0}


async def test_what_has_expired_goes_before_what_lives(clock: Clock) -> None:
    store = MemoryStore(2 * ONE, clock)
    await store.set("old", entry(ttl=100))
    await store.set("new", entry(ttl=1))
    await store.get("new")
    clock.now += 2
    await store.set("more", entry())
    assert await store.get("old")
    assert store.figures().evictions == {"size": 0, "expired": 1}


async def test_what_is_larger_than_all_room_is_not_kept_nor_is_its_predecessor(clock: Clock) -> None:
    store = MemoryStore(2 * ONE, clock)
    await store.set("k", entry())
    await store.set("other", entry())
    assert not await store.set("k", entry(size=3 * ONE))
    assert await store.get("k") is None
    assert await store.get("other")


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ({}, ""),
        ({"key_name": "web"}, "cd"),
        ({"name": "bot"}, "bd"),
        ({"key_name": "web", "name": "bot"}, "bcd"),
        ({"key_name": "nobody"}, "abcd"),
        ({"name": ""}, "abcd"),
    ],
)
async def test_entries_are_forgotten_by_key_name_by_tracking_name_or_all(clock: Clock, wanted: Any, left: str) -> None:
    store = MemoryStore(2**20, clock)
    for key, key_name, name in [("a", "web", "bot"), ("b", "web", None), ("c", "app", "bot"), ("d", "app", "other")]:
        await store.set(key, entry(key_name=key_name, name=name))
    assert await store.clear(**wanted) == 4 - len(left)
    assert "".join([key for key in "abcd" if await store.get(key)]) == left
    assert store.figures().evictions == {"size": 0, "expired": 0}, "deleting is not evicting"


async def test_what_has_expired_is_not_counted_as_deleted_and_looking_is_no_use(clock: Clock) -> None:
    store = MemoryStore(3 * ONE, clock)
    await store.set("gone", entry(ttl=1))
    clock.now += 2
    await store.set("a", entry(key_name="old"))
    await store.set("b", entry())
    await store.get("a")
    assert await store.clear(key_name="nobody") == 0
    await store.set("c", entry())
    await store.set("d", entry())
    assert await store.get("b") is None, "clear does not make anything recently used"
    assert await store.clear() == 3
    assert store.figures().bytes == 0


async def test_one_entry_is_forgotten_by_its_key(clock: Clock) -> None:
    store = MemoryStore(2**20, clock)
    await store.set("k", entry())
    assert await store.delete("k")
    assert not await store.delete("k")
    assert store.figures().entries == 0


def test_an_entry_takes_no_more_memory_than_it_says() -> None:
    """Measured over many small ones, where the objects around the bytes weigh most."""
    store, count = MemoryStore(2**30), 500
    usage = b'{"prompt_tokens": 1}'
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(count):
            made = entry(
                size=300 + number,
                ends=array("Q", range(100)),
                gaps=array("d", [0.5] * 100),
                usage=usage + b" " * (number % 7),
                finish_reasons=tuple((index, f"reason-{number}-{index}") for index in range(4)),
                name=f"name-{number}",
                key_name=f"key-{number}",
                target=f"target-{number}",
                dropped=(f"field-{number}",),
            )
            _set(store, f"{number:064x}", made)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= store.figures().bytes < 1.5 * taken


def _set(store: MemoryStore, key: str, made: Entry) -> None:
    """`set` without an event loop, whose own memory is not the entry's; it never waits."""
    with pytest.raises(StopIteration):
        store.set(key, made).send(None)


def test_the_repr_of_an_entry_shows_nothing_of_the_answer() -> None:
    assert "secret" not in repr(entry(events=b'data: {"secret": 1}\n\n'))


KEYS = st.sampled_from("abcdefgh")


class Bounded(RuleBasedStateMachine):
    """Whatever is done, in whatever order: bytes within the bound, and what is found is what was stored last and still lives."""

    @initialize(room=st.integers(OVERHEAD, 12 * ONE))
    def begin(self, room: int) -> None:
        self.clock = Clock()
        self.room = room
        self.store = MemoryStore(room, self.clock)
        self.model: dict[str, tuple[Entry, float]] = {}

    @rule(key=KEYS, size=st.integers(0, 8 * ONE), ttl=st.integers(1, 20), key_name=st.sampled_from(["web", "app"]))
    def put(self, key: str, size: int, ttl: int, key_name: str) -> None:
        made = entry(size=size, ttl=ttl, key_name=key_name)
        kept = asyncio.run(self.store.set(key, made))
        assert kept == (made.size <= self.room)
        self.model.pop(key, None)
        if kept:
            self.model[key] = (made, self.clock.now)
            assert asyncio.run(self.store.get(key)) == Found(made, 0.0), "what was just stored is there"

    @rule(key=KEYS)
    def look(self, key: str) -> None:
        found = asyncio.run(self.store.get(key))
        if found is not None:
            made, since = self.model[key]
            assert found == Found(made, self.clock.now - since)
            assert found.age < made.ttl

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        asyncio.run(self.store.delete(key))
        assert asyncio.run(self.store.get(key)) is None
        self.model.pop(key, None)

    @rule(key_name=st.none() | st.sampled_from(["web", "app"]))
    def clear(self, key_name: str | None) -> None:
        before = self.store.figures().entries
        deleted = asyncio.run(self.store.clear(key_name))
        assert self.store.figures().entries == before - deleted
        self.model = {key: kept for key, kept in self.model.items() if key_name not in (None, kept[0].key_name)}

    @invariant()
    def within_its_bound(self) -> None:
        if hasattr(self, "store"):
            figures = self.store.figures()
            assert figures.bytes <= self.room
            assert figures.entries <= len(self.model)


TestBounded = Bounded.TestCase


@given(sizes=st.lists(st.integers(0, 3 * ONE), max_size=30), room=st.integers(OVERHEAD, 6 * ONE))
def test_least_recently_used_is_exactly_what_goes(sizes: list[int], room: int) -> None:
    """Against a model: the newest entries that fit, from the end backwards (none is looked at, none expires)."""
    store = MemoryStore(room, Clock())
    fits: list[tuple[str, int]] = []
    for number, size in enumerate(sizes):
        made = entry(size=size)
        if asyncio.run(store.set(str(number), made)):
            fits.append((str(number), made.size))
            while sum(size for _, size in fits) > room:
                fits.pop(0)
    assert [str(n) for n in range(len(sizes)) if asyncio.run(store.get(str(n)))] == [key for key, _ in fits]
