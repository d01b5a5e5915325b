"""Sessions and turns in SQLite.

Strategy: every statement names the owner, and a session's own row counts what it has, so that no list has to look at turns.
Retention goes in small transactions, because other writers wait for each of them.
The one rule: a turn's number is taken from its session's row within the transaction that adds it, so no two turns share one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import orjson

from proxy.store import Session, Turn
from proxy.store.sqlite.database import Database
from proxy.store.wording import key, shown, unkey

Row = tuple[Any, ...]
PIECE = 200  # sessions that retention looks at in one transaction
ALL = 2**62  # beyond every turn's number

SESSION = "id, created, updated, turns, tokens"
# What stands behind a row in a list, newest first, where none, or one that is there, is named.
BEHIND = "(:after IS NULL OR (updated, key) < (SELECT updated, key FROM sessions WHERE owner = :owner AND id = :after))"
OVER_COUNT = """SELECT key FROM (
    SELECT key, row_number() OVER (PARTITION BY owner ORDER BY updated DESC, key DESC) AS place FROM sessions
) WHERE place > ? LIMIT ?"""


class SqliteConversations:
    """See `proxy.store.Conversations`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, owner: str, session: str, turn: Turn) -> int:
        return await self._database.write(lambda db: _append(db, key(owner), key(session), turn))

    async def turns(self, owner: str, session: str, most: int, before: int = 0) -> Sequence[Turn]:
        text = """SELECT t.number, t.messages, t.tokens, t.created, t.request, t.model, t.partial
            FROM sessions AS s JOIN turns AS t ON t.session = s.key
            WHERE s.owner = ? AND s.id = ? AND t.number < ? ORDER BY t.number DESC LIMIT ?"""
        named = key(owner), key(session), before or ALL, max(most, 0)
        rows = await self._database.read(lambda db: db.execute(text, named).fetchall())
        return [_turn(row) for row in reversed(rows)]

    async def session(self, owner: str, session: str) -> Session | None:
        text = f"SELECT {SESSION} FROM sessions WHERE owner = ? AND id = ?"
        row = await self._database.read(lambda db: db.execute(text, (key(owner), key(session))).fetchone())
        return None if row is None else _session(row)

    async def sessions(self, owner: str, most: int, after: str | None = None) -> Sequence[Session]:
        text = f"""SELECT {SESSION} FROM sessions WHERE owner = :owner AND {BEHIND}
            ORDER BY updated DESC, key DESC LIMIT :most"""
        named = {"owner": key(owner), "after": None if after is None else key(after), "most": max(most, 0)}
        rows = await self._database.read(lambda db: db.execute(text, named).fetchall())
        return [_session(row) for row in rows]

    async def forget(self, owner: str, session: str) -> bool:
        text = "DELETE FROM sessions WHERE owner = ? AND id = ?"
        return await self._database.write(lambda db: db.execute(text, (key(owner), key(session))).rowcount) > 0

    async def expire(self, before: float, most_sessions: int, most_turns: int) -> int:
        gone = await self._drop("SELECT key FROM sessions WHERE updated < ? LIMIT ?", before) if before > 0 else 0
        if most_sessions > 0:
            gone += await self._drop(OVER_COUNT, most_sessions)
        return gone + (await self._trim(most_turns) if most_turns > 0 else 0)

    async def _drop(self, which: str, bound: float) -> int:
        """Delete the sessions that `which` finds. How many turns went."""
        total = 0
        while found := await self._database.write(lambda db: _dropped(db, which, bound)):
            total += sum(found)
        return total

    async def _trim(self, most: int) -> int:
        total = 0
        while found := await self._database.write(lambda db: _trimmed(db, most)):
            total += found
        return total


def _append(db: sqlite3.Connection, owner: str, id: str, turn: Turn) -> int:
    found = db.execute("SELECT key, last FROM sessions WHERE owner = ? AND id = ?", (owner, id)).fetchone()
    if found is None:
        text = "INSERT INTO sessions (owner, id, created, updated, turns, tokens, last) VALUES (?, ?, ?, ?, 0, 0, 0)"
        found = db.execute(text, (owner, id, turn.created, turn.created)).lastrowid, 0
    session, last = found
    request = key(turn.request)
    kept = db.execute("SELECT number FROM turns WHERE session = ? AND request = ?", (session, request)).fetchone()
    if kept is not None:
        return int(kept[0])
    messages = orjson.dumps(list(turn.messages)).decode()
    db.execute(
        "INSERT INTO turns (session, number, request, created, tokens, model, partial, messages) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (session, last + 1, request, turn.created, turn.tokens, shown(turn.model), turn.partial, messages),
    )
    db.execute(
        "UPDATE sessions SET last = last + 1, turns = turns + 1, tokens = tokens + ?, updated = max(updated, ?) WHERE key = ?",
        (turn.tokens, turn.created, session),
    )
    return int(last) + 1


def _dropped(db: sqlite3.Connection, which: str, bound: float) -> list[int]:
    """Some of those sessions go; the turns of each."""
    keys = db.execute(which, (bound, PIECE)).fetchall()
    return [db.execute("DELETE FROM sessions WHERE key = ? RETURNING turns", found).fetchall()[0][0] for found in keys]


def _trimmed(db: sqlite3.Connection, most: int) -> int:
    """The oldest turns of some sessions that have too many go. How many went."""
    gone = 0
    for session, turns in db.execute("SELECT key, turns FROM sessions WHERE turns > ? LIMIT ?", (most, PIECE)).fetchall():
        text = """DELETE FROM turns WHERE session = ? AND number IN (
            SELECT number FROM turns WHERE session = ? ORDER BY number LIMIT ?) RETURNING tokens"""
        tokens = [found for (found,) in db.execute(text, (session, session, turns - most)).fetchall()]
        db.execute("UPDATE sessions SET turns = ?, tokens = tokens - ? WHERE key = ?", (most, sum(tokens), session))
        gone += len(tokens)
    return gone


def _turn(row: Row) -> Turn:
    number, messages, tokens, created, request, model, partial = row
    return Turn(orjson.loads(messages), tokens, created, unkey(request), model, bool(partial), number)


def _session(row: Row) -> Session:
    id, created, updated, turns, tokens = row
    return Session(unkey(id), created, updated, turns, tokens)
