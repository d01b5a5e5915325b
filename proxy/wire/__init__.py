"""What upstreams speak: one module per wire format, all with the same names, found through the table at the end.

A wire format is pure: no I/O, no clock, no log. It has

    encode(call, target) -> UpstreamRequest            raises Refused (400) with the path of what it cannot carry
    Decoder(call, target)                              an SseDecoder: bytes of a streamed reply -> normalized chunks
    decode_whole(call, target, body) -> Completion     a whole JSON reply -> one `chat.completion` (or embeddings list)
    decode_error(status, headers, body) -> UpstreamError

The one rule: formats do not import each other. What they share lies a floor below: `proxy.translation` (requests),
`proxy.chunks` and `proxy.decoder` (streams), `proxy.faults` (errors).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from proxy.call import Call, Target
from proxy.decoder import SseDecoder
from proxy.errors import UpstreamError
from proxy.reply import Completion
from proxy.transport import UpstreamRequest
from proxy.wire import anthropic, cohere, gemini, openai


class Wire(Protocol):
    """The names that every wire module has."""

    @property
    def Decoder(self) -> type[SseDecoder]: ...

    def encode(self, call: Call, target: Target) -> UpstreamRequest: ...

    def decode_whole(self, call: Call, target: Target, body: bytes) -> Completion: ...

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError: ...


WIRES: Mapping[str, Wire] = {
    "openai": openai,
    "anthropic": anthropic,
    "gemini": gemini,
    "cohere": cohere,
    "demo": openai,
}
