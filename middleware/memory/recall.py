"""Which turns are remembered in a request, and how they are fitted to it.

Strategy: pure functions. `recalled` takes turns from the newest back, within a budget; turns that a tool call and its result tie
together are one piece of it, taken whole or not at all. `paired` then drops calls that nobody answered and results that nobody
called for, on which providers refuse the whole request.
The one rule: what is recalled is the end of the history, in its order, within the budget, and never begins with a result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from middleware.memory.messages import OLDER, RESULTS, answered, calls_of, text_of
from proxy.store import Turn

Json = dict[str, Any]
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Budget:
    """How many turns, and how many tokens of them (about), a request may be given."""

    turns: int
    tokens: int


def recalled(turns: Sequence[Turn], budget: Budget) -> Sequence[Turn]:
    """The newest turns that fit, the oldest of them first. turns: likewise ordered."""
    start, tokens = len(turns), 0
    for first in reversed(_starts(turns)):
        tokens += sum(turn.tokens for turn in turns[first:start])
        if tokens > budget.tokens or len(turns) - first > budget.turns:
            break
        start = first
    return turns[start:]


def _starts(turns: Sequence[Turn]) -> list[int]:
    """Where a piece may begin: with a turn in which the user said something, and that answers no call of the one before it."""
    return [number for number, turn in enumerate(turns) if turn.messages[0]["role"] not in RESULTS and _asks(turn)]


def _asks(turn: Turn) -> bool:
    return any(message["role"] == "user" for message in turn.messages)


def paired(history: Sequence[Json], following: Sequence[Json]) -> list[Json]:
    """The history's messages as they can stand before `following`: each tool call answered right behind it, each result called
    for, and no answer that says nothing."""
    found: list[Json] = []
    called = NONE
    for at, message in enumerate(history):
        if message["role"] in RESULTS:
            if (id := answered(message)) in called:
                found.append(message)
                called -= {id}
            continue
        called = NONE
        if message["role"] == "assistant":
            if ids := calls_of(message):
                called = frozenset(ids).intersection(map(answered, _results(history, at + 1, following)))
                message = _calling(message, called)
            if not (called or text_of(message) or message.get("refusal") or message.get("provider_blocks")):
                continue
        found.append(message)
    return found


def _results(history: Sequence[Json], at: int, following: Sequence[Json]) -> Iterator[Json]:
    """The results that stand right there."""
    here = list(takewhile(_is_result, history[at:]))
    yield from here
    if at + len(here) == len(history):
        yield from takewhile(_is_result, following)


def _is_result(message: Json) -> bool:
    return message["role"] in RESULTS


def _calling(message: Json, ids: Collection[str]) -> Json:
    """The message with these calls alone."""
    if len(calls_of(message)) == len(ids):
        return message
    kept = {name: value for name, value in message.items() if name not in ("tool_calls", "function_call")}
    if any(not found.startswith(OLDER) for found in ids):
        kept["tool_calls"] = [call for call in message["tool_calls"] if isinstance(call, dict) and str(call.get("id")) in ids]
    if any(found.startswith(OLDER) for found in ids):
        kept["function_call"] = message["function_call"]
    return kept
