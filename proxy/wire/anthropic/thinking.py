"""How long an answer may be, how much thought goes into it, and how it is sampled: three things that Anthropic ties together.

Strategy: read the model's generation off its name, since each takes its own form: a budget of tokens up to 4.5, `adaptive` with
an effort from 4.6 on (https://docs.anthropic.com/en/docs/build-with-claude/adaptive-thinking). An unknown name gets a budget.
The one rule: a bound that the client set is kept; thinking gives way to it, and what gives way is listed as dropped.
"""

from __future__ import annotations

import re
from typing import Any

from proxy.translation import Fields, invalid

Json = dict[str, Any]

# Tokens of thought per reasoning_effort; 1024 is Anthropic's minimum.
BUDGETS = {"low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768, "max": 32768}
LEAST_BUDGET = 1024
NO_EFFORT = ("none", "minimal")

ADAPTIVE_SINCE = (4, 6)
XHIGH_SINCE = (4, 7)
NO_SAMPLING_SINCE = (4, 7)
THINKS_UNASKED_SINCE = (5, 0)
ONE_OF_TEMPERATURE_AND_TOP_P_SINCE = (4, 1)

GENERATION = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")


def generation(model: str) -> tuple[int, int]:
    """(4, 5) for claude-sonnet-4-5-20250929, (3, 7) for claude-3-7-sonnet-latest, (0, 0) for a name that does not tell."""
    found = GENERATION.search(model)
    if found:
        return int(found[1]), int(found[2] or 0)
    return THINKS_UNASKED_SINCE if "claude-mythos" in model else (0, 0)


def limit_and_thinking(fields: Fields, body: Json) -> None:
    """`max_tokens`, `thinking` and `output_config.effort`.

    `max_tokens` bounds thought and answer together; where it is the row's default, it grows by the budget for thought.
    """
    legacy, limit = fields.take("max_tokens"), fields.take("max_completion_tokens")
    limit = legacy if limit is None else limit
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        invalid("max_tokens", "must be a whole number of at least 1")
    thinking, effort = fields.take("thinking"), _effort(fields)
    if thinking is not None:
        body["thinking"] = thinking
        budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
        if effort is not None:
            fields.drop("reasoning_effort")
    else:
        budget = _from_effort(fields, body, effort, limit)
    reserve = budget if isinstance(budget, int) else 0
    body["max_tokens"] = fields.target.provider.default_max_tokens + reserve if limit is None else limit


def _effort(fields: Fields) -> str | None:
    effort = fields.take("reasoning_effort")
    if effort is not None and effort not in BUDGETS and effort not in NO_EFFORT:
        invalid("reasoning_effort", f"must be one of {', '.join((*NO_EFFORT, *BUDGETS))}")
    return str(effort) if effort is not None else None


def _from_effort(fields: Fields, body: Json, effort: str | None, limit: int | None) -> int:
    """Set the model's own form of thinking for an effort; returns the tokens to set aside for it."""
    model = generation(fields.target.model)
    if effort is None:
        return 0
    if effort in NO_EFFORT:
        if model >= THINKS_UNASKED_SINCE:  # some of these refuse `disabled`; the lowest effort is taken by all
            _set_effort(body, "low")
        return 0
    if model >= ADAPTIVE_SINCE:
        return _adaptive(fields, body, effort if effort != "xhigh" or model >= XHIGH_SINCE else "high")
    budget = BUDGETS[effort] if limit is None else max(LEAST_BUDGET, min(BUDGETS[effort], limit // 2))
    if _forced(body) or _unsigned_call(body["messages"]) or (limit is not None and limit <= LEAST_BUDGET):
        fields.drop("reasoning_effort")
        return 0
    body["thinking"] = {"type": "enabled", "budget_tokens": budget}
    return budget


def _adaptive(fields: Fields, body: Json, effort: str) -> int:
    """The effort counts also without thinking. `display`: newer models leave the text of their thoughts out unless asked."""
    _set_effort(body, effort)
    if _forced(body):
        fields.drop("reasoning_effort")
        return 0
    body["thinking"] = {"type": "adaptive", "display": "summarized"}
    return BUDGETS[effort]


def _set_effort(body: Json, effort: str) -> None:
    body["output_config"] = {"effort": effort, **body.get("output_config", {})}


def _forced(body: Json) -> bool:
    """Thinking is refused where a tool call is forced
    (https://docs.anthropic.com/en/docs/build-with-claude/extended-thinking#extended-thinking-with-tool-use)."""
    return body.get("tool_choice", {}).get("type") in ("any", "tool")


def _unsigned_call(messages: list[Json]) -> bool:
    """The turn that is going on has a tool call whose thinking did not come back: with a budget, Anthropic refuses that."""
    results = messages[-1]["role"] == "user" and any(block.get("type") == "tool_result" for block in messages[-1]["content"])
    if not results or len(messages) < 2:
        return False
    first = messages[-2]["content"][0]
    return first.get("type") not in ("thinking", "redacted_thinking", "compaction", "fallback")


def sampling(fields: Fields, body: Json) -> None:
    """`temperature`, `top_p`, `top_k`, as far as the model takes them; the rest is dropped and listed.

    A temperature above 1 (OpenAI's range ends at 2) is capped, as Anthropic's own OpenAI-compatible endpoint does
    (https://docs.anthropic.com/en/api/openai-sdk), and listed.
    """
    model = generation(fields.target.model)
    asked = {name: value for name in ("temperature", "top_p", "top_k") if (value := fields.take(name)) is not None}
    for name, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            invalid(name, "must be a number")
    refused = set(asked) if model >= NO_SAMPLING_SINCE else _against_thinking(body, asked)
    if model >= ONE_OF_TEMPERATURE_AND_TOP_P_SINCE and {"temperature", "top_p"} <= asked.keys() - refused:
        refused.add("top_p")
    if asked.get("temperature", 0) > 1 and "temperature" not in refused:
        fields.drop("temperature")
        asked["temperature"] = 1
    for name in sorted(refused):
        fields.drop(name)
    body.update({name: value for name, value in asked.items() if name not in refused})


def _against_thinking(body: Json, asked: Json) -> set[str]:
    """With thinking, Anthropic takes no temperature but 1, no top_k, and top_p from 0.95 to 1."""
    thinking = body.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("type") not in ("enabled", "adaptive"):
        return set()
    fine = {"temperature": asked.get("temperature") == 1, "top_p": 0.95 <= asked.get("top_p", 0) <= 1, "top_k": False}
    return {name for name in asked if not fine[name]}
