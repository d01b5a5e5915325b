"""Which of Gemini's two ways to say how much a model shall think: a budget of tokens (2.5) or a level (3 and later).

Strategy: the model's name says its generation; the numbers are those that Google's own OpenAI-compatible endpoint uses.
The one rule: thoughts are asked for wherever there can be any, because a client that sets an effort wants to see them.

https://ai.google.dev/gemini-api/docs/thinking, https://ai.google.dev/gemini-api/docs/openai#thinking
"""

from __future__ import annotations

import re
from typing import Any

from proxy.translation import invalid

Json = dict[str, Any]

THINKING_KEYS = frozenset({"thinkingLevel", "thinkingBudget", "thinking_level", "thinking_budget"})
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}
PRO_MINIMUM = 128  # 2.5 Pro cannot be kept from thinking; this is its smallest budget
GENERATION = re.compile(r"gemini-(\d+)(?:\.(\d+))?(?![\d])")


def generation(model: str) -> tuple[int, int]:
    """(3, 1) of `gemini-3.1-pro`; the `-latest` names stand for the third generation; (0, 0) where the name does not say."""
    found = GENERATION.search(model)
    if found:
        return int(found[1]), int(found[2] or 0)
    return (3, 0) if re.search(r"gemini-.*latest$", model) else (0, 0)


def thinking_config(model: str, effort: object) -> Json | None:
    """`thinkingConfig` for OpenAI's reasoning_effort, or None for a model that is not known to think."""
    if effort not in EFFORTS:
        invalid("reasoning_effort", f"must be one of {', '.join(EFFORTS)}")
    effort = "high" if effort in ("xhigh", "max") else str(effort)
    version = generation(model)
    if version >= (3, 0):
        return _level(model, version, effort)
    if version < (2, 5):
        return None
    budget = BUDGETS[effort]
    if budget:
        return {"includeThoughts": True, "thinkingBudget": budget}
    # With thinking off, asking for thoughts is an error.
    return {"thinkingBudget": PRO_MINIMUM if "pro" in model else 0}


def _level(model: str, version: tuple[int, int], effort: str) -> Json:
    """Thinking cannot be turned off here: `none` is the least there is. Pro knows no `minimal`, and 3.0 Pro no `medium`."""
    pro = "pro" in model
    if effort == "none":
        return {"thinkingLevel": "low" if pro else "minimal"}
    if pro and effort == "minimal":
        effort = "low"
    if pro and effort == "medium" and version == (3, 0):
        effort = "high"
    return {"includeThoughts": True, "thinkingLevel": effort}
