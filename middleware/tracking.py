"""One structured log line per request: who asked for what, who answered, how it ended.

Cost: around the head, and one callback at the end; nothing per chunk.
The one rule: prompts, replies and keys never appear in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import structlog

from proxy.call import Call
from proxy.errors import GatewayError, Outcome, why_cancelled
from proxy.pipeline import Handler
from proxy.reply import Reply, Trailer


class Tracking:
    """Logs each call when it has ended, however it ended. clock: seconds, monotonic."""

    def __init__(self) -> None:
        self._log: Any = structlog.get_logger("penstock.request")
        self.clock: Callable[[], float] = time.perf_counter

    async def __call__(self, call: Call, next: Handler) -> Reply:
        started = self.clock()
        try:
            reply = await next(call)
        except GatewayError as error:
            self._line(call, started, error.outcome, status=error.status, code=error.code)
            raise
        except asyncio.CancelledError as error:
            self._line(call, started, why_cancelled(error))
            raise
        except Exception:
            self._line(call, started, Outcome.GATEWAY_ERROR, status=500)
            raise
        first = self.clock() - started
        reply.trailer.on_end(lambda trailer: self._ended(call, started, first, reply, trailer))
        return reply

    def _ended(self, call: Call, started: float, first: float, reply: Reply, trailer: Trailer) -> None:
        usage = trailer.usage or {}
        self._line(
            call,
            started,
            trailer.outcome or Outcome.GATEWAY_ERROR,
            target=reply.head.target,
            attempts=1 + len(reply.head.tries),
            first_chunk_ms=round(first * 1000, 1),
            finish_reasons=list(trailer.finish_reasons.values()),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            code=trailer.error.code if trailer.error else None,
        )

    def _line(self, call: Call, started: float, outcome: Outcome, **facts: Any) -> None:
        facts = {
            "id": call.id,
            "kind": call.kind,
            "model": call.model,
            "name": call.name,
            "stream": call.stream,
            "outcome": outcome.value,
            "total_ms": round((self.clock() - started) * 1000, 1),
            **facts,
        }
        self._log.info("request", **{name: value for name, value in facts.items() if value is not None})
