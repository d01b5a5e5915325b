"""Cases about choices and tool calls: what belongs together stays together, in a form that SDKs can put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from proxy.conformance.client import Received
from proxy.conformance.content import STOP, also, said
from proxy.conformance.framing import one, over
from proxy.conformance.said import ROLE, Heard, chunk, heard, text, tool
from proxy.conformance.trial import Case, Variant
from proxy.conformance.verdict import Severity, how, intact

Json = dict[str, Any]


def _missing(found: Json, *path: str) -> Json:
    """A copy of the chunk whose choices (or their tool calls) have no index."""
    copy: Json = orjson.loads(orjson.dumps(found))
    for choice in copy["choices"]:
        for entry in [choice] if not path else choice["delta"].get(path[0]) or ():
            entry.pop("index", None)
    return copy


TOOL_STOP = chunk(finish="tool_calls")
ONE_CALL = [chunk(ROLE), tool(0, "", "call_a", "f"), tool(0, '{"a'), tool(0, '": "é\\"'), tool(0, '}"}'), TOOL_STOP]
TWO_CALLS = [
    chunk(ROLE), tool(0, "", "call_a", "f"), tool(0, '{"a":'), tool(0, "1}"), tool(1, "", "call_b", "g"), tool(1, '{"b":'),
    tool(1, "2}"), TOOL_STOP,
]  # fmt: skip
INTERLEAVED = [
    chunk(ROLE), tool(0, "", "call_a", "f"), tool(1, "", "call_b", "g"), tool(0, '{"a":'), tool(1, '{"b":'), tool(0, "1}"),
    tool(1, "2}"), TOOL_STOP,
]  # fmt: skip
IN_ONE = [chunk(ROLE), tool(0, '{"a":1}', "call_a", "f"), tool(1, '{"b":2}', "call_b", "g"), TOOL_STOP]


def _parsed(got: Heard) -> str | None:
    for index, call in got.choice().tools.items():
        try:
            orjson.loads(call.arguments)
        except orjson.JSONDecodeError:
            return f"arguments of tool call {index} are no JSON: {call.arguments[:60]!r}"
        if len(call.id) != 1 or len(call.name) != 1:
            return f"tool call {index} repeats its id or name: {call.id}, {call.name}; SDKs join them"
    return None


def _calls() -> Iterator[Variant]:
    for label, chunks in (("pieces", ONE_CALL), ("two calls", TWO_CALLS), ("two in turn", INTERLEAVED), ("in one", IN_ONE)):
        yield Variant(label, said(chunks), also(intact(heard(chunks)), _parsed))


def _odd_calls() -> Iterator[Variant]:
    judge = also(intact(heard(IN_ONE)), _parsed)
    bare = [_missing(found, "tool_calls") for found in IN_ONE]
    yield Variant("no index", said(bare), judge)
    zero = [*IN_ONE[:2], tool(0, '{"b":2}', "call_b", "g"), TOOL_STOP]
    yield Variant("index 0 for both", said(zero), judge)
    one_based = [chunk(ROLE), tool(1, '{"a":1}', "call_a", "f"), tool(2, '{"b":2}', "call_b", "g"), TOOL_STOP]
    yield Variant("counted from 1", said(one_based), also(judge, _from_zero))
    again = [chunk(ROLE), tool(0, "", "call_a", "f"), tool(0, '{"a":', "call_a", "f"), tool(0, "1}", "call_a", "f"), TOOL_STOP]
    once = heard([chunk(ROLE), tool(0, '{"a":1}', "call_a", "f"), TOOL_STOP])
    yield Variant("id and name in every piece", said(again), also(intact(once), _parsed))


def _from_zero(got: Heard) -> str | None:
    found = sorted(got.choice().tools)
    return None if found == list(range(len(found))) else f"tool calls numbered {found}; SDKs put them into a list"


def _odd_choices() -> Iterator[Variant]:
    plain = [chunk(ROLE), *text("Hel", "lo"), STOP]
    yield Variant("no index", said([_missing(found) for found in plain]), intact(heard(plain)))


TWO_CHOICES = [
    chunk(ROLE), chunk(ROLE, index=1), *text("a0"), *text("b0", index=1), *text("b1", index=1), *text("a1"),
    chunk(finish="length", index=1), *text("a2"), chunk(finish="stop"),
]  # fmt: skip


def _roles(got: Heard) -> str | None:
    for index, choice in got.choices.items():
        if choice.roles != ["assistant"]:
            return f"choice {index} has roles {choice.roles}"
    return None


def _ended(received: Received) -> str | None:
    """Nothing but that the stream came to its end: what becomes of two choices is another case's business."""
    return None if how(received) == "complete" else how(received)


def _role_streams() -> Iterator[Variant]:
    plain = [chunk(ROLE), *text("a", "b"), STOP]
    yield Variant("on a chunk of its own", said(plain), also(intact(heard(plain)), _roles))
    first = [chunk({"role": "assistant", "content": "a"}), *text("b"), STOP]
    yield Variant("with the first text", said(first), also(intact(heard(first)), _roles))
    two = [chunk(ROLE), chunk(ROLE, index=1), *text("a"), *text("b", index=1), chunk(finish="stop", index=1), STOP]
    yield Variant("of two choices", said(two), also(_ended, _roles))


def _odd_roles() -> Iterator[Variant]:
    plain = heard([chunk(ROLE), *text("a", "b"), STOP])
    every = [chunk({"role": "assistant", "content": part}) for part in "ab"]
    yield Variant("in every delta", said([*every, STOP]), also(intact(plain), _roles))
    yield Variant("in none", said([*text("a", "b"), STOP]), also(intact(plain), _roles))


LOSS, SHAPE = Severity.LOSS, Severity.SHAPE
CASES = (
    Case("choice-index", "a choice without index gets one", SHAPE, "SDKs file deltas by it", over(_odd_choices)),
    Case("tool-calls", "tool calls in pieces join to the same JSON; id and name come once", LOSS,
         "a wrong argument is a wrong action", over(_calls)),
    Case("tool-call-index", "missing, repeated or shifted tool-call indexes are put right", SHAPE,
         "compatible providers get them wrong, and SDKs merge two calls into one", over(_odd_calls)),
    Case("two-choices", "n=2: interleaved choices stay apart, each with its own finish", LOSS, "texts would be mixed",
         one(said(TWO_CHOICES), intact(heard(TWO_CHOICES)), n=2)),
    Case("role", "the role is told once per choice", SHAPE, "SDKs build the message on it", over(_role_streams)),
    Case("role-odd", "a role that the provider repeats or leaves out is told once", SHAPE,
         "accumulators join it to `assistantassistant`", over(_odd_roles)),
)  # fmt: skip
