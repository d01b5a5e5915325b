"""HTTP as the edge speaks it, without any decision about calls: bodies in, bounded in size and time; heads and errors out.

The one rule: an error is always the OpenAI envelope, and no header holds a byte that a client chose without being cleaned.

Envelope: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from proxy.call import Call
from proxy.errors import GatewayError, Refused
from proxy.reply import Head

Json = dict[str, Any]


def allow(request: web.BaseRequest, *methods: str) -> None:
    """Refuse the request (405) unless its method is one of these."""
    if request.method not in methods:
        allowed = ", ".join(methods)
        message = f"{request.method} is not possible here, only {allowed}."
        raise Refused(message, status=405, code="method_not_allowed", headers={"Allow": allowed})


def check_json(headers: Mapping[str, str]) -> None:
    """Refuse a body (415) that says that it is something else than JSON; one that says nothing may be."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not (kind == "application/json" or kind.endswith("+json") or kind == "text/plain"):
        message = f"The body must be JSON, with the header Content-Type: application/json, not {kind[:80]}."
        raise Refused(message, status=415, code="unsupported_media_type")


async def read_body(request: web.BaseRequest, headers: Mapping[str, str], limit: int, seconds: float) -> bytes:
    """The request's body, at most `limit` bytes (413), within `seconds` (408)."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    if headers.get("expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    if request.content.is_eof():
        # It came with the head: no clock is needed.
        return await _read(request, limit)
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, limit)
    except TimeoutError:
        message = f"The body did not arrive within {seconds:g} s."
        raise Refused(message, status=408, code="body_timeout", headers={"Connection": "close"}) from None


async def _read(request: web.BaseRequest, limit: int) -> bytes:
    content = request.content
    parts, size = [], 0
    while data := await content.readany():
        parts.append(data)
        size += len(data)
        if size > limit:
            raise _too_large(limit)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> Refused:
    message = f"The body is larger than the {limit} bytes that server.max_body allows."
    return Refused(message, status=413, code="body_too_large", headers={"Connection": "close"})


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
    if head.cache is not None:
        found["X-Cache"] = head.cache
        if head.age is not None:
            found["Age"] = str(int(head.age))
    if head.dropped:
        # Field names are the client's own words: they must not end a header line, nor fill it.
        names = [re.sub(r"[^\w.\[\]-]", "?", name, flags=re.ASCII)[:64] for name in head.dropped[:32]]
        found["X-Penstock-Dropped"] = ", ".join(names)
    return found


def error_response(error: GatewayError, identity: str) -> web.Response:
    """The error in OpenAI's envelope. identity: the request id."""
    fields = {**error.headers, "X-Request-Id": identity}
    if error.tries:
        fields["X-Penstock-Attempts"] = str(len(error.tries))
    if len(error.tries) > 1:
        # The official SDKs would try again on their own; that has been done.
        fields["x-should-retry"] = "false"
    response = json_response({"error": error.envelope()}, error.status, fields)
    if error.headers.get("Connection") == "close":
        response.force_close()
    return response


def json_response(body: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    fields = {**(headers or {}), "Server": "penstock", "Content-Type": "application/json"}
    return web.Response(body=orjson.dumps(body), status=status, headers=fields)
