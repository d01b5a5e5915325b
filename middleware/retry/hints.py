"""When a provider wants to be asked again, read off its response headers.

Strategy: pure functions. One reader for every spelling of a wait or a moment; the caller says what time it is.
The one rule: what cannot be read is no hint, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

from proxy.errors import GatewayError


def hinted_seconds(error: GatewayError, now: float) -> float:
    """How long the provider asks to be left alone; 0 where it says nothing. now: Unix time.

    `retry-after-ms`, `retry-after` (RFC 9110, 10.2.3), and on a 429 the resets of the limits that are used up.
    """
    headers = {name.lower(): value for name, value in error.headers.items()}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if (found := seconds_until(headers.get(name, ""), now, unit)) is not None:
            return found
    return _resets(headers, now) if error.status == 429 else 0.0


RESET = re.compile(r"(x-ratelimit|anthropic-ratelimit)-(?:reset(-[\w-]+)?|([\w-]+)-reset)")


def _resets(headers: Mapping[str, str], now: float) -> float:
    """Seconds until the used-up limits are whole again; where none is said to be used up, until the first of all."""
    used_up: list[float] = []
    others: list[float] = []
    for name, value in headers.items():
        if not RESET.fullmatch(name) or (seconds := seconds_until(value, now)) is None:
            continue
        remaining = headers.get(name.replace("reset", "remaining"), "0").strip()
        (used_up if remaining in ("0", "0.0") else others).append(seconds)
    return max(used_up) if used_up else min(others, default=0.0)


NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,9})?", re.ASCII)
DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|us|µs|ns|d|h|m|s))+", re.ASCII)
PART = re.compile(r"([\d.]+)([a-zµ]+)")
UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
# Larger numbers are no waits but points in time: Unix seconds, and Unix milliseconds.
EPOCH, EPOCH_MS = 1e9, 1e12


def seconds_until(text: str, now: float, unit: float = 1.0) -> float | None:
    """`12`, `1m30s`, `6ms`, Unix time in s or ms, RFC 3339 or an HTTP date -> seconds from `now`, at least 0; None for others."""
    text = text.strip()
    if NUMBER.fullmatch(text):
        number = float(text)
        if number < EPOCH:
            return number * unit
        return max(0.0, (number / 1000 if number >= EPOCH_MS else number) - now)
    if DURATION.fullmatch(text):
        return sum(float(number) * UNITS[name] for number, name in PART.findall(text))
    moment = _moment(text)
    return None if moment is None else max(0.0, moment - now)


def _moment(text: str) -> float | None:
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = read(text)
            return moment.timestamp() if moment.tzinfo is not None else None
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None
