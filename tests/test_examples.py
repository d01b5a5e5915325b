"""The examples of one's own middleware do what their heads say, each under 40 lines, named in config.yaml as `module:Name`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gateway import ask, chat, gateway
from tests.support.upstream import Upstream, stream, whole

EXAMPLES = Path(__file__).parent.parent / "examples" / "middleware"
CONFIG = """
server: {{port: 0}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  azure: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
models: {{fast: {{targets: [openai/a, azure/b]}}}}
middleware: [{middleware}]
"""
EVENTS = [
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a "}}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"secret b"}}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"total_tokens":3}}\n\n',
    b"data: [DONE]\n\n",
]
WHOLE = b'{"id":"c","choices":[{"index":0,"message":{"role":"assistant","content":"a secret"},"finish_reason":"stop"}]}'


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("[a-z]*.py")), ids=lambda file: file.stem)
def test_each_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 40


async def test_region_chooses_among_the_targets_or_refuses() -> None:
    setting = 'examples.middleware.region:Region: {users: ["eu-*"], prefer: azure}'
    async with Upstream(stream(EVENTS)) as upstream, gateway(upstream.url, CONFIG, middleware=setting) as here:
        assert (await ask(here.port, chat("fast"))).headers["X-Penstock-Target"] == "openai/a"
        european = await ask(here.port, chat("fast", identity={"id": "eu-7"}))
        assert european.headers["X-Penstock-Target"] == "azure/b"
        assert (await ask(here.port, chat("openai/a", identity={"id": "eu-7"}))).status == 403
        assert len(upstream.asked) == 2


async def test_audit_writes_a_line_when_the_stream_has_ended(tmp_path: Path) -> None:
    setting = f"examples.middleware.audit:Audit: {{file: {tmp_path / 'audit.log'}}}"
    async with Upstream(stream(EVENTS)) as upstream, gateway(upstream.url, CONFIG, middleware=setting) as here:
        assert (await ask(here.port, chat("fast"), headers={"X-Request-Id": "r1"})).done
    assert (tmp_path / "audit.log").read_text() == "r1 anonymous fast -> openai/a: completed, 3 tokens\n"


async def test_redact_changes_the_chunks_that_hold_the_word_streamed_and_whole() -> None:
    setting = "examples.middleware.redact:Redact: {word: secret}"
    async with Upstream(stream(EVENTS)) as upstream, gateway(upstream.url, CONFIG, middleware=setting) as here:
        answer = await ask(here.port, chat("fast"))
        assert (answer.text, answer.done) == ("a ****** b", True)
        upstream.answer = whole(WHOLE)
        found = (await ask(here.port, chat("fast", stream=False))).json
        assert found["choices"][0]["message"]["content"] == "a ******"
