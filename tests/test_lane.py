"""The short way in: what it takes it reads as aiohttp does, and what it does not take is aiohttp's.

Strategy: heads, usual and odd, are read by a lane and by aiohttp's own parser, and the readings are compared; then connections
are driven by hand, byte by byte, against a transport that notes what happens to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.delivery import Response
from proxy.http import Request
from proxy.lane import HELD_LIMIT, KEEP_ALIVE_SECONDS, Lane

POST = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


class Wire:
    """A transport that notes what is done to it."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = self.aborted = self.paused = self.finished = False
        self.queued = 0
        self.protocol: Any = None

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def get_write_buffer_size(self) -> int:
        return self.queued

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.finished = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol


class Other(asyncio.Protocol):
    """In aiohttp's place: notes what it is given."""

    def __init__(self) -> None:
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data


class Scene:
    """A lane on a wire. handled: the requests, with their bodies where `wants_body`; `gate` holds the answers back."""

    def __init__(self) -> None:
        self.wire, self.other = Wire(), Other()
        self.handled: list[tuple[str, str, bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.wants_body = True
        self.answer = Response(200, b"ok")
        self.lanes: set[Lane] = set()
        self.lane = Lane(self.handle, lambda: self.other, self.lanes)
        self.lane.connection_made(self.wire)  # type: ignore[arg-type]

    async def handle(self, request: Request) -> None:
        body = await request.body(1000, 5) if self.wants_body else b""
        await self.gate.wait()
        self.handled.append((request.method, request.path, body))
        request.delivery.whole(self.answer)

    async def feed(self, *parts: bytes) -> None:
        for part in parts:
            self.lane.data_received(part)
            for _ in range(4):
                await asyncio.sleep(0)

    @property
    def answers(self) -> int:
        return self.wire.written.count(b"HTTP/1.1 ")


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    yield made
    made.lane.connection_lost(None)


TOKEN = st.text("abcXYZ0189-_.!~", min_size=1, max_size=8)
VALUE = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\x00"), max_size=12)
NAMES = ["Host", "Content-Length", "Connection", "Transfer-Encoding", "Content-Type", "Expect", "Upgrade", "host", "X-A"]
FIELD = st.tuples(
    st.sampled_from(NAMES) | TOKEN, st.sampled_from(["", " ", "\t"]), VALUE | st.sampled_from(["5", "close", "chunked", "a"])
)
LINE = st.sampled_from([
    "POST /v1/x HTTP/1.1", "GET /a?b=%20c HTTP/1.1", "GET * HTTP/1.1", "POST http://h/x HTTP/1.1", "get /x HTTP/1.1",
    "POST /x HTTP/1.0", "POST /é HTTP/1.1", "POST  /x HTTP/1.1", "POST /x HTTP/1.1 ",
])  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(LINE, st.lists(FIELD, max_size=6), st.sampled_from(["\r\n", "\n", "\r"]), st.booleans())
async def test_what_is_taken_is_read_as_aiohttp_reads_it(
    line: str, fields: list[tuple[str, str, str]], end: str, host: bool
) -> None:
    """Method, path, and every field; or it is not taken."""
    lines = [line, *(["Host: h"] if host else []), *(f"{name}:{space}{value}" for name, space, value in fields)]
    head = (end.join(lines) + end + end).encode("latin-1")
    lane = Scene().lane
    request = lane._read(head)
    if request is None:
        return
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16, max_line_size=2**15, max_field_size=2**15)
    try:
        messages, _, _ = parser.feed_data(head)
    except HttpProcessingError as error:
        pytest.fail(f"aiohttp refuses it: {error}")
    message = messages[0][0]
    assert (request.method, request.path) == (message.method, message.url.path)
    assert sorted((name.lower(), value) for name, value in request.headers.items()) == sorted(
        (name.lower(), value) for name, value in message.headers.items()
    )
    assert request.length == int(message.headers.get("Content-Length", "0"))
    assert not message.chunked
    assert not message.upgrade
    assert request.delivery.close == message.should_close


@pytest.mark.parametrize(
    "odd",
    [
        b"POST /x HTTP/1.0\r\nHost: a\r\n\r\n",
        b"POST /x HTTP/1.1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: \xd9\xa1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nX : 1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n",
        b"POST /x HTTP/1.1\nHost: a\n\n",
        b"POST http://a/x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /x HTT",
        b"\x16\x03\x01\x02\x00",
    ],
)
async def test_whatever_is_odd_is_handed_over_with_its_connection(scene: Scene, odd: bytes) -> None:
    await scene.feed(odd)
    assert scene.other.received == odd
    assert scene.wire.protocol is scene.other
    assert scene.handled == []
    assert scene.lanes == set(), "whoever closes all lanes leaves it alone"


@given(st.lists(st.integers(1, len(POST) + 4), max_size=6))
async def test_a_body_may_come_in_any_pieces(cuts: list[int]) -> None:
    """The head comes whole; a head in pieces is aiohttp's."""
    scene, raw = Scene(), POST + b"hello"
    edges = sorted({len(POST), *(cut for cut in cuts if cut > len(POST))})
    await scene.feed(*(raw[a:b] for a, b in zip([0, *edges], [*edges, len(raw)], strict=True) if a < b))
    assert scene.handled == [("POST", "/v1/x", b"hello")]
    scene.lane.connection_lost(None)


async def test_requests_sent_ahead_are_answered_in_turn(scene: Scene) -> None:
    scene.gate.clear()
    await scene.feed(POST + b"first" + GET, POST + b"third")
    assert scene.answers == 0
    scene.gate.set()
    await scene.feed(b"")
    for _ in range(20):
        await asyncio.sleep(0)
    assert [body for _, _, body in scene.handled] == [b"first", b"", b"third"]
    assert scene.answers == 3


async def test_one_who_sends_too_much_ahead_is_not_read_until_its_turn_comes(scene: Scene) -> None:
    scene.gate.clear()
    await scene.feed(POST + b"first", GET * (HELD_LIMIT // len(GET) + 1))
    assert scene.wire.paused
    scene.gate.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not scene.wire.paused


async def test_an_answer_before_the_body_is_all_there_reads_the_rest_over(scene: Scene) -> None:
    """Then the next request on that connection is served."""
    scene.wants_body = False
    await scene.feed(POST + b"he")
    assert scene.answers == 1
    await scene.feed(b"llo" + GET)
    assert [path for _, path, _ in scene.handled] == ["/v1/x", "/healthz"]


async def test_an_answer_that_closes_lets_a_client_that_still_sends_read_it(scene: Scene) -> None:
    scene.wants_body = False
    scene.answer = Response(413, b"too large", close=True)
    await scene.feed(POST + b"he")
    assert scene.wire.finished
    assert not scene.wire.closed
    assert b"Connection: close" in scene.wire.written


@pytest.mark.parametrize("asked", [b"close", b"keep-alive"])
async def test_connection_close_is_honoured(scene: Scene, asked: bytes) -> None:
    await scene.feed(b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: " + asked + b"\r\n\r\n")
    assert scene.wire.closed == (asked == b"close")


async def test_a_head_request_gets_no_body(scene: Scene) -> None:
    await scene.feed(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"Content-Length: 2\r\n" in scene.wire.written
    assert scene.wire.written.endswith(b"\r\n\r\n")


async def test_a_client_that_leaves_cancels_what_is_done_for_it(scene: Scene) -> None:
    scene.gate.clear()
    await scene.feed(POST + b"hello")
    scene.lane.connection_lost(None)
    scene.gate.set()
    await asyncio.sleep(0)
    assert scene.handled == []


async def test_no_value_becomes_a_header_of_its_own(scene: Scene) -> None:
    scene.answer = Response(200, b"", {"X-Target": "a\r\nSet-Cookie: b=c", "X-Other": "d"})
    await scene.feed(GET)
    assert b"\r\nSet-Cookie" not in scene.wire.written
    assert b"X-Target: a  Set-Cookie: b=c\r\n" in scene.wire.written


@pytest.mark.parametrize(("queued", "how"), [(0, "closed"), (10, "aborted")])
async def test_a_connection_on_which_nothing_is_asked_is_closed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, queued: int, how: str
) -> None:
    """Dropped, where its client does not even take the last answer."""
    await scene.feed(GET)
    scene.wire.queued = queued
    scene.lane._check_idle()
    assert not getattr(scene.wire, how), "it was used a moment ago"
    scene.lane._idle_since -= KEEP_ALIVE_SECONDS
    scene.lane._check_idle()
    assert getattr(scene.wire, how)
