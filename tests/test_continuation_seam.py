"""What is decided at a seam, as pure functions: what repeats, what can be gone on with, who is asked, what it used.

The one rule: of what the second model says nothing is lost but a repetition of what the first said last.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.continuation.asking import Asking, candidates, estimated_tokens
from middleware.continuation.flow import Continued
from middleware.continuation.overlap import NEAR, SURE, Overlap, overlap
from middleware.continuation.remedy import Remedy, broke, can_be_joined, remedy
from middleware.continuation.said import Said, Sent, read
from middleware.continuation.seam import Seam
from middleware.continuation.usage import Part, summed
from proxy.call import Call, altered
from proxy.errors import (
    Draining,
    GatewayError,
    Malformed,
    Refused,
    UpstreamCut,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.reply import Batch, Ended, Head, Receive, Reply, Switch, Trailer, flow_of
from tests.support.decoding import make_call, make_target

SWITCH = Switch("a/m", "b/m", "upstream_cut", 5)
WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=40, unique=True)


def cut_up(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[low:high] for low, high in pairwise(places)]


def fresh(said: str, pieces: list[str]) -> str:
    found = Overlap(said)
    return "".join([found.feed(piece) for piece in pieces]) + found.close()


# What repeats


@given(words=WORDS, place=st.integers(0, 40), back=st.integers(0, 40), cuts=st.lists(st.integers(0, 300)))
def test_repeated_last_words_are_removed_for_any_split(words: list[str], place: int, back: int, cuts: list[int]) -> None:
    """Each word is there once, so that what repeats is known."""
    place = min(place, len(words))
    said, rest = " ".join(words[:place]), " ".join(words[place:])
    text = " ".join(words)
    more = text[len(" ".join(words[: max(0, place - back)])) :]
    assert said + fresh(said, cut_up(more, cuts)) == text, (said, rest)


@given(said=st.text("ab \n", max_size=60), more=st.text("ab \n", max_size=60), cuts=st.lists(st.integers(0, 60)))
def test_nothing_is_lost_but_an_end_of_what_was_said_and_the_split_does_not_matter(said: str, more: str, cuts: list[int]) -> None:
    found = fresh(said, cut_up(more, cuts))
    assert found == more[overlap(said, more) :]
    assert more.endswith(found)
    assert said.endswith(more[: len(more) - len(found)])


@given(said=st.text("ab ", max_size=30), more=st.text("ab ", max_size=30))
def test_it_is_the_longest_repetition(said: str, more: str) -> None:
    """Every longer one would begin inside a word."""
    found = overlap(said, more)
    for size in range(found + 1, min(len(said), len(more)) + 1):
        if said.endswith(more[:size]):
            assert size < SURE
            assert said[-size - 1].isalnum()
            assert said[-size].isalnum()


@pytest.mark.parametrize(
    ("said", "more", "left"),
    [
        ("book", "keeper", "keeper"),  # a letter is no repetition
        ("the wor", "world", "ld"),  # half a word is
        ("Hello ", " world", "world"),
        ("one\n", "\n\ntwo", "\ntwo"),
        ("你好世界", "世界和平", "和平"),
        ("a", "a", ""),
        ("", "anything", "anything"),
        ("said", "", ""),
    ],
)
def test_words_are_not_torn_apart(said: str, more: str, left: str) -> None:
    assert fresh(said, [more]) == left
    assert fresh(said, list(more)) == left


def test_a_reply_that_begins_anew_is_cut_to_what_is_new_however_long() -> None:
    said = "".join(f"word{number} " for number in range(2 * NEAR))
    assert fresh(said, [*cut_up(said + "and more", list(range(0, len(said), 997)))]) == "and more"


def test_text_is_held_back_no_longer_than_it_repeats() -> None:
    found = Overlap("one two three")
    assert [found.feed(piece) for piece in (" two", " three", " four", " five")] == ["", "", " four", " five"]
    assert not found.open


# What is a break, and what helps


@pytest.mark.parametrize(
    ("error", "is_break"),
    [
        (UpstreamCut("x"), True),
        (Malformed("x"), True),
        (UpstreamError("x"), True),
        (UpstreamUnreachable("x"), True),
        (UpstreamError("x", status=429), True),
        (UpstreamTimeout("idle", 1), True),
        (UpstreamTimeout("total", 1), False),
        (UpstreamError("x", status=400), False),
        (UpstreamError("x", code="content_filter"), False),
        (Draining("x"), False),
        (Refused("x"), False),
        (GatewayError("x"), False),
    ],
)
def test_only_the_upstreams_own_faults_are_breaks(error: GatewayError, is_break: bool) -> None:
    assert broke(error) is is_break


@pytest.mark.parametrize(
    ("request_", "joined"),
    [
        ({}, True),
        ({"n": 1, "logprobs": False, "modalities": ["text"], "response_format": {"type": "text"}, "tools": [{}]}, True),
        ({"n": 2}, False),
        ({"logprobs": True}, False),
        ({"top_logprobs": 2}, False),
        ({"modalities": ["audio"]}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, False),
        ({"response_format": {"type": "something new"}}, False),
        ({"generationConfig": {"responseMimeType": "application/json"}}, False),
        ({"output_format": {"type": "json_schema"}}, False),
        ({"guided_regex": "a+"}, False),
    ],
)
def test_what_is_no_plain_text_in_one_choice_is_not_joined(request_: dict[str, object], joined: bool) -> None:
    assert can_be_joined(make_call(request_)) is joined


@pytest.mark.parametrize("prompt", ["a", ["a"]])
def test_a_text_completion_of_one_prompt_is_joined(prompt: object) -> None:
    call = altered(make_call(), kind="completions")
    assert can_be_joined(altered(call, request={"prompt": prompt}))
    for other in ({"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"prompt": "a", "echo": True}, {"prompt": "a", "suffix": "b"}):
        assert not can_be_joined(altered(call, request=other))
    assert not can_be_joined(altered(call, request={"prompt": "a", "logprobs": 0}))


def test_a_role_alone_is_nothing_and_thoughts_alone_are_something() -> None:
    cut = UpstreamCut("x")
    only_role = remedy("restart_if_unsent", make_call(), Said(id="c", created=1), cut)
    assert only_role is not None
    assert only_role.anew
    assert remedy("continue", make_call(), Said(reasoned=True), cut) is None
    assert remedy("continue", make_call(), None, cut) is None
    assert remedy("restart_if_unsent", make_call(), Said("text"), cut) is None
    found = remedy("continue", make_call(), Said("text"), cut)
    assert found is not None
    assert not found.anew


# Who is asked, and how


def call_to(*names: str) -> Call:
    return altered(make_call(), targets=tuple(make_target("openai", "m", name=name) for name in names))


@pytest.mark.parametrize(
    ("targets", "broken", "order"),
    [
        ("abc", "a", "bc"),
        ("abc", "b", "ca"),
        ("abc", "ab", "ca"),
        ("abc", "abc", "ab"),
        ("abc", "ba", "cb"),
        ("ab", "aba", "b"),
        ("a", "aa", "a"),
    ],
)
def test_the_next_is_asked_those_that_broke_come_last_and_the_last_only_where_it_is_alone(
    targets: str, broken: str, order: str
) -> None:
    found = candidates(call_to(*targets), [f"{name}/m" for name in broken])
    assert [target.provider.name for target in found] == list(order)


@given(st.text(max_size=80), st.integers(1, 200))
def test_a_bound_on_the_output_shrinks_and_stays_a_bound(text: str, most: int) -> None:
    call = make_call({"max_tokens": most})
    found = Asking().extended(call, "instruction", text).request
    assert found["max_tokens"] == max(1, most - estimated_tokens(text))
    assert call.request["max_tokens"] == most


# What was said, and what follows


def chunk(delta: dict[str, object], finish: str | None = None, id: str = "c", **fields: object) -> dict[str, object]:
    return {"id": id, "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}


def test_what_was_sent_is_read_as_it_went_out_and_forgotten_beyond_its_bound() -> None:
    sent = Sent(400)
    assert sent.said() == Said()
    sent.add(Batch([chunk({"role": "assistant", "content": "Hel"})]))
    sent.add(Batch([b"data: %b\n\n" % json.dumps(chunk({"content": "lo"})).encode()]))
    assert sent.said() == Said("Hello", id="c", created=1)
    sent.add(Batch([chunk({"content": "x" * 400})]))
    assert sent.said() is None


@pytest.mark.parametrize("delta", [{"tool_calls": [{"index": 0}]}, {"refusal": "no"}, {"images": [{}]}, {"audio": {"data": ""}}])
def test_anything_but_text_and_thoughts_is_not_plain(delta: dict[str, object]) -> None:
    assert not read(Batch([chunk({"content": "a"}), chunk(delta)]).sse()).plain
    assert read(Batch([chunk({"content": "a", "tool_calls": None, "refusal": None})]).sse()).plain


def test_a_tool_call_behind_the_seam_comes_after_the_text_that_was_held_back() -> None:
    seam = Seam(Said("I will look", id="first", created=7), SWITCH)
    call = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": ""}}
    shared = [chunk({"role": "assistant", "content": " look"}, id="x"), chunk({"tool_calls": [call]}, id="x")]
    assert seam.joined(Batch(shared[:1])) is None
    found = seam.joined(Batch(shared[1:]))
    assert found is not None
    assert [one["choices"][0]["delta"] for one in found.chunks] == [{"tool_calls": [call]}]
    assert {(one["id"], one["created"]) for one in found.chunks} == {("first", 7)}
    assert shared[0]["id"] == "x", "what came is not changed"


def test_text_that_was_held_back_and_repeats_nothing_comes_before_the_end() -> None:
    seam = Seam(Said("one two one", id="first", created=7), SWITCH)
    assert seam.joined(Batch([chunk({"content": " two"})])) is None
    found = seam.joined(Batch([chunk({}, "stop")], final=True))
    assert found is not None
    assert [(one["choices"][0]["delta"], one["choices"][0]["finish_reason"]) for one in found.chunks] == [
        ({"content": " two"}, None), ({}, "stop"),
    ]  # fmt: skip
    assert found.final
    assert found.comment == b": penstock continued by b/m\n\n"


def test_a_providers_own_figures_of_the_call_that_broke_are_used_as_they_are() -> None:
    details = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    last = {"prompt_tokens": 15, "completion_tokens": 5, "total_tokens": 20, "prompt_tokens_details": {"cached_tokens": 6}}
    found = summed([Part("a/m", "text", 0, details)], "b/m", last, 3)
    assert (found["prompt_tokens"], found["completion_tokens"], found["total_tokens"]) == (25, 7, 32)
    assert found["prompt_tokens_details"] == {"cached_tokens": 10}
    assert not any("estimated" in call for call in found["penstock"]["calls"])
    assert last["prompt_tokens"] == 15


# The flow by itself


class Pushed:
    """A flow that pushes when the test says so."""

    pushes = True

    def __init__(self, early: list[Batch] | None = None) -> None:
        self.early = early or []
        self.said: list[str] = []

    def push(self, receive: Receive, ended: Ended) -> None:
        self.receive, self.ended = receive, ended
        for batch in self.early:
            receive(batch)

    def pause(self) -> None:
        self.said.append("pause")

    def resume(self) -> None:
        self.said.append("resume")

    async def finished(self) -> None:
        self.said.append("finished")

    def __aiter__(self) -> Pushed:
        return self

    async def __anext__(self) -> Batch:
        raise AssertionError("it is pushed")


async def test_pausing_over_the_seam_pauses_whoever_goes_on() -> None:
    first, second = Pushed(), Pushed()

    async def asks(found: Remedy, broken: object) -> Reply:
        return Reply(Head("b/m"), second, Trailer())

    reply = Reply(Head("a/m"), first, Trailer())
    flow = Continued(
        reply, streamed=True, judge=lambda said, error: remedy("continue", make_call(), said, error), ask=asks, most=999
    )
    got: list[Batch] = []
    ends: list[Exception | None] = []
    flow.push(got.append, ends.append)
    batch = Batch([chunk({"content": "Hello"})])
    reply.trailer.chunks = 1
    first.receive(batch)
    assert flow.trailer.chunks == 1
    assert got == [batch], "where nothing broke, batches pass as they are"
    first.ended(UpstreamCut("x"))
    flow.pause()
    assert reply.trailer.outcome == "upstream_cut"
    assert flow._task is not None
    await flow._task
    assert second.said == ["pause"]
    flow.resume()
    second.receive(Batch([chunk({"content": " world"})]))
    second.ended(None)
    await flow.finished()
    assert second.said == ["pause", "resume", "finished"]
    assert ends == [None]
    assert got[1].chunks[0]["choices"][0]["delta"] == {"content": " world"}


def broken_at_hello(then: AsyncIterator[Batch]) -> tuple[Reply, list[Batch], list[Exception | None]]:
    """A reply whose first part was pushed and broke, with `then` to go on; what its reader has got, and its ends."""
    first = Pushed()

    async def asks(found: Remedy, broken: object) -> Reply:
        return Reply(Head("b/m"), then, Trailer())

    flow = Continued(
        Reply(Head("a/m"), first, Trailer()),
        streamed=True,
        judge=lambda said, error: remedy("continue", make_call(), said, error),
        ask=asks,
        most=999,
    )
    got: list[Batch] = []
    ends: list[Exception | None] = []
    flow.push(got.append, ends.append)
    first.receive(Batch([chunk({"content": "Hello"})]))
    first.ended(UpstreamCut("x"))
    return Reply(Head("a/m"), flow, flow.trailer), got, ends


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_who_can_only_be_pulled_is_not_pulled_while_the_reader_pauses() -> None:
    reply, got, ends = broken_at_hello(Pulled([" a", " b", " c"], last=True))
    flow = flow_of(reply.chunks)
    assert flow is not None
    flow.pause()
    await turns()
    assert (len(got), ends) == (2, [])
    flow.resume()
    await turns()
    assert (len(got), ends) == (5, [None])


@pytest.mark.parametrize("started", [False, True])
async def test_closing_ends_the_asking_and_closes_what_goes_on(started: bool) -> None:
    closed: list[str] = []

    async def silent() -> AsyncIterator[Batch]:
        try:
            await asyncio.get_running_loop().create_future()
            yield Batch([])
        finally:
            closed.append("closed")

    before = asyncio.all_tasks()
    reply, got, ends = broken_at_hello(silent())
    if started:
        await turns()
    await reply.close()
    await turns()
    assert (len(got), ends, closed) == (1, [], ["closed"] * started)
    assert asyncio.all_tasks() == before


class Pulled:
    """Batches of one piece each, then the finish chunk, or a break."""

    def __init__(self, pieces: list[str], last: bool) -> None:
        self._batches = [Batch([chunk({"content": piece}, id=str(id(self)))]) for piece in pieces if piece]
        self._end = Batch([chunk({}, "stop", id=str(id(self)))], final=True)
        self._last = last

    def __aiter__(self) -> Pulled:
        return self

    async def __anext__(self) -> Batch:
        if self._batches:
            return self._batches.pop(0)
        if not self._last:
            raise UpstreamCut("x")
        if self._batches is FINISHED:
            raise StopAsyncIteration
        self._batches = FINISHED
        return self._end


class PushedOut(Pulled):
    """The same, pushed within the call, which is the hardest: a break in there was never handed on."""

    pushes = True

    def push(self, receive: Receive, ended: Ended) -> None:
        for batch in self._batches:
            receive(batch)
        if self._last:
            receive(self._end)
        ended(None if self._last else UpstreamCut("x"))

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    async def finished(self) -> None: ...


FINISHED: list[Batch] = []


@given(
    words=WORDS, plan=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5), st.booleans()), max_size=4), pushed=st.booleans()
)
async def test_however_often_it_breaks_and_whatever_is_repeated_the_text_is_whole(
    words: list[str], plan: list[tuple[int, int, bool]], pushed: bool
) -> None:
    """Each reply says some more words, after the last few again; it comes pushed or pulled, and so does the one before it."""
    text, tries = " ".join(words), [*plan]

    def next_reply(said: str, first: bool = False) -> Reply:
        size, back, pushes = tries.pop(0) if tries else (len(words), 0, False)
        done = len(said.split())
        start = len(" ".join(words[: max(0, done - back)]))
        last = not tries and done + size >= len(words)
        more = text[start : len(" ".join(words[: done + size]))] if not last else text[start:]
        kind = PushedOut if (pushed if first else pushes) else Pulled
        return Reply(Head("a/m"), kind(cut_up(more, [3, 7, 12, 30]), last), Trailer())

    async def asks(found: Remedy, broken: object) -> Reply:
        return next_reply(found.said.text)

    flow = Continued(
        next_reply("", first=True),
        streamed=True,
        judge=lambda said, error: remedy("continue", make_call(), said, error),
        ask=asks,
        most=10**6,
    )
    got: list[Batch] = []
    if flow.pushes:
        over = asyncio.get_running_loop().create_future()
        flow.push(got.append, over.set_result)
        assert await over is None
    else:
        got = [batch async for batch in flow]
    chunks = [one for batch in got for one in batch.chunks]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == text
    assert [one["choices"][0]["finish_reason"] for one in chunks if one["choices"][0]["finish_reason"]] == ["stop"]
    assert len({one["id"] for one in chunks}) == 1
    assert got[-1].final
