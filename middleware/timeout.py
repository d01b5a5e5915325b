"""How long an upstream may take: to connect, until its first chunk, between chunks, for one whole attempt.

Cost: around the head; one timer per call, none per chunk. The idle limit is applied where the socket is owned (`proxy.source`).
The one rule: no `yield` under a running timeout; the limits on the head are awaited here, those on the stream are handed inward.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated

from proxy.call import Call, Limits
from proxy.errors import UpstreamTimeout
from proxy.pipeline import Handler
from proxy.reply import Reply
from proxy.units import Between, Seconds

Limit = Annotated[Seconds, Between(0.001, 86400)]


class Timeout:
    """Limits of one attempt, in seconds; whichever runs out is named in the error.

    connect_timeout: until the connection stands. first_chunk_timeout: until the first real chunk of a streamed reply.
    idle_timeout: between two chunks with content; pings do not count. call_timeout: a stream until its first real chunk, a whole
    reply until its end.
    """

    def __init__(
        self,
        *,
        connect_timeout: Limit = 10.0,
        first_chunk_timeout: Limit = 300.0,
        idle_timeout: Limit = 120.0,
        call_timeout: Limit = 600.0,
    ) -> None:
        self._limits = Limits(connect=connect_timeout, idle=idle_timeout)
        self._first_chunk = first_chunk_timeout
        self._call = call_timeout

    async def __call__(self, call: Call, next: Handler) -> Reply:
        which, seconds = ("call", self._call)
        if call.stream and self._first_chunk < self._call:
            which, seconds = ("first_chunk", self._first_chunk)
        try:
            async with asyncio.timeout(seconds) as timer:
                return await next(replace(call, limits=self._limits))
        except TimeoutError:
            if timer.expired():
                raise UpstreamTimeout(which, seconds) from None
            raise
