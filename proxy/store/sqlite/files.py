"""Files and their passages in SQLite: kept, listed, claimed for indexing. What is found in them is `search`'s business.

Strategy: a claim is a column with the worker's name and when it was last heard of; who writes passages or an end shows the name
again, in the same transaction. Passages have numbers, so that a worker that repeats itself adds nothing twice.
The one rule: what a client asks for names its owner in the statement that reads or changes it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orjson

from proxy.store import File, Hit, Job, Passage, Vector, Where
from proxy.store.sqlite import search
from proxy.store.sqlite.database import Database
from proxy.store.vectors import packed, unpacked
from proxy.store.wording import key, scope, shown, unkey

Row = tuple[Any, ...]
MOST_EMBEDDINGS = 50_000  # that were made before; 300 MB at 1,536 floats

FILE = "id, name, media_type, bytes, digest, created, purpose, knowledge, status, progress, passages, error"
BEHIND = "(:after IS NULL OR (created, key) < (SELECT created, key FROM files WHERE owner = :owner AND id = :after))"
ADD = f"""INSERT INTO files (owner, {FILE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (owner, knowledge, digest) DO NOTHING RETURNING key"""
# Those that wait in the words of their index, without which SQLite would not use it and look at every file there is.
UNSETTLED = "status IN ('uploaded', 'processing')"
CLAIM = f"""UPDATE files SET status = 'processing', worker = :worker, heard = :now WHERE key = (
        SELECT key FROM files WHERE {UNSETTLED} AND (status = 'uploaded' OR heard < :now - :lease) ORDER BY key LIMIT 1
    ) RETURNING key, owner, {FILE}"""
MINE = "SELECT key, owner FROM files WHERE id = ? AND worker = ? AND status = 'processing'"


class SqliteLibrary:
    """See `Library` in `proxy.store`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, owner: str, file: File, content: bytes) -> File:
        return await self._database.write(lambda db: _add(db, key(owner), file, content))

    async def file(self, owner: str, id: str) -> File | None:
        text = f"SELECT {FILE} FROM files WHERE owner = ? AND id = ?"
        row = await self._database.read(lambda db: db.execute(text, (key(owner), key(id))).fetchone())
        return None if row is None else _file(row)

    async def content(self, owner: str, id: str) -> bytes | None:
        text = "SELECT c.content FROM files AS f JOIN contents AS c ON c.file = f.key WHERE f.owner = ? AND f.id = ?"
        row = await self._database.read(lambda db: db.execute(text, (key(owner), key(id))).fetchone())
        return None if row is None else bytes(row[0])

    async def files(self, owner: str, most: int, after: str | None = None, purpose: str | None = None) -> Sequence[File]:
        text = f"""SELECT {FILE} FROM files WHERE owner = :owner AND {BEHIND} AND (:purpose IS NULL OR purpose = :purpose)
            ORDER BY created DESC, key DESC LIMIT :most"""
        behind = None if after is None else key(after)
        wanted = None if purpose is None else shown(purpose)
        named = {"owner": key(owner), "after": behind, "purpose": wanted, "most": max(most, 0)}
        rows = await self._database.read(lambda db: db.execute(text, named).fetchall())
        return [_file(row) for row in rows]

    async def remove(self, owner: str, id: str) -> bool:
        return await self._database.write(lambda db: _remove(db, key(owner), key(id)))

    async def held(self, owner: str) -> tuple[int, int]:
        text = "SELECT count(*), coalesce(sum(bytes), 0) FROM files WHERE owner = ?"
        count, total = await self._database.read(lambda db: db.execute(text, (key(owner),)).fetchone())
        return count, total

    async def waiting(self) -> int:
        text = f"SELECT count(*) FROM files WHERE {UNSETTLED} AND status = 'uploaded'"
        count: int = (await self._database.read(lambda db: db.execute(text).fetchone()))[0]
        return count

    async def claim(self, worker: str, lease: float, now: float) -> Job | None:
        return await self._database.write(lambda db: _claim(db, key(worker), lease, now))

    async def keep(self, id: str, worker: str, passages: Sequence[Passage], progress: float, now: float) -> bool:
        return await self._database.write(lambda db: _keep(db, (key(id), key(worker)), passages, progress, now))

    async def settle(self, id: str, worker: str, error: str | None) -> bool:
        return await self._database.write(lambda db: _settle(db, (key(id), key(worker)), error))

    async def search_text(self, owner: str, query: str, most: int, where: Where) -> Sequence[Hit]:
        return await self._database.search(lambda db: search.by_text(db, key(owner), query, most, where))

    async def search_vectors(self, owner: str, vector: Vector, most: int, where: Where) -> Sequence[Hit]:
        return await self._database.search(lambda db: search.by_vector(db, key(owner), vector, most, where))

    async def vectors(self, model: str, digests: Collection[str]) -> Mapping[str, Vector]:
        text = "SELECT digest, vector FROM embeddings WHERE model = ? AND digest IN (SELECT value FROM json_each(?))"
        wanted = orjson.dumps([shown(digest) for digest in digests]).decode()
        rows = await self._database.read(lambda db: db.execute(text, (shown(model), wanted)).fetchall())
        return {digest: unpacked(vector) for digest, vector in rows}

    async def remember(self, model: str, vectors: Mapping[str, Vector]) -> None:
        rows = [(shown(model), shown(digest), packed(vector)) for digest, vector in vectors.items()]
        await self._database.write(lambda db: _remember(db, rows))


def _add(db: sqlite3.Connection, owner: str, file: File, content: bytes) -> File:
    row = (
        key(file.id), shown(file.name), shown(file.media_type), file.bytes, shown(file.digest), file.created, shown(file.purpose),
        key(file.knowledge), file.status, file.progress, file.passages, None if file.error is None else shown(file.error),
    )  # fmt: skip
    added = db.execute(ADD, (owner, *row)).fetchone()
    if added is not None:
        db.execute("INSERT INTO contents VALUES (?, ?)", (*added, content))
        return file
    text = f"SELECT {FILE} FROM files WHERE owner = ? AND knowledge = ? AND digest = ?"
    return _file(db.execute(text, (owner, key(file.knowledge), shown(file.digest))).fetchone())


def _remove(db: sqlite3.Connection, owner: str, id: str) -> bool:
    # Its passages and its content go with it, and with those what the index and the vectors have.
    return db.execute("DELETE FROM files WHERE owner = ? AND id = ?", (owner, id)).rowcount > 0


def _claim(db: sqlite3.Connection, worker: str, lease: float, now: float) -> Job | None:
    row = db.execute(CLAIM, {"worker": worker, "lease": lease, "now": now}).fetchone()
    if row is None:
        return None
    file, owner, *rest = row
    (content,) = db.execute("SELECT content FROM contents WHERE file = ?", (file,)).fetchone()
    found = _file(tuple(rest))
    return Job(unkey(owner), found, bytes(content), found.passages)


def _keep(
    db: sqlite3.Connection, who: tuple[str, str], passages: Sequence[Passage], progress: float, now: float
) -> bool:  # fmt: skip
    mine = db.execute(MINE, who).fetchone()
    if mine is None:
        return False
    file, owner = mine
    mark = scope(owner)
    for passage in passages:
        _put(db, file, mark, passage)
    text = """UPDATE files SET progress = ?, heard = ?, passages = (SELECT count(*) FROM passages WHERE file = files.key)
        WHERE key = ?"""
    db.execute(text, (progress, now, file))
    return True


def _put(db: sqlite3.Connection, file: int, mark: str, passage: Passage) -> None:
    row = (file, passage.number, shown(passage.text), shown(passage.heading), passage.page, mark)
    text = """INSERT INTO passages (file, number, text, heading, page, scope) VALUES (?, ?, ?, ?, ?, ?)
        ON CONFLICT (file, number) DO NOTHING RETURNING key"""
    added = db.execute(text, row).fetchone()
    if added is not None and passage.vector is not None:
        db.execute("INSERT INTO vectors VALUES (?, ?)", (*added, packed(passage.vector)))


def _settle(db: sqlite3.Connection, who: tuple[str, str], error: str | None) -> bool:
    mine = db.execute(MINE, who).fetchone()
    if mine is None:
        return False
    if error is None:
        db.execute("UPDATE files SET status = 'processed', progress = 1, worker = NULL WHERE key = ?", mine[:1])
        return True
    db.execute("DELETE FROM passages WHERE file = ?", mine[:1])
    db.execute("UPDATE files SET status = 'error', error = ?, passages = 0, worker = NULL WHERE key = ?", (shown(error), mine[0]))
    return True


def _remember(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    db.executemany("INSERT INTO embeddings (model, digest, vector) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", rows)
    db.execute("DELETE FROM embeddings WHERE key <= (SELECT max(key) FROM embeddings) - ?", (MOST_EMBEDDINGS,))


def _file(row: Row) -> File:
    id, name, media_type, size, digest, created, purpose, knowledge, status, progress, passages, error = row
    return File(
        unkey(id), name, media_type, size, digest, created, purpose, unkey(knowledge), status, progress, passages, error
    )  # fmt: skip
