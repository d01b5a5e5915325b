"""The store within a running gateway: opened where some middleware wants it, handed to it, closed last; and its settings."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.__main__ import summary
from proxy.call import Call, altered
from proxy.config import ConfigError, parse
from proxy.configfile import ConfigFile
from proxy.pipeline import Handler, Surroundings
from proxy.reply import Reply
from proxy.store import Store, StoreUnavailable, Turn
from proxy.store.guard import FAILURES
from tests.support.gateway import Json, ask, chat, gateway

CONFIG = """
server: {{port: 0}}
data_dir: {folder}
providers: {{demo: {{api: demo, models: [echo]}}}}
middleware: [{middleware}]
"""


class Keeping:
    """Keeps a turn at its start and at its end."""

    NEEDS_STORE = True
    store: Store | None = None

    def attach(self, surroundings: Surroundings) -> None:
        self.store = surroundings.store

    async def start(self) -> None:
        await self.keep("start")

    async def close(self) -> None:
        await self.keep("close")

    async def keep(self, request: str) -> None:
        assert self.store is not None
        await self.store.conversations.append("o", "s", Turn([], 0, 1.0, request))

    async def __call__(self, call: Call, next: Handler) -> Reply:
        return await next(call)


class Other(Keeping):
    NEEDS_STORE = False

    async def keep(self, request: str) -> None:
        assert self.store is None


TABLE: dict[str, Any] = {"keeping": Keeping, "other": Other}


async def test_nothing_is_made_where_no_middleware_wants_a_store(tmp_path: Path) -> None:
    async with gateway(config=CONFIG, table=TABLE, folder=str(tmp_path / "data"), middleware="other"):
        pass
    assert os.listdir(tmp_path) == []


PROGRAM = """
import asyncio, sys
from proxy.app import Gateway
from proxy.config import parse

class Own:
    NEEDS_STORE = sys.argv[1] == "keeping"
    async def __call__(self, call, next): ...

async def main():
    async with Gateway(parse(sys.argv[2], {}, {"own": Own})):
        pass

asyncio.run(main())
wanted = {"sqlite3", "asyncpg", "numpy", "proxy.store.sqlite", "proxy.store.postgres", "proxy.store.guard"}
print(*(wanted & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("kind", "loaded"), [("other", set()), ("keeping", {"sqlite3", "proxy.store.sqlite", "proxy.store.guard"})]
)
def test_what_nobody_uses_is_not_loaded(tmp_path: Path, kind: str, loaded: set[str]) -> None:
    """numpy only for a search by vectors, asyncpg only for PostgreSQL."""
    command = [sys.executable, "-c", PROGRAM, kind, CONFIG.format(folder=tmp_path, middleware="own")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent.parent, check=True)
    assert set(done.stdout.split()) == loaded


async def test_a_middleware_has_the_store_from_before_its_start_to_behind_its_end(tmp_path: Path) -> None:
    for round in (1, 2):
        async with gateway(config=CONFIG, table=TABLE, folder=str(tmp_path / "data"), middleware="keeping") as running:
            kept = running.layers[0].store  # type: ignore[attr-defined]
            found = await kept.conversations.turns("o", "s", 10)
            assert [turn.request for turn in found] == ["start", "close"][:round]


async def test_what_is_kept_is_for_its_owner_alone(tmp_path: Path) -> None:
    async with gateway(config=CONFIG, table=TABLE, folder=str(tmp_path / "data"), middleware="keeping"):
        for path in [tmp_path / "data", *(tmp_path / "data").iterdir()]:
            assert path.stat().st_mode & 0o077 == 0, path
        assert (tmp_path / "data" / "penstock.db").exists()


async def test_a_reload_may_bring_the_first_middleware_that_wants_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "data")
    async with gateway(config=CONFIG, table=TABLE, folder=folder, middleware="other") as running:
        await running.reload(parse(CONFIG.format(folder=folder, middleware="other, keeping"), {}, TABLE))
        kept = running.layers[1].store  # type: ignore[attr-defined]
        assert len(await kept.conversations.turns("o", "s", 10)) == 1
        assert running.layers[0].store is kept  # type: ignore[attr-defined]
        await running.reload(parse(CONFIG.format(folder=folder, middleware="keeping"), {}, TABLE))
        assert running.layers[0].store is kept  # type: ignore[attr-defined]


