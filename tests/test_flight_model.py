"""Flights against a plain model: a list of events, and for each reader how many of them it should have.

Strategy: hypothesis makes up what comes (single events, several in a read, decoded ones, comments), who joins, pauses, goes on
and leaves, and when somebody looks; a numbered flight stands on another, as a resumable stream does on a shared call, so that the
straight way, carrying and sharing, and every way out of them are gone through. After each step counts and readers are compared.
The one rule: the model knows nothing of batches, places or shortcuts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.flight import GROWTH, Bounds, Flight
from proxy.reply import Batch, Ended, Head, Receive, Reply, Run, Single, Trailer, flow_of, push


def event(number: int, size: int) -> bytes:
    return b'data: {"n":%d,"x":"%b"}\n\n' % (number, b"x" * size)


class Source:
    """A flow that is pushed by hand, single events as such."""

    pushes = True

    def __init__(self) -> None:
        self.paused = False
        self.reply = Reply(Head("t/m"), self, Trailer())  # type: ignore[arg-type]
        self.single: Single
        self.receive: Receive
        self.ended: Ended

    def singly(self, single: Single) -> None:
        self.single = single

    def push(self, receive: Receive, ended: Ended) -> None:
        self.receive, self.ended = receive, ended

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    async def finished(self) -> None:
        pass


@dataclass
class Reader:
    """due: the events that it should have by now. has: of those before them. singly: it takes single events as such."""

    reply: Reply
    numbered: bool
    has: int
    due: list[bytes]
    paused: bool = False
    got: list[bytes] = field(default_factory=list)
    ends: list[Exception | None] = field(default_factory=list)

    def begin(self, singly: bool) -> None:
        flow = flow_of(self.reply.chunks)
        assert flow is not None
        self.flow = flow
        if singly:
            push(flow, self.receive, self.ends.append, self.single)
        else:
            flow.push(self.receive, self.ends.append)

    def receive(self, batch: Batch) -> None:
        assert (batch.number is not None) == self.numbered
        self.got.append(batch.sse())

    def single(self, event: bytes, number: int | None, now: float) -> None:
        self.receive(Batch([event], number=number))

    @property
    def wanted(self) -> bytes:
        if not self.numbered:
            return b"".join(self.due)
        return b"".join(b"id: %d\n%b" % numbered for numbered in enumerate(self.due, self.has + 1))


class Stacked:
    """A numbered flight on another one, and the model of both."""

    def __init__(self, keep_under: int, keep: int) -> None:
        self.source = Source()
        self.under = Flight(self.source.reply, Bounds(keep_under), emptied=lambda flight: None)
        follower = self.under.follow()
        assert follower is not None
        self.told = 0
        self.over = Flight(follower, Bounds(keep), numbered=True, emptied=lambda flight: None, grown=self.grown)
        self.events: list[bytes] = []
        self.readers: list[Reader] = []
        self.now = 0.0

    def grown(self, flight: Flight) -> None:
        self.told = flight.size

    def come(self, kind: str, size: int) -> None:
        count = 1 if kind in ("single", "decoded", "comment") else 3
        new = [event(len(self.events) + number, size) for number in range(count)]
        self.events += new
        for reader in self.readers:
            reader.due += new
        if kind == "single":
            self.source.single(new[0], None, self.now)
        elif kind == "decoded":
            self.source.receive(Batch([{"n": len(self.events) - 1, "x": "x" * size}]))
        elif kind == "comment":
            self.source.receive(Batch(new, comment=b": so\n\n"))
        else:
            self.source.receive(Batch([Run(b"".join(new))] if kind == "run" else new))

    def join(self, flight: Flight, after: int, singly: bool) -> None:
        after = min(after, self.over.counted().number - 1) if flight is self.over else 0
        reply = flight.follow(after)
        kept = flight.counted().before - flight.size
        gone = len(b"".join(self.events[:after]))
        if reply is None:
            assert kept > gone, "what it wants is there"
            return
        assert kept <= gone
        reader = Reader(reply, flight is self.over, after, self.events[after:])
        self.readers.append(reader)
        reader.begin(singly)

    async def leave(self, reader: Reader) -> None:
        self.readers.remove(reader)
        await reader.reply.close()

    def check(self, looked: bool) -> None:
        total = len(b"".join(self.events))
        for reader in self.readers:
            got = b"".join(reader.got)
            assert reader.wanted.startswith(got) if reader.paused else got == reader.wanted
            assert reader.ends == []
        behind = [reader.paused for reader in self.readers if reader.numbered]
        below = [reader.paused for reader in self.readers if not reader.numbered]
        held = bool(behind) and all(behind)
        assert self.source.paused == all([held, *below])
        if looked:
            assert self.under.counted().before == total
            assert held or self.over.counted()[1:3] == (total, len(self.events) + 1)
        if looked and not any(reader.paused for reader in self.readers):
            assert self.over.size <= self.over.bounds.keep + GROWTH
            assert self.under.size <= self.under.bounds.keep + GROWTH
            assert self.over.size <= self.told + GROWTH


REST = ["run", "several", "decoded", "comment", "join", "join under", "pause", "resume", "leave", "keep", "keep under"]
STEPS = st.tuples(
    st.sampled_from(["single"] * 8 + REST), st.sampled_from([0, 1, 3, 40, 700, GROWTH]), st.integers(0, 7), st.booleans()
)


@settings(max_examples=400, deadline=None)
@given(st.lists(STEPS, max_size=50), st.sampled_from([0, 2000, 10**6]), st.sampled_from([0, 3000, 10**6]), st.booleans())
async def test_counts_and_readers_are_those_of_the_model(
    steps: list[tuple[str, int, int, bool]], keep_under: int, keep: int, singly: bool
) -> None:
    stacked = Stacked(keep_under, keep)
    stacked.join(stacked.over, 0, singly)
    for what, size, who, looked in steps:
        stacked.now += size / 100
        reader = stacked.readers[who % len(stacked.readers)] if stacked.readers else None
        if what in ("join", "join under"):
            stacked.join(stacked.over if what == "join" else stacked.under, who * 3, singly)
        elif what in ("keep", "keep under"):
            (stacked.over if what == "keep" else stacked.under).keep(size)
        elif what not in ("pause", "resume", "leave"):
            if not stacked.source.paused:
                stacked.come(what, size)
        elif reader is not None and what == "leave":
            await stacked.leave(reader)
        elif reader is not None:
            reader.paused = what == "pause"
            (reader.flow.pause if reader.paused else reader.flow.resume)()
        stacked.check(looked)
    await end(stacked)


async def turns() -> None:
    """Let the flights' own tasks run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def end(stacked: Stacked) -> None:
    """The final batch and the end reach everybody, also those who were behind."""
    stacked.source.receive(Batch([{"n": "end"}], final=True))
    stacked.source.ended(None)
    await turns()
    for reader in stacked.readers:
        reader.flow.resume()
    await turns()
    for reader in stacked.readers:
        await reader.flow.finished()
        assert b"".join(reader.got[:-1]) == reader.wanted
    await turns()
    for reader in list(stacked.readers):
        await stacked.leave(reader)
    stacked.under.close()
    assert stacked.over.over


