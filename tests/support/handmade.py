"""What a middleware is tried with by itself: a hand-made call, next and reply, and a clock that a test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from proxy.call import Call
from proxy.pipeline import Handler
from proxy.reply import Batch, Head, Reply, Trailer
from tests.support.decoding import make_call

Json = dict[str, Any]
KEY = "sk-client-0123456789"
SECRET = "the prompt, which nobody else may read"


async def no_chunks() -> AsyncIterator[Batch]:
    return
    yield


def reply(**fields: Any) -> Reply:
    return Reply(Head("acme/m", **fields), no_chunks(), Trailer())


def answers(found: Reply | BaseException) -> Handler:
    async def handler(call: Call) -> Reply:
        if isinstance(found, BaseException):
            raise found
        return found

    return handler


def asked(**fields: Any) -> Call:
    request = {"messages": [{"role": "user", "content": SECRET}], "metadata": {"k": KEY}, "stream": True}
    return make_call(request, headers={"authorization": f"Bearer {KEY}"}, name="bot", **fields)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
