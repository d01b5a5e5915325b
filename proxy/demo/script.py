"""How the demo's answers are written: the bytes of OpenAI's wire, each piece with the silence before it.

Strategy: generators, so that a long answer is never in memory as a whole; still pure, nobody sleeps here.
The one rule: an answer that breaks never reaches its finish reason.

https://platform.openai.com/docs/api-reference/chat-streaming · https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Iterator
from typing import Any

import orjson

from proxy.demo.answers import Answer, ProviderError, digest, text_of
from proxy.errors import UpstreamCut

Json = dict[str, Any]
Step = tuple[float, bytes | Exception]  # seconds of silence (math.inf: for ever), then bytes or a fault

BREAK_AFTER = 3
DIMENSIONS = 256
TOKEN_LIMIT = 8192


def usage(body: Json, answer: Answer) -> Json:
    prompt = sum(len(text_of(message).split()) for message in body["messages"])
    thoughts = sum("reasoning_content" in piece for piece in answer.pieces)
    found: Json = {"prompt_tokens": prompt, "completion_tokens": len(answer.pieces), "total_tokens": prompt + len(answer.pieces)}
    return {**found, "completion_tokens_details": {"reasoning_tokens": thoughts}} if thoughts else found


def script(body: Json, answer: Answer, created: int) -> Iterator[Step]:
    """The stream of one answer."""
    head = {"id": f"chatcmpl-{digest(body)}", "object": "chat.completion.chunk", "created": created, "model": body["model"]}

    def chunk(delta: Json, finish: str | None = None) -> bytes:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    if answer.breaks == "stall-first":
        yield math.inf, b""
    yield 0.0, chunk({"role": "assistant", "content": ""})
    for piece in answer.pieces[: BREAK_AFTER if answer.breaks else None]:
        yield answer.pace, chunk(piece)
    if answer.breaks:
        yield _break(answer)
        return
    yield 0.0, chunk({}, answer.finish)
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        yield 0.0, _event({**head, "choices": [], "usage": usage(body, answer)})
    yield 0.0, b"data: [DONE]\n\n"


def _break(answer: Answer) -> Step:
    if answer.breaks == "error":
        return answer.pace, _event(ProviderError(500, "The demo was told to fail in mid-stream.").body)
    if answer.breaks == "cut":
        return answer.pace, UpstreamCut("The demo was told to break the connection.")
    return math.inf, b""


def whole(body: Json, answer: Answer, created: int) -> Iterator[Step]:
    """The same answer as one JSON body, when all its words are due."""
    message = _message(answer.pieces)
    found = {"id": f"chatcmpl-{digest(body)}", "object": "chat.completion", "created": created, "model": body["model"]}
    choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}]
    text = orjson.dumps({**found, "choices": choices, "usage": usage(body, answer)})
    if answer.breaks == "stall-first":
        yield math.inf, b""
    if answer.breaks:
        yield answer.pace * BREAK_AFTER, text[: len(text) // 2]
        yield _break(answer)
        return
    yield answer.pace * len(answer.pieces), text


def _message(pieces: list[Json]) -> Json:
    content, thoughts = ("".join(piece.get(name, "") for piece in pieces) for name in ("content", "reasoning_content"))
    calls = [piece["tool_calls"][0] for piece in pieces if "tool_calls" in piece]
    message: Json = {"role": "assistant", "content": None if calls else content}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        arguments = "".join(call["function"]["arguments"] for call in calls)
        function = {"name": calls[0]["function"]["name"], "arguments": arguments}
        message["tool_calls"] = [{"id": calls[0]["id"], "type": "function", "function": function}]
    return message


def embeddings(body: Json) -> Json:
    """One unit vector per input, the sum of a vector for each of its words. Raises ProviderError."""
    if body.get("model") != "embed":
        raise ProviderError(404, f"The model '{body.get('model')}' does not embed; 'embed' does.", "model")
    given, size = body.get("input"), body.get("dimensions") or DIMENSIONS
    inputs: list[Any] = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not inputs or not all(isinstance(item, str | list) and item for item in inputs):
        raise ProviderError(400, "'input' must be a text or tokens, or a list of them, none of them empty.", "input")
    if not isinstance(size, int) or not 1 <= size <= 1536:
        raise ProviderError(400, "'dimensions' must be from 1 to 1536.", "dimensions")
    texts = [item if isinstance(item, str) else " ".join(map(str, item)) for item in inputs]
    tokens = sum(len(text.split()) for text in texts)
    if tokens > TOKEN_LIMIT:
        raise ProviderError(400, f"'input' has {tokens} words; {TOKEN_LIMIT} are possible.", "input")
    data: list[Json] = []
    for number, text in enumerate(texts):
        vector: Any = embedding(text, size)
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"object": "embedding", "index": number, "embedding": vector})
    return {"object": "list", "data": data, "model": "embed", "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def embedding(text: str, size: int) -> list[float]:
    """A vector of length 1 and of `size` numbers."""
    total = [0.0] * size
    for word in text.lower().split() or [text]:
        numbers = struct.unpack(f"<{size}i", hashlib.shake_128(word.encode()).digest(4 * size))
        total = [a + b for a, b in zip(total, numbers, strict=True)]
    length = math.hypot(*total) or 1.0
    return [number / length for number in total]


def _event(found: Json) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(found)
