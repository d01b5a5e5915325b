"""The flow of a guarded reply: what comes before anybody listens, a slow reader, errors, closing; pushed and pulled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from middleware.guardrails.flow import Guarded
from middleware.guardrails.screen import Screen
from middleware.guardrails.verdict import Finding
from proxy.call import Call
from proxy.errors import GatewayError, UpstreamCut
from proxy.reply import Batch, Ended, Head, Receive, Reply, Trailer
from tests.test_guardrails_screen import ENDS, content, look

Json = dict[str, Any]


def call(stream: bool = True, **request: Any) -> Call:
    return Call(id="r", nonce="n", created=1, kind="chat", request=request, model="m", stream=stream)


class Inner:
    """A flow that a test pushes; first: what it pushes at once."""

    pushes = True

    def __init__(self, *first: Batch, error: Exception | None = None) -> None:
        self.first, self.error = first, error
        self.told: list[str] = []

    def push(self, receive: Receive, ended: Ended) -> None:
        self.receive, self.ended = receive, ended
        for batch in self.first:
            receive(batch)
        if self.error is not None:
            ended(self.error)

    def pause(self) -> None:
        self.told.append("pause")

    def resume(self) -> None:
        self.told.append("resume")

    async def finished(self) -> None:
        self.told.append("finished")

    def __aiter__(self) -> Inner:
        return self

    async def __anext__(self) -> Batch:
        raise AssertionError("it is pushed")


class Reader:
    def __init__(self, flow: Guarded) -> None:
        self.batches: list[Batch] = []
        self.ends: list[Exception | None] = []
        flow.push(self.batches.append, self.ends.append)

    @property
    def text(self) -> str:
        return "".join(one["choices"][0]["delta"].get("content", "") for batch in self.batches for one in batch.chunks)


def guarded(chunks: Any, action: Any = "redact", trailer: Trailer | None = None, **fields: Any) -> tuple[Guarded, list[Finding]]:
    found: list[Finding] = []
    trailer = trailer or Trailer()
    reply = Reply(Head("openai/m"), chunks, trailer)
    return Guarded(call(**fields), reply, Screen(look(action, found), None), found), found


FINAL = Batch([ENDS[0]], final=True)


async def test_what_came_before_anybody_listened_is_handed_on_and_the_reply_waits_meanwhile() -> None:
    inner = Inner(Batch([content("Hello you, ")]), Batch([content("my ")]))
    flow, _ = guarded(inner)
    await flow.start()
    assert inner.told[-1] == "pause"
    reader = Reader(flow)
    assert (reader.text, inner.told[-1]) == ("Hello you, my ", "resume")
    inner.receive(Batch([content("friend")]))
    inner.receive(FINAL)
    assert (reader.text, reader.ends) == ("Hello you, my friend", [])
    inner.ended(None)
    assert (reader.batches[-1].final, reader.ends) == (True, [None])
    await flow.finished()
    assert inner.told[-1] == "finished"


async def test_a_slow_reader_slows_the_reply() -> None:
    inner = Inner(Batch([content("Hello ")]))
    flow, _ = guarded(inner)
    await flow.start()
    Reader(flow)
    flow.pause()
    assert inner.told[-1] == "pause"
    flow.resume()
    assert inner.told[-1] == "resume"


async def test_a_reader_that_pauses_at_once_is_not_resumed_behind_its_back() -> None:
    inner = Inner(Batch([content("Hello ")]))
    flow, _ = guarded(inner)
    await flow.start()
    flow.push(lambda batch: flow.pause(), lambda error: None)
    assert inner.told[-1] == "pause"


async def test_an_error_before_the_first_chunk_is_raised_and_a_later_one_is_told_without_what_was_held() -> None:
    flow, _ = guarded(Inner(Batch([content("jo@exam")]), error=UpstreamCut("cut")))
    with pytest.raises(UpstreamCut):
        await flow.start()
    inner = Inner(Batch([content("Hello ")]))
    flow, _ = guarded(inner)
    await flow.start()
    reader = Reader(flow)
    inner.receive(Batch([content("jo@exam")]))
    inner.ended(UpstreamCut("cut"))
    assert (reader.text, [type(end) for end in reader.ends]) == ("Hello ", [UpstreamCut])


async def test_all_choices_end_where_one_is_blocked() -> None:
    inner = Inner(Batch([content("Hello ")]))
    closed: list[bool] = []
    trailer = Trailer()
    trailer.own(lambda: closed.append(True))
    flow, _ = guarded(inner, "block", trailer, n=2)
    await flow.start()
    reader = Reader(flow)
    inner.receive(Batch([content("jo@x.com ", 1)]))
    ends = [choice for one in reader.batches[-1].chunks for choice in one["choices"]]
    assert [(end["index"], end["finish_reason"]) for end in ends] == [(0, "content_filter"), (1, "content_filter")]
    assert (reader.ends, closed, reader.text) == ([None], [True], "Hello ")
    inner.receive(Batch([content("more")]))
    assert reader.text == "Hello "
    await flow.finished()
    assert "finished" not in inner.told, "what lies further in had no end"


async def test_a_comment_goes_with_what_comes_next() -> None:
    inner = Inner(Batch([content("Hello ")]))
    flow, _ = guarded(inner)
    await flow.start()
    reader = Reader(flow)
    inner.receive(Batch([content("you")], comment=b": seam\n\n"))
    inner.receive(Batch([content(" there ")]))
    assert [batch.comment for batch in reader.batches] == [b"", b": seam\n\n"]


async def test_closed_it_tells_nothing_more() -> None:
    inner = Inner(Batch([content("Hello ")]))
    trailer = Trailer()
    flow, _ = guarded(inner, trailer=trailer)
    await flow.start()
    reader = Reader(flow)
    trailer.release()
    inner.receive(Batch([content("you ")]))
    inner.ended(None)
    assert (reader.text, reader.ends) == ("Hello ", [])


@pytest.mark.parametrize("stream", [True, False])
async def test_what_can_only_be_pulled(stream: bool) -> None:
    over: list[str] = []

    async def pulled() -> AsyncIterator[Batch]:
        for text in ("Hello ", "jo@", "x.com ", "and "):
            yield Batch([content(text)])
        yield FINAL
        over.append("finished")

    flow, found = guarded(pulled(), stream=stream)
    await flow.start()
    batches = [batch async for batch in flow]
    assert (
        "".join(one["choices"][0]["delta"].get("content", "") for batch in batches for one in batch.chunks)
        == "Hello [EMAIL_1] and "
    )
    assert (over, len(found), batches[-1].final) == (["finished"], 1, True)


async def test_a_puller_hears_an_error_and_of_the_closing() -> None:
    async def breaks() -> AsyncIterator[Batch]:
        yield Batch([content("Hello ")])
        raise UpstreamCut("cut")

    flow, _ = guarded(breaks())
    await flow.start()
    assert (await anext(flow)).chunks == [content("Hello ")]
    with pytest.raises(UpstreamCut):
        await anext(flow)
    await flow.aclose()
    inner = Inner(Batch([content("Hello ")]))
    trailer = Trailer()
    flow, _ = guarded(inner, trailer=trailer)
    await flow.start()
    await anext(flow)
    trailer.release()
    with pytest.raises(GatewayError):
        await anext(flow)


async def test_a_failure_of_the_rules_ends_the_reply_with_an_error() -> None:
    class Fails(Screen):
        def see(self, batch: Batch) -> Any:
            raise RuntimeError("a rule failed")

    closed: list[bool] = []
    trailer = Trailer()
    trailer.own(lambda: closed.append(True))
    reply = Reply(Head("openai/m"), Inner(Batch([content("Hi ")])), trailer)
    flow = Guarded(call(), reply, Fails(None, None), [])
    with pytest.raises(RuntimeError):
        await flow.start()
    assert closed == [True]
