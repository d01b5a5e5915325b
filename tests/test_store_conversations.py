"""The memory of sessions, in both homes: what is added is there in its order, in its session, for its owner alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.store import Session, Store, Turn

ANY_TEXT = st.text(st.characters(), max_size=30)


def turn(request: str, *, created: float = 1000.0, tokens: int = 10, text: str = "Hi", **fields: Any) -> Turn:
    return Turn([{"role": "user", "content": text}, {"role": "assistant", "content": text}], tokens, created, request, **fields)


async def told(store: Store, owner: str, session: str, count: int, start: float = 1000.0) -> None:
    for number in range(count):
        await store.conversations.append(owner, session, turn(f"{session}-{number}", created=start + number))


async def test_a_turn_comes_back_as_it_was_kept(store: Store) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": 'Grüße, "\\\0\n" 😀'}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
    ]
    kept = Turn(messages, 1234, 1000.25, "req-1", "openai/gpt-5", partial=True)
    assert await store.conversations.append("o", "s", kept) == 1
    assert await store.conversations.turns("o", "s", 10) == [Turn(messages, 1234, 1000.25, "req-1", "openai/gpt-5", True, 1)]


async def test_the_newest_turns_come_and_the_oldest_of_them_first(store: Store) -> None:
    await told(store, "o", "s", 5)
    assert [found.number for found in await store.conversations.turns("o", "s", 3)] == [3, 4, 5]
    assert [found.number for found in await store.conversations.turns("o", "s", 100)] == [1, 2, 3, 4, 5]
    assert [found.number for found in await store.conversations.turns("o", "s", 2, 4)] == [2, 3]
    assert [found.number for found in await store.conversations.turns("o", "s", 9, 2**53)] == [1, 2, 3, 4, 5]
    assert await store.conversations.turns("o", "s", 9, 1) == []
    assert await store.conversations.turns("o", "s", 0) == []
    assert await store.conversations.turns("o", "none", 10) == []


async def test_a_session_knows_its_times_its_turns_and_its_tokens(store: Store) -> None:
    await told(store, "o", "s", 3)
    assert await store.conversations.session("o", "s") == Session("s", 1000.0, 1002.0, 3, 30)
    assert await store.conversations.session("o", "none") is None


async def test_the_same_request_is_kept_once(store: Store) -> None:
    first = [await store.conversations.append("o", "s", turn(name)) for name in ("a", "b", "a", "b", "c")]
    assert first == [1, 2, 1, 2, 3]
    assert [found.request for found in await store.conversations.turns("o", "s", 10)] == ["a", "b", "c"]
    assert await store.conversations.session("o", "s") == Session("s", 1000.0, 1000.0, 3, 30)


async def test_the_same_request_at_the_same_time_is_kept_once(store: Store) -> None:
    numbers = await asyncio.gather(*(store.conversations.append("o", "s", turn("a")) for _ in range(10)))
    assert set(numbers) == {1}
    assert await store.conversations.session("o", "s") == Session("s", 1000.0, 1000.0, 1, 10)


async def test_fifty_appends_at_once_are_all_there_with_numbers_of_their_own(store: Store) -> None:
    appends = [store.conversations.append("o", "s", turn(f"r{number}")) for number in range(50)]
    numbers = await asyncio.gather(*appends)
    assert sorted(numbers) == list(range(1, 51))
    kept = await store.conversations.turns("o", "s", 100)
    assert {found.number: found.request for found in kept} == {number: f"r{at}" for at, number in enumerate(numbers)}
    assert await store.conversations.session("o", "s") == Session("s", 1000.0, 1000.0, 50, 500)


async def test_sessions_come_last_used_first_a_page_at_a_time(store: Store) -> None:
    for number, name in enumerate("abcde"):
        await told(store, "o", name, 1, start=1000.0 + number)
    await store.conversations.append("o", "b", turn("again", created=2000.0))
    pages: list[list[str]] = []
    after: str | None = None
    while page := await store.conversations.sessions("o", 2, after):
        pages.append([found.id for found in page])
        after = page[-1].id
    assert pages == [["b", "e"], ["d", "c"], ["a"]]
    assert await store.conversations.sessions("o", 10, "nobody") == []
    assert await store.conversations.sessions("o", 0) == []


async def test_sessions_of_one_moment_are_each_on_one_page(store: Store) -> None:
    for name in "abcdef":
        await told(store, "o", name, 1)
    first = await store.conversations.sessions("o", 3)
    rest = await store.conversations.sessions("o", 9, first[-1].id)
    assert sorted(found.id for found in [*first, *rest]) == list("abcdef")


async def test_a_forgotten_session_is_gone_and_begins_anew(store: Store) -> None:
    await told(store, "o", "s", 3)
    assert await store.conversations.forget("o", "s") is True
    assert await store.conversations.forget("o", "s") is False
    assert await store.conversations.session("o", "s") is None
    assert await store.conversations.turns("o", "s", 10) == []
    assert await store.conversations.append("o", "s", turn("s-0")) == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns_of_the_loop=st.lists(st.integers(0, 12), min_size=1, max_size=12))
async def test_callers_that_go_in_the_middle_leave_whole_turns_or_none(store: Store, turns_of_the_loop: list[int]) -> None:
    """Each is cancelled after so many turns of the loop, wherever its append is by then."""
    tasks = [asyncio.create_task(store.conversations.append("o", "s", turn(f"r{at}"))) for at in range(len(turns_of_the_loop))]
    for number in range(max(turns_of_the_loop) + 1):
        for task, wanted in zip(tasks, turns_of_the_loop, strict=True):
            if wanted == number:
                task.cancel()
        await asyncio.sleep(0)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    last = await store.conversations.append("o", "s", turn("last"))
    kept = await store.conversations.turns("o", "s", 100)
    assert [found.number for found in kept] == list(range(1, last + 1))
    assert {end for end in ends if isinstance(end, int)} <= {found.number for found in kept}
    assert await store.conversations.session("o", "s") == Session("s", 1000.0, 1000.0, last, 10 * last)
    await store.conversations.forget("o", "s")


# Retention


async def test_sessions_that_nobody_used_since_go(store: Store) -> None:
    await told(store, "o", "old", 3, start=100.0)
    await told(store, "p", "old", 2, start=100.0)
    await told(store, "o", "new", 2, start=500.0)
    assert await store.conversations.expire(500.5, 0, 0) == 5
    assert [found.id for found in await store.conversations.sessions("o", 10)] == ["new"]
    assert await store.conversations.sessions("p", 10) == []
    assert await store.conversations.turns("o", "old", 10) == []


async def test_sessions_beyond_an_owners_last_used_go(store: Store) -> None:
    for number, name in enumerate("abcd"):
        await told(store, "o", name, 2, start=100.0 * number)
    await told(store, "p", "only", 1, start=1.0)
    assert await store.conversations.expire(0, 3, 0) == 2
    assert [found.id for found in await store.conversations.sessions("o", 10)] == ["d", "c", "b"]
    assert [found.id for found in await store.conversations.sessions("p", 10)] == ["only"]


async def test_turns_beyond_a_sessions_newest_go_and_numbers_go_on(store: Store) -> None:
    await told(store, "o", "long", 7)
    await told(store, "o", "short", 2)
    assert await store.conversations.expire(0, 0, 3) == 4
    assert [found.number for found in await store.conversations.turns("o", "long", 10)] == [5, 6, 7]
    assert await store.conversations.session("o", "long") == Session("long", 1000.0, 1006.0, 3, 30)
    assert [found.number for found in await store.conversations.turns("o", "short", 10)] == [1, 2]
    assert await store.conversations.append("o", "long", turn("next")) == 8


async def test_no_bound_lets_nothing_go_and_all_three_may_hold(store: Store) -> None:
    await told(store, "o", "a", 4, start=100.0)
    await told(store, "o", "b", 4, start=200.0)
    await told(store, "o", "c", 4, start=300.0)
    assert await store.conversations.expire(0, 0, 0) == 0
    assert await store.conversations.expire(150.0, 1, 1) == 4 + 4 + 3
    assert [(found.id, found.turns) for found in await store.conversations.sessions("o", 10)] == [("c", 1)]


async def test_more_than_one_piece_of_retention_is_done_to_the_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("proxy.store.sqlite.conversations.PIECE", "proxy.store.postgres.conversations.PIECE"):
        monkeypatch.setattr(module, 2)
    for number in range(5):
        await told(store, "o", f"s{number}", 3, start=100.0)
    assert await store.conversations.expire(0, 0, 2) == 5
    assert await store.conversations.expire(1000.0, 0, 0) == 10


# Tenants


async def test_no_owner_reads_anothers_turns(store: Store) -> None:
    await told(store, "o", "s", 2)
    assert await store.conversations.turns("p", "s", 10) == []


async def test_no_owner_sees_anothers_session(store: Store) -> None:
    await told(store, "o", "s", 2)
    assert await store.conversations.session("p", "s") is None


async def test_no_owner_lists_anothers_sessions_nor_pages_by_them(store: Store) -> None:
    await told(store, "o", "s", 2, start=5000.0)
    await told(store, "p", "t", 1)
    assert [found.id for found in await store.conversations.sessions("p", 10)] == ["t"]
    assert await store.conversations.sessions("p", 10, "s") == []


async def test_no_owner_deletes_anothers_session(store: Store) -> None:
    await told(store, "o", "s", 2)
    assert await store.conversations.forget("p", "s") is False
    assert len(await store.conversations.turns("o", "s", 10)) == 2


async def test_sessions_of_one_name_are_each_owners_own(store: Store) -> None:
    await store.conversations.append("o", "s", turn("r", text="mine"))
    assert await store.conversations.append("p", "s", turn("r", text="theirs")) == 1
    [mine], [theirs] = [await store.conversations.turns(owner, "s", 10) for owner in "op"]
    assert (mine.messages[0]["content"], theirs.messages[0]["content"]) == ("mine", "theirs")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(ANY_TEXT, min_size=2, max_size=4))
async def test_owners_and_sessions_may_have_any_name_and_are_never_mixed_up(store: Store, names: set[str]) -> None:
    pairs = [(owner, session) for owner in names for session in names]
    for number, (owner, session) in enumerate(pairs):
        await store.conversations.append(owner, session, turn("r", text=str(number)))
    for number, (owner, session) in enumerate(pairs):
        [kept] = await store.conversations.turns(owner, session, 10)
        assert kept.messages[0]["content"] == str(number)
        assert await store.conversations.forget(owner, session)
    for owner in names:
        assert await store.conversations.sessions(owner, 10) == []


@pytest.mark.parametrize("name", ["", "a\0b", "a\\0000b", "\ud800", "Ω" * 200])
async def test_a_sessions_name_comes_back_as_it_was_given(store: Store, name: str) -> None:
    await told(store, name, name, 1)
    [found] = await store.conversations.sessions(name, 10)
    assert found.id == name
