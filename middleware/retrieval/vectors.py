"""Vectors of texts, from one of the configured embeddings targets.

Strategy: an attempt at the target is made past all middleware (`Surroundings.attempt`), as a call of the gateway's own. What a
text was embedded as is kept in the store by the text's digest, so that a file that is uploaded again, or indexed again after a
crash, is not paid for twice; questions are not kept. Indexing asks patiently, with growing pauses; a question is asked for once.
The one rule: vectors that are compared with each other have one length. What breaks it is asked for anew, or refused.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import structlog

from middleware.retrieval.embedded import read, tokens
from proxy.call import Call, Limits, Route, Target
from proxy.errors import GatewayError, Outcome, Unconfigured
from proxy.pipeline import Handler
from proxy.store import Library, Vector

Json = dict[str, Any]
Sleep = Callable[[float], Awaitable[None]]

CONNECT_SECONDS, REPLY_SECONDS = 10.0, 60.0
# Between the tries of one batch, in seconds: half a minute in all, within which most providers come back.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
PASSING = frozenset({408, 409, 425, 429})

log: Any = structlog.get_logger("penstock")


class NoVectors(Exception):
    """The target gave none. again: whether it may do so another time. Its text is for operators."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


class Vectors:
    """What texts mean to one model. name: its target, `provider/model`. batch: the most texts in one request.

    counts: `requests`, `failures` and `tokens` of embeddings.
    """

    def __init__(self, name: str, batch: int, counts: Counter[str], *, sleep: Sleep = asyncio.sleep) -> None:
        self.name, self.batch, self.counts = name, batch, counts
        self._sleep = sleep
        self._target: Target | None = None
        self._attempt: Handler | None = None
        self._base64 = True

    def attach(self, route: Callable[[str], Route], attempt: Handler) -> None:
        """Find the target. Raises Refused where there is none."""
        self._target, self._attempt = route(self.name).targets[0], attempt

    async def of_questions(self, texts: Sequence[str], seconds: float) -> Mapping[str, Vector]:
        """By text; asked for once, within so many seconds. Raises NoVectors."""
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, await self._ask(distinct, seconds), strict=True))

    async def of_passages(self, texts: Sequence[str], library: Library) -> Sequence[Vector]:
        """At most `batch` of them; patiently. Raises NoVectors, and StoreUnavailable."""
        digests = [sha256(text.encode()).hexdigest() for text in texts]
        known = dict(await library.vectors(self.name, digests))
        missing = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in known}
        fresh = await self._patiently(missing)
        if len({len(vector) for vector in (*known.values(), *fresh.values())}) > 1:
            # The model behind this name is another one than it was.
            known, fresh = {}, await self._patiently(dict(zip(digests, texts, strict=True)))
        if fresh:
            await library.remember(self.name, fresh)
        known.update(fresh)
        return [known[digest] for digest in digests]

    async def _patiently(self, texts: dict[str, str]) -> dict[str, Vector]:
        """By digest; asked for again after each of `PAUSES`. Raises NoVectors."""
        if not texts:
            return {}
        for pause in (*PAUSES, None):
            try:
                return dict(zip(texts, await self._ask(list(texts.values()), REPLY_SECONDS), strict=True))
            except NoVectors as error:
                if pause is None or not error.again:
                    raise
                await self._sleep(pause)
        raise AssertionError("the last try raises")

    async def _ask(self, texts: list[str], seconds: float) -> Sequence[Vector]:
        try:
            async with asyncio.timeout(seconds):
                found = await self._in_some_spelling(texts)
            vectors = read(found, len(texts))
            self.counts["tokens"] += tokens(found)
            return vectors
        except ValueError as error:
            fault = NoVectors(str(error), again=False)
        except TimeoutError:
            fault = NoVectors(f"no embeddings within {seconds:g} s", again=True)
        except GatewayError as error:
            passing = (error.status >= 500 or error.status in PASSING) and not isinstance(error, Unconfigured)
            fault = NoVectors(f"{error.code}: {error.message}", again=passing)
        self.counts["failures"] += 1
        log.warning("embeddings failed", target=self.name, error=str(fault))
        raise fault

    async def _in_some_spelling(self, texts: list[str]) -> Json:
        """base64, until the target has refused it."""
        try:
            return await self._reply(texts)
        except GatewayError as error:
            if not self._base64 or error.status not in (400, 422) or error.outcome is not Outcome.UPSTREAM_ERROR:
                raise
        self._base64 = False
        try:
            return await self._reply(texts)
        except GatewayError:
            self._base64 = True  # it was not that
            raise

    async def _reply(self, texts: list[str]) -> Json:
        assert self._attempt is not None
        self.counts["requests"] += 1
        reply = await self._attempt(self._call(texts))
        try:
            found: Json = (await anext(aiter(reply.chunks))).chunks[0]
            return found
        finally:
            await reply.close(Outcome.COMPLETED)

    def _call(self, texts: list[str]) -> Call:
        target, unique = self._target, secrets.token_hex(8)
        assert target is not None
        return Call(
            id=f"req_{unique}",
            nonce=unique,
            created=int(time.time()),
            kind="embeddings",
            request={"model": target.model, "input": texts, **({"encoding_format": "base64"} if self._base64 else {})},
            model=target.name,
            stream=False,
            route=Route(None, (target,)),
            targets=(target,),
            target=target,
            limits=Limits(connect=CONNECT_SECONDS),
        )
