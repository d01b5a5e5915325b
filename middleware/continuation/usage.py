"""What a reply used whose parts several calls gave: the sum, with each call's share beside it.

Strategy: a call that broke off was hardly ever told its usage. What it said is estimated by its bytes, and its prompt by that of
the call that completed, which had the same prompt and the text so far.
The one rule: an estimate is marked as one: `usage.penstock.calls[].estimated`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from middleware.continuation.asking import Added, estimated_tokens
from proxy.reply import Reply, Usage

Json = dict[str, Any]
FIGURES = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(frozen=True, slots=True)
class Part:
    """A call that broke. text: what it said. usage: its provider's figures, where they came. before: estimated tokens that its
    prompt had beside the first's: the text that it was asked to go on from, and the instruction."""

    target: str
    text: str
    before: int
    usage: Usage | None = None


class Account:
    """What the parts of one reply used."""

    __slots__ = ("_chars", "_parts")

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._chars = 0

    def broke(self, reply: Reply, text: str) -> None:
        """`reply` broke, and will be gone on with. text: all that was said by then."""
        self._parts.append(Part(reply.head.target, text[self._chars :], _added(reply), reply.trailer.usage))
        self._chars = len(text)

    def total(self, last: Reply) -> Usage | None:
        """As of the end of `last`; None where it gave no usage."""
        usage = last.trailer.usage
        return summed(self._parts, last.head.target, usage, _added(last)) if self._parts and usage is not None else usage


def _added(reply: Reply) -> int:
    found = reply.head.extensions.get(Added)
    return found.tokens if isinstance(found, Added) else 0


def summed(parts: Sequence[Part], target: str, usage: Usage, overhead: int) -> Usage:
    """The usage of all calls. target, usage: of the last one. overhead: estimated tokens that only its prompt had."""
    prompt = max(0, usage.get("prompt_tokens", 0) - overhead)
    calls = [{"target": part.target, **(_given(part.usage) if part.usage else _estimate(part, prompt))} for part in parts]
    calls.append({"target": target, **_given(usage)})
    figures = {name: sum(call[name] for call in calls) for name in FIGURES}
    details = [part.usage for part in parts if part.usage]
    return {**_detailed(usage, details), **figures, "penstock": {"calls": calls}}


def _given(usage: Usage) -> Json:
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _estimate(part: Part, prompt: int) -> Json:
    return {
        **_given({"prompt_tokens": prompt + part.before, "completion_tokens": estimated_tokens(part.text)}),
        "estimated": True,
    }


def _detailed(usage: Usage, others: Sequence[Usage]) -> Usage:
    """The last call's usage, with the details (cached, reasoning tokens) that the others gave."""
    found = {**usage}
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        details = [each[name] for each in (usage, *others) if isinstance(each.get(name), dict)]
        if len(details) > 1:
            names = {key for each in details for key, value in each.items() if isinstance(value, int)}
            found[name] = {**details[0], **{key: sum(each.get(key) or 0 for each in details) for key in sorted(names)}}
    return found
