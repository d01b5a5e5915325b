"""The edge: HTTP in, a call into the pipeline, a relay out.

Strategy: a flat table of endpoints under every base URL that clients of such proxies are configured with (no application, no
resolver: a look-up in a dict). Whatever is raised on the way becomes the OpenAI error envelope here.
The one rule: nothing is read of a body before the path, the method, the Host and the declared size are accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
import structlog

from proxy.admission import ANYBODY, Defaults, Readers, admit, parse_json, request_id, sent_identity
from proxy.call import Call, Principal, altered
from proxy.delivery import Response
from proxy.errors import Draining, GatewayError, Outcome, Overloaded, Refused, UpstreamTimeout, why_cancelled
from proxy.faces import FACES, Face
from proxy.http import Request, allow, check_json, error_response, head_headers, json_response
from proxy.keepalive import kept_alive, told
from proxy.pipeline import BASES, Answer, Endpoint, Handler, Middleware, Query, Streamed, ask_one
from proxy.relay import Relay
from proxy.reply import Reply
from proxy.routing import Directory
from proxy.sockets import Server

log = structlog.get_logger("penstock")

Json = dict[str, Any]
T = TypeVar("T")
ENDPOINTS: Mapping[str, Face] = {base + path: face for base in BASES for path, face in FACES.items()}
MODELS = tuple(base + "/models" for base in BASES)
FACES_BY_KIND: Mapping[str, Face] = {face.KIND: face for face in FACES.values()}
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
OPERATOR = Principal("operator", admin=True)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the operator decides about the edge. Sizes in bytes, times in seconds.

    loopback_only: refuse every Host but localhost, 127.0.0.1 and [::1], which keeps web pages (DNS rebinding) out of a gateway
    that has no auth; admin_loopback_only the same for the admin address, which never has.
    max_streams: calls that are open at a time, max_waiting: those among them that wait for their reply; 0 is no bound.
    """

    max_body: int = 32 * 2**20
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    loopback_only: bool = True
    admin_loopback_only: bool = True
    max_streams: int = 0
    max_waiting: int = 0
    defaults: Defaults = field(default_factory=Defaults)


class Generation:
    """What one config makes of requests; a reload puts another in its place, and requests keep the one that they began with.

    handler: the composed pipeline. directory: where model names lead. layers: the middleware, whose endpoints, request fields and
    authentication are served by the edge. open: how many requests are in it.
    """

    __slots__ = (
        "_ended", "allows", "authenticate", "directory", "endpoints", "handler", "layers", "open", "readers", "refused",
        "settings",
    )  # fmt: skip

    def __init__(
        self, handler: Handler, directory: Directory, settings: ServerSettings, layers: Sequence[Middleware] = ()
    ) -> None:
        self.handler = handler
        self.directory = directory
        self.settings = settings
        self.layers = layers
        self.authenticate = next((found for layer in layers if (found := getattr(layer, "authenticate", None))), None)
        self.allows = next((found for layer in layers if (found := getattr(layer, "allows", None))), None)
        self.endpoints = _by_path(point for layer in layers for point in getattr(layer, "endpoints", ()))
        self.readers = Readers.of(layers)
        self.refused = [layer.refused for layer in layers if hasattr(layer, "refused")]
        self.open = 0
        self._ended: asyncio.Event | None = None

    def leave(self) -> None:
        """A request is over."""
        self.open -= 1
        if not self.open and self._ended is not None:
            self._ended.set()

    async def ended(self) -> None:
        """Wait until no request is in it. Only of use once no further one can come."""
        if self.open:
            self._ended = asyncio.Event()
            await self._ended.wait()


