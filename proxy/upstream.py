"""The only owner of client sockets: requests out to providers over HTTP, bytes back as they come.

Strategy: one `ClientSession` per process, no pool limit of aiohttp's own, connections reused after a reply's own end was seen.
aiohttp's exceptions are mapped here, once; above this file nobody knows them.
A kept connection that proves dead before a byte of the answer came is replaced by a new one, once, unseen by everybody above.
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
    ClientConnectionResetError,
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ClientPayloadError,
    ClientRequest,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    ContentTypeError,
    DummyCookieJar,
    ServerDisconnectedError,
    TCPConnector,
)
from aiohttp.client_proto import ResponseHandler
from aiohttp.tracing import Trace
from yarl import URL

from proxy.call import Limits
from proxy.errors import GatewayError, Malformed, UpstreamCut, UpstreamTimeout, UpstreamUnreachable
from proxy.transport import UpstreamRequest

LINGER_SECONDS = 1.0
READ_BUFFER = 2**16
HEADER_LIMIT = 2**15


class _Connector(TCPConnector):
    """Knows which tasks have been given a new connection since they were last struck off. Reuse, the usual case, costs nothing
    here; aiohttp's tracing would tell the same at the price of some signals per request.
    """

    def __init__(self) -> None:
        super().__init__(limit=0, ttl_dns_cache=60, keepalive_timeout=30, enable_cleanup_closed=False)
        self.newly: set[asyncio.Task[object] | None] = set()

    async def _create_connection(
        self,
        req: ClientRequest,
        traces: list[Trace],
        timeout: ClientTimeout,  # noqa: ASYNC109 - aiohttp's own signature
    ) -> ResponseHandler:
        found = await super()._create_connection(req, traces, timeout)
        self.newly.add(asyncio.current_task())
        return found


class HttpTransport:
    """Sends requests over HTTP/1.1. `open` and `close` belong to the process's start and end.

    session: keeps its connections. unpooled: has a new connection for every request.
    """

    def __init__(self, session: ClientSession, unpooled: ClientSession, newly: set[asyncio.Task[object] | None]) -> None:
        self._session = session
        self._unpooled = unpooled
        self._newly = newly
        self._lingering: set[HttpResponse] = set()

    @classmethod
    def open(cls) -> HttpTransport:
        """A transport with its own sessions; needs a running loop."""
        pool = _Connector()
        return cls(_session(pool), _session(TCPConnector(limit=0, ttl_dns_cache=60, force_close=True)), pool.newly)

    async def close(self) -> None:
        for response in list(self._lingering):
            response.close()
        await self._session.close()
        await self._unpooled.close()

    @property
    def connections(self) -> int:
        """How many upstream connections are busy now."""
        connectors = (self._session.connector, self._unpooled.connector)
        return sum(len(connector._acquired) for connector in connectors if connector is not None)

    async def send(self, request: UpstreamRequest, limits: Limits) -> HttpResponse:
        task = asyncio.current_task()
        try:
            return await self._post(self._session, request, limits)
        except (ServerDisconnectedError, ClientOSError, ClientConnectionResetError) as error:
            # Two ends of one idle connection: the provider closed it while our request was on its way (RFC 9112, 9.3.1).
            if task in self._newly or not _unanswered(error):
                raise _mapped(error, limits) from None
        except (ClientError, OSError, TimeoutError, ValueError) as error:
            raise _mapped(error, limits) from None
        finally:
            self._newly.discard(task)
        try:
            return await self._post(self._unpooled, request, limits)
        except (ClientError, OSError, TimeoutError, ValueError) as error:
            raise _mapped(error, limits) from None

    async def _post(self, session: ClientSession, request: UpstreamRequest, limits: Limits) -> HttpResponse:
        response = await session.post(
            _url(request.url),
            data=request.body,
            headers=request.headers,
            timeout=_timeout(limits.connect),
            allow_redirects=False,
        )
        return HttpResponse(response, self._lingering)


def _session(connector: TCPConnector) -> ClientSession:
    return ClientSession(
        connector=connector,
        timeout=ClientTimeout(total=None),
        cookie_jar=DummyCookieJar(),
        read_bufsize=READ_BUFFER,
        max_line_size=HEADER_LIMIT,
        max_field_size=HEADER_LIMIT,
        skip_auto_headers=("User-Agent", "Accept"),
    )


def _unanswered(error: ClientError) -> bool:
    """Did the connection break before the answer's first byte, once it stood? Half a head is kept in the exception."""
    if isinstance(error, ClientConnectorError):
        return False
    return not isinstance(error, ServerDisconnectedError) or isinstance(error.message, str)


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
