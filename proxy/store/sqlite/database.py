"""The file: how it is opened, brought to its form, and reached by three threads.

Strategy: a write-ahead log, so that readers and the writer do not wait for each other, also across processes. One thread writes,
one looks up, one searches: a search through many vectors holds up no look-up. `synchronous=NORMAL`: a commit is in the system's
hands but not on the disk yet, so a killed process loses nothing that was committed, a power cut may lose the last moments;
neither leaves a half.
The one rule: the file and its folder are readable by their owner alone, since they hold what people said.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proxy.store import StoreUnavailable, UnusableStore
from proxy.store.migrations import known, pending
from proxy.store.sqlite.lane import Lane, T, Work

PACKAGE = "proxy.store.sqlite"
OLDEST = (3, 35)  # the first with RETURNING
BUSY_SECONDS = 5.0  # for another process's write
APPLIED = "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, at REAL NOT NULL)"


class Database:
    """The file at `path`; use `opened`."""

    def __init__(self, path: Path) -> None:
        self._writer = Lane("store-write", lambda: connection(path), writes=True)
        self._reader = Lane("store-read", lambda: _reading(path))
        self._searcher = Lane("store-search", lambda: _reading(path))

    @classmethod
    async def opened(cls, path: Path) -> Database:
        """Raises UnusableStore where there can be no such file, or it is a newer program's."""
        if sqlite3.sqlite_version_info < OLDEST:
            raise UnusableStore(
                f"SQLite {OLDEST[0]}.{OLDEST[1]} or later is needed, and this Python has {sqlite3.sqlite_version}"
            )
        first = Lane("store-open", lambda: _prepared(path))
        try:
            await first.do(migrate)
        except (OSError, StoreUnavailable) as error:
            raise UnusableStore(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        finally:
            await first.close()
        return cls(path)

    async def write(self, work: Work[T]) -> T:
        return await self._writer.do(work)

    async def read(self, work: Work[T]) -> T:
        return await self._reader.do(work)

    async def search(self, work: Work[T]) -> T:
        """For what may take long."""
        return await self._searcher.do(work)

    async def close(self) -> None:
        """Finish what was begun. The last connection to the file empties its log."""
        for lane in (self._searcher, self._reader, self._writer):
            await lane.close()


def connection(path: Path) -> sqlite3.Connection:
    found = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    found.execute("PRAGMA synchronous = NORMAL")
    found.execute("PRAGMA foreign_keys = ON")
    return found


def _reading(path: Path) -> sqlite3.Connection:
    found = connection(path)
    found.execute("PRAGMA query_only = ON")
    return found


def _prepared(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    found = connection(path)
    _to_wal(found)
    return found


def _to_wal(found: sqlite3.Connection) -> None:
    # Processes that start together and all change the mode of a new file are refused at once, whatever the timeout says.
    for attempt in range(100):
        try:
            found.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if attempt == 99:
                raise
            time.sleep(BUSY_SECONDS / 100)


def migrate(found: sqlite3.Connection) -> None:
    """Bring the file to the form that this program knows; who comes second waits and finds it done. Raises UnusableStore."""
    with _alone(found):
        found.execute(APPLIED)
        applied = {number for (number,) in found.execute("SELECT number FROM migrations")}
        for step in pending(known(PACKAGE), applied):
            for statement in statements(step.text):
                found.execute(statement)
            found.execute("INSERT INTO migrations VALUES (?, ?, ?)", (step.number, step.name, time.time()))


@contextmanager
def _alone(found: sqlite3.Connection) -> Iterator[None]:
    found.execute("BEGIN EXCLUSIVE")
    try:
        yield
        found.execute("COMMIT")
    except BaseException:
        found.execute("ROLLBACK")
        raise


def statements(text: str) -> Iterator[str]:
    """A script's statements. sqlite3's own `executescript` would commit the transaction that we are in."""
    gathered = ""
    for line in text.splitlines(keepends=True):
        gathered += line
        if sqlite3.complete_statement(gathered):
            yield gathered
            gathered = ""
