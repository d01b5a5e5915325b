"""From a URL to a connection: heads, names, addresses, TLS.

TLS runs on both event loops, each of which has its own; the certificate is made here, by openssl.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.call import Limits
from proxy.errors import GatewayError, UpstreamCut, UpstreamUnreachable
from proxy.transport import UpstreamRequest
from proxy.upstream import HttpTransport
from proxy.upstream.request import Origin, prepared
from tests.support.gateway import until
from tests.support.upstream import Asked, Line, Upstream, http_head, stream, whole

try:
    import uvloop

    LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]
except ImportError:  # where it has no wheels
    LOOPS = [asyncio.new_event_loop]


async def fetched(transport: HttpTransport, url: str, connect: float | None = 5.0) -> bytes:
    response = await transport.send(UpstreamRequest(url, {}, b"{}"), Limits(connect=connect))
    found = b""
    while data := await asyncio.wait_for(response.read(), 5):
        found += data
    response.done()
    return found


# Heads


@pytest.mark.parametrize(
    ("url", "origin", "host", "target"),
    [
        ("http://a.example/v1", Origin(False, "a.example", 80), "a.example", "/v1"),
        ("https://a.example/v1", Origin(True, "a.example", 443), "a.example", "/v1"),
        ("https://a.example:443/v1", Origin(True, "a.example", 443), "a.example", "/v1"),
        ("http://a.example:443/v1", Origin(False, "a.example", 443), "a.example:443", "/v1"),
        ("https://A.example:8443", Origin(True, "a.example", 8443), "a.example:8443", "/"),
        ("http://[::1]:8080/x", Origin(False, "::1", 8080), "[::1]:8080", "/x"),
        ("http://[2001:db8::1]/x", Origin(False, "2001:db8::1", 80), "[2001:db8::1]", "/x"),
        ("http://127.0.0.1/a%2Fb?c=%20d#e", Origin(False, "127.0.0.1", 80), "127.0.0.1", "/a%2Fb?c=%20d"),
        ("https://bücher.example/", Origin(True, "xn--bcher-kva.example", 443), "xn--bcher-kva.example", "/"),
    ],
)
def test_a_url_says_where_to_and_what_for(url: str, origin: Origin, host: str, target: str) -> None:
    found, head = prepared(url, (("X-A", "1"),))
    assert found == origin
    assert head.decode() == f"POST {target} HTTP/1.1\r\nHost: {host}\r\nX-A: 1\r\nContent-Length: "


def test_userinfo_becomes_basic_authorization() -> None:
    origin, head = prepared("http://me:p%40ss@a.example/", ())
    assert origin.host == "a.example"
    assert b"\r\nAuthorization: Basic bWU6cEBzcw==\r\n" in head
    assert b"Host: a.example\r\n" in head


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("ftp://a.example/", {}),
        ("/v1/chat", {}),
        ("http://", {}),
        ("http://a.example:99999/", {}),
        ("http://a.example/with space", {}),
        ("http://a.example/with\r\nX-Own: header", {}),
        ("http://a.example/", {"X-A": "1\r\nX-B: 2"}),
        ("http://a.example/", {"X-A": "1\x00"}),
        ("http://a.example/", {"X A": "1"}),
        ("http://a.example/", {"X-A: 1\r\nX-B": "2"}),
        ("http://me:pass@a.example/", {"authorization": "Bearer x"}),
    ],
)
def test_what_makes_no_request_is_refused_before_it_is_sent(url: str, headers: dict[str, str]) -> None:
    with pytest.raises(UpstreamUnreachable, match="does not make a valid URL"):
        prepared(url, tuple(headers.items()))


# Names and addresses


@pytest.fixture
async def transport():
    found = HttpTransport.open()
    yield found
    await found.close()


class Names:
    """Stands in for the loop's resolver: what each name leads to."""

    def __init__(self, found: list[str] | Exception, port: int = 0) -> None:
        self.found = found
        self.asked: list[str] = []
        self.answering = asyncio.Event()
        self.answering.set()

    async def __call__(self, host: str, port: int, **named: Any) -> list[Any]:
        self.asked.append(host)
        await self.answering.wait()
        if isinstance(self.found, Exception):
            raise self.found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.found]


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names(["127.0.0.1"])
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
    return found


