"""What is put before a request of what was said: budget, pairs of call and result, what the client sent itself, what is kept.

Strategy: pure functions on histories that hypothesis makes up, well-formed and torn ones, against claims that hold for all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from middleware.memory.expand import expanded, unknown
from middleware.memory.messages import Keeping, answered, calls_of
from middleware.memory.overlap import Overlap, overlap
from middleware.memory.recall import Budget, paired, recalled
from middleware.memory.recorder import GRAIN, Recorder
from middleware.memory.turn import Policy, turn_of
from proxy.errors import Outcome
from proxy.fold import fold, unfold
from proxy.reply import Batch
from proxy.store import Turn

Json = dict[str, Any]
KEEPING = Keeping(reasoning=False, part=4096)
LARGE = Budget(1000, 10**6)


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def says(text: str) -> Json:
    return {"role": "assistant", "content": text}


def calls(*ids: str, text: str | None = None) -> Json:
    made = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in ids]
    return {"role": "assistant", "content": text, "tool_calls": made}


def result(id: str) -> Json:
    return {"role": "tool", "tool_call_id": id, "content": f"result of {id}"}


def turn(*messages: Json, tokens: int = 1, number: int = 0) -> Turn:
    return Turn(messages, tokens, 0.0, f"r{number}", number=number)


def said(turns: Sequence[Turn]) -> list[Json]:
    return [message for found in turns for message in found.messages]


# Histories: what a well-behaved client and provider leave behind, and what is left of them after losses.

IDS = st.sampled_from(["a", "b", "c"])
QUESTION = st.builds(user, st.sampled_from(["Hi", "Why?", "And then?"]))
ANSWER = st.one_of(
    st.builds(says, st.sampled_from(["Yes.", "No.", ""])),
    st.builds(lambda ids: calls(*ids), st.lists(IDS, min_size=1, max_size=3, unique=True)),
    st.builds(lambda id: {"role": "assistant", "content": None, "function_call": {"name": id, "arguments": "{}"}}, IDS),
)
RESULT = st.one_of(st.builds(result, IDS), st.builds(lambda id: {"role": "function", "name": id, "content": "r"}, IDS))
ASKED = st.one_of(
    st.lists(QUESTION, min_size=1, max_size=2), st.lists(RESULT, min_size=1, max_size=3), st.tuples(RESULT, QUESTION).map(list)
)
TURN = st.builds(lambda asked, answer, tokens: turn(*asked, answer, tokens=tokens), ASKED, ANSWER, st.integers(0, 50))
TURNS = st.lists(TURN, max_size=12)
BUDGET = st.builds(Budget, st.integers(1, 12), st.integers(0, 200))


def loops() -> st.SearchStrategy[list[Turn]]:
    """Conversations in which every call is answered by the next turn."""

    @st.composite
    def build(draw: st.DrawFn) -> list[Turn]:
        turns: list[Turn] = []
        for number in range(draw(st.integers(0, 6))):
            asked = [user(f"q{number}")]
            for step in range(draw(st.integers(0, 3))):
                ids = [f"{number}.{step}.{one}" for one in range(draw(st.integers(1, 2)))]
                turns.append(turn(*asked, calls(*ids), tokens=draw(st.integers(1, 20))))
                asked = [result(id) for id in ids]
            turns.append(turn(*asked, says(f"a{number}"), tokens=draw(st.integers(1, 20))))
        return turns

    return build()


@given(TURNS, BUDGET)
def test_what_is_recalled_is_the_end_of_the_history_within_the_budget(turns: list[Turn], budget: Budget) -> None:
    found = recalled(turns, budget)
    assert list(found) == turns[len(turns) - len(found) :]
    assert len(found) <= budget.turns
    assert sum(one.tokens for one in found) <= budget.tokens
    assert not found or found[0].messages[0]["role"] == "user"


@given(TURNS, BUDGET)
def test_no_more_could_have_been_recalled(turns: list[Turn], budget: Budget) -> None:
    """The next longer end of the history that does not begin with a result is over the budget."""
    found = recalled(turns, budget)
    for start in reversed(range(len(turns) - len(found))):
        if turns[start].messages[0]["role"] == "user":
            longer = turns[start:]
            assert len(longer) > budget.turns or sum(one.tokens for one in longer) > budget.tokens
            break


@given(loops(), BUDGET)
def test_a_call_is_recalled_with_its_results_or_not_at_all(turns: list[Turn], budget: Budget) -> None:
    found = said(recalled(turns, budget))
    called = [call["id"] for message in found for call in message.get("tool_calls", ())]
    results = [message["tool_call_id"] for message in found if message["role"] == "tool"]
    assert called == results
    assert paired(found, [user("next")]) == found, "nothing of a well-formed history is lost"


def test_an_answer_without_a_question_belongs_to_the_turn_before_it() -> None:
    """A client that sends the whole history, and nothing new, is answered once more."""
    turns = [turn(user("q1"), says("a1")), turn(says("a1, again"))]
    assert recalled(turns, Budget(2, 9)) == turns
    assert recalled(turns, Budget(1, 9)) == []
    greeted = [turn(says("Hello."), user("q1"), says("a1"))]
    assert recalled(greeted, Budget(1, 9)) == greeted


def is_accepted(messages: Sequence[Json]) -> bool:
    """As strict providers see it: results right behind the message that calls, one for each call, and no other results."""
    waiting: set[str] = set()
    for message in messages:
        if message["role"] in ("tool", "function"):
            id = message.get("tool_call_id") or f"function:{message.get('name')}"
            if id not in waiting:
                return False
            waiting.discard(id)
        elif waiting:
            return False
        else:
            waiting = {call["id"] for call in message.get("tool_calls", ())}
            if older := message.get("function_call"):
                waiting.add(f"function:{older['name']}")
            if message["role"] == "assistant" and not (waiting or message["content"]):
                return False
    return not waiting


@given(TURNS, st.one_of(st.lists(QUESTION, min_size=1), st.lists(RESULT, min_size=1, max_size=3)))
def test_whatever_was_lost_providers_take_what_is_put_in(turns: list[Turn], following: list[Json]) -> None:
    history = said(turns)
    found = paired(history, following)
    here = iter(history)
    for message in found:
        like = {**message, "tool_calls": None, "function_call": None}
        assert any({**one, "tool_calls": None, "function_call": None} == like for one in here), "in its order, nothing made up"
    answers = {answered(one): one for one in following if one["role"] in ("tool", "function")}
    own = [answers[id] for id in (calls_of(found[-1]) if found else ()) if id in answers]
    assert is_accepted([*found, *own, user("next")]), "results that answer nothing are the client's own business"


def test_the_last_call_is_answered_by_the_request() -> None:
    history = [user("q"), calls("a", "b")]
    assert paired(history, [result("a"), result("b")]) == history
    assert paired(history, [result("a"), user("never mind b")]) == [user("q"), calls("a")]
    assert paired(history, [user("never mind")]) == [user("q")]
    assert paired([user("q"), calls("a", text="I shall look.")], [user("never mind")]) == [user("q"), says("I shall look.")]


# What the client sent itself.


def with_numbers(turns: Sequence[Turn]) -> list[Turn]:
    """Each turn with words of its own, so that it is told from the others."""
    return [turn(user(f"q{number}"), says(f"a{number}")) for number, _ in enumerate(turns)]


@given(TURNS, st.integers(0, 12), st.integers(0, 12))
def test_a_client_that_sends_the_history_is_given_only_what_is_older(made: list[Turn], first: int, last: int) -> None:
    turns = with_numbers(made)
    sent = turns[first:last]
    found = overlap([*said(sent), user("new")], turns)
    if sent:
        assert found == Overlap(first, len(sent), 2 * len(sent))
    else:
        assert found == Overlap(len(turns), 0, 0)


def test_the_whole_history_goes_out_once() -> None:
    turns = [turn(user("q1"), says("a1")), turn(user("q2"), says("a2"))]
    messages = [{"role": "system", "content": "S"}, *said(turns), user("q3")]
    found = expanded(messages, turns, KEEPING, LARGE)
    assert (found.messages, found.turns, found.sent, found.new) == (messages, 0, 2, [user("q3")])


def test_a_clients_copy_may_be_written_otherwise() -> None:
    """SDKs add null fields, clients trim blanks and write content as parts."""
    turns = [turn(user("q1"), says("a1\n"))]
    own: list[Json] = [
        {"role": "user", "content": [{"type": "text", "text": "q1"}]},
        {
            "role": "assistant",
            "content": " a1",
            "refusal": None,
            "tool_calls": None,
            "annotations": [],
            "reasoning_content": "hm",
        },
        user("q2"),
    ]
    found = expanded(own, turns, KEEPING, LARGE)
    assert (found.messages, found.sent, found.new) == (own, 1, [user("q2")])


def test_an_agent_that_sends_its_tool_loop_is_given_what_came_before_it() -> None:
    before, asked = turn(user("q1"), says("a1")), turn(user("q2"), calls("a"))
    own = [user("q2"), calls("a"), result("a")]
    found = expanded(own, [before, asked], KEEPING, LARGE)
    assert found.messages == [*before.messages, *own]
    assert (found.turns, found.sent, found.new) == (1, 1, [result("a")])


def test_before_messages_that_are_older_than_all_that_is_remembered_nothing_is_put() -> None:
    turns = [turn(user("q2"), says("a2")), turn(user("q3"), says("a3"))]
    own = [user("q1"), says("a1"), *said(turns), user("q4")]
    found = expanded(own, turns, KEEPING, LARGE)
    assert (found.messages, found.turns, found.sent, found.new) == (own, 0, 2, [user("q4")])
    some = [user("q0"), says("a0"), *said(turns[1:]), user("q4")]
    found = expanded(some, turns, KEEPING, LARGE)
    assert (found.messages, found.turns, found.sent) == (some, 0, 1)


def test_a_question_that_was_put_differently_goes_on_from_where_it_was() -> None:
    turns = [turn(user("q1"), says("a1")), turn(user("q2"), says("a2"))]
    own = [user("q1"), says("a1"), user("q2, better")]
    found = expanded(own, turns, KEEPING, LARGE)
    assert (found.messages, found.sent, found.new) == (own, 1, [user("q2, better")])


def test_examples_that_are_sent_each_time_are_no_history() -> None:
    examples = [user("2+2"), says("4")]
    turns = [turn(*examples, user("3+3"), says("6"))]
    found = expanded([*examples, user("4+4")], turns, KEEPING, LARGE)
    assert found.turns == 1
    assert found.messages == [*turns[0].messages, *examples, user("4+4")]


# The request around it.


def test_instructions_stay_in_front_and_are_not_remembered() -> None:
    front: list[Json] = [{"role": "system", "content": "S"}, {"role": "developer", "content": "D"}]
    late = {"role": "system", "content": "later"}
    turns = [turn(user("q1"), says("a1"))]
    found = expanded([*front, user("q2"), late], turns, KEEPING, LARGE)
    assert found.messages == [*front, user("q1"), says("a1"), user("q2"), late]
    assert found.new == [user("q2")]


def test_without_a_look_up_only_the_last_question_is_new() -> None:
    own = [{"role": "system", "content": "S"}, user("q1"), says("a1"), user("q2"), calls("a"), result("a")]
    found = unknown(own, KEEPING)
    assert (found.messages, found.new) == (own, own[3:])
    assert unknown([result("a")], KEEPING).new == [result("a")]


# What is kept.

SMALL = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
LARGE_ONE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}


def test_large_parts_leave_a_mark() -> None:
    words = {"type": "text", "text": "What is this?" * 1000}
    message = {"role": "user", "content": [words, SMALL, LARGE_ONE, {"type": "input_audio", "input_audio": {"data": "A" * 5000}}]}
    (kept,) = KEEPING.of_client([message])
    marks = [{"type": "text", "text": "[image left out]"}, {"type": "text", "text": "[audio left out]"}]
    assert kept["content"] == [words, SMALL, *marks]
    assert message["content"][2] is LARGE_ONE, "the request itself is not changed"
    assert Keeping(False, 10**5).of_client([message]) == [message]


def test_a_mark_is_known_again_where_the_client_sends_the_image_itself() -> None:
    question = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, LARGE_ONE]}
    turns = [turn(*KEEPING.of_client([question]), says("A cat."))]
    own = [question, says("A cat."), user("Sure?")]
    assert expanded(own, turns, KEEPING, LARGE).sent == 1


ANSWERED = {
    "role": "assistant",
    "content": "Yes.",
    "refusal": None,
    "annotations": [{"type": "url_citation"}],
    "tool_calls": [],
    "reasoning_content": "Hm.",
    "reasoning_details": [{"type": "reasoning.text", "text": "Hm.", "signature": "s"}],
}


def test_of_an_answer_is_kept_what_can_be_sent_back() -> None:
    assert KEEPING.of_answer(ANSWERED) == says("Yes.")
    kept = Keeping(reasoning=True, part=4096).of_answer(ANSWERED)
    reasoning = {name: ANSWERED[name] for name in ("reasoning_content", "reasoning_details")}
    assert kept == {**says("Yes."), **reasoning}


def test_the_signature_of_a_call_is_kept_with_it() -> None:
    signed = {"type": "reasoning.encrypted", "data": "sig", "id": "a", "format": "google-gemini-v1"}
    details = [{"type": "reasoning.text", "text": "Hm."}, signed]
    assert KEEPING.of_answer({**calls("a"), "reasoning_details": details}) == {**calls("a"), "reasoning_details": [signed]}
    assert "reasoning_details" not in KEEPING.of_answer({**says("Yes."), "reasoning_details": details})


# The answer, as it passes.


def chunk(delta: Json, finish: str | None = None, index: int = 0) -> Json:
    return {"id": "c", "created": 1, "model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def encoded(found: Json) -> bytes:
    return b"data: %b\n\n" % json.dumps(found).encode()


def recorded(batches: Sequence[Batch], most: int = 2**20) -> Recorder:
    recorder = Recorder(whole=False, most=most)
    for batch in batches:
        assert recorder.see(batch) is batch
    return recorder


CALL: Json = {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]}
CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    *(chunk({"content": f"word {number} " * 20}) for number in range(600)),
    chunk({"content": "other"}, index=1),
    chunk(CALL),
    *(chunk({"tool_calls": [{"index": 0, "function": {"arguments": f'"{number}",'}}]}) for number in range(600)),
    chunk({}, "tool_calls"),
]


@settings(max_examples=20)
@given(st.lists(st.integers(1, len(CHUNKS) - 1), max_size=8), st.booleans())
def test_folded_in_portions_or_at_once_the_answer_is_the_same(cuts: list[int], as_bytes: bool) -> None:
    assert sum(len(encoded(one)) for one in CHUNKS) > 3 * GRAIN, "it is folded on the way"
    items: list[Any] = [encoded(one) if as_bytes else one for one in CHUNKS]
    edges = [0, *sorted(set(cuts)), len(items)]
    batches = [Batch(items[start:end]) for start, end in pairwise(edges)]
    choice = recorded(batches).choice()
    whole = fold([one for one in CHUNKS if one["choices"][0]["index"] == 0], None)["choices"][0]
    assert choice is not None
    assert {name: choice[name] for name in ("index", "message", "finish_reason")} == whole


def test_what_is_held_of_a_long_answer_is_its_text() -> None:
    recorder = recorded([Batch([encoded(one)]) for one in CHUNKS[:601]])
    assert sum(len(item) if isinstance(item, bytes) else len(json.dumps(item)) for item in recorder._items) < 600 * 200 + GRAIN


def test_an_answer_that_is_too_large_is_let_go_of() -> None:
    recorder = recorded([Batch([encoded(one)]) for one in CHUNKS], most=10_000)
    assert (recorder.too_large, recorder.choice(), recorder._items) == (True, None, [])
    short = recorded([Batch(CHUNKS[:30])], most=1000)
    assert (short.choice(), short.too_large) == (None, True)


def test_a_reply_whose_first_choice_never_comes_is_no_answer() -> None:
    other = [Batch([chunk({"content": "word " * 200}, index=1)]) for _ in range(100)]
    recorder = recorded(other)
    assert recorder.choice() is None
    assert len(recorder._items) < 100, "and nothing of it is held"


def test_a_completion_and_its_chunks_are_the_same_answer() -> None:
    completion: Json = {"choices": [{"index": 0, "message": {**calls("a", text="x")}, "finish_reason": "tool_calls"}]}
    whole = Recorder(whole=True, most=1000)
    whole.see(Batch([completion], final=True))
    content, finish, _ = unfold(completion)
    streamed = recorded([Batch(content), Batch(finish, final=True)]).choice()
    found = whole.choice()
    assert found is not None
    assert streamed is not None
    assert (streamed["message"], streamed["finish_reason"]) == (found["message"], found["finish_reason"])


POLICY = Policy(KEEPING, partial=True, most=10**6)


def ended(chunks: Sequence[Json], outcome: Outcome, policy: Policy = POLICY) -> Turn | str:
    return turn_of(policy, [user("q")], recorded([Batch(chunks)]), outcome, 1.0, "r", "m")


@pytest.mark.parametrize(
    ("outcome", "partial"),
    [
        (Outcome.COMPLETED, False),
        (Outcome.CONTINUED, False),
        (Outcome.TRUNCATED, False),
        (Outcome.CLIENT_GONE, True),
        (Outcome.UPSTREAM_CUT, True),
        (Outcome.TIMEOUT_IDLE, True),
        (Outcome.DRAINING, True),
        (Outcome.CANCELLED, True),
    ],
)
def test_how_it_ended_settles_what_becomes_of_it(outcome: Outcome, partial: bool) -> None:
    found = ended([chunk({"content": "Half an"})], outcome)
    assert isinstance(found, Turn)
    assert (found.messages, found.partial) == ([user("q"), says("Half an")], partial)
    dropped = ended([chunk({"content": "Half an"})], outcome, Policy(KEEPING, partial=False, most=10**6))
    assert dropped == ("broken" if partial else found)


def test_a_call_that_may_be_unfinished_is_never_kept() -> None:
    assert ended([chunk({"content": "I shall look."}), chunk(CALL)], Outcome.CLIENT_GONE) == "broken"
    older = chunk({"content": "I shall look.", "function_call": {"name": "f", "arguments": "{"}})
    assert ended([older], Outcome.UPSTREAM_CUT) == "broken"
    whole = ended([chunk(CALL), chunk({}, "tool_calls")], Outcome.COMPLETED)
    assert isinstance(whole, Turn)


def test_a_broken_reply_without_text_is_nothing_to_go_on_from() -> None:
    assert ended([chunk({"reasoning_content": "Hm."})], Outcome.CLIENT_GONE) == "broken"
    assert ended([], Outcome.UPSTREAM_CUT) == "broken"


def test_what_was_filtered_is_not_remembered() -> None:
    assert ended([chunk({"content": "bad"}), chunk({}, "content_filter")], Outcome.COMPLETED) == "filtered"
    assert ended([chunk({"content": "bad"})], Outcome.BLOCKED) == "filtered"
    dropping = Policy(KEEPING, partial=False, most=10**6)
    assert ended([chunk({"content": "bad"}), chunk({}, "content_filter")], Outcome.CANCELLED, dropping) == "filtered"


def test_the_bound_is_on_the_whole_turn() -> None:
    policy = Policy(KEEPING, partial=False, most=200)
    assert isinstance(ended([chunk({"content": "a" * 50})], Outcome.COMPLETED, policy), Turn)
    assert ended([chunk({"content": "a" * 150})], Outcome.COMPLETED, policy) == "too_large"
