"""What can become of a text, and how the client is told.

The one rule: the client hears which rule it was, and where; never what was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from proxy.errors import GatewayError, Outcome

Action = Literal["block", "redact", "flag"]
Side = Literal["input", "output"]


class Finding(NamedTuple):
    """A rule found something. id: the rule's; on: where."""

    id: str
    action: Action
    on: Side

    def shown(self) -> dict[str, str]:
        return {"id": self.id, "action": self.action, "on": self.on}


class ContentFiltered(GatewayError):
    """A guardrail blocked the request, or a reply of which nothing had been sent: a 400 that names the rule."""

    status = 400
    type = "content_filter"
    code = "content_filter"
    outcome = Outcome.BLOCKED

    def __init__(self, finding: Finding, param: str | None = None) -> None:
        where = f"{param}: " if param else ""
        what = "the request" if finding.on == "input" else "the reply"
        super().__init__(f"{where}The guardrail '{finding.id}' does not let {what} through.", param=param)
        self.finding = finding


# In place of a provider's error that a rule blocks.
UNSAID = "The provider's error is not let through by a guardrail."


def worded(error: GatewayError, message: str) -> GatewayError:
    """The same error with another message, and none of the words that it had."""
    twin = error.again()
    twin.message, twin.args = message, (message,)
    return twin


def shown(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Each once, in the order in which they were found."""
    return [finding.shown() for finding in dict.fromkeys(findings)]


def header(findings: Iterable[Finding]) -> str:
    """`email;action=redact;on=input, denied;action=flag;on=input`"""
    return ", ".join(f"{finding.id};action={finding.action};on={finding.on}" for finding in dict.fromkeys(findings))
