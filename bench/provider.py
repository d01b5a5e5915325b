"""A fake provider, as cheap as Python allows: OpenAI's chat completions, and Anthropic's messages at any path that ends so.

    python -m bench.provider PORT

Strategy: one asyncio protocol on uvloop. What does not change is made once and written in one piece; a paced stream is a timer
per chunk, kept to its schedule, without a task. Each event is an HTTP chunk of its own, as providers send them.
The one rule: what it says is `bench.said`'s. GET anything answers how many requests were served, so that a cache is seen.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import uvloop

from bench import said

STREAM = re.compile(rb'"stream"\s*:\s*true')
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.I)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"x-request-id: req_1\r\nTransfer-Encoding: chunked\r\n\r\n"
)
PLAIN_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@dataclass(frozen=True)
class Wire:
    """How an answer is written. before, after: events around the content, %d for the number of chunks; event: one content chunk;
    whole: the answer in one piece, with the text and the number of chunks."""

    before: tuple[bytes, ...]
    event: bytes
    after: tuple[bytes, ...]
    whole: bytes


_CHUNK = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
    b'"system_fingerprint":"fp_44709d6fcb",'
)
_CHOICE = _CHUNK + b'"choices":[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]}\n\n'
OPENAI = Wire(
    before=(_CHOICE % (b'{"role":"assistant","content":"","refusal":null}', b"null"),),
    event=_CHOICE.replace(b"%b", b'{"content":"%b"}', 1).replace(b'"finish_reason":%b', b'"finish_reason":null'),
    after=(
        _CHOICE % (b"{}", b'"stop"'),
        _CHUNK + b'"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":9}}\n\n',
        b"data: [DONE]\n\n",
    ),
    whole=(
        b'{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"bench","choices":[{"index":0,"message":'
        b'{"role":"assistant","content":"%b","refusal":null},"logprobs":null,"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":9}}'
    ),
)
ANTHROPIC = Wire(
    before=(
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_bench","type":"message","role":"assistant",'
        b'"model":"bench","content":[],"stop_reason":null,"stop_sequence":null,'
        b'"usage":{"input_tokens":9,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":1}}}\n\n',
        b"event: content_block_start\n"
        b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n',
        b'event: ping\ndata: {"type": "ping"}\n\n',
    ),
    event=(
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%b"}}\n\n'
    ),
    after=(
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n',
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        b'"usage":{"output_tokens":%d}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
    whole=(
        b'{"id":"msg_bench","type":"message","role":"assistant","model":"bench","content":[{"type":"text","text":"%b"}],'
        b'"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":9,"output_tokens":%d}}'
    ),
)


def frame(body: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def opening(wire: Wire) -> list[bytes]:
    return list(wire.before)


def ending(wire: Wire, count: int) -> list[bytes]:
    return [event % count if b"%d" in event else event for event in wire.after]


@cache
def at_once(wire: Wire, count: int) -> bytes:
    """A whole answer as a stream that leaves in one write, HTTP head included."""
    middle = [wire.event % said.word(number) for number in range(count)]
    return STREAM_HEAD + b"".join(map(frame, opening(wire) + middle + ending(wire, count))) + b"0\r\n\r\n"


@cache
def in_one_piece(wire: Wire, count: int) -> bytes:
    body = wire.whole % (said.text(count), count)
    return PLAIN_HEAD % len(body) + body


@dataclass
class Served:
    """How many calls were answered, by all connections together."""

    calls: int = 0


@dataclass
class Paced:
    """A stream under way: where it is, and when its next chunk is due (loop time, seconds)."""

    wire: Wire
    count: int
    delay: float
    due: float
    number: int = 0
    checksum: int = 0

    def next(self) -> bytes:
        """The content event that is due now, as an HTTP chunk."""
        if self.number == self.count - 1:
            words = said.seal(self.checksum)
        else:
            words = said.stamped(self.number, time.monotonic_ns())
            self.checksum = zlib.crc32(words, self.checksum)
        self.number += 1
        return frame(self.wire.event % words)


@dataclass
class Connection(asyncio.Protocol):
    """Answers one request after the other."""

    served: Served
    received: bytes = b""
    timer: asyncio.TimerHandle | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n") + 4) > 3:
            head = self.received[:end]
            if (stop := self._body_end(head, end)) is None:
                return
            body, self.received = self.received[end:stop], self.received[stop:]
            self._answer(head, body)

    def _body_end(self, head: bytes, end: int) -> int | None:
        """Where the request's body ends, or None while it is not whole."""
        if found := LENGTH.search(head):
            stop = end + int(found[1])
        elif b"chunked" in head.lower():
            stop = self.received.find(b"0\r\n\r\n", end) + 5
            if stop == 4:
                return None
        else:
            return end
        return stop if len(self.received) >= stop else None

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            # What peers ask a worker at start, in one answer.
            found = json.dumps(
                {"served": self.served.calls, "status": "ok", "object": "list", "data": [{"id": "bench"}]}
            ).encode()
            self.transport.write(PLAIN_HEAD % len(found) + found)
            return
        self.served.calls += 1
        wire = ANTHROPIC if head.split(b" ", 2)[1].endswith(b"/messages") else OPENAI
        model = said.MODEL.search(body)
        count, delay = (int(model[1]), int(model[2])) if model else (10, 0)
        if not STREAM.search(body):
            self.transport.write(in_one_piece(wire, count))
        elif not delay:
            self.transport.write(at_once(wire, count))
        else:
            stream = Paced(wire, count, delay / 1000, self.loop.time())
            self.transport.write(STREAM_HEAD + b"".join(map(frame, opening(wire))) + stream.next())
            self._later(stream)

    def _later(self, stream: Paced) -> None:
        stream.due += stream.delay
        self.timer = self.loop.call_at(stream.due, self._continue, stream)

    def _continue(self, stream: Paced) -> None:
        if stream.number < stream.count:
            self.transport.write(stream.next())
            self._later(stream)
        else:
            self.transport.write(b"".join(map(frame, ending(stream.wire, stream.count))) + b"0\r\n\r\n")


async def serve(port: int) -> None:
    served = Served()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(served), "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
