"""What the gateway is held to, all middleware on, and whether a run met it.

The one rule: verdicts are computed from medians of one run; a peer that was not there makes a target unknown, not met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.medians import Summaries, ratio
from bench.workloads import CHUNK, RATE, REQUEST

BUSY = 0.9


@dataclass(frozen=True)
class Target:
    """A figure of `who` at `work`, at most `limit`: as it is, or as a ratio to another contestant's. at_least: at least."""

    text: str
    work: str
    figure: str
    limit: float
    against: str | None = None
    who: str = "penstock"
    at_least: bool = False
    stretch: bool = False

    def value(self, found: Summaries) -> float | None:
        if self.against:
            return ratio(found, self.work, self.who, self.against, self.figure)
        return found[self.work, self.who].figures.get(self.figure) if (self.work, self.who) in found else None


FIRST50, FIRST99 = "added_first_ms.p50", "added_first_ms.p99"
TARGETS: Sequence[Target] = (
    Target("JSON request, × smg", "json", REQUEST, 3.0, "smg"),
    Target("JSON request, × smg", "json", REQUEST, 2.0, "smg", stretch=True),
    Target("JSON request, × Portkey", "json", REQUEST, 1 / 8, "portkey"),
    Target("JSON request, × LiteLLM", "json", REQUEST, 1 / 40, "litellm"),
    Target("100-chunk burst, × smg", "burst", REQUEST, 0.65, "smg"),
    Target("100-chunk burst, × smg", "burst", REQUEST, 0.4, "smg", stretch=True),
    Target("100-chunk burst, × Portkey", "burst", REQUEST, 1 / 6, "portkey"),
    Target("100-chunk burst, × LiteLLM", "burst", REQUEST, 1 / 130, "litellm"),
    Target("paced, per chunk, × smg", "paced", CHUNK, 1.6, "smg"),
    Target("paced, per chunk, × smg", "paced", CHUNK, 1.0, "smg", stretch=True),
    Target("paced, per chunk, × Portkey", "paced", CHUNK, 1 / 2, "portkey"),
    Target("paced, per chunk, × LiteLLM", "paced", CHUNK, 1 / 16, "litellm"),
    Target("cache hit, 100-chunk stream, µs", "hit", REQUEST, 120.0),
    Target("cache hit, × nginx from a file", "hit", REQUEST, 1.5, "nginx", stretch=True),
    Target("first token added, one client, p50 ms", "one", FIRST50, 0.6),
    Target("first token added, one client, p50 ms", "one", FIRST50, 0.35, stretch=True),
    Target("first token added, one client, p99 ms", "one", FIRST99, 2.0),
    Target("200 open streams, MB resident", "open", "resident_at_mb.200", 70.0),
    Target("each further stream, KB", "open", "kb_per_stream", 25.0, stretch=True),
    Target(
        "paced, per chunk, with flights and resume, × without", "surviving-held", CHUNK, 1.15, "penstock", "flights-resumable"
    ),
    Target("two workers, × the rate of one", "workers", RATE, 1.8, "workers-1", "workers-2", at_least=True),
)


def verdict(target: Target, found: Summaries) -> str:
    """met, missed, or why neither can be said."""
    value = target.value(found)
    if value is None:
        return "not measured"
    involved = [found[target.work, who] for who in (target.who, target.against) if who and (target.work, who) in found]
    if any(summary.wrong for summary in involved):
        return "not valid: wrong replies"
    if value >= target.limit if target.at_least else value <= target.limit:
        return "met"
    if target.at_least and not _room(target, found):
        return "no room: the load generator shares a worker's core"
    return "missed"


def _room(target: Target, found: Summaries) -> bool:
    """Whether the machine's cores were not all busy with gateway, provider and load generator together."""
    figures = found[target.work, target.who].figures
    busy = sum(figures.get(f"shares.{who}", 0.0) for who in ("gateway", "provider", "load"))
    return busy < BUSY * figures.get("cores", 2.0)
