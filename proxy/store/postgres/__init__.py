"""The home that several machines share: PostgreSQL through asyncpg, with pgvector where the server has it.

Strategy: `database` is the pool of connections and how it comes to be; `conversations` and `files` are the two protocols in
SQL, `search` what is found.
The one rule: a server that is away or lacks pgvector takes away what needs it, and nothing else.
"""

from __future__ import annotations

from proxy.store import Store
from proxy.store.postgres.conversations import PostgresConversations
from proxy.store.postgres.database import NO_PGVECTOR, Changed, Database
from proxy.store.postgres.files import PostgresLibrary


class PostgresHome:
    """store: of it, there from the start; whether the server is, is another matter. close: lets go of its connections."""

    def __init__(self, database: Database) -> None:
        self.store = Store("postgres", PostgresConversations(database), PostgresLibrary(database))
        self.close = database.close
        self._database = database

    @property
    def trouble(self) -> str | None:
        """Why there is no connection."""
        return self._database.trouble

    @property
    def lacks(self) -> str | None:
        """What this server cannot do."""
        return NO_PGVECTOR if self._database.trouble is None and self._database.pgvector is None else None


async def opened(url: str, most: int, patience: float, changed: Changed) -> PostgresHome:
    """See Database. Raises UnusableStore."""
    database = Database(url, most, patience, changed)
    await database.open()
    return PostgresHome(database)
