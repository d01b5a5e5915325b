"""Shutting down: who may still come in, who may finish, and what the others are told.

Strategy: in-process for each rule, with providers that end when the test says so; then the real command in a process of its own,
told to stop by signals as an operator does.
The one rule: a stream that was ended for the shutdown says so (`draining`) and never looks complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from proxy.app import Gateway
from tests.support.gateway import Answer, answer_of, ask, chat, gateway, until
from tests.support.rawclient import connected, request_bytes
from tests.support.upstream import Asked, Line, Upstream, http_head

ROOT = Path(__file__).parent.parent
CONFIG = """
server: {{port: 0, drain_timeout: {timeout}, drain_delay: {delay}}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - tracking
  - timeout: {{connect_timeout: 30s, first_chunk_timeout: 30s, idle_timeout: 30s, call_timeout: 30s}}
"""
WORD = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": null}]}\n\n'
ENDING = b'data: {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
LONG = 20.0  # seconds that no test may come near


class Held:
    """A provider that sends `first` (a head and what follows) and the rest when `go` is set."""

    def __init__(self, first: bytes = b"", rest: bytes = b"") -> None:
        self.first = first
        self.rest = rest
        self.go = asyncio.Event()
        self.closed = asyncio.Event()

    async def __call__(self, asked: Asked, line: Line) -> None:
        try:
            await line.send(self.first)
            await self.go.wait()
            await line.send(self.rest)
        finally:
            self.closed.set()


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = http_head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})


def held_stream() -> Held:
    return Held(STREAM_HEAD + framed(WORD), framed(WORD + ENDING) + b"0\r\n\r\n")


@asynccontextmanager
async def drainable(held: Any, allowed: str = "20s", delay: str = "0s") -> AsyncIterator[tuple[Gateway, Upstream]]:
    async with Upstream(held) as upstream, gateway(upstream.url, CONFIG, timeout=allowed, delay=delay) as running:
        yield running, upstream


async def get(port: int, path: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status


async def is_refused(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:  # refused, or reset where the listener closed with this connection in its queue
        return True
    writer.close()
    return False


async def test_a_running_stream_may_finish_and_drain_then_returns_at_once() -> None:
    held = held_stream()
    with capture_logs() as logs:
        async with drainable(held) as (running, _), asyncio.timeout(LONG / 2):
            with await connected(running.port) as client:
                await client.post(chat())
                await client.read_until(b"word ")
                draining = asyncio.create_task(running.drain())
                await until(lambda: running.edge.draining)
                assert await is_refused(running.port)
                assert not draining.done()
                held.go.set()
                body = await client.read_until(b"[DONE]")
                await draining
        assert body.count(b"word ") == 2
        assert b"error" not in body
    assert [line["outcome"] for line in logs if line["event"] == "request"] == ["completed"]


async def test_an_idle_gateway_drains_at_once() -> None:
    async with drainable(held_stream()) as (running, _), asyncio.timeout(1):
        await running.drain()


async def test_a_stream_beyond_drain_timeout_ends_with_an_error_chunk() -> None:
    held = held_stream()
    with capture_logs() as logs:
        async with drainable(held, allowed="100ms") as (running, _):
            with await connected(running.port) as client:
                await client.post(chat())
                await client.read_until(b"word ")
                async with asyncio.timeout(LONG / 2):
                    await running.drain()
                    await held.closed.wait()
                    body = await client.read_to_end()
    assert body.endswith(b"\r\n0\r\n\r\n"), "the body is ended as HTTP wants it"
    assert b"[DONE]" not in body
    last = json.loads(re.findall(rb"data: (.*)\n", body)[-1])
    assert last["error"]["code"] == "draining"
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "error"}]
    assert [line["outcome"] for line in logs if line["event"] == "request"] == ["draining"]


BEGUN_JSON = http_head(200, {"Content-Type": "application/json", "Content-Length": "1000"}) + b'{"id": "c", '


@pytest.mark.parametrize(
    ("first", "stream"),
    [
        (b"", True),
        (STREAM_HEAD + framed(b": ping\n\n"), True),
        (b"", False),
        (BEGUN_JSON, False),
        (STREAM_HEAD + framed(WORD), False),
    ],
    ids=["before-the-head", "before-the-first-chunk", "whole-before-the-head", "inside-the-json", "whole-out-of-a-stream"],
)
async def test_a_call_without_its_first_chunk_gets_503(first: bytes, stream: bool) -> None:
    held = Held(first)
    with capture_logs() as logs:
        async with drainable(held, allowed="100ms") as (running, upstream):
            asking = asyncio.create_task(ask(running.port, chat(stream=stream)))
            await until(lambda: upstream.asked)
            async with asyncio.timeout(LONG / 2):
                await running.drain()
                answer = await asking
                await held.closed.wait()
    assert answer.status == 503
    assert answer.error is not None
    assert answer.error["code"] == "draining"
    assert [line["outcome"] for line in logs if line["event"] == "request"] == ["draining"]


async def test_a_call_whose_body_is_still_coming_gets_503() -> None:
    async with drainable(held_stream(), allowed="100ms") as (running, upstream):
        with await connected(running.port) as client:
            await client.send(request_bytes(chat())[:-10])
            await until(lambda: running.edge.open_calls == 1)
            async with asyncio.timeout(LONG / 2):
                await running.drain()
                answer = parsed(await client.read_until(b"draining"))
    assert answer.status == 503
    assert answer.json["error"]["code"] == "draining"
    assert upstream.asked == []


def parsed(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first.startswith("HTTP/1.1 "), raw
    return answer_of(int(first.split(" ")[1]), dict(line.split(": ", 1) for line in lines), body)


async def test_a_request_that_comes_too_late_gets_503() -> None:
    """One that was on its way when the listener closed."""
    async with drainable(held_stream()) as (running, upstream):
        running.edge.draining = True
        answer = await ask(running.port, chat())
    assert answer.status == 503
    assert answer.error is not None
    assert answer.error["code"] == "draining"
    assert int(answer.headers["Retry-After"]) >= 1
    assert upstream.asked == []


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
ODD_HEALTH = HEALTH.replace(b"\r\n\r\n", b"\r\nTE: trailers\r\n\r\n")  # for aiohttp to read


@pytest.mark.parametrize("request_", [HEALTH, ODD_HEALTH], ids=["lane", "aiohttp"])
async def test_idle_connections_are_closed_when_the_listener_is(request_: bytes) -> None:
    held = held_stream()
    async with drainable(held) as (running, _):
        with await connected(running.port) as kept, await connected(running.port) as fresh, await connected(running.port) as busy:
            await kept.send(request_)
            await kept.read_until(b"ok")
            await busy.post(chat())
            await busy.read_until(b"word ")
            draining = asyncio.create_task(running.drain())
            async with asyncio.timeout(LONG / 2):
                assert await kept.read() == b""
                assert await fresh.read() == b""
            assert not draining.done()
            held.go.set()
            await busy.read_until(b"[DONE]")
            await busy.read_to_end()
            await draining


@pytest.mark.parametrize("odd", [b"", b"TE: trailers\r\n"], ids=["lane", "aiohttp"])
async def test_a_stream_that_began_before_the_drain_is_its_connections_last_answer(odd: bytes) -> None:
    """Its head cannot say so any more; the connection is closed behind its end."""
    held = held_stream()
    async with drainable(held) as (running, _):
        with await connected(running.port) as client:
            await client.send(request_bytes(chat()).replace(b"\r\n", b"\r\n" + odd, 1))
            assert b"connection: close" not in (await client.read_until(b"word ")).lower()
            draining = asyncio.create_task(running.drain())
            await until(lambda: running.edge.draining)
            held.go.set()
            body = await client.read_to_end()
            await draining
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("odd", [b"", b"TE: trailers\r\n"], ids=["lane", "aiohttp"])
async def test_answers_during_the_drain_delay_say_close_and_are_their_connections_last(odd: bytes) -> None:
    """So that clients with kept connections move on to where the load balancer sends them. Nothing is closed under a request."""
    held = held_stream()
    async with drainable(held, delay="20s") as (running, _):
        with await connected(running.port) as kept, await connected(running.port) as begun:
            await kept.send(HEALTH.replace(b"\r\n", b"\r\n" + odd, 1))
            assert b"connection: close" not in (await kept.read_until(b"ok")).lower()
            draining = asyncio.create_task(running.drain())
            await asyncio.sleep(0)
            kept.received = b""
            await kept.send(HEALTH)
            assert b"\r\nconnection: close\r\n" in (await kept.read_to_end()).lower()
            await begun.send(request_bytes(chat()).replace(b"\r\n", b"\r\n" + odd, 1))
            assert b"\r\nconnection: close\r\n" in (await begun.read_until(b"word ")).lower()
            held.go.set()
            assert b"[DONE]" in await begun.read_to_end()
            with await connected(running.port) as late:
                await late.send(HEALTH.replace(b"\r\n", b"\r\n" + odd, 1))
                assert b"\r\nconnection: close\r\n" in (await late.read_to_end()).lower()
            assert not draining.done()
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)


async def test_during_drain_delay_readyz_says_no_and_everything_else_goes_on() -> None:
    held = held_stream()
    held.go.set()
    async with drainable(held, delay="20s") as (running, _):
        assert await get(running.port, "/readyz") == 200
        draining = asyncio.create_task(running.drain())
        await asyncio.sleep(0)
        assert await get(running.port, "/readyz") == 503
        assert await get(running.port, "/healthz") == 200
        assert (await ask(running.port, chat())).done
        assert not draining.done()
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)


async def test_after_drain_delay_new_connections_are_refused() -> None:
    async with drainable(held_stream(), delay="50ms") as (running, _):
        assert not await is_refused(running.port)
        await running.drain()
        assert await is_refused(running.port)


# The real command in a process of its own.

SERVED = """
server: {{host: 127.0.0.1, port: {port}, drain_timeout: {timeout}}}
providers: {{demo: {{api: demo}}}}
middleware: [tracking]
"""


@dataclass
class Served:
    """A running `penstock serve`. said: what came on stderr until it served."""

    process: asyncio.subprocess.Process
    port: int
    said: str

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self, seconds: float) -> tuple[int, str]:
        """The exit status, and all of stderr."""
        async with asyncio.timeout(seconds):
            _, rest = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, self.said + rest.decode()


async def command(tmp_path: Path, port: int, allowed: str) -> asyncio.subprocess.Process:
    (tmp_path / "config.yaml").write_text(SERVED.format(port=port, timeout=allowed))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "serve", "-c", str(tmp_path / "config.yaml"), cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


@asynccontextmanager
async def served(tmp_path: Path, allowed: str = "20s") -> AsyncIterator[Served]:
    process = await command(tmp_path, 0, allowed)
    assert process.stderr is not None
    said = ""
    try:
        async with asyncio.timeout(LONG):
            while (found := re.search(r"serving http://127\.0\.0\.1:(\d+)/v1", said)) is None:
                line = await process.stderr.readline()
                assert line, said
                said += line.decode()
        yield Served(process, int(found[1]), said)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def logged(said: str) -> list[str]:
    """The outcomes of the log lines on stderr."""
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return [line["outcome"] for line in lines if line.get("event") == "request"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_lets_the_stream_finish_and_exits_with_0(tmp_path: Path, number: int) -> None:
    async with served(tmp_path) as running:
        with await connected(running.port) as client:
            await client.post(chat("demo/echo"))
            await client.read_until(b'"content"')
            running.signal(number)
            body = await client.read_until(b"[DONE]")
        assert b"error" not in body
        status, said = await running.ended(5)
    assert status == 0
    assert "Traceback" not in said
    assert logged(said) == ["completed"]


async def test_sigint_ends_a_stream_beyond_drain_timeout_as_draining(tmp_path: Path) -> None:
    async with served(tmp_path, allowed="100ms") as running:
        with await connected(running.port) as client:
            await client.post(chat("demo/slow"))
            await client.read_until(b'"content"')
            running.signal(signal.SIGINT)
            body = await client.read_to_end()
        assert b'"code":"draining"' in body
        assert b"[DONE]" not in body
        assert body.endswith(b"0\r\n\r\n")
        status, said = await running.ended(5)
    assert status == 0
    assert "Traceback" not in said
    assert logged(said) == ["draining"]


async def test_a_second_sigint_ends_at_once(tmp_path: Path) -> None:
    async with served(tmp_path) as running:
        with await connected(running.port) as client:
            await client.post(chat("demo/stall-midstream"))
            await client.read_until(b'"content"')
            running.signal(signal.SIGINT)
            async with asyncio.timeout(5):
                while not await is_refused(running.port):  # noqa: ASYNC110 - another process's doing
                    await asyncio.sleep(0.01)
            running.signal(signal.SIGINT)
            _, said = await running.ended(3)
            with contextlib.suppress(ConnectionError):
                await client.read_to_end()
    assert "Traceback" not in said
    assert b"[DONE]" not in client.received


async def test_an_idle_client_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    async with served(tmp_path) as running:
        with await connected(running.port):
            running.signal(signal.SIGINT)
            status, said = await running.ended(3)
    assert status == 0
    assert "Traceback" not in said


async def test_a_port_in_use_is_a_clear_message_and_exit_status_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await command(tmp_path, port, "1s")
        async with asyncio.timeout(LONG):
            _, said = await process.communicate()
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in said.decode()
    assert "in use" in said.decode()
    assert "Traceback" not in said.decode()
