"""Reads one HTTP reply as it arrives, and says what is wrong with it.

Strategy: while bytes come in only their end is looked for; a whole reply is then taken apart once: status, HTTP framing, number
and text of the content chunks, finish reason, `[DONE]`. The first replies of a connection are besides parsed event by event,
which is too dear for all of them beside a gateway that does less.
The one rule: a reply counts only if nothing is wrong with it. No I/O and no clock here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import orjson

from bench import said

LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.I)
CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.I)
CONTENT = re.compile(rb'"content"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')
STOPPED = re.compile(rb'"finish_reason"\s*:\s*"stop"')
END = b"\r\n0\r\n\r\n"


class WrongReply(Exception):
    """Says what is wrong with a reply."""


@dataclass(frozen=True)
class Wanted:
    """What a reply must be: so many content chunks, paced or at once, streamed or whole. merged: maybe in fewer chunks."""

    count: int
    paced: bool = False
    whole: bool = False
    merged: bool = False


@dataclass
class Reply:
    """The reads of one reply. times: when each came, time.monotonic_ns(). head: empty until it is whole."""

    reads: list[bytes] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    head: bytes = b""
    size: int = 0
    _total: int | None = None
    _tail: bytes = b""

    def feed(self, received: bytes, now: int) -> bool:
        """Takes one read; whether the reply is at its end, by its own framing."""
        self.reads.append(received)
        self.times.append(now)
        self.size += len(received)
        if not self.head and not self._read_head():
            return False
        if self._total is not None:
            return self.size >= self._total
        self._tail = (self._tail + received)[-len(END) :]
        return self._tail == END and bool(CHUNKED.search(self.head))

    def _read_head(self) -> bool:
        raw = b"".join(self.reads)
        end = raw.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        self.head = raw[:end]
        if found := LENGTH.search(self.head):
            self._total = end + int(found[1])
        return True

    def body(self, *, partial: bool = False) -> bytes:
        """Without the HTTP framing. partial: as much as has come. Raises WrongReply."""
        raw = b"".join(self.reads)
        if not raw.startswith(b"HTTP/1.1 200"):
            raise WrongReply(f"not a 200: {raw[:400].decode('latin-1')}")
        raw = raw[len(self.head) :]
        if CHUNKED.search(self.head):
            return dechunked(raw, partial)
        if self._total is not None and self.size > self._total:
            raise WrongReply("bytes after its end")
        return raw

    @property
    def first(self) -> int:
        """When the first content came, not the first byte: a head or an empty delta answers nothing."""
        return next((at for read, at in zip(self.reads, self.times, strict=True) if b" token" in read), self.times[-1])

    def stamps(self) -> list[tuple[int, int]]:
        """(written by the provider, arrived here) of each stamped chunk that came in one piece; time.monotonic_ns()."""
        pairs = zip(self.reads, self.times, strict=True)
        return [(int(stamp, 16), at) for read, at in pairs for stamp in said.STAMP.findall(read)]


def dechunked(raw: bytes, partial: bool = False) -> bytes:
    """The body inside HTTP chunks. partial: it may break off anywhere. Raises WrongReply."""
    parts: list[bytes] = []
    at = 0
    while (line := raw.find(b"\r\n", at)) >= 0:
        try:
            size = int(raw[at:line].partition(b";")[0], 16)
        except ValueError:
            raise WrongReply(f"no HTTP chunk: {raw[at : at + 40]!r}") from None
        start, stop = line + 2, line + 2 + size
        if not size:
            if raw[start:] != b"\r\n":
                raise WrongReply("bytes after its end")
            return b"".join(parts)
        parts.append(raw[start:stop])
        if len(raw) < stop + 2:
            break
        if raw[stop : stop + 2] != b"\r\n":
            raise WrongReply("an HTTP chunk is longer than it says")
        at = stop + 2
    if not partial:
        raise WrongReply("the HTTP body breaks off")
    return b"".join(parts)


def check(reply: Reply, wanted: Wanted, *, thorough: bool = False) -> None:
    """A whole reply. thorough: every event parsed. Raises WrongReply."""
    body = reply.body()
    if wanted.whole:
        _check_whole(body, wanted)
        return
    if not body.rstrip().endswith(b"data: [DONE]"):
        raise WrongReply(f"does not end with [DONE]: {body[-200:]!r}")
    if fault := said.wrong(_parts(contents(body), wanted), wanted.count, wanted.paced):
        raise WrongReply(fault)
    if len(STOPPED.findall(body)) != 1:
        raise WrongReply("not exactly one finish reason `stop`")
    if thorough:
        _check_events(body, wanted)


def check_start(reply: Reply) -> None:
    """A paced reply that is still under way. Raises WrongReply."""
    parts = contents(reply.body(partial=True))
    if fault := said.wrong_start(parts) if parts else "no content":
        raise WrongReply(fault)


def contents(body: bytes) -> list[bytes]:
    """The content chunks of a stream; what is said needs no JSON escapes, so they are compared as they stand."""
    return [part for part in CONTENT.findall(body) if part]


def _parts(parts: list[bytes], wanted: Wanted) -> list[bytes]:
    return said.split(b"".join(parts)) if wanted.merged else parts


def _check_whole(body: bytes, wanted: Wanted) -> None:
    try:
        choice = orjson.loads(body)["choices"][0]
        content, reason = choice["message"]["content"], choice["finish_reason"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise WrongReply(f"not a completion: {body[:200]!r}") from None
    if content.encode() != said.text(wanted.count):
        raise WrongReply("the text is not what the provider said")
    if reason != "stop":
        raise WrongReply(f"finish reason {reason}")


def _check_events(body: bytes, wanted: Wanted) -> None:
    lines = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
    try:
        chunks = [orjson.loads(line) for line in lines if line != b"[DONE]"]
        parts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WrongReply("an event is not a completion chunk") from None
    if fault := said.wrong(_parts([part.encode() for part in parts if part], wanted), wanted.count, wanted.paced):
        raise WrongReply(fault)
