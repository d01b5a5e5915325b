"""`tapped`: what looks at batches as they pass sees each once, in order, may change or end the stream, and knows a clean end."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import GatewayError
from proxy.reply import Batch, tapped


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
    await batches.aclose()  # type: ignore[attr-defined]
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
