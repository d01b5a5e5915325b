"""Flights: whoever follows, whenever and however slowly, gets the same batches in order, and nobody slows another.

Strategy: a scripted flow is pushed batch by batch while followers join, pause, go on and leave; what each has got is compared
with what was pushed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import GatewayError, Outcome, UpstreamCut
from proxy.flight import GROWTH, Bounds, Flight, TooFarBehind
from proxy.reply import Batch, Ended, Head, Receive, Reply, Run, Trailer, flow_of


def chunk(number: int) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": f"word {number}"}, "finish_reason": None}]}


class Scripted:
    """A flow that a test pushes by hand."""

    pushes = True

    def __init__(self) -> None:
        self.paused = False
        self.finishes = 0
        self.reply = Reply(Head("t/m"), self, Trailer())  # type: ignore[arg-type]
        self.receive: Receive
        self.ended: Ended

    def push(self, receive: Receive, ended: Ended) -> None:
        self.receive, self.ended = receive, ended

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    async def finished(self) -> None:
        self.finishes += 1


class Reader:
    """A follower that is pushed to. on_batch: what it does with each."""

    def __init__(self, reply: Reply | None, on_batch: Callable[[Reader], None] | None = None) -> None:
        assert reply is not None
        flow = flow_of(reply.chunks)
        assert flow is not None
        self.reply, self.flow = reply, flow
        self.got: list[Batch] = []
        self.ends: list[Exception | None] = []
        self.on_batch = on_batch
        flow.push(self.receive, self.ends.append)

    def receive(self, batch: Batch) -> None:
        self.got.append(batch)
        if self.on_batch is not None:
            self.on_batch(self)

    @property
    def text(self) -> bytes:
        return b"".join(batch.sse() for batch in self.got)


def outcome(source: Scripted) -> Outcome | None:
    return source.reply.trailer.outcome


async def settled() -> None:
    """Let the flight's own task run."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_late_follower_gets_the_prefix_at_once_and_then_the_same_as_all() -> None:
    source = Scripted()
    flight = Flight(source.reply, Bounds(keep=10_000))
    first = Reader(flight.follow())
    source.receive(Batch([chunk(1)]))
    late = Reader(flight.follow())
    assert late.text == first.text != b""
    source.receive(Batch([chunk(2)], final=True))
    source.reply.trailer.usage = {"total_tokens": 3}
    source.ended(None)
    await settled()
    assert late.text == first.text
    assert (first.ends, late.ends, source.finishes) == ([None], [None], 1)
    assert late.reply.trailer.usage == {"total_tokens": 3}
    assert source.reply.trailer.outcome is Outcome.COMPLETED


async def test_the_end_waits_for_what_is_done_at_the_end_further_in() -> None:
    source, gate = Scripted(), asyncio.Event()
    source.finished = gate.wait  # type: ignore[assignment, method-assign]
    flight = Flight(source.reply, Bounds())
    one, two = Reader(flight.follow()), Reader(flight.follow())
    source.receive(Batch([chunk(1)], final=True))
    source.ended(None)
    await settled()
    assert (one.ends, two.ends) == ([], [])
    gate.set()
    await settled()
    assert (one.ends, two.ends) == ([None], [None])


async def test_the_only_reader_sees_to_the_end_itself_and_who_comes_meanwhile_waits_for_it() -> None:
    source, gate = Scripted(), asyncio.Event()
    source.finished = gate.wait  # type: ignore[assignment, method-assign]
    flight = Flight(source.reply, Bounds(keep=10_000))
    only = Reader(flight.follow())
    source.receive(Batch([chunk(1)], final=True))
    tasks = len(asyncio.all_tasks())
    source.ended(None)
    assert (only.ends, len(asyncio.all_tasks())) == ([None], tasks)
    late = Reader(flight.follow())
    assert (late.text, late.ends, flight.over) == (only.text, [], False)
    waiting = asyncio.create_task(only.flow.finished())
    await settled()
    assert (late.ends, flight.over) == ([], False)
    gate.set()
    await waiting
    assert (late.ends, outcome(source)) == ([None], Outcome.COMPLETED)


