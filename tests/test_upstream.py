"""The owner of client sockets: what it leaves behind."""

from __future__ import annotations

import gc

from proxy.source import Source
from proxy.upstream import HttpResponse
from tests.support.gateway import ask, chat, gateway
from tests.support.upstream import Asked, Line, Upstream

CONFIG = """
server: {{port: 0}}
providers: {{openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}}}
middleware: [timeout: {{idle_timeout: 50ms}}]
"""
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'


async def falls_silent(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD)
    await line.forever()


def alive() -> int:
    gc.collect()
    return sum(isinstance(found, HttpResponse | Source) for found in gc.get_objects())


async def test_a_response_that_was_closed_while_it_was_read_is_forgotten() -> None:
    """aiohttp raises one global exception for closed responses; its traceback must not keep them alive."""
    before = alive()
    async with Upstream(falls_silent) as upstream, gateway(upstream.url, CONFIG) as here:
        for _ in range(5):
            assert (await ask(here.port, chat())).error["code"] == "timeout_idle"  # type: ignore[index]
        assert alive() == before
