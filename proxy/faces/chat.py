"""`/chat/completions`: the gateway's own inner form, so chunks leave as they are.

The one rule: a stream that did not complete ends with an error chunk in OpenRouter's shape, on which the OpenAI SDKs raise, and
never with `[DONE]`.

API: https://platform.openai.com/docs/api-reference/chat; error chunk: https://openrouter.ai/docs/api-reference/errors
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.call import Call, Kind, Options
from proxy.errors import GatewayError, Refused
from proxy.reply import Batch, Chunk, Completion, Item, Trailer, sse_events

Json = dict[str, Any]

KIND: Kind = "chat"
VERBATIM = True
DONE = b"data: [DONE]\n\n"


def check(body: Json) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages: must be a list of at least one message.", code="invalid_value", param="messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            path = f"messages[{number}]"
            raise Refused(f"{path}: must be an object with a role.", code="invalid_value", param=path)


def events(batch: Batch) -> bytes:
    return batch.sse() if not batch.comment else commented(batch, batch.sse())


def commented(batch: Batch, events: bytes) -> bytes:
    """The batch's comment, then its events. Behind an `id:` a blank line would be taken for an event without data."""
    return (batch.comment if batch.number is None else batch.comment[:-1]) + events


def last(batch: Batch, trailer: Trailer, options: Options) -> bytes:
    """The end of a stream: finish chunks, usage where the client asked for it, `[DONE]`."""
    return commented(batch, ending(batch.items, trailer, options, batch.number, batch.seen))


def ending(chunks: Sequence[Item], trailer: Trailer, options: Options, number: int | None = None, seen: int = 0) -> bytes:
    """Finish chunks in a face's form, with usage beside or behind them; the chunks may be shared and stay as they are."""
    usage = trailer.usage
    last = chunks[-1] if chunks else None
    if usage is None or not isinstance(last, dict):
        pass
    elif options.usage_on_finish:
        chunks = [*chunks[:-1], {**last, "usage": usage}]
    elif options.include_usage:
        kept = {name: last[name] for name in ("id", "object", "created", "model")}
        chunks = [*chunks, {**kept, "choices": [], "usage": usage}]
    return sse_events([*chunks, DONE], number, seen)


def failure(error: GatewayError, call: Call, sent: Chunk | None, number: int | None = None) -> bytes:
    """The error chunk. sent: the last chunk that went out, whose id and time it shares."""
    choices = [{"index": index, "delta": {}, "finish_reason": "error"} for index in range(choices_asked(call))]
    chunk = {**envelope(call, sent, "chat.completion.chunk"), "error": error.envelope(), "choices": choices}
    return sse_events([chunk], number)


def choices_asked(call: Call) -> int:
    """How many choices the client asked for; none of them has finished, because finish chunks only leave with the end."""
    asked = call.request.get("n")
    return asked if isinstance(asked, int) and asked > 0 else 1


def envelope(call: Call, sent: Chunk | None, kind: str) -> Json:
    return {
        "id": sent["id"] if sent else f"chatcmpl-{call.nonce}",
        "object": kind,
        "created": sent["created"] if sent else call.created,
        "model": call.model,
    }


def whole(completion: Completion) -> Json:
    return completion
