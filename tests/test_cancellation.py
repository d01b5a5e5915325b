"""A client that goes away takes its upstream request with it, at every stage and in every way of going.

Strategy: a raw socket on either side. The client leaves by FIN, half-close (which counts as gone) or RST; the provider sees when
the gateway closes. Every limit of the gateway is at 30 s here, so a close within a second is the work of the departure.
The one rule: after each departure nothing is left: no call, no upstream connection, and one log line that says `client_gone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from structlog.testing import capture_logs

from proxy.app import Gateway
from proxy.call import Call
from proxy.decoder import SseDecoder
from proxy.relay import Relay
from proxy.reply import Reply, Trailer
from proxy.source import Source
from proxy.upstream import HttpResponse
from tests.support.gateway import Json, ask, chat, gateway, until
from tests.support.rawclient import WAYS, RawClient, connected, request_bytes
from tests.support.upstream import Asked, Line, Upstream, http_head

CONFIG = """
server: {{port: 0, drain_timeout: 1s, write_timeout: {write}, body_timeout: 30s}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  anthropic: {{api: anthropic, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - tracking
  - timeout: {{connect_timeout: 30s, first_chunk_timeout: 30s, idle_timeout: {idle}, call_timeout: 30s}}
"""
WHOLE = (
    b'{"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, '
    b'"message": {"role": "assistant", '
)
WHOLE_END = b'"content": "%b"}, "finish_reason": "stop"}]}'
MOST_SECONDS = 1.0
LITTLE = 4096  # a receive buffer that is soon full
OFFERED = 64 * 2**20


def event(delta: Json, finish: str | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices}).encode()


def word(text: str = "word ") -> bytes:
    return event({"content": text})


ENDING = (event({}, "stop"), b"data: [DONE]\n\n")


# What the provider does until the gateway turns away; the last argument tells the test that the stage is reached.
Stage = Callable[[Line, asyncio.Event], Awaitable[None]]


async def before_the_head(line: Line, there: asyncio.Event) -> None:
    there.set()
    await line.forever()


async def before_the_first_byte(line: Line, there: asyncio.Event) -> None:
    await line.head()
    there.set()
    await line.forever()


async def before_the_first_chunk(line: Line, there: asyncio.Event) -> None:
    await line.head()
    await line.chunk(b": ping\n\n", event({"role": "assistant", "content": ""}))
    there.set()
    await line.forever()


async def in_the_middle(line: Line, there: asyncio.Event) -> None:
    await line.head()
    await line.chunk(word(), word(), word())
    there.set()
    await line.forever()


async def inside_an_event(line: Line, there: asyncio.Event) -> None:
    await line.head()
    await line.chunk(word(), word(), word(), word()[:20])
    there.set()
    await line.forever()


async def while_it_runs(line: Line, there: asyncio.Event) -> None:
    """Content keeps coming, so that the departure may be met while a write is under way."""
    await line.head()
    await line.chunk(word(), word(), word())
    there.set()
    while not line.closed.is_set():
        await line.chunk(word())


async def inside_the_json(line: Line, there: asyncio.Event) -> None:
    await line.send(http_head(200, {"Content-Type": "application/json", "Content-Length": "100000"}) + WHOLE)
    there.set()
    await line.forever()


async def inside_an_error(line: Line, there: asyncio.Event) -> None:
    await line.send(http_head(500, {"Content-Type": "application/json", "Content-Length": "100000"}) + b'{"error": ')
    there.set()
    await line.forever()


STREAMED = (
    before_the_head, before_the_first_byte, before_the_first_chunk, in_the_middle, inside_an_event, while_it_runs,
    inside_an_error,
)  # fmt: skip
WHOLE_STAGES = (before_the_head, before_the_first_byte, inside_the_json, in_the_middle, while_it_runs, inside_an_error)
READS_FIRST = {in_the_middle, inside_an_event, while_it_runs}


class Scene:
    """A gateway before a provider, and what was logged."""

    def __init__(self, upstream: Upstream, running: Gateway, logs: list[Json]) -> None:
        self.upstream = upstream
        self.gateway = running
        self._logs = logs

    @property
    def lines(self) -> list[Json]:
        return [entry for entry in self._logs if entry["event"] == "request"]

    @property
    def outcomes(self) -> list[str]:
        return [entry["outcome"] for entry in self.lines]

    async def nothing_left(self) -> None:
        """No open call, no busy connection, no warning or exception on the way."""
        await until(lambda: self.gateway.edge.open_calls == 0 and self.gateway.http.connections == 0, MOST_SECONDS)
        assert [entry for entry in self._logs if entry["log_level"] not in ("debug", "info")] == []


class Stages:
    """The provider's answers, one stage for all; `there` is set when it is reached."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.there = asyncio.Event()

    async def __call__(self, asked: Asked, line: Line) -> None:
        await self.stage(line, self.there)


async def scene(
    stack: AsyncExitStack, answer: Callable[[Asked, Line], Awaitable[None]], write: str = "30s", idle: str = "30s"
) -> Scene:
    logs = stack.enter_context(capture_logs())
    upstream = await stack.enter_async_context(Upstream(answer))
    return Scene(upstream, await stack.enter_async_context(gateway(upstream.url, CONFIG, write=write, idle=idle)), logs)  # type: ignore[arg-type]


@pytest.fixture
async def stack():
    async with AsyncExitStack() as found:
        yield found


async def seconds_until_closed(line: Line) -> float:
    clock = asyncio.get_running_loop().time
    left = clock()
    async with asyncio.timeout(MOST_SECONDS):
        await line.closed.wait()
    return clock() - left


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STREAMED, ids=lambda stage: stage.__name__)
async def test_the_upstream_of_a_stream_is_closed_when_its_client_leaves(stack: AsyncExitStack, stage: Stage, way: str) -> None:
    answers = Stages(stage)
    there = await scene(stack, answers)
    with await connected(there.gateway.port) as client:
        await client.post(chat())
        await asyncio.wait_for(answers.there.wait(), 5)
        if stage in READS_FIRST:
            await client.read_until(b"word ", 3)
        assert not there.upstream.lines[0].closed.is_set()
        client.leave(way)
        print(f"{way} {stage.__name__}: closed after {1000 * await seconds_until_closed(there.upstream.lines[0]):.1f} ms")
        await there.nothing_left()
    assert there.outcomes == ["client_gone"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", WHOLE_STAGES, ids=lambda stage: stage.__name__)
async def test_the_upstream_of_a_whole_reply_is_closed_when_its_client_leaves(
    stack: AsyncExitStack, stage: Stage, way: str
) -> None:
    answers = Stages(stage)
    there = await scene(stack, answers)
    with await connected(there.gateway.port) as client:
        await client.post(chat(stream=False))
        await asyncio.wait_for(answers.there.wait(), 5)
        assert not there.upstream.lines[0].closed.is_set()
        client.leave(way)
        print(f"{way} {stage.__name__}: closed after {1000 * await seconds_until_closed(there.upstream.lines[0]):.1f} ms")
        await there.nothing_left()
    assert there.outcomes == ["client_gone"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_in_its_second_request_is_noticed_too(stack: AsyncExitStack, stream: bool, way: str) -> None:
    """Keep-alive on both sides: neither connection is fresh."""
    asked_twice = asyncio.Event()

    async def answer(asked: Asked, line: Line) -> None:
        if len(there.upstream.asked) > 1:
            await before_the_head(line, asked_twice)
        await line.head()
        await line.chunk(word(), *ENDING)
        await line.end()

    there = await scene(stack, answer)
    with await connected(there.gateway.port) as client:
        await client.post(chat())
        await client.read_until(b"\r\n0\r\n\r\n")
        await client.post(chat(stream=stream))
        await asyncio.wait_for(asked_twice.wait(), 5)
        client.leave(way)
        await seconds_until_closed(there.upstream.lines[-1])
        await there.nothing_left()
    assert there.outcomes == ["completed", "client_gone"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_inside_its_own_body_reaches_no_upstream(stack: AsyncExitStack, way: str) -> None:
    there = await scene(stack, Stages(before_the_head))
    with await connected(there.gateway.port) as client:
        await client.send(request_bytes(chat())[:-10])
        await until(lambda: there.gateway.edge.open_calls == 1)
        client.leave(way)
        await there.nothing_left()
    assert there.upstream.asked == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_while_the_upstream_is_being_connected_is_noticed(stack: AsyncExitStack, way: str) -> None:
    """The provider's queue of connections is full: the gateway's attempt hangs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):
            logs = stack.enter_context(capture_logs())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            running = await stack.enter_async_context(gateway(url, CONFIG, write="30s", idle="30s"))
            with await connected(running.port) as client:
                await client.post(chat())
                await until(lambda: running.edge.open_calls == 1 and running.http.connections == 1)
                client.leave(way)
                await until(lambda: running.edge.open_calls == 0 and running.http.connections == 0, MOST_SECONDS)
    assert [entry["outcome"] for entry in logs if entry["event"] == "request"] == ["client_gone"]


class Flood:
    """A provider that sends as fast as it is let. sent: bytes that its socket has taken so far."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self, asked: Asked, line: Line) -> None:
        # Bounded buffers of its own: what `sent` counts is then in the gateway, in the kernel's queues to it, or at the client.
        line.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        line.writer.transport.set_write_buffer_limits(high=0)
        await line.head()
        piece = word("z" * 2**14)
        while self.sent < OFFERED:
            await line.chunk(piece)
            self.sent += len(piece)
        await line.chunk(*ENDING)
        await line.end()

    async def stalled(self) -> int:
        """Bytes sent when nothing more has gone for a while."""
        async with asyncio.timeout(10):
            seen, still = -1, 0
            while still < 30:
                seen, still = self.sent, still + 1 if self.sent == seen else 0
                await asyncio.sleep(0.01)
        return seen


@pytest.mark.parametrize("way", ["half_close", "fin", "rst"])
async def test_a_client_that_reads_nothing_stops_the_upstream_and_when_it_leaves_closes_it(
    stack: AsyncExitStack, way: str
) -> None:
    flood = Flood()
    there = await scene(stack, flood)
    with await connected(there.gateway.port, receive_buffer=LITTLE) as client:
        await client.post(chat())
        sent = await flood.stalled()
        print(f"the upstream could send {sent:,} bytes of {OFFERED:,}")
        assert 0 < sent < 6 * 2**20
        client.leave(way)
        print(f"{way} of a full socket: closed after {1000 * await seconds_until_closed(there.upstream.lines[0]):.1f} ms")
        await there.nothing_left()
    assert there.outcomes == ["client_gone"]
    assert flood.sent < sent + 2**20, "what was closed takes nothing more"


async def test_a_client_that_begins_to_read_again_gets_all_of_it(stack: AsyncExitStack) -> None:
    """Backpressure loses nothing."""
    flood = Flood()
    there = await scene(stack, flood)
    with await connected(there.gateway.port, receive_buffer=2**16) as client:
        await client.post(chat())
        await flood.stalled()
        content, tail = 0, b""
        async with asyncio.timeout(20):
            while b"[DONE]" not in tail:
                data = await client.read(2**20)
                client.received = b""
                content += data.count(b"z")
                tail = (tail + data)[-200:]
        await there.nothing_left()
    pieces = -(-OFFERED // len(word("z" * 2**14)))
    assert content == pieces * 2**14
    assert there.outcomes == ["completed"]


async def test_a_client_that_takes_nothing_of_a_stream_is_gone_after_write_timeout(stack: AsyncExitStack) -> None:
    there = await scene(stack, Flood(), write="300ms")
    with await connected(there.gateway.port, receive_buffer=LITTLE) as client:
        await client.post(chat())
        await until(lambda: there.outcomes, 5)
        await there.nothing_left()
        await until(lambda: there.upstream.open == 0)
        with contextlib.suppress(ConnectionError):
            await client.read_to_end()
    # What the kernel had taken already may still arrive, but no end that would look like one.
    assert b"[DONE]" not in client.received
    assert not client.received.endswith(b"0\r\n\r\n")
    assert there.outcomes == ["client_gone"]


async def large_whole(asked: Asked, line: Line) -> None:
    body = WHOLE + WHOLE_END % (b"x" * 16 * 2**20)
    await line.send(http_head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}) + body)


async def test_a_client_that_takes_nothing_of_a_whole_reply_is_gone_after_write_timeout(stack: AsyncExitStack) -> None:
    there = await scene(stack, large_whole, write="300ms")
    with await connected(there.gateway.port, receive_buffer=LITTLE) as client:
        await client.post(chat(stream=False))
        await until(lambda: there.outcomes, 5)
        await there.nothing_left()
    assert there.outcomes == ["client_gone"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_with_a_whole_reply_unread_is_gone_at_once(stack: AsyncExitStack, way: str) -> None:
    there = await scene(stack, large_whole)
    with await connected(there.gateway.port, receive_buffer=LITTLE) as client:
        await client.post(chat(stream=False))
        assert await client.read(100)
        client.leave(way)
        await there.nothing_left()
    assert there.outcomes == ["client_gone"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_takes_its_answer_slowly_but_steadily_is_not_gone(stack: AsyncExitStack, stream: bool) -> None:
    """`write_timeout` is for a client that takes nothing, however long one write may last."""

    async def one_large_chunk(asked: Asked, line: Line) -> None:
        if not stream:
            return await large_whole(asked, line)
        await line.head()
        for _ in range(2):  # each a write of its own, longer than the timeout; below the bound of one event
            await line.chunk(word("x" * 8 * 2**20))
        await line.chunk(*ENDING)
        return await line.end()

    there = await scene(stack, one_large_chunk, write="400ms")
    with await connected(there.gateway.port, receive_buffer=2**17) as client:
        await client.post(chat(stream=stream))
        total, end = 0, b"[DONE]" if stream else b'"}]}'
        async with asyncio.timeout(20):
            while end not in client.received[-200:]:
                for _ in range(8):  # half a MiB at most, then a pause: the client is slow, and that is what is tested
                    client.received = client.received[-200:]
                    data = await client.read(2**16)
                    assert data, f"ended after {total:,} bytes"
                    total += len(data)
                    if end in client.received[-200:]:
                        break
                await asyncio.sleep(0.05)
        await there.nothing_left()
    assert total > 16 * 2**20
    assert there.outcomes == ["completed"]


ABORTS = 1000
TOGETHER = 50
OF_ONE_CALL = (Source, Relay, SseDecoder, Reply, Trailer, Call, HttpResponse)


class Paced:
    """A provider of short streams with a breath between the words, and of whole replies. busy: requests in flight."""

    def __init__(self) -> None:
        self.busy = 0

    async def __call__(self, asked: Asked, line: Line) -> None:
        self.busy += 1
        try:
            await self._answer(asked, line)
        finally:
            self.busy -= 1

    async def _answer(self, asked: Asked, line: Line) -> None:
        await self._breath()
        if not asked.json.get("stream"):
            body = WHOLE + WHOLE_END % b"word"
            await line.send(http_head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}))
            await line.send(body[:50], body[50:], pause=self._breath)
            return
        await line.head()
        for _ in range(8):
            await self._breath()
            await line.chunk(word())
        await line.chunk(*ENDING)
        await line.end()

    async def _breath(self) -> None:
        await asyncio.sleep(0.003)


async def abort(port: int, number: int, dice: random.Random, asked: Callable[[], object]) -> None:
    """Ask, and leave at a random point in a random way: at once, once the provider was asked, or after some words."""
    way, stream, after = dice.choice(WAYS), dice.random() < 0.8, dice.randint(-2, 9)
    with await connected(port) as client:
        await client.post(chat(f"openai/m-{number}", stream=stream))
        if after >= -1:
            await until(asked, 10)
        if after > 0:
            await words_or_end(client, after)
        client.leave(way)
        if way == "half_close":
            # The socket stays until the gateway has closed its side.
            try:
                await client.read_to_end(5)
            except ConnectionError:
                return


async def words_or_end(client: RawClient, words: int) -> None:
    while client.received.count(b"word ") < words and b"[DONE]" not in client.received and b"}]}" not in client.received:
        if not await client.read():
            return


async def aborts(there: Scene, numbers: range, dice: random.Random) -> None:
    gate = asyncio.Semaphore(TOGETHER)
    seen: set[str] = set()

    async def one(number: int) -> None:
        async with gate:
            await abort(there.gateway.port, number, dice, lambda: f"m-{number}" in models_asked(there, seen))

    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(one(number))


def models_asked(there: Scene, seen: set[str]) -> set[str]:
    while there.upstream.asked:
        seen.add(there.upstream.asked.pop().json["model"])
    return seen


def of_one_call() -> Counter[str]:
    # By the type that an object has: what it says it is may be a lie that loads a library (the SDK has such proxies).
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects() if issubclass(type(found), OF_ONE_CALL))


async def test_a_thousand_random_departures_leave_nothing(stack: AsyncExitStack) -> None:
    dice, earlier = random.Random(20250607), of_one_call()
    paced = Paced()
    there = await scene(stack, paced)
    providers = there.upstream._tasks
    assert (await ask(there.gateway.port, chat())).done

    def ours() -> set[str]:
        return {str(task.get_coro()) for task in asyncio.all_tasks() if task not in providers}

    await until(lambda: there.gateway.edge.open_calls == 0 and len(ours()) == 1)
    baseline = ours()
    await aborts(there, range(200), dice)
    await settled(there, paced)
    there.upstream.lines.clear()
    counted = Counter(entry["model"] for entry in there.lines)
    outcomes = Counter(there.outcomes)
    there._logs.clear()
    gc.collect()
    before = len(gc.get_objects())

    await aborts(there, range(200, ABORTS), dice)
    await settled(there, paced)
    there.upstream.lines.clear()
    counted += Counter(entry["model"] for entry in there.lines)
    outcomes += Counter(there.outcomes)
    there._logs.clear()
    await until(lambda: ours() == baseline)
    assert of_one_call() - earlier == Counter()
    grown = len(gc.get_objects()) - before
    print(f"{outcomes}, {there.upstream.open} idle connections, {grown} objects more")
    assert grown < ABORTS - 200, "less than one object per request"
    assert set(counted.values()) == {1}, "one log line per request"
    assert set(outcomes) == {"client_gone", "completed"}
    # A reset that overtakes its own request may never be seen as one; all others are logged.
    assert sum(counted.values()) > 0.9 * ABORTS


async def settled(there: Scene, paced: Paced) -> None:
    """No call, no request in flight at either side: the connections that stand are idle ones, kept for reuse."""
    await there.nothing_left()
    await until(lambda: paced.busy == 0, MOST_SECONDS)


async def test_streams_that_were_ended_from_the_gateways_side_leave_nothing(stack: AsyncExitStack) -> None:
    """aiohttp ends reads on a closed response with one constant exception, whose traceback keeps the frames it went through."""
    earlier = of_one_call()
    there = await scene(stack, Stages(in_the_middle), idle="50ms")
    answers = await asyncio.gather(*(ask(there.gateway.port, chat()) for _ in range(20)))
    assert [answer.error["code"] for answer in answers if answer.error] == ["timeout_idle"] * 20
    await there.nothing_left()
    assert of_one_call() - earlier == Counter()
