"""Requests that clients of earlier proxies send, through the official OpenAI SDK and all middleware of the shipped config.yaml.

Shapes: the `orq: {cache, tracking, timeout}` object at /v2/proxy, the same fields at the top level at /v3/router.
The one rule: the middleware is the shipped one, in its order; only the providers are the test's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import structlog
from ruamel.yaml import YAML

from middleware import TABLE
from proxy.app import Gateway
from proxy.config import parse
from tests.support.gateway import ask, chat
from tests.support.upstream import Asked, Line, Upstream, stream

Json = dict[str, Any]
SHIPPED = Path(__file__).parent.parent / "config.yaml"
WORDS = [" one", " two", " three"]
EVENTS = [
    *(b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % word.encode() for word in WORDS),
    b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b'data: {"id":"c","created":1,"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6}}\n\n',
    b"data: [DONE]\n\n",
]
NESTED: Json = {
    "orq": {
        "cache": {"type": "exact_match", "ttl": 3600},
        "tracking": {"name": "StreamingBot-v1"},
        "timeout": {"call_timeout": 30000},
    }
}
FLAT: Json = {"name": "StreamingBot-v1", "cache": {"type": "exact_match", "ttl": 3600}, "timeout": {"call_timeout": 30000}}
STYLES = pytest.mark.parametrize(("base", "extra"), [("/v2/proxy", NESTED), ("/v3/router", FLAT)], ids=["orq-v2", "orq-v3"])


def shipped(url: str, without: str | None = None) -> str:
    """config.yaml's middleware, all or all but one, before providers at `url`."""
    layers = YAML(typ="safe").load(SHIPPED)["middleware"]
    kept = [layer for layer in layers if without not in (layer, *(layer if isinstance(layer, dict) else ()))]
    providers = {
        name: {"api": "openai", "base_url": f"{url}/{name}/v1", "api_key": "sk-upstream-0123456789"}
        for name in ("openai", "second")
    }
    whole = {"server": {"port": 0}, "providers": {**providers, "demo": {"api": "demo"}}, "middleware": kept}
    return repr(whole).replace("True", "true").replace("False", "false").replace("None", "null")


@asynccontextmanager
async def running(upstream: Upstream, without: str | None = None) -> AsyncIterator[Gateway]:
    async with Gateway(parse(shipped(upstream.url, without), {}, TABLE), settle=0.2) as gateway:
        yield gateway


def client(gateway: Gateway, base: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway.port}{base}", api_key="sk-anything", max_retries=0)


async def chunks(sdk: openai.AsyncOpenAI, extra: Json, text: str = "Hi", model: str = "openai/m") -> list[Json]:
    reply = await sdk.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], stream=True, extra_body=extra
    )
    return [chunk.model_dump() async for chunk in reply]


async def stalls(asked: Asked, line: Line) -> None:
    """The first provider says nothing; the second answers."""
    if asked.path.startswith("/openai/"):
        await line.head()
        await line.forever()
    else:
        await stream(EVENTS)(asked, line)


@STYLES
async def test_the_second_call_is_a_hit_with_equal_chunks(base: str, extra: Json) -> None:
    async with Upstream(stream(EVENTS)) as upstream, running(upstream) as gateway, client(gateway, base) as sdk:
        with structlog.testing.capture_logs() as lines:
            first, second = await chunks(sdk, extra), await chunks(sdk, extra)
        assert first == second
        assert [chunk["choices"][0]["delta"]["content"] for chunk in first[:3]] == WORDS
        assert len(upstream.asked) == 1
        answer = await ask(gateway.port, {**chat("openai/m"), **extra}, f"{base}/chat/completions")
        assert (answer.headers["X-Cache"], answer.done, len(upstream.asked)) == ("hit", True, 1)
        found = [line for line in lines if line["event"] == "request"]
        assert [line.get("cache") for line in found] == ["miss", "hit"]
        assert {line["name"] for line in found} == {"StreamingBot-v1"}


@STYLES
async def test_nothing_of_the_gateways_own_goes_upstream(base: str, extra: Json) -> None:
    async with Upstream(stream(EVENTS)) as upstream, running(upstream) as gateway, client(gateway, base) as sdk:
        await chunks(sdk, {**extra, "metadata": {"k": "v"}, "verbosity": "low"})
        assert set(upstream.asked[0].json) == {"model", "messages", "stream", "stream_options", "metadata", "verbosity"}


@pytest.mark.parametrize("wrap", [lambda fields: fields, lambda fields: {"orq": fields}], ids=["flat", "orq"])
async def test_a_stall_against_call_timeout_is_a_504_or_the_fallbacks_answer(wrap: Any) -> None:
    async with Upstream(stalls) as upstream, running(upstream) as gateway, client(gateway, "/v3/router") as sdk:
        loop = asyncio.get_running_loop()
        started = loop.time()
        limits = {"timeout": {"call_timeout": 100}, "retry": {"count": 1, "on_codes": [429]}}
        with pytest.raises(openai.InternalServerError) as caught:
            await chunks(sdk, wrap(limits))
        assert (caught.value.status_code, caught.value.code) == (504, "timeout_call")
        found = await chunks(sdk, wrap({**limits, "fallbacks": [{"model": "second/m"}]}))
        assert [chunk["choices"][0]["delta"]["content"] for chunk in found[:3]] == WORDS
        assert {chunk["model"] for chunk in found} == {"openai/m"}
        assert loop.time() - started < 5


async def test_openrouters_models_and_the_load_balancers_shapes() -> None:
    async with Upstream(stream(EVENTS)) as upstream, running(upstream) as gateway:
        for extra in (
            {"load_balancer": {"type": "weight_based", "models": [{"model": "second/m", "weight": 0.7}]}},
            {"orq": {"load_balancer": [{"type": "weight_based", "model": "second/m", "weight": 0.7}]}},
            {"models": ["second/m", "openai/m"]},
        ):
            answer = await ask(gateway.port, chat("second/m", **extra))
            assert (answer.done, answer.headers["X-Penstock-Target"]) == (True, "second/m")


async def test_eight_streams_in_parallel() -> None:
    async with Upstream(stream(EVENTS)) as upstream, running(upstream) as gateway, client(gateway, "/v1") as sdk:
        found = await asyncio.gather(*(chunks(sdk, FLAT, f"question {number}") for number in range(8)))
        assert all([chunk["choices"][0]["delta"]["content"] for chunk in each[:3]] == WORDS for each in found)
        assert len(upstream.asked) == 8


@pytest.mark.parametrize("without", [None, *TABLE])
async def test_any_middleware_can_be_deleted_from_the_config(without: str | None) -> None:
    """Its feature is gone, nothing else changes: the gateway starts and streams."""
    async with Upstream(stream(EVENTS)) as upstream, running(upstream, without) as gateway:
        answer = await ask(gateway.port, {**chat("openai/m"), **FLAT})
        assert (answer.status, answer.text, answer.done) == (200, "".join(WORDS), True)
        assert (await ask(gateway.port, chat("demo/fast"))).done
