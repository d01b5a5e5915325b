"""The owner of client sockets, at real ones: what it sends, which connections it keeps, how it fails, what it leaves behind.

Framing, byte by byte, is tests/test_upstream_framing.py's business; names, URLs and TLS are tests/test_upstream_dialing.py's.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import proxy.upstream.response
from proxy.call import Limits
from proxy.errors import GatewayError, Malformed, UpstreamCut, UpstreamTimeout, UpstreamUnreachable
from proxy.exchange import rate_limits
from proxy.source import Source
from proxy.transport import UpstreamRequest
from proxy.upstream import HttpResponse, HttpTransport
from tests.support.gateway import ask, chat, gateway, until
from tests.support.upstream import Asked, Line, Upstream, http_head, stream, whole

CONFIG = """
server: {{port: 0}}
providers: {{openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}}}
middleware: [timeout: {{idle_timeout: 50ms}}]
"""
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(stream([b"abc", b"def"])) as found:
        yield found


@pytest.fixture
async def transport() -> AsyncIterator[HttpTransport]:
    found = HttpTransport.open()
    yield found
    await found.close()


def request(upstream: Upstream, body: bytes = b"{}", path: str = "/v1/x", **headers: str) -> UpstreamRequest:
    return UpstreamRequest(f"{upstream.url}{path}", headers, body)


async def sent(transport: HttpTransport, upstream: Upstream, **fields: Any) -> HttpResponse:
    return await asyncio.wait_for(transport.send(request(upstream, **fields), Limits()), 5)


async def body_of(response: HttpResponse) -> bytes:
    found = b""
    while data := await asyncio.wait_for(response.read(), 5):
        found += data
    return found


async def fetched(transport: HttpTransport, upstream: Upstream, **fields: Any) -> bytes:
    response = await sent(transport, upstream, **fields)
    found = await body_of(response)
    response.done()
    return found


async def falls_silent(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD)
    await line.forever()


# What is sent


async def test_a_request_arrives_as_it_was_meant(transport: HttpTransport, upstream: Upstream) -> None:
    path = "/v1/a%2Fb/%E2%82%AC?key=x%20y"
    assert await fetched(transport, upstream, path=path, body=b'{"a":1}', **{"Content-Type": "application/json"}) == b"abcdef"
    (asked,) = upstream.asked
    assert (asked.method, asked.path, asked.body) == ("POST", path, b'{"a":1}')
    host = f"127.0.0.1:{upstream.port}"
    assert asked.headers == {"host": host, "content-type": "application/json", "content-length": "7"}


@pytest.mark.parametrize("size", [0, 2**16 - 1, 2**16, 3 * 2**20])
async def test_a_body_of_any_size_arrives_whole(transport: HttpTransport, upstream: Upstream, size: int) -> None:
    for _ in range(2):
        assert await fetched(transport, upstream, body=b"x" * size) == b"abcdef"
    assert [len(asked.body) for asked in upstream.asked] == [size] * 2


async def test_an_answer_that_overtakes_its_request_costs_the_connection(transport: HttpTransport) -> None:
    """What is left of the request would come before the next one; a provider that refuses a large body does not read it."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 X\r\nContent-Length: 2\r\n\r\nno")
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    response = await transport.send(UpstreamRequest(url, {}, b"x" * 2**24), Limits())
    assert (response.status, await body_of(response)) == (413, b"no")
    await until(lambda: not transport._pool.standing)
    gone.set()
    server.close()
    await asyncio.sleep(0.01)


# Which connections are kept


async def test_requests_behind_each_other_share_one_connection(transport: HttpTransport, upstream: Upstream) -> None:
    for _ in range(5):
        assert await fetched(transport, upstream) == b"abcdef"
    assert (len(upstream.asked), len(upstream.lines), transport.connections) == (5, 1, 0)


async def test_requests_at_a_time_have_a_connection_each_and_those_are_kept(transport: HttpTransport, upstream: Upstream) -> None:
    for _ in range(2):
        responses = await asyncio.gather(*(sent(transport, upstream) for _ in range(3)))
        for response in responses:
            assert await body_of(response) == b"abcdef"
        assert len(upstream.lines) == upstream.open == 3


async def test_connections_counts_what_is_busy(transport: HttpTransport, upstream: Upstream) -> None:
    upstream.answer = falls_silent
    assert transport.connections == 0
    responses = [await sent(transport, upstream) for _ in range(3)]
    assert transport.connections == 3
    for left, response in enumerate(responses):
        response.close()
        response.close()
        assert transport.connections == 2 - left
    await until(lambda: upstream.open == 0)


