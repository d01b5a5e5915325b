"""Adding up pages of metrics in Prometheus' text format, series by series. Pure: text in, text out, in small steps.

Strategy: pages of one program agree on how a series is spelled, so a line's text up to its value is the key, and labels are never
parsed: a page of thousands of lines costs a few milliseconds (about a twentieth of prometheus_client.parser, which the tests hold
this against). Lines carry no timestamps.
The one rule: values of one series are added in the order of the pages, so sums of growing counters never shrink by a rounding.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

STEP = 500  # lines: less than a millisecond
LASTING = frozenset({"counter", "histogram"})
# Of processes, not of the gateway: each worker's own, told apart by a label.
OF_PROCESSES = ("process_", "python_")
# Gauges that say what is, not how much there is: of several workers' the largest holds.
FACTS = ("_info", "_state", "_up", "_keys", "_faulty", "_timestamp_seconds")


@dataclass(slots=True)
class Family:
    """One metric: its kind, its HELP line, and its series by their text (`name{labels}`)."""

    name: str
    kind: str
    help: str
    series: dict[str, float] = field(default_factory=dict)

    @property
    def is_fact(self) -> bool:
        return self.kind == "gauge" and self.name.endswith(FACTS)

    @property
    def lasting(self) -> bool:
        """What it counts stays counted when the process is gone."""
        return self.kind in LASTING and not self.name.startswith(OF_PROCESSES)


class Page:
    """The sum of what was added."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def add(self, text: str, worker: str | None = None) -> Iterator[None]:
        """Add a page; every `STEP` lines there is a pause. worker: labels the process's own metrics; None where they have it."""
        family, help_line = Family("", "untyped", ""), ""
        for number, line in enumerate(text.split("\n")):
            if number % STEP == STEP - 1:
                yield
            if line.startswith("# HELP "):
                help_line = line
            elif line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ", 3)
                family = self._families.setdefault(name, Family(name, kind, help_line))
            elif line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                if worker is not None and family.name.startswith(OF_PROCESSES):
                    series = labelled(series, worker)
                _put(family, series, float(value))

    def keep_lasting(self) -> None:
        """Forget what is no more when the process is gone: gauges, and what is about the process."""
        self._families = {name: family for name, family in self._families.items() if family.lasting}

    def absorb(self, other: Page) -> None:
        """Add another page's sum."""
        for name, theirs in other._families.items():
            family = self._families.setdefault(name, Family(name, theirs.kind, theirs.help))
            for series, value in theirs.series.items():
                _put(family, series, value)

    def gauge(self, name: str, text: str, series: dict[str, float]) -> None:
        """Put a gauge of the caller's own on it."""
        self._families[name] = Family(name, "gauge", f"# HELP {name} {text}", series)

    def write(self) -> Iterator[str]:
        """The page, metric by metric."""
        for family in self._families.values():
            head = f"{family.help}\n# TYPE {family.name} {family.kind}\n"
            yield head + "".join(f"{series} {_number(value)}\n" for series, value in family.series.items())


def labelled(series: str, worker: str) -> str:
    """The series with one more label: `a{b="c"}` is `a{b="c",worker="0"}`."""
    name, brace, labels = series.partition("{")
    inside = labels.removesuffix("}").rstrip(",")
    return f'{name}{{{inside}{"," if inside else ""}worker="{worker}"}}' if brace else f'{name}{{worker="{worker}"}}'


def _put(family: Family, series: str, value: float) -> None:
    before = family.series.get(series)
    if before is None:
        family.series[series] = value
    else:
        family.series[series] = max(before, value) if family.is_fact else before + value


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)
