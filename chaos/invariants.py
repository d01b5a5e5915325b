"""What must hold, whatever happened: pure functions from the evidence to what is wrong with it.

The one rule: each can fail; tests/test_chaos.py plants a lie for every one of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from chaos.records import Evidence, Heard, Json

Faults = list[str]
GROWTH = 1.10
# Attempts that a call can make at most: two targets, each asked again once. And how often a stream is gone on with.
MOST, CONTINUES = 4, 2
# X-Cache of answers that took no call of their own.
NO_CALL = ("hit", "joined")


def one_outcome(seen: Evidence) -> Faults:
    """Each request that was answered, or asked of the provider, has exactly one line, with one outcome; the metrics agree."""
    lines = Counter(line["id"] for line in seen.lines)
    faults = [f"{name} ended {count} times" for name, count in lines.items() if count > 1]
    faults += [f"{line['id']} has no outcome" for line in seen.lines if not line.get("outcome")]
    faults += [
        f"{one.asked} ({one.behaviour}) was answered and has no outcome"
        for one in seen.heard
        if one.status and one.asked not in lines
    ]
    questions = {one.question for one in seen.heard if one.asked in lines}
    faults += sorted(
        {f"{call.question} was asked of the provider for nobody" for call in seen.called if call.question not in questions}
    )
    if seen.lines_at_rest != seen.after.requests:
        faults.append(f"{seen.lines_at_rest} lines, but penstock_requests_total is {seen.after.requests}")
    return faults


def said_before(seen: Evidence) -> Faults:
    """What a client has is the beginning of what the provider said."""
    said: dict[str, int] = defaultdict(int)
    for call in seen.called:
        said[call.question] = max(said[call.question], call.said)
    faults = []
    for one in seen.heard:
        text = seen.text(one.question)
        if not text.startswith(one.text):
            at = next((n for n, (a, b) in enumerate(zip(one.text, text, strict=False)) if a != b), len(text))
            near = slice(max(0, at - 20), at + 40)
            faults.append(f"{one.asked} ({one.behaviour}) differs at {at}: {one.text[near]!r}, said was {text[near]!r}")
        elif len(one.text) > said[one.question]:
            faults.append(f"{one.asked} has {len(one.text)} characters, the provider said {said[one.question]}")
    return faults


def complete_is_equal(seen: Evidence) -> Faults:
    """What says that it is complete is all of it."""
    return [
        f"{one.asked} ({one.behaviour}) says it is complete with {len(one.text)} of {len(seen.text(one.question))} characters"
        for one in seen.heard
        if one.completed and not one.truncated and one.text != seen.text(one.question)
    ]


def no_false_end(seen: Evidence) -> Faults:
    """[DONE] stands behind one finish reason and an end of the provider's own, or one that the gateway made and names; what is
    no such end is an error, and a body that HTTP calls complete has either."""
    ended = {call.question for call in seen.called if call.ended}
    faults = []
    for one in seen.heard:
        if one.done and one.error is not None:
            faults.append(f"{one.asked}: [DONE] and an error")
        if one.done and len(one.finishes) != 1:
            faults.append(f"{one.asked}: [DONE] after finish reasons {one.finishes}")
        if one.completed and not one.truncated and one.question not in ended:
            faults.append(f"{one.asked}: an end that the provider of {one.question} never said")
        if one.streamed and one.status == 200 and one.end == "clean" and not one.done and one.error is None:
            faults.append(f"{one.asked}: neither [DONE] nor an error at its end")
    return faults


def proper_ends(seen: Evidence) -> Faults:
    """Every answer comes to an end, as HTTP and SSE want it, unless its client left, or took nothing."""
    faults = [
        f"{one.asked} ({one.behaviour}, {one.question}) ended as {one.end}, status {one.status}"
        for one in seen.heard
        if one.end != "clean" and not one.dropped and one.end != "left"
    ]
    return faults + [f"{one.asked}: {fault}" for one in seen.heard for fault in one.faults]


def whole_after_cuts(seen: Evidence) -> Faults:
    """Who comes back until it has the end has an end: all of it, or the provider's error."""
    return [
        f"{one.asked} read on over {one.lines} lines and has no end"
        for one in seen.heard
        if one.must_finish and not one.done and one.error is None and one.status < 400
    ]


