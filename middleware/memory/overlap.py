"""What a request brings of the history itself: a client that keeps its own list of messages names a session as well, and an agent
that runs tools sends back what it has just been answered.

Strategy: whole remembered turns, question to answer, are looked for among the request's messages, wherever they begin; the
longest run of them is what the client has itself. Messages are the same if they say the same (`likeness`).
The one rule: nothing is ever said twice. What the client sends stays as it is; only older turns are put before it, and only what
stands behind the run is new.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from middleware.memory.messages import likeness
from proxy.store import Turn

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Overlap:
    """older: how many turns, from the oldest, stand before all that the client sent. sent: turns that it sent itself. new: the
    place of the first message that is new."""

    older: int
    sent: int
    new: int


def overlap(messages: Sequence[Json], turns: Sequence[Turn]) -> Overlap:
    """messages: without instructions, as they would be kept. turns: the oldest first."""
    if not any(message["role"] == "assistant" for message in messages):
        return Overlap(len(turns), 0, 0)
    said = [likeness(message) for message in messages]
    known = [[likeness(message) for message in turn.messages] for turn in turns]
    best = (0, 0, 0)  # turns, number of the first one, place behind the last one
    older = len(turns)
    for at, first in enumerate(said):
        for number, turn in enumerate(known):
            if turn[:1] != [first]:
                continue
            run = _run(said, at, known, number)
            if run[0] and run[:2] >= best[:2]:
                best = run
                # Before messages that nobody remembers nothing can be put: it may be older than what is.
                older = number if at == 0 else 0
    return Overlap(older, best[0], best[2])


def _run(said: Sequence[Hashable], at: int, known: Sequence[Sequence[Hashable]], first: int) -> tuple[int, int, int]:
    """How many turns from `first` on stand at this place, and behind it one after the other."""
    count = 0
    for turn in known[first:]:
        if list(said[at : at + len(turn)]) != turn:
            break
        at += len(turn)
        count += 1
    return count, first, at
