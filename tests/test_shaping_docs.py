"""The commands of docs/smoothing.md, docs/bounds.md, docs/tools.md and docs/guardrails.md do what is written beneath them, with
the lines of the shipped config.yaml switched on."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import orjson
import pytest

from middleware import TABLE
from proxy.app import Gateway
from proxy.config import parse

ROOT = Path(__file__).parent.parent
NAMES = ("smooth", "bounds", "tool_guard", "guardrails")


def shipped() -> str:
    """config.yaml with these lines as if nobody had commented them out."""
    text = (ROOT / "config.yaml").read_text().replace("port: ${PENSTOCK_PORT:-8080}", "port: 0")
    for name in NAMES:
        text, found = re.subn(rf"^  # - {name}:", f"  - {name}:", text, flags=re.MULTILINE)
        assert found == 1
    return text


async def said(page: str, *swap: str) -> str:
    """What the page's one curl prints; swap: a word of it and another."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (command,) = re.findall(r"```sh\n(curl .*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    async with Gateway(parse(shipped(), {}, TABLE)) as gateway:
        command = command.replace("127.0.0.1:8080", f"127.0.0.1:{gateway.port}").replace(*swap or ("", ""))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=pipe, stderr=pipe)
        out, _ = await process.communicate()
    return out.decode()


async def test_smoothing() -> None:
    out = await said("smoothing.md")
    assert 2 <= out.count('"content"') <= 6, "four of fourteen, more or less by the machine"
    assert out.endswith("data: [DONE]\n\n")


async def test_bounds() -> None:
    out = await said("bounds.md")
    assert '"native_finish_reason":"penstock:max_output_tokens_hard"' in out
    assert '"estimated":true' in out
    assert out.endswith("data: [DONE]\n\n")


async def test_tools() -> None:
    strict, repair = await said("tools.md"), await said("tools.md", '"strict"', '"repair"')
    assert '"code":"tool_call_invalid"' in strict
    assert "cut off before its arguments were complete" in strict
    assert "[DONE]" not in strict
    assert '"penstock":{"tool_calls_invalid":[{"choice":0,"index":0,"id":"call_' in repair
    assert repair.endswith("data: [DONE]\n\n")


async def test_guardrails() -> None:
    out = await said("guardrails.md")
    assert "X-Penstock-Guardrails: email;action=redact;on=input, card;action=redact;on=input\r\n" in out
    assert "jo@example.org" not in out
    assert "4111" not in out
    assert '"penstock":{"guardrails":[{"id":"email","action":"redact","on":"input"}' in out
    events = [line.removeprefix("data: ") for line in out.splitlines() if line.startswith("data: {")]
    texts = [choice["delta"].get("content", "") for event in events for choice in orjson.loads(event)["choices"]]
    assert "Write to [EMAIL_1], card [CARD_1]" in "".join(texts)
