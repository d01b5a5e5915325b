"""`/embeddings`: passed to an upstream that has it; never streamed.

API: https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call, Kind, Options
from proxy.errors import GatewayError, Refused
from proxy.reply import Batch, Chunk, Completion, Trailer

Json = dict[str, Any]

KIND: Kind = "embeddings"
VERBATIM = False


def check(body: Json) -> None:
    found = body.get("input")
    if not isinstance(found, str | list) or not found:
        raise Refused("input: must be a text, or a list of texts or tokens.", code="invalid_value", param="input")
    if body.get("stream"):
        raise Refused("stream: embeddings are not streamed.", code="invalid_value", param="stream")


def events(batch: Batch) -> bytes:
    raise NotImplementedError("embeddings are not streamed")


def last(batch: Batch, trailer: Trailer, options: Options) -> bytes:
    raise NotImplementedError("embeddings are not streamed")


def failure(error: GatewayError, call: Call, sent: Chunk | None, number: int | None = None) -> bytes:
    raise NotImplementedError("embeddings are not streamed")


def whole(completion: Completion) -> Json:
    return completion
