"""Files and their passages in PostgreSQL: kept, listed, claimed for indexing. What is found in them is `search`'s business.

Strategy: a claim is a column with the worker's name and when it was last heard of; who writes passages or an end locks the file's
row by showing the name again. Several gateways that claim pass over the row that another is about to take.
The one rule: what a client asks for names its owner in the statement that reads or changes it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from proxy.store import File, Hit, Job, Passage, Vector, Where
from proxy.store.postgres import search
from proxy.store.postgres.database import Connection, Database
from proxy.store.vectors import packed, unpacked
from proxy.store.wording import key, scope, shown, unkey

Row = Sequence[Any]
MOST_EMBEDDINGS = 50_000  # that were made before
MOST_DIMENSIONS = 16_000  # pgvector's

FILE = "id, name, media_type, bytes, digest, created, purpose, knowledge, status, progress, passages, error"
ADD = f"""INSERT INTO penstock_files (owner, {FILE}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
    ON CONFLICT (owner, knowledge, digest) DO NOTHING RETURNING key"""
SAME = f"SELECT {FILE} FROM penstock_files WHERE owner = $1 AND knowledge = $2 AND digest = $3"
ONE = f"SELECT {FILE} FROM penstock_files WHERE owner = $1 AND id = $2"
CONTENT = "SELECT content FROM penstock_files AS f JOIN penstock_contents ON file = key WHERE owner = $1 AND id = $2"
LIST = f"""SELECT {FILE} FROM penstock_files WHERE owner = $1 AND ($3::text IS NULL OR purpose = $3) AND (
        $2::text IS NULL OR (created, key) < (SELECT created, key FROM penstock_files WHERE owner = $1 AND id = $2)
    ) ORDER BY created DESC, key DESC LIMIT $4"""
REMOVE = "DELETE FROM penstock_files WHERE owner = $1 AND id = $2 RETURNING key"
HELD = "SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM penstock_files WHERE owner = $1"
CLAIM = f"""UPDATE penstock_files SET status = 'processing', worker = $1, heard = $2 WHERE key = (
        SELECT key FROM penstock_files WHERE status = 'uploaded' OR (status = 'processing' AND heard < $2 - $3::float8)
        ORDER BY key LIMIT 1 FOR UPDATE SKIP LOCKED
    ) RETURNING key, owner, {FILE}"""
MINE = "SELECT key, owner FROM penstock_files WHERE id = $1 AND worker = $2 AND status = 'processing' FOR UPDATE"
PUT = """INSERT INTO penstock_passages (file, scope, number, text, heading, page, dimensions, vector)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (file, number) DO NOTHING"""
KEPT = """UPDATE penstock_files SET progress = $2, heard = $3,
    passages = (SELECT count(*) FROM penstock_passages WHERE file = $1) WHERE key = $1"""
PROCESSED = "UPDATE penstock_files SET status = 'processed', progress = 1, worker = NULL WHERE key = $1"
FAILED = "UPDATE penstock_files SET status = 'error', error = $2, passages = 0, worker = NULL WHERE key = $1"
VECTORS = "SELECT digest, vector FROM penstock_embeddings WHERE model = $1 AND digest = ANY($2::text[])"
REMEMBER = "INSERT INTO penstock_embeddings (model, digest, vector) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
LET_GO = """DELETE FROM penstock_embeddings WHERE key <= (
    SELECT key FROM penstock_embeddings ORDER BY key DESC OFFSET $1 LIMIT 1)"""


class PostgresLibrary:
    """See `Library` in `proxy.store`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, owner: str, file: File, content: bytes) -> File:
        return await self._database.transaction(lambda db: _add(db, key(owner), file, content))

    async def file(self, owner: str, id: str) -> File | None:
        row = await self._database.run(lambda db: db.fetchrow(ONE, key(owner), key(id)))
        return None if row is None else _file(row)

    async def content(self, owner: str, id: str) -> bytes | None:
        found: bytes | None = await self._database.run(lambda db: db.fetchval(CONTENT, key(owner), key(id)))
        return found

    async def files(self, owner: str, most: int, after: str | None = None, purpose: str | None = None) -> Sequence[File]:
        behind = None if after is None else key(after)
        wanted = None if purpose is None else shown(purpose)
        rows = await self._database.run(lambda db: db.fetch(LIST, key(owner), behind, wanted, max(most, 0)))
        return [_file(row) for row in rows]

    async def remove(self, owner: str, id: str) -> bool:
        return bool(await self._database.run(lambda db: db.fetch(REMOVE, key(owner), key(id))))

    async def held(self, owner: str) -> tuple[int, int]:
        count, total = await self._database.run(lambda db: db.fetchrow(HELD, key(owner)))
        return count, total

    async def waiting(self) -> int:
        text = "SELECT count(*) FROM penstock_files WHERE status = 'uploaded'"
        count: int = await self._database.run(lambda db: db.fetchval(text))
        return count

    async def claim(self, worker: str, lease: float, now: float) -> Job | None:
        return await self._database.transaction(lambda db: _claim(db, key(worker), lease, now))

    async def keep(self, id: str, worker: str, passages: Sequence[Passage], progress: float, now: float) -> bool:
        return await self._database.transaction(lambda db: _keep(db, (key(id), key(worker)), passages, progress, now))

    async def settle(self, id: str, worker: str, error: str | None) -> bool:
        return await self._database.transaction(lambda db: _settle(db, (key(id), key(worker)), error))

    async def search_text(self, owner: str, query: str, most: int, where: Where) -> Sequence[Hit]:
        return await self._database.run(lambda db: search.by_text(db, key(owner), query, most, where))

    async def search_vectors(self, owner: str, vector: Vector, most: int, where: Where) -> Sequence[Hit]:
        schema = self._database.pgvector
        if schema is None or not _dimensions(vector):
            return []
        return await self._database.run(lambda db: search.by_vector(db, schema, key(owner), vector, most, where))

    async def vectors(self, model: str, digests: Collection[str]) -> Mapping[str, Vector]:
        rows = await self._database.run(lambda db: db.fetch(VECTORS, shown(model), [shown(digest) for digest in digests]))
        return {digest: unpacked(vector) for digest, vector in rows}

    async def remember(self, model: str, vectors: Mapping[str, Vector]) -> None:
        # In one order for everybody, so that two that remember the same never wait for each other.
        rows = sorted((shown(model), shown(digest), packed(vector)) for digest, vector in vectors.items())
        await self._database.transaction(lambda db: _remember(db, rows))


