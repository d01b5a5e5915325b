"""What a run found, as a table for people and as JSON for programs.

The one rule: both say the same, and neither names the machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from proxy.conformance.trial import Case
from proxy.conformance.verdict import Result, Verdict

Json = dict[str, Any]
Found = Sequence[tuple[Case, Verdict]]


def table(found: Found) -> list[str]:
    """A line per case: id, result, claim, detail; then the sum. A failure also says how grave it is and why it matters."""
    width = max((len(case.id) for case, _ in found), default=0)
    lines = []
    for case, verdict in found:
        lines.append(f"{case.id:<{width}}  {verdict.result:<4}  {case.claim}{_dashed(verdict.detail)}")
        if verdict.result is Result.FAIL:
            lines.append(f"{'':<{width}}        {case.severity}: {case.why}")
    return [*lines, "", summary(found)]


def _dashed(detail: str) -> str:
    return f" - {detail}" if detail else ""


def summary(found: Found) -> str:
    """`50 pass, 2 FAIL (lie 1, cost 1), 1 n.a., 2 info`."""
    counts = Counter(verdict.result for _, verdict in found)
    graves = Counter(case.severity for case, verdict in found if verdict.result is Result.FAIL)
    words = ", ".join(f"{severity} {count}" for severity, count in graves.most_common())
    parts = [f"{counts[result]} {result}{f' ({words})' if result is Result.FAIL and words else ''}" for result in Result]
    return ", ".join(part for part, result in zip(parts, Result, strict=True) if counts[result] or result is Result.PASS)


def as_json(found: Found, about: Json) -> Json:
    """about: what was run, and how; it stands beside the cases."""
    rows = [
        {
            "id": case.id, "claim": case.claim, "severity": case.severity, "why": case.why,
            "result": verdict.result, "detail": verdict.detail, "figures": verdict.figures,
        }
        for case, verdict in found
    ]  # fmt: skip
    counts = Counter(verdict.result for _, verdict in found)
    return {**about, "summary": {str(result): count for result, count in counts.items()}, "cases": rows}


def listing(cases: Iterable[Case]) -> list[str]:
    """For --list."""
    return [f"{case.id:<16} {case.severity:<5}  {case.claim} ({case.why})" for case in cases]


def status(found: Found) -> int:
    """The exit status: 0 nothing failed, 1 something did."""
    return int(any(verdict.result is Result.FAIL for _, verdict in found))
