"""One structured log line per request: who asked for what, who answered after which attempts, what it used, how it ended.

Cost: around the head, and one callback at the end (3.3 us with the line); nothing per chunk, unless replies are logged.
The one rule: keys never appear in it, and prompts and replies only where the operator switched `log_content` on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import structlog

from proxy.call import Call, altered
from proxy.errors import STATUSES, GatewayError, Outcome, why_cancelled
from proxy.estimate import estimated_usage
from proxy.own_fields import Field, OwnFields
from proxy.pipeline import Handler
from proxy.reply import Batch, Reply, Trailer, Try, tapped
from proxy.units import Between, ByteSize

Json = dict[str, Any]

# OpenAI's own bounds of metadata: https://platform.openai.com/docs/api-reference/chat/create
MOST_METADATA = 16
LONGEST_VALUE = 512
LONGEST_ID = 128
# What the client was told, or would have been, where no error says it; 499 is nginx's for a client that has left.
NOT_ASKED = frozenset({Outcome.REFUSED, Outcome.LIMITED, Outcome.BLOCKED})
REPLAYED = frozenset({"hit", "joined"})
# Where a usage object has what the line tells of it.
TOKENS = (
    (None, "prompt_tokens"),
    (None, "completion_tokens"),
    ("prompt_tokens_details", "cached_tokens"),
    ("completion_tokens_details", "reasoning_tokens"),
)


@dataclass(frozen=True, slots=True)
class Noted:
    """What the client says of its request, for the log alone. metadata: of plain values, bounded."""

    thread: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> Json:
        """What of it there is, under the names it has in the line."""
        found = {"thread": self.thread, "tags": self.tags or None, "metadata": self.metadata or None}
        return {name: value for name, value in found.items() if value is not None}


class Tracking:
    """Logs each call when it has ended, however it ended, and tells the client its tracking name (`X-Penstock-Name`).

    log_content: also the request's messages and the reply's text, each at most `max_content_bytes`. clock: seconds, monotonic.
    """

    FIELDS = ("thread",)

    def __init__(
        self, *, log_content: bool = False, max_content_bytes: Annotated[ByteSize, Between(1, 2**24)] = 16 * 2**10
    ) -> None:
        self._log = _logger()
        self._most = max_content_bytes if log_content else 0
        self.clock: Callable[[], float] = time.perf_counter

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Notes `thread: {id, tags}` and `metadata`. Raises Refused where they have another shape."""
        thread, metadata = own.get("thread"), own.get("metadata")
        if thread is None and metadata is None:
            return call
        found = Noted(*_thread(thread), _metadata(metadata))
        return altered(call, extensions={**call.extensions, Noted: found})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        started = self.clock()
        try:
            reply = await next(call)
        except GatewayError as error:
            line = self._line(call, started, error.outcome, error.status)
            self._write(call, {**line, "code": error.code, **_asked(call, error)})
            raise
        except asyncio.CancelledError as error:
            outcome = why_cancelled(error)
            self._write(call, self._line(call, started, outcome, STATUSES.get(outcome, 499)))
            raise
        except Exception:
            self._write(call, self._line(call, started, Outcome.GATEWAY_ERROR, 500))
            raise
        first, text = self.clock() - started, None
        if self._most:
            text = _Text(self._most)
            reply = altered(reply, chunks=tapped(reply.chunks, text.see))
        reply.trailer.on_end(lambda trailer: self._ended(call, started, first, reply, trailer, text))
        return _named(reply, call.name) if call.name else reply

    def _ended(self, call: Call, started: float, first: float, reply: Reply, trailer: Trailer, text: _Text | None) -> None:
        head, error = reply.head, trailer.error
        outcome = trailer.outcome or Outcome.GATEWAY_ERROR
        streamed = call.stream and call.kind != "embeddings"
        status = 200 if streamed else error.status if error else STATUSES.get(outcome, 500)
        line = self._line(call, started, outcome, status)
        line["target"] = head.target
        line["attempts"] = len(head.tries) + 1
        if head.tries:
            line["tries"] = _tried(head.tries)
        if head.cache is not None:
            line["cache"] = head.cache
        line["first_chunk_ms"] = _ms(first)
        if streamed:
            line["longest_gap_ms"] = _ms(trailer.longest_gap)
        if trailer.switches:
            line["switches"] = [
                {"from": one.source, "to": one.target, "reason": one.reason, "at": one.at} for one in trailer.switches
            ]
        line["finish_reasons"] = list(trailer.finish_reasons.values())
        source = trailer.source or trailer
        if source.outcome is None and head.cache != "joined":
            source.on_end(lambda source: self._used(call, head.target, source))
        else:
            _count(line, call, trailer if head.cache in REPLAYED else source)
        if error is not None:
            line["code"] = error.code
        if text is not None:
            line["reply"] = text.found()
        self._write(call, line)

    def outlived(self, call: Call, reply: Reply) -> None:
        """A reply is read on whose client, and its line, are gone."""
        if reply.head.cache not in REPLAYED:
            source = reply.trailer.source or reply.trailer
            source.on_end(lambda source: self._used(call, reply.head.target, source))

    def _used(self, call: Call, target: str, source: Trailer) -> None:
        """A second line, for what a reply used that was read on after its client had left."""
        line: Json = {"id": call.id, "key": call.principal.name, "model": call.model, "target": target}
        if call.name is not None:
            line["name"] = call.name
        line["ended"] = (source.outcome or Outcome.GATEWAY_ERROR).value
        _count(line, call, source)
        line["event"] = "usage"
        self._log(line)

    def _line(self, call: Call, started: float, outcome: Outcome, status: int) -> Json:
        """What every line says. Nothing is put in that is not known, rather than taken out afterwards (0.8 us per line)."""
        line: Json = {"id": call.id, "key": call.principal.name, "kind": call.kind, "model": call.model}
        if (route := call.route.name) is not None:
            line["route"] = route
        if call.name is not None:
            line["name"] = call.name
        if call.identity is not None:
            line["identity"] = call.identity
        if (noted := call.extension(Noted)) is not None:
            line |= noted.facts()
        line["stream"] = call.stream
        line["outcome"] = outcome.value
        line["status"] = status
        line["total_ms"] = _ms(self.clock() - started)
        return line

    def _write(self, call: Call, line: Json) -> None:
        if self._most and (said := call.request.get("messages") or call.request.get("prompt")) is not None:
            line["messages"] = _bounded(said, self._most)
        line["event"] = "request"
        self._log(line)


