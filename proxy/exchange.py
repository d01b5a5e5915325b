"""One attempt at one target: the innermost handler of the pipeline, between a call and a socket.

Strategy: encode, send, look at the status, then read until the first real chunk is in hand; only then there is a reply. What
the upstream really sent (a stream or one JSON) is told from its first bytes, not from its headers, which vendors get wrong.
The one rule: whatever goes wrong, the socket is closed and what is raised is a `GatewayError` without the provider's secrets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from proxy.call import Call, Target
from proxy.errors import GatewayError, Malformed, Unconfigured, UpstreamCut, UpstreamError
from proxy.faults import presentable
from proxy.prompt import as_chat, takes_text
from proxy.reply import Batch, Completion, Head, Reply, Trailer
from proxy.source import Source
from proxy.transport import Transport, UpstreamResponse
from proxy.wire import Wire

SETTLE_SECONDS = 2.0
WHOLE_LIMIT = 64 * 2**20
ERROR_LIMIT = 64 * 2**10


class Exchange:
    """The handler that asks `call.target` (the first of `call.targets` where none was chosen).

    wires, transports: by `Provider.api`. settle: seconds of silence after the finish reasons that count as the upstream's end.
    """

    def __init__(self, wires: Mapping[str, Wire], transports: Mapping[str, Transport], *, settle: float = SETTLE_SECONDS) -> None:
        self._wires = wires
        self._transports = transports
        self._settle = settle

    async def __call__(self, call: Call) -> Reply:
        """The reply, its first chunk in hand. Raises GatewayError."""
        target = call.target or call.targets[0]
        provider = target.provider
        if provider.missing:
            raise Unconfigured(
                f"The provider '{provider.name}' is not configured: set the environment variable {provider.missing}."
            )
        try:
            return await self._ask(call, target)
        except GatewayError as error:
            raise presentable(error, provider) from None

    async def _ask(self, call: Call, target: Target) -> Reply:
        wire = self._wires[target.provider.api]
        if call.kind == "completions" and not takes_text(target):
            call = as_chat(call)
        request = wire.encode(call, target)
        clock = asyncio.get_running_loop().time
        sent = clock()
        response = await self._transports[target.provider.api].send(request, call.limits)
        source: Source | None = None
        try:
            if not 200 <= response.status < 300:
                raise await _refusal(wire, response)
            opening = await _opening(response)
            if _is_stream(opening, call):
                source = Source(response, wire.Decoder(call, target), call.limits.idle, self._settle, target.provider)
                await source.start(opening)
            else:
                completion = wire.decode_whole(call, target, await _rest(response, opening))
        except BaseException:
            response.close()
            raise
        head = Head(str(target), rate_limits(response.headers), request.dropped, upstream_seconds=clock() - sent)
        return Reply(head, source, source.trailer) if source is not None else _whole(completion, head)


async def _refusal(wire: Wire, response: UpstreamResponse) -> UpstreamError:
    """The error of a status that is not 2xx; a redirect is one too, for it would carry the key elsewhere."""
    parts, size = [], 0
    try:
        while size < ERROR_LIMIT and (data := await response.read()):
            parts.append(data)
            size += len(data)
        response.done()
    except UpstreamCut:
        pass
    response.close()
    error = wire.decode_error(response.status, response.headers, b"".join(parts))
    error.headers = {**rate_limits(response.headers), **error.headers}
    return error


async def _opening(response: UpstreamResponse) -> bytes:
    """The first bytes that are not blank; some servers send blank lines to keep a line open."""
    while data := await response.read():
        if data := data.lstrip(b" \r\n\t"):
            return data
    raise UpstreamCut("The provider's reply was empty.")


# The first letters of data, event, id, retry, of a comment, and of a byte order mark; no JSON object begins with one of them.
SSE_STARTS = (b"d", b"e", b"i", b"r", b":", b"\xef")


def _is_stream(opening: bytes, call: Call) -> bool:
    """Does the body begin like server-sent events? One byte must do: the next may be long in coming."""
    if call.kind == "embeddings" or opening[:1] in (b"{", b"["):
        return False
    if opening[:1] == b"<":
        raise Malformed("The provider sent HTML where its API was expected (a load balancer's page?).")
    return call.stream or opening.startswith(SSE_STARTS)


async def _rest(response: UpstreamResponse, opening: bytes) -> bytes:
    parts, size = [opening], len(opening)
    while data := await response.read():
        parts.append(data)
        size += len(data)
        if size > WHOLE_LIMIT:
            raise Malformed(f"The provider's reply is larger than {WHOLE_LIMIT // 2**20} MiB.")
    response.done()
    return b"".join(parts)


def _whole(completion: Completion, head: Head) -> Reply:
    trailer = Trailer()
    trailer.usage = completion.get("usage")
    trailer.finish_reasons = {choice["index"]: choice["finish_reason"] for choice in completion.get("choices", ())}
    return Reply(head, _Single(Batch([completion], final=True)), trailer, whole=True)


class _Single:
    """An async iterator of one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch: Batch | None = batch

    async def aclose(self) -> None:
        self._batch = None

    def __aiter__(self) -> _Single:
        return self

    async def __anext__(self) -> Batch:
        batch, self._batch = self._batch, None
        if batch is None:
            raise StopAsyncIteration
        return batch


PASSED = ("x-ratelimit-", "anthropic-ratelimit-", "retry-after")


def rate_limits(headers: Mapping[str, str]) -> dict[str, str]:
    """The response headers of an upstream that its caller may want to see: rate limits and when to come back."""
    return {name: headers[name] for name in headers if name.startswith(PASSED)}
