"""A call that several wait for: whoever joins and leaves in whatever order, each who stays is answered; the call is made once.

Strategy: an inner handler that the test answers by hand; clients are tasks that join, and are cancelled.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.call import Call
from proxy.errors import GatewayError, Outcome, UpstreamTimeout
from proxy.flight import Bounds
from proxy.reply import Batch, Head, Reply, Trailer
from proxy.shared import SharedCall
from tests.support.decoding import make_call

CALL = make_call({"model": "m"})
CHUNK = {"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}


class Inner:
    """The handler further in. answer: what it does when the test lets it."""

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.trailer = Trailer()

    async def __call__(self, call: Call) -> Reply:
        self.calls += 1
        try:
            return await asyncio.shield(self.answer)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def reply(self, **head: Any) -> Reply:
        async def batches() -> Any:
            yield Batch([CHUNK])
            yield Batch([CHUNK], final=True)

        return Reply(Head("t/m", **head), batches(), self.trailer)


async def read(shared: SharedCall, *, leads: bool) -> tuple[str | None, int] | None:
    """X-Cache and the number of batches; None where the client has to ask by itself."""
    reply = await shared.join(CALL, leads=leads)
    if reply is None:
        return None
    try:
        return reply.head.cache, len([batch async for batch in reply.chunks])
    finally:
        await reply.close(Outcome.CLIENT_GONE)


async def turns(count: int = 12) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


STEPS = st.lists(st.sampled_from(["join", "leave", "answer", "turn"]), max_size=14)


@given(STEPS, st.lists(st.integers(0, 9), min_size=14, max_size=14))
async def test_whoever_stays_is_answered_and_the_call_is_made_once(steps: list[str], whom: list[int]) -> None:
    over: list[SharedCall] = []
    told: list[Reply] = []
    inner = Inner()
    shared = SharedCall(CALL, inner, Bounds(keep=10**6), over=over.append, outlived=[lambda call, reply: told.append(reply)])
    clients = [asyncio.create_task(read(shared, leads=True))]
    await turns(1)
    for step, number in zip(steps, whom, strict=False):
        if step == "join" and shared.joinable:
            clients.append(asyncio.create_task(read(shared, leads=False)))
        elif step == "leave":
            clients[number % len(clients)].cancel()
        elif step == "answer" and not inner.answer.done():
            inner.answer.set_result(inner.reply(cache="miss"))
        else:
            await turns(number)
    if not inner.answer.done():
        inner.answer.set_result(inner.reply(cache="miss"))
    found = await asyncio.gather(*clients, return_exceptions=True)
    await turns()
    for number, result in enumerate(found):
        if not isinstance(result, asyncio.CancelledError) and not isinstance(result, GatewayError):
            assert result == ("joined" if number else "miss", 2)
    assert inner.calls <= 1
    assert (shared.over, len(over)) == (True, 1)
    if shared.flight is not None:
        assert shared.flight.followers == 0
        assert inner.trailer.outcome is not None
    assert len(told) <= 1
    assert not told or isinstance(found[0], asyncio.CancelledError), "only of a leader that left before the head"
    assert len(asyncio.all_tasks()) == 1


async def test_an_error_is_an_object_of_its_own_for_each() -> None:
    inner = Inner()
    shared = SharedCall(CALL, inner, Bounds(), over=lambda shared: None)
    clients = [asyncio.create_task(read(shared, leads=number == 0)) for number in range(4)]
    await turns(2)
    error = UpstreamTimeout("call", 3)
    inner.answer.set_exception(error)
    found = await asyncio.gather(*clients, return_exceptions=True)
    assert found[0] is error
    assert len({id(one) for one in found}) == 4
    assert {repr(one) for one in found} == {repr(error)}
    assert {(one.status, one.code, one.outcome) for one in found if isinstance(one, GatewayError)} == {
        (504, "timeout_call", Outcome.TIMEOUT_CALL)
    }


async def test_a_mistake_further_in_is_the_leaders_and_an_error_of_the_gateways_for_the_others() -> None:
    inner = Inner()
    shared = SharedCall(CALL, inner, Bounds(), over=lambda shared: None)
    clients = [asyncio.create_task(read(shared, leads=number == 0)) for number in range(2)]
    await turns(2)
    inner.answer.set_exception(ZeroDivisionError())
    found = await asyncio.gather(*clients, return_exceptions=True)
    assert [type(one) for one in found] == [ZeroDivisionError, GatewayError]


@pytest.mark.parametrize("head", [{"cache": "hit"}, {"status": 202}])
async def test_what_needed_no_provider_is_each_clients_own_to_ask_for(head: Any) -> None:
    inner = Inner()
    shared = SharedCall(CALL, inner, Bounds(), over=lambda shared: None)
    clients = [asyncio.create_task(read(shared, leads=number == 0)) for number in range(3)]
    await turns(2)
    inner.answer.set_result(inner.reply(**head))
    assert await asyncio.gather(*clients) == [(head.get("cache"), 2), None, None]


async def test_the_inner_call_has_no_deadline_of_one_clients() -> None:
    seen: list[Call] = []

    async def next(call: Call) -> Reply:
        seen.append(call)
        raise GatewayError("x")

    call = make_call({"model": "m"}, deadline=1.0)
    shared = SharedCall(call, next, Bounds(), over=lambda shared: None)
    with pytest.raises(GatewayError):
        await shared.join(call, leads=True)
    assert (seen[0].deadline, seen[0].limits.total) == (None, None)
