"""What one call has taken from its limits: slots, requests, tokens.

Strategy: an object per call, filled before the call goes in and emptied once, by whichever ending comes first.
The one rule: `free` may be called any number of times, from anywhere, also by the garbage collector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from middleware.limits.meters import Level, Meters
from middleware.limits.subjects import Subjects
from proxy.errors import GatewayError, Outcome

WHOSE = {"key": "this key", "identity": "this identity", "name": "this name", "client": "this address"}
# By a figure of the config: its name in headers and metrics, and its words.
RATES = {
    "requests_per_minute": ("requests", "requests per minute"),
    "tokens_per_minute": ("tokens", "tokens per minute"),
}


class Limited(GatewayError):
    """A limit of ours is reached: 429 with Retry-After. which: the limit, `key_requests`, `name_concurrent`…"""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    outcome = Outcome.LIMITED

    def __init__(self, message: str, which: str, wait: float, headers: Mapping[str, str]) -> None:
        super().__init__(message, headers={**headers, "Retry-After": str(max(1, math.ceil(wait)))})
        self.which = which


@dataclass(frozen=True, slots=True)
class Share:
    """One subject whose limits hold. kind: key | identity | name | client. rates: by figure of the config."""

    kind: str
    subject: str
    rates: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Draw:
    """One bucket that the call draws from. name: requests | tokens."""

    share: Share
    name: str
    words: str
    limit: int
    cost: int

    @property
    def key(self) -> str:
        return f"{self.share.kind}:{self.name}:{self.share.subject}"


class Lease:
    """input, estimate: tokens, estimated: of the input, and of all. reserved: the token buckets drawn from."""

    __slots__ = ("_slots", "estimate", "input", "reserved")

    def __init__(self) -> None:
        self._slots: list[tuple[Subjects, str]] = []
        self.reserved: list[Draw] = []
        self.input = 0
        self.estimate = 0

    def slot(self, share: Share, subjects: Subjects, most: int, headers: dict[str, str]) -> None:
        """Take a slot; raises Limited."""
        left = subjects.enter(share.subject, most)
        if left is not None:
            self._slots.append((subjects, share.subject))
        name = "concurrent"
        if left is None or left < int(headers.get(f"x-ratelimit-remaining-{name}", most)):
            headers |= {f"x-ratelimit-limit-{name}": str(most), f"x-ratelimit-remaining-{name}": str(left or 0)}
        if left is None:
            message = f"The limit of {most} concurrent requests of {WHOSE[share.kind]} is reached."
            raise Limited(message, f"{share.kind}_{name}", 1.0, headers)

    async def meter(self, shares: list[Share], meters: Meters, headers: dict[str, str]) -> None:
        """Draw requests and tokens from all buckets, or raise Limited with none drawn from."""
        draws = list(self._draws(shares))
        # Looking first makes it all or nothing, but where several processes share the buckets; then what was taken is put back.
        for draw in draws[:-1] if len(draws) > 1 else ():
            _check(draw, await meters.look(draw.key, draw.limit, draw.cost), headers)
        taken: list[Draw] = []
        tightest: dict[str, Level] = {}
        # The last one was not looked at: it goes first, and its refusal takes nothing.
        for draw in reversed(draws):
            try:
                level = await meters.take(draw.key, draw.limit, draw.cost)
                _check(draw, level, headers)
            except BaseException:
                self.reserved.clear()
                for other in taken:
                    await meters.settle(other.key, other.limit, -other.cost)
                raise
            taken.append(draw)
            if draw.name == "tokens":
                self.reserved.append(draw)
            if draw.name not in tightest or level.remaining < tightest[draw.name].remaining:
                tightest[draw.name] = level
        for name, level in tightest.items():
            headers |= _headers(name, level)

    def _draws(self, shares: list[Share]) -> Iterator[Draw]:
        for figure, (name, words) in RATES.items():
            for share in shares:
                if (limit := share.rates.get(figure)) is not None:
                    yield Draw(share, name, words, limit, 1 if name == "requests" else min(self.estimate, limit))

    async def settle(self, meters: Meters, used: int) -> None:
        """Turn what was reserved into what was used."""
        reserved, self.reserved = self.reserved, []
        for draw in reserved:
            await meters.settle(draw.key, draw.limit, used - draw.cost)

    def free(self) -> None:
        """Give the slots back."""
        while self._slots:
            subjects, subject = self._slots.pop()
            subjects.leave(subject)

    def __del__(self) -> None:
        # The last resort: somebody dropped the reply without closing it.
        self.free()


def _check(draw: Draw, level: Level, headers: Mapping[str, str]) -> None:
    if level.wait > 0:
        message = f"The limit of {draw.limit} {draw.words} of {WHOSE[draw.share.kind]} is reached."
        raise Limited(message, f"{draw.share.kind}_{draw.name}", level.wait, {**headers, **_headers(draw.name, level)})


def _headers(name: str, level: Level) -> dict[str, str]:
    """OpenAI's names and spelling: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""
    return {
        f"x-ratelimit-limit-{name}": str(level.limit),
        f"x-ratelimit-remaining-{name}": str(level.remaining),
        f"x-ratelimit-reset-{name}": f"{level.reset:.3f}".rstrip("0").rstrip(".") + "s",
    }