async def test_an_idle_connection_that_the_provider_closes_is_not_used_again(
    transport: HttpTransport, upstream: Upstream
) -> None:
    for _ in range(3):
        await fetched(transport, upstream)
        upstream.lines[-1].hang_up()
        await until(lambda: not transport._pool.standing)
    assert (len(upstream.asked), len(upstream.lines)) == (3, 3)


async def test_a_provider_that_never_ends_its_body_loses_its_connection_a_moment_after_done(
    transport: HttpTransport, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.upstream.response, "LINGER_SECONDS", 0.02)
    upstream.answer = falls_silent
    response = await sent(transport, upstream)
    assert await response.read() == WORD
    response.done()
    assert transport.connections == 1
    await until(lambda: transport.connections == 0)
    await asyncio.wait_for(upstream.lines[0].closed.wait(), 2)


async def test_a_body_that_ends_behind_done_gives_its_connection_back(transport: HttpTransport, upstream: Upstream) -> None:
    ending = asyncio.Event()

    async def ends_late(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(WORD)
        await ending.wait()
        await line.end()

    upstream.answer = ends_late
    response = await sent(transport, upstream)
    assert await response.read() == WORD
    response.done()
    ending.set()
    await until(lambda: transport.connections == 0)
    await fetched(transport, upstream)
    assert len(upstream.lines) == 1


async def test_a_warm_request_makes_no_task_and_no_timer(
    transport: HttpTransport, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await fetched(transport, upstream) == b"abcdef"
    loop = asyncio.get_running_loop()
    timers = []
    monkeypatch.setattr(loop, "call_at", lambda *args, **named: timers.append(args))
    monkeypatch.setattr(loop, "call_later", lambda *args, **named: timers.append(args))
    ours = asyncio.current_task()
    made: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **named: Any) -> asyncio.Task[Any]:
        if asyncio.current_task() is ours:
            made.append(str(coroutine))
        return asyncio.Task(coroutine, loop=loop, **named)

    loop.set_task_factory(factory)
    response = await transport.send(request(upstream), Limits(connect=5.0))
    ended = loop.create_future()
    response.listen(lambda data: None, ended.set_result)
    assert await ended is None
    response.done()
    loop.set_task_factory(None)
    monkeypatch.undo()
    assert (made, timers) == ([], [])


# How it fails


@pytest.mark.parametrize("seconds", [0.05, None])
async def test_a_connection_that_is_not_taken_is_a_connect_timeout(transport: HttpTransport, seconds: float | None) -> None:
    """Without a limit, a cancelled request still leaves nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            sending = asyncio.ensure_future(transport.send(UpstreamRequest(url, {}, b"{}"), Limits(connect=seconds)))
            if seconds is None:
                await until(lambda: transport.connections == 1)
                sending.cancel()
            await asyncio.wait([sending])
    assert transport.connections == 0
    if seconds is None:
        assert sending.cancelled()
    else:
        error = sending.exception()
        assert isinstance(error, UpstreamTimeout)
        assert (error.which, error.code) == ("connect", "timeout_connect")


async def test_a_refused_connection_is_unreachable(transport: HttpTransport) -> None:
    async with Upstream() as gone:
        pass
    with pytest.raises(UpstreamUnreachable) as found:
        await sent(transport, gone)
    assert found.value.code == "upstream_unreachable"


@pytest.mark.parametrize(
    ("said", "end", "error"),
    [
        (b"", Line.hang_up, UpstreamCut),
        (b"", Line.reset, UpstreamCut),
        (b"HTTP/1.1 200 OK\r\nCon", Line.hang_up, UpstreamCut),
        (b"SSH-2.0-OpenSSH_9.6\r\n", Line.hang_up, Malformed),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**17, Line.forever, Malformed),
    ],
)
async def test_what_breaks_before_the_head_is_an_error(
    transport: HttpTransport, upstream: Upstream, said: bytes, end: Callable[[Line], Any], error: type[GatewayError]
) -> None:
    async def answer(asked: Asked, line: Line) -> None:
        await line.send(said)
        if (ending := end(line)) is not None:
            await ending

    upstream.answer = answer
    with pytest.raises(error):
        await sent(transport, upstream)
    assert (transport.connections, len(upstream.asked)) == (0, 1)


async def test_what_came_before_a_break_is_read_before_the_error_every_time(transport: HttpTransport, upstream: Upstream) -> None:
    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(b"abc", b"def")
        line.hang_up()

    upstream.answer = answer
    response = await sent(transport, upstream)
    await until(lambda: transport.connections == 0)
    assert await response.read() == b"abcdef"
    for _ in range(2):
        with pytest.raises(UpstreamCut):
            await response.read()


async def test_a_body_without_length_ends_with_its_connection(transport: HttpTransport, upstream: Upstream) -> None:
    async def answer(asked: Asked, line: Line) -> None:
        await line.send(http_head(200, {"Content-Type": "text/event-stream"}), b"abc", b"def")
        line.hang_up()

    upstream.answer = answer
    assert await fetched(transport, upstream) == b"abcdef"
    upstream.answer = whole(b"second")
    assert await fetched(transport, upstream) == b"second"
    assert len(upstream.lines) == 2


async def test_a_cancelled_request_closes_its_connection(transport: HttpTransport, upstream: Upstream) -> None:
    upstream.answer = lambda asked, line: line.forever()
    sending = asyncio.ensure_future(sent(transport, upstream))
    await upstream.connected.wait()
    sending.cancel()
    await asyncio.wait([sending])
    assert transport.connections == 0
    await asyncio.wait_for(upstream.lines[0].closed.wait(), 2)


async def test_a_request_cancelled_as_its_answer_comes_leaves_no_connection_busy(
    transport: HttpTransport, upstream: Upstream
) -> None:
    """Whichever comes first in that turn of the loop; a connection that ended cleanly may serve on."""
    for turns in range(40):
        sending = asyncio.ensure_future(transport.send(request(upstream), Limits()))
        for _ in range(turns):
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])
        if not sending.cancelled():
            assert await body_of(sending.result()) == b"abcdef"
        assert transport.connections == 0
    assert await fetched(transport, upstream) == b"abcdef"


async def test_an_unread_body_stops_the_provider(transport: HttpTransport, upstream: Upstream) -> None:
    offered, went = 64 * 2**20, 0

    async def floods(asked: Asked, line: Line) -> None:
        nonlocal went
        line.writer.transport.set_write_buffer_limits(high=0)
        await line.head()
        while went < offered:
            await line.chunk(b"x" * 2**16)
            went += 2**16
        await line.end()

    upstream.answer = floods
    response = await sent(transport, upstream)
    seen, still = -1, 0
    while still < 20:
        seen, still = went, still + 1 if went == seen else 0
        await asyncio.sleep(0.005)
    assert seen < 8 * 2**20, "the kernel's buffers and 128 KiB"
    assert len(await body_of(response)) == offered


# What it leaves behind


async def test_closing_the_transport_closes_everything_and_ends_what_is_read(upstream: Upstream) -> None:
    transport = HttpTransport.open()
    await fetched(transport, upstream)
    upstream.answer = falls_silent
    busy = [await sent(transport, upstream) for _ in range(2)]
    lingering = await sent(transport, upstream)
    lingering.done()
    asking = asyncio.ensure_future(sent(transport, upstream))
    upstream.answer = lambda asked, line: line.forever()
    await until(lambda: len(upstream.asked) == 5)
    ends: list[GatewayError | None] = []
    busy[1].listen(lambda data: None, ends.append)
    await transport.close()
    assert (transport.connections, len(transport._pool.standing)) == (0, 0)
    assert isinstance(ends[0], UpstreamCut)
    assert await busy[0].read() == WORD
    with pytest.raises(UpstreamCut):
        await busy[0].read()
    with pytest.raises(UpstreamCut):
        await asking
    await until(lambda: upstream.open == 0)
    assert (transport._pool._timer, lingering._linger) == (None, None)
    await transport.close()


def alive() -> int:
    gc.collect()
    return sum(isinstance(found, HttpResponse | Source) for found in gc.get_objects())


async def test_a_response_that_was_closed_while_it_was_read_is_forgotten() -> None:
    """An error that was raised keeps its frames; the response must not be among what they keep."""
    before = alive()
    async with Upstream(falls_silent) as upstream, gateway(upstream.url, CONFIG) as here:
        for _ in range(5):
            assert (await ask(here.port, chat())).error["code"] == "timeout_idle"  # type: ignore[index]
        assert alive() == before


def test_rate_limits_are_passed_on_and_nothing_else() -> None:
    passed = {"retry-after": "1", "retry-after-ms": "9", "x-ratelimit-remaining-tokens": "7", "anthropic-ratelimit-reset": "z"}
    assert rate_limits({"server": "x", **passed, "x-request-id": "r"}) == passed
