"""What errors mean to a target: who is to blame, and for how long it wants to be left alone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from middleware.fallback.verdict import PATIENCE, CircuitOpen, moves_on, reason, retry_after, speaks_against
from proxy.errors import (
    Draining,
    GatewayError,
    Malformed,
    Refused,
    Unconfigured,
    UpstreamCut,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
AUTH = UpstreamError("no", status=502, code="upstream_auth")


@pytest.mark.parametrize(
    ("error", "further", "against"),
    [
        (UpstreamUnreachable("x"), True, True),
        (UpstreamCut("x"), True, True),
        (Malformed("x"), True, True),
        (UpstreamTimeout("connect", 1), True, True),
        (UpstreamTimeout("call", 1), True, True),
        (UpstreamTimeout("first_chunk", 1), True, True),
        (UpstreamTimeout("total", 1), False, None),
        (UpstreamError("x", status=408), True, True),
        (UpstreamError("x", status=429), True, True),
        (UpstreamError("x", status=500), True, True),
        (AUTH, True, True),
        (Unconfigured("x"), True, None),
        (CircuitOpen(1), True, None),
        (Draining("x"), False, None),
        (Refused("x"), False, None),
        (GatewayError("bug"), False, None),
        *((UpstreamError("x", status=status), False, None) for status in (400, 401, 402, 403, 404, 409, 413, 422, 425, 451)),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.status}" if isinstance(value, GatewayError) else str(value),
)
def test_who_is_to_blame(error: GatewayError, further: bool, against: bool | None) -> None:
    """further: may the next target be asked. against: does it count against this one."""
    assert (moves_on(error), speaks_against(error, 60.0)) == (further, against)


def test_a_429_on_the_callers_own_key_is_the_callers() -> None:
    assert speaks_against(UpstreamError("x", status=429), 1.0, callers_key=True) is None
    assert speaks_against(UpstreamError("x", status=500), 1.0, callers_key=True) is True


def test_a_limit_that_the_client_set_counts_only_if_it_was_patient() -> None:
    late = UpstreamTimeout("call", 1)
    assert speaks_against(late, PATIENCE - 1, impatient=True) is None
    assert speaks_against(late, PATIENCE, impatient=True) is True
    assert speaks_against(UpstreamCut("x"), 0.1, impatient=True) is True


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (503, {"retry-after": "1.5"}, 1.5),
        (429, {"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        (429, {"retry-after": "Thu, 01 Jan 2026 12:01:30 GMT"}, 90.0),
        (429, {"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        (429, {"retry-after": "soon"}, None),
        (429, {"retry-after": "-3"}, None),
        (429, {}, None),
        (500, {"retry-after": "7"}, None),
    ],
)
def test_for_how_long_a_target_is_left_alone(status: int, headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(UpstreamError("x", status=status, headers=headers), NOW) == seconds


def test_reasons_are_few_whatever_words_a_provider_has() -> None:
    errors = (UpstreamError("x", code=f"code-{n}", status=500 + n % 30) for n in range(100))
    assert {reason(error) for error in errors} == {"upstream_error"}
    assert [reason(error) for error in (AUTH, UpstreamError("x", status=429), CircuitOpen(1), Unconfigured("x"))] == [
        "upstream_auth",
        "rate_limited",
        "circuit_open",
        "not_configured",
    ]
