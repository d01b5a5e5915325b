"""What is known at the end of a reply: usage, finish reasons, gaps, outcome; and who closes what it holds open.

The one rule: `end` runs once, whatever happens; the first outcome counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from proxy.errors import GatewayError, Outcome
from proxy.reply.batch import Batch, Json

log = logging.getLogger("penstock")

Usage = Json

# A gap in a stream that counts as a stall.
STALL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Switch:
    """A reply that broke and went on from another target. source, target: `provider/model`, before and after. reason: the outcome
    that the break would have been. at: characters of text that stood before the seam; 0 where there were none and the reply was
    begun anew, of which the client saw nothing.
    """

    source: str
    target: str
    reason: str
    at: int


class Sent(NamedTuple):
    """What went out of a stream before its final batch: bytes in all, the last batch, and its size among them."""

    bytes: int
    last: Batch
    last_bytes: int


class Trailer:
    """What is known at the end: usage, finish reasons, outcome. Filled as chunks flow; `end` runs once, whatever happens.

    usage: OpenAI's usage object, or None where the upstream gave none. finish_reasons: by choice index. longest_gap: seconds
    between two writes to the client, or from the last one to the end; stalls: how many of these gaps were over a second.
    clean_end: what a clean end is called where it is not the upstream's own, but one that the gateway makes on purpose. sent:
    known at the end of a stream that told no usage. source: where the reply is one client's part of another that may outlive it
    (a flight), the trailer of that: its usage is what was used, and it may be known later. switches: to other targets after the
    head was out, in order. number: the `id:` of the error chunk, where events are numbered and the error is the stream's own end;
    an error that only concerns one reader's connection has none, so that the reader can go on behind the last event it has.
    """

    __slots__ = (
        "_callbacks", "_resources", "chunks", "clean_end", "error", "finish_reasons", "longest_gap", "number", "outcome", "sent",
        "source", "stalls", "switches", "usage",
    )  # fmt: skip

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.finish_reasons: dict[int, str] = {}
        self.chunks = 0
        self.longest_gap = 0.0
        self.stalls = 0
        self.clean_end = Outcome.COMPLETED
        self.sent: Sent | None = None
        self.source: Trailer | None = None
        self.switches: tuple[Switch, ...] = ()
        self.number: int | None = None
        self.outcome: Outcome | None = None
        self.error: GatewayError | None = None
        self._callbacks: list[Callable[[Trailer], None]] = []
        self._resources: list[Callable[[], None]] = []

    @property
    def clean(self) -> Outcome:
        """What a clean end is called: `continued` over text of several targets, unless it was made on purpose."""
        joined = self.clean_end is Outcome.COMPLETED and any(switch.at for switch in self.switches)
        return Outcome.CONTINUED if joined else self.clean_end

    def silences(self, longest: float, stalls: int, last: float) -> None:
        """Note the gaps between writes. last: the silence before the end, which is a gap too: a stream that timed out had its
        longest there."""
        self.longest_gap, self.stalls = max(longest, last), stalls + (last > STALL_SECONDS)

    def on_end(self, callback: Callable[[Trailer], None]) -> None:
        """Run `callback(trailer)` once when the reply has ended, however it ended; at once if it has already."""
        if self.outcome is not None:
            callback(self)
        else:
            self._callbacks.append(callback)

    def own(self, close: Callable[[], None]) -> None:
        """Take over a resource: `close()` is called when the reply ends or is closed. It must be idempotent."""
        self._resources.append(close)

    def so_far(self) -> Callable[[], None]:
        """What the reply holds open until now, that is further in than who asks: a function that closes just this."""
        inner, self._resources = self._resources, []

        def release() -> None:
            while inner:
                inner.pop()()

        self._resources.append(release)
        return release

    def release(self) -> None:
        """Close what the reply holds open, now. Synchronous, so that it also works while a task is being cancelled."""
        while self._resources:
            self._resources.pop()()

    def end(self, outcome: Outcome, error: GatewayError | None = None) -> None:
        """Name the outcome (the first one counts), close the resources, run the callbacks."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.error = error
        self.release()
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("A callback at the end of a reply failed.")
        self._callbacks.clear()