@pytest.mark.parametrize("another", [False, True])
async def test_the_end_is_seen_to_although_the_only_reader_left_before_it_did(another: bool) -> None:
    source = Scripted()
    flight = Flight(source.reply, Bounds(keep=10_000), emptied=lambda flight: None)
    only = Reader(flight.follow())
    source.receive(Batch([chunk(1)], final=True))
    source.ended(None)
    late = Reader(flight.follow()) if another else None
    await only.reply.close()
    await settled()
    assert (source.finishes, outcome(source)) == (1, Outcome.COMPLETED)
    assert late is None or late.ends == [None]


async def test_what_fails_at_the_end_fails_for_all() -> None:
    source = Scripted()

    async def finished() -> None:
        raise UpstreamCut("too late")

    source.finished = finished  # type: ignore[method-assign]
    flight = Flight(source.reply, Bounds(keep=10_000))
    only = Reader(flight.follow())
    source.receive(Batch([chunk(1)], final=True))
    source.ended(None)
    late = Reader(flight.follow())
    with pytest.raises(UpstreamCut):
        await only.flow.finished()
    assert [type(end) for end in late.ends] == [UpstreamCut]
    assert outcome(source) is Outcome.UPSTREAM_CUT


async def test_what_breaks_the_reply_breaks_it_for_all_behind_what_came_before() -> None:
    source = Scripted()
    flight = Flight(source.reply, Bounds(keep=10_000))
    quick, slow = Reader(flight.follow()), Reader(flight.follow())
    slow.flow.pause()
    source.receive(Batch([chunk(1)]))
    source.ended(UpstreamCut("cut"))
    assert [type(end) for end in quick.ends] == [UpstreamCut]
    assert (slow.got, slow.ends) == ([], [])
    slow.flow.resume()
    assert (slow.text, [type(end) for end in slow.ends]) == (quick.text, [UpstreamCut])
    assert source.reply.trailer.outcome is Outcome.UPSTREAM_CUT


async def test_the_last_to_leave_closes_the_reply_and_nobody_before() -> None:
    source = Scripted()
    flight = Flight(source.reply, Bounds())
    one, two = Reader(flight.follow()), Reader(flight.follow())
    await one.reply.close()
    assert outcome(source) is None
    await two.reply.close()
    assert outcome(source) is Outcome.CLIENT_GONE
    assert flight.over


async def test_with_a_policy_of_its_own_the_reply_goes_on_without_readers() -> None:
    source = Scripted()
    empty: list[Flight] = []
    flight = Flight(source.reply, Bounds(keep=1000), emptied=empty.append)
    reader = Reader(flight.follow())
    await reader.reply.close()
    assert empty == [flight]
    source.receive(Batch([chunk(1)], final=True))
    source.ended(None)
    await settled()
    assert source.reply.trailer.outcome is Outcome.COMPLETED


async def test_the_reply_is_held_only_while_all_are_behind() -> None:
    source = Scripted()
    flight = Flight(source.reply, Bounds())
    one, two = Reader(flight.follow()), Reader(flight.follow())
    held: list[bool] = []

    def note() -> None:
        held.append(source.paused)

    one.flow.pause()
    note()
    two.flow.pause()
    note()
    one.flow.resume()
    note()
    two.flow.resume()
    two.flow.pause()
    await one.reply.close()
    note()
    assert held == [False, True, False, True], "the only one left is behind"
    await two.reply.close()


async def test_nothing_is_kept_that_all_have_where_nobody_may_join() -> None:
    source = Scripted()
    flight = Flight(source.reply, Bounds(keep=0))
    Reader(flight.follow())
    for number in range(100):
        source.receive(Batch([chunk(number)]))
        assert flight.size <= GROWTH
    assert not flight.joinable
    assert flight.follow() is None


