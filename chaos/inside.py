"""A middleware of the run's own, which tells what only the process itself can see: its tasks, and its memory without slack.

The one rule: calls go through it untouched.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from collections import Counter

import orjson

from bench.kernel import resident
from proxy.call import Call
from proxy.pipeline import Answer, Endpoint, Handler, Query
from proxy.reply import Reply


class Inside:
    """GET /chaos/inside: {"tasks", "names", "resident"}; names counts tasks by their coroutine.

    resident, in bytes, is measured after a full collection and malloc_trim(3), in a process that `gateway` starts with
    PYTHONMALLOC=malloc, so that all that is free can go back: what remains is held by somebody, or lies between what is.
    """

    def __init__(self) -> None:
        self.endpoints = (Endpoint("GET", "/chaos/inside", self._look, admin=True),)

    async def __call__(self, call: Call, next: Handler) -> Reply:
        return await next(call)

    async def _look(self, query: Query) -> Answer:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
        names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
        return Answer(orjson.dumps({"tasks": names.total(), "names": names, "resident": resident([os.getpid()])}))
