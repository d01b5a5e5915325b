"""Policy: whatever an operator may want to delete from config.yaml, one file per middleware.

A middleware is a class with `async def __call__(self, call, next) -> Reply`; its constructor's keywords and their annotations are
its part of config.yaml's schema. It knows `proxy.call`, `proxy.reply`, `proxy.errors`, `proxy.pipeline` and `proxy.units`, and no
other middleware. docs/middleware.md shows how to write one.
The one rule: deleting any one of these files, its line in the table below and its line in config.yaml leaves a working gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from middleware.auth import Auth
from middleware.bounds import Bounds
from middleware.cache import Cache
from middleware.coalesce import Coalesce
from middleware.continuation import Continuation
from middleware.disconnect import Disconnect
from middleware.fallback import Fallback
from middleware.limits import Limits
from middleware.metrics import Metrics
from middleware.resume import Resume
from middleware.retry import Retry
from middleware.smooth import Smooth
from middleware.timeout import Timeout
from middleware.tool_guard import ToolGuard
from middleware.tracking import Tracking
from proxy.pipeline import Middleware

TABLE: Mapping[str, Callable[..., Middleware]] = {
    "auth": Auth,
    "bounds": Bounds,
    "cache": Cache,
    "coalesce": Coalesce,
    "disconnect": Disconnect,
    "continuation": Continuation,
    "fallback": Fallback,
    "limits": Limits,
    "metrics": Metrics,
    "resume": Resume,
    "retry": Retry,
    "smooth": Smooth,
    "tracking": Tracking,
    "timeout": Timeout,
    "tool_guard": ToolGuard,
}
