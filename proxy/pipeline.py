"""The verb: a call goes in through an onion of middleware, and a reply comes out.

    Handler    = async (Call) -> Reply
    Middleware = async (Call, Handler) -> Reply

Strategy: `compose` nests the list once, at start; the outermost comes first, as in config.yaml. `await next(call)` returns only
when the head is settled and the first real chunk is in hand, so an error before the first token is always an exception.
The one rule: a middleware that takes a reply and does not return it closes it (`await reply.close()`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from proxy.call import Call
from proxy.reply import Reply

Handler = Callable[[Call], Awaitable[Reply]]


class Middleware(Protocol):
    """A policy around calls. Its constructor's keywords and their annotations are its part of config.yaml's schema."""

    async def __call__(self, call: Call, next: Handler) -> Reply: ...


def compose(middleware: Sequence[Middleware], innermost: Handler) -> Handler:
    """One handler out of many: `compose([a, b], h)(call)` is `a(call, lambda call: b(call, h))`."""
    handler = innermost
    for layer in reversed(middleware):
        handler = partial(layer, next=handler)
    return handler
