"""On the chunks: blank out a word. (A word that two chunks share is not seen; that takes a guard that holds text back.)

middleware:
  - examples.middleware.redact:Redact: {word: secret}
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import orjson

from proxy.call import Call
from proxy.pipeline import Handler
from proxy.reply import Batch, Reply


class Redact:
    """word: what clients shall not read. Only chunks that hold it are decoded; all others pass as the bytes they are."""

    def __init__(self, *, word: str) -> None:
        self._word = word

    async def __call__(self, call: Call, next: Handler) -> Reply:
        reply = await next(call)
        return replace(reply, chunks=self._redacted(reply.chunks))

    async def _redacted(self, batches: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        async with aclosing(batches):  # type: ignore[type-var]
            async for batch in batches:
                yield batch if self._word.encode() not in batch.sse() else self._without(batch)

    def _without(self, batch: Batch) -> Batch:
        text = orjson.dumps(batch.chunks).replace(self._word.encode(), b"*" * len(self._word))
        return Batch(orjson.loads(text), final=batch.final)
