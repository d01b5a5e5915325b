"""The chaos run itself: a short one passes, and each of its checkers finds the lie that is planted for it.

Strategy: `evidence()` is a small run in which all is well; a test changes one fact of it and names who must object.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chaos.clients import listen, take
from chaos.invariants import INVARIANTS, judged
from chaos.line import Answer, Event
from chaos.plan import BEHAVIOURS, Plan
from chaos.records import Called, Evidence, Heard, State
from chaos.run import Wanted, run

SAID = " 0·a 1·b 2·c"
ALL = frozenset(needs for _, needs in BEHAVIOURS.values())
REST = State({"penstock_open_streams": 0.0, "penstock_concurrent": 0.0}, 3, 2, {"Edge.handle": 1, "_serve": 1}, 15, 70_000_000)


def complete(name: str = "one", **fields: Any) -> Heard:
    heard = Heard(name, "q", status=200, text=SAID, finishes=["stop"], natives=["stop"], done=True, end="clean")
    return replace(heard, **fields)


def cut(**fields: Any) -> Heard:
    """A stream that its provider cut, told as it should be."""
    return replace(
        complete("two", text=" 0·a", finishes=[], natives=[], done=False, error="upstream_cut", question="cut"), **fields
    )


def line(name: str, outcome: str = "completed", **fields: Any) -> dict[str, Any]:
    return {"id": name, "outcome": outcome, "attempts": 1, **fields}


def evidence(**fields: Any) -> Evidence:
    """A whole answer, a cut one, one from the cache, and a stream that was open at SIGTERM."""
    ended = replace(cut(), asked="four", question="endless", error="draining")
    return replace(
        Evidence(
            lambda question: SAID,
            [complete(), cut(), complete("three"), ended],
            [Called("q", 0, 12, True, False), Called("cut", 0, 4, False, False), Called("endless", 0, 8, False, False)],
            [line("one"), line("two", "upstream_cut"), line("three", cache="hit"), line("four", "draining")],
            3, REST, REST, drained=[ended],
        ),
        **fields,
    )  # fmt: skip


def with_heard(*more: Heard) -> Evidence:
    seen = evidence()
    lines = [line(one.asked) for one in more]
    heard = [one for one in seen.heard if one.asked not in {changed.asked for changed in more}]
    return replace(
        seen, heard=[*heard, *more], lines=[one for one in seen.lines if one["id"] not in {m.asked for m in more}] + lines
    )


def after(**fields: Any) -> Evidence:
    return evidence(after=replace(REST, **fields))


GOOD = evidence()
LIES: dict[str, list[tuple[str, Evidence]]] = {
    "every request has exactly one outcome": [
        ("two outcomes", replace(GOOD, lines=[*GOOD.lines, line("one", "client_gone")], lines_at_rest=3)),
        ("a missing outcome", replace(GOOD, lines=GOOD.lines[1:])),
        ("an empty outcome", replace(GOOD, lines=[{**GOOD.lines[0], "outcome": ""}, *GOOD.lines[1:]])),
        ("a call for nobody", replace(GOOD, called=[*GOOD.called, Called("other")])),
        ("metrics that count another number", after(requests=2)),
    ],
    "each text is the beginning of what its provider said": [
        ("another text", with_heard(complete(text=" 0·a 1·x"))),
        ("a piece left out", with_heard(complete(text=" 0·a 2·c"))),
        ("a piece twice", with_heard(complete(text=" 0·a 1·b 1·b 2·c"))),
        ("more than was said", with_heard(cut(text=SAID))),
        ("an answer nobody gave", replace(GOOD, called=GOOD.called[1:])),
    ],
    "complete texts are equal": [
        ("half a text as a whole stream", with_heard(complete(text=" 0·a"))),
        ("half a text as a whole body", with_heard(complete(text=" 0·a", done=False, streamed=False))),
    ],
    "no [DONE] without an end": [
        ("[DONE] after a cut", with_heard(cut(done=True, error=None, finishes=["stop"], natives=["stop"]))),
        ("[DONE] and an error", with_heard(cut(done=True))),
        ("no finish reason", with_heard(complete(finishes=[]))),
        ("two finish reasons", with_heard(complete(finishes=["stop", "stop"]))),
        ("neither [DONE] nor an error", with_heard(cut(error=None))),
    ],
    "every answer ends as HTTP and SSE want it": [
        ("a body cut short", with_heard(cut(end="cut"))),
        ("an answer that never ends", with_heard(complete(end="open"))),
        ("no answer", with_heard(Heard("five", "q"))),
        ("a fault of framing", with_heard(complete(faults=["no field of an event"]))),
    ],
    "who reads on after cuts has the whole": [
        ("it came back, and never had its end", with_heard(complete(done=False, finishes=[], must_finish=True, end="left"))),
    ],
    "calls of the provider <= attempts": [
        ("one call more", replace(GOOD, called=[*GOOD.called, Called("q", 1)])),
        ("a call for a hit", replace(GOOD, lines=[line("one", cache="joined"), *GOOD.lines[1:]])),
    ],
    "no call, stream, slot or connection is left": [
        ("a slot", after(gauges={"penstock_concurrent": 1.0})),
        ("a call at the provider", evidence(unfinished=1)),
    ],
    "no open file is left": [("a socket", after(files=16))],
    "no task is left": [("a task", after(names={"Edge.handle": 1, "_serve": 1, "Resume._answered": 1}))],
    "memory is back within 10 %": [("11 % more", after(resident=77_700_000))],
    "the config was reloaded": [("one file was not taken", evidence(reloads=(4, 3)))],
    "open streams end as draining, exit 0": [
        ("another exit status", evidence(exit=1)),
        ("killed", evidence(exit=-9)),
        ("a stream that looks complete", evidence(drained=[complete()])),
        ("a stream that is cut", evidence(drained=[cut(error="draining", end="cut")])),
    ],
    "nothing unexpected was logged": [
        ("an error of the gateway", evidence(words=["Traceback"])),
        ("a mistake of the run", evidence(faults=["read 7: KeyError"])),
    ],
}  # fmt: skip


def test_where_all_is_well_no_invariant_objects() -> None:
    assert {name: faults for name, faults in judged(evidence()).items() if faults} == {}


def test_each_invariant_has_a_lie_planted_for_it() -> None:
    assert set(LIES) == set(INVARIANTS)


@pytest.mark.parametrize(("name", "lie", "seen"), [(name, *one) for name, lies in LIES.items() for one in lies])
def test_a_planted_lie_is_found(name: str, lie: str, seen: Evidence) -> None:
    assert judged(seen)[name], lie


@pytest.mark.parametrize(
    "right",
    [
        with_heard(complete(text=" 0·a", natives=["penstock:max_output_tokens_hard"], finishes=["length"])),
        with_heard(cut(end="left", error=None)),
        with_heard(cut(end="cut", dropped=True, error=None)),
        replace(GOOD, called=[*GOOD.called, Called("q", 1)], lines=[line("one", attempts=2), *GOOD.lines[1:]]),
        after(resident=60_000_000, files=14),
    ],
    ids=["an end that the gateway names", "a client that left", "a client that took nothing", "a retry", "less than before"],
)
def test_what_is_right_is_not_called_wrong(right: Evidence) -> None:
    assert {name: faults for name, faults in judged(right).items() if faults} == {}


def test_the_same_seed_is_the_same_plan_and_another_one_is_another() -> None:
    first, again, other = Plan(7, ALL), Plan(7, ALL), Plan(8, ALL)
    visits = [first.visit(number) for number in range(200)]
    assert visits == [again.visit(number) for number in range(200)] != [other.visit(number) for number in range(200)]
    assert {visit.behaviour for visit in visits} == set(BEHAVIOURS), "every behaviour occurs"
    questions = [first.question(visit.question) for visit in visits]
    assert questions == [again.question(visit.question) for visit in visits]


def test_what_the_gateway_does_not_have_is_in_no_plan() -> None:
    plan = Plan(7, {"smooth"})
    assert {plan.visit(number).behaviour for number in range(300)} == {
        name for name, (_, needs) in BEHAVIOURS.items() if needs in ("", "smooth")
    }


def test_a_place_in_a_text_is_found_only_where_pieces_meet() -> None:
    question = Plan(7).question("own-1")
    assert [question.position("".join(question.pieces[:n])) for n in (0, 1)] == [0, 1]
    assert question.position(question.text[:-1]) is None
    assert question.position("x" + question.text[1:]) is None


async def test_a_client_keeps_what_is_against_the_formats() -> None:
    """An event that breaks off in a body that HTTP calls whole, a line that is no field, and an event behind the end."""
    reader = asyncio.StreamReader()
    body = b'data: [DONE]\n\nodd\n\ndata: {"error": {"code": "x"}}\n\ndata: {"ch'
    reader.feed_data(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    answer, heard = Answer(reader), Heard("one", "q")
    await answer.begin()
    await listen(heard, answer)
    assert (heard.end, heard.done, heard.error, len(heard.faults)) == ("clean", True, "x", 3)


def test_text_is_put_together_in_the_order_of_its_events() -> None:
    heard = Heard("one", "q")
    for text in ("a", "b"):
        take(heard, Event("", f'{{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": null}}]}}'))
    assert heard.text == "ab"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the run reads /proc")
async def test_a_short_run_keeps_all_invariants(tmp_path: Path) -> None:
    """Five seconds of everything at once, against the real command."""
    found = await run(Wanted(seed=20, seconds=5.0, clients=60), tmp_path)
    assert {name: faults for name, faults in judged(found.evidence).items() if faults} == {}
    assert found.left_out == [], "what is there takes part"
    assert found.counts["outcome completed"] > 100
    assert all(found.counts[f"outcome {name}"] for name in ("upstream_cut", "client_gone", "timeout_idle", "draining"))
    assert all(found.counts[f"asked with {name}"] for name in ("passages", "a history"))
