"""Cohere's chat API, version 2.

Strategy: `request` and `messages` turn an OpenAI-shaped request into Cohere's, `stream` decodes its events, `whole` its JSON
replies; what a piece of a reply means (usage, citations, finish reasons, thinking) is said once, in `parts`, for both.
The one rule: a streamed reply ends with `message-end` and with nothing else; the `[DONE]` that Cohere sends after it is not read.

Reasoning goes back and forth as `reasoning_details` of the format "cohere-v2". Cohere knows two kinds: thinking contents, and
the `tool_plan` that comes before tool calls; an entry whose `id` is "tool_plan" is the latter.

https://docs.cohere.com/reference/chat · https://docs.cohere.com/reference/chat-stream · https://docs.cohere.com/v2/docs/streaming
"""

from __future__ import annotations

from collections.abc import Mapping

from proxy.errors import UpstreamError
from proxy.faults import http_error
from proxy.wire.cohere.request import encode
from proxy.wire.cohere.stream import Decoder
from proxy.wire.cohere.whole import decode_whole

__all__ = ["Decoder", "decode_error", "decode_whole", "encode"]


def decode_error(status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
    """Cohere's errors are `{"message": "…"}`, today with an `id` beside it (https://docs.cohere.com/reference/errors)."""
    return http_error(status, headers, body)