def _logger() -> Callable[[Json], None]:
    """Where lines go, bound once: a lazy logger looks itself up for each (0.7 us). What takes a whole line gets it as it is."""
    log: Any = structlog.get_logger("penstock.request").bind()
    whole: Callable[[Json], None] | None = getattr(log, "whole", None)
    return whole or (lambda line: log.info(**line))


class _Text:
    """The text of a reply as it flows past, by choice, at most `most` bytes in all."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._parts: dict[int, list[str]] = {}

    def see(self, batch: Batch) -> Batch:
        if self._left > 0:
            self._look(batch)
        return batch

    def found(self) -> list[str]:
        return ["".join(self._parts[index]) for index in sorted(self._parts)]

    def _look(self, batch: Batch) -> None:
        for chunk in batch.chunks:
            for choice in chunk.get("choices", ()):
                said = (choice.get("delta") or choice.get("message") or {}).get("content")
                if isinstance(said, str) and self._left > 0:
                    written = said.encode(errors="replace")
                    self._parts.setdefault(choice["index"], []).append(_cut(written, self._left))
                    self._left -= len(written)


def _bounded(content: Any, most: int) -> Any:
    """The content as it is, or the beginning of its JSON where that is longer than `most` bytes."""
    written = orjson.dumps(content)
    return content if len(written) <= most else _cut(written, most)


def _cut(text: bytes, most: int) -> str:
    """At most `most` bytes, no character cut in two."""
    return text[:most].decode(errors="ignore")


def _thread(found: Field | None) -> tuple[str | None, tuple[str, ...]]:
    if found is None:
        return None, ()
    name, tags = found.get("id"), found.get("tags")
    return name.text(LONGEST_ID) if name else None, tuple(tag.text(LONGEST_ID) for tag in tags.items()) if tags else ()


def _metadata(found: Field | None) -> Mapping[str, Any]:
    """The first plain values, texts cut to length; the provider may take more, a log need not."""
    if found is None:
        return {}
    plain = ((name, value) for name, value in found.object().value.items() if isinstance(value, str | int | float))
    pairs = [(name[:LONGEST_ID], value[:LONGEST_VALUE] if isinstance(value, str) else value) for name, value in plain]
    return dict(pairs[:MOST_METADATA])


def _ms(seconds: float) -> float:
    """Milliseconds to a tenth; what `round` takes 0.25 us for."""
    return int(seconds * 10_000 + 0.5) / 10


def _tried(tries: Sequence[Try]) -> list[Json]:
    """The attempts that failed, and why."""
    return [{"target": one.target, "reason": one.reason, "ms": _ms(one.seconds)} for one in tries]


def _asked(call: Call, error: GatewayError) -> Json:
    """How often it was tried before an error, and who was asked last, unless nobody was."""
    if error.tries:
        return {"attempts": len(error.tries), "tries": _tried(error.tries), "target": error.tries[-1].target}
    target = call.target or next(iter(call.targets), None)
    return {} if target is None or error.outcome in NOT_ASKED else {"target": str(target), "attempts": 1}


def _count(line: Json, call: Call, trailer: Trailer) -> None:
    """The provider's figures, where it gave them, or an estimate that says so; nothing where nothing is known."""
    usage = trailer.usage
    if not usage:
        if (usage := estimated_usage(call, trailer)) is None:
            return
        line["usage_estimated"] = True
    for place, name in TOKENS:
        found = usage.get(name) if place is None else usage[place].get(name) if isinstance(usage.get(place), dict) else None
        if found is not None:
            line[name] = found


def _named(reply: Reply, name: str) -> Reply:
    """The reply with its name in a header; what a header cannot carry is percent-encoded."""
    safe = name if name.isascii() and name.isprintable() else quote(name, errors="replace")
    return altered(reply, head=altered(reply.head, headers={**reply.head.headers, "X-Penstock-Name": safe}))
