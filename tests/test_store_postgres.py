"""PostgreSQL's own side: a server that is away, comes back, restarts, is newer, lacks pgvector; and the password stays unsaid."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from proxy.store import StoreUnavailable, Turn, UnusableStore, Where, postgres
from proxy.store.guard import FAILURES, Guard
from proxy.store.migrations import known
from proxy.store.postgres import database as module
from proxy.store.postgres.database import Database
from tests.support.gateway import until
from tests.test_store_library import found, indexed

STEPS = known("proxy.store.postgres")
NOWHERE = "postgresql://penstock:hunter2@127.0.0.1:9/penstock"


def quiet(trouble: str | None) -> None:
    pass


@contextlib.asynccontextmanager
async def home(url: str) -> AsyncIterator[postgres.PostgresHome]:
    opened = await postgres.opened(url, 3, 10.0, quiet)
    try:
        yield opened
    finally:
        await opened.close()


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def form(url: str) -> list[Any]:
    text = """SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns
        WHERE table_schema = current_schema() ORDER BY 1, 2"""
    indexes = "SELECT indexname FROM pg_indexes WHERE schemaname = current_schema() ORDER BY 1"
    async with connected(url) as db:
        return [tuple(row) for row in [*await db.fetch(text), *await db.fetch(indexes)]]


async def numbers(url: str) -> list[int]:
    async with connected(url) as db:
        return [row[0] for row in await db.fetch("SELECT number FROM penstock_migrations ORDER BY number")]


# Steps


@pytest.mark.parametrize("applied", range(len(STEPS) + 1))
async def test_a_database_of_any_earlier_form_becomes_todays(database: str, applied: int) -> None:
    async with connected(database) as db:
        if applied:
            await db.execute(module.APPLIED)
        for step in STEPS[:applied]:
            await db.execute(step.text)
            await db.execute("INSERT INTO penstock_migrations VALUES ($1, $2, 0)", step.number, step.name)
    async with home(database):
        assert await numbers(database) == [step.number for step in STEPS]
    assert len(await form(database)) > 40


async def test_a_database_of_a_newer_program_is_refused_and_left_as_it_is(database: str) -> None:
    async with home(database), connected(database) as db:
        await db.execute("INSERT INTO penstock_migrations VALUES (9999, '9999_later', 0)")
    before = await form(database)
    with pytest.raises(UnusableStore, match="newer than this program: it has migration 9999"):
        await postgres.opened(database, 3, 10.0, quiet)
    assert await form(database) == before


async def test_a_step_that_fails_changes_nothing(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [*STEPS[:1], type(STEPS[0])(2, "0002_wrong", "CREATE TABLE half (a int); CREATE TABLE half (a int);")]
    monkeypatch.setattr(module, "known", lambda package: wrong)
    async with home(database) as opened:
        assert opened.trouble == 'relation "half" already exists'
        with pytest.raises(StoreUnavailable, match="already exists"):
            await opened.store.files.held("o")
    assert await form(database) == []


# A server that is away


class Pauses:
    """Pauses between attempts that end when the test says so."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.over = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.over.wait()
        self.over.clear()


async def test_without_a_server_it_says_so_once_goes_on_trying_and_serves_when_there_is_one(
    postgres_server: Any, database: str
) -> None:
    pauses, told = Pauses(), list[str | None]()
    postgres_server.stop()
    connections = Database(database, 3, 10.0, told.append, pauses)
    await connections.open()
    opened = postgres.PostgresHome(connections)
    assert opened.trouble is not None
    with pytest.raises(StoreUnavailable, match="postgres: "):
        await opened.store.conversations.session("o", "s")
    for count in (2, 3, 4, 5, 6):
        pauses.over.set()
        await until(lambda count=count: len(pauses.asked) == count)
    assert pauses.asked == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert len(told) == 1
    postgres_server.ensure_postgres_running()
    pauses.over.set()
    await until(lambda: opened.trouble is None, 10.0)
    assert told[1:] == [None]
    assert await opened.store.conversations.append("o", "s", Turn([], 1, 1.0, "r")) == 1
    await opened.close()


async def test_a_server_that_restarts_beneath_us_is_found_again(postgres_server: Any, database: str) -> None:
    async with home(database) as opened:
        conversations = opened.store.conversations
        assert await conversations.append("o", "s", Turn([], 1, 1.0, "before")) == 1
        postgres_server.stop()
        with pytest.raises(StoreUnavailable):
            await conversations.append("o", "s", Turn([], 1, 1.0, "meanwhile"))
        postgres_server.ensure_postgres_running()
        assert await conversations.append("o", "s", Turn([], 1, 1.0, "after")) == 2
        assert [turn.request for turn in await conversations.turns("o", "s", 10)] == ["before", "after"]


async def half(connection: Any) -> None:
    """What a transaction does that never comes to its end."""
    await connection.execute("INSERT INTO penstock_embeddings (model, digest, vector) VALUES ('m', 'd', '')")
    await connection.execute("SELECT pg_sleep(60)")


