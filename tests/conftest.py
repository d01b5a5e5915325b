"""Fixtures that more than one test file needs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from proxy.delivery import Delivery
from proxy.store import Store, sqlite
from proxy.store import postgres as postgres_home
from tests.support.postgres import schema, server

Json = dict[str, Any]
NODE = Path(__file__).parent / "node"


@pytest.fixture(scope="session")
def node(pytestconfig: pytest.Config) -> Json:
    """The environment in which Node finds the SDK. It is installed once per version, into pytest's cache."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip("Node and npm are not installed")
    wanted = json.loads((NODE / "package.json").read_text())["dependencies"]["openai"]
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(f"node-openai-{wanted}")
    installed = folder / "node_modules" / "openai" / "package.json"
    if not installed.exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NODE / name, folder / name)
        try:
            done = subprocess.run(
                [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, env=dict(os.environ),
                capture_output=True, timeout=60,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            pytest.skip("npm could not install the Node SDK within 60 s")
        if done.returncode:
            pytest.skip(f"npm could not install the Node SDK (exit status {done.returncode})")
    return {"program": program, "env": {**os.environ, "NODE_PATH": str(folder / "node_modules"), "NO_PROXY": "*"}}


@pytest.fixture
def lines() -> Iterator[list[Json]]:
    """The log lines, as their fields. A logger bound before is cached, so the capturing one is bound while this is on."""
    before = structlog.get_config()
    structlog.reset_defaults()
    with structlog.testing.capture_logs() as found:
        yield found  # type: ignore[misc]
    structlog.configure(**before)


@pytest.fixture
def comments(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every comment that a gateway in this process writes to a client, as it is written."""
    found: list[bytes] = []
    write = Delivery.write

    def noted(delivery: Delivery, data: bytes) -> bool:
        if data.startswith(b":"):
            found.append(data)
        return write(delivery, data)

    monkeypatch.setattr(Delivery, "write", noted)
    return found


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """A real PostgreSQL with pgvector; a test that stops it starts it again."""
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(server())
        except Exception as error:
            pytest.skip(f"no PostgreSQL could be started here ({type(error).__name__}: {error})")
        yield running


@pytest.fixture
def postgres(postgres_server: Any) -> str:
    """Its URL."""
    uri: str = postgres_server.get_uri()
    return uri


@pytest.fixture
async def database(postgres: str) -> str:
    """The URL of an empty schema in it."""
    return await schema(postgres)


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Each home of what outlives a request, empty."""
    if request.param == "sqlite":
        home: Any = await sqlite.opened(tmp_path / "data")
    else:
        home = await postgres_home.opened(await schema(request.getfixturevalue("postgres")), 5, 10.0, lambda trouble: None)
    yield home.store
    await home.close()
