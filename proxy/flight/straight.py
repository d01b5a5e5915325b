"""The way of what comes to those who follow: in the callback in which it came, to the only follower by the shortest way.

Strategy: while there is one follower, who takes what comes and has all before it, a single event is kept and goes straight to its
reader (`live`); where the follower stands is then not written down, for it stands at the end. All else comes by `_receive`, and
before anybody asks or does anything the straight way is left (`land`) and taken again behind it (`lift`).
Where that reader is another flight with one such follower (a resumable stream over a shared call), this one does the other's work
too: it hands on to the other's reader with the other's numbers, and the other takes over the same bytes now and then (`share`).
The one rule: whoever looks at a flight's counts or followers has made it land, or share, before.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice

from proxy.flight.follower import Follower
from proxy.flight.recording import Position, Recording
from proxy.reply import STALL_SECONDS, Batch, Single

# Bytes that come between two looks at what is to be let go of, or told.
GROWTH = 4096


@dataclass(frozen=True, slots=True)
class Bounds:
    """keep: bytes that are kept for followers who come later; beyond, the oldest are let go once all followers have them, when
    they are GROWTH bytes more at the latest.

    max_lag: bytes that a follower may be behind; patience: for how many seconds it may be further behind than that.
    """

    keep: int = 0
    max_lag: int = 2**20
    patience: float = 60.0


class Straight(Recording):
    """A recording that is handed on to its followers. over: no batch will come any more. under: the follower of another flight
    that this one reads. whole: of a reply that is not streamed.
    """

    __slots__ = (
        "_came", "_carrier", "_clock", "_counting", "_due", "_followers", "_live", "_longest", "_mark", "_notable", "_rider",
        "_stalls", "_under", "_whole", "bounds", "over",
    )  # fmt: skip

    def __init__(self, bounds: Bounds, *, numbered: bool, under: Follower | None, whole: bool) -> None:
        super().__init__(numbered=numbered)
        self.bounds = bounds
        self.over = False
        self._whole = whole
        self._followers: list[Follower] = []
        self._live: Single | None = None
        self._due = 0
        self._clock = asyncio.get_running_loop().time
        self._came = self._clock()
        self._notable = self._longest = 0.0
        self._stalls = 0
        self._under = under
        if under is not None:
            under.rider = self
        self._rider: Straight | None = None
        self._carrier: Straight | None = None
        self._counting = numbered
        self._mark = 0, 0

    # Batches in

    def _single(self, event: bytes, number: int | None, now: float) -> None:
        """One encoded event, alone."""
        live = self._live
        if live is None or number is not None:
            self._receive(Batch((event,), number=number))
            return
        if now - self._came > self._notable:
            self._note_both(now - self._came)
        self._came = now
        self._append(event)
        self.total = total = self.total + len(event)
        if self._counting:
            number = self.number
            self.number = number + 1
        live(event, number, now)
        if total > self._due:
            self._look()

    def _receive(self, batch: Batch) -> None:
        """Any other batch, and any followers."""
        if self.over:
            return
        if self._live is None or batch.final:
            self._land()
        elif self._rider is not None:
            self._share()
        now = self._clock()
        if now - self._came > self._notable:
            self._note(now - self._came)
        self._came = now
        seen = self.add(batch, self._whole)
        if self._live is not None:
            self._pass(batch, seen)
        else:
            for follower in self._followers[:]:  # one may leave meanwhile
                follower.advance()
            if not batch.final:
                self.lift()
        if self.total > self._due:
            self._look()
        if batch.final:
            self._has_all()

    def _pass(self, batch: Batch, seen: Batch) -> None:
        """To the only follower. A flight that is carried counts this one itself. seen: the batch as readers get it."""
        if (rider := self._rider) is None:
            self._followers[0].hand(seen)
            return
        rider._mark = self.places, self.total
        rider._receive(batch)
        if self._rider is rider:
            self.number = rider.number

    def _has_all(self) -> None:
        """The final batch has come."""

    def _note(self, gap: float) -> None:
        """A gap between batches, which may be the longest, or a stall."""
        if gap > self._longest:
            self._longest = gap
        if gap > STALL_SECONDS:
            self._stalls += 1
        self._notable = min(self._longest, STALL_SECONDS)

    def _note_both(self, gap: float) -> None:
        """Also for the flight that is carried."""
        self._note(gap)
        if (rider := self._rider) is not None:
            rider._note(gap)
            self._notable = min(self._notable, rider._notable)

    def _look(self) -> None:
        """Now and then: let go of what need not be kept."""
        self._due = self.total + GROWTH
        self._share()
        if self.size > self.bounds.keep:
            self._trim()
        if (rider := self._rider) is not None and rider.total > rider._due:
            rider._look()

    def _trim(self) -> None:
        """Let go of the oldest batches that are beyond what is kept and that no follower still needs."""
        self._share()
        needed = self.places
        if self._live is None:
            needed = min((follower.place for follower in self._followers), default=needed)
        self.trim(self.bounds.keep, needed)

    # The straight way

    def lift(self) -> None:
        """Take it, if the only follower has all before it."""
        self._land()
        if len(self._followers) == 1 and not self.over:
            follower = self._followers[0]
            self._live = follower.live
            if self._live is not None and follower.rider is not None:
                self._carry(follower.rider)
        if self._under is not None:
            self._under.again()

    def _land(self) -> None:
        """Leave it: the follower stands behind all that it was handed."""
        if self._live is None:
            return
        if self._carrier is not None:
            self._carrier._land()
        if self._rider is not None:
            self._share()
            self._rider._carrier = None
            self._rider, self._counting = None, self.numbered
        self._live = None
        self._followers[0].stand(self.places, self.total, self.number)

    def _carry(self, rider: Straight) -> None:
        """Do the work of the flight that follows this one, where it is on the straight way itself."""
        if rider._live is None or rider._rider is not None or self.numbered:
            return
        self._rider, rider._carrier = rider, self
        self._live, self._counting, self.number = rider._live, rider.numbered, rider.number
        self._notable = min(self._notable, rider._notable)
        rider._mark = self.places, self.total

    def _share(self) -> None:
        """The rider takes over what it was carried past; it is the same bytes."""
        rider = self._rider
        if rider is None:
            return
        place, total = rider._mark
        if count := self.places - place:
            rider._mark = self.places, self.total
            rider._entries.extend(list(islice(reversed(self._entries), count))[::-1])
            rider.total += self.total - total
            rider.number += count
            rider._came = self._came

    def counted(self) -> Position:
        """Where a reader stands who has all that has come, now."""
        if self._carrier is not None:
            self._carrier._share()
        return self.end
