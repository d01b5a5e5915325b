"""What one config makes of requests: the edge's settings, the composed pipeline, and what stands at which path.

Strategy: everything that a request needs to know of a config is looked up here, in dicts that were made when it was loaded.
The one rule: nothing here changes after it was made but the count of the requests that are in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from proxy.admission import Defaults, Readers
from proxy.cors import Cors
from proxy.pipeline import Endpoint, Handler, Middleware
from proxy.routing import Directory


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the operator decides about the edge. Sizes in bytes, times in seconds.

    loopback_only: refuse every Host but localhost, 127.0.0.1 and [::1], which keeps web pages (DNS rebinding) out of a gateway
    that has no auth; admin_loopback_only the same for the admin address, which never has.
    max_streams: calls that are open at a time, max_waiting: those among them that wait for their reply; 0 is no bound.
    cors: for pages of other origins; None where it is off, and then nothing looks at an Origin.
    """

    max_body: int = 32 * 2**20
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    loopback_only: bool = True
    admin_loopback_only: bool = True
    max_streams: int = 0
    max_waiting: int = 0
    defaults: Defaults = field(default_factory=Defaults)
    cors: Cors | None = None


class Generation:
    """What one config makes of requests; a reload puts another in its place, and requests keep the one that they began with.

    handler: the composed pipeline. directory: where model names lead. layers: the middleware, whose endpoints, request fields and
    authentication are served by the edge. open: how many requests are in it.
    """

    __slots__ = (
        "_ended", "allows", "authenticate", "cors", "directory", "endpoints", "handler", "layers", "open", "readers", "refused",
        "settings",
    )  # fmt: skip

    def __init__(
        self, handler: Handler, directory: Directory, settings: ServerSettings, layers: Sequence[Middleware] = ()
    ) -> None:
        self.handler = handler
        self.directory = directory
        self.settings = settings
        self.cors = settings.cors
        self.layers = layers
        self.authenticate = next((found for layer in layers if (found := getattr(layer, "authenticate", None))), None)
        self.allows = next((found for layer in layers if (found := getattr(layer, "allows", None))), None)
        self.endpoints = _by_path(point for layer in layers for point in getattr(layer, "endpoints", ()))
        self.readers = Readers.of(layers)
        self.refused = [layer.refused for layer in layers if hasattr(layer, "refused")]
        self.open = 0
        self._ended: asyncio.Event | None = None

    def point(self, path: str, method: str) -> Endpoint | None:
        """The middleware's endpoint at a path that takes this method, or any that is there."""
        found = self.at(path)
        if found is None:
            return None
        return found.get(method) or found.get("GET" if method == "HEAD" else "") or next(iter(found.values()))

    def at(self, path: str) -> Mapping[str, Endpoint] | None:
        """The middleware's endpoints at a path, by method."""
        return self.endpoints.get(path) or next((found for form in _forms(path) if (found := self.endpoints.get(form))), None)

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
