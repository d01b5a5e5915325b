"""Imports point down: every module has a floor, and may import only what lies below it, or beside it in its own folder.

Strategy: the imports of every file under proxy/ and middleware/ are read with `ast`, wherever in the file they stand; nothing is
imported. `FLOORS` is the whole table: a new module is given its line there, on the lowest floor that has all it needs below it.
The one rule: a module without a floor is as wrong as an import that points up.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("proxy", "middleware")

# A name that ends in `.*` stands for everything in that folder. `proxy` itself (the version) lies below everything.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("proxy",),
    ("proxy.errors", "proxy.call", "proxy.units", "proxy.timers", "proxy.origins"),
    ("proxy.reply.*", "proxy.transport", "proxy.store.*", "proxy.conformance.*"),
    (
        "proxy.sse", "proxy.pipeline", "proxy.routing", "proxy.chunks", "proxy.faults", "proxy.fold", "proxy.prompt",
        "proxy.translation", "proxy.own_fields", "proxy.flight.*", "proxy.text_events", "proxy.estimate",
    ),
    ("proxy.decoder", "proxy.question", "proxy.shared"),
    ("proxy.wire.*", "proxy.faces.*", "middleware.*", "proxy.source", "proxy.admission", "proxy.logs"),
    (
        "proxy.upstream.*", "proxy.exchange", "proxy.demo.*", "proxy.relay", "proxy.keepalive", "proxy.delivery", "proxy.http",
        "proxy.lane", "proxy.sockets", "proxy.config", "proxy.reading", "proxy.yamlfile", "proxy.shape", "proxy.schema",
        "proxy.settings", "proxy.wording", "proxy.configfile", "proxy.changes", "proxy.generation",
        "proxy.cors", "proxy.open_calls",
    ),
    ("proxy.server",),
    ("proxy.generations", "proxy.reload", "proxy.storage"),
    ("proxy.app", "proxy.__main__", "proxy.workers.*"),
)  # fmt: skip
CONFIG = {
    "proxy.config", "proxy.reading", "proxy.yamlfile", "proxy.shape", "proxy.schema", "proxy.wording", "proxy.configfile",
    "proxy.changes", "proxy.settings",
}  # fmt: skip
# Modules that serve one another on one floor, beside those that share a folder.
CLIENT_SIDE = {
    "proxy.delivery", "proxy.http", "proxy.lane", "proxy.sockets", "proxy.relay", "proxy.keepalive", "proxy.cors",
    "proxy.generation", "proxy.open_calls",
}  # fmt: skip
# `app.run` hands over to the workers, each of which is a gateway of `app`.
WORKERS = {"proxy.workers", "proxy.workers.supervisor", "proxy.workers.worker"}
TOGETHER = (CONFIG, CLIENT_SIDE, {"proxy.app", "proxy.__main__"}, {"proxy.app"} | WORKERS)

# Who may import which third-party package; the packages that are not named here are the standard library's.
LIGHT = ("orjson",)
AIOHTTP = {"proxy.sockets", "proxy.app"}
THIRD_PARTY = {
    "aiohttp": AIOHTTP,
    "httptools": {"proxy.upstream.connection"},
    "aiohappyeyeballs": {"proxy.upstream.dialing"},
    "yarl": {"proxy.upstream.request"},
    "multidict": {"proxy.lane"},
    "uvloop": {"proxy.app"},
    "pydantic": CONFIG,
    "pydantic_core": CONFIG,
    "ruamel": CONFIG | {"middleware.auth.keysfile"},
    "bs4": {"middleware.retrieval.text.hypertext"},
    "docx": {"middleware.retrieval.text.word"},
    "pypdf": {"middleware.retrieval.text.pdf"},
    "cachetools": {"middleware.cache.store"},
    "python_multipart": {"middleware.retrieval.uploads"},
    "re2": {"middleware.guardrails.rules.engine"},
    "throttled": {"middleware.limits.meters"},
    "prometheus_client": {"middleware.metrics.families", "middleware.metrics.samples"},
    "asyncpg": {"proxy.store.postgres.database", "proxy.store.postgres.conversations"},
    "numpy": {"proxy.store.sqlite.nearest"},
    "genai_prices": {"middleware.metrics.prices", "middleware.fallback.prices"},
}
LOGGING_FLOOR = 6  # from here up anybody may log; below it only middleware and proxy.logs


@dataclass(frozen=True)
class Import:
    """`module` imports `target` (a module of ours, or a third-party package) in this line of its file."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module} (line {self.line}) imports {self.target}"


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, text: str, ours: set[str], is_package: bool) -> Iterator[Import]:
    """What `module` imports, a module of ours by its full name, anything else by its top package."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*_parent(module, node.level, is_package), *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(module, _longest(name, ours) or name.partition(".")[0], node.lineno)


def _parent(module: str, level: int, is_package: bool) -> list[str]:
    """The package that a relative import of `level` dots starts from; nothing for an absolute one."""
    if not level:
        return []
    parts = module.split(".")
    return parts[: len(parts) - level + is_package]


def _longest(name: str, ours: set[str]) -> str | None:
    """The module of ours that `name` lies in: `proxy.wire.openai.Decoder` is found in `proxy.wire.openai`."""
    while name and name not in ours:
        name = name.rpartition(".")[0]
    return name or None


def wrong_imports(module: str, text: str) -> list[str]:
    """What is wrong with the imports of `module`, if this is its text."""
    found = imports(module, text, set(OURS), OURS[module].name == "__init__.py")
    return [wrong for one in found if (wrong := fault(one, set(OURS)))]


def floor(module: str) -> int | None:
    for number, names in enumerate(FLOORS):
        for name in names:
            folder = name.removesuffix(".*")
            if module == folder or (folder != name and module.startswith(folder + ".")):
                return number
    return None


def fault(found: Import, ours: set[str]) -> str | None:
    """What is wrong with an import, or None."""
    return _of_ours(found) if found.target in ours else _of_others(found)


def _of_ours(found: Import) -> str | None:
    own, other = floor(found.module), floor(found.target)
    if own is None or other is None:
        return None  # reported by the test that every module has a floor
    if other < own:
        return _across(found)
    if other > own:
        return f"{found}: it points up, from floor {own} to floor {other}"
    beside = _room(found.module) == _room(found.target) or any({found.module, found.target} <= group for group in TOGETHER)
    return _across(found) if beside else f"{found}: both are on floor {own}, and do not share a folder"


def _across(found: Import) -> str | None:
    """Neighbours that must not know each other: wires, middlewares, and middleware the formats."""
    for rooms in ("proxy.wire", "middleware"):
        if found.module.startswith(rooms + ".") and (found.target + ".").startswith(rooms + "."):
            own, other = (name.removeprefix(rooms).strip(".").partition(".")[0] for name in (found.module, found.target))
            if own != other:
                return f"{found}: neighbours in {rooms} never import each other"
    return None


def _room(module: str) -> str:
    """The folder a module shares with its neighbours; a module that lies directly in proxy/ has a room of its own."""
    parts = module.split(".")
    return parts[0] if parts[0] == "middleware" else ".".join(parts[:2])


def _of_others(found: Import) -> str | None:
    package = found.target
    if package in sys.stdlib_module_names or package in LIGHT:
        return None
    if package == "structlog":
        logs = found.module == "proxy.logs" or _room(found.module) == "middleware"
        high = (floor(found.module) or 0) >= LOGGING_FLOOR
        return None if logs or high else f"{found}: only for middleware, proxy.logs, and floors from {LOGGING_FLOOR} up"
    if found.module in THIRD_PARTY.get(package, ()):
        return None
    allowed = ", ".join(sorted(THIRD_PARTY.get(package, ()))) or "no module"
    return f"{found}: only for {allowed}"


OURS = modules()


@pytest.mark.parametrize("module", OURS)
def test_every_module_has_a_floor(module: str) -> None:
    assert floor(module) is not None, f"{module} has no floor: add it to FLOORS in tests/test_floors.py, as low as it can stand"


@pytest.mark.parametrize("module", OURS)
def test_imports_point_down(module: str) -> None:
    assert wrong_imports(module, OURS[module].read_text(encoding="utf-8")) == []


def test_the_page_on_architecture_has_the_same_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {int(floor): names for floor, names in re.findall(r"^\| (\d) \| ([^|]+) \|", page, re.MULTILINE)}
    drawn = {floor: set(re.findall(r"`([^`]+)`", names)) for floor, names in rows.items()}
    above = enumerate(FLOORS[1:], start=1)
    assert drawn == {floor: {name.removeprefix("proxy.").replace(".", "/") for name in names} for floor, names in above}


def test_every_line_of_the_table_is_a_module_that_exists() -> None:
    """A floor kept for a module that was renamed would hide the new one's absence."""
    named = {name.removesuffix(".*") for names in FLOORS for name in names}
    assert named - set(OURS) == set()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("proxy.errors", "from proxy.call import Call\nimport proxy.relay"),
        ("proxy.call", "def late():\n    from proxy.reply import Reply"),
        ("proxy.errors", "from . import server"),
        ("proxy.wire.openai.decode", "from proxy.wire.cohere import parts"),
        ("proxy.wire.openai.decode", "from ..cohere.parts import FORMAT"),
        ("proxy.wire.openai", "from proxy.faces import chat"),
        ("proxy.wire.openai.encode", "from proxy.wire import WIRES"),
        ("proxy.faces.chat", "from proxy.wire import WIRES"),
        ("middleware.tracking", "from middleware.timeout import Timeout"),
        ("middleware.tracking", "from middleware import TABLE"),
        ("middleware.tracking", "import proxy.wire"),
        ("middleware.tracking", "from proxy.faces import chat"),
        ("middleware.tracking", "import aiohttp"),
        ("proxy.server", "from proxy.app import Gateway"),
        ("proxy.relay", "from proxy.upstream import HttpTransport"),
        ("proxy.exchange", "from proxy.config import Config"),
        ("proxy.source", "import structlog"),
        ("proxy.exchange", "import aiohttp"),
        ("proxy.server", "import pydantic"),
        ("proxy.sse", "from pydantic_core import from_json"),
        ("proxy.config", "import requests"),
    ],
)
def test_the_check_finds_a_wrong_import(module: str, text: str) -> None:
    assert wrong_imports(module, text)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("proxy.reply", "from proxy.errors import Outcome"),
        ("proxy.wire.openai.decode", "from . import quirks"),
        ("proxy.wire", "from proxy.wire import openai"),
        ("proxy.faces.completions", "from proxy.faces import chat"),
        ("middleware", "from middleware.timeout import Timeout"),
        ("middleware.tracking", "import structlog"),
        ("proxy.config", "from proxy.shape import File"),
        ("proxy.app", "import uvloop"),
        ("proxy.__main__", "from proxy import __version__"),
        ("proxy.__main__", "from proxy.app import run"),
    ],
)
def test_the_check_passes_a_right_import(module: str, text: str) -> None:
    assert wrong_imports(module, text) == []
