"""The built-in provider: an OpenAI-compatible API in the process, so that every feature can be tried without a key or a network.

Strategy: `answers` decides, as a pure function of the request, what will be said and how it ends; `script` turns that into the
bytes of OpenAI's wire with the pause before each piece, lazily; a `DemoResponse` plays a script and owns the only timer.
The one rule: the same request gets the same bytes (but for `created`). One word is one token.

    demo/echo                  answers about the last user message, 20 words/s; the one to start with
    demo/fast, demo/slow       the same without pauses, and at 2 words/s
    demo/long-<n>              n words without pauses (n up to 99,999)
    demo/reason                thinks (`reasoning_content`) before it answers
    demo/tool                  calls the first of the request's tools; after a `tool` message, says what the tool said
    demo/json                  a JSON object, one that fits response_format's schema
    demo/inspect               the request as the provider got it, as JSON
    demo/fail-<status>         an HTTP error, 400 to 599 (429 and 503 with Retry-After: 1)
    demo/fail-midstream        an error event after three words
    demo/cut                   the connection breaks after three words
    demo/stall                 a response head, then silence
    demo/stall-midstream       three words, then silence
    demo/embed                 embeddings: unit vectors, nearer where texts share words (`dimensions`, base64)

Shapes: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from proxy.call import Limits
from proxy.demo.answers import MODELS, ProviderError, answer
from proxy.demo.script import Step, embeddings, script, whole
from proxy.errors import UpstreamCut, UpstreamTimeout
from proxy.transport import UpstreamRequest

__all__ = ["DemoResponse", "DemoTransport"]

Json = dict[str, Any]
Sleep = Callable[[float], Awaitable[None]]
JSON_HEADERS = {"content-type": "application/json"}
SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


@dataclass
class DemoResponse:
    """A script being played. idle: how long a silence after the first bytes may last, in seconds."""

    status: int
    headers: Mapping[str, str]
    steps: Iterator[Step]
    sleep: Sleep
    idle: float | None = None
    _started: bool = field(default=False, init=False)
    _closed: bool = field(default=False, init=False)
    _pause: asyncio.Future[None] | None = field(default=None, init=False)

    async def read(self) -> bytes:
        """The next piece when it is due; b"" at the end. Raises UpstreamCut (also once closed) and UpstreamTimeout (idle)."""
        if self._closed:
            raise UpstreamCut("The demo's response was closed.")
        seconds, piece = next(self.steps, (0.0, b""))
        limit = self.idle if self._started and self.idle is not None else math.inf
        if seconds > limit:
            await self._wait(limit)
            raise UpstreamTimeout("idle", limit)
        await self._wait(seconds)
        if isinstance(piece, Exception):
            self.close()
            raise piece
        self._started = True
        return piece

    def done(self) -> None:
        """There is no connection to reuse."""

    def close(self) -> None:
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()

    async def _wait(self, seconds: float) -> None:
        if not seconds:
            return
        forever = seconds == math.inf
        self._pause = asyncio.get_running_loop().create_future() if forever else asyncio.ensure_future(self._nap(seconds))
        try:
            await asyncio.wait([self._pause])  # unlike awaiting it, this tells close() from the cancellation of the reader
        finally:
            self._pause.cancel()
            self._pause = None
        if self._closed:
            raise UpstreamCut("The demo's response was closed.")

    async def _nap(self, seconds: float) -> None:
        await self.sleep(seconds)


class DemoTransport:
    """The demo provider as a transport (`proxy.transport.Transport`). sleep and clock are asyncio's and the system's."""

    def __init__(self, sleep: Sleep = asyncio.sleep, clock: Callable[[], float] = time.time) -> None:
        self._sleep = sleep
        self._clock = clock

    async def send(self, request: UpstreamRequest, limits: Limits) -> DemoResponse:
        try:
            streamed, steps = self._steps(urlsplit(request.url).path, request.body)
        except ProviderError as error:
            retry = {"retry-after": "1"} if error.status in (429, 503) else {}
            return DemoResponse(error.status, {**JSON_HEADERS, **retry}, iter([(0.0, orjson.dumps(error.body))]), self._sleep)
        return DemoResponse(200, SSE_HEADERS if streamed else JSON_HEADERS, steps, self._sleep, limits.idle)

    def _steps(self, path: str, content: bytes) -> tuple[bool, Iterator[Step]]:
        if path.endswith("/models"):
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "demo"} for name in MODELS]
            return False, iter([(0.0, orjson.dumps({"object": "list", "data": models}))])
        body = _parse(content)
        if (status := re.fullmatch(r"fail-([45]\d\d)", str(body.get("model")))) is not None:
            raise ProviderError(int(status[1]), f"The demo was told to answer with {status[1]}.")
        if path.endswith("/embeddings"):
            return False, iter([(0.0, orjson.dumps(embeddings(body)))])
        if not path.endswith("/chat/completions"):
            raise ProviderError(404, "The demo answers chat completions, embeddings and models.")
        play = script if body.get("stream") else whole
        try:
            return play is script, play(body, answer(body), int(self._clock()))
        except (AttributeError, TypeError, ValueError, KeyError, IndexError):
            raise ProviderError(400, "A field of the request has an unexpected shape.") from None


def _parse(content: bytes) -> Json:
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise ProviderError(400, "The body is not JSON.") from None
    if not isinstance(body, dict):
        raise ProviderError(400, "The body must be a JSON object.")
    return body
