"""A provider that says each word when the test says so, and what counts calls, tasks and tokens around it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from proxy.app import Gateway
from tests.support.gateway import ask, until
from tests.support.upstream import Asked, Line

Json = dict[str, Any]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
WORDS = ("One ", "two ", "three")


def event(delta: Json, finish: str | None = None, **fields: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices, **fields}).encode()


def word(text: str) -> bytes:
    return event({"content": text})


def ending(usage: Json | None = USAGE, finish: str = "stop") -> bytes:
    told = b"data: %b\n\n" % json.dumps({"id": "c", "choices": [], "usage": usage}).encode() if usage else b""
    return event({}, finish) + told + b"data: [DONE]\n\n"


def completion(text: str = "One two three", usage: Json | None = USAGE) -> bytes:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
    return json.dumps({**whole, **({"usage": usage} if usage else {})}).encode()


class Spoken:
    """An upstream's answer. `say(n)` lets n more pieces out; each call takes its own. closed: calls that were broken off."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces or (*map(word, WORDS), ending())
        self.calls = 0
        self.closed = 0
        self._said = 0
        self._more = asyncio.Condition()

    async def say(self, count: int = 1) -> None:
        async with self._more:
            self._said += count
            self._more.notify_all()

    async def all(self) -> None:
        await self.say(len(self.pieces))

    async def __call__(self, asked: Asked, line: Line) -> None:
        self.calls += 1
        try:
            if not asked.json.get("stream"):
                await self._turn(0)
                body = completion()
                await line.send(
                    b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                )
                return
            await line.head()
            for number, piece in enumerate(self.pieces):
                await self._turn(number)
                await line.chunk(piece)
            await line.end()
        except (asyncio.CancelledError, ConnectionError):
            self.closed += 1
            raise

    async def _turn(self, number: int) -> None:
        async with self._more:
            await self._more.wait_for(lambda: self._said > number)


async def figure(gateway: Gateway, metric: str, /, **labels: str) -> float:
    """The sum of a metric's series that have these labels."""
    page = (await ask_get(gateway.port, "/metrics")).decode()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    lines = [line for line in page.splitlines() if line.startswith((f"{metric}{{", f"{metric} "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(one in line for one in wanted))


async def ask_get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    found = await reader.read()
    writer.close()
    return found


def ours() -> int:
    """How many tasks run code of the gateway's."""
    files = [str(getattr(task.get_coro(), "cr_code", "")) for task in asyncio.all_tasks()]
    return sum("/proxy/" in file or "/middleware/" in file for file in files)


async def nothing_left(gateway: Gateway, tasks: int) -> None:
    """No call is open, and the gateway has as many tasks as before."""
    await until(lambda: gateway.edge.open_calls == 0)
    await until(lambda: ours() <= tasks)


__all__ = ["USAGE", "WORDS", "Spoken", "ask", "completion", "ending", "event", "figure", "nothing_left", "ours", "word"]
