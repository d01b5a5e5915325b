"""Fixtures that more than one test file needs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from proxy.delivery import Delivery
from proxy.store import Store, sqlite
from proxy.store import postgres as postgres_home
from tests.support.pages import Browser, Site, held_port, site
from tests.support.postgres import schema, server

Json = dict[str, Any]
NODE = Path(__file__).parent / "node"
EXAMPLES = Path(__file__).parent.parent / "examples"
BUILT = {"node_modules", "dist", "__pycache__"}  # in examples/, but no sources


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
    with _one_at_a_time(NODE):
        if not installed.exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(NODE / name, folder / name)
            _install(npm, folder, "the Node SDK")
    return {"program": program, "env": {**os.environ, "NODE_PATH": str(folder / "node_modules"), "NO_PROXY": "*"}}


@pytest.fixture(scope="session")
def packages() -> Json:
    """What the examples import, in examples/node_modules, and the environment for Node. Installed once per state of the lock."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip("Node and npm are not installed")
    modules = EXAMPLES / "node_modules"
    with _one_at_a_time(EXAMPLES), _once(modules / ".installed", [EXAMPLES / "package-lock.json"]) as needed:
        if needed:
            _install(npm, EXAMPLES, "what the examples import")
    return {"program": program, "env": {**os.environ, "NODE_PATH": str(modules), "NO_PROXY": "*"}}


@pytest.fixture(scope="session")
def pages(packages: Json) -> Json:
    """The environment for Node, once the pages of the examples are built. They are built anew where a source has changed."""
    vite = EXAMPLES / "node_modules" / "vite" / "bin" / "vite.js"
    sources = [path for path in sorted(EXAMPLES.rglob("*")) if path.is_file() and not BUILT & {*path.relative_to(EXAMPLES).parts}]
    with _one_at_a_time(EXAMPLES), _once(EXAMPLES / "dist" / ".built", sources) as needed:
        for which in ([], ["--ssr", "serve.ts"]) if needed else ():
            command = [packages["program"], str(vite), "build", "--logLevel", "error", *which]
            done = subprocess.run(command, cwd=EXAMPLES, env=packages["env"], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
    return packages


@pytest.fixture(scope="session")
def browser(packages: Json) -> Iterator[Browser]:
    """One Chromium for the whole run."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with Browser(packages["program"], packages["env"], chromium) as running:
        yield running


@pytest.fixture(scope="session")
def here(pages: Json) -> Iterator[Site]:
    with held_port() as port, site(pages["program"], port) as address:
        yield Site(address, port)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of the processes in which the tests run, one installs or builds here, and the others wait for it."""
    with (folder / "package-lock.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _once(stamp: Path, sources: Sequence[Path]) -> Iterator[bool]:
    """Is there something to do? Not if it was done for these very sources."""
    want = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sources)).hexdigest()
    needed = not stamp.exists() or stamp.read_text() != want
    yield needed
    if needed:
        stamp.write_text(want)


def _install(npm: str, folder: Path, what: str) -> None:
    """What the lock in `folder` names. Skips the test where the registry cannot be had; a lock that is wrong is no reason to."""
    command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    try:
        done = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm could not install {what} within 120 s")
    code = re.search(rb"code (E\w+)", done.stderr)
    assert code is None or code[1] != b"EUSAGE", done.stderr.decode()
    if done.returncode:
        pytest.skip(f"npm could not install {what} ({code[1].decode() if code else f'exit status {done.returncode}'})")


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
