"""The examples' route handlers, mounted in the server of examples/serve.ts, before a real gateway; asked by bytes, not by a page.

Strategy: what goes in and out of a handler is compared with what the gateway said, and the provider's socket tells of aborts.
The one rule: a handler passes an end on as it was; a stream that broke before it never ends cleanly behind it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.support.gateway import Answer, RawClient, ask, chat, gateway, raw_request, until
from tests.support.pages import site
from tests.support.upstream import Answer as Given
from tests.support.upstream import Asked, Line, Upstream, http_head, stream, whole

Json = dict[str, Any]
CONFIG = """
server: {{port: 0, drain_timeout: 50ms}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - auth: {{keys: [{{name: web, key: "a-key-of-the-server"}}]}}
  - resume
"""
KEY = "a-key-of-the-server"
HALF = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"Gr\xc3\xbc\xc3\x9fe "}}]}\n\n'
WHOLE = b'{"id":"c","choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}]}'
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}
REST = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"\xf0\x9f\x8c\x8a"},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\ndata: [DONE]\n\n'
)


async def held(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(HALF)
    await line.forever()


@asynccontextmanager
async def serving(pages: Json, answer: Given) -> AsyncIterator[tuple[int, Upstream]]:
    """The port of the server of the handlers."""
    async with Upstream(answer) as upstream, gateway(upstream.url, CONFIG) as running:
        with site(pages["program"], running.port, GATEWAY_KEY=KEY) as address:
            yield int(address.rpartition(":")[2]), upstream


async def asked_of(port: int, **fields: Any) -> Answer:
    return await ask(port, chat(**fields), "/api/chat")


async def test_the_next_route_passes_a_stream_through_and_little_of_the_request(pages: Json) -> None:
    async with serving(pages, stream([HALF, REST])) as (port, upstream):
        answer = await asked_of(port, temperature=9, stream=False)
    assert (answer.status, answer.text, answer.done, answer.clean) == (200, "Grüße 🌊", True, True)
    assert answer.chunks[-1]["usage"]["total_tokens"] == 3
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["X-Request-Id"].startswith("req_")
    assert "X-Penstock-Target" not in answer.headers
    assert "temperature" not in upstream.asked[0].json


async def test_the_next_route_passes_refusals_and_breaks_on(pages: Json) -> None:
    limited = whole(b'{"error": {"message": "slow down"}}', 429, headers={"Retry-After": "7"})
    async with serving(pages, limited) as (port, upstream):
        answer = await asked_of(port)
        assert (answer.status, answer.json["error"]["message"], answer.headers["Retry-After"]) == (429, "slow down", "7")
        upstream.answer = stream([HALF])
        answer = await asked_of(port)
        assert answer.error is not None
        assert (answer.status, answer.text, answer.done, answer.clean) == (200, "Grüße ", False, True)
        assert (await ask(port, b"{", "/api/chat")).error == {
            "message": "The body is not JSON.", "type": "api_error", "param": None, "code": "invalid_json",
        }  # fmt: skip
        assert len(upstream.asked) == 2


async def test_the_routes_close_the_provider_when_the_page_has_gone(pages: Json) -> None:
    bodies = {
        "/api/chat": chat(),
        "/api/ai-sdk": {"model": "openai/m", "messages": [{"role": "user", "parts": [{"type": "text", "text": "Hi"}]}]},
    }
    for path, body in bodies.items():
        async with serving(pages, held) as (port, upstream):
            async with RawClient(port) as client:
                await client.send(raw_request(body, path))
                await until(lambda asked=upstream.asked: asked, 5)
                await client.first_byte()
            async with asyncio.timeout(10):
                await upstream.lines[0].closed.wait()


async def resets(asked: Asked, line: Line) -> None:
    """A gateway whose line breaks."""
    await line.send(http_head(200, {"Content-Type": "text/event-stream", "Content-Length": "1000"}) + HALF)
    line.reset()


async def test_a_gateway_that_breaks_off_never_looks_like_an_end(pages: Json) -> None:
    async with Upstream(resets) as broken:
        with site(pages["program"], broken.port) as address:
            answer = await asked_of(int(address.rpartition(":")[2]))
    assert (answer.status, answer.clean) == (200, False)


async def test_the_route_of_the_event_source_hands_out_a_url_without_the_key(pages: Json) -> None:
    async with serving(pages, stream([HALF, REST])) as (port, upstream):
        told = (await ask(port, {"model": "openai/m", **MESSAGES}, "/api/background")).json
        assert list(told) == ["url"]
        assert KEY not in json.dumps(told)
        async with aiohttp.ClientSession() as session, session.get(told["url"]) as response:
            assert "data: [DONE]" in await response.text()
        refused = await ask(port, {"model": "nobody/m", **MESSAGES}, "/api/background")
        assert refused.status == 404
        assert refused.error is not None
        assert len(upstream.asked) == 1


async def test_the_route_of_the_event_source_tells_what_the_gateway_lacks(pages: Json) -> None:
    async with Upstream(whole(WHOLE)) as upstream, gateway(upstream.url) as without:
        with site(pages["program"], without.port) as address:
            refused = await ask(int(address.rpartition(":")[2]), {"model": "openai/m", **MESSAGES}, "/api/background")
            assert refused.status == 502
            assert refused.error is not None
            assert "`resume`" in refused.error["message"]
            faulty = await ask(int(address.rpartition(":")[2]), b"{", "/api/background")
            assert (faulty.status, faulty.body) == (500, b"")
