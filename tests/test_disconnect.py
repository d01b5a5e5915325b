"""What becomes of a reply whose client has gone, by policy: closed, read to its end and kept, or read for its usage.

Strategy: as in test_coalesce.py; the client is a raw socket that leaves at a stage of the test's choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from middleware.disconnect import Disconnect
from proxy.app import Gateway
from tests.support.gateway import Answer, Json, ask, chat, gateway, until
from tests.support.rawclient import WAYS, connected
from tests.support.spoken import WORDS, Spoken, ending, figure, nothing_left, ours, word
from tests.support.upstream import Upstream

CONFIG = """
server: {{port: 0, drain_timeout: 0s}}
default_provider: openai
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789", models: [m]}}
middleware:
  - metrics: {{prices: {{openai/m: {{input: 1000, output: 1000}}}}}}
  - tracking
  - disconnect: {{{options}}}
{coalesce}
  - cache
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: 5s, call_timeout: 10s}}
"""
TEXT = "".join(WORDS)
CACHE, USAGE = "on_disconnect: finish_and_cache", "on_disconnect: finish_for_usage"
TOGETHER = ["", "  - coalesce"]


class Rig:
    def __init__(self, running: Gateway, upstream: Upstream, said: Spoken) -> None:
        self.running, self.upstream, self.said = running, upstream, said
        self.layer = next(layer for layer in running.layers if isinstance(layer, Disconnect))

    def ask(self, **fields: Any) -> asyncio.Task[Answer]:
        return asyncio.create_task(ask(self.running.port, chat(cache=True, **fields)))

    async def left(self, said: int, way: str = "fin", **fields: Any) -> None:
        """A client asks, has so many words, and leaves."""
        before = self.said.calls
        with await connected(self.running.port) as client:
            await client.post(chat(cache=True, **fields))
            await until(lambda: self.said.calls > before)
            await self.said.say(said)
            if said:
                await client.read_until(WORDS[said - 1].encode())
            client.leave(way)
            await until(lambda: self.running.edge.open_calls == 0)

    async def quiet(self) -> None:
        await until(lambda: self.layer.health() == {"detached": 0})
        await until(lambda: self.running.edge.open_calls == 0)

    def ends(self) -> dict[str, float]:
        return {one.labels["end"]: one.value for one in self.layer.samples() if one.labels}


@asynccontextmanager
async def rig(options: str = "", said: Spoken | None = None, coalesce: str = "") -> AsyncIterator[Rig]:
    said = said or Spoken()
    async with Upstream(said) as upstream, gateway(upstream.url, CONFIG, options=options, coalesce=coalesce) as running:
        yield Rig(running, upstream, said)


@pytest.mark.parametrize("coalesce", TOGETHER)
@pytest.mark.parametrize("said", [0, 2])
@pytest.mark.parametrize("options", ["", "on_disconnect: cancel"])
async def test_by_default_the_upstream_is_closed_at_once(options: str, said: int, coalesce: str) -> None:
    async with rig(options, coalesce=coalesce) as r:
        await r.left(said)
        await until(lambda: r.said.closed == 1)
        assert r.layer.health() == {"detached": 0}


@pytest.mark.parametrize("coalesce", TOGETHER)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("said", [0, 2])
async def test_finish_and_cache_reads_to_the_end_and_the_next_request_is_a_hit(said: int, way: str, coalesce: str) -> None:
    async with rig(CACHE, coalesce=coalesce) as r:
        tasks = ours()
        await r.left(said, way)
        assert r.layer.health() == {"detached": 1}
        await r.said.all()
        await r.quiet()
        answer = await r.ask()
        assert (answer.headers["X-Cache"], answer.text, r.said.calls, r.said.closed) == ("hit", TEXT, 1, 0)
        assert r.ends() == {"finished": 1, "too_late": 0, "too_many": 0}
        await nothing_left(r.running, tasks)


async def test_a_whole_request_is_finished_too() -> None:
    async with rig(CACHE) as r:
        await r.left(0, stream=False)
        await r.said.all()
        await r.quiet()
        answer = await r.ask(stream=False)
        assert (answer.headers["X-Cache"], answer.json["choices"][0]["message"]["content"]) == ("hit", TEXT)


@pytest.mark.parametrize("coalesce", TOGETHER)
@pytest.mark.parametrize("stream", [True, False])
async def test_finish_for_usage_stores_nothing_and_counts_what_was_used(stream: bool, coalesce: str) -> None:
    async with rig(USAGE, coalesce=coalesce) as r:
        await r.left(2 if stream else 0, stream=stream)
        assert r.layer.health() == {"detached": 1}
        await r.said.all()
        await r.quiet()
        assert await figure(r.running, "penstock_tokens_total", type="output") == 3
        assert await figure(r.running, "penstock_tokens_total", type="input") == 7
        assert (await r.ask()).headers["X-Cache"] == "miss"
        assert r.said.closed == 0


@pytest.mark.parametrize("coalesce", TOGETHER)
@pytest.mark.parametrize("said", [0, 2])
@pytest.mark.parametrize("options", [CACHE, USAGE])
async def test_the_outcome_stays_client_gone_and_what_was_read_on_counts_once(options: str, said: int, coalesce: str) -> None:
    async with rig(options, coalesce=coalesce) as r:
        with capture_logs() as lines:
            await r.left(said, name="bot")
            assert await figure(r.running, "penstock_tokens_total") == 0
            await r.said.all()
            await r.quiet()
        assert await figure(r.running, "penstock_requests_total") == 1
        assert await figure(r.running, "penstock_requests_total", outcome="client_gone", name="bot") == 1
        assert await figure(r.running, "penstock_tokens_total", name="bot") == 10
        assert await figure(r.running, "penstock_cost_usd_total", name="bot") == pytest.approx(0.01)
        assert await figure(r.running, "penstock_tokens_estimated_total") == 0
        requests = [line for line in lines if line["event"] == "request"]
        assert [(line["outcome"], line.get("completion_tokens")) for line in requests] == [("client_gone", None)]
        usage = [line for line in lines if line["event"] == "usage"]
        assert [(line["id"], line["completion_tokens"]) for line in usage] == [(requests[0]["id"], 3)]
        assert "usage_estimated" not in usage[0]


async def test_who_stays_to_the_end_is_counted_as_ever() -> None:
    async with rig(CACHE, coalesce=TOGETHER[1]) as r:
        with capture_logs() as lines:
            await r.said.all()
            assert (await r.ask()).text == TEXT
            assert await figure(r.running, "penstock_tokens_total") == 10
        assert [(line["event"], line["completion_tokens"]) for line in lines if "completion_tokens" in line] == [("request", 3)]


async def test_after_finish_within_it_is_closed() -> None:
    async with rig(f"{CACHE}, finish_within: 50ms") as r:
        await r.left(2)
        await until(lambda: r.said.closed == 1)
        assert r.ends() == {"finished": 0, "too_late": 1, "too_many": 0}
        await r.quiet()


async def test_before_its_head_it_is_closed_after_finish_within_too() -> None:
    async with rig(f"{CACHE}, finish_within: 50ms") as r:
        await r.left(0)
        await until(lambda: r.said.closed == 1)
        assert r.ends() == {"finished": 0, "too_late": 1, "too_many": 0}


async def test_beyond_max_detached_the_upstream_is_closed_at_once() -> None:
    async with rig(f"{CACHE}, max_detached: 1") as r:
        await r.left(1)
        await r.left(1, seed=2)
        await until(lambda: r.said.closed == 1)
        assert r.layer.health() == {"detached": 1}
        assert r.ends() == {"finished": 0, "too_late": 0, "too_many": 1}
        await r.said.all()
        await r.quiet()


REQUESTS: list[tuple[Json, int]] = [
    ({}, 0),
    ({"on_disconnect": "finish_and_cache"}, 1),
    ({"on_disconnect": "finish_for_usage"}, 1),
    ({"on_disconnect": {"policy": "finish_and_cache", "finish_within": 5}}, 1),
    ({"penstock": {"on_disconnect": "finish_and_cache"}}, 1),
]


@pytest.mark.parametrize(("fields", "detached"), REQUESTS)
async def test_a_request_may_choose(fields: Json, detached: int) -> None:
    async with rig() as r:
        await r.left(1, **fields)
        assert r.layer.health() == {"detached": detached}
        await r.said.all()
        await r.quiet()
        assert not any("disconnect" in name for name in r.upstream.asked[0].json)


async def test_a_request_may_choose_to_cancel() -> None:
    async with rig(CACHE) as r:
        await r.left(1, on_disconnect="cancel")
        await until(lambda: r.said.closed == 1)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("finish", "on_disconnect"),
        (True, "on_disconnect"),
        ({"policy": "no"}, "on_disconnect.policy"),
        ({"finish_within": 61}, "on_disconnect.finish_within"),
    ],
)
async def test_a_wrong_value_is_refused_with_its_path(value: Any, path: str) -> None:
    async with rig() as r:
        answer = await r.ask(on_disconnect=value)
        assert (answer.status, answer.error and answer.error["param"]) == (400, path)


@pytest.mark.parametrize("said", [0, 2])
async def test_a_deadline_is_no_departure(said: int) -> None:
    async with rig(CACHE) as r:
        await r.said.say(said)
        answer = await r.ask(timeout={"total_timeout": 100})
        assert answer.error is not None
        assert answer.error["code"] == "timeout_total"
        await until(lambda: r.said.closed == 1)
        assert r.layer.health() == {"detached": 0}


async def test_the_gateways_end_is_that_of_what_is_read_on() -> None:
    async with rig(CACHE) as r:
        await r.left(2)
        assert r.layer.health() == {"detached": 1}
        await r.layer.close()
        await until(lambda: r.said.closed == 1)
        assert r.layer.health() == {"detached": 0}


async def test_a_detached_flight_can_still_be_joined() -> None:
    async with rig(CACHE, coalesce=TOGETHER[1]) as r:
        await r.left(2)
        joiner = r.ask()
        await until(lambda: r.running.edge.open_calls == 1)
        await r.said.all()
        answer = await joiner
        assert (answer.headers["X-Cache"], answer.text, r.said.calls) == ("joined", TEXT, 1)
        assert await figure(r.running, "penstock_tokens_total") == 10


async def test_the_policy_of_one_who_joined_holds_for_what_is_shared() -> None:
    """The leader would cancel; the joiner wants it finished; both leave."""
    async with rig(coalesce=TOGETHER[1]) as r:
        with await connected(r.running.port) as leader, await connected(r.running.port) as joiner:
            await leader.post(chat(cache=True))
            await until(lambda: r.said.calls == 1)
            await joiner.post(chat(cache=True, on_disconnect="finish_and_cache"))
            await r.said.say(1)
            await leader.read_until(b"One ")
            await joiner.read_until(b"One ")
            leader.leave("rst")
            joiner.leave("rst")
            await until(lambda: r.running.edge.open_calls == 0)
        assert (r.layer.health(), r.said.closed) == ({"detached": 1}, 0)
        await r.said.all()
        await r.quiet()
        assert (await r.ask()).headers["X-Cache"] == "hit"
        assert await figure(r.running, "penstock_tokens_total") == 10


# --- estimates


@pytest.mark.parametrize("options", ["", USAGE])
@pytest.mark.parametrize("coalesce", TOGETHER)
async def test_where_no_provider_told_an_estimate_counts_and_says_so(options: str, coalesce: str) -> None:
    """100 words of eight letters were streamed: about 200 tokens; the question has two letters."""
    said = Spoken(*[word("streamed") for _ in range(100)], ending(usage=None))
    async with rig(options, said, coalesce) as r:
        with capture_logs() as lines, await connected(r.running.port) as client:
            await client.post(chat(cache=True))
            await until(lambda: said.calls == 1)
            await said.say(100)
            await client.read_until(b'"streamed"', 100)
            client.leave("fin")
            await until(lambda: r.running.edge.open_calls == 0)
            await said.all()
            await r.quiet()
            if not options:
                await until(lambda: said.closed == 1)
        assert await figure(r.running, "penstock_tokens_total") == 0
        assert await figure(r.running, "penstock_tokens_estimated_total", type="input") == 1
        assert await figure(r.running, "penstock_tokens_estimated_total", type="output") == pytest.approx(200, rel=0.1)
        assert await figure(r.running, "penstock_cost_usd_estimated_total") == pytest.approx(0.2, rel=0.1)
        assert await figure(r.running, "penstock_cost_usd_total") == 0
        (line,) = [line for line in lines if line.get("usage_estimated")]
        assert line["completion_tokens"] == pytest.approx(200, rel=0.1)
        assert line["event"] == ("usage" if options else "request")


async def test_a_stream_that_the_provider_cut_is_estimated_as_well() -> None:
    said = Spoken(*[word("streamed") for _ in range(10)], ending())
    async with rig("", said) as r:
        asked = r.ask()
        await said.say(10)
        await until(lambda: bool(r.upstream.lines))
        await asyncio.sleep(0.05)
        r.upstream.lines[0].reset()
        assert (await asked).error is not None
        assert await figure(r.running, "penstock_tokens_estimated_total", type="output") == pytest.approx(20, abs=3)
