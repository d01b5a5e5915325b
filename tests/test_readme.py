"""The README tells the truth: its commands and programs are run as they stand, only with the test's own port."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from middleware import TABLE
from proxy.app import Gateway
from proxy.config import load, parse
from proxy.wire import WIRES
from tests.support.programs import output

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIG = """
server: {port: 0}
providers: {demo: {api: demo}}
"""


def block(language: str, containing: str) -> str:
    """The fenced block of the README in a language that contains some words."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1, f"one {language} block with {containing!r}"
    text: str = found[0]
    return text


def on(gateway: Gateway, text: str) -> str:
    assert "127.0.0.1:8080" in text
    return text.replace("127.0.0.1:8080", f"127.0.0.1:{gateway.port}")


async def test_the_curl() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    async with Gateway(parse(CONFIG, {}, TABLE)) as gateway:
        out = await output("bash", "-c", on(gateway, block("sh", "Hello, Penstock")))
    assert out.endswith("data: [DONE]\n\n")
    assert "Penstock" in out


async def test_the_curl_that_drives_the_middleware() -> None:
    """Its provider stalls, and the fallback answers, with the shipped middleware."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    shipped = "middleware:" + (ROOT / "config.yaml").read_text().split("\nmiddleware:", 1)[1]
    retries = re.sub("- retry: {count: 2", "- retry: {count: 0", shipped)  # its waits are real
    async with Gateway(parse(CONFIG + retries, {}, TABLE)) as gateway:
        out = await output("bash", "-c", on(gateway, block("sh", "demo/stall")))
    assert out.endswith("data: [DONE]\n\n")


def test_every_middleware_is_in_its_table() -> None:
    assert set(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", README, re.MULTILINE)) == set(TABLE)


async def test_the_python_program() -> None:
    async with Gateway(parse(CONFIG, {}, TABLE)) as gateway:
        out = await output(sys.executable, "-c", on(gateway, block("python", "from openai import OpenAI")))
    assert "Hello, Penstock" in out


async def test_the_node_program(node: dict[str, Any]) -> None:
    folder = Path(node["env"]["NODE_PATH"]).parent
    async with Gateway(parse(CONFIG, {}, TABLE)) as gateway:
        (folder / "readme.mjs").write_text(on(gateway, block("js", "import OpenAI")))
        out = await output(node["program"], str(folder / "readme.mjs"))
    assert "Hello, Penstock" in out


async def test_the_middleware_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("python", "class Audit")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 10
    (tmp_path / "my_company").mkdir()
    (tmp_path / "my_company" / "audit.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    setting = f"middleware: [my_company.audit:Audit: {{file: {tmp_path / 'audit.log'}}}]"
    async with Gateway(parse(CONFIG + setting, {}, TABLE)) as gateway:
        await output("bash", "-c", on(gateway, block("sh", "Hello, Penstock")))
    assert "completed" in (tmp_path / "audit.log").read_text()


def test_the_vendor_row_is_a_provider() -> None:
    row = block("yaml", "my-vendor")
    assert parse(row, {"MY_VENDOR_KEY": "k"}, TABLE).providers["my-vendor"].missing is None


def test_every_provider_of_the_shipped_config_is_in_the_table() -> None:
    config = load(ROOT / "config.yaml", {}, TABLE)
    rows = {match[1]: match[2] for match in re.finditer(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", README, re.MULTILINE)}
    assert set(rows) - {"api"} == set(WIRES)
    for provider in config.providers.values():
        assert re.search(rf"\b{provider.name}\b", rows[provider.api]), provider.name


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