async def test_a_name_is_asked_for_once_a_minute_however_many_want_it(transport: HttpTransport, names: Names) -> None:
    names.answering.clear()
    async with Upstream(whole(b"ok")) as upstream:
        url = f"http://provider.example:{upstream.port}/"
        sending = [asyncio.ensure_future(fetched(transport, url)) for _ in range(5)]
        await until(lambda: names.asked)
        sending[0].cancel()
        names.answering.set()
        assert await asyncio.gather(*sending[1:]) == [b"ok"] * 4
        assert sending[0].cancelled()
        assert len(upstream.lines) == 4
        for line in upstream.lines:
            line.hang_up()
        await until(lambda: not transport._pool.standing)
        assert await fetched(transport, url) == b"ok"
        assert names.asked == ["provider.example"]
        asked, known = transport._dialer._known["provider.example", upstream.port]
        transport._dialer._known["provider.example", upstream.port] = (asked - 61, known)
        for connection in list(transport._pool.standing):
            connection.abort()
        assert await fetched(transport, url) == b"ok"
        assert names.asked == ["provider.example"] * 2


async def test_addresses_are_used_in_turn_and_dead_ones_passed_over(transport: HttpTransport, names: Names) -> None:
    names.found = ["127.0.0.1", "127.0.0.2"]
    async with Upstream(whole(b"ok")) as upstream:
        for _ in range(4):
            assert await fetched(transport, f"http://provider.example:{upstream.port}/") == b"ok"
            for connection in list(transport._pool.standing):
                connection.abort()


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")])
async def test_a_name_that_leads_nowhere_is_an_error_and_not_remembered(
    transport: HttpTransport, names: Names, error: Exception
) -> None:
    names.found = error
    for _ in range(2):
        with pytest.raises(UpstreamUnreachable) as found:
            await fetched(transport, "http://provider.example/")
        assert (found.value.code == "upstream_dns") is isinstance(error, socket.gaierror)
    assert len(names.asked) == 2
    assert transport.connections == 0


async def test_a_transport_that_closes_while_a_name_is_asked_for_lets_go_of_it(names: Names) -> None:
    names.answering.clear()
    transport = HttpTransport.open()
    sending = asyncio.ensure_future(fetched(transport, "http://provider.example/"))
    await until(lambda: names.asked)
    await transport.close()
    with pytest.raises(UpstreamUnreachable):
        await sending


async def test_an_ip_literal_is_not_asked_for(transport: HttpTransport, names: Names) -> None:
    async with Upstream(whole(b"ok")) as upstream:
        assert await fetched(transport, upstream.url) == b"ok"
    assert names.asked == []


