"""What the load generator saw: latencies, CPU time, memory, and what was wrong; as one line of JSON.

The one rule: it says when it was the bottleneck. Provider and load generator share a core; above 90 % of it, rates are theirs.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

from bench import kernel
from bench.checking import Reply, Wanted
from bench.job import Job

Json = dict[str, Any]
BUSY = 0.9


@dataclass
class Figures:
    """What was seen; times in nanoseconds."""

    first: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    transit: list[int] = field(default_factory=list)
    jitter: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    chunks: int = 0

    def add(self, reply: Reply, asked: int, wanted: Wanted, gap: int) -> None:
        """A reply that is right. gap: the provider's, in nanoseconds."""
        self.first.append(reply.times[-1] - asked if wanted.whole else reply.first - asked)
        self.full.append(reply.times[-1] - asked)
        self.chunks += wanted.count
        if wanted.paced:
            stamps = reply.stamps()
            self.transit += [arrived - written for written, arrived in stamps]
            self.jitter += [abs(later - at - gap) for (_, at), (_, later) in itertools.pairwise(stamps)]


class Watch:
    """CPU time of the gateway, the provider and this process since it was made."""

    def __init__(self, job: Job) -> None:
        self._several = job.clients > 1 or bool(job.watch)
        self._trees = [kernel.tree(process) if process else [] for process in (job.watch, job.provider)]
        self._before = [kernel.cpu_seconds(tree) for tree in self._trees]
        self._own, self._at = time.process_time(), time.monotonic()

    def resident(self) -> int:
        return kernel.resident(self._trees[0])

    def spent(self) -> Json:
        """Seconds of the gateway, wall seconds, and the shares of a core that all three took."""
        wall = time.monotonic() - self._at
        gateway, provider = (kernel.cpu_seconds(tree) - before for tree, before in zip(self._trees, self._before, strict=True))
        load = time.process_time() - self._own
        shares = {"gateway": gateway / wall, "provider": provider / wall, "load": load / wall}
        # One client without a gateway keeps them busy by itself, and waits for nobody.
        busy = shares["provider"] + shares["load"] > BUSY and self._several
        return {"cpu_s": gateway, "wall_s": wall, "shares": {who: round(x, 3) for who, x in shares.items()}, "bottleneck": busy}


def as_line(figures: Figures, spent: Json) -> Json:
    requests, chunks, cpu = len(figures.full), figures.chunks, spent.pop("cpu_s")
    return {
        "ok": requests,
        "wrong": len(figures.wrong),
        "first_wrong": figures.wrong[0][:600] if figures.wrong else None,
        **spent,
        "requests_per_s": requests / spent["wall_s"],
        "chunks_per_s": chunks / spent["wall_s"],
        "cpu_us_per_request": cpu / requests * 1e6 if requests else None,
        "cpu_us_per_chunk": cpu / chunks * 1e6 if chunks else None,
        "resident_mb": max(figures.resident, default=0) / 1e6,
        **{
            f"{name}_ms": {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99)}
            for name in ("first", "full", "transit", "jitter")
            if (times := getattr(figures, name))
        },
    }


def percentile(times: list[int], part: float) -> float:
    """In milliseconds, of nanoseconds."""
    return sorted(times)[min(len(times) - 1, int(len(times) * part))] / 1e6
