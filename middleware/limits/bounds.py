"""What one request may bring, and how much it may get.

Strategy: pure functions over the request's JSON.
The one rule: a value of a shape that nobody expects counts as nothing; what the provider makes of it is the provider's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from proxy.estimate import INPUTS
from proxy.own_fields import Field

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that one request may bring; input_bytes: of its messages (or prompt, or input) as JSON."""

    messages: int
    tools: int
    choices: int
    input_bytes: int | None = None

    def check(self, request: Json) -> None:
        """Raises Refused with the path of what is too large."""
        for name, most in (("messages", self.messages), ("tools", self.tools), ("functions", self.tools)):
            value = request.get(name)
            if isinstance(value, list) and len(value) > most:
                Field(value, name).refuse(f"must be a list of at most {most} entries")
        choices = request.get("n")
        if isinstance(choices, int) and choices > self.choices:
            Field(choices, "n").refuse(f"must be a whole number from 1 to {self.choices}")
        if self.input_bytes is not None:
            self._check_bytes(request, self.input_bytes)

    def _check_bytes(self, request: Json, most: int) -> None:
        for name in INPUTS:
            if request.get(name) is not None and len(orjson.dumps(request[name])) > most:
                Field(None, name).refuse(f"must be at most {most} bytes of JSON")


def wanted_output(request: Json) -> int:
    """Tokens that may come out at most, where the request says so; 0 where it does not."""
    most = request.get("max_completion_tokens", request.get("max_tokens"))
    if type(most) is not int or most < 0:
        return 0
    choices = request.get("n")
    return most * (choices if type(choices) is int and choices > 0 else 1)
