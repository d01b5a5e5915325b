"""The seam between a wire format and a socket: what is to be sent, and what comes back while it is still coming.

`proxy.upstream` implements it over HTTP, `proxy.demo` in the process; tests may script it. Every implementation raises only
the errors of `proxy.errors`: foreign exceptions are mapped once, at the door.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from proxy.call import Limits
from proxy.errors import GatewayError


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One HTTP POST to a provider, as its wire format encoded it.

    url: complete, percent-encoded. body: JSON. dropped: names of request parameters that this format cannot carry.
    """

    url: str
    headers: Mapping[str, str]
    body: bytes
    dropped: tuple[str, ...] = ()


class UpstreamResponse(Protocol):
    """A response whose head is in and whose body is still coming."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """By name in lower case; of several of one name the first."""
        ...

    async def read(self) -> bytes:
        """The next bytes as they arrive; b"" at a clean HTTP end. Raises UpstreamCut where the end is not clean."""
        ...

    def done(self) -> None:
        """The format's own end was seen: let the connection be reused if its HTTP end follows soon."""
        ...

    def close(self) -> None:
        """Close the socket at once; a pending read ends. Idempotent."""
        ...


class PushingResponse(UpstreamResponse, Protocol):
    """A response that can also call back, which spares a task's waking up per read. A Source listens where there is a `listen`,
    and reads everywhere else: `read` is all that a transport must have.
    """

    def listen(self, receive: Callable[[bytes], None], ended: Callable[[GatewayError | None], None]) -> None:
        """Push instead of pull, from now on.

        receive(data): once per network read, with all body bytes of that read joined (in pieces, where a compressed body grows);
        what is buffered already comes at once, inside this call. ended(None) at a clean HTTP end, ended(error) at any other; if
        the end has come already, inside this call too. Neither is called after `close`, and `ended` at most once.
        """
        ...

    def pause(self) -> None:
        """Stop reading from the socket: nothing is received until `resume`; an end behind nothing more may still be told.
        Idempotent."""
        ...

    def resume(self) -> None:
        """Go on; what was held back is received inside this call. Idempotent."""
        ...


class Transport(Protocol):
    """Sends requests; owns the sockets."""

    async def send(self, request: UpstreamRequest, limits: Limits) -> UpstreamResponse:
        """Returns when the response head is in. Raises UpstreamUnreachable, UpstreamCut, UpstreamTimeout, Malformed."""
        ...
