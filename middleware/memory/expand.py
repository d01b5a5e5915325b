"""A request's messages with what was said before, and what of them is new to the session.

Strategy: one pure function over the request's messages and the remembered turns, put together from `overlap` and `recall`.
The one rule: instructions (system, developer) that lead the request stay in front; nothing of the client's is left out or moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from middleware.memory.messages import Keeping, leading
from middleware.memory.overlap import overlap
from middleware.memory.recall import Budget, paired, recalled
from proxy.store import Turn

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Expanded:
    """messages: to be asked with. turns: how many remembered ones were put in. sent: how many the client had sent itself.
    new: what is to be remembered of the request."""

    messages: list[Json]
    turns: int
    sent: int
    new: list[Json]


def expanded(messages: Sequence[Json], turns: Sequence[Turn], keeping: Keeping, budget: Budget) -> Expanded:
    """turns: the session's newest, the oldest of them first."""
    kept = keeping.of_client(messages)
    found = overlap(kept, turns)
    put_in = recalled(turns[: found.older], budget)
    front = leading(messages)
    own = messages[front:]
    history = paired([message for turn in put_in for message in turn.messages], own)
    return Expanded([*messages[:front], *history, *own], len(put_in), found.sent, kept[found.new :])


def unknown(messages: Sequence[Json], keeping: Keeping) -> Expanded:
    """Where nobody can say what was said before: what is new then begins with the last thing that the user said."""
    kept = keeping.of_client(messages)
    last = max((at for at, message in enumerate(kept) if message["role"] == "user"), default=0)
    return Expanded(list(messages), 0, 0, kept[last:])
