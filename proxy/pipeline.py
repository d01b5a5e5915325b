"""The verb: a call goes in through an onion of middleware, and a reply comes out.

    Handler    = async (Call) -> Reply
    Middleware = async (Call, Handler) -> Reply

Strategy: `compose` nests the list once, at start; the outermost comes first, as in config.yaml. `await next(call)` returns only
when the head is settled and the first real chunk is in hand, so an error before the first token is always an exception.
The one rule: a middleware that takes a reply and does not return it closes it (`await reply.close()`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from proxy.call import Call, Principal, Route
from proxy.reply import Reply
from proxy.store import Store
from proxy.transport import Transport

Handler = Callable[[Call], Awaitable[Reply]]
Merge = Literal["sum", "each", "one"]

# Every base URL that clients of such proxies are configured with; endpoints that belong to an API of theirs stand under each.
BASES = ("", "/v1", "/v2", "/api/v1", "/v2/proxy", "/v2/router", "/v3/router")


class Middleware(Protocol):
    """A policy around calls. Its constructor's keywords and their annotations are its part of config.yaml's schema; constructing
    it has no side effects, because `penstock check` does so, too.

    Beside `__call__` it may have any of these (found by name, none is needed):

        FIELDS: tuple[str, ...]                        request fields that are its own; they are never sent upstream
        admit(call, own) -> Call                       read them (sync, before any upstream is called); raises Refused
        authenticate(headers) -> Principal             who is calling, before the body is read; raises Refused 401
        allows(principal, model) -> bool               may it use this model; if not, it is left out of listings
        endpoints: Sequence[Endpoint]                  paths that it serves
        refused(error) -> None                         told of a request that the edge turned away before there was a call
        outlived(call, reply) -> None                  told of a reply that is read on, its client having left before its head
        samples() -> Iterable[Sample]                  its figures, asked for when somebody scrapes
        health() -> dict                               its state, shown on /readyz?verbose
        attach(surroundings) -> None                   what is around it, before the first call, and again after a reload
        adopt(previous) -> None                        a reload changed its options: take over what is to live on
        NEEDS_STORE: bool                              it wants `surroundings.store`; else none is opened
        NEEDS_PEER: bool                               it wants to know a client's address: `call.extension(Peer)`
        NEEDS_ONE_WORKER: str                          why it cannot be right in several processes; `penstock check` refuses then
        async start() -> None / async close() -> None  with the gateway's own start and end, or a reload's

    A reload of config.yaml leaves a middleware whose entry is the same as it is: the same object goes on, and is only told anew
    what is around it. Where the options differ, another object is made from the new ones, attached, started, and then told to
    adopt the one that stood under the same name (of the same class); no call runs in between. Calls that began before go through
    the previous one to their end, so what both count or keep belongs into an object that both hold. `close` of the previous one
    comes when the last of these has ended; what was adopted is then no longer its own.
    """

    async def __call__(self, call: Call, next: Handler) -> Reply: ...


@dataclass(frozen=True, slots=True)
class Query:
    """A request to an endpoint. params: of the URL's query; principal: who asks; identity: the client's user, by its headers;
    raw_path: not percent-decoded, for ids that may hold a slash."""

    method: str
    path: str
    params: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    principal: Principal
    identity: str | None = None
    raw_path: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint answers."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed(Answer):
    """A reply that an endpoint answers with, written out as that of any call. call: says in which form."""

    call: Call
    reply: Reply


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path that a middleware serves; its last segment, or the one before, may be `{id}`, which stands for any one.

    admin: only for principals with `admin`, or on server.admin_listen. signed: a URL with a `token` needs no key; the handler
    looks at the token.

    merge: whose answer it is where several workers run. `one`: that of the worker that was asked. `sum`: all are asked, and the
    numbers of their JSON are added up. `each`: all are asked, and their JSON is listed. Where nothing is said: `each` for GET and
    `sum` for the rest of the admin endpoints, else `one`. Prometheus' text at /metrics is added up series by series.
    """

    method: str
    path: str
    handler: Callable[[Query], Awaitable[Answer]]
    admin: bool = False
    merge: Merge | None = None
    signed: bool = False


async def ask_one(point: Endpoint, query: Query) -> Answer:
    """The endpoint's answer in this process alone: how endpoints are asked where there is one worker."""
    return await point.handler(query)


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of a middleware, in Prometheus' terms. kind: `counter` or `gauge`; labels: few, with few values."""

    name: str
    kind: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a middleware may want to know of the gateway it is in.

    layers: the whole onion, outermost first. route: where a model name leads; raises Refused (400, 404).
    gauges: figures of the process that no middleware can know (`upstream_connections`, `open_calls`). write_timeout: of clients
    that take nothing, in seconds.
    workers: how many processes serve, each with state of its own. worker: which one this is, from 0.
    samples: the gateway's own figures. changed: the providers whose rows a reload has just changed, added or removed.
    store: what outlives a request; there where some middleware has `NEEDS_STORE`. attempt: one attempt at `call.target`, past all
    middleware, for calls of its own (embeddings). transport: sends requests to other services (webhooks).
    """

    layers: Sequence[Middleware]
    route: Callable[[str], Route]
    gauges: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    workers: int = 1
    worker: int = 0
    samples: Callable[[], Iterable[Sample]] = tuple
    changed: frozenset[str] = frozenset()
    write_timeout: float = 60.0
    store: Store | None = None
    attempt: Handler | None = None
    transport: Transport | None = None

    @property
    def bookkeepers(self) -> Sequence[Callable[[Call, Reply], None]]:
        """The `outlived` of all layers that have it."""
        return [found for layer in self.layers if (found := getattr(layer, "outlived", None)) is not None]

    def share(self, limit: int) -> int:
        """This worker's part of a limit on the whole gateway. All parts together are the limit, but none is less than 1 where the
        limit is not 0, since who has a connection to one worker cannot turn to another."""
        return share(limit, self.workers, self.worker)


def share(limit: int, workers: int, worker: int) -> int:
    """The part of a limit on the whole gateway that is one worker's; see `Surroundings.share`."""
    return max(1, limit // workers + (worker < limit % workers)) if limit > 0 else limit


def compose(middleware: Sequence[Middleware], innermost: Handler) -> Handler:
    """One handler out of many: `compose([a, b], h)(call)` is `a(call, lambda call: b(call, h))`."""
    handler = innermost
    for layer in reversed(middleware):
        handler = partial(layer, next=handler)
    return handler