async def test_an_ipv6_literal_is_connected_to(transport: HttpTransport) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    try:
        server = await asyncio.start_server(answer, "::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    assert await fetched(transport, f"http://[::1]:{server.sockets[0].getsockname()[1]}/") == b"ok"
    server.close()


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__module__)
def test_a_request_cancelled_at_any_turn_of_the_loop_leaves_nothing(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """uvloop calls `connection_made` but never `connection_lost` where it is cancelled in between."""

    async def scene() -> None:
        async with Upstream(whole(b"ok")) as upstream:
            for turns in range(30):
                transport = HttpTransport.open()
                sending = asyncio.ensure_future(fetched(transport, upstream.url))
                for _ in range(turns):
                    await asyncio.sleep(0)
                sending.cancel()
                await asyncio.wait([sending])
                assert transport.connections == 0
                await asyncio.wait_for(transport.close(), 2)
                assert not transport._pool.standing
            await until(lambda: upstream.open == 0)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


# TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with a key and a certificate for localhost, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    making = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    making += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", "key", "-out", "certificate"]
    subprocess.run(making, cwd=folder, check=True, capture_output=True)
    both = folder / "both"
    both.write_text((folder / "key").read_text() + (folder / "certificate").read_text())
    return both


@pytest.fixture
def context(certificate: Path) -> ssl.SSLContext:
    found = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    found.load_cert_chain(certificate)
    found.set_alpn_protocols(["h2", "http/1.1"])
    return found


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


Scene = Callable[[Upstream, HttpTransport], Awaitable[None]]


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.__module__)
def over_tls(request: pytest.FixtureRequest, context: ssl.SSLContext) -> Callable[[Scene], None]:
    """Plays a scene between a transport and a provider that speaks TLS, on a loop of its own."""

    async def play(scene: Scene) -> None:
        async with Upstream(stream([b"abc", b"def"]), context) as upstream:
            transport = HttpTransport.open()
            try:
                await asyncio.wait_for(scene(upstream, transport), 10)
            finally:
                await transport.close()

    def run(scene: Scene) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(play(scene))

    return run


def test_tls_is_spoken_and_its_connections_are_kept(over_tls: Callable[[Scene], None], trusted: None) -> None:
    async def scene(upstream: Upstream, transport: HttpTransport) -> None:
        for _ in range(3):
            assert await fetched(transport, upstream.url) == b"abcdef"
        (line,) = upstream.lines
        assert line.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"

    over_tls(scene)


def test_a_certificate_that_nobody_vouches_for_is_refused(over_tls: Callable[[Scene], None]) -> None:
    async def scene(upstream: Upstream, transport: HttpTransport) -> None:
        with pytest.raises(UpstreamUnreachable) as found:
            await fetched(transport, upstream.url)
        assert (found.value.code, upstream.asked, transport.connections) == ("upstream_tls", [], 0)

    over_tls(scene)


def test_a_certificate_for_another_name_is_refused(over_tls: Callable[[Scene], None], trusted: None) -> None:
    async def scene(upstream: Upstream, transport: HttpTransport) -> None:
        with pytest.raises(UpstreamUnreachable) as found:
            await fetched(transport, upstream.url.replace("localhost", "127.0.0.1"))
        assert (found.value.code, upstream.asked) == ("upstream_tls", [])

    over_tls(scene)


@pytest.mark.parametrize("over_tls", LOOPS[1:], ids=lambda loop: loop.__module__, indirect=True)
def test_a_tls_connection_that_breaks_off_unannounced_is_no_end_of_a_body(
    over_tls: Callable[[Scene], None], trusted: None
) -> None:
    """Without a length the end is close_notify; a bare FIN could be anybody's (RFC 9112, 9.8).
    asyncio's own loop does not tell."""

    async def scene(upstream: Upstream, transport: HttpTransport) -> None:
        async def ends(asked: Asked, line: Line) -> None:
            await line.send(http_head(200, {}), b"abc")
            if asked.path == "/cut":
                line.writer.transport.abort()
            else:
                line.hang_up()

        upstream.answer = ends
        assert await fetched(transport, upstream.url + "/announced") == b"abc"
        with pytest.raises(UpstreamCut):
            await fetched(transport, upstream.url + "/cut")

    over_tls(scene)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__module__)
def test_a_server_that_says_nothing_in_the_handshake_is_a_connect_timeout(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """The limit is over name, connection and TLS together."""

    async def scene() -> None:
        transport = HttpTransport.open()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            with pytest.raises(GatewayError) as found:
                await fetched(transport, f"https://127.0.0.1:{listener.getsockname()[1]}/", connect=0.05)
        assert (found.value.code, transport.connections) == ("timeout_connect", 0)
        await transport.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())
