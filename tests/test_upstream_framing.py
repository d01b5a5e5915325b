"""Responses byte by byte: the same body, status and end for every split into reads, pulled or pushed.

Strategy: a `Connection` between a made-up socket (an asyncio transport that remembers what was done to it) and a real pool, so
that a test decides what each network read gives.
The one rule: what a test feeds is what a provider could send; nothing of the connection's inside is touched.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import GatewayError, Malformed, UpstreamCut
from proxy.upstream.coding import PIECE, Inflater
from proxy.upstream.connection import HEADER_LIMIT, Connection
from proxy.upstream.pool import KEEP_SECONDS, Pool
from proxy.upstream.request import Origin
from proxy.upstream.response import HIGH_WATER, HttpResponse

ORIGIN = Origin(False, "provider.example", 80)
BODY = b"".join(b"data: %d\n\n" % number for number in range(12))


class Socket(asyncio.Transport):
    """A socket that takes everything. written: each write by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = self.paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


class Scene:
    """A connection that has been asked something."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pool = Pool(loop)
        self.socket = Socket()
        self.connection = Connection(loop, self.pool, ORIGIN)
        self.connection.connection_made(self.socket)
        self.pool.add(self.connection)
        self.ask()

    def ask(self) -> None:
        self.waiting = self.connection.ask(b"POST / HTTP/1.1\r\nContent-Length: ", b"{}")

    def feed(self, *reads: bytes) -> None:
        for data in reads:
            if not self.socket.aborted:
                self.connection.data_received(data)

    def lost(self, error: Exception | None = None) -> None:
        """FIN where there is no error, RST where there is one."""
        if error is None:
            self.connection.eof_received()
        self.connection.connection_lost(error)

    @property
    def response(self) -> HttpResponse:
        return self.waiting.result()

    @property
    def kept(self) -> bool:
        """Is the connection ready for the next request?"""
        taken = self.pool.take(ORIGIN)
        if taken is not None:
            self.pool.give(taken)
        return taken is self.connection and not self.socket.aborted and not self.socket.paused

    def pull(self) -> tuple[bytes, GatewayError | None]:
        """All that `read` gives, and the error it ends with."""

        async def all_of_it() -> tuple[bytes, GatewayError | None]:
            found = b""
            try:
                while data := await self.response.read():
                    found += data
            except GatewayError as error:
                return found, error
            return found, None

        return self.loop.run_until_complete(asyncio.wait_for(all_of_it(), 5))


class Listener:
    """What was pushed: `received` per call, `ends` in order."""

    def __init__(self, response: HttpResponse) -> None:
        self.received: list[bytes] = []
        self.ends: list[GatewayError | None] = []
        response.listen(self.received.append, self.ends.append)


@pytest.fixture
def scene() -> Iterator[Scene]:
    loop = asyncio.new_event_loop()
    yield Scene(loop)
    loop.close()


def head(*fields: str, status: int = 200, version: str = "1.1") -> bytes:
    return "\r\n".join([f"HTTP/{version} {status} X", *fields, "", ""]).encode()


def chunked(*pieces: bytes, trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"


@dataclass
class Framing:
    """What a provider may send. sent: a whole response. until_eof: FIN is its end. reusable: the connection stays."""

    sent: bytes
    body: bytes = BODY
    status: int = 200
    until_eof: bool = False
    reusable: bool = True


EVENTS = [BODY[start : start + 9] for start in range(0, len(BODY), 9)]
CHUNKED = "Transfer-Encoding: chunked"
FRAMINGS = {
    "chunked": Framing(head(CHUNKED) + chunked(*EVENTS)),
    "chunked with trailers": Framing(head(CHUNKED, "Trailer: X-A") + chunked(*EVENTS, trailers=b"X-A: 1\r\nX-B: 2\r\n")),
    "chunk extensions": Framing(head(CHUNKED) + b"%x;a=b\r\n%b\r\n0;c\r\n\r\n" % (len(BODY), BODY)),
    "a length": Framing(head(f"Content-Length: {len(BODY)}") + BODY),
    "no body": Framing(head("Content-Length: 0"), body=b""),
    "until EOF": Framing(head("Content-Type: text/event-stream") + BODY, until_eof=True, reusable=False),
    "HTTP/1.0": Framing(head(f"Content-Length: {len(BODY)}", version="1.0") + BODY, reusable=False),
    "HTTP/1.0 keep-alive": Framing(head(f"Content-Length: {len(BODY)}", "Connection: keep-alive", version="1.0") + BODY),
    "close": Framing(head(CHUNKED, "Connection: close") + chunked(*EVENTS), reusable=False),
    "length and chunks": Framing(head("Content-Length: 3", CHUNKED) + chunked(*EVENTS), reusable=False),
    "behind 100 and 103": Framing(
        head(status=100) + head("Link: </x>; rel=preload", "Content-Length: 7", status=103) + head(CHUNKED) + chunked(*EVENTS)
    ),
    "204": Framing(head(status=204), body=b"", status=204),
    "304 with a length": Framing(head("Content-Length: 99", status=304), body=b"", status=304),
    "204 with a length": Framing(head("Content-Length: 99", status=204), body=b"", status=204),
    "304 with chunks": Framing(head(CHUNKED, status=304), body=b"", status=304),
    "an error": Framing(head(CHUNKED, status=429) + chunked(*EVENTS), status=429),
    "gzip": Framing(head(CHUNKED, "Content-Encoding: gzip") + chunked(*[bytes([b]) for b in gzip.compress(BODY)])),
    "gzip of two members": Framing(
        head(CHUNKED, "Content-Encoding: x-gzip") + chunked(gzip.compress(BODY[:50]) + gzip.compress(BODY[50:]))
    ),
    "deflate": Framing(head(CHUNKED, "Content-Encoding: deflate") + chunked(zlib.compress(BODY))),
    "bare deflate": Framing(head(CHUNKED, "Content-Encoding: deflate") + chunked(zlib.compress(BODY, wbits=-15))),
    "identity": Framing(head(CHUNKED, "Content-Encoding: identity") + chunked(*EVENTS)),
}
framings = pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS)


def split(data: bytes, at: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({edge % len(data) for edge in at} - {0}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def splits() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 10**6), max_size=12)


@framings
@given(at=splits(), pushed_from=st.integers(0, 12))
def test_any_split_gives_the_same_status_body_and_end(framing: Framing, at: list[int], pushed_from: int) -> None:
    """Pulled, and pushed from any read on; and the connection stays where it may."""
    loop = asyncio.new_event_loop()
    try:
        pulled, pushed = Scene(loop), Scene(loop)
        listener = None
        for number, data in enumerate(split(framing.sent, at)):
            pulled.feed(data)
            pushed.feed(data)
            if listener is None and pushed.waiting.done() and number >= pushed_from:
                listener = Listener(pushed.response)
        for scene in (pulled, pushed):
            assert scene.kept is framing.reusable
            assert scene.response.status == framing.status
            if framing.until_eof:
                assert scene.connection.busy
                scene.lost()
        listener = listener or Listener(pushed.response)
        assert pulled.pull() == (framing.body, None)
        assert (b"".join(listener.received), listener.ends) == (framing.body, [None])
        assert all(listener.received), "no empty pieces"
    finally:
        loop.close()


@framings
def test_one_byte_per_read(framing: Framing, scene: Scene) -> None:
    scene.feed(*(bytes([byte]) for byte in framing.sent))
    if framing.until_eof:
        scene.lost()
    assert scene.pull() == (framing.body, None)
    assert scene.kept is framing.reusable


@framings
@pytest.mark.parametrize("reset", [None, ConnectionResetError()], ids=["fin", "rst"])
def test_a_response_cut_anywhere_gives_what_came_and_never_a_clean_end(
    framing: Framing, reset: Exception | None, scene: Scene
) -> None:
    whole_at = len(framing.sent) if framing.until_eof else len(framing.sent) - 1
    for cut in range(len(framing.sent)):
        scene = Scene(scene.loop)
        scene.feed(framing.sent[:cut])
        if not scene.connection.busy:
            assert cut >= whole_at, "only the last byte makes it whole"
            continue
        scene.lost(reset)
        if not scene.waiting.done() or scene.waiting.exception() is not None:
            assert isinstance(scene.waiting.exception(), UpstreamCut)
            continue
        body, error = scene.pull()
        assert framing.body.startswith(body)
        if framing.until_eof and reset is None:
            assert (body, error) == (framing.body[: len(body)], None), "where EOF is the end, FIN is clean"
        else:
            assert isinstance(error, UpstreamCut)


def test_a_hundred_chunks_in_one_read_are_received_at_once_and_their_end_behind_them(scene: Scene) -> None:
    scene.feed(head(CHUNKED))
    listener = Listener(scene.response)
    scene.feed(chunked(*[b"data: x\n\n"] * 100))
    assert (listener.received, listener.ends) == ([b"data: x\n\n" * 100], [None])


def test_headers_are_found_by_their_names_in_lower_case_and_the_first_of_several_counts(scene: Scene) -> None:
    scene.feed(head("X-RateLimit-Remaining: 7", "Retry-After: 1", "retry-after: 2", "Content-Length: 0"))
    assert scene.response.headers == {"x-ratelimit-remaining": "7", "retry-after": "1", "content-length": "0"}


def test_trailers_are_no_headers_of_this_response_or_the_next(scene: Scene) -> None:
    scene.feed(head(CHUNKED) + chunked(b"x", trailers=b"X-Late: 1\r\n"))
    assert "x-late" not in scene.response.headers
    scene.ask()
    scene.feed(head("Content-Length: 0"))
    assert scene.response.headers == {"content-length": "0"}


# What is not HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        head("Content-Length: x"),
        head("Content-Length: 1", "Content-Length: 2"),
        head("Upgrade: h2c", "Connection: upgrade", status=101),
        head(status=101),
        head("X: \x00"),
        head("X: " + "x" * HEADER_LIMIT),
        head(*[f"X-{number}: {'x' * 50}" for number in range(600)]),
    ],
)
def test_what_is_not_http_as_it_should_be_is_malformed(sent: bytes, scene: Scene) -> None:
    scene.feed(sent)
    assert isinstance(scene.waiting.exception(), Malformed)
    assert scene.socket.aborted


@pytest.mark.parametrize(
    ("first", "endless"),
    [
        (b"HTTP/1.1 200 ", b"x" * 100),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 100),
        (b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 95 + b"\r\n"),
        (b"", head(status=100)),
        (head(CHUNKED) + b"1\r\nx\r\n0\r\n", b"X: " + b"x" * 95 + b"\r\n"),
        (head(CHUNKED) + b"1\r\nx\r\n0\r\nX: ", b"x" * 100),
        (head(CHUNKED) + b"1\r\nx\r\n1;", b"x" * 100),
    ],
)
def test_framing_without_end_is_malformed_and_not_kept(first: bytes, endless: bytes, scene: Scene) -> None:
    scene.feed(first)
    for fed in range(0, 2 * HEADER_LIMIT, len(endless)):  # noqa: B007
        scene.feed(endless)
        if scene.socket.aborted:
            break
    assert fed <= HEADER_LIMIT + 200
    error = scene.waiting.exception()
    if error is None:
        body, error = scene.pull()
        assert body == b"x"
    assert isinstance(error, Malformed)


def test_broken_chunks_end_the_body_behind_what_came(scene: Scene) -> None:
    scene.feed(head(CHUNKED) + b"3\r\nabc\r\noops\r\n")
    body, error = scene.pull()
    assert (body, type(error), scene.socket.aborted) == (b"abc", UpstreamCut, True)


@pytest.mark.parametrize("surplus", [b"x", head("Content-Length: 3") + b"abc", b"\x00"])
@pytest.mark.parametrize("together", [True, False])
def test_bytes_behind_a_response_are_not_of_it_and_close_the_connection(surplus: bytes, together: bool, scene: Scene) -> None:
    """The next request would take them for its answer."""
    answer = head(CHUNKED) + chunked(b"abc")
    scene.feed(answer + surplus) if together else scene.feed(answer, surplus)
    assert scene.pull() == (b"abc", None)
    assert scene.socket.aborted
    assert not scene.kept


# Compressed bodies


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, br", "compress"])
def test_an_unknown_coding_is_named_and_the_status_kept(coding: str, scene: Scene) -> None:
    scene.feed(head(CHUNKED, f"Content-Encoding: {coding}", status=429) + chunked(b"abc"))
    assert scene.response.status == 429
    body, error = scene.pull()
    assert (body, type(error)) == (b"", Malformed)
    assert coding in str(error)


@pytest.mark.parametrize(
    "sent", [gzip.compress(BODY)[:-9], b"no gzip at all", gzip.compress(BODY) + b"more"], ids=["cut", "none", "more"]
)
@pytest.mark.parametrize("pushed", [True, False])
def test_what_does_not_unpack_is_malformed(sent: bytes, pushed: bool, scene: Scene) -> None:
    scene.feed(head(CHUNKED, "Content-Encoding: gzip"))
    listener = Listener(scene.response) if pushed else None
    scene.feed(chunked(sent))
    if listener is not None:
        (error,) = listener.ends
    else:
        _, error = scene.pull()
    assert isinstance(error, Malformed)
    assert "could not be decompressed" in error.message


def test_an_empty_body_under_gzip_is_empty(scene: Scene) -> None:
    scene.feed(head("Content-Length: 0", "Content-Encoding: gzip"))
    assert scene.pull() == (b"", None)


def test_a_bomb_unpacks_in_pieces_and_only_as_long_as_they_are_taken(scene: Scene) -> None:
    """32 MiB out of 32 KB: held back, none of it is unpacked, and its end is not told before."""
    size = 32 * 2**20
    scene.feed(head(CHUNKED, "Content-Encoding: gzip"))
    sizes: list[int] = []
    ends: list[GatewayError | None] = []

    def receive(data: bytes) -> None:
        sizes.append(len(data))
        if len(sizes) == 3:
            scene.response.pause()

    scene.response.listen(receive, ends.append)
    scene.feed(chunked(gzip.compress(b"x" * size)))
    assert (sizes, ends) == ([PIECE] * 3, [])
    scene.response.resume()
    assert (sum(sizes), max(sizes), ends) == (size, PIECE, [None])


@given(st.binary(max_size=2000), st.lists(st.integers(0, 10**6), max_size=8))
def test_the_inflater_gives_back_what_was_packed(data: bytes, at: list[int]) -> None:
    inflater, found = Inflater("gzip"), b""
    for piece in split(gzip.compress(data), at):
        inflater.feed(piece)
        while taken := inflater.take():
            found += taken
        assert inflater.drained
    assert (found, inflater.complete) == (data, True)


# Listeners


def test_a_listener_gets_what_is_buffered_and_an_end_that_has_come_inside_listen(scene: Scene) -> None:
    scene.feed(head(CHUNKED), b"3\r\nabc\r\n", b"3\r\ndef\r\n")
    listener = Listener(scene.response)
    assert (listener.received, listener.ends) == ([b"abcdef"], [])
    scene.feed(b"0\r\n\r\n")
    assert listener.ends == [None]


def test_a_listener_of_a_broken_body_gets_what_came_and_then_why(scene: Scene) -> None:
    scene.feed(head(CHUNKED), b"3\r\nabc\r\n")
    scene.lost()
    listener = Listener(scene.response)
    assert listener.received == [b"abc"]
    assert [type(end) for end in listener.ends] == [UpstreamCut]


@pytest.mark.parametrize("rest", [b"3\r\ndef\r\n", b"3\r\ndef\r\n0\r\n\r\n"])
def test_nothing_is_called_after_close(rest: bytes, scene: Scene) -> None:
    """Also where it is the receiver that closes, with the end in the same read."""
    received: list[bytes] = []
    ends: list[GatewayError | None] = []

    def receive(data: bytes) -> None:
        received.append(data)
        scene.response.close()

    scene.feed(head(CHUNKED))
    scene.response.listen(receive, ends.append)
    scene.feed(rest, rest)
    if scene.connection.busy or scene.socket.aborted:
        scene.lost(ConnectionResetError())
    assert (received, ends) == ([b"def"], [])


def test_a_listener_that_pauses_stops_the_socket_and_goes_on_where_it_was(scene: Scene) -> None:
    scene.feed(head(CHUNKED))
    listener = Listener(scene.response)
    for _ in range(2):
        scene.response.pause()
    scene.feed(b"3\r\nabc\r\n")
    assert (listener.received, scene.socket.paused) == ([], False), "a short rest may still come"
    much = b"x" * HIGH_WATER
    scene.feed(b"%x\r\n%b\r\n" % (len(much), much))
    assert (listener.received, scene.socket.paused) == ([], True)
    for _ in range(2):
        scene.response.resume()
    assert (listener.received, scene.socket.paused) == ([b"abc" + much], False)


def test_a_listener_that_pauses_inside_receive_is_told_the_end_and_the_socket_is_free(scene: Scene) -> None:
    ends: list[GatewayError | None] = []
    scene.feed(head(CHUNKED))
    scene.response.listen(lambda data: scene.response.pause(), ends.append)
    scene.feed(b"3\r\nabc\r\n")
    scene.feed(b"3\r\nabc\r\n0\r\n\r\n")
    assert (ends, scene.kept) == ([], True)
    scene.response.resume()
    assert ends == [None]


def test_pausing_and_resuming_inside_receive_keeps_the_order(scene: Scene) -> None:
    told: list[object] = []

    def receive(data: bytes) -> None:
        scene.response.pause()
        scene.response.resume()
        told.append(data)

    scene.feed(head(CHUNKED))
    scene.response.listen(receive, told.append)
    scene.feed(b"3\r\nabc\r\n0\r\n\r\n")
    assert told == [b"abc", None]


# Pulling


def test_a_body_that_nobody_reads_stops_the_socket_until_it_is_read(scene: Scene) -> None:
    scene.feed(head(CHUNKED))
    piece = b"4000\r\n%b\r\n" % (b"x" * 2**14)
    fed = 0
    while not scene.socket.paused:
        scene.feed(piece)
        fed += 2**14
    assert fed == HIGH_WATER + 2**14
    data = scene.loop.run_until_complete(scene.response.read())
    assert (len(data), scene.socket.paused) == (fed, False)


def test_an_end_behind_a_stopped_socket_frees_it_for_the_next_request(scene: Scene) -> None:
    size = HIGH_WATER + 2
    scene.feed(head(f"Content-Length: {size}") + b"x" * (size - 1), b"x")
    assert scene.kept
    assert scene.pull() == (b"x" * size, None)


def test_a_reader_that_waits_is_told_of_a_close_and_so_is_every_later_one(scene: Scene) -> None:
    scene.feed(head(CHUNKED))

    async def closed_meanwhile() -> None:
        for _ in range(2):
            reading = asyncio.ensure_future(scene.response.read())
            await asyncio.sleep(0)
            scene.response.close()
            with pytest.raises(UpstreamCut):
                await reading

    scene.loop.run_until_complete(closed_meanwhile())
    assert scene.socket.aborted


def test_a_reader_that_stops_waiting_loses_nothing(scene: Scene) -> None:
    scene.feed(head(CHUNKED))

    async def cancelled_as_it_comes() -> bytes:
        reading = asyncio.ensure_future(scene.response.read())
        await asyncio.sleep(0)
        scene.feed(b"3\r\nabc\r\n")
        reading.cancel()
        await asyncio.wait([reading])
        return await scene.response.read()

    assert scene.loop.run_until_complete(cancelled_as_it_comes()) == b"abc"


# The connection's next request


def test_closing_a_response_that_has_ended_leaves_the_connection_to_the_next_one(scene: Scene) -> None:
    scene.feed(head(CHUNKED) + chunked(b"abc"))
    ended = scene.response
    assert scene.kept
    scene.ask()
    ended.done()
    ended.close()
    scene.feed(head(CHUNKED) + chunked(b"def"))
    assert not scene.socket.aborted
    assert scene.pull() == (b"def", None)


def test_head_and_body_are_one_write(scene: Scene) -> None:
    assert scene.socket.written == [b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"]


def test_an_idle_connection_that_hears_something_is_closed(scene: Scene) -> None:
    scene.feed(head("Content-Length: 0"))
    assert scene.kept
    scene.feed(b"HTTP/1.1 408 Request Timeout\r\n")
    assert scene.socket.aborted
    assert not scene.kept


def test_done_sets_a_timer_only_where_the_http_end_is_missing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[asyncio.TimerHandle] = []
    later = scene.loop.call_later

    def counted(*args: object) -> asyncio.TimerHandle:
        timers.append(later(*args))  # type: ignore[arg-type]
        return timers[-1]

    scene.feed(head(CHUNKED) + chunked(b"abc"))
    monkeypatch.setattr(scene.loop, "call_later", counted)
    scene.response.done()
    assert timers == []
    scene.ask()
    scene.feed(head(CHUNKED) + b"3\r\nabc\r\n")
    scene.response.done()
    scene.response.done()
    assert len(timers) == 1
    scene.feed(b"0\r\n\r\n")
    assert timers[0].cancelled()
    assert scene.kept


# The pool


class Clock:
    """Stands in for the loop: time moves when the test says so. timers: (when, what) of all that were set."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, what: Callable[[], None]) -> asyncio.TimerHandle:
        self.timers.append((when, what))
        return cast(asyncio.TimerHandle, object())

    def call_later(self, delay: float, what: Callable[[], None]) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, what)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer not in due]
        for _, what in due:
            what()


