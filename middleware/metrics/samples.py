"""The page that a scrape gets: our own metrics, and the figures that other middleware and the gateway's parts tell when asked.

Strategy: thousands of lines take tens of milliseconds, so the page is written a slice at a time, and streams go on in between. A
thread would hold them up longer: whoever waits for the interpreter's lock waits 5 ms each time. What is written are the figures
of the moment in which the scrape began (with 2,000 sets of labels: 62 ms in all, the longest turn 1.2 ms).
The one rule: no middleware's mistake (an error, an ill name, two of the same series) makes a scrape fail.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import structlog
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from middleware.metrics.families import PIECE
from proxy.pipeline import Sample

log: Any = structlog.get_logger("penstock.metrics")

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
MOST = 1000


def gather(layers: Iterable[Any], gauges: Mapping[str, Callable[[], float]]) -> list[Sample]:
    """All samples of the layers that have any, and each gauge as `penstock_<name>`."""
    found: list[Sample] = []
    for layer in layers:
        if hasattr(layer, "samples"):
            try:
                found += layer.samples()
            except Exception:
                log.exception("samples failed", middleware=type(layer).__name__)
    for name, read in gauges.items():
        try:
            found.append(Sample(f"penstock_{name}", "gauge", f"The gateway's {name.replace('_', ' ')}.", read()))
        except Exception:
            log.exception("gauge failed", gauge=name)
    return found


async def page(figures: Collector, samples: Iterable[Sample]) -> bytes:
    """Our own metrics, then the samples, in Prometheus' text format. A sample whose name is taken already is left out.
    figures: may give a metric in several pieces, one after the other.
    """
    parts: list[bytes] = []
    taken: set[str] = set()
    for metric in figures.collect():
        await _write(parts, metric, further=metric.name in taken)
        taken.add(metric.name)
    for metric in metrics(samples):
        if metric.name not in taken:
            await _write(parts, metric)
    return b"".join(parts)


async def _write(parts: list[bytes], metric: Metric, *, further: bool = False) -> None:
    """further: HELP and TYPE, which stand above a metric once, have been written."""
    samples = metric.samples
    for start in range(0, len(samples) or 1, PIECE):
        metric.samples = samples[start : start + PIECE]
        text = generate_latest(_One(metric))
        parts.append(text.split(b"\n", 2)[2] if start or further else text)
        await asyncio.sleep(0)


class _One(Collector):
    """A registry of one metric, as prometheus-client writes registries."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


def metrics(samples: Iterable[Sample]) -> Iterable[Metric]:
    """The samples by name; those of the same series are added up, a name's series beyond the first `MOST` are left out."""
    found: dict[str, Metric] = {}
    series: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for sample in samples:
        if not _sound(sample):
            continue
        name = sample.name.removesuffix("_total") if sample.kind == "counter" else sample.name
        metric = found.setdefault(name, Metric(name, sample.help, sample.kind))
        values = series.setdefault(name, {})
        labels = tuple(sorted((label, _text(value)) for label, value in sample.labels.items()))
        if metric.type == sample.kind and (labels in values or len(values) < MOST):
            values[labels] = values.get(labels, 0.0) + float(sample.value)
    for name, metric in found.items():
        for labels, value in series[name].items():
            metric.add_sample(f"{name}_total" if metric.type == "counter" else name, dict(labels), value)
    return found.values()


def _sound(sample: Sample) -> bool:
    return sample.kind in ("counter", "gauge") and bool(NAME.fullmatch(sample.name)) and all(map(LABEL.fullmatch, sample.labels))


def _text(value: object) -> str:
    """Half a character would spoil the whole page."""
    return str(value).encode(errors="replace").decode()