async def in_the_middle(db: Any) -> int:
    """Wait until the server is there; the process that is at it."""
    text = "SELECT pid FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
    while (found := await db.fetchval(text)) is None:  # noqa: ASYNC110 - nobody announces it
        await asyncio.sleep(0.002)
    return int(found)


async def test_connections_that_the_server_ends_are_made_anew_and_what_they_did_is_undone(database: str) -> None:
    async with home(database) as opened, connected(database) as db:
        saving = asyncio.create_task(opened._database.transaction(half))
        await db.execute("SELECT pg_terminate_backend($1)", await in_the_middle(db))
        with pytest.raises(StoreUnavailable):
            await saving
        assert await opened.store.files.vectors("m", ["d"]) == {}


async def test_a_caller_that_goes_in_the_middle_of_a_transaction_undoes_it_and_gives_its_connection_back(database: str) -> None:
    async with home(database) as opened, connected(database) as db:
        for _ in range(5):
            saving = asyncio.create_task(opened._database.transaction(half))
            await in_the_middle(db)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
        assert await opened.store.files.vectors("m", ["d"]) == {}


async def test_a_table_that_somebody_holds_costs_its_callers_their_patience_and_no_connection(database: str) -> None:
    async with home(database) as opened, connected(database) as db:
        guard = Guard("conversations", lambda name, why: None)
        await opened.store.conversations.append("o", "s", Turn([], 1, 1.0, "r"))
        async with db.transaction():
            await db.execute("LOCK TABLE penstock_sessions")
            for _ in range(FAILURES):
                with pytest.raises(StoreUnavailable, match="session took longer than"):
                    await guard.call(0.02, opened.store.conversations.session, "o", "s")
        await guard.close()
        assert await opened.store.conversations.session("o", "s") is not None


# What is said


async def test_the_password_is_never_said() -> None:
    database = Database(NOWHERE.replace("hunter2", "hunter%32%2F"), 3, 10.0, quiet, Pauses())
    for text in ("no entry for hunter2/ here", "dsn postgresql://penstock:hunter%32%2F@127.0.0.1"):
        assert "hunter" not in database._said(OSError(text))
    other = Database("postgresql://h/d?password=hunter2", 3, 10.0, quiet)
    assert other._said(OSError("not hunter2")) == "not ***"
    await database.open()
    assert database.trouble is not None
    assert "hunter" not in database.trouble
    await database.close()


@pytest.mark.parametrize("tail", ["?sslmode=sideways", "?target_session_attrs=upwards"])
async def test_a_url_that_no_server_could_make_right_is_refused(tail: str) -> None:
    with pytest.raises(UnusableStore, match="the URL cannot be used: ") as refused:
        await postgres.opened(NOWHERE + tail, 3, 10.0, quiet)
    assert "hunter2" not in str(refused.value)


# pgvector


@pytest.fixture
async def plain(postgres: str) -> tuple[str, str]:
    """A database without pgvector and a role that may not create it: its URL, and that of somebody who may."""
    name = "plain"
    async with connected(postgres) as db:
        await db.execute("DROP DATABASE IF EXISTS plain")
        await db.execute("DROP ROLE IF EXISTS plain")
        await db.execute("CREATE ROLE plain LOGIN")
        await db.execute("CREATE DATABASE plain")
    owner = postgres.replace("/postgres?", f"/{name}?")
    async with connected(owner) as db:
        await db.execute("GRANT ALL ON SCHEMA public TO plain")
    return owner.replace("postgres:@", "plain:@"), owner


async def test_without_pgvector_it_says_so_and_what_was_kept_is_found_once_it_is_there(plain: tuple[str, str]) -> None:
    url, owner = plain
    async with home(url) as opened:
        assert opened.lacks is not None
        assert "CREATE EXTENSION vector" in opened.lacks
        await indexed(opened.store, "o", "a", "text", vectors=[[1.0, 0.0]])
        assert await opened.store.files.search_vectors("o", [1.0, 0.0], 10, Where()) == []
        assert await found(opened.store, "o") == ["text"]
    async with connected(owner) as db:
        await db.execute('CREATE SCHEMA "Odd one"; GRANT USAGE ON SCHEMA "Odd one" TO plain')
        await db.execute('CREATE EXTENSION vector SCHEMA "Odd one"')
    async with home(url) as opened:
        assert opened.lacks is None
        [hit] = await opened.store.files.search_vectors("o", [1.0, 0.0], 10, Where())
        assert hit.passage.text == "text"


async def test_vectors_that_pgvector_would_refuse_are_passed_over(database: str) -> None:
    vectors = [[float("inf"), 0.0], [float("nan"), 1.0], [1e300, 0.0], [0.0, 0.0], [1.0] * 16_001, [1.0, 0.0]]
    async with home(database) as opened:
        await indexed(opened.store, "o", "a", *(f"text {number}" for number in range(len(vectors))), vectors=vectors)
        hits = await opened.store.files.search_vectors("o", [1.0, 0.0], 10, Where())
        assert [hit.passage.number for hit in hits] == [5]
        assert await opened.store.files.search_vectors("o", [float("nan"), 0.0], 10, Where()) == []
