"""SQLite's own side: the file, its steps, several processes, and what a kill leaves."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.store import StoreUnavailable, Turn, UnusableStore, Where, sqlite
from proxy.store.guard import Guard
from proxy.store.migrations import known, pending
from proxy.store.sqlite import database
from proxy.store.sqlite.database import connection, migrate, statements
from tests.test_store_library import added, file, found, indexed, passages

STEPS = known("proxy.store.sqlite")


def form(path: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()
    db.close()
    return rows


def numbers(path: Path) -> list[int]:
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT number FROM migrations ORDER BY number").fetchall()
    db.close()
    return [number for (number,) in rows]


async def fresh(folder: Path) -> Path:
    await (await sqlite.opened(folder)).close()
    return folder / "penstock.db"


async def test_the_file_is_in_wal_mode_and_its_owners_alone(tmp_path: Path) -> None:
    path = await fresh(tmp_path / "a" / "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["penstock.db"], "the log is emptied at the end"


# Steps


@pytest.mark.parametrize("applied", range(len(STEPS) + 1))
async def test_a_file_of_any_earlier_form_becomes_todays(tmp_path: Path, applied: int) -> None:
    path = tmp_path / "penstock.db"
    db = connection(path)
    if applied:
        db.execute(database.APPLIED)
    for step in STEPS[:applied]:
        for statement in statements(step.text):
            db.execute(statement)
        db.execute("INSERT INTO migrations VALUES (?, ?, 0)", (step.number, step.name))
    db.close()
    await fresh(tmp_path)
    assert numbers(path) == [step.number for step in STEPS]
    assert form(path) == form(await fresh(tmp_path / "other"))


async def test_a_file_of_a_newer_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = await fresh(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO migrations VALUES (9999, '9999_later', 0)")
    db.close()
    before = form(path)
    with pytest.raises(UnusableStore, match=f"newer than this program: it has migration 9999, .* up to {STEPS[-1].number}"):
        await sqlite.opened(tmp_path)
    assert form(path) == before


async def test_a_step_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [*STEPS[:1], type(STEPS[0])(2, "0002_wrong", "CREATE TABLE half (a);\nCREATE TABLE half (a);\n")]
    monkeypatch.setattr(database, "known", lambda package: wrong)
    with pytest.raises(UnusableStore, match="table half already exists"):
        await sqlite.opened(tmp_path)
    assert form(tmp_path / "penstock.db") == []


async def test_a_python_whose_sqlite_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(UnusableStore, match=r"SQLite 3\.35 or later is needed"):
        await sqlite.opened(tmp_path)


async def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "penstock.db").write_bytes(b"Dear diary, " * 100)
    with pytest.raises(UnusableStore, match="penstock.db: sqlite: file is not a database"):  # noqa: RUF043
        await sqlite.opened(tmp_path)


def test_steps_are_numbered_without_a_gap_and_known_from_the_package() -> None:
    for package in ("proxy.store.sqlite", "proxy.store.postgres"):
        steps = known(package)
        assert [step.number for step in steps] == list(range(1, len(steps) + 1))
        assert pending(steps, []) == steps
        assert pending(steps, [1]) == steps[1:]


# Several at one file


async def test_two_homes_on_one_file_see_each_others_writes_and_lose_none(tmp_path: Path) -> None:
    one, other = await sqlite.opened(tmp_path), await sqlite.opened(tmp_path)
    turns = [
        home.store.conversations.append("o", "s", Turn([], 1, 1.0, f"{number}-{at}"))
        for number, home in enumerate((one, other)) for at in range(30)
    ]  # fmt: skip
    assert sorted(await asyncio.gather(*turns)) == list(range(1, 61))
    assert len(await one.store.conversations.turns("o", "s", 100)) == 60
    await added(one.store, "o", "a")
    jobs = await asyncio.gather(*(home.store.files.claim("w", 60.0, 1.0) for home in (one, other)))
    assert sum(job is not None for job in jobs) == 1
    await one.close()
    await other.close()


async def test_a_file_that_another_holds_for_too_long_is_unavailable_and_then_serves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await fresh(tmp_path)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    home = await sqlite.opened(tmp_path)
    holder = connection(path)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="sqlite: database is locked"):
        await home.store.conversations.append("o", "s", Turn([], 1, 1.0, "r"))
    assert await home.store.conversations.turns("o", "s", 10) == [], "readers do not wait for the writer"
    holder.execute("ROLLBACK")
    holder.close()
    assert await home.store.conversations.append("o", "s", Turn([], 1, 1.0, "r")) == 1
    await home.close()


async def test_a_save_whose_caller_lost_patience_may_be_repeated_and_is_kept_once(tmp_path: Path) -> None:
    home = await sqlite.opened(tmp_path)
    guard = Guard("conversations", lambda name, why: None)
    holder = connection(tmp_path / "penstock.db")
    holder.execute("BEGIN IMMEDIATE")
    turn = Turn([], 1, 1.0, "r")
    with pytest.raises(StoreUnavailable, match="append took longer than"):
        await guard.call(0.02, home.store.conversations.append, "o", "s", turn)
    holder.execute("ROLLBACK")
    holder.close()
    assert await guard.call(10.0, home.store.conversations.append, "o", "s", turn) == 1
    assert len(await home.store.conversations.turns("o", "s", 10)) == 1
    await home.close()


# One transaction for many


async def test_of_writes_that_share_a_transaction_one_that_fails_undoes_only_itself(tmp_path: Path) -> None:
    home = await sqlite.opened(tmp_path)
    good = [home.store.conversations.append("o", "s", Turn([], 1, 1.0, f"r{number}")) for number in range(5)]
    bad = home.store.conversations.append("o", "t", Turn([{"content": object()}], 1, 1.0, "r"))
    ends = await asyncio.gather(*good, bad, return_exceptions=True)
    assert sorted(end for end in ends[:5] if isinstance(end, int)) == [1, 2, 3, 4, 5]
    assert isinstance(ends[5], TypeError)
    assert await home.store.conversations.session("o", "t") is None, "the session that it began is gone with it"
    await home.close()


async def test_a_closed_store_says_so_and_what_was_waiting_is_done(tmp_path: Path) -> None:
    home = await sqlite.opened(tmp_path)
    waiting = [asyncio.ensure_future(added(home.store, "o", f"f{number}")) for number in range(5)]
    await asyncio.sleep(0)
    await home.close()
    assert len(await asyncio.gather(*waiting)) == 5
    with pytest.raises(StoreUnavailable, match="closed"):
        await home.store.files.held("o")
    await home.close()


async def test_without_numpy_nothing_is_found_by_vectors_and_the_home_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.store.sqlite.has_numpy", lambda: False)
    monkeypatch.setattr("proxy.store.sqlite.search.has_numpy", lambda: False)
    home = await sqlite.opened(tmp_path)
    await indexed(home.store, "o", "a", "text", vectors=[[1.0]])
    assert await home.store.files.search_vectors("o", [1.0], 10, Where()) == []
    assert await found(home.store, "o") == ["text"]
    assert home.lacks is not None
    assert "pip install 'penstock[retrieval]'" in home.lacks
    await home.close()


async def test_the_full_text_index_stays_true_to_the_passages(tmp_path: Path) -> None:
    home = await sqlite.opened(tmp_path)
    for name in "abc":
        await indexed(home.store, "o", name, f"text {name}", "more text")
    await home.store.files.remove("o", "a")
    await home.store.files.add("o", file("d"), b"d")
    await home.store.files.claim("w", 60.0, 1000.0)
    await home.store.files.keep("d", "w", passages("half a text"), 0.5, 1000.0)
    await home.store.files.settle("d", "w", "broken")
    await home.close()
    db = connection(tmp_path / "penstock.db")
    db.execute("INSERT INTO passages_text (passages_text, rank) VALUES ('integrity-check', 1)")
    assert db.execute("SELECT count(*) FROM passages_text WHERE passages_text MATCH 'text'").fetchone() == (4,)
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()


async def test_the_backup_of_the_docs_is_whole_while_the_store_is_in_use(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "store.md").read_text()
    (command,) = re.findall(r"```sh\n(python3 .*?)```", text, re.DOTALL)
    home = await sqlite.opened(tmp_path / "data")
    await home.store.conversations.append("o", "s", Turn([], 1, 1.0, "r"))
    await indexed(home.store, "o", "a", "some text")
    words = ["bash", "-c", command.replace("python3", sys.executable)]
    await asyncio.to_thread(subprocess.run, words, cwd=tmp_path, check=True)
    await home.close()
    (tmp_path / "restored").mkdir()
    (tmp_path / "backup.db").rename(tmp_path / "restored" / "penstock.db")
    home = await sqlite.opened(tmp_path / "restored")
    assert len(await home.store.conversations.turns("o", "s", 10)) == 1
    assert await found(home.store, "o") == ["some text"]
    await home.close()


async def test_migrating_twice_in_one_process_is_one(tmp_path: Path) -> None:
    db = connection(await fresh(tmp_path))
    migrate(db)
    db.close()
    assert numbers(tmp_path / "penstock.db") == [step.number for step in STEPS]
