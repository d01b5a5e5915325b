"""Every metric that the gateway counts itself: one table of names, labels and buckets, and how a scrape gets to see the figures.

Strategy: `TABLE` is what docs/metrics.md describes. The figures are our own (tallies.py); prometheus_client is given them through
its interface for that, a collector, and writes them. `gen_ai_*` are OpenTelemetry's names as dashboards know them (seconds and
underscores as its Prometheus exporter writes them); what OpenTelemetry has no name for is `penstock_*`.
The one rule: key and name label counters only, never a histogram, which would multiply them by its buckets.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/ · https://prometheus.io/docs/practices/naming/
https://prometheus.github.io/client_python/collector/custom/
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import inf
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from middleware.metrics.tallies import Figure, Histogram, Tallies, Values
from proxy import __version__

# A stream's first chunk: from a local model's 10 ms to a reasoning model's two minutes.
FIRST_CHUNK = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
GAP = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304)  # OpenTelemetry's own

OPERATION = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
ASKED = ("route", "target", "key", "name")
PIECE = 100  # lines that are written in one go: about a millisecond


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: its full name, its labels in the order in which values are given, buckets where it is a histogram."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


TABLE: Mapping[str, Row] = {
    "requests": Row(
        "penstock_requests_total", "Requests that ended, each with exactly one outcome.", (*ASKED, "status", "outcome")
    ),
    "tokens": Row("penstock_tokens_total", "Tokens that providers counted; cached and reasoning are parts.", (*ASKED, "type")),
    "cost": Row("penstock_cost_usd_total", "US dollars, by an offline price table.", ASKED),
    "estimated": Row("penstock_tokens_estimated_total", "Tokens of streams whose provider told none, about.", (*ASKED, "type")),
    "estimated_cost": Row("penstock_cost_usd_estimated_total", "US dollars, of tokens that were estimated.", ASKED),
    "unpriced": Row("penstock_unpriced_requests_total", "Replies without a cost: no price, or no usage.", ("target", "reason")),
    "stalls": Row("penstock_stalls_total", "Gaps of more than a second between two writes of a stream.", ("route", "target")),
    "gap": Row("penstock_longest_gap_seconds", "The longest gap between two writes of a stream.", ("route", "target"), GAP),
    "request": Row("penstock_request_duration_seconds", "From the pipeline's start to the end.", ("route", "cache"), DURATION),
    "overhead": Row(
        "penstock_gateway_seconds", "The gateway's share until the head, where the first attempt answered.", ("route",), OVERHEAD
    ),
    "open": Row("penstock_open_streams", "Streams whose first chunk is in hand and which have not ended."),
    "build": Row("penstock_build_info", "Always 1.", ("version", "python")),
    "duration": Row(
        "gen_ai_client_operation_duration_seconds",
        "Calls that providers were asked for, all attempts included.",
        (*OPERATION, "error_type"),
        DURATION,
    ),
    "first_chunk": Row(
        "gen_ai_client_operation_time_to_first_chunk_seconds", "Until a stream's first real chunk.", OPERATION, FIRST_CHUNK
    ),
    "usage": Row("gen_ai_client_token_usage", "Tokens per reply.", (*OPERATION, "gen_ai_token_type"), TOKENS),
}


class Families(Collector):
    """The tallies of one gateway (several may live in one process), each called with label values in the table's order."""

    def __init__(self) -> None:
        figures = {key: Tallies(Figure) for key, row in TABLE.items() if not row.buckets}
        histograms = {key: Tallies(partial(Histogram, row.buckets)) for key, row in TABLE.items() if row.buckets}
        self.requests, self.tokens, self.cost = figures["requests"], figures["tokens"], figures["cost"]
        self.estimated, self.estimated_cost = figures["estimated"], figures["estimated_cost"]
        self.unpriced, self.stalls = figures["unpriced"], figures["stalls"]
        self.gap, self.request, self.overhead = histograms["gap"], histograms["request"], histograms["overhead"]
        self.duration, self.first_chunk, self.usage = histograms["duration"], histograms["first_chunk"], histograms["usage"]
        self.open_streams = figures["open"]()
        figures["build"](__version__, platform.python_version()).inc()
        self._tallies: dict[str, Tallies[Any]] = {**figures, **histograms}
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """All figures as they are at one moment, that of the first step, and the process' own. A metric of many series comes as
        several of its name, of about `PIECE` lines each, so that whoever writes them can let others run in between.
        """
        now = [(row, self._tallies[key].read()) for key, row in TABLE.items()]
        for row, series in now:
            step = max(1, PIECE // (len(row.buckets) + 3)) if row.buckets else PIECE
            for start in range(0, len(series) or 1, step):
                yield _metric(row, series[start : start + step])
        yield from self._process.collect()


def _metric(row: Row, series: Sequence[tuple[Values, Any]]) -> Metric:
    if row.buckets:
        return _histogram(row, series)
    kind = CounterMetricFamily if row.name.endswith("_total") else GaugeMetricFamily
    metric = kind(row.name, row.help, labels=row.labels)
    for values, value in series:
        metric.add_metric(values, value)
    return metric


def _histogram(row: Row, series: Sequence[tuple[Values, tuple[Sequence[int], float]]]) -> Metric:
    """Prometheus' buckets count all that is at most their bound, so each holds those before it too."""
    metric = HistogramMetricFamily(row.name, row.help, labels=row.labels)
    bounds = [str(floatToGoString(bound)) for bound in (*row.buckets, inf)]  # type: ignore[no-untyped-call]
    for values, (counts, total) in series:
        metric.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), total)
    return metric
