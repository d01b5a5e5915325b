"""The only owner of client sockets: requests out to providers over HTTP, bytes back as they come.

Strategy: one `ClientSession` per process, no pool limit of aiohttp's own, connections reused after a reply's own end was seen.
aiohttp's exceptions are mapped here, once; above this file nobody knows them.
The one rule: `close` closes the socket at once and may be called from anywhere, any number of times.

Redirects are not followed (they would carry the key elsewhere), proxies from the environment are not used, cookies are not kept.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache

from aiohttp import (
    ClientConnectionError,
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientError,
    ClientPayloadError,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    ContentTypeError,
    DummyCookieJar,
    TCPConnector,
)
from yarl import URL

from proxy.call import Limits
from proxy.errors import GatewayError, Malformed, UpstreamCut, UpstreamTimeout, UpstreamUnreachable
from proxy.transport import UpstreamRequest

LINGER_SECONDS = 1.0
READ_BUFFER = 2**16
HEADER_LIMIT = 2**15


class HttpTransport:
    """Sends requests over HTTP/1.1. `open` and `close` belong to the process's start and end."""

    def __init__(self, session: ClientSession) -> None:
        self._session = session
        self._lingering: set[HttpResponse] = set()

    @classmethod
    def open(cls) -> HttpTransport:
        """A transport with its own session; needs a running loop."""
        connector = TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30, enable_cleanup_closed=False)
        session = ClientSession(
            connector=connector,
            timeout=ClientTimeout(total=None),
            cookie_jar=DummyCookieJar(),
            read_bufsize=READ_BUFFER,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
            skip_auto_headers=("User-Agent", "Accept"),
        )
        return cls(session)

    async def close(self) -> None:
        for response in list(self._lingering):
            response.close()
        await self._session.close()

    @property
    def connections(self) -> int:
        """How many upstream connections are busy now."""
        connector = self._session.connector
        return len(connector._acquired) if connector is not None else 0

    async def send(self, request: UpstreamRequest, limits: Limits) -> HttpResponse:
        try:
            response = await self._session.post(
                _url(request.url),
                data=request.body,
                headers=request.headers,
                timeout=_timeout(limits.connect),
                allow_redirects=False,
            )
        except (ClientError, OSError, TimeoutError, ValueError) as error:
            raise _mapped(error, limits) from None
        return HttpResponse(response, self._lingering)


class HttpResponse:
    """One response whose body is still coming. lingering: where it is kept while its HTTP end is awaited."""

    __slots__ = ("_closed", "_linger", "_lingering", "_response", "headers", "status")

    def __init__(self, response: ClientResponse, lingering: set[HttpResponse]) -> None:
        self._response = response
        self._lingering = lingering
        self._linger: asyncio.TimerHandle | None = None
        self._closed = False
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self) -> bytes:
        content = self._response.content
        if content.exception() is not None and content._buffer and not self._closed:
            # The connection broke after these bytes came; aiohttp would drop them, and an end among them would look like a cut.
            return content._read_nowait(-1)
        try:
            return await content.readany()
        except (ClientError, OSError, TimeoutError) as error:
            # aiohttp raises one and the same exception for every closed response: its traceback would keep all of them alive.
            error.__traceback__ = None
            raise _broken(error) from None

    def done(self) -> None:
        """aiohttp reuses the connection when the HTTP end arrives; if that takes longer than a moment, it is closed."""
        content = self._response.content
        if self._closed:
            return
        if content.exception() is not None:
            self.close()
        elif self._linger is None and not content.at_eof():
            self._linger = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.close)
            self._lingering.add(self)
            content.on_eof(self._forget_linger)

    def close(self) -> None:
        self._closed = True
        self._forget_linger()
        self._response.close()

    def _forget_linger(self) -> None:
        self._lingering.discard(self)
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None


@lru_cache(maxsize=1024)
def _url(text: str) -> URL:
    return URL(text, encoded=True)


@lru_cache(maxsize=64)
def _timeout(connect: float | None) -> ClientTimeout:
    return ClientTimeout(total=None, connect=None, sock_connect=connect, sock_read=None, ceil_threshold=1e9)


def _mapped(error: BaseException, limits: Limits) -> GatewayError:
    """What an exception on the way to the response's head means."""
    match error:
        case ConnectionTimeoutError() | TimeoutError():
            return UpstreamTimeout("connect", limits.connect or 0.0)
        case ClientConnectorDNSError() | socket.gaierror():
            return UpstreamUnreachable("The provider's host name could not be resolved.", code="upstream_dns")
        case ClientConnectorCertificateError() | ssl.SSLError():
            return UpstreamUnreachable("The provider's TLS certificate or handshake failed.", code="upstream_tls")
        case ClientConnectorError():
            return UpstreamUnreachable("The provider could not be connected to.")
        case ContentTypeError() | ClientResponseError():
            return Malformed("The provider's answer is not HTTP as it should be.")
        case ValueError():
            return UpstreamUnreachable("The provider's base_url does not make a valid URL.")
    return UpstreamCut("The provider closed the connection before it answered.")


def _broken(error: BaseException) -> GatewayError:
    """What an exception in the middle of a body means."""
    if isinstance(error, ClientPayloadError) and "encod" in str(error).lower() and "transfer" not in str(error).lower():
        return Malformed("The provider's reply could not be decompressed.")
    if isinstance(error, ClientPayloadError | ClientConnectionError | OSError):
        return UpstreamCut("The provider's connection broke before its reply was complete.")
    return UpstreamCut("The provider's reply ended early.")
