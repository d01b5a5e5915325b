"""How much one reply may be: bytes, seconds, tokens. At the bound it ends cleanly, as one that the model's own limit ended.

Strategy: every batch's encoded size and the size of its text are added up as it passes; the batch that goes over a bound is taken
apart, chunk by chunk, so that the reply is the same however the provider's bytes were split. A bound on seconds is one timer per
reply. The end is `finish_reason: length` with `native_finish_reason: penstock:<bound>` on every choice, usage as far as it is
known, and `[DONE]`; the outcome is `truncated`, and the upstream is closed at once.
Cost: 0.9 us per paced chunk, most of it for the estimate of tokens; a burst's run of text costs a few us in all.
The one rule: no chunk that goes over a bound is sent, none that does not is lost, and what the provider ended itself is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import orjson

from proxy.call import Call, altered
from proxy.errors import Outcome
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample
from proxy.reply import Batch, Chunk, Item, Reply, Run, Tapped, Usage, single_events, sse_events, tapped
from proxy.text_events import TextEvents, escaped
from proxy.timers import after
from proxy.units import Between, ByteSize, Seconds

NAMES = ("max_stream_bytes", "max_stream_seconds", "max_output_tokens_hard")
MOST_BYTES, MOST_SECONDS, MOST_TOKENS = 2**40, 86_400.0, 10**9
# About as much UTF-8 as a token is, in English and, at three bytes a character, in Chinese; escapes count as written.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Bound:
    """What one reply may be; None is no bound. bytes: of its events. seconds: from its first chunk on. tokens: an estimate."""

    bytes: int | None = None
    seconds: float | None = None
    tokens: int | None = None


class Bounds:
    """Ends a stream cleanly (`length`) when it has become too large or too long. All are off unless set.

    max_stream_bytes: of the reply's events as they are sent. max_stream_seconds: from the first chunk to the end.
    max_output_tokens_hard: of text, reasoning and tool calls, over all choices, estimated as a token per four bytes. A request's
    own fields of these names hold as far as they are tighter: beyond the operator's they are a 400. Replies that the
    provider sends whole are not cut.
    """

    FIELDS = NAMES

    def __init__(
        self,
        *,
        max_stream_bytes: Annotated[ByteSize, Between(1, MOST_BYTES)] | None = None,
        max_stream_seconds: Annotated[Seconds, Between(0.001, MOST_SECONDS)] | None = None,
        max_output_tokens_hard: Annotated[int, Between(1, MOST_TOKENS)] | None = None,
    ) -> None:
        self._bound = Bound(max_stream_bytes, max_stream_seconds, max_output_tokens_hard)
        self._truncated: Counter[str] = Counter()

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read the request's own bounds. Raises Refused (400) with the path."""
        asked = [own.get(name) for name in NAMES]
        if asked == [None, None, None]:
            return call
        size, seconds, tokens = asked
        most = self._bound
        bound = Bound(
            size.integer(1, most.bytes or MOST_BYTES) if size else most.bytes,
            seconds.number(0.001, most.seconds or MOST_SECONDS) if seconds else most.seconds,
            tokens.integer(1, most.tokens or MOST_TOKENS) if tokens else most.tokens,
        )
        return altered(call, extensions={**call.extensions, Bound: bound})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        reply = await next(call)
        bound = call.extension(Bound) or self._bound
        if reply.whole or reply.head.status != 200 or bound == Bound():
            return reply
        return altered(reply, chunks=Bounded(call, reply, bound, self._truncated).chunks)

    def samples(self) -> Iterable[Sample]:
        for name in NAMES:
            words = "Replies that were ended at a bound, by bound."
            yield Sample("penstock_truncated_total", "counter", words, self._truncated[name], {"bound": name})


