"""What processes do to one store together, and what one leaves that is killed in the middle of its saves. Both homes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from proxy.store import Where
from tests.support.postgres import schema
from tests.support.storekeeper import PASSAGES, SAVERS, opened

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["sqlite", "postgres"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path)
    return await schema(request.getfixturevalue("postgres"))


@contextmanager
def keeper(place: str, mode: str) -> Iterator[subprocess.Popen[str]]:
    """A process at the store, ready, that waits for a line."""
    command = [sys.executable, "-m", "tests.support.storekeeper", place, mode]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_start_at_once_apply_each_step_once(place: str) -> None:
    with keeper(place, "open") as one, keeper(place, "open") as two, keeper(place, "open") as three:
        for process in (one, two, three):
            go(process)
        assert [process.wait(30) for process in (one, two, three)] == [0, 0, 0]


def killed(place: str, kind: str, most: int) -> dict[tuple[str, str], int]:
    """Saves until so many saves of a kind were reported, and is killed. What was reported as saved, however late."""
    saved: dict[tuple[str, str], int] = {}
    seen = Counter[str]()
    with keeper(place, "save") as process:
        go(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):
                found, name, count = line.split()
                saved[found, name] = int(count)
                seen[found] += 1
            if seen[kind] == most:
                process.kill()
    assert process.returncode == -9
    return saved


async def after_it(place: str) -> Any:
    """The store as it is when the last of the killed process is over: a server may still be at what it had been sent."""
    if place.startswith("postgresql:"):
        connection = await asyncpg.connect(place)
        others = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'penstock'"
        while await connection.fetchval(others):  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.002)
        await connection.close()
    return await opened(place)


async def test_a_process_killed_in_the_middle_of_its_saves_leaves_every_save_whole(place: str) -> None:
    saved: dict[tuple[str, str], int] = {}
    for kind, most in (("turn", 150), ("kept", 30), ("turn", 10)):
        saved |= await asyncio.to_thread(killed, place, kind, most)
        home = await after_it(place)
        store = home.store
        for number in range(SAVERS):
            name = f"s{number}"
            turns = await store.conversations.turns("o", name, 10**6)
            session = await store.conversations.session("o", name)
            assert session is not None
            assert [turn.number for turn in turns] == list(range(1, len(turns) + 1))
            assert (session.turns, session.tokens) == (len(turns), 7 * len(turns))
            assert len(turns) >= saved["turn", name]
        for file in await store.files.files("o", 100):
            assert file.passages % PASSAGES == 0
            assert file.passages >= saved.get(("kept", file.id), 0)
            assert file.status == "processed" or ("processed", file.id) not in saved
        await home.close()


async def test_the_next_worker_goes_on_with_the_file_of_a_killed_one(place: str) -> None:
    saved = await asyncio.to_thread(killed, place, "kept", 12)
    home = await after_it(place)
    library = home.store.files
    job = await library.claim("next", 60.0, 5000.0)
    assert job is not None
    assert job.done >= saved["kept", job.file.id]
    assert job.done % PASSAGES == 0
    assert await library.keep(job.file.id, "killed", [], 1.0, 5000.0) is False
    assert await library.settle(job.file.id, "next", None)
    hits = await library.search_vectors("o", [0.0, 1.0], 10**6, Where(files=[job.file.id]))
    assert sorted(hit.passage.number for hit in hits) == list(range(job.done)), "each passage has its vector"
    hits = await library.search_text("o", "number", 10**6, Where(files=[job.file.id]))
    assert sorted(hit.passage.number for hit in hits) == list(range(job.done)), "and is in the index"
    await home.close()
