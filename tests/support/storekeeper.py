"""Another process at a store: `python -m tests.support.storekeeper PLACE open|save`; PLACE is a folder, or the URL of PostgreSQL.

It says `ready`, and waits for a line. `open` opens the store and ends. `save` saves for ever, and says what is saved as it goes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from proxy.store import File, Passage, Store, Turn

PASSAGES = 20  # that are kept at a time
SAVERS = 4


async def opened(place: str) -> Any:
    if place.startswith("postgresql:"):
        from proxy.store import postgres

        return await postgres.opened(place, 5, 10.0, lambda trouble: None)
    from proxy.store import sqlite

    return await sqlite.opened(Path(place))


async def save(store: Store, say: Callable[[str], object]) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(SAVERS):
            group.create_task(talk(store, f"s{number}", say))
        group.create_task(index(store, say))


async def talk(store: Store, session: str, say: Callable[[str], object]) -> None:
    for number in range(10**6):
        text = [{"role": "user", "content": "x" * 2000}]
        await store.conversations.append("o", session, Turn(text, 7, 1000.0 + number, f"{session}-{number}"))
        say(f"turn {session} {number + 1}")


async def index(store: Store, say: Callable[[str], object]) -> None:
    """Files of 100 keeps each, one after the other."""
    for number in range(10**6):
        content = f"{number}".encode()
        file = File(f"f{number}", "a.txt", "text/plain", len(content), sha256(content).hexdigest(), 1000.0)
        await store.files.add("o", file, content)
        await store.files.claim("killed", 60.0, 1000.0)
        for start in range(0, 100 * PASSAGES, PASSAGES):
            passages = [Passage(at, f"text number {at}", vector=[1.0, float(at)]) for at in range(start, start + PASSAGES)]
            if await store.files.keep(file.id, "killed", passages, 0.5, 1000.0):
                say(f"kept {file.id} {start + PASSAGES}")
        await store.files.settle(file.id, "killed", None)
        say(f"processed {file.id} 1")


async def main(place: str, mode: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    home = await opened(place)
    if mode == "save":
        await save(home.store, lambda line: print(line, flush=True))
    await home.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
