"""Lossless replay over every recorded exchange, and the repo's own: record, replay, compare.

Strategy: each exchange is recorded through a real gateway, streamed and whole, and each entry is asked for in both forms. What a
hit must say is what a request without a cache is told by the same provider; where the forms are the same, byte for byte what the
recording request was told.
The one rule: only what is minted per request (ids, the time) may differ between a fresh reply and a replayed one.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from tests.support import gateway as gate
from tests.support.expected import owed
from tests.support.recordings import ABSENT, Exchange, own, recorded
from tests.support.upstream import Answer, Upstream, stream, whole

EXCHANGES = [*recorded(), *own()]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
CONTENT: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"prompt": "Hi"},
    "embeddings": {"input": "Hi"},
}
CONFIG = gate.CONFIG.replace(
    "  - timeout:", "  - cache: {{store: [stop, length, tool_calls, content_filter, function_call]}}\n  - timeout:"
)
# Gemini's stream without alt=sse, which the gateway never asks for: one JSON array.
REPLIES = [e for e in EXCHANGES if not e.is_error and not (e.streaming and e.body.lstrip().startswith(b"["))]
ERRORS = [e for e in EXCHANGES if e.is_error]
MINTED = re.compile(rb'[0-9a-f]{16}|"created":\d+')


def test_recorded_traffic_is_at_hand() -> None:
    """The matrix covers recordings and not only the repo's own fixtures (skipped, so that it is seen, where there are none)."""
    if not recorded():
        pytest.skip(ABSENT)
    assert {exchange.wire for exchange in recorded()} == {"openai", "anthropic", "gemini", "cohere"}


def test_the_repos_own_fixtures_are_replayed_too() -> None:
    assert {exchange.wire for exchange in own()} == {"openai", "anthropic", "gemini", "cohere"}


def ids(exchanges: list[Exchange]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exchange", exchanges, ids=[exchange.name for exchange in exchanges])


@dataclass
class Bench:
    """A gateway with a cache, and the one provider behind it."""

    port: int
    upstream: Upstream

    async def ask(self, exchange: Exchange, streamed: bool, cache: Any = True, **fields: Any) -> gate.Answer:
        provider = "text" if exchange.kind == "completions" else exchange.wire
        choices = 1 if exchange.is_error or exchange.kind == "embeddings" else len(owed(exchange).choices)
        body = {
            "model": f"{provider}/m",
            **CONTENT[exchange.kind],
            **({"n": choices} if choices > 1 else {}),
            **({"stream": True} if streamed else {}),
            "cache": cache,
            **fields,
        }
        return await gate.ask(self.port, body, PATHS[exchange.kind])

    async def recorded(self, exchange: Exchange, streamed: bool, answer: Answer, **fields: Any) -> gate.Answer:
        """The exchange, asked for anew and taken down."""
        self.upstream.answer = answer
        found = await self.ask(exchange, streamed, seed=f"{exchange.name} {streamed}", **fields)
        assert found.status >= 400 or found.headers["X-Cache"] == "miss"
        return found

    async def hit(self, exchange: Exchange, recorded: bool, streamed: bool, **fields: Any) -> gate.Answer:
        """What the entry that `recorded` made says; the provider is not asked."""
        asked = len(self.upstream.asked)
        found = await self.ask(exchange, streamed, seed=f"{exchange.name} {recorded}", **fields)
        assert found.headers["X-Cache"] == "hit"
        assert int(found.headers["Age"]) >= 0
        assert len(self.upstream.asked) == asked
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench() -> AsyncIterator[Bench]:
    async with Upstream() as upstream, gate.gateway(upstream.url, CONFIG, settle=0.02) as running:
        yield Bench(running.port, upstream)


in_one_loop = pytest.mark.asyncio(loop_scope="module")
USAGE = {"stream_options": {"include_usage": True}}


def provided(exchange: Exchange) -> Answer:
    """The body in a few pieces, so that a stream has more than one batch."""
    if not exchange.streaming:
        return whole(exchange.body, exchange.status, exchange.content_type)
    third = max(1, len(exchange.body) // 3)
    return stream([exchange.body[at : at + third] for at in range(0, len(exchange.body), third)], exchange.status)


def said(answer: gate.Answer) -> bytes:
    """What an answer says, apart from what is minted for each request."""
    return MINTED.sub(b"*", answer.body)


@in_one_loop
@ids(REPLIES)
async def test_a_hit_says_what_the_provider_said(bench: Bench, exchange: Exchange) -> None:
    """Recorded and asked for in both forms: equal bytes in the same form, and equal to an uncached reply in the other."""
    forms = (False,) if exchange.kind == "embeddings" else (True, False)
    answer = provided(exchange)
    bench.upstream.answer = answer
    fresh = {form: await bench.ask(exchange, form, cache=False, **(USAGE if form else {})) for form in forms}
    for recorded_as in forms:
        told = await bench.recorded(exchange, recorded_as, answer, **(USAGE if recorded_as else {}))
        assert said(told) == said(fresh[recorded_as])
        if told.status >= 400 or (recorded_as and not told.done):
            again = await bench.ask(exchange, recorded_as, seed=f"{exchange.name} {recorded_as}")
            assert again.headers.get("X-Cache", "miss") == "miss", "a reply that did not complete is never stored"
            continue
        for form in forms:
            replayed = await bench.hit(exchange, recorded_as, form, **(USAGE if form else {}))
            assert replayed.headers["Content-Type"] == fresh[form].headers["Content-Type"]
            assert replayed.headers["X-Penstock-Target"] == told.headers["X-Penstock-Target"]
            assert said(replayed) == said(fresh[form])
            if form == recorded_as:
                assert replayed.body == told.body


@in_one_loop
@ids([exchange for exchange in REPLIES if exchange.streaming])
async def test_where_usage_stands_is_the_clients_choice_on_a_hit_too(bench: Bench, exchange: Exchange) -> None:
    """One entry, three placements: each as an uncached stream has it."""
    answer = provided(exchange)
    bench.upstream.answer = answer
    placements: list[dict[str, Any]] = [{}, USAGE, {"usage_placement": "finish"}]
    first = await bench.recorded(exchange, True, answer, user="placement")
    if first.status >= 400 or not first.done:
        return
    for placement in placements:
        fresh = await bench.ask(exchange, True, cache=False, user="placement", **placement)
        assert said(await bench.hit(exchange, True, True, user="placement", **placement)) == said(fresh)


@in_one_loop
@ids(ERRORS)
async def test_an_error_is_never_stored(bench: Bench, exchange: Exchange) -> None:
    bench.upstream.answer = whole(exchange.body, exchange.status, exchange.content_type)
    asked = len(bench.upstream.asked)
    streamed = exchange.kind != "embeddings"
    first = await bench.ask(exchange, streamed)
    second = await bench.ask(exchange, streamed)
    assert first.status == second.status >= 400
    assert len(bench.upstream.asked) == asked + 2