def idle(pool: Pool, origin: Origin = ORIGIN) -> tuple[Connection, Socket]:
    """A connection that has just been given to the pool."""
    found, sock = Connection(cast(asyncio.AbstractEventLoop, None), pool, origin), Socket()
    found.connection_made(sock)
    pool.add(found)
    pool.give(found)
    return found, sock


def test_the_connection_given_last_is_taken_first_and_only_for_its_own_origin() -> None:
    pool = Pool(cast(asyncio.AbstractEventLoop, Clock()))
    first, second, other = (idle(pool, origin)[0] for origin in (ORIGIN, ORIGIN, Origin(True, "provider.example", 443)))
    assert [pool.take(ORIGIN) for _ in range(3)] == [second, first, None]
    assert pool.take(other.origin) is other


def test_what_waits_too_long_is_closed_by_the_one_timer_that_there_is() -> None:
    """However many wait; the younger ones go later, and with the last one the timer."""
    clock = Clock()
    pool = Pool(cast(asyncio.AbstractEventLoop, clock))
    sockets = []
    for _ in range(3):
        sockets += [idle(pool)[1], idle(pool, ORIGIN._replace(port=81))[1]]
        assert len(clock.timers) == 1
        clock.passes(KEEP_SECONDS / 4)
    closed = []
    for _ in range(8):
        clock.passes(KEEP_SECONDS / 8 + 0.01)
        closed.append(sum(sock.aborted for sock in sockets))
        assert len(clock.timers) == (closed[-1] < 6)
    assert closed == [0, 2, 2, 4, 4, 6, 6, 6]
    idle(pool)
    assert len(clock.timers) == 1
