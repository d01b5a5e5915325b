"""`/completions`: text completions; each chunk's delta becomes `choices[].text`.

Strategy: works for upstreams that complete text and for those that only chat (`proxy.prompt`), because both arrive here as chat
chunks. What a text completion has no place for (reasoning, say) stays in the choice under its own name.
The one rule: a choice always has `text`, `index`, `logprobs` and `finish_reason`, as the SDKs' types demand.

API: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call, Kind, Options
from proxy.errors import GatewayError, Refused
from proxy.faces import chat
from proxy.reply import Batch, Chunk, Completion, Trailer, sse_events

Json = dict[str, Any]

KIND: Kind = "completions"
VERBATIM = False


def check(body: Json) -> None:
    prompt = body.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise Refused("prompt: must be a text or a list of them.", code="invalid_value", param="prompt")


def events(batch: Batch) -> bytes:
    return chat.commented(batch, sse_events([_text_chunk(chunk) for chunk in batch.chunks], batch.number))


def last(batch: Batch, trailer: Trailer, options: Options) -> bytes:
    chunks = [_text_chunk(chunk) for chunk in batch.chunks]
    return chat.commented(batch, chat.ending(chunks, trailer, options, batch.number, batch.seen))


def failure(error: GatewayError, call: Call, sent: Chunk | None, number: int | None = None) -> bytes:
    choices = [
        {"index": index, "text": "", "logprobs": None, "finish_reason": "error"} for index in range(chat.choices_asked(call))
    ]
    chunk = {**chat.envelope(call, sent, "text_completion"), "error": error.envelope(), "choices": choices}
    return sse_events([chunk], number)


def whole(completion: Completion) -> Json:
    return {
        **completion,
        "object": "text_completion",
        "choices": [_text_choice(choice, choice["message"]) for choice in completion["choices"]],
    }


def _text_chunk(chunk: Chunk) -> Chunk:
    choices = [_text_choice(choice, choice["delta"]) for choice in chunk["choices"]]
    return {**chunk, "object": "text_completion", "choices": choices}


def _text_choice(choice: Json, message: Json) -> Json:
    kept = {name: value for name, value in choice.items() if name not in ("delta", "message")}
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {"text": message.get("content") or "", "logprobs": None, **rest, **kept}
