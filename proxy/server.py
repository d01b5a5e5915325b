"""The edge: HTTP in, a call into the pipeline, a relay out.

Strategy: a flat table of endpoints under every base URL that clients of such proxies are configured with (no application, no
resolver: a look-up in a dict). Whatever is raised on the way becomes the OpenAI error envelope here.
The one rule: nothing is read of a body before the path, the method, the Host and the declared size are accepted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import orjson
import structlog

from proxy.admission import ANYBODY, admit, parse_json, request_id, sent_identity
from proxy.call import Call, Peer, Principal, altered
from proxy.cors import is_preflight
from proxy.delivery import Response
from proxy.errors import GatewayError, Refused
from proxy.faces import FACES, Face
from proxy.generation import Generation
from proxy.http import Request, allow, check_json, error_response, head_headers, json_response
from proxy.keepalive import kept_alive, told
from proxy.open_calls import OpenCalls, in_time
from proxy.pipeline import BASES, Answer, Endpoint, Query, Streamed, ask_one
from proxy.relay import Relay
from proxy.reply import Reply
from proxy.sockets import Server

log = structlog.get_logger("penstock")

Json = dict[str, Any]
ENDPOINTS: Mapping[str, Face] = {base + path: face for base in BASES for path, face in FACES.items()}
MODELS = tuple(base + "/models" for base in BASES)
FACES_BY_KIND: Mapping[str, Face] = {face.KIND: face for face in FACES.values()}
HEALTH = ("/healthz", "/readyz")
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
OPERATOR = Principal("operator", admin=True)


class Edge(OpenCalls):
    """Serves calls. generation: what serves the next request; assign another to reload. ask: how endpoints are asked; several
    workers ask each other, too. state: what `/readyz?verbose` says beside the rest.
    """

    def __init__(
        self,
        generation: Generation,
        ask: Callable[[Endpoint, Query], Awaitable[Answer]] = ask_one,
        state: Callable[[], Json] = dict,
    ) -> None:
        super().__init__(generation)
        self._ask = ask
        self._state = state
        self._ready = True

    def not_ready(self) -> None:
        """`/readyz` says no from now on, while calls are still accepted, so that a load balancer turns away first."""
        self._ready = False

    def server(self, *, admin: bool = False) -> Server:
        """The server for this edge. admin: the second address, for scrapers and operators, without auth."""
        return Server(self.handle_admin) if admin else Server(self.handle, self._lines)

    def _lines(self, origin: str) -> str:
        """What every answer to a request from this origin says, `*` and all."""
        cors = self.generation.cors
        return cors.lines(origin) if cors is not None else ""

    async def handle(self, request: Request) -> None:
        """One HTTP request, from its head to its answer."""
        headers, delivery = request.headers, request.delivery
        identity = request_id(headers)
        generation = self.generation
        generation.open += 1
        if generation.cors is not None:
            delivery.lines = generation.cors.lines(headers.get("origin", ""))
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
        path, cors = request.path, generation.cors
        if cors is not None and is_preflight(request.method, headers):
            self._check_host(headers.get("host", ""), generation.settings.loopback_only)
            return cors.preflight(headers, self._methods(generation, path) or _nothing(request))
        if path in HEALTH and "verbose" not in request.query:
            allow(request, "GET", "HEAD")
            return self._health(path)
        loopback_only = generation.settings.loopback_only
        self._check_host(headers.get("host", ""), loopback_only)
        if cors is None:
            if loopback_only and request.method == "POST":
                self._check_origin(headers.get("origin"))
        elif generation.authenticate is None:
            # Else a page needs a key. Here its requests would be served, and merely their answers be hidden from it.
            cors.check(headers.get("origin", ""))
        if point := self._signed(generation, request):
            return await self._serve(generation, point, request, headers, ANYBODY, identity)
        principal = generation.authenticate(headers) if generation.authenticate is not None else ANYBODY
        if face := ENDPOINTS.get(path):
            allow(request, "POST")
            return await self._call(generation, request, headers, identity, face, principal)
        # As it is written first: an id may hold an encoded slash.
        if point := self.point(request.raw_path, request.method, generation) or self.point(path, request.method, generation):
            return await self._serve(generation, point, request, headers, principal, identity)
        for models in MODELS:
            if path == models or path.startswith(models + "/"):
                allow(request, "GET")
                return self._models(generation, path[len(models) + 1 :], principal)
        return _nothing(request)

    def _methods(self, generation: Generation, path: str) -> Sequence[str]:
        """Those that a path takes; none where there is nothing."""
        if path in ENDPOINTS:
            return ("POST",)
        if path in HEALTH:
            return ("GET", "HEAD")
        if any(path == models or path.startswith(models + "/") for models in MODELS):
            return ("GET",)
        found = generation.at(path) or ()
        return (*found, "HEAD") if "GET" in found else (*found,)

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
        if request.path in HEALTH and "verbose" not in request.query:
            allow(request, "GET", "HEAD")
            return self._health(request.path)
        if point := self.point(request.path, request.method, generation):
            return await self._serve(generation, point, request, request.headers, OPERATOR, request_id(request.headers))
        raise Refused(f"There is nothing at {request.path[:200]} on the admin address.", status=404, code="unknown_path")

    def point(self, path: str, method: str = "GET", generation: Generation | None = None) -> Endpoint | None:
        """The endpoint at a path that takes this method, or any that is there. generation: the current one if none is given."""
        if path == "/readyz":
            return Endpoint("GET", path, self._verbose, admin=True)
        return (generation or self.generation).point(path, method)

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
        query = Query(
            request.method, request.path, request.query, headers, body, principal, sent_identity(headers), request.raw_path
        )
        if point.admin:
            return _answered(await self._ask(point, query))
        # It may stream: it is open as a call is, and is ended as one.
        task = self.enter()
        try:
            answer = await self.unless_ended(self._ask(point, query))
            if not isinstance(answer, Streamed):
                return _answered(answer)
            call = altered(answer.call, id=identity)
            await self._relayed(generation, request, call, answer.reply, FACES_BY_KIND[call.kind], 0.0)
            return None
        finally:
            self.leave(task)

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
        if loopback_only and not _is_loopback(host):
            raise Refused(
                "Without auth this gateway only answers to the Host localhost, 127.0.0.1 or [::1].",
                status=403,
                code="host_not_allowed",
            )

    def _check_origin(self, origin: str | None) -> None:
        """A page that is merely open in this machine's browser must not spend: some POSTs need no preflight. One that is served
        from this machine is its user's own, and comes so through development servers, too."""
        if origin is not None and not _is_here(origin):
            message = "Without auth this gateway answers no page of another machine; server.cors.origins says which may call."
            raise Refused(message, status=403, code="origin_not_allowed", type="permission_error")

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
        task = self.enter()
        try:
            started = time.perf_counter()
            check_json(headers)
            settings, handler = generation.settings, generation.handler
            raw = request.at_hand(settings.max_body)
            if raw is None:
                raw = await self.unless_ended(self._body(generation, request))
            body = parse_json(raw, settings.defaults.max_depth)
            face.check(body)
            directory, readers = generation.directory, generation.readers
            call = admit(body, face.KIND, headers, directory, settings.defaults, identity, principal, readers)
            if readers.peer:
                call = altered(call, extensions={**call.extensions, Peer: Peer(request.delivery.peer)})
            waiting = handler(call) if call.deadline is None else in_time(handler, call)
            if call.options.keepalive_after and call.stream and call.kind != "embeddings":
                waiting = kept_alive(waiting, call, request.delivery)
            try:
                reply = await self.unless_ended(waiting)
                await self._relayed(generation, request, call, reply, face, time.perf_counter() - started)
                return None
            except GatewayError as error:
                return told(error, call, face, request.delivery)
        finally:
            self.leave(task)

    async def _relayed(
        self, generation: Generation, request: Request, call: Call, reply: Reply, face: Face, seconds: float
    ) -> None:
        """The reply, written out to its end. Raises GatewayError as long as nothing was sent."""
        relay = Relay(request.delivery, call, reply, face, generation.settings.write_timeout)
        self.relays(relay)
        try:
            await relay.run(head_headers(call, reply.head, seconds))
        finally:
            self.relayed()

    def _body(self, generation: Generation, request: Request) -> Awaitable[bytes]:
        return request.body(generation.settings.max_body, generation.settings.body_timeout)


def _nothing(request: Request) -> NoReturn:
    raise Refused(f"There is nothing at {request.method} {request.path[:200]}.", status=404, code="unknown_path")


def _answered(answer: Answer) -> Response:
    fields = {"Server": "penstock", "Content-Type": answer.content_type, **answer.headers}
    return Response(answer.status, answer.body, fields)


@lru_cache(64)
def _is_loopback(host: str) -> bool:
    """A name of this machine itself, with or without a port."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name.strip("[]").lower() in LOOPBACK_HOSTS


def _is_here(origin: str) -> bool:
    """Is it the origin of a page that this machine serves to itself?"""
    scheme, found, host = origin.partition("://")
    return bool(found) and scheme in ("http", "https") and _is_loopback(host)