async def test_a_folder_that_cannot_be_is_a_fault_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"penstock\.db: Not a directory"):
        async with gateway(config=CONFIG, table=TABLE, folder=str(tmp_path / "file" / "data"), middleware="keeping"):
            pass


# A server that is away, or slow

AWAY = CONFIG + "store: postgresql://penstock:hunter2@127.0.0.1:9/penstock\n"


class Asking(Keeping):
    """Asks the store on each request, and goes on without it."""

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def __call__(self, call: Call, next: Handler) -> Reply:
        assert self.store is not None
        try:
            await self.store.conversations.turns("o", "s", 10)
        except StoreUnavailable:
            return await next(altered(call, name="forgetful"))
        return await next(call)


TABLE["asking"] = Asking


async def health(port: int) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/readyz?verbose") as response:
        found: dict[str, Any] = (await response.json())["store"]
        return found


async def metrics(port: int) -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
        return [line for line in (await response.text()).splitlines() if line.startswith("penstock_store_")]


async def test_without_its_server_the_gateway_starts_serves_and_says_so(tmp_path: Path, lines: list[Json]) -> None:
    async with gateway(config=AWAY, table=TABLE, folder=str(tmp_path), middleware="metrics, asking") as running:
        for _ in range(FAILURES + 2):
            answer = await ask(running.port, chat("demo/fast"))
            assert (answer.status, answer.done) == (200, True)
        told = await health(running.port)
        assert (told["kind"], told["state"], told["not_asked"]) == ("postgres", "unavailable", ["conversations"])
        assert "Connect call failed" in told["trouble"]
        found = await metrics(running.port)
        assert f'penstock_store_calls_total{{method="turns",outcome="unavailable"}} {FAILURES}.0' in found
        assert 'penstock_store_calls_total{method="turns",outcome="refused"} 2.0' in found
        assert 'penstock_store_circuit_state{part="conversations"} 1.0' in found
        assert 'penstock_store_circuit_state{part="library"} 0.0' in found
    told_lines = [line["event"] for line in lines if "store" in line["event"]]
    assert told_lines == ["the store cannot be reached, and is tried again", "the store is not asked for a moment"]
    assert "hunter2" not in f"{lines} {told} {found}"
    assert os.listdir(tmp_path) == [], "and nothing is made here"


async def test_a_server_that_answers_is_used_and_said_to_be_well(tmp_path: Path, database: str, lines: list[Json]) -> None:
    config = CONFIG + "store: '{url}'\n"
    async with gateway(config=config, table=TABLE, folder=str(tmp_path), middleware="keeping", url=database) as running:
        kept = running.layers[0].store  # type: ignore[attr-defined]
        assert [turn.request for turn in await kept.conversations.turns("o", "s", 10)] == ["start"]
        assert await health(running.port) == {"kind": "postgres", "state": "ok"}
    assert [line["event"] for line in lines if "store" in line["event"]] == ["the store is there"]


async def test_a_stream_waits_for_a_slow_store_no_longer_than_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[Json]
) -> None:
    async def hang(*args: object) -> None:
        await asyncio.Event().wait()

    hang.__name__ = "turns"
    monkeypatch.setattr("proxy.store.sqlite.SqliteConversations.turns", hang)
    config = CONFIG + "store: {{timeout: 5ms}}\n"
    async with gateway(config=config, table=TABLE, folder=str(tmp_path), middleware="metrics, asking") as running:
        for _ in range(FAILURES + 1):
            assert (await ask(running.port, chat("demo/fast"))).done
        assert await health(running.port) == {"kind": "sqlite", "state": "failing", "not_asked": ["conversations"]}
        assert f'penstock_store_calls_total{{method="turns",outcome="timeout"}} {FAILURES}.0' in await metrics(running.port)
    [line] = [line for line in lines if "store" in line["event"]]
    assert line["why"] == "turns took longer than 0.005 s"


async def test_a_store_that_changed_while_none_was_wanted_takes_a_restart_where_one_is_open(tmp_path: Path) -> None:
    folder = str(tmp_path / "data")
    async with gateway(config=CONFIG, table=TABLE, folder=folder, middleware="keeping") as running:
        await running.reload(parse(CONFIG.format(folder=folder, middleware="other"), {}, TABLE))
        with pytest.raises(ConfigError, match="another one is open since an earlier config, so this one takes a restart"):
            await running.reload(parse(CONFIG.format(folder=folder + "2", middleware="keeping"), {}, TABLE))


