"""The store within a running gateway: opened where some middleware wants it, handed to it, closed last; and its settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from proxy.call import Call
from proxy.config import ConfigError, parse
from proxy.configfile import ConfigFile
from proxy.pipeline import Handler, Surroundings
from proxy.reply import Reply
from proxy.store import Store, Turn
from tests.support.gateway import gateway

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


@pytest.mark.parametrize(("middleware", "kept"), [("keeping", ["data_dir", "store"]), ("other", [])])
def test_where_a_store_is_open_another_takes_a_restart(tmp_path: Path, middleware: str, kept: list[str]) -> None:
    path = tmp_path / "config.yaml"
    before = parse(CONFIG.format(folder="one", middleware=middleware), {}, TABLE)
    after = CONFIG.format(folder="two", middleware="other") + "store: {timeout: 2s}\n"
    config, held = ConfigFile(path, {}, TABLE).parse(after, before)
    assert held == kept
    assert (str(config.data_dir), config.store.timeout) == (("one", 0.5) if kept else ("two", 2.0))
