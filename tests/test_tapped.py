"""`tapped`: what looks at batches as they pass sees each once, in order, may change or end the stream, and knows a clean end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import GatewayError
from proxy.reply import Batch, Ended, Receive, Trailer, tapped


class Upstream:
    """Batches one after the other; `error` instead of an end. closed: how often it was."""

    def __init__(self, count: int, error: GatewayError | None = None) -> None:
        self.batches = [Batch([b"%d" % number], final=number == count - 1) for number in range(count)]
        self.left = self.batches[::-1]
        self.error = error
        self.closed = 0

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        if self.left:
            return self.left.pop()
        raise self.error or StopAsyncIteration

    async def aclose(self) -> None:
        self.closed += 1


class Tap:
    """swallows: the numbers of the batches that it keeps for itself. refuses: the number of the one at which the stream ends."""

    def __init__(self, swallows: frozenset[int] = frozenset(), refuses: int | None = None) -> None:
        self.swallows, self.refuses = swallows, refuses
        self.seen: list[Batch] = []
        self.finished = 0

    def see(self, batch: Batch) -> Batch | None:
        if len(self.seen) == self.refuses:
            raise GatewayError("enough")
        self.seen.append(batch)
        return None if len(self.seen) - 1 in self.swallows else batch

    async def finish(self) -> None:
        self.finished += 1


@given(count=st.integers(0, 6), swallows=st.frozensets(st.integers(0, 5)))
async def test_each_batch_is_seen_once_in_order_and_only_what_is_swallowed_is_missing(
    count: int, swallows: frozenset[int]
) -> None:
    upstream, tap = Upstream(count), Tap(swallows)
    got = [batch async for batch in tapped(upstream, tap.see, tap.finish)]
    assert tap.seen == upstream.batches
    assert got == [batch for number, batch in enumerate(upstream.batches) if number not in swallows]
    assert (tap.finished, upstream.closed) == (1, 1)


async def test_another_batch_may_be_handed_on_instead() -> None:
    other = Batch([b"other"])
    assert [batch async for batch in tapped(Upstream(2), lambda batch: other)] == [other, other]


@pytest.mark.parametrize("refuses", [0, 1, 2])
async def test_what_see_raises_ends_the_stream_closes_the_upstream_and_is_no_clean_end(refuses: int) -> None:
    upstream, tap = Upstream(3), Tap(refuses=refuses)
    batches = tapped(upstream, tap.see, tap.finish)
    assert [await anext(batches) for _ in range(refuses)] == upstream.batches[:refuses]
    with pytest.raises(GatewayError, match="enough"):
        await anext(batches)
    assert (tap.finished, upstream.closed) == (0, 1)


async def test_an_upstreams_error_passes_and_is_no_clean_end() -> None:
    upstream, tap = Upstream(2, GatewayError("cut")), Tap()
    with pytest.raises(GatewayError, match="cut"):
        _ = [batch async for batch in tapped(upstream, tap.see, tap.finish)]
    assert (len(tap.seen), tap.finished, upstream.closed) == (2, 0, 1)


async def test_who_leaves_before_the_end_closes_the_upstream_and_it_is_no_clean_end() -> None:
    upstream, tap = Upstream(2), Tap()
    batches = tapped(upstream, tap.see, tap.finish)
    await anext(batches)
    await batches.aclose()
    assert (tap.finished, upstream.closed) == (0, 1)


async def test_of_two_taps_the_inner_one_finishes_first() -> None:
    order: list[str] = []

    async def inner() -> None:
        order.append("inner")

    async def outer() -> None:
        order.append("outer")

    async for _ in tapped(tapped(Upstream(1), lambda batch: batch, inner), lambda batch: batch, outer):
        pass
    assert order == ["inner", "outer"]


class Pushed(Upstream):
    """The same, pushed; after `close` it says nothing more."""

    pushes = True

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.open, self.was_finished = True, 0

    def push(self, receive: Receive, ended: Ended) -> None:
        for batch in self.batches:
            if self.open:
                receive(batch)
        if self.open:
            ended(None)

    def close(self) -> None:
        self.open = False

    async def finished(self) -> None:
        self.was_finished += 1


LAST = Batch([b"last"], final=True)


def until_third(batch: Batch) -> Batch:
    return LAST if batch.items == [b"2"] else batch


@given(count=st.integers(4, 6))
async def test_a_final_batch_in_place_of_one_that_is_not_ends_the_stream_there_pulled_and_pushed(count: int) -> None:
    """Cleanly for what lies further out; what lies further in had no end."""
    pulled, pushed = Upstream(count), Pushed(count)
    inner, outer, pulled_inner, pulled_outer = Tap(), Tap(), Tap(), Tap()
    cut = tapped(tapped(pulled, pulled_inner.see, pulled_inner.finish), until_third)
    got = [batch async for batch in tapped(cut, pulled_outer.see, pulled_outer.finish)]
    assert got == [*pulled.batches[:2], LAST]
    assert (pulled_inner.finished, pulled_outer.finished, pulled.closed > 0) == (0, 1, True)

    def closing(batch: Batch) -> Batch:
        if (seen := until_third(batch)) is LAST:
            pushed.close()
        return seen

    received: list[Batch] = []
    ends: list[Exception | None] = []
    flow = tapped(tapped(tapped(pushed, inner.see, inner.finish), closing), outer.see, outer.finish)
    flow.push(received.append, ends.append)
    await flow.finished()
    assert (received, ends) == ([*pushed.batches[:2], LAST], [None])
    assert (inner.finished, outer.finished, pushed.was_finished) == (0, 1, 0)


async def test_a_pulled_stream_that_is_ended_from_outside_gives_its_last_batch_though_its_read_fails() -> None:
    """Whoever ends it closes the upstream; the read that was pending fails of that."""
    closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def silent() -> AsyncIterator[Batch]:
        yield Batch([b"0"])
        await closed
        raise GatewayError("closed")

    tap = Tap()
    batches = tapped(silent(), tap.see, tap.finish)
    assert (await anext(batches)).items == [b"0"]
    asked = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    closed.set_result(None)
    batches.end(LAST)
    assert await asked is LAST
    assert [batch async for batch in batches] == []
    assert tap.finished == 1


async def test_a_pushed_stream_that_is_ended_from_outside_ends_at_once_and_only_once() -> None:
    flow = tapped(Pushed(0), lambda batch: batch)
    flow._flow.open = False  # type: ignore[union-attr]
    received: list[Batch] = []
    ends: list[Exception | None] = []
    flow.push(received.append, ends.append)
    flow.end(LAST)
    flow.end(LAST)
    assert (received, ends) == ([LAST], [None])


def test_so_far_closes_what_lies_further_in_and_nothing_else() -> None:
    closed: list[str] = []
    trailer = Trailer()
    trailer.own(lambda: closed.append("upstream"))
    release = trailer.so_far()
    trailer.own(lambda: closed.append("outer"))
    release()
    release()
    assert closed == ["upstream"]
    trailer.release()
    assert closed == ["upstream", "outer"]
