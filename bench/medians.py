"""Raw lines in, one figure per work, contestant and quantity out: medians over turns, and what follows from them.

The one rule: ratios and differences are taken of medians of the same run, never of figures from elsewhere.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
# What is added to a client's direct way to the provider, where that was measured.
ADDED = ("first_ms.p50", "first_ms.p99", "transit_ms.p50", "transit_ms.p99")


@dataclass
class Summary:
    """Of one contestant at one work. figures: medians by dotted name. wrong: replies, of all turns together. bottleneck: in any
    turn the load generator's core was busy, so that rates are not the gateway's. first_wrong: what was wrong with one of them.
    """

    figures: dict[str, float] = field(default_factory=dict)
    wrong: int = 0
    bottleneck: bool = False
    first_wrong: str | None = None


Summaries = Mapping[tuple[str, str], Summary]


def summaries(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Summary]:
    """By (work, contestant), in the order of the first turn."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        grouped[line["work"], line["who"]].append(line)
    found = {key: _summary(group) for key, group in grouped.items()}
    for (work, _), summary in found.items():
        floor = found.get((work, "direct"))
        # A provider that runs late without any gateway is no floor.
        if floor is not None and not floor.bottleneck:
            for name in ADDED:
                if name in summary.figures and name in floor.figures:
                    summary.figures[f"added_{name}"] = summary.figures[name] - floor.figures[name]
    return found


def ratio(found: Summaries, work: str, who: str, against: str, figure: str) -> float | None:
    """Of two medians, or None where one is missing."""
    own, other = (found[work, name].figures.get(figure) if (work, name) in found else None for name in (who, against))
    return own / other if own and other else None


def _summary(lines: list[Mapping[str, Any]]) -> Summary:
    values: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for name, value in _flat(line):
            values[name].append(value)
    figures = {name: statistics.median(several) for name, several in values.items()}
    figures.update(_memory(figures))
    return Summary(
        figures,
        sum(line["wrong"] for line in lines),
        any(line.get("bottleneck") for line in lines),
        next((line["first_wrong"] for line in lines if line.get("first_wrong")), None),
    )


def _flat(line: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _memory(figures: Mapping[str, float]) -> dict[str, float]:
    """KB per further stream between the last two levels that were held."""
    levels = sorted(int(name.partition(".")[2]) for name in figures if name.startswith("resident_at_mb."))
    if len(levels) < 3:
        return {}
    low, high = levels[-2:]
    grown = figures[f"resident_at_mb.{high}"] - figures[f"resident_at_mb.{low}"]
    return {"kb_per_stream": grown * 1000 / (high - low)}