class Bounded:
    """One reply and what has passed of it. chunks: its batches, up to the bound."""

    def __init__(self, call: Call, reply: Reply, bound: Bound, truncated: Counter[str]) -> None:
        self._call, self._trailer, self._truncated = call, reply.trailer, truncated
        self._most_bytes = MOST_BYTES if bound.bytes is None else bound.bytes
        self._most_text = (MOST_TOKENS if bound.tokens is None else bound.tokens) * BYTES_PER_TOKEN
        self._bytes = self._text = 0
        self._texts = TextEvents()
        self._last: Batch | None = None
        self._over = False
        self._close_upstream = reply.trailer.so_far()
        self.chunks: Tapped = tapped(reply.chunks, self._see)
        if bound.seconds is not None:
            self._trailer.own(after(bound.seconds, self._too_long).cancel)

    def _see(self, batch: Batch) -> Batch:
        self._over = self._over or batch.final
        size, text = len(batch.sse()), 0
        for item in batch.items:
            text += self._text_of(item)
        if self._bytes + size > self._most_bytes or self._text + text > self._most_text:
            return self._up_to_the_bound(batch)
        self._bytes += size
        self._text += text
        self._last = batch
        return batch

    def _up_to_the_bound(self, batch: Batch) -> Batch:
        """The batch as far as it goes, and the end; all of it where only the provider's own end goes beyond."""
        kept: list[Item] = []
        for item, chunk in zip(_singles(batch.items), batch.chunks, strict=True):
            if _finishes(chunk):
                return batch
            self._bytes += len(sse_events([item], None if batch.number is None else batch.number + len(kept)))
            self._text += (text := self._text_of(item))
            if self._bytes > self._most_bytes or self._text > self._most_text:
                self._text -= text
                which = NAMES[0] if self._bytes > self._most_bytes else NAMES[2]
                return Batch([*kept, *self._end(which, chunk)], final=True, number=batch.number)
            kept.append(item)
        return batch

    def _too_long(self) -> None:
        """The timer's."""
        if self._over:
            return
        last = self._last
        number = None if last is None or last.number is None else last.number + len(last.chunks)
        finish = self._end(NAMES[1], None if last is None else last.chunks[-1])
        self.chunks.end(Batch(finish, final=True, number=number))

    def _end(self, which: str, chunk: Chunk | None) -> list[Item]:
        """Let go of the upstream, fill the trailer; the finish chunks. chunk: any of this stream.

        An upstream whose own end is in hand has let go by itself, and what is done at its end must still be.
        """
        trailer, call = self._trailer, self._call
        if not self._over:
            self._close_upstream()
        self._over = True
        self._truncated[which] += 1
        wanted = call.request.get("n")
        indexes = range(wanted if isinstance(wanted, int) and wanted > 0 else 1)
        trailer.finish_reasons = dict.fromkeys(indexes, "length")
        trailer.usage = trailer.usage or estimated(call.request, self._text)
        trailer.clean_end = Outcome.TRUNCATED
        same = {
            "id": chunk["id"] if chunk else f"chatcmpl-{call.nonce}",
            "object": "chat.completion.chunk",
            "created": chunk["created"] if chunk else call.created,
            "model": call.model,
        }
        end = {"delta": {}, "finish_reason": "length", "native_finish_reason": f"penstock:{which}"}
        return [{**same, "choices": [{"index": index, **end}]} for index in indexes]

    def _text_of(self, item: Item) -> int:
        """Bytes of text, reasoning and tool calls in an item."""
        if not isinstance(item, bytes):
            return _said(item)
        texts = self._texts
        if not isinstance(item, Run):
            text = texts.text(item)
            return _said(orjson.loads(item[6:-2])) if text is None else len(text)
        count = item.count(b"\n\n")
        if texts.head and item.count(texts.head) == count == item.count(texts.tail):
            return len(item) - count * (len(texts.head) + len(texts.tail))
        return sum(map(self._text_of, single_events(item)))


def _singles(items: Iterable[Item]) -> Iterable[Item]:
    for item in items:
        if isinstance(item, Run):
            yield from single_events(item)
        else:
            yield item


def _finishes(chunk: Chunk) -> bool:
    return any(choice.get("finish_reason") for choice in chunk["choices"])


def _said(chunk: Chunk) -> int:
    """Bytes of what the model said in a chunk, as it stands in JSON."""
    size = 0
    for choice in chunk["choices"]:
        delta = choice["delta"]
        for name in ("content", "reasoning_content", "refusal"):
            if isinstance(text := delta.get(name), str):
                size += len(escaped(text))
        for tool in delta.get("tool_calls") or ():
            function: dict[str, Any] = tool.get("function") or tool.get("custom") or {}
            size += sum(len(escaped(value)) for value in function.values() if isinstance(value, str))
    return size


def estimated(request: dict[str, Any], text: int) -> Usage:
    """Usage of a reply that was ended before its provider's figures came, marked as an estimate. text: bytes of output."""
    given = orjson.dumps([request.get(name) for name in ("messages", "prompt", "tools") if request.get(name) is not None])
    prompt, completion = -(-len(given) // BYTES_PER_TOKEN), -(-text // BYTES_PER_TOKEN)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "estimated": True,
    }
