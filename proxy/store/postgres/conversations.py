"""Sessions and turns in PostgreSQL.

Strategy: every statement names the owner, and a session's own row counts what it has. A turn is added by one statement, which
takes the next number from its session's row and so waits for whoever does the same. Retention goes in small statements, and
passes over what another gateway is busy with.
The one rule: a request that is there already makes the statement fail whole, and only then its number is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg
import orjson

from proxy.store import Session, StoreUnavailable, Turn
from proxy.store.postgres.database import Connection, Database
from proxy.store.wording import key, shown, unkey

Row = Sequence[Any]
PIECE = 200  # sessions that retention takes at a time
ALL = 2**62  # beyond every turn's number

SESSION = "id, created, updated, turns, tokens"
APPEND = """WITH session AS (
    INSERT INTO penstock_sessions AS s (owner, id, created, updated, turns, tokens, last) VALUES ($1, $2, $3, $3, 1, $4, 1)
    ON CONFLICT (owner, id) DO UPDATE SET
        updated = greatest(s.updated, $3), turns = s.turns + 1, tokens = s.tokens + $4, last = s.last + 1
    RETURNING key, last
) INSERT INTO penstock_turns (session, number, request, created, tokens, model, partial, messages)
    SELECT key, last, $5, $3, $4, $6, $7, $8 FROM session RETURNING number"""
NUMBER = """SELECT number FROM penstock_turns AS t JOIN penstock_sessions AS s ON s.key = t.session
    WHERE s.owner = $1 AND s.id = $2 AND t.request = $3"""
TURNS = """SELECT number, messages, t.tokens, t.created, request, model, partial
    FROM penstock_sessions AS s JOIN penstock_turns AS t ON t.session = s.key
    WHERE s.owner = $1 AND s.id = $2 AND number < $4::bigint ORDER BY number DESC LIMIT $3"""
ONE = f"SELECT {SESSION} FROM penstock_sessions WHERE owner = $1 AND id = $2"
LIST = f"""SELECT {SESSION} FROM penstock_sessions WHERE owner = $1 AND (
        $2::text IS NULL OR (updated, key) < (SELECT updated, key FROM penstock_sessions WHERE owner = $1 AND id = $2)
    ) ORDER BY updated DESC, key DESC LIMIT $3"""
FORGET = "DELETE FROM penstock_sessions WHERE owner = $1 AND id = $2 RETURNING key"
DROP = """DELETE FROM penstock_sessions WHERE key IN (
        SELECT key FROM penstock_sessions WHERE {} LIMIT $2 FOR UPDATE SKIP LOCKED
    ) RETURNING turns"""
UNUSED = DROP.format("updated < $1")
OVER_COUNT = DROP.format(
    """key IN (SELECT key FROM (
        SELECT key, row_number() OVER (PARTITION BY owner ORDER BY updated DESC, key DESC) AS place FROM penstock_sessions
    ) AS placed WHERE place > $1)"""
)
TRIM = """WITH long AS (
        SELECT key, (SELECT number FROM penstock_turns WHERE session = key ORDER BY number DESC OFFSET $1 - 1 LIMIT 1) AS oldest
        FROM penstock_sessions WHERE turns > $1 LIMIT $2 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM penstock_turns USING long WHERE session = key AND number < oldest RETURNING session, tokens
    ), sums AS (
        SELECT session, count(*) AS turns, sum(tokens) AS tokens FROM gone GROUP BY session
    ) UPDATE penstock_sessions AS s SET turns = $1, tokens = s.tokens - sums.tokens
    FROM sums WHERE s.key = sums.session RETURNING sums.turns"""


class PostgresConversations:
    """See `proxy.store.Conversations`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, owner: str, session: str, turn: Turn) -> int:
        return await self._database.run(lambda db: _append(db, key(owner), key(session), turn))

    async def turns(self, owner: str, session: str, most: int, before: int = 0) -> Sequence[Turn]:
        rows = await self._database.run(lambda db: db.fetch(TURNS, key(owner), key(session), max(most, 0), before or ALL))
        return [_turn(row) for row in reversed(rows)]

    async def session(self, owner: str, session: str) -> Session | None:
        row = await self._database.run(lambda db: db.fetchrow(ONE, key(owner), key(session)))
        return None if row is None else _session(row)

    async def sessions(self, owner: str, most: int, after: str | None = None) -> Sequence[Session]:
        behind = None if after is None else key(after)
        rows = await self._database.run(lambda db: db.fetch(LIST, key(owner), behind, max(most, 0)))
        return [_session(row) for row in rows]

    async def forget(self, owner: str, session: str) -> bool:
        return bool(await self._database.run(lambda db: db.fetch(FORGET, key(owner), key(session))))

    async def expire(self, before: float, most_sessions: int, most_turns: int) -> int:
        gone = await self._all_of(UNUSED, before) if before > 0 else 0
        if most_sessions > 0:
            gone += await self._all_of(OVER_COUNT, most_sessions)
        return gone + (await self._all_of(TRIM, most_turns) if most_turns > 0 else 0)

    async def _all_of(self, text: str, bound: float) -> int:
        """Piece by piece until nothing is left. How many turns went."""
        total = 0
        while rows := await self._database.run(lambda db: db.fetch(text, bound, PIECE)):
            total += sum(row[0] for row in rows)
        return total


async def _append(db: Connection, owner: str, session: str, turn: Turn) -> int:
    request, messages = key(turn.request), orjson.dumps(list(turn.messages)).decode()
    row = (turn.created, turn.tokens, request, shown(turn.model), turn.partial, messages)
    try:
        number = await db.fetchval(APPEND, owner, session, *row)
    except asyncpg.UniqueViolationError:
        number = await db.fetchval(NUMBER, owner, session, request)
    if number is None:
        raise StoreUnavailable("postgres: the session was deleted while a turn was added to it")
    return int(number)


def _turn(row: Row) -> Turn:
    number, messages, tokens, created, request, model, partial = row
    return Turn(orjson.loads(messages), tokens, created, unkey(request), model, partial, number)


def _session(row: Row) -> Session:
    id, created, updated, turns, tokens = row
    return Session(unkey(id), created, updated, turns, tokens)
