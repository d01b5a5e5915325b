"""What one request costs, in counts that do not drift: writes, reads, tasks, timers, cyclic garbage.

Strategy: a whole gateway with the shipped middleware, but for sockets: the provider is a scripted response that pushes, the
client a transport that notes its writes. So a trick that stops working shows here, on any machine.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from middleware import TABLE
from proxy.app import Gateway
from proxy.call import Limits
from proxy.config import parse
from proxy.delivery import Delivery
from proxy.errors import GatewayError
from proxy.http import Request
from proxy.transport import UpstreamRequest
from tests.support.formats import FORMATS, dumped

WIRE = FORMATS["openai"]
SHIPPED = (Path(__file__).parent.parent / "config.yaml").read_text(encoding="utf-8")
CONFIG = (
    "server: {port: 0}\nproviders: {openai: {api: openai, base_url: 'http://127.0.0.1:9/v1', api_key: x}}\n"
    + SHIPPED[SHIPPED.index("middleware:") :]
)
HEADERS = CIMultiDictProxy(CIMultiDict([("host", "localhost"), ("content-type", "application/json")]))


def text(number: int) -> bytes:
    choice = {"index": 0, "delta": {"content": f" word{number}"}, "finish_reason": None}
    return b"data: %b\n\n" % dumped(
        {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    )


END = b'data: {"id":"c1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Pushed:
    """A response whose first read is at hand, and which pushes the others when the test says so."""

    status = 200
    headers: dict[str, str] = {}

    def __init__(self, reads: list[bytes]) -> None:
        self.reads = reads
        self.receive: Callable[[bytes], None]
        self.ended: Callable[[GatewayError | None], None]

    async def read(self) -> bytes:
        return self.reads.pop(0) if self.reads else b""

    def listen(self, receive: Callable[[bytes], None], ended: Callable[[GatewayError | None], None]) -> None:
        self.receive, self.ended = receive, ended

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def done(self) -> None: ...

    def close(self) -> None: ...


class Provider:
    """A transport that answers with the one response it has."""

    def __init__(self) -> None:
        self.response = Pushed([])

    async def send(self, request: UpstreamRequest, limits: Limits) -> Pushed:
        return self.response


class Client:
    """A connection that notes what is written to it; it is its own transport."""

    congested = parting = False

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    @property
    def transport(self) -> Any:
        return self

    async def drained(self) -> None: ...

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


def request(client: Client, **fields: Any) -> Request:
    body = orjson.dumps({"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], **fields})
    found = Request("POST", "/v1/chat/completions", HEADERS, Delivery(client), len(body))
    found.feed(body)
    return found


@pytest.fixture
async def provider() -> Provider:
    return Provider()


@pytest.fixture
async def here(provider: Provider, lines: object) -> AsyncIterator[Gateway]:
    async with Gateway(parse(CONFIG, {}, TABLE), transports={"openai": provider}) as running:
        yield running


async def test_a_whole_reply_is_one_write(here: Gateway, provider: Provider) -> None:
    client = Client()
    provider.response = Pushed([WIRE.whole])
    await here.edge.handle(request(client))
    assert len(client.writes) == 1
    assert client.writes[0].startswith(b"HTTP/1.1 200 OK\r\n")


async def test_each_read_of_a_stream_is_one_write_in_the_same_callback_and_the_end_one_more(
    here: Gateway, provider: Provider
) -> None:
    client = Client()
    provider.response = Pushed([text(0)])
    task = asyncio.create_task(here.edge.handle(request(client, stream=True)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(client.writes) == 1, "the head leaves with the first chunk"
    for number in range(1, 20):
        provider.response.receive(text(number))
        assert len(client.writes) == 1 + number, "without a turn of the loop"
    provider.response.receive(text(20) + text(21) + text(22))
    assert len(client.writes) == 21
    provider.response.receive(END)
    await task
    assert len(client.writes) == 22
    assert client.writes[-1].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_makes_no_task_and_no_cyclic_garbage(here: Gateway, provider: Provider, stream: bool) -> None:
    """Beside the one that its connection makes for it; and the garbage collector has nothing to find."""
    made: list[object] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **fields: Any) -> Any:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **fields)

    async def once() -> None:
        provider.response = Pushed([text(0) + text(1) + END] if stream else [WIRE.whole])
        await here.edge.handle(request(Client(), stream=stream))

    for _ in range(40):  # what is made on first use is made, and counts that wait are settled
        await once()
    loop = asyncio.get_running_loop()
    gc.collect()
    gc.disable()
    loop.set_task_factory(factory)
    try:
        for _ in range(64):
            await once()
        assert gc.collect() == 0
        assert made == []
    finally:
        gc.enable()
        loop.set_task_factory(None)


async def test_the_length_of_a_stream_costs_no_memory(here: Gateway, provider: Provider) -> None:
    """Nothing is kept of a chunk that has left, where nothing records it."""
    client = Client()
    provider.response = Pushed([text(0)])
    task = asyncio.create_task(here.edge.handle(request(client, stream=True)))
    for _ in range(3):
        await asyncio.sleep(0)

    def pushed(count: int) -> int:
        for number in range(count):
            provider.response.receive(text(number))
        client.writes.clear()
        return sys.getallocatedblocks()

    before = pushed(2000)
    assert pushed(20_000) - before < 200
    provider.response.receive(END)
    await task
