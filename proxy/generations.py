"""The middleware of the running config and of those before it: made, swapped, closed.

Strategy: a reload builds a whole generation beside the running one, starts what is new in it, and puts it in place within one
turn of the loop. A middleware whose entry did not change goes on as the same object; one whose options changed is replaced by
another that adopts what it knew. Requests keep the generation that they began with.
The one rule: a middleware is closed once, when the last request of the last generation that has it is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from proxy.changes import changed_providers, numbered
from proxy.config import Config, MiddlewareSpec
from proxy.pipeline import Handler, Middleware, Sample, Surroundings, compose
from proxy.routing import Directory
from proxy.server import Generation, ServerSettings
from proxy.store import Store
from proxy.transport import Transport

PATIENCE_SECONDS = 1.0  # at the end: requests that were cancelled are over in a moment

log: Any = structlog.get_logger("penstock")


@dataclass(frozen=True, slots=True)
class Place:
    """One entry of `middleware:`. before: the middleware that stood there before the reload; `layer` itself where it goes on."""

    spec: MiddlewareSpec
    layer: Any
    before: Any = None

    @property
    def fresh(self) -> bool:
        return self.layer is not self.before


async def _no_store(config: Config) -> None:
    return None


class Generations:
    """innermost: the handler within the onion. settings: what the edge makes of a config. gauges, samples, transport: see
    Surroundings. store: the one that a config wants, open, if any."""

    def __init__(
        self,
        innermost: Handler,
        settings: Callable[[Config, Sequence[Middleware]], ServerSettings],
        gauges: Mapping[str, Callable[[], float]],
        samples: Callable[[], Iterable[Sample]],
        worker: int = 0,
        transport: Transport | None = None,
        store: Callable[[Config], Awaitable[Store | None]] = _no_store,
    ) -> None:
        self._innermost = innermost
        self._transport = transport
        self._store = store
        self._settings = settings
        self._gauges, self._samples = gauges, samples
        self._worker = worker
        self._created = int(time.time())
        self._config: Config | None = None
        self._places: dict[str, Place] = {}
        self._live: list[Generation] = []
        self._closing: set[asyncio.Task[None]] = set()

    async def follow(self, config: Config, use: Callable[[Generation], None]) -> None:
        """Build what this config says, and `use` it. Raises whatever a middleware raises; then nothing has changed."""
        places = {name: self._placed(name, spec) for name, spec in numbered(config.middleware).items()}
        layers = [place.layer for place in places.values()]
        directory = Directory(config.providers, config.routes, config.default_provider, self._created)
        surroundings = self._surroundings(config, layers, directory, await self._store(config))
        generation = Generation(compose(layers, self._innermost), directory, self._settings(config, layers), layers)
        started: list[Any] = []
        try:
            for layer in (place.layer for place in places.values() if place.fresh):
                await _start(layer, surroundings)
                started.append(layer)
            # From here to the end nothing waits, so no request runs in between.
            for place in places.values():
                _join(place, surroundings)
        except BaseException:
            await _close_all(started)
            raise
        use(generation)
        self._config, self._places = config, places
        if self._live:
            self._retire(self._live[-1])
        self._live.append(generation)

    async def close(self) -> None:
        """Close all middleware, whether requests are over or not."""
        if self._closing:
            await asyncio.wait(self._closing, timeout=PATIENCE_SECONDS)
        for task in list(self._closing):
            task.cancel()
        while self._live:
            await self._close(self._live[0])

    def _placed(self, name: str, spec: MiddlewareSpec) -> Place:
        before = self._places.get(name)
        if before is None:
            return Place(spec, spec.factory(**spec.options))
        if before.spec == spec:
            return Place(spec, before.layer, before.layer)
        return Place(spec, spec.factory(**spec.options), before.layer)

    def _surroundings(
        self, config: Config, layers: Sequence[Middleware], directory: Directory, store: Store | None
    ) -> Surroundings:
        changed = changed_providers(self._config, config) if self._config is not None else frozenset[str]()
        server = config.server
        return Surroundings(
            layers,
            directory.route,
            self._gauges,
            workers=server.workers,
            worker=self._worker,
            samples=self._samples,
            changed=changed,
            write_timeout=server.write_timeout,
            store=store,
            attempt=self._innermost,
            transport=self._transport,
        )

    def _retire(self, old: Generation) -> None:
        """Close what only this one has, once its last request is over."""
        task = asyncio.get_running_loop().create_task(self._retired(old))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _retired(self, old: Generation) -> None:
        await old.ended()
        await self._close(old)

    async def _close(self, old: Generation) -> None:
        self._live.remove(old)
        in_use = {id(layer) for generation in self._live for layer in generation.layers}
        await _close_all([layer for layer in old.layers if id(layer) not in in_use])


def _attach(layer: Any, surroundings: Surroundings) -> None:
    if hasattr(layer, "attach"):
        layer.attach(surroundings)


async def _start(layer: Any, surroundings: Surroundings) -> None:
    _attach(layer, surroundings)
    if hasattr(layer, "start"):
        await layer.start()


def _join(place: Place, surroundings: Surroundings) -> None:
    """It is about to serve: as it is, in other surroundings, or in the place of another."""
    if not place.fresh:
        _attach(place.layer, surroundings)
    elif hasattr(place.layer, "adopt") and type(place.layer) is type(place.before):
        place.layer.adopt(place.before)


async def _close_all(layers: Sequence[Any]) -> None:
    """Innermost first; one that fails does not keep the others open."""
    for layer in reversed(layers):
        try:
            if hasattr(layer, "close"):
                await layer.close()
        except Exception:
            log.exception("a middleware failed to close", middleware=type(layer).__name__)
