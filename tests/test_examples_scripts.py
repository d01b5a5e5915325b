"""The examples that run in a terminal, as their READMEs say: what they print against `demo`, and what the gateway saw of them.

Strategy: each script runs as users run it, told nothing but the base URL of a gateway in this process, whose log tells the ends.
The one rule: a script that no longer prints what its README shows is a fault of the example, not of the test.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from middleware import TABLE
from proxy.app import Gateway
from proxy.config import parse
from tests.support.gateway import until
from tests.support.programs import output

Json = dict[str, Any]
EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDERS = ["node-script", "python-script", "fetch-sse", "react-chat", "ai-sdk-chat", "eventsource", "next-route"]
CONFIG = "server: {port: 0}\nproviders: {demo: {api: demo}}\nmiddleware: [tracking]"
WORDS = "This is Penstock's demo provider; it has no model behind it. You said: "


async def check(lines: list[Json], *command: str, env: Json | None = None) -> list[str]:
    """Runs a script; what it printed behind the parts that both scripts have."""
    async with Gateway(parse(CONFIG, {}, TABLE)) as running:
        printed = (await output(*command, f"http://127.0.0.1:{running.port}/v1", env=env)).splitlines()
        calls = len(printed) - 1  # the first stream prints two lines
        await until(lambda: len([line for line in lines if "outcome" in line]) == calls)
    outcomes = [line["outcome"] for line in lines if "outcome" in line]
    assert printed[:2] == [f"{WORDS}What is a penstock?", "4 tokens in, 17 out"]
    assert printed[2].endswith(" … cancelled after 2 words")
    assert printed[3] == "too many requests, try again in 1 s"
    assert printed[4].startswith("refused with 500: ")
    assert printed[5] == "This is Penstock's … broke off: The demo was told to fail in mid-stream."
    assert printed[6] == "This is Penstock's … broke off: The demo was told to break the connection."
    expected = ["completed", "client_gone", "upstream_error", "upstream_error", "upstream_error", "upstream_cut"]
    assert sorted(outcomes[:6]) == sorted(expected), "the cancelled one was closed at the provider too"
    return printed[7:]


async def test_the_node_script(packages: Json, lines: list[Json]) -> None:
    assert await check(lines, packages["program"], str(EXAMPLES / "node-script" / "chat.mjs"), env=packages["env"]) == []


async def test_the_python_script(lines: list[Json], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    rest = await check(lines, sys.executable, str(EXAMPLES / "python-script" / "chat.py"))
    assert rest == [f"{WORDS}first question", f"{WORDS}second question"]


async def test_the_reader_over_every_split() -> None:
    """It needs nothing installed but Node."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node is not installed")
    printed = await output(program, "--test", "--test-reporter=tap", str(EXAMPLES / "fetch-sse" / "stream.test.mjs"))
    assert "# tests 17\n" in printed
    assert "# pass 17\n" in printed


def test_the_lock_names_no_registry() -> None:
    lock = json.loads((EXAMPLES / "package-lock.json").read_text())
    packages = [package for name, package in lock["packages"].items() if name]
    assert packages
    assert not any("resolved" in package for package in packages)
    assert all(package["integrity"].startswith("sha512-") for package in packages)


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_readme_is_short_and_its_links_lead_somewhere(folder: str) -> None:
    text = (EXAMPLES / folder / "README.md").read_text()
    assert 10 <= len(text.splitlines()) <= 30
    for link in [part.partition(")")[0] for part in text.split("](")[1:]]:
        assert link.startswith("https://") or (EXAMPLES / folder / link).exists(), link
