"""More than the gateway may have to do: what is refused, when, at which price, and what is never refused.

Strategy: a provider that holds every call until the test lets it go, so that the number of open and of waiting calls is exact.
The one rule: who is refused is told so before a byte of its body is looked at, and costs those that are served nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from proxy.app import Gateway
from proxy.call import Call, Principal
from proxy.errors import UpstreamCut
from proxy.pipeline import Endpoint, Handler, Query, Streamed, share
from proxy.reply import Batch, Head, Reply, Trailer
from tests.support.gateway import Answer, RawClient, ask, chat, gateway, raw_request, until
from tests.support.rawclient import WAYS, connected, request_bytes
from tests.support.upstream import Asked, Line, Upstream

Json = dict[str, Any]
CONFIG = """
server: {{port: 0, drain_timeout: 1s, max_streams: {streams}, max_waiting: {waiting}}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - metrics
  - tracking
{own}  - timeout: {{connect_timeout: 30s, first_chunk_timeout: 30s, idle_timeout: 30s, call_timeout: 30s}}
"""
WORD = b'data: {"id": "c", "created": 1, "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": null}]}\n\n'
ENDING = b'data: {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


class Held:
    """A provider whose calls wait for their first word until `first` is set, and for the rest until `rest` is."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.rest = asyncio.Event()

    async def __call__(self, asked: Asked, line: Line) -> None:
        await self.first.wait()
        await line.head()
        await line.chunk(WORD)
        await self.rest.wait()
        await line.chunk(ENDING)
        await line.end()


@asynccontextmanager
async def bounded(streams: int = 0, waiting: int = 0, own: type | None = None) -> AsyncIterator[tuple[Gateway, Upstream, Held]]:
    held = Held()
    table = {"own": own} if own else {}
    named = "  - own\n" if own else ""
    async with (
        Upstream(held) as upstream,
        gateway(upstream.url, CONFIG, table=table, streams=str(streams), waiting=str(waiting), own=named) as running,
    ):
        yield running, upstream, held


def assert_overloaded(answer: Answer, bound: str) -> None:
    assert answer.status == 503
    assert answer.error is not None
    assert (answer.error["code"], answer.error["type"]) == ("overloaded", "service_unavailable")
    assert f"server.{bound}" in answer.error["message"]
    assert int(answer.headers["Retry-After"]) >= 1


async def asking(running: Gateway, count: int, **fields: Any) -> list[asyncio.Task[Answer]]:
    """So many calls, all of which have been let in."""
    before = running.edge.open_calls
    tasks = [asyncio.create_task(ask(running.port, chat(**fields))) for _ in range(count)]
    await until(lambda: running.edge.open_calls == before + count)
    return tasks


async def finished(tasks: list[asyncio.Task[Answer]]) -> bool:
    return all(answer.done for answer in await asyncio.gather(*tasks))


async def page(running: Gateway, path: str = "/metrics") -> Answer:
    async with RawClient(running.port) as client:
        await client.send(raw_request(b"", path, "GET", Content_Length="", Content_Type=""))
        return await client.answer()


async def test_as_many_calls_as_max_streams_are_open_and_the_next_is_refused() -> None:
    async with bounded(streams=3) as (running, upstream, held):
        held.first.set()
        open_streams = await asking(running, 3)
        await until(lambda: running.edge.waiting_calls == 0)
        assert_overloaded(await ask(running.port, chat()), "max_streams")
        assert len(upstream.asked) == 3
        held.rest.set()
        assert await finished(open_streams), "those that are served do not notice"
        assert (await ask(running.port, chat())).done, "there is room again"


async def test_calls_that_wait_count_as_streams_which_they_will_be() -> None:
    """Else the bound would be passed as soon as they all got their first chunk."""
    async with bounded(streams=2) as (running, _, held):
        waiting = await asking(running, 2)
        assert_overloaded(await ask(running.port, chat()), "max_streams")
        held.first.set()
        held.rest.set()
        assert await finished(waiting)


async def test_as_many_as_max_waiting_wait_for_their_reply_and_streams_do_not_count() -> None:
    async with bounded(waiting=2) as (running, upstream, held):
        held.first.set()
        streams = []
        for _ in range(3):
            streams += await asking(running, 1)
            await until(lambda: running.edge.waiting_calls == 0)
        held.first.clear()
        waiting = await asking(running, 2)
        assert running.edge.waiting_calls == 2
        assert_overloaded(await ask(running.port, chat()), "max_waiting")
        assert_overloaded(await ask(running.port, chat(stream=False)), "max_waiting")
        assert len(upstream.asked) == 5
        held.first.set()
        held.rest.set()
        assert await finished(streams + waiting)


@pytest.mark.parametrize("body", [b"", b"{", b"no JSON at all"], ids=["not-sent", "half", "wrong"])
async def test_it_is_decided_before_the_body_is_read_or_parsed(body: bytes) -> None:
    async with bounded(streams=1) as (running, _, held):
        first = await asking(running, 1)
        with await connected(running.port) as client:
            head = request_bytes(chat()).partition(b"\r\n\r\n")[0]
            await client.send(head + b"\r\n\r\n" + body)
            await client.read_until(b'"overloaded"')
        held.first.set()
        held.rest.set()
        assert await finished(first)


async def test_a_connection_that_was_refused_serves_the_next_request() -> None:
    async with bounded(streams=1) as (running, _, held):
        first = await asking(running, 1)
        async with RawClient(running.port) as client:
            await client.send(raw_request(chat()))
            assert_overloaded(await client.answer(), "max_streams")
            held.first.set()
            held.rest.set()
            assert await finished(first)
            await client.send(raw_request(chat()))
            assert (await client.answer()).done


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_makes_room(way: str) -> None:
    async with bounded(streams=1, waiting=1) as (running, upstream, held):
        with await connected(running.port) as client:
            await client.post(chat())
            await until(lambda: len(upstream.asked) == 1)
            client.leave(way)
            await until(lambda: running.edge.open_calls == 0)
        held.first.set()
        held.rest.set()
        assert (await ask(running.port, chat())).done
        assert running.edge.waiting_calls == 0


async def test_a_call_that_fails_makes_room() -> None:
    async with bounded(streams=1, waiting=1) as (running, _, held):
        held.first.set()
        held.rest.set()
        for _ in range(3):
            assert (await ask(running.port, b"no JSON")).status == 400
            assert (await ask(running.port, chat("nobody/m"))).status == 404
        assert (await ask(running.port, chat())).done
        assert (running.edge.open_calls, running.edge.waiting_calls) == (0, 0)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/readyz?verbose", "/metrics", "/v1/models"])
async def test_health_metrics_and_models_are_never_refused(path: str) -> None:
    async with bounded(streams=1, waiting=1) as (running, _, held):
        first = await asking(running, 1)
        assert (await page(running, path)).status == 200
        held.first.set()
        held.rest.set()
        assert await finished(first)


async def test_refusals_are_counted_and_the_bounds_are_shown() -> None:
    async with bounded(streams=2, waiting=5) as (running, _, held):
        held.first.set()
        streams = await asking(running, 1)
        await until(lambda: running.edge.waiting_calls == 0)
        held.first.clear()
        waiting = await asking(running, 1)
        for _ in range(3):
            await ask(running.port, chat())
        found = (await page(running, "/readyz?verbose")).json
        text = (await page(running)).body.decode()
        held.first.set()
        held.rest.set()
        assert await finished(streams + waiting)
    told = {"open_calls": 2, "waiting_calls": 1, "max_streams": 2, "max_waiting": 5}
    assert {name: found[name] for name in told} == told
    for name, value in told.items():
        assert f"penstock_{name} {value}.0" in text
    (line,) = [line for line in text.splitlines() if line.startswith("penstock_requests_total{") and 'status="503"' in line]
    assert 'outcome="refused"' in line
    assert line.endswith(" 3.0")


class Follower:
    """An endpoint that answers with a stream, as resumable ones do."""

    ended: list[str]

    def __init__(self) -> None:
        self.endpoints = (Endpoint("GET", "/v1/streams/{id}", self._answer),)
        Follower.ended = []

    async def __call__(self, call: Call, next: Handler) -> Reply:
        return await next(call)

    async def _answer(self, query: Query) -> Streamed:
        gone, trailer = asyncio.Event(), Trailer()
        trailer.own(gone.set)

        async def chunks() -> AsyncIterator[Batch]:
            yield Batch([WORD])
            await gone.wait()
            raise UpstreamCut("closed")

        trailer.on_end(lambda trailer: Follower.ended.append(str(trailer.outcome)))
        call = Call("r", "n", 0, "chat", {}, "openai/m", stream=True, principal=Principal())
        return Streamed(call=call, reply=Reply(Head("openai/m"), chunks(), trailer))


async def test_a_stream_that_an_endpoint_answers_with_counts_and_is_refused_too() -> None:
    async with bounded(streams=1, own=Follower) as (running, _, _held):
        async with RawClient(running.port) as client:
            await client.send(raw_request(b"", "/v1/streams/1", "GET", Content_Length="", Content_Type=""))
            await client.first_byte()
            assert (running.edge.open_calls, running.edge.waiting_calls) == (1, 0)
            assert_overloaded(await ask(running.port, chat()), "max_streams")
            assert_overloaded(await page(running, "/v1/streams/2"), "max_streams")
        await until(lambda: running.edge.open_calls == 0)
    assert Follower.ended == ["client_gone"], "who was refused was not even begun"


async def test_a_drain_waits_for_a_stream_that_an_endpoint_answered_with_and_ends_it() -> None:
    async with bounded(own=Follower) as (running, _, _held), RawClient(running.port) as client:
        await client.send(raw_request(b"", "/v1/streams/1", "GET", Content_Length="", Content_Type=""))
        await client.first_byte()
        running.edge.end_all()
        answer = await client.answer()
    assert answer.error is not None
    assert answer.error["code"] == "draining"
    assert Follower.ended == ["draining"]


async def test_0_is_no_bound() -> None:
    async with bounded() as (running, _, held), AsyncExitStack():
        many = await asking(running, 50)
        held.first.set()
        held.rest.set()
        assert await finished(many)


def test_workers_divide_the_bounds() -> None:
    for limit in (20_000, 7, 4):
        assert sum(share(limit, 4, worker) for worker in range(4)) == limit
    assert [share(0, 4, worker) for worker in range(4)] == [0] * 4, "off is off for all"
    assert [share(2, 4, worker) for worker in range(4)] == [1] * 4, "no worker refuses everything"


async def test_each_worker_has_its_part() -> None:
    from middleware import TABLE
    from proxy.config import parse

    text = CONFIG.format(url="http://127.0.0.1:9", streams=7, waiting=2, own="").replace("port: 0", "port: 0, workers: 2")
    config = parse(text, {}, TABLE)
    for worker, most in enumerate(((4, 1), (3, 1))):
        async with Gateway(config, worker=worker) as running:
            assert (running.edge.max_streams, running.edge.max_waiting) == most


def test_the_bound_as_shipped_has_room_for_ten_thousand_streams() -> None:
    from proxy.shape import Server

    assert Server().max_streams >= 2 * 10_000
    assert Server().max_waiting == 0
