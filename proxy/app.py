"""The composition root: a checked config in, a running gateway out. The only module that knows every other.

Life: start (session, pipeline, listeners) · serve · drain (readiness says no, listeners close, streams finish, the rest is ended
as `draining`) · stop.
The one rule: what starts here is stopped here, in the reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from aiohttp import web

from proxy import logs
from proxy.admission import Defaults
from proxy.config import Config
from proxy.demo import DemoTransport
from proxy.exchange import SETTLE_SECONDS, Exchange
from proxy.pipeline import Middleware, Surroundings, compose
from proxy.routing import Directory
from proxy.server import Edge, ServerSettings
from proxy.sockets import listen
from proxy.transport import Transport
from proxy.upstream import HttpTransport
from proxy.wire import WIRES


class Gateway:
    """A gateway that serves between `async with` and its end. port: the one it listens on (the system's choice for port 0).
    admin_port: that of `server.admin_listen`, 0 where it is off.

    settle: see Exchange. transports: replaces the transport of some wire formats (for tests).
    """

    def __init__(
        self, config: Config, *, settle: float = SETTLE_SECONDS, transports: Mapping[str, Transport] | None = None
    ) -> None:
        self.config = config
        self.port = self.admin_port = 0
        self._settle = settle
        self._transports = transports or {}
        self._sites: list[web.SockSite] = []

    async def __aenter__(self) -> Gateway:
        config = self.config
        self.http = HttpTransport.open()
        transports: dict[str, Transport] = dict.fromkeys(WIRES, self.http)
        transports["demo"] = DemoTransport()
        transports.update(self._transports)
        self.layers: list[Middleware] = [spec.factory(**spec.options) for spec in config.middleware]
        handler = compose(self.layers, Exchange(WIRES, transports, settle=self._settle))
        directory = Directory(config.providers, config.routes, config.default_provider, int(time.time()))
        self.edge = Edge(handler, directory, _settings(config, self.layers), self.layers)
        gauges = {
            "upstream_connections": lambda: self.http.connections,
            "open_calls": lambda: self.edge.open_calls,
            "buffered_bytes": lambda: self.edge.buffered,
        }
        for layer in self.layers:
            if hasattr(layer, "attach"):
                layer.attach(Surroundings(self.layers, directory.route, gauges))
            if hasattr(layer, "start"):
                await layer.start()
        self._runner = web.ServerRunner(self.edge.server(), handle_signals=False, shutdown_timeout=0.1)
        self._admin = web.ServerRunner(self.edge.server(admin=True), handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._admin.setup()
        try:
            self._sites, self.port = await _sites(self._runner, config.server.host, config.server.port)
            if (admin := config.server.admin_address) is not None:
                _, self.admin_port = await _sites(self._admin, *admin)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    async def drain(self) -> None:
        """Stop accepting, let streams finish for `drain_timeout`, end the rest as `draining`.

        The admin address stays until the end, so that operators see the streams finish.
        """
        server = self.config.server
        self.edge.not_ready()
        await asyncio.sleep(server.drain_delay)
        self.edge.draining = True
        for site in self._sites:
            await site.stop()
        if not await self.edge.drained(server.drain_timeout):
            self.edge.end_all()
            await self.edge.drained(5.0)

    async def _stop(self) -> None:
        await self._admin.cleanup()
        await self._runner.cleanup()
        for layer in reversed(self.layers):
            if hasattr(layer, "close"):
                await layer.close()
        await self.http.close()


async def _sites(runner: web.ServerRunner, host: str, port: int) -> tuple[list[web.SockSite], int]:
    """Listens on every address of `host`; the sites and the last one's port. Raises OSError with the address as its filename."""
    sites: list[web.SockSite] = []
    bound = port
    try:
        for sock in listen(host, port):
            sites.append(web.SockSite(runner, sock, backlog=4096))
            await sites[-1].start()
            bound = sock.getsockname()[1]
    except OSError as error:
        error.filename = f"{host}:{port}"
        raise
    return sites, bound


def _settings(config: Config, layers: Sequence[Middleware]) -> ServerSettings:
    server = config.server
    authenticated = any(hasattr(layer, "authenticate") for layer in layers)
    return ServerSettings(
        max_body=server.max_body,
        body_timeout=server.body_timeout,
        write_timeout=server.write_timeout,
        loopback_only=not server.allow_anonymous and not authenticated,
        admin_loopback_only=not server.allow_anonymous,
        defaults=Defaults(config.usage_on_finish, server.strict_params, server.max_depth),
    )


def run(config: Config) -> int:
    """Serve until Ctrl-C or SIGTERM, then drain. The exit status: 0, or 1 where the port cannot be listened on."""
    logs.configure()
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: asyncio's own loop serves, more slowly
        runner = asyncio.Runner()
    else:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with runner:
        return runner.run(_serve(config))


async def _serve(config: Config) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        async with Gateway(config) as gateway:
            for name in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(name, stop.set)
            # What was made at start lives to the end: collections need not look at it again (-5 % CPU on small requests).
            gc.collect()
            gc.freeze()
            _greet(config, gateway.port)
            await stop.wait()
            # A second signal does not wait for the streams.
            draining = asyncio.create_task(gateway.drain())
            for name in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(name, draining.cancel)
            print(f"penstock: draining {gateway.edge.open_calls} open calls", file=sys.stderr, flush=True)
            with contextlib.suppress(asyncio.CancelledError):
                await draining
    except OSError as error:
        address = error.filename or f"{config.server.host}:{config.server.port}"
        print(f"penstock: cannot listen on {address}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _greet(config: Config, port: int) -> None:
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    base = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v1"  # noqa: S104 - a comparison, nothing is bound
    disabled = [row.name for row in config.providers.values() if row.missing]
    if disabled:
        print(
            f"penstock: without a key, so disabled: {', '.join(disabled)} (penstock check names the variables)", file=sys.stderr
        )
    print(f"penstock: serving {base}", file=sys.stderr)
    model = "demo/echo" if any(row.api == "demo" for row in config.providers.values()) else "provider/model"
    body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello, Penstock"}}]}}'
    key = " -H 'Authorization: Bearer …'" if any(hasattr(spec.factory, "authenticate") for spec in config.middleware) else ""
    curl = f"curl -N {base}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    print(f"\n    {curl}\n", file=sys.stderr, flush=True)