def calls_are_bounded(seen: Evidence) -> Faults:
    """The provider is called at most once per attempt that the lines tell of, and not for what was shared or stored."""
    asked = {one.asked: one for one in seen.heard}
    allowed: Counter[str] = Counter()
    for line in seen.lines:
        if (one := asked.get(line["id"])) is not None:
            allowed[one.question] += allowance(line, one)
    calls = Counter(call.question for call in seen.called)
    return [
        f"{question} was called {count} times, its requests made at most {allowed[question]} attempts"
        for question, count in calls.items()
        if count > allowed[question]
    ]


def allowance(line: Json, one: Heard) -> int:
    """Calls that a request may have made, by its line. Who left before its answer has no count in it."""
    if line.get("cache") in NO_CALL:
        return 0
    further = MOST * CONTINUES if one.behaviour == "continue" else 0
    return int(line.get("attempts", MOST)) + further


def nothing_open(seen: Evidence) -> Faults:
    """Nothing is left open: no call at the provider, no stream, call, slot, flight or byte in the gateway."""
    faults = [f"{name} is {value:g}" for name, value in seen.after.gauges.items() if value]
    return faults + ([f"{seen.unfinished} calls are still open at the provider"] if seen.unfinished else [])


def no_file_left(seen: Evidence) -> Faults:
    """As many open files as before."""
    return [f"{seen.before.files} files were open, {seen.after.files} are"] if seen.after.files > seen.before.files else []


def no_task_left(seen: Evidence) -> Faults:
    """No more tasks than before, of no kind."""
    before = seen.before.names
    more = {name: count - before.get(name, 0) for name, count in seen.after.names.items() if count > before.get(name, 0)}
    return [f"{count} more of {name}" for name, count in more.items()]


def memory_is_back(seen: Evidence) -> Faults:
    """Resident memory at rest is within 10 % of what it was after the warm-up."""
    before, after = seen.before.resident, seen.after.resident
    return [f"{before / 1e6:.1f} MB became {after / 1e6:.1f} MB"] if after > before * GROWTH else []


def reloaded(seen: Evidence) -> Faults:
    """Each good file was taken, the broken one was not."""
    if seen.reloads is None or seen.reloads[0] == seen.reloads[1]:
        return []
    return [f"the config's generation is {seen.reloads[1]} instead of {seen.reloads[0]}"]


def drained(seen: Evidence) -> Faults:
    """What was open at SIGTERM and could not finish ended as draining, with an error chunk; then the process ended, with 0."""
    faults = [f"exit status {seen.exit}"] if seen.exit != 0 else []
    return faults + [
        f"{one.asked} ended as {one.end} with {'[DONE]' if one.done else one.error} instead of `draining`"
        for one in seen.drained
        if one.error != "draining" or one.end != "clean" or one.done
    ]


def nothing_unexpected(seen: Evidence) -> Faults:
    """The gateway logged no error, and the run made no mistake of its own."""
    return [*seen.words, *seen.faults]


INVARIANTS: Mapping[str, Callable[[Evidence], Faults]] = {
    "every request has exactly one outcome": one_outcome,
    "each text is the beginning of what its provider said": said_before,
    "complete texts are equal": complete_is_equal,
    "no [DONE] without an end": no_false_end,
    "every answer ends as HTTP and SSE want it": proper_ends,
    "who reads on after cuts has the whole": whole_after_cuts,
    "calls of the provider <= attempts": calls_are_bounded,
    "no call, stream, slot or connection is left": nothing_open,
    "no open file is left": no_file_left,
    "no task is left": no_task_left,
    "memory is back within 10 %": memory_is_back,
    "the config was reloaded": reloaded,
    "open streams end as draining, exit 0": drained,
    "nothing unexpected was logged": nothing_unexpected,
}


def judged(seen: Evidence) -> dict[str, Faults]:
    """What is wrong, by invariant."""
    return {name: check(seen) for name, check in INVARIANTS.items()}
