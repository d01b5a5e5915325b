"""The connections to PostgreSQL: a bounded pool, made when the server answers and for as long as it takes.

Strategy: one task connects, applies the migrations and looks for pgvector; until it is through, and whenever the server is away,
every call raises at once. Behind that asyncpg's pool makes lost connections anew by itself.
The one rule: what is said of a failure never holds the password.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from proxy.store import StoreUnavailable, UnusableStore
from proxy.store.migrations import known, pending

T = TypeVar("T")
Connection = Any  # asyncpg says no types

PACKAGE = "proxy.store.postgres"
LOCK = 0x70656E73746F636B  # "penstock", for everybody who applies migrations to this database
CONNECT_SECONDS = 5.0
LONGEST_PAUSE = 15.0
FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
APPLIED = (
    """CREATE TABLE IF NOT EXISTS penstock_migrations (number integer PRIMARY KEY, name text NOT NULL, at float8 NOT NULL)"""
)
WHERE_PGVECTOR = """SELECT quote_ident(nspname) FROM pg_extension JOIN pg_namespace AS n ON n.oid = extnamespace
    WHERE extname = 'vector'"""
NO_PGVECTOR = "the extension pgvector is missing, so nothing is searched by vectors (CREATE EXTENSION vector, then a restart)"

Changed = Callable[[str | None], None]


class Database:
    """url: of PostgreSQL. most: connections. patience: of a statement, in seconds. changed: told why there is no connection when
    that changes, and None when there is one. pause: between attempts.

    pgvector: the schema it lies in, None where it is missing. trouble: why there is no connection.
    """

    def __init__(
        self, url: str, most: int, patience: float, changed: Changed, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._url = url
        self._most = most
        self._patience = patience
        self._changed = changed
        self._pause = pause
        self._pool: Any = None
        self._task: asyncio.Task[None] | None = None
        self.pgvector: str | None = None
        self.trouble: str | None = "not connected yet"
        self._told = False

    async def open(self) -> None:
        """Try once, then go on trying in the background. Raises UnusableStore where that would be of no use."""
        if not await self._attempt():
            self._task = asyncio.create_task(self._keep_trying())

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do something with a connection. Raises StoreUnavailable."""
        if self._pool is None:
            raise StoreUnavailable(f"postgres: {self.trouble or 'the store is closed'}")
        try:
            async with self._pool.acquire() as connection:
                return await work(connection)
        except FAILURES as error:
            raise StoreUnavailable(f"postgres: {self._said(error)}") from error

    async def transaction(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """The same, done whole or not at all."""

        async def whole(connection: Connection) -> T:
            async with connection.transaction():
                return await work(connection)

        return await self.run(whole)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await pool.close()
            except (*FAILURES, TimeoutError):
                pool.terminate()

    async def _keep_trying(self) -> None:
        pause = 1.0
        while True:
            await self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            with contextlib.suppress(UnusableStore):
                if await self._attempt():
                    return

    async def _attempt(self) -> bool:
        """Connect, and bring the database to its form. Raises UnusableStore."""
        pool = None
        try:
            pool = await asyncpg.create_pool(
                self._url, min_size=1, max_size=self._most, command_timeout=self._patience, timeout=CONNECT_SECONDS,
                server_settings={"application_name": "penstock"},
            )  # fmt: skip
            async with asyncio.timeout(self._patience), pool.acquire() as connection:
                await migrate(connection)
                self.pgvector = await _pgvector(connection)
        except BaseException as error:
            if pool is not None:
                pool.terminate()
            return self._failed(error)
        self._pool, self.trouble = pool, None
        self._changed(None)
        return True

    def _failed(self, error: BaseException) -> bool:
        if isinstance(error, UnusableStore):
            self._say(str(error))
            raise error
        if isinstance(error, ValueError | asyncpg.ClientConfigurationError):
            raise UnusableStore(f"the URL cannot be used: {self._said(error)}") from None
        if not isinstance(error, FAILURES):
            raise error
        self._say(self._said(error))
        return False

    def _say(self, trouble: str) -> None:
        self.trouble = trouble
        if not self._told:
            self._told = True
            self._changed(trouble)

    def _said(self, error: BaseException) -> str:
        text = f"{error}" or type(error).__name__
        parts = urlsplit(self._url)
        passwords = {parts.password or "", unquote(parts.password or ""), *parse_qs(parts.query).get("password", ())}
        for secret in passwords - {""}:
            text = text.replace(secret, "***")
        return text


async def migrate(connection: Connection) -> None:
    """Bring the database to the form that this program knows; who comes second waits and finds it done. Raises UnusableStore."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
        await connection.execute(APPLIED)
        applied = {row[0] for row in await connection.fetch("SELECT number FROM penstock_migrations")}
        for step in pending(known(PACKAGE), applied):
            await connection.execute(step.text)
            await connection.execute("INSERT INTO penstock_migrations VALUES ($1, $2, $3)", step.number, step.name, time.time())


async def _pgvector(connection: Connection) -> str | None:
    """The schema that it lies in, after an attempt to create it; the right to do so may be somebody else's."""
    found: str | None = await connection.fetchval(WHERE_PGVECTOR)
    if found is None:
        with contextlib.suppress(asyncpg.PostgresError):
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        found = await connection.fetchval(WHERE_PGVECTOR)
    return found