class Edge:
    """Serves calls. generation: what serves the next request; assign another to reload. ask: how endpoints are asked; several
    workers ask each other, too. state: what `/readyz?verbose` says beside the rest.
    """

    def __init__(
        self,
        generation: Generation,
        ask: Callable[[Endpoint, Query], Awaitable[Answer]] = ask_one,
        state: Callable[[], Json] = dict,
    ) -> None:
        self.generation = generation
        self._ask = ask
        self._state = state
        self._active: dict[asyncio.Task[Any], Relay | None] = {}
        self._relaying = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending = False
        self._ready = True
        self.draining = False

    def not_ready(self) -> None:
        """`/readyz` says no from now on, while calls are still accepted, so that a load balancer turns away first."""
        self._ready = False

    def server(self, *, admin: bool = False) -> Server:
        """The server for this edge. admin: the second address, for scrapers and operators, without auth."""
        return Server(self.handle_admin if admin else self.handle)

    @property
    def open_calls(self) -> int:
        return len(self._active)

    @property
    def waiting_calls(self) -> int:
        """Calls that have been let in and whose reply is not there yet."""
        return len(self._active) - self._relaying

    @property
    def max_streams(self) -> int:
        return self.generation.settings.max_streams

    @property
    def max_waiting(self) -> int:
        return self.generation.settings.max_waiting

    @property
    def buffered(self) -> int:
        """Bytes that are waiting for clients to take them, over all streams."""
        return sum(relay.buffered for relay in self._active.values() if relay is not None)

    async def handle(self, request: Request) -> None:
        """One HTTP request, from its head to its answer."""
        headers, delivery = request.headers, request.delivery
        identity = request_id(headers)
        generation = self.generation
        generation.open += 1
        try:
            response = await self._dispatch(generation, request, headers, identity)
        except GatewayError as error:
            # What never reached the pipeline is logged here; everything else by the middleware that the operator chose.
            log.info(
                "request", id=identity, path=request.path[:200], outcome=error.outcome.value, status=error.status, code=error.code
            )
            for refused in generation.refused:
                refused(error)
            response = error_response(error, identity)
        except ConnectionError:
            raise
        except Exception:
            log.exception("request failed", id=identity)
            response = error_response(GatewayError("The gateway failed on this request."), identity)
        finally:
            generation.leave()
        if response is not None and not delivery.begun:
            delivery.whole(response)

    async def _dispatch(
        self, generation: Generation, request: Request, headers: Mapping[str, str], identity: str
    ) -> Response | None:
        """The answer, or None where it has been sent."""
        path = request.path
        if path in ("/healthz", "/readyz") and "verbose" not in request.query:
            allow(request, "GET", "HEAD")
            return self._health(path)
        self._check_host(headers.get("host", ""), generation.settings.loopback_only)
        if point := self._signed(generation, request):
            return await self._serve(generation, point, request, headers, ANYBODY, identity)
        principal = generation.authenticate(headers) if generation.authenticate is not None else ANYBODY
        if face := ENDPOINTS.get(path):
            allow(request, "POST")
            return await self._call(generation, request, headers, identity, face, principal)
        if point := self.point(path, request.method, generation):
            return await self._serve(generation, point, request, headers, principal, identity)
        for models in MODELS:
            if path == models or path.startswith(models + "/"):
                allow(request, "GET")
                return self._models(generation, path[len(models) + 1 :], principal)
        raise Refused(f"There is nothing at {request.method} {path[:200]}.", status=404, code="unknown_path")

    async def handle_admin(self, request: Request) -> None:
        """One request on the admin address: health and the middleware's endpoints, nothing else, for whoever can reach it."""
        generation = self.generation
        generation.open += 1
        try:
            response = await self._dispatch_admin(generation, request)
        except GatewayError as error:
            response = error_response(error, request_id(request.headers))
        finally:
            generation.leave()
        if response is not None:
            request.delivery.whole(response)

    async def _dispatch_admin(self, generation: Generation, request: Request) -> Response | None:
        self._check_host(request.headers.get("host", ""), generation.settings.admin_loopback_only)
        if request.path in ("/healthz", "/readyz") and "verbose" not in request.query:
            allow(request, "GET", "HEAD")
            return self._health(request.path)
        if point := self.point(request.path, request.method, generation):
            return await self._serve(generation, point, request, request.headers, OPERATOR, request_id(request.headers))
        raise Refused(f"There is nothing at {request.path[:200]} on the admin address.", status=404, code="unknown_path")

    def point(self, path: str, method: str = "GET", generation: Generation | None = None) -> Endpoint | None:
        """The endpoint at a path that takes this method, or any that is there. generation: the current one if none is given."""
        if path == "/readyz":
            return Endpoint("GET", path, self._verbose, admin=True)
        endpoints = (generation or self.generation).endpoints
        found = endpoints.get(path) or next((found for form in _forms(path) if (found := endpoints.get(form))), None)
        if found is None:
            return None
        return found.get(method) or found.get("GET" if method == "HEAD" else "") or next(iter(found.values()))

    def _signed(self, generation: Generation, request: Request) -> Endpoint | None:
        """The endpoint that looks at the token in this URL instead of at a key."""
        if "token" not in request.query_string or (point := self.point(request.path, request.method, generation)) is None:
            return None
        return point if point.signed and "token" in request.query else None

    async def _serve(
        self,
        generation: Generation,
        point: Endpoint,
        request: Request,
        headers: Mapping[str, str],
        principal: Principal,
        identity: str,
    ) -> Response | None:
        """An endpoint of a middleware. Where nobody authenticates, everybody on the loopback port may use it."""
        allow(request, point.method, *(("HEAD",) if point.method == "GET" else ()))
        if point.admin and generation.authenticate is not None and not principal.admin:
            raise Refused("This needs a key with admin: true.", status=403, code="admin_only", type="permission_error")
        body = await self._body(generation, request) if point.method != "GET" else b""
        query = Query(request.method, request.path, request.query, headers, body, principal, sent_identity(headers))
        if point.admin:
            return _answered(await self._ask(point, query))
        # It may stream: it is open as a call is, and is ended as one.
        task = self._enter()
        try:
            answer = await self._unless_ended(self._ask(point, query))
            if not isinstance(answer, Streamed):
                return _answered(answer)
            call = altered(answer.call, id=identity)
            await self._relayed(generation, request, call, answer.reply, FACES_BY_KIND[call.kind], 0.0)
            return None
        finally:
            self._leave(task)

    def _health(self, path: str) -> Response:
        if path == "/readyz" and not self._ready:
            return json_response({"status": "draining"}, 503)
        return json_response({"status": "ok"})

    async def _verbose(self, query: Query) -> Answer:
        """`/readyz?verbose`: what each middleware says of its state."""
        layers = self.generation.layers
        state = {type(layer).__name__.lower(): layer.health() for layer in layers if hasattr(layer, "health")}
        found = {
            "status": "ok" if self._ready else "draining",
            "pid": os.getpid(),
            "open_calls": self.open_calls,
            **self._state(),
            "waiting_calls": self.waiting_calls,
            "max_streams": self.max_streams,
            "max_waiting": self.max_waiting,
            "middleware": state,
        }
        return Answer(orjson.dumps(found, default=str), 200 if self._ready else 503)

    def _check_host(self, host: str, loopback_only: bool) -> None:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if loopback_only and name.strip("[]").lower() not in LOOPBACK_HOSTS:
            raise Refused(
                "Without auth this gateway only answers to the Host localhost, 127.0.0.1 or [::1].",
                status=403,
                code="host_not_allowed",
            )

    def _models(self, generation: Generation, model: str, principal: Principal) -> Response:
        """The models, or one of them; what a key may not use does not exist for it."""
        allows, directory = generation.allows or (lambda principal, name: True), generation.directory
        if not model:
            return json_response(
                {"object": "list", "data": [entry for entry in directory.listing() if allows(principal, entry["id"])]}
            )
        if not allows(principal, model):
            raise Refused(f"The model '{model[:200]}' does not exist.", status=404, code="model_not_found", param="model")
        return json_response(directory.find(model))

    async def _call(
        self,
        generation: Generation,
        request: Request,
        headers: Mapping[str, str],
        identity: str,
        face: Face,
        principal: Principal,
    ) -> Response | None:
        """One call through the pipeline. It can be ended from outside (`end_all`) at every stage."""
        task = self._enter()
        try:
            started = time.perf_counter()
            check_json(headers)
            settings, handler = generation.settings, generation.handler
            raw = request.at_hand(settings.max_body)
            if raw is None:
                raw = await self._unless_ended(self._body(generation, request))
            body = parse_json(raw, settings.defaults.max_depth)
            face.check(body)
            directory, readers = generation.directory, generation.readers
            call = admit(body, face.KIND, headers, directory, settings.defaults, identity, principal, readers)
            waiting = handler(call) if call.deadline is None else self._in_time(handler, call)
            if call.options.keepalive_after and call.stream and call.kind != "embeddings":
                waiting = kept_alive(waiting, call, request.delivery)
            try:
                reply = await self._unless_ended(waiting)
                await self._relayed(generation, request, call, reply, face, time.perf_counter() - started)
                return None
            except GatewayError as error:
                return told(error, call, face, request.delivery)
        finally:
            self._leave(task)

    def _enter(self) -> asyncio.Task[Any]:
        """The current task is open from now on, unless that is one too many. Nothing has been read of a call's body yet."""
        task, settings = asyncio.current_task(), self.generation.settings
        assert task is not None
        if self.draining:
            raise Draining("The gateway is shutting down.", headers={"Retry-After": "1"})
        if 0 < settings.max_streams <= len(self._active):
            raise _overloaded("max_streams", settings.max_streams)
        if 0 < settings.max_waiting <= self.waiting_calls:
            raise _overloaded("max_waiting", settings.max_waiting)
        self._active[task] = None
        self._idle.clear()
        return task

    def _leave(self, task: asyncio.Task[Any]) -> None:
        del self._active[task]
        if not self._active:
            self._idle.set()

    async def _relayed(
        self, generation: Generation, request: Request, call: Call, reply: Reply, face: Face, seconds: float
    ) -> None:
        """The reply, written out to its end. Raises GatewayError as long as nothing was sent."""
        relay = Relay(request.delivery, call, reply, face, generation.settings.write_timeout)
        task = asyncio.current_task()
        assert task is not None
        self._active[task] = relay
        self._relaying += 1
        try:
            await relay.run(head_headers(call, reply.head, seconds))
        finally:
            self._relaying -= 1

    async def _in_time(self, handler: Handler, call: Call) -> Reply:
        """The pipeline's reply, before the call's deadline."""
        task = asyncio.current_task()
        assert task is not None
        assert call.deadline is not None
        # The cancellation says why, so that whoever it passes through on its way does not take it for the client's leaving.
        timer = asyncio.get_running_loop().call_at(call.deadline, task.cancel, Outcome.TIMEOUT_TOTAL)
        try:
            return await handler(call)
        except asyncio.CancelledError as error:
            if why_cancelled(error) is not Outcome.TIMEOUT_TOTAL:
                raise
            task.uncancel()
            raise UpstreamTimeout("total", call.limits.total or 0.0) from None
        finally:
            timer.cancel()

    async def _unless_ended(self, waiting: Awaitable[T]) -> T:
        """What is waited for. A cancellation that `end_all` caused is told to the client; any other means that it is gone."""
        try:
            return await waiting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._ending or task is None:
                raise
            task.uncancel()
            raise Draining("The gateway is shutting down.", headers={"Retry-After": "1"}) from None

    def _body(self, generation: Generation, request: Request) -> Awaitable[bytes]:
        return request.body(generation.settings.max_body, generation.settings.body_timeout)

    async def drained(self, seconds: float) -> bool:
        """Wait until no call is open, at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return not self._active

    def end_all(self) -> None:
        """End every open call as `draining`: streams get an error chunk, calls without a reply a 503."""
        self._ending = True
        for task, relay in list(self._active.items()):
            if relay is None:
                task.cancel(Outcome.DRAINING)
            else:
                relay.interrupt(Draining("The gateway is shutting down."))


def _overloaded(bound: str, most: int) -> Overloaded:
    return Overloaded(f"The gateway has as many open calls as server.{bound} allows ({most}).", headers={"Retry-After": "1"})


def _answered(answer: Answer) -> Response:
    fields = {"Server": "penstock", "Content-Type": answer.content_type, **answer.headers}
    return Response(answer.status, answer.body, fields)


def _forms(path: str) -> tuple[str, str]:
    """The paths of endpoints that `path` may mean: its last segment stands for `{id}`, or the one before that."""
    whole, _, last = path.rpartition("/")
    return f"{whole}/{{id}}", f"{whole.rpartition('/')[0]}/{{id}}/{last}"


def _by_path(points: Iterable[Endpoint]) -> dict[str, dict[str, Endpoint]]:
    """Endpoints by path, then by method."""
    found: dict[str, dict[str, Endpoint]] = {}
    for point in points:
        found.setdefault(point.path, {})[point.method] = point
    return found
