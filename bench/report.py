"""A run as Markdown: the targets, then one table per work, with ratios of medians; and two runs beside each other.

The one rule: nothing here is written by hand, so that a sentence about speed is a line of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.medians import Summaries, Summary, ratio, summaries
from bench.picture import Panel
from bench.targets import TARGETS, verdict
from bench.workloads import CHUNK, FIRST, RATE, REQUEST, WORKS

Json = dict[str, Any]
# Heading, figure, digits. A column is left out where nobody has a figure for it.
COLUMNS = (
    ("CPU µs/request", REQUEST, 1),
    ("CPU µs/chunk", CHUNK, 2),
    ("requests/s", RATE, 0),
    ("first chunk p50 ms", FIRST, 2),
    ("p99", "first_ms.p99", 2),
    ("added p50 ms", "added_first_ms.p50", 2),
    ("added p99", "added_first_ms.p99", 2),
    ("added per chunk p50 ms", "added_transit_ms.p50", 3),
    ("added per chunk p99", "added_transit_ms.p99", 3),
    ("gap jitter p50 ms", "jitter_ms.p50", 3),
    ("gap jitter p99", "jitter_ms.p99", 3),
    ("resident MB", "resident_mb", 1),
    ("open at once", "open_at_once", 0),
    ("MB before", "resident_before_mb", 1),
    ("MB at start", "resident_at_mb.0", 1),
    ("MB at 200", "resident_at_mb.200", 1),
    ("MB at 400", "resident_at_mb.400", 1),
    ("KB per further stream", "kb_per_stream", 1),
)
TITLES = {REQUEST: "CPU µs/request", CHUNK: "CPU µs/chunk", FIRST: "first chunk ms", RATE: "requests/s"}
MEMORY = {"resident_at_mb.200": "MB at 200 streams", "kb_per_stream": "KB per further stream"}
PICTURED = (
    ("A stream of 100 chunks", "burst", REQUEST, "CPU µs per stream"),
    ("One chunk of 200 paced streams", "paced", CHUNK, "CPU µs per chunk"),
    ("A JSON request", "json", REQUEST, "CPU µs per request"),
)
NAMES = {"smg": "smg (Rust)", "portkey": "Portkey (Node)", "litellm": "LiteLLM (Python)", "penstock": "Penstock",
         "relay": "bare relay", "nginx": "nginx (parses nothing)", "bare": "Penstock, bare"}  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report of a result as it is stored."""
    found = summaries(result["lines"])
    parts = [f"# Bench: {result['label']}", _circumstances(result), "## Targets", targets(found)]
    for work in dict.fromkeys(work for work, _ in found):
        if not work.startswith(("alone-", "flat-")):
            parts += [f"## {work}: {WORKS[work].title}", work_table(work, found)]
    return "\n\n".join([*parts, *prices(found), *flatness(found)]) + "\n"


def prices(found: Summaries) -> list[str]:
    """What each middleware adds to the gateway without any, by work."""
    works = [work for work in ("alone-json", "alone-burst") if (work, "bare") in found]
    if not works:
        return []
    rows = []
    for who in dict.fromkeys(who for work, who in found if work in works):
        figures = [(_figure(found, work, who, REQUEST), _figure(found, work, "bare", REQUEST)) for work in works]
        added = ["" if own is None or bare is None else f"{own:,.1f} ({own - bare:+.1f})" for own, bare in figures]
        rows.append([who, *added])
    heads = ["CPU µs/request (more than bare)", *(WORKS[work].title.partition(": ")[2] for work in works)]
    return ["## alone: each middleware alone", table(heads, rows), *_wrong(found, works)]


def flatness(found: Summaries) -> list[str]:
    """CPU per chunk by the number of open streams, at the same number of chunks per second."""
    works = [work for work in dict.fromkeys(work for work, _ in found) if work.startswith("flat-")]
    if not works:
        return []
    everyone = dict.fromkeys(who for work, who in found if work in works)
    rows = [[who, *(_number(_figure(found, work, who, CHUNK), 2) for work in works)] for who in everyone]
    heads = ["CPU µs/chunk at open streams", *(f"{int(work.removeprefix('flat-')):,}" for work in works)]
    return ["## flat: about 2,000 chunks a second, over more and more streams", table(heads, rows), *_wrong(found, works)]


def _figure(found: Summaries, work: str, who: str, figure: str) -> float | None:
    return found[work, who].figures.get(figure) if (work, who) in found else None


