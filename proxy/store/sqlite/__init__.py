"""The embedded home: a file, through Python's own sqlite3. Nothing to install, nothing to run; several processes may share it.

Strategy: `lane` is a thread with a connection, `database` the file with three of them; `conversations` and `files` are the two
protocols in SQL, `search` and `nearest` what is found.
The one rule: no extension of SQLite is needed, since many Pythons cannot load any.
"""

from __future__ import annotations

from pathlib import Path

from proxy.store import Store
from proxy.store.sqlite.conversations import SqliteConversations
from proxy.store.sqlite.database import Database
from proxy.store.sqlite.files import SqliteLibrary
from proxy.store.sqlite.search import has_numpy

NO_NUMPY = "numpy is missing, so nothing is searched by vectors (pip install 'penstock[retrieval]', then a restart)"
FILE_NAME = "penstock.db"


class SqliteHome:
    """store: of it. close: lets go of the file. lacks: what cannot be done here; trouble: a file is always there."""

    trouble = None

    def __init__(self, database: Database) -> None:
        self.store = Store("sqlite", SqliteConversations(database), SqliteLibrary(database))
        self.close = database.close
        self.lacks = None if has_numpy() else NO_NUMPY


async def opened(folder: Path) -> SqliteHome:
    """The file in `folder`, which is made where it is missing. Raises UnusableStore."""
    return SqliteHome(await Database.opened(folder / FILE_NAME))