async def test_one_that_stays_too_far_behind_is_dropped_with_an_error_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rings: list[Callable[[], object]] = []

    class Ring:
        def cancel(self) -> None:
            rings.clear()

    def after(seconds: float, callback: Callable[[], object]) -> Ring:
        assert seconds == 7
        rings.append(callback)
        return Ring()

    monkeypatch.setattr("proxy.flight.follower.after", after)
    source = Scripted()
    flight = Flight(source.reply, Bounds(max_lag=500, patience=7))
    quick, slow = Reader(flight.follow()), Reader(flight.follow())
    slow.flow.pause()
    for number in range(20):
        source.receive(Batch([chunk(number)]))
    slow.flow.resume()
    assert rings == [], "it has caught up in time"
    slow.flow.pause()
    for number in range(20):
        source.receive(Batch([chunk(number)]))
    assert len(rings) == 1
    rings[0]()
    assert [type(end) for end in slow.ends] == [TooFarBehind]
    await slow.reply.close()
    assert flight.size == 0, "what it did not take is let go"
    source.receive(Batch([chunk(1)]))
    assert len(quick.got) == 41


async def test_a_pull_reader_gets_the_same_as_a_pushed_one() -> None:
    source = Scripted()
    flight = Flight(source.reply, Bounds(keep=10_000))
    pushed, pulled = Reader(flight.follow()), flight.follow()
    assert pulled is not None
    source.receive(Batch([chunk(1)]))
    task = asyncio.create_task(_all(pulled))
    await settled()
    source.receive(Batch([chunk(2)], final=True))
    source.ended(None)
    assert await task == pushed.text


async def _all(reply: Reply) -> bytes:
    return b"".join([batch.sse() async for batch in reply.chunks])


async def test_a_reply_that_can_only_be_pulled_is_flown_too() -> None:
    async def batches() -> Any:
        for number in range(3):
            yield Batch([chunk(number)], final=number == 2)

    reader = Reader(Flight(Reply(Head("t/m"), batches(), Trailer()), Bounds(keep=10_000)).follow())
    for _ in range(5):
        await settled()
    assert len(reader.got) == 3
    assert reader.ends == [None]


class TestNumbers:
    """Numbered events, and readers who have some of them."""

    async def flown(self) -> tuple[Scripted, Flight]:
        source = Scripted()
        flight = Flight(source.reply, Bounds(keep=100_000), numbered=True, emptied=lambda flight: None)
        run = Run(b"".join(b'data: {"id":"c","n":%d}\n\n' % number for number in (3, 4, 5)))
        source.receive(Batch([chunk(1), chunk(2), run]))
        source.receive(Batch([chunk(6)]))
        source.receive(Batch([chunk(7), chunk(8)], final=True))
        source.ended(None)
        await settled()
        return source, flight

    async def test_every_event_has_its_number(self) -> None:
        _, flight = await self.flown()
        text = Reader(flight.follow()).text
        assert [line for line in text.split(b"\n") if line.startswith(b"id:")] == [b"id: %d" % n for n in range(1, 9)]
        assert flight.number == 9

    @pytest.mark.parametrize("has", range(8))
    async def test_a_reader_gets_what_follows_on_what_it_has(self, has: int) -> None:
        _, flight = await self.flown()
        text, all_of_it = Reader(flight.follow(after=has)).text, Reader(flight.follow()).text
        assert text == b"".join(b"id: " + event for event in all_of_it.split(b"id: ")[1:][has:])

    async def test_who_has_all_events_still_gets_the_batch_behind_which_the_end_stands(self) -> None:
        """Usage and [DONE] are made of it; none of it is said again."""
        _, flight = await self.flown()
        reader = Reader(flight.follow(after=8))
        assert (reader.got[0].final, reader.got[0].seen, reader.text) == (True, 2, b"")

    async def test_what_was_let_go_of_cannot_be_followed_on(self) -> None:
        source = Scripted()
        flight = Flight(source.reply, Bounds(keep=200), numbered=True, emptied=lambda flight: None)
        for number in range(50):
            source.receive(Batch([chunk(number)]))
        assert flight.size <= 200 + GROWTH
        assert flight.follow() is None
        assert flight.follow(after=3) is None
        assert flight.follow(after=50) is not None