def test_where_a_worker_cannot_open_it_the_faults_are_said(tmp_path: Path) -> None:
    """Through the command line, with workers and without: no traceback, exit status 1."""
    (tmp_path / "file").write_text("")
    config = tmp_path / "config.yaml"
    own = "tests.test_storage:Keeping"
    config.write_text(CONFIG.format(folder=tmp_path / "file" / "data", middleware=f'"{own}"'))
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "proxy", "serve", "-c", str(config), "--workers", workers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent.parent)
        assert done.returncode == 1
        assert "penstock.db: Not a directory" in done.stderr
        assert "Traceback" not in done.stderr


# Settings


@pytest.mark.parametrize(
    ("text", "url", "timeout"),
    [
        ("", None, 0.5),
        ("store: {timeout: 250ms}", None, 0.25),
        ("store: postgresql://u:p@h:5432/d", "postgresql://u:p@h:5432/d", 0.5),
        ("store: {url: 'postgres:///d?host=/run/postgresql', timeout: 1s}", "postgres:///d?host=/run/postgresql", 1.0),
        ('store: "${PG}"', "postgresql://secret@h/d", 0.5),
    ],
)
def test_the_store_is_a_url_or_a_section_or_a_file(text: str, url: str | None, timeout: float) -> None:
    row = parse(text, {"PG": "postgresql://secret@h/d"}).store
    assert (row.url and row.url.get_secret_value(), row.timeout) == (url, timeout)
    assert "secret" not in repr(row)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("store: mysql://u:hunter2@h/d", "store (line 1): must be a URL such as postgresql://user:password@host:5432/database"),
        ("store: {url: 'postgresql://u:hunter2@h:port/d'}", "store.url (line 1): is no URL"),
        ("store: 'postgresql://'", "store (line 1): must be a URL such as"),
        ("store: {timeout: 2h}", "store.timeout (line 1): must be from 0.001 to 3600"),
        ("store: {connections: 0}", "store.connections (line 1): must be from 1 to 100"),
        ("store: {path: x}", "store.path (line 1): unknown key"),
        ("store: ${NONE}", "store (line 1): environment variable NONE is not set"),
        ("data_dir: ''", "data_dir (line 1): must not be empty"),
    ],
)
def test_what_is_wrong_with_it_is_said_by_its_path_and_without_the_password(text: str, fault: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text, {})
    assert refused.value.faults[0].startswith(f"{fault}")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", ["store: SQLite in one"]),
        ("store: postgresql://u:hunter2@db:5432/penstock", ["store: PostgreSQL at db:5432/penstock"]),
        ("store: 'postgresql:///penstock?host=/run/x&password=hunter2'", ["store: PostgreSQL at the usual socket/penstock"]),
    ],
)
def test_check_says_where_it_lies_and_not_who_may_open_it(written: str, said: list[str]) -> None:
    config = parse(CONFIG.format(folder="one", middleware="keeping") + written, {}, TABLE)
    assert [line for line in summary(config) if line.startswith("store")] == said
    config = parse(CONFIG.format(folder="one", middleware="other") + written, {}, TABLE)
    assert [line for line in summary(config) if line.startswith("store")] == []


def test_postgres_without_its_driver_is_a_fault_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ConfigError, match=r"store \(line 1\): PostgreSQL needs asyncpg: pip install 'penstock\[postgres\]'"):
        parse("store: postgresql://h/d", {})


@pytest.mark.parametrize(("middleware", "kept"), [("keeping", ["data_dir", "store"]), ("other", [])])
def test_where_a_store_is_open_another_takes_a_restart(tmp_path: Path, middleware: str, kept: list[str]) -> None:
    path = tmp_path / "config.yaml"
    before = parse(CONFIG.format(folder="one", middleware=middleware), {}, TABLE)
    after = CONFIG.format(folder="two", middleware="other") + "store: {timeout: 2s}\n"
    config, held = ConfigFile(path, {}, TABLE).parse(after, before)
    assert held == kept
    assert (str(config.data_dir), config.store.timeout) == (("one", 0.5) if kept else ("two", 2.0))
