"""One exchange on its way to being a remembered turn: what was new in the request, and the answer when it has ended.

Strategy: the reply's batches pass a recorder; how the reply ended, as its trailer says, settles what becomes of the turn.
The one rule: what the client did not get whole is remembered only where the operator says so, marked as partial, and never with a
tool call that may be unfinished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from middleware.memory.messages import REASONING, Keeping
from middleware.memory.recorder import Recorder
from proxy.errors import Outcome
from proxy.estimate import estimated_input
from proxy.store import Turn

Json = dict[str, Any]
Lost = Literal["broken", "filtered", "too_large"]

# The client has a reply with an end; that of a bound is `length`, as the model's own limit is.
ENDED = frozenset({Outcome.COMPLETED, Outcome.CONTINUED, Outcome.TRUNCATED})


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator decided. partial: broken replies are remembered. most: bytes of a turn's messages as JSON."""

    keeping: Keeping
    partial: bool
    most: int

    def recorder(self, *, whole: bool) -> Recorder:
        return Recorder(whole=whole, most=self.most, without=() if self.keeping.reasoning else REASONING[:2])


def turn_of(
    policy: Policy, new: Sequence[Json], recorder: Recorder, outcome: Outcome, created: float, request: str, model: str
) -> Turn | Lost:
    """The turn, or why there is none."""
    partial, choice = outcome not in ENDED, recorder.choice()
    if outcome is Outcome.BLOCKED or (choice is not None and choice.get("finish_reason") == "content_filter"):
        return "filtered"
    if partial and not policy.partial:
        return "broken"
    if recorder.too_large:
        return "too_large"
    if choice is None or (partial and _breaks_off(choice["message"])):
        return "broken"
    messages = [*new, policy.keeping.of_answer(choice["message"])]
    if len(orjson.dumps(messages)) > policy.most:
        return "too_large"
    return Turn(messages, estimated_input({"messages": messages}), created, request, model, partial)


def _breaks_off(message: Json) -> bool:
    """Nothing that could be gone on from: a call that may be unfinished, or no text at all."""
    return bool(message.get("tool_calls") or message.get("function_call")) or not message.get("content")
