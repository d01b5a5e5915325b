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
from collections.abc import Mapping
from types import TracebackType

from aiohttp import web

from proxy import logs
from proxy.admission import Defaults
from proxy.config import Config
from proxy.demo import DemoTransport
from proxy.exchange import SETTLE_SECONDS, Exchange
from proxy.pipeline import Middleware, Surroundings, compose
from proxy.routing import Directory
from proxy.server import Edge, ServerSettings, listen
from proxy.transport import Transport
from proxy.upstream import HttpTransport
from proxy.wire import WIRES


class Gateway:
    """A gateway that serves between `async with` and its end. port: the one it listens on (the system's choice for port 0).

    settle: see Exchange. transports: replaces the transport of some wire formats (for tests).
    """

    def __init__(
        self, config: Config, *, settle: float = SETTLE_SECONDS, transports: Mapping[str, Transport] | None = None
    ) -> None:
        self.config = config
        self.port = 0
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
        self.edge = Edge(handler, directory, _settings(config), self.layers)
        for layer in self.layers:
            if hasattr(layer, "attach"):
                layer.attach(Surroundings(self.layers, directory.route))
            if hasattr(layer, "start"):
                await layer.start()
        self._runner = web.ServerRunner(self.edge.server(), handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        try:
            for sock in listen(config.server.host, config.server.port):
                site = web.SockSite(self._runner, sock, backlog=4096)
                await site.start()
                self._sites.append(site)
                self.port = sock.getsockname()[1]
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    async def drain(self) -> None:
        """Stop accepting, let streams finish for `drain_timeout`, end the rest as `draining`."""
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
        await self._runner.cleanup()
        for layer in reversed(self.layers):
            if hasattr(layer, "close"):
                await layer.close()
        await self.http.close()


def _settings(config: Config) -> ServerSettings:
    server = config.server
    return ServerSettings(
        max_body=server.max_body,
        body_timeout=server.body_timeout,
        write_timeout=server.write_timeout,
        loopback_only=not server.allow_anonymous,
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
        print(f"penstock: cannot listen on {config.server.host}:{config.server.port}: {error.strerror or error}", file=sys.stderr)
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
    print(f"\n    curl -N {base}/chat/completions -H 'Content-Type: application/json' -d '{body}'\n", file=sys.stderr, flush=True)
