"""The composition root: a checked config in, a running gateway out. The only module that knows every other.

Life: start (session, pipeline, listeners) · serve · reload (another pipeline, the same sockets) · drain (readiness says no,
listeners close, streams finish, the rest is ended as `draining`) · stop.
The one rule: what starts here is stopped here, in the reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType

from aiohttp import web

from proxy import logs
from proxy.admission import Defaults
from proxy.changes import changes
from proxy.config import Config
from proxy.configfile import ConfigFile
from proxy.cors import Cors, Policy
from proxy.demo import DemoTransport
from proxy.errors import Refused
from proxy.exchange import SETTLE_SECONDS, Exchange
from proxy.generation import Generation, ServerSettings
from proxy.generations import Generations
from proxy.pipeline import Answer, Endpoint, Middleware, Query, Sample, ask_one, share
from proxy.reload import Record, Reloader
from proxy.server import Edge
from proxy.sockets import listen
from proxy.storage import Storage
from proxy.transport import Transport
from proxy.upstream import HttpTransport
from proxy.wire import WIRES
from proxy.wording import PER_WORKER

# Objects made less objects freed until the young are looked at, and how often that until the next older generation is.
GC_THRESHOLDS = (50_000, 20, 100)


class Gateway:
    """A gateway that serves between `async with` and its end. port: the one it listens on (the system's choice for port 0).
    admin_port: that of `server.admin_listen`, 0 where it is off.

    settle: see Exchange. transports: replaces the transport of some wire formats (for tests). The rest is for one of several
    workers: its number, its bound sockets (for the port, for the admin address), how endpoints are asked; number: of its config.
    """

    def __init__(
        self,
        config: Config,
        *,
        settle: float = SETTLE_SECONDS,
        transports: Mapping[str, Transport] | None = None,
        worker: int = 0,
        number: int = 1,
        sockets: tuple[Sequence[socket.socket], Sequence[socket.socket]] | None = None,
        ask: Callable[[Endpoint, Query], Awaitable[Answer]] = ask_one,
    ) -> None:
        self.config = config
        self._worker = worker
        self._sockets = sockets
        self._ask = ask
        self.port = self.admin_port = 0
        self._settle = settle
        self._transports = transports or {}
        self._sites: list[web.SockSite] = []
        self.record = Record(worker, number)

    async def __aenter__(self) -> Gateway:
        config = self.config
        self.http = HttpTransport.open()
        transports: dict[str, Transport] = dict.fromkeys(WIRES, self.http)
        transports["demo"] = DemoTransport()
        transports.update(self._transports)
        gauges = {
            "upstream_connections": lambda: self.http.connections,
            "open_calls": lambda: self.edge.open_calls,
            "waiting_calls": lambda: self.edge.waiting_calls,
            "max_streams": lambda: self.edge.max_streams,
            "max_waiting": lambda: self.edge.max_waiting,
            "buffered_bytes": lambda: self.edge.buffered,
        }
        exchange = Exchange(WIRES, transports, settle=self._settle)
        settings = partial(_settings, worker=self._worker)
        self._storage = Storage()
        self._generations = Generations(
            exchange, settings, gauges, self._samples, self._worker, self.http, self._storage.opened
        )  # fmt: skip
        try:
            await self._generations.follow(config, self._begin)
        except BaseException:
            await self._storage.close()
            await self.http.close()
            raise
        self._server = self.edge.server()
        self._runner = web.ServerRunner(self._server, handle_signals=False, shutdown_timeout=0.1)
        self._admin = web.ServerRunner(self.edge.server(admin=True), handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._admin.setup()
        try:
            sockets, admin = self._sockets or bound(config)
            self._sites, self.port = await _sites(self._runner, sockets)
            _, self.admin_port = await _sites(self._admin, admin)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    def _begin(self, generation: Generation) -> None:
        self.edge = Edge(generation, self._ask, lambda: self.record.health() | self._storage.health())

    def _samples(self) -> Iterator[Sample]:
        """The gateway's own figures, beside those of its middleware."""
        yield from self.record.samples()
        yield from self._storage.samples()

    def _switch(self, generation: Generation) -> None:
        self.edge.generation = generation

    @property
    def layers(self) -> Sequence[Middleware]:
        """The middleware that serves the next request, outermost first."""
        return self.edge.generation.layers

    async def reload(self, config: Config) -> list[str]:
        """Serve the next requests by another config; those that run keep theirs. Sockets stay, so the settings that they were
        made from must be the same. What has changed, in words. Raises whatever a middleware raises; then nothing has changed.
        """
        await self._generations.follow(config, self._switch)
        before, self.config = self.config, config
        return changes(before, config)

    async def drain(self, leave: Callable[[], None] = lambda: None) -> None:
        """Stop accepting, let streams finish for `drain_timeout`, end the rest as `draining`.

        The admin address stays until the end, so that operators see the streams finish. leave: called before the listeners close.
        """
        server = self.config.server
        self.edge.not_ready()
        self._server.part()
        await asyncio.sleep(server.drain_delay)
        self.edge.draining = True
        leave()
        for site in self._sites:
            await site.stop()
        self._server.close_idle()
        if not await self.edge.drained(server.drain_timeout):
            self.edge.end_all()
            await self.edge.drained(5.0)

    async def _stop(self) -> None:
        await self._admin.cleanup()
        await self._runner.cleanup()
        await self._generations.close()
        await self._storage.close()
        await self.http.close()


def bound(config: Config) -> tuple[list[socket.socket], list[socket.socket]]:
    """Sockets for the port and for the admin address, bound. Raises OSError with the address as its filename."""
    server = config.server
    found: list[list[socket.socket]] = []
    for host, port in ((server.host, server.port), *([server.admin_address] if server.admin_address else ())):
        try:
            found.append(listen(host, port))
        except OSError as error:
            for sock in (sock for group in found for sock in group):
                sock.close()
            error.filename = f"{host}:{port}"
            raise
    return found[0], found[1] if found[1:] else []


async def _sites(runner: web.ServerRunner, sockets: Sequence[socket.socket]) -> tuple[list[web.SockSite], int]:
    """Listens; the sites and the last one's port. Raises OSError with the address as its filename."""
    sites: list[web.SockSite] = []
    port = 0
    for sock in sockets:
        host, port = sock.getsockname()[:2]
        try:
            sites.append(web.SockSite(runner, sock, backlog=4096))
            await sites[-1].start()
        except OSError as error:
            error.filename = f"{host}:{port}"
            raise
    return sites, port


def _settings(config: Config, layers: Sequence[Middleware], worker: int) -> ServerSettings:
    server = config.server
    authenticated = any(hasattr(layer, "authenticate") for layer in layers)
    return ServerSettings(
        max_body=server.max_body,
        body_timeout=server.body_timeout,
        write_timeout=server.write_timeout,
        loopback_only=not server.allow_anonymous and not authenticated,
        admin_loopback_only=not server.allow_anonymous,
        max_streams=share(server.max_streams, server.workers, worker),
        max_waiting=share(server.max_waiting, server.workers, worker),
        defaults=Defaults(
            config.usage_on_finish, server.strict_params, server.max_depth, server.keepalive_after, server.keepalive_interval
        ),
        cors=Cors(Policy(**dict(server.cors))) if server.cors is not None else None,
    )


def run(config: Config, file: ConfigFile | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM, then drain. file: where the config is from, which may change. The exit status: 0, or 1 where
    the port cannot be listened on.
    """
    if config.server.workers > 1:
        from proxy.workers import supervise  # here, so that a single process does not load it

        return supervise(config, file)
    logs.configure()
    with event_loop() as runner:
        return runner.run(_serve(config, file))


def event_loop() -> asyncio.Runner:
    """uvloop's, or asyncio's own where there is no wheel for this platform; it serves more slowly."""
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


async def _serve(config: Config, file: ConfigFile | None) -> int:
    stop, bell = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        async with Gateway(config) as gateway:
            for name in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(name, stop.set)
            settle_memory()
            async with following(gateway, file, bell):
                greet(config, gateway.port)
                await stop.wait()
            # A second signal does not wait for the streams.
            draining = asyncio.create_task(gateway.drain())
            for name in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(name, draining.cancel)
            print(f"penstock: draining {gateway.edge.open_calls} open calls", file=sys.stderr, flush=True)
            with contextlib.suppress(asyncio.CancelledError):
                await draining
    except OSError as error:
        return cannot_listen(config, error)
    except Refused as error:  # a middleware names something that leads nowhere
        print(f"penstock: cannot start: {error.message}", file=sys.stderr)
        return 1
    return 0


@contextlib.asynccontextmanager
async def following(gateway: Gateway, file: ConfigFile | None, bell: asyncio.Event) -> AsyncIterator[None]:
    """Meanwhile reload at each SIGHUP and, with `server.watch`, when the file has changed. Without a file there is none."""
    if file is None:
        yield
        return
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, bell.set)
    task = asyncio.create_task(Reloader(gateway, file).run(bell))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def settle_memory() -> None:
    """What was made at start lives to the end: collections need not look at it again (-5 % CPU on small requests), and memory
    that was shared at a fork stays shared. A request leaves nothing to collect (tests/test_counts.py), and with thousands of open
    streams a look at all of them takes milliseconds in which no chunk moves: so the collector looks seldom.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def cannot_listen(config: Config, error: OSError) -> int:
    """Say so; the exit status."""
    address = error.filename or f"{config.server.host}:{config.server.port}"
    print(f"penstock: cannot listen on {address}: {error.strerror or error}", file=sys.stderr)
    return 1


def greet(config: Config, port: int) -> None:
    """Say where the gateway serves, and how to try it."""
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    base = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v1"  # noqa: S104 - a comparison, nothing is bound
    disabled = [row.name for row in config.providers.values() if row.missing]
    if disabled:
        print(
            f"penstock: without a key, so disabled: {', '.join(disabled)} (penstock check names the variables)", file=sys.stderr
        )
    if config.server.workers > 1:
        print(f"penstock: {config.server.workers} workers, {PER_WORKER}", file=sys.stderr)
    print(f"penstock: serving {base}", file=sys.stderr)
    model = "demo/echo" if any(row.api == "demo" for row in config.providers.values()) else "provider/model"
    body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello, Penstock"}}]}}'
    key = " -H 'Authorization: Bearer …'" if any(hasattr(spec.factory, "authenticate") for spec in config.middleware) else ""
    curl = f"curl -N {base}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    print(f"\n    {curl}\n", file=sys.stderr, flush=True)
