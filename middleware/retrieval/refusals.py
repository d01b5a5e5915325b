"""What the endpoints of files say no with, in one place, because it must be the same words for the same answer.

The one rule: a file that was never there, one that was deleted, and one of another key's are refused alike.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson

from proxy.errors import GatewayError, Refused
from proxy.pipeline import Answer, Query
from proxy.store import StoreUnavailable

Serve = Callable[[Query], Awaitable[Answer]]


def bad(param: str, message: str) -> Refused:
    return Refused(f"{param}: {message}.", code="invalid_value", param=param)


def missing(param: str | None = None) -> Refused:
    return Refused("There is no such file.", status=404, code="file_not_found", param=param)


def unavailable() -> GatewayError:
    return GatewayError(
        "The store of files cannot be reached now.",
        status=503,
        type="service_unavailable",
        code="store_unavailable",
        headers={"Retry-After": "5"},
    )


def stored(handler: Serve) -> Serve:
    """The handler; where the store is down, a 503."""
    return partial(_guarded, handler)


async def _guarded(handler: Serve, query: Query) -> Answer:
    try:
        return await handler(query)
    except StoreUnavailable:
        raise unavailable() from None


def answered(found: dict[str, Any]) -> Answer:
    return Answer(orjson.dumps(found))