async def flown(before: float = 0.0) -> Stacked:
    """Two flights and a reader at the time 0. before: the longest gap that the lower one had."""
    stacked = Stacked(10**6, 10**6)
    stacked.join(stacked.over, 0, True)
    for flight in (stacked.over, stacked.under):
        flight._clock, flight._came = (lambda: stacked.now), 0.0
    stacked.under._note(before)
    stacked.under.lift()
    return stacked


@pytest.mark.parametrize("kind", ["single", "decoded"])
async def test_a_flight_that_is_carried_has_the_gaps_too(kind: str) -> None:
    stacked = await flown(before=0.5)
    for stacked.now, what in ((0.3, "single"), (1.8, "single"), (1.9, kind), (2.0, "single"), (3.4, kind), (3.5, "single")):
        stacked.come(what, 10)
    found = [(round(flight._longest, 3), flight._stalls) for flight in (stacked.under, stacked.over)]
    assert found == [(1.5, 2), (1.5, 2)]
    short = await flown(before=0.5)
    short.now = 0.3
    short.come("single", 10)
    assert (short.under._longest, short.over._longest) == (0.5, 0.3)


async def test_the_straight_way_is_taken_again_when_the_reader_has_caught_up() -> None:
    stacked = await flown()
    carried = []
    for kind in ("single", "decoded", "run"):
        stacked.come(kind, 10)
        carried.append(stacked.under._rider is stacked.over)
    stacked.readers[0].flow.pause()
    carried.append(stacked.under._rider is stacked.over)
    stacked.readers[0].flow.resume()
    carried.append(stacked.under._rider is stacked.over)
    stacked.join(stacked.over, 0, True)
    carried.append(stacked.under._rider is stacked.over)
    await stacked.leave(stacked.readers[1])
    carried.append(stacked.under._rider is stacked.over)
    assert carried == [True, True, True, False, True, False, True]


async def test_what_the_lower_flight_lets_go_of_is_with_the_upper_one() -> None:
    stacked = await flown()
    for _ in range(3):
        stacked.come("single", 10)
    stacked.under.keep(0)
    stacked.join(stacked.over, 0, True)
    stacked.check(looked=True)
