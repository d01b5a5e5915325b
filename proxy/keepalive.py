"""Lines that keep a silent stream's connection open: comments between chunks, and a stream that begins before its first chunk.

Strategy: one timer per open stream, which looks at the time of the last write when it goes off and moves itself; a chunk costs
nothing. Most streams end before it first does, so it is first set on the shared timers (1.0 us per stream in all).
The one rule: a comment is written between events, never to a client that is behind, and is never content: no limit and no gap
counts it.

A comment is followed by a blank line, as hand-made clients expect who split at blank lines; but not once events carry an `id:`,
because the OpenAI SDK for Python takes a blank line behind an id for an event without data, and fails on it.

Comments: https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping

import structlog

from proxy.call import Call
from proxy.delivery import Delivery, Response
from proxy.errors import GatewayError
from proxy.faces import Face
from proxy.http import STREAM_HEADERS, error_response
from proxy.reply import Reply
from proxy.timers import GRAIN, Expiry, after

log = structlog.get_logger("penstock")

COMMENT = b": keep-alive\n\n"
COMMENT_AMONG_IDS = b": keep-alive\n"
# What a response that begins early already says.
KNOWN = frozenset({"Server", "X-Request-Id", "Content-Type"})


class KeepAlive:
    """Comments in the silences of one stream, from `start` to `stop`.

    interval: seconds of silence before each; 0 is none. spoke: when something was last written, by the loop's clock. comment:
    writes one.
    """

    __slots__ = ("_comment", "_interval", "_loop", "_spoke", "_timer")

    def __init__(self, interval: float, spoke: Callable[[], float], comment: Callable[[], None]) -> None:
        self._interval = interval
        self._spoke = spoke
        self._comment = comment
        self._loop = asyncio.get_running_loop()
        self._timer: Expiry | asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._interval:
            self._timer = after(self._interval, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now = self._loop.time()
        due = self._spoke() + self._interval
        if due <= now:
            due = now + self._interval
            try:
                self._comment()
            except ConnectionError:  # the stream's own task is told, and ends it
                self._timer = None
                return
        self._timer = self._loop.call_at(due + GRAIN, self._look)


async def kept_alive(waiting: Awaitable[Reply], call: Call, delivery: Delivery) -> Reply:
    """The reply that is waited for. Where that takes longer than `keepalive_after`, its stream begins meanwhile, with status 200
    and what headers are known; `delivery.begun` then says so."""
    late = _LateCommit(delivery, call)
    try:
        return await waiting
    except (GatewayError, ConnectionError):
        raise
    except Exception:
        if not delivery.begun:
            raise
        log.exception("request failed", id=call.id)
        raise GatewayError("The gateway failed on this request.") from None
    finally:
        late.stop()


class _LateCommit:
    """Begins the stream when nothing has come for `keepalive_after`, and says comments from then on."""

    __slots__ = ("_call", "_delivery", "_keepalive", "_timer")

    def __init__(self, delivery: Delivery, call: Call) -> None:
        options = call.options
        self._delivery = delivery
        self._call = call
        began = asyncio.get_running_loop().time() + options.keepalive_after
        self._keepalive = KeepAlive(options.keepalive_interval, lambda: began, self._comment)
        self._timer = after(options.keepalive_after, self._begin)

    def stop(self) -> None:
        self._timer.cancel()
        self._keepalive.stop()

    def _begin(self) -> None:
        self._delivery.start({"Server": "penstock", "X-Request-Id": self._call.id, **STREAM_HEADERS})
        self._keepalive.start()
        try:
            self._comment()
        except ConnectionError:  # whoever waits for the first chunk is cancelled by the same leaving
            self.stop()

    def _comment(self) -> None:
        if not self._delivery.congested:
            self._delivery.write(COMMENT)


def told_late(headers: Mapping[str, str]) -> bytes:
    """Response headers that came after the response had begun: `: penstock {"X-Penstock-Target": …}`, one line of ASCII."""
    return b": penstock %b\n\n" % json.dumps({name: text for name, text in headers.items() if name not in KNOWN}).encode()


def told(error: GatewayError, call: Call, face: Face, delivery: Delivery) -> Response | None:
    """An error before the first chunk: its status and envelope, or, None, the error chunk of a stream that had begun."""
    response = error_response(error, call.id)
    if not delivery.begun:
        return response
    delivery.close = True
    delivery.end(told_late({"Status": str(error.status), **response.headers}) + face.failure(error, call, None))
    return None
