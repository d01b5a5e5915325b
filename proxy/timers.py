"""Timers for the many deadlines that share a few durations and nearly always get cancelled: `after(seconds, callback).cancel()`.

Strategy: what is asked for with the same duration is also due in that order. So each loop has one insertion-ordered dict per
duration, and one loop timer for the oldest in it; to ask and to cancel are an insertion and a deletion. The timer that goes off
early, because the one it was set for is gone, is set again for the oldest that is left, if any is.
The one rule: a duration is in the table exactly as long as its loop timer is set.

Measured, after + cancel on any loop: 0.36 us alone, 0.45 with 5,000 pending. call_later + cancel: 0.36 and 0.56 on uvloop, 1.1 on
asyncio's own loop.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle, get_running_loop
from collections.abc import Callable

Callback = Callable[[], object]

# uvloop rounds to whole milliseconds, down as well as up: set this much later, a timer never goes off before its expiry is due.
GRAIN = 0.001
# Clients may bring durations of their own: beyond so many, those without a pending expiry go before their timer has.
MOST_KEPT = 64


def _nothing() -> None:
    """In the place of a callback that is not wanted any more."""


class Expiry:
    """A callback that will be called, unless it is cancelled before."""

    __slots__ = ("_queue", "callback")

    def __init__(self, queue: _Queue, callback: Callback) -> None:
        self._queue = queue
        self.callback = callback

    def cancel(self) -> None:
        """Never mind. Once it was cancelled or called, this changes nothing."""
        self._queue.pop(self, None)
        # Whoever waits for it holds it, and is held by its callback: a cycle per request would be the collector's only work.
        self.callback = _nothing


class _Queue(dict[Expiry, float]):
    """The pending expiries of one duration, the oldest first, each with when it is due by the loop's clock."""

    __slots__ = ("seconds", "timer")
    seconds: float
    timer: TimerHandle


class _Table(dict[float, _Queue]):
    """The durations of one loop. room: with how many of them to look for those that nobody waits for."""

    room = MOST_KEPT


# A loop stays in it until its last timer has gone off, or, closed before, until another loop comes.
_TABLES: dict[AbstractEventLoop, _Table] = {}


def after(seconds: float, callback: Callback) -> Expiry:
    """Call `callback()` on the running loop `seconds` from now: never early, and at most 1 ms later than the loop's own timer.

    For durations (finite ones) that many share; where each is another, `loop.call_later` costs less. The callback runs in no
    context of its own (contextvars); what it raises goes to the loop's exception handler.
    """
    loop = get_running_loop()
    try:
        queue = _TABLES[loop][seconds]
    except KeyError:
        queue = _opened(loop, seconds)
    expiry = Expiry(queue, callback)
    queue[expiry] = loop.time() + seconds
    return expiry


def _opened(loop: AbstractEventLoop, seconds: float) -> _Queue:
    if loop not in _TABLES:
        for closed in [other for other in list(_TABLES) if other.is_closed()]:
            _TABLES.pop(closed, None)
    table = _TABLES.setdefault(loop, _Table())
    if len(table) >= table.room:
        for idle in [queue for queue in table.values() if not queue]:
            idle.timer.cancel()
            del table[idle.seconds]
        table.room = max(MOST_KEPT, 2 * len(table))
    queue = _Queue()
    queue.seconds = seconds
    _set(loop, queue, loop.time() + seconds)
    table[seconds] = queue
    return queue


def _set(loop: AbstractEventLoop, queue: _Queue, due: float) -> None:
    queue.timer = loop.call_at(due + GRAIN, _run_out, loop, queue)


def _run_out(loop: AbstractEventLoop, queue: _Queue) -> None:
    """Call what is due. A callback may cancel another that is due with it, and ask for new ones."""
    now, due = loop.time(), []
    for expiry, when in queue.items():
        if when > now:
            break
        due.append(expiry)
    try:
        for expiry in due:
            if queue.pop(expiry, None) is not None:
                _call(loop, expiry)
    finally:
        if queue:
            _set(loop, queue, next(iter(queue.values())))
        else:
            _dropped(loop, queue)


def _call(loop: AbstractEventLoop, expiry: Expiry) -> None:
    try:
        expiry.callback()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        loop.call_exception_handler({"message": f"Exception in the callback {expiry.callback!r} of a timer", "exception": error})


def _dropped(loop: AbstractEventLoop, queue: _Queue) -> None:
    table = _TABLES[loop]
    del table[queue.seconds]
    if not table:
        del _TABLES[loop]
