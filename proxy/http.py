"""HTTP as the edge speaks it, without any decision about calls: requests and their bodies in, heads and errors out.

The one rule: an error is always the OpenAI envelope, and no header holds a byte that a client chose without being cleaned.

Envelope: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

import orjson

from proxy.call import Call
from proxy.delivery import Delivery, Response
from proxy.errors import GatewayError, Refused
from proxy.reply import Head

Json = dict[str, Any]

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Request:
    """A client's request whose head is in. path: percent-decoded; raw_path: as it was written. length: the declared size of its
    body, in bytes.

    The connection feeds the body as it comes; `body` waits for it. missing: bytes that have not come yet.
    """

    __slots__ = (
        "_discard", "_parts", "_waiter", "delivery", "headers", "length", "method", "missing", "path", "query_string", "raw_path",
    )  # fmt: skip

    def __init__(self, method: str, target: str, headers: Mapping[str, str], delivery: Delivery, length: int) -> None:
        path, _, self.query_string = target.partition("?")
        self.method = method
        self.raw_path = path
        self.path = unquote(path) if "%" in path else path
        self.headers = headers
        self.delivery = delivery
        self.length = self.missing = length
        self._parts: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._discard = False

    @property
    def query(self) -> Mapping[str, str]:
        return dict(parse_qsl(self.query_string, keep_blank_values=True))

    def feed(self, data: bytes) -> bytes:
        """Bytes of the body; returns what is beyond it."""
        missing = self.missing
        if not missing:
            return data
        mine = data if len(data) <= missing else data[:missing]
        self.missing = missing - len(mine)
        if not self._discard:
            self._parts.append(mine)
        if not self.missing and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return data[len(mine) :]

    def left(self) -> Request:
        """Nobody wants the body any more: what still comes is not kept."""
        self._discard = True
        self._parts.clear()
        return self

    def at_hand(self, limit: int) -> bytes | None:
        """The body where it is all here already, and not too large; else None."""
        if self.missing or self.length > limit:
            return None
        parts = self._parts
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def body(self, limit: int, seconds: float) -> bytes:
        """The body, at most `limit` bytes (413), within `seconds` (408)."""
        if self.length > limit:
            self.left()
            raise too_large(limit)
        if self.missing:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(seconds):
                    await self._waiter
            except TimeoutError:
                raise too_slow(seconds) from None
        return b"".join(self._parts)


def too_large(limit: int) -> Refused:
    message = f"The body is larger than the {limit} bytes that server.max_body allows."
    return Refused(message, status=413, code="body_too_large", headers={"Connection": "close"})


def too_slow(seconds: float) -> Refused:
    message = f"The body did not arrive within {seconds:g} s."
    return Refused(message, status=408, code="body_timeout", headers={"Connection": "close"})


def allow(request: Request, *methods: str) -> None:
    """Refuse the request (405) unless its method is one of these."""
    if request.method not in methods:
        allowed = ", ".join(methods)
        message = f"{request.method} is not possible here, only {allowed}."
        raise Refused(message, status=405, code="method_not_allowed", headers={"Allow": allowed})


def check_json(headers: Mapping[str, str]) -> None:
    """Refuse a body (415) that says that it is something else than JSON; one that says nothing may be."""
    if headers.get("content-type") == "application/json":
        return
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not (kind == "application/json" or kind.endswith("+json") or kind == "text/plain"):
        message = f"The body must be JSON, with the header Content-Type: application/json, not {kind[:80]}."
        raise Refused(message, status=415, code="unsupported_media_type")


def head_headers(call: Call, head: Head, seconds: float) -> dict[str, str]:
    """What the client learns from the head about how its call was served."""
    upstream = head.upstream_seconds
    found = {
        **head.headers,
        "Server": "penstock",
        "X-Request-Id": call.id,
        "X-Penstock-Target": head.target,
        "X-Penstock-Attempts": str(1 + len(head.tries)),
        "Server-Timing": f"upstream;dur={upstream * 1000:.1f}, gateway;dur={max(0.0, seconds - upstream) * 1000:.1f}",
    }
    if not head.target:
        del found["X-Penstock-Target"]  # a middleware answers before any target was asked
    if head.cache is not None:
        found["X-Cache"] = head.cache
        if head.age is not None:
            found["Age"] = str(int(head.age))
    if head.dropped:
        # Field names are the client's own words: they must not end a header line, nor fill it.
        names = [re.sub(r"[^\w.\[\]-]", "?", name, flags=re.ASCII)[:64] for name in head.dropped[:32]]
        found["X-Penstock-Dropped"] = ", ".join(names)
    return found


def error_response(error: GatewayError, identity: str) -> Response:
    """The error in OpenAI's envelope. identity: the request id."""
    fields = {**error.headers, "X-Request-Id": identity}
    if error.tries:
        fields["X-Penstock-Attempts"] = str(len(error.tries))
    if len(error.tries) > 1:
        # The official SDKs would try again on their own; that has been done.
        fields["x-should-retry"] = "false"
    response = json_response({"error": error.envelope()}, error.status, fields)
    response.close = error.headers.get("Connection") == "close"
    return response


def json_response(body: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, orjson.dumps(body), {**(headers or {}), "Server": "penstock", "Content-Type": "application/json"})
