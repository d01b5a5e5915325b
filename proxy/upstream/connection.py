"""One connection to a provider: a request out, llhttp's events in, one response at a time.

Strategy: httptools parses in C and calls what was bound to it once: body pieces go to `list.append` and header fields to
`dict.setdefault` without a Python frame; what one read gave is joined once and handed on once. So 100 chunks in one read cost
what one costs, and little more.
The one rule: a connection goes back to the pool at the clean HTTP end of its response and at no other time; bytes that come
unasked, an end while nobody asks, anything odd closes it.

Framing: RFC 9112, 6.3. httptools has no call for "the bytes are over", so bodies until EOF are ended here.
"""

from __future__ import annotations

import asyncio
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from proxy.errors import GatewayError
from proxy.upstream.faults import broken, not_http, unanswered
from proxy.upstream.pool import Pool
from proxy.upstream.request import Origin
from proxy.upstream.response import HttpResponse

HEADER_LIMIT = 2**15  # bytes of framing (heads, trailers, chunk sizes) in a row without one byte of a body
JOINED_LIMIT = 2**16  # larger bodies are not copied behind their head
SWITCHING_PROTOCOLS = 101


class Connection(asyncio.Protocol):
    """A protocol of asyncio for `origin`. since: when it was last given to the pool, by the loop's clock."""

    __slots__ = (
        "_barren", "_begun", "_complete", "_fields", "_interim", "_keep", "_loop", "_parser", "_parts", "_paused", "_pool",
        "_response", "_transport", "_until_eof", "_waiting", "on_body", "on_header", "origin", "since",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool, origin: Origin) -> None:
        self._loop = loop
        self._pool = pool
        self.origin = origin
        self.since = 0.0
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[HttpResponse] | None = None
        self._response: HttpResponse | None = None
        self._parts: list[bytes] = []
        self._fields: dict[bytes, bytes] = {}
        self._paused = False
        # Of the request at hand; `ask` starts them anew. begun: a byte of its answer has come. interim: the head at hand is a
        # 1xx. keep: its connection may serve on. barren: bytes since the last one of a body.
        self._begun = self._complete = self._interim = self._keep = self._until_eof = False
        self._barren = 0
        # What the parser calls, by the names it looks for.
        self.on_body = self._parts.append
        self.on_header = self._fields.setdefault  # the first of several of one name counts
        self._parser: HttpResponseParser | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None

    @property
    def busy(self) -> bool:
        return self._waiting is not None or self._response is not None

    # Towards the provider

    def ask(self, head: bytes, body: bytes) -> asyncio.Future[HttpResponse]:
        """Send a request; the future is the response once its head is in. head: up to the value of Content-Length."""
        self._waiting = waiting = self._loop.create_future()
        self._begun = self._complete = self._interim = self._keep = self._until_eof = False
        self._barren = 0
        self._fields.clear()
        transport = self._transport
        if transport is None:
            self._fail(unanswered(begun=False))
        elif len(body) < JOINED_LIMIT:
            transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))
        else:
            transport.writelines((b"%b%d\r\n\r\n" % (head, len(body)), body))
        return waiting

    def pause(self) -> None:
        """Stop reading. Idempotent, like `resume`."""
        transport = self._transport
        if not self._paused and transport is not None and not transport.is_closing():
            self._paused = True
            transport.pause_reading()

    def resume(self) -> None:
        transport = self._transport
        if self._paused and transport is not None and not transport.is_closing():
            self._paused = False
            transport.resume_reading()

    def abort(self) -> None:
        """Close the socket at once, without a word to whoever waits for something from it. Idempotent."""
        self._waiting = self._response = None
        self._pool.forget(self)
        self.cut()

    def cut(self) -> None:
        """Close the socket at once; whoever waits for something from it learns that it broke."""
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = _parser(self)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if parser is None or (self._waiting is None and self._response is None):
            self.abort()
            return
        self._begun = True
        clean = True
        try:
            parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            clean = False
        parts = self._parts
        if parts:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            self._barren = 0
            if clean and self._waiting is None and not self._complete and self._response is not None:
                self._response.feed(body)  # in the middle of a body, as nearly always
                return
        else:
            body = b""
            self._barren += len(data)
        if self._response is not None:
            self._hand_on(self._response, body, clean)
        elif not clean or self._barren > HEADER_LIMIT:
            self._fail(not_http())

    def eof_received(self) -> None:
        """Nothing more will come. Only this makes an end clean: TLS that breaks off without a word could be anybody's doing, and
        uvloop does not call that an EOF (asyncio's own loop does)."""
        self._pool.forget(self)
        response = self._response
        if response is not None and self._until_eof and self._waiting is None:
            self._response = None
            response.end(b"", None)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = self._parser = None  # the parser and this refer to each other
        self._pool.left(self)
        self._fail(unanswered(self._begun) if self._waiting is not None else broken())

    # What the parser calls

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("a second response to one request")

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        self._interim = status < 200
        if self._interim:
            if status == SWITCHING_PROTOCOLS:
                raise ValueError("nobody asked for another protocol")
            self._fields.clear()
            return
        if sum(map(len, self._fields)) + sum(map(len, self._fields.values())) > HEADER_LIMIT:
            raise ValueError("too many header fields")
        # Latin-1 never fails, and gives back the bytes that came (RFC 9110, 5.5).
        fields = reversed(self._fields.items())
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in fields}
        coding = headers.get("transfer-encoding")
        sized = "content-length" in headers
        self._until_eof = not sized if coding is None else not coding.lower().rstrip().endswith("chunked")
        # A server that sends both may mean either: the coding counts, and the connection is not trusted again (RFC 9112, 6.3).
        self._keep = parser.should_keep_alive() and not (sized and coding is not None)
        self._response = HttpResponse(self, status, headers, self._loop)

    def on_message_complete(self) -> None:
        self._complete = not self._interim

    # Ends

    def _hand_on(self, response: HttpResponse, body: bytes, clean: bool) -> None:
        """What one read gave. The connection is let go first: what the receiver does then no longer concerns it."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            if waiting.done():  # cancelled: whoever asked is about to find out
                self.abort()
                return
            waiting.set_result(response)
            if response.over:  # it cannot be read
                self.abort()
                return
        if self._complete:
            self._let_go(keep=self._keep and clean)
            response.end(body, None)
        elif not clean or self._barren > HEADER_LIMIT:
            self._let_go(keep=False)
            response.end(body, broken() if not clean else not_http())
        elif body:
            response.feed(body)

    def _let_go(self, keep: bool) -> None:
        """Back to the pool, unless something speaks against it; an answer that overtook its request does too."""
        self._response = None
        transport = self._transport
        if transport is None:
            return
        if keep and not transport.is_closing() and not transport.get_write_buffer_size():
            self.resume()
            self._pool.give(self)
        else:
            self.abort()

    def _fail(self, error: GatewayError) -> None:
        """Close, and tell whoever waits for the head, or reads the body."""
        waiting, response = self._waiting, self._response
        self.abort()
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        elif response is not None and waiting is None:
            response.end(b"", error)


def _parser(connection: Connection) -> HttpResponseParser:
    """llhttp, strict but for three things that servers do: bare LF behind a line, spaces behind a chunk's size, and a length
    beside chunks, which then does not count (RFC 9112, 6.3)."""
    parser = HttpResponseParser(connection)
    parser.set_dangerous_leniencies(
        lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True, lenient_chunked_length=True
    )
    return parser
