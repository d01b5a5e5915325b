"""A real gateway for a test, and a client that sees every byte of its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from multidict import CIMultiDict

from middleware import TABLE
from proxy.app import Gateway
from proxy.config import parse
from proxy.transport import Transport

Json = dict[str, Any]

CONFIG = """
server: {{port: 0, drain_timeout: 1s}}
default_provider: openai
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  text: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789", completions: ["*"]}}
  anthropic: {{api: anthropic, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  gemini: {{api: gemini, base_url: "{url}/v1beta", api_key: "sk-upstream-0123456789"}}
  cohere: {{api: cohere, base_url: "{url}/v2", api_key: "sk-upstream-0123456789"}}
  demo: {{api: demo, models: [echo]}}
middleware:
  - tracking
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: 5s, call_timeout: 10s}}
"""


@asynccontextmanager
async def gateway(
    url: str = "http://127.0.0.1:9",
    config: str = CONFIG,
    *,
    settle: float = 0.2,
    environ: Mapping[str, str] | None = None,
    table: Mapping[str, Any] | None = None,
    transports: Mapping[str, Transport] | None = None,
    **fields: str,
) -> AsyncIterator[Gateway]:
    """A gateway whose providers all are at `url`. config: a template with {url} and whatever `fields` names.

    table: middleware that the config may name, beside ours. transports: see Gateway.
    """
    checked = parse(config.format(url=url, **fields), environ or {}, {**TABLE, **(table or {})})
    async with Gateway(checked, settle=settle, transports=transports) as running:
        yield running


@dataclass
class Answer:
    """One answer of the gateway. events: the data of each SSE event, as text. clean: the HTTP body ended as HTTP wants it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    clean: bool = True
    events: list[str] = field(default_factory=list)

    @property
    def json(self) -> Json:
        found: Json = json.loads(self.body)
        return found

    @property
    def chunks(self) -> list[Json]:
        return [json.loads(event) for event in self.events if event != "[DONE]"]

    @property
    def done(self) -> bool:
        return bool(self.events) and self.events[-1] == "[DONE]"

    @property
    def error(self) -> Json | None:
        """The error of an error chunk, or of an error envelope."""
        if self.status >= 400:
            found: Json = self.json["error"]
            return found
        return self.chunks[-1].get("error") if self.chunks else None

    @property
    def text(self) -> str:
        return "".join(c["delta"].get("content") or "" for chunk in self.chunks for c in chunk["choices"] if "delta" in c)


def chat(model: str = "openai/m", *, stream: bool = True, **fields: Any) -> Json:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": stream, **fields}


async def ask(
    port: int, body: Json | bytes, path: str = "/v1/chat/completions", headers: Mapping[str, str] | None = None
) -> Answer:
    """POST, and read the answer to its end, whichever it is."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Content-Type": "application/json", **(headers or {})}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        session.post(f"http://127.0.0.1:{port}{path}", data=raw, headers=fields) as response,
    ):
        received, clean = bytearray(), True
        try:
            async for data in response.content.iter_any():
                received += data
        except aiohttp.ClientPayloadError:
            clean = False
        return answer_of(response.status, response.headers, bytes(received), clean)


def answer_of(status: int, headers: Mapping[str, str], body: bytes, clean: bool = True) -> Answer:
    events: list[str] = []
    if headers.get("Content-Type", "").startswith("text/event-stream"):
        blocks = body.decode().split("\n\n")
        assert blocks[-1] == "", "the last event is ended by a blank line"
        events = [block.removeprefix("data: ") for block in blocks[:-1] if not block.startswith(":")]
    return Answer(status, headers, body, clean, events)


async def until(condition: Any, seconds: float = 2.0) -> None:
    """Wait for a condition that the event loop will bring about; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a test waits for what nobody announces
            await asyncio.sleep(0.002)


class RawClient:
    """One connection to the gateway, byte by byte: for framing, pipelining, odd requests and whether the gateway closes it."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> RawClient:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def first_byte(self) -> None:
        """Wait until the next answer has begun, and leave it to be read."""
        while not self._reader._buffer:  # type: ignore[attr-defined]
            await self._reader._wait_for_data("first_byte")  # type: ignore[attr-defined]

    async def answer(self, *, bodiless: bool = False) -> Answer:
        """The next answer, by its own framing; `clean` says whether that framing was kept. bodiless: it answers a HEAD."""
        async with asyncio.timeout(20):
            first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
            headers = CIMultiDict((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
            status = int(first.split(" ")[1])
            body, clean = (b"", True) if bodiless or status < 200 or status == 204 else await self._body(headers)
        return answer_of(status, headers, body, clean)

    async def closed(self) -> bool:
        """Does the gateway close the connection, without a further byte, within two seconds?"""
        try:
            async with asyncio.timeout(2):
                return await self._reader.read(1) == b""
        except TimeoutError:
            return False

    async def _body(self, headers: Mapping[str, str]) -> tuple[bytes, bool]:
        parts: list[bytes] = []
        try:
            if headers.get("Transfer-Encoding") != "chunked":
                length = headers.get("Content-Length")
                return (await self._reader.read() if length is None else await self._reader.readexactly(int(length))), True
            while size := int(await self._reader.readline(), 16):
                parts.append(await self._reader.readexactly(size))
                await self._reader.readexactly(2)
            return b"".join(parts), await self._reader.readexactly(2) == b"\r\n"
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            return b"".join(parts), False


def raw_request(body: Json | bytes = b"", path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> bytes:
    """The bytes of a request; headers by name with `_` for `-`, an empty one leaves that header out."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(data))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + data