class TestKept:
    """What is kept, what is told of it, and what the reply's own trailer says, which nobody writes out."""

    async def test_less_is_kept_from_now_on_but_for_what_a_follower_needs(self) -> None:
        source = Scripted()
        flight = Flight(source.reply, Bounds(keep=10_000))
        slow = Reader(flight.follow())
        slow.flow.pause()
        for number in range(20):
            source.receive(Batch([chunk(number)]))
        flight.keep(100)
        assert flight.joinable
        slow.flow.resume()
        assert len(slow.got) == 20
        assert 0 < flight.size <= 100

    async def test_growth_is_told_before_it_is_more_than_the_step(self) -> None:
        source, sizes = Scripted(), [0]
        flight = Flight(source.reply, Bounds(keep=10**6), grown=lambda flight: sizes.append(flight.size))
        for number in range(200):
            source.receive(Batch([chunk(number)]))
            assert flight.size <= sizes[-1] + GROWTH
        assert 3 <= len(sizes) <= 10

    async def test_gaps_are_those_between_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        source = Scripted()
        Flight(source.reply, Bounds())
        for then in (0.5, 2.5, 2.6):
            now = then
            source.receive(Batch([chunk(1)]))
        now = 4.0
        source.ended(UpstreamCut("cut"))
        assert (source.reply.trailer.longest_gap, source.reply.trailer.stalls) == (2.0, 2)

    async def test_the_number_of_the_error_chunk_is_the_streams_only_where_the_error_is(self) -> None:
        source = Scripted()
        flight = Flight(source.reply, Bounds(keep=10_000), numbered=True)
        stays, goes = Reader(flight.follow()), Reader(flight.follow())
        source.receive(Batch([chunk(1)]))
        await goes.reply.close()
        source.ended(UpstreamCut("cut"))
        assert (stays.reply.trailer.number, goes.reply.trailer.number) == (2, None)


@given(
    st.lists(st.tuples(st.sampled_from(["batch", "join", "pause", "resume", "leave"]), st.integers(0, 5)), max_size=60),
    st.sampled_from([None, UpstreamCut("cut")]),
)
async def test_whatever_the_order_each_gets_all_in_order(steps: list[tuple[str, int]], error: GatewayError | None) -> None:
    """Followers that join, pause, go on and leave at any time: each has a prefix, and all of it where it stayed and went on."""
    source, pushed = Scripted(), 0
    flight = Flight(source.reply, Bounds(keep=10**6), emptied=lambda flight: None)
    readers: list[Reader] = []
    gone: set[int] = set()
    for what, who in steps:
        if what == "batch":
            source.receive(Batch([chunk(pushed)]))
            pushed += 1
        elif what == "join":
            readers.append(Reader(flight.follow()))
        elif who < len(readers) and who not in gone:
            if what == "leave":
                gone.add(who)
                await readers[who].reply.close()
            else:
                (readers[who].flow.pause if what == "pause" else readers[who].flow.resume)()
    source.receive(Batch([chunk(pushed)], final=True))
    source.ended(error)
    await settled()
    everything = [Batch([chunk(number)]).sse() for number in range(pushed + 1)]
    for number, reader in enumerate(readers):
        if number in gone:
            assert [batch.sse() for batch in reader.got] == everything[: len(reader.got)]
            assert reader.ends == []
        else:
            reader.flow.resume()
            assert [batch.sse() for batch in reader.got] == everything
            assert [repr(end) for end in reader.ends] == [repr(error)], "each has an object of its own"
