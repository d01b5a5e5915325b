"""What an error means: whether another target may fare better, and whether it speaks against the one that was asked.

Strategy: pure functions from an error to a decision, by class and status; only context-window and content-filter errors, which
providers report as a plain 400, are told by their words.
The one rule: only an upstream's fault counts against it; what the client sent, or did, never does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from proxy.errors import SUCCESSES, GatewayError, Malformed, Outcome, Unconfigured, UpstreamCut, UpstreamError, UpstreamTimeout

Cause = Literal["context_window", "content_filter"]

UPSTREAM = (UpstreamError, UpstreamCut, Malformed, UpstreamTimeout)
FAILURES = frozenset({
    Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_CUT, Outcome.MALFORMED,
    Outcome.TIMEOUT_CONNECT, Outcome.TIMEOUT_CALL, Outcome.TIMEOUT_FIRST_CHUNK, Outcome.TIMEOUT_IDLE,
})  # fmt: skip
# A client that sets a limit of its own below this says more about itself than about the target. Seconds.
PATIENCE = 5.0

# OpenAI and those like it give codes; Anthropic, Gemini, Cohere and most servers of open models only words.
WORDS: dict[Cause, re.Pattern[str]] = {
    "context_window": re.compile(
        r"context_length_exceeded|context_window_exceeded|maximum context length|context (window|length|size)|prompt is too long"
        r"|input is too long|too many (input )?tokens|exceeds the maximum number of (input )?tokens"
        r"|exceeds? .{0,40}context|reduce the length of the (messages|prompt|input)",
        re.IGNORECASE,
    ),
    "content_filter": re.compile(
        r"content_filter|content_policy|responsibleaipolicy|content management policy|content filter|content policy"
        r"|prohibited_content|usage polic(y|ies)|moderation|data_inspection_failed|flagged",
        re.IGNORECASE,
    ),
}


class CircuitOpen(GatewayError):
    """A target that is not asked now: its circuit is open, or it asked to be left alone."""

    status = 503
    type = "service_unavailable"
    code = "circuit_open"
    outcome = Outcome.REFUSED

    def __init__(self, wait: float, *, count: int = 1) -> None:
        which = "The target of this model is" if count == 1 else f"All {count} targets of this model are"
        seconds = max(1, math.ceil(wait))
        super().__init__(f"{which} failing and will not be asked for another {seconds} s.", headers={"Retry-After": str(seconds)})
        self.wait = wait


def moves_on(error: GatewayError, on: Collection[Cause] = ()) -> bool:
    """May the next target be asked? on: the causes of a 4xx for which the operator wants that too."""
    if isinstance(error, CircuitOpen | Unconfigured):
        return True
    return faulty(error) or (isinstance(error, UpstreamError) and any(WORDS[cause].search(_said(error)) for cause in on))


def faulty(error: GatewayError) -> bool:
    """Is this the upstream's own fault: no connection, silence, a broken reply, 408, 429, 5xx, or 401/403 on our key (a 502)?"""
    if not isinstance(error, UPSTREAM) or error.outcome is Outcome.TIMEOUT_TOTAL:
        return False
    return error.status in (408, 429) or error.status >= 500


def rests(error: GatewayError) -> bool:
    """Is it about the key rather than the target?"""
    return isinstance(error, UpstreamError) and (error.status == 429 or error.code == "upstream_auth")


def speaks_against(error: GatewayError, seconds: float, *, callers_key: bool = False, impatient: bool = False) -> bool | None:
    """Failure, or None: it says nothing about the target. seconds: how long it took. callers_key: the caller's own key was
    used, so a 429 is the caller's. impatient: the client set a time limit itself."""
    if not faulty(error) or (callers_key and error.status == 429):
        return None
    if impatient and isinstance(error, UpstreamTimeout) and seconds < PATIENCE:
        return None
    return True


def ended(outcome: Outcome | None, error: GatewayError | None) -> bool | None:
    """The same for a reply that had begun: completed is a success, an upstream's failure is one, all else says nothing."""
    if outcome in SUCCESSES:
        return False
    if outcome not in FAILURES:
        return None
    return True if error is None or faulty(error) else None


def reason(error: GatewayError) -> str:
    """Why, in one of few words, for a metric's label: providers' own codes are without number."""
    if isinstance(error, CircuitOpen):
        return "circuit_open"
    if isinstance(error, Unconfigured):
        return "not_configured"
    if error.code == "upstream_auth":
        return "upstream_auth"
    return "rate_limited" if error.status == 429 else error.outcome.value


def retry_after(error: GatewayError, now: datetime | None = None) -> float | None:
    """The seconds for which a 429 or 503 wants no further request; None where it says nothing (RFC 9110, 10.2.3)."""
    if error.status not in (429, 503) or not isinstance(error, UpstreamError):
        return None
    headers = {name.lower(): value.strip() for name, value in error.headers.items()}
    if (found := _number(headers.get("retry-after-ms"))) is not None:
        return found / 1000
    text = headers.get("retry-after")
    return found if (found := _number(text)) is not None else _until(text, now or datetime.now(UTC))


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII) else None


def _until(text: str | None, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(text or "")
        return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _said(error: GatewayError) -> str:
    return f"{error.code} {error.type} {error.message}"
