"""Policy: whatever an operator may want to delete from config.yaml, one file per middleware.

A middleware is a class with `async def __call__(self, call, next) -> Reply`; its constructor's keywords and their annotations are
its part of config.yaml's schema. It knows `proxy.call`, `proxy.reply`, `proxy.errors`, `proxy.pipeline` and `proxy.units`, and no
other middleware. docs/middleware.md shows how to write one.
The one rule: deleting any one of these files, its line in the table below and its line in config.yaml leaves a working gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

from proxy.pipeline import Middleware


class Shelf(Mapping[str, Callable[..., Middleware]]):
    """Classes by name, each imported when it is first asked for: what a config does not name costs no memory."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Callable[..., Middleware]:
        module, _, attribute = self._places[name].partition(":")
        found: Callable[..., Middleware] = getattr(import_module(module), attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


TABLE = Shelf(
    {
        "auth": "middleware.auth:Auth",
        "bounds": "middleware.bounds:Bounds",
        "cache": "middleware.cache:Cache",
        "coalesce": "middleware.coalesce:Coalesce",
        "continuation": "middleware.continuation:Continuation",
        "disconnect": "middleware.disconnect:Disconnect",
        "fallback": "middleware.fallback:Fallback",
        "guardrails": "middleware.guardrails:Guardrails",
        "limits": "middleware.limits:Limits",
        "memory": "middleware.memory:Memory",
        "metrics": "middleware.metrics:Metrics",
        "resume": "middleware.resume:Resume",
        "retrieval": "middleware.retrieval.layer:Retrieval",
        "retry": "middleware.retry:Retry",
        "smooth": "middleware.smooth:Smooth",
        "timeout": "middleware.timeout:Timeout",
        "tool_guard": "middleware.tool_guard:ToolGuard",
        "tracking": "middleware.tracking:Tracking",
    }
)