def targets(found: Summaries) -> str:
    rows = []
    for target in TARGETS:
        value = target.value(found)
        sign = "≥" if target.at_least else "≤"
        limit = f"{sign} {target.limit:.3g}{' (stretch)' if target.stretch else ''}"
        rows.append([target.text, limit, "" if value is None else f"{value:.3g}", verdict(target, found)])
    return table(["all middleware on", "target", "measured", "verdict"], rows)


def work_table(work: str, found: Summaries) -> str:
    """One row per contestant, and its ratios to those that others are compared with."""
    rows = {who: summary for (of, who), summary in found.items() if of == work}
    figure = WORKS[work].ratio
    columns = [column for column in COLUMNS if _shown(column[1], work, rows)]
    others = [
        who
        for who in WORKS[work].against
        if who in rows and len(rows) > 1 and any(ratio(found, work, row, who, figure) for row in rows)
    ]
    heads = ["", *(head for head, _, _ in columns), *(f"× {who}" for who in others)]
    cells = []
    for who, summary in rows.items():
        figures = [_cell(summary, name, digits) for _, name, digits in columns]
        shares = [_number(ratio(found, work, who, other, figure), 2) for other in others]
        cells.append([who, *figures, *shares])
    return "\n\n".join([table(heads, cells), *_notes(rows)])


def _shown(figure: str, work: str, rows: Mapping[str, Summary]) -> bool:
    if figure == "resident_mb" and WORKS[work].levels:
        return False
    return any(summary.figures.get(figure) for who, summary in rows.items())


def _cell(summary: Summary, figure: str, digits: int) -> str:
    value = summary.figures.get(figure)
    if value is None or (value == 0 and figure.startswith(("cpu", "resident", "requests"))):
        return ""
    return _number(value, digits) + ("*" if summary.bottleneck and figure == RATE else "")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _notes(rows: Mapping[str, Summary]) -> list[str]:
    notes = []
    if any(summary.bottleneck for summary in rows.values()):
        notes.append(
            "\\* the load generator's core was over 90 % busy: the rate is its own, and latencies are longer for it; CPU holds"
        )
    return notes + [_wrong_of(who, one) for who, one in rows.items() if one.wrong]


def _wrong(found: Summaries, works: Sequence[str]) -> list[str]:
    return [_wrong_of(f"{who} ({work})", one) for (work, who), one in found.items() if work in works and one.wrong]


def _wrong_of(who: str, one: Summary) -> str:
    return f"{who}: {one.wrong} wrong replies: {one.first_wrong}"


def _circumstances(result: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return (
        f"{machine}.\n\nCommit {result['commit']}. {versions}.\n\n"
        f"Medians of {result['turns']} turns of {result['seconds']:g} s each; absolute figures drift with the machine, ratios "
        "within a run hold. CPU is that of the gateway's processes. `penstock` has all middleware of config.yaml on, `bare` none."
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---", *("---:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, aligned, *rows))


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """After over before, for each figure that both runs have; and the same of the ratios to the bare relay, which takes out what
    the machine did meanwhile."""
    earlier, later = summaries(before["lines"]), summaries(after["lines"])
    rows = []
    for work, who in (key for key in later if key in earlier):
        for figure, title in {WORKS[work].ratio: TITLES[WORKS[work].ratio], **MEMORY}.items():
            old, new = _figure(earlier, work, who, figure), _figure(later, work, who, figure)
            if old and new:
                lasting = [ratio(found, work, who, "relay", figure) for found in (earlier, later)]
                steady = lasting[1] / lasting[0] if lasting[0] and lasting[1] else None
                rows.append([f"{work} {who}", title, f"{old:,.2f}", f"{new:,.2f}", f"{new / old:.3f}", _number(steady, 3)])
    return table(["", "", before["label"], after["label"], "ratio", "ratio, less the relay's"], rows)


def panels(found: Summaries) -> list[Panel]:
    """What the README's picture shows."""
    drawn = []
    for title, work, figure, unit in PICTURED:
        bars = [
            (NAMES.get(who, who), value, who == "penstock")
            for (of, who), summary in found.items()
            if of == work and who != "direct" and (value := summary.figures.get(figure)) and not summary.wrong
        ]
        if bars:
            drawn.append(Panel(title, unit, sorted(bars, key=lambda bar: bar[1])))
    return drawn
