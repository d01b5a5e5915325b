"""What the tests of conversation memory share: a gateway with a store in a file, a provider that counts its answers, a client
that speaks in sessions, and a store that fails when it is told to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from middleware.memory import Memory
from proxy.app import Gateway
from proxy.store import Conversations, StoreUnavailable, Turn
from tests.support.gateway import Answer, ask, gateway
from tests.support.upstream import Asked, Line, Upstream, http_head

Json = dict[str, Any]
CONFIG = """
server: {{port: 0, drain_timeout: 50ms}}
data_dir: "{folder}"
store: {{timeout: 10s}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  text: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789", completions: ["*"]}}
  demo: {{api: demo}}
middleware:
  - metrics
{outer}
  - memory: {{{options}}}
  - coalesce
  - cache: {{mode: opt_in}}
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: 5s, call_timeout: 10s}}
"""
DONE = b"data: [DONE]\n\n"


def event(delta: Json, finish: str | None = None, index: int = 0) -> bytes:
    choices = [{"index": index, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices}).encode()


def stream_of(*deltas: Json, finish: str = "stop") -> list[bytes]:
    return [*map(event, deltas), event({}, finish), DONE]


class Provider:
    """Answers a1, a2, a3…, as a stream or whole, as it is asked; or, once, with the events that were put in `next`."""

    def __init__(self) -> None:
        self.count = 0
        self.next: list[bytes] | None = None

    async def __call__(self, asked: Asked, line: Line) -> None:
        self.count += 1
        text = f"a{self.count}"
        events, self.next = self.next, None
        if asked.json.get("stream") or events:
            await line.head()
            await line.chunk(*(events or stream_of({"role": "assistant", "content": ""}, {"content": text})))
            await (line.end() if not events or DONE in events else line.closed.wait())
            return
        message = {"role": "assistant", "content": text, "refusal": None}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices}).encode()
        await line.send(http_head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}) + body)


class Store:
    """A store that is `down`, or fails `faults` times, or whose `append` waits for `go`. tries: of appending."""

    def __init__(self, inner: Conversations) -> None:
        self.inner = inner
        self.down = False
        self.faults = 0
        self.go = asyncio.Event()
        self.go.set()
        self.tries = 0

    async def append(self, owner: str, session: str, turn: Turn) -> int:
        self.tries += 1
        await self.go.wait()
        self._look()
        return await self.inner.append(owner, session, turn)

    async def turns(self, owner: str, session: str, most: int, before: int = 0) -> Any:
        self._look()
        return await self.inner.turns(owner, session, most, before)

    async def sessions(self, owner: str, most: int, after: str | None = None) -> Any:
        self._look()
        return await self.inner.sessions(owner, most, after)

    async def session(self, owner: str, session: str) -> Any:
        self._look()
        return await self.inner.session(owner, session)

    async def forget(self, owner: str, session: str) -> bool:
        self._look()
        return await self.inner.forget(owner, session)

    async def expire(self, before: float, most_sessions: int, most_turns: int) -> int:
        self._look()
        return await self.inner.expire(before, most_sessions, most_turns)

    def _look(self) -> None:
        self.faults -= 1
        if self.down or self.faults >= 0:
            raise StoreUnavailable("the words of the database")


@dataclass
class Here:
    """A running gateway with memory, and its provider. asked: the messages of the last request to it."""

    gateway: Gateway
    upstream: Upstream
    provider: Provider
    paused: list[float] = field(default_factory=list)
    rested: asyncio.Semaphore | None = None

    @property
    def memory(self) -> Memory:
        return next(layer for layer in self.gateway.layers if isinstance(layer, Memory))

    @property
    def asked(self) -> list[Json]:
        found: list[Json] = self.upstream.asked[-1].json["messages"]
        return found

    @property
    def counts(self) -> Json:
        """The figures that are not 0, by name and label."""
        return {
            "/".join([sample.name.removeprefix("penstock_memory_"), *sample.labels.values()]): int(sample.value)
            for sample in self.memory.samples()
            if sample.value
        }

    async def say(self, what: str | list[Json], session: str | None = "s", /, *, headers: Any = None, **fields: Any) -> Answer:
        """A request of a session; what: the user's words, or the messages."""
        messages = [{"role": "user", "content": what}] if isinstance(what, str) else what
        body = {"model": "openai/m", "stream": True, **({} if session is None else {"sessionId": session}), **fields}
        return await ask(self.gateway.port, {**body, "messages": messages}, headers=headers)

    async def get(self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> tuple[int, Json]:
        """What is answered at a path, which is sent as it is written."""
        url = URL(f"http://127.0.0.1:{self.gateway.port}{path}", encoded=True)
        async with aiohttp.ClientSession() as client, client.request(method, url, headers=headers) as response:
            found: Json = await response.json()
            return response.status, found

    async def turns(self, session: str = "s", headers: Mapping[str, str] | None = None) -> list[list[Json]]:
        """The messages of the session's turns."""
        status, found = await self.get(f"/v1/sessions/{quote(session, safe='')}", headers=headers)
        return [turn["messages"] for turn in found["data"]] if status == 200 else []

    def faulty(self) -> Store:
        """Put a store between that fails when told to; pauses between tries are over at once, or as `rested` lets them."""

        async def sleep(seconds: float) -> None:
            self.paused.append(seconds)
            await (asyncio.sleep(0) if self.rested is None else self.rested.acquire())

        memory = self.memory
        found = Store(memory._store())
        memory._conversations = found
        memory._saves._sleep = sleep
        return found


@asynccontextmanager
async def remembering(
    folder: Path | str, options: str = "", outer: str = "", config: str = CONFIG, table: Mapping[str, Any] | None = None
) -> AsyncIterator[Here]:
    """options: of `memory`. outer: lines of config that stand outside of it. table: further
    middleware."""
    provider = Provider()
    if "timeout" not in options:
        options = f"timeout: 10s, {options}"  # a machine that stands still for a second is no store that does
    async with (
        Upstream(provider) as upstream,
        gateway(upstream.url, config, table=table, folder=str(folder), options=options, outer=outer) as running,
    ):
        yield Here(running, upstream, provider)


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def says(text: str) -> Json:
    return {"role": "assistant", "content": text}
