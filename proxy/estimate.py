"""About how many tokens, where no provider has counted them: offline, from sizes alone.

Strategy: a token is about four bytes of UTF-8, whatever the script: four Latin letters, one and a third Chinese characters, two
Cyrillic ones, as today's vocabularies cut them. What a stream said is known by its size: the bytes that went out, less what is
around the text of a chunk, which the last chunk shows. Nothing is decoded on the way.
The one rule: an estimate is never mixed with what a provider counted; whoever tells it says that it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from proxy.call import Call
from proxy.reply import Batch, Trailer, Usage

Json = dict[str, Any]
BYTES_PER_TOKEN = 4
# An image, a sound or a file: about what providers count for an image of common size.
PART_TOKENS = 1000
FIRST = len(b'"role":"assistant",')  # in the first chunk alone
INPUTS = ("messages", "prompt", "input")


def estimated_usage(call: Call, trailer: Trailer) -> Usage | None:
    """Usage of a stream that told none; None where nothing was streamed."""
    sent = trailer.sent
    if sent is None:
        return None
    prompt = estimated_input(call.request)
    chunks = trailer.chunks - len(trailer.finish_reasons)  # the finish chunks are in the final batch
    text = sent.bytes - FIRST - chunks * _around(sent.last, sent.last_bytes)
    completion = max(1, -(-int(text) // BYTES_PER_TOKEN))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def estimated_input(request: Json) -> int:
    """Tokens that go in, about: messages, prompt or input, and tools."""
    size = sum(_size(request.get(name)) for name in INPUTS)
    if request.get("tools"):
        size += len(orjson.dumps(request["tools"]))
    return -(-size // BYTES_PER_TOKEN)


def _size(value: object) -> int:
    """Bytes of text."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, list):
        return sum(map(_entry, value))
    return 0


def _entry(entry: object) -> int:
    """A message, a prompt, the number of a token, or a part of a message's content."""
    if isinstance(entry, dict):
        if "role" in entry:
            calls = entry.get("tool_calls")
            return _size(entry.get("content")) + (len(orjson.dumps(calls)) if calls else 0)
        text = entry.get("text")
        return _size(text) if isinstance(text, str) else PART_TOKENS * BYTES_PER_TOKEN
    return BYTES_PER_TOKEN if isinstance(entry, int) else _size(entry)


def _around(batch: Batch, size: int) -> float:
    """Bytes of a chunk that are no text of the model's. size: of the batch as it went out."""
    said = sum(len(orjson.dumps(text)) - 2 for chunk in batch.chunks for text in _said(chunk))
    return max(0.0, size - said) / max(1, len(batch.chunks))


def _said(chunk: Json) -> Iterator[str]:
    """What the model wrote in a chunk: text, reasoning, refusals, arguments of tools."""
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        for name in ("content", "reasoning_content", "refusal"):
            if isinstance(text := delta.get(name), str):
                yield text
        for call in delta.get("tool_calls") or ():
            if isinstance(text := (call.get("function") or {}).get("arguments"), str):
                yield text