async def _add(db: Connection, owner: str, file: File, content: bytes) -> File:
    row = (
        key(file.id), shown(file.name), shown(file.media_type), file.bytes, shown(file.digest), file.created, shown(file.purpose),
        key(file.knowledge), file.status, file.progress, file.passages, None if file.error is None else shown(file.error),
    )  # fmt: skip
    added = await db.fetchval(ADD, owner, *row)
    if added is not None:
        await db.execute("INSERT INTO penstock_contents VALUES ($1, $2)", added, content)
        return file
    return _file(await db.fetchrow(SAME, owner, key(file.knowledge), shown(file.digest)))


async def _claim(db: Connection, worker: str, lease: float, now: float) -> Job | None:
    row = await db.fetchrow(CLAIM, worker, now, lease)
    if row is None:
        return None
    file, owner, *rest = row
    content = await db.fetchval("SELECT content FROM penstock_contents WHERE file = $1", file)
    found = _file(rest)
    return Job(unkey(owner), found, content, found.passages)


async def _keep(db: Connection, who: tuple[str, str], passages: Sequence[Passage], progress: float, now: float) -> bool:
    mine = await db.fetchrow(MINE, *who)
    if mine is None:
        return False
    file, owner = mine
    await db.executemany(PUT, [(file, scope(owner), *_row(passage)) for passage in passages])
    await db.execute(KEPT, file, progress, now)
    return True


def _row(passage: Passage) -> Row:
    dimensions = _dimensions(passage.vector) if passage.vector is not None else 0
    # Through floats of 4 bytes, as the column has them: what is too large for those is infinite and no direction.
    vector = array("f", passage.vector).tolist() if passage.vector is not None and dimensions else None
    return passage.number, shown(passage.text), shown(passage.heading), passage.page, dimensions, vector


def _dimensions(vector: Vector) -> int:
    """How many it has, or 0 where the database could not compare it."""
    floats = array("f", vector)
    sound = any(floats) and all(map(math.isfinite, floats)) and len(floats) <= MOST_DIMENSIONS
    return len(floats) if sound else 0


async def _settle(db: Connection, who: tuple[str, str], error: str | None) -> bool:
    file = await db.fetchval(MINE, *who)
    if file is None:
        return False
    if error is None:
        await db.execute(PROCESSED, file)
        return True
    await db.execute("DELETE FROM penstock_passages WHERE file = $1", file)
    await db.execute(FAILED, file, shown(error))
    return True


async def _remember(db: Connection, rows: Sequence[Row]) -> None:
    await db.executemany(REMEMBER, rows)
    await db.execute(LET_GO, MOST_EMBEDDINGS)


def _file(row: Row) -> File:
    id, name, media_type, size, digest, created, purpose, knowledge, status, progress, passages, error = row
    return File(
        unkey(id), name, media_type, size, digest, created, purpose, unkey(knowledge), status, progress, passages, error
    )  # fmt: skip
