"""Every metric that the gateway counts itself: one table of names, labels and buckets, and their children kept by label values.

Strategy: `TABLE` is what docs/metrics.md describes. `gen_ai_*` are OpenTelemetry's names as dashboards know them (seconds and
underscores as its Prometheus exporter writes them); what OpenTelemetry has no name for is `penstock_*`.
The one rule: key and name label counters only, never a histogram, which would multiply them by its buckets.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/ · https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from proxy import __version__

# A stream's first chunk: from a local model's 10 ms to a reasoning model's two minutes.
FIRST_CHUNK = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
GAP = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304)  # OpenTelemetry's own

OPERATION = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
ASKED = ("route", "target", "key", "name")


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


class Children:
    """The children of one metric: `labels()` is called once for each set of values, then a dict finds them."""

    __slots__ = ("_children", "_family")

    def __init__(self, family: Any) -> None:
        self._family = family
        self._children: dict[tuple[str, ...], Any] = {}

    def __call__(self, *values: str) -> Any:
        """The child, with `inc(amount)` or `observe(value)`."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._family.labels(*values)
        return child


class Families:
    """All metrics of one gateway, in a registry of its own: several gateways may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {key: _made(row, self.registry) for key, row in TABLE.items()}
        self.open_streams: Gauge = made.pop("open")
        made.pop("build").labels(__version__, platform.python_version()).set(1)
        found = {key: Children(family) for key, family in made.items()}
        self.requests, self.tokens, self.cost, self.unpriced = (found[key] for key in ("requests", "tokens", "cost", "unpriced"))
        self.stalls, self.gap, self.request, self.overhead = (found[key] for key in ("stalls", "gap", "request", "overhead"))
        self.duration, self.first_chunk, self.usage = (found[key] for key in ("duration", "first_chunk", "usage"))
        ProcessCollector(registry=self.registry)


def _made(row: Row, registry: CollectorRegistry) -> Any:
    if row.buckets:
        return Histogram(row.name, row.help, row.labels, registry=registry, buckets=row.buckets)
    kind = Counter if row.name.endswith("_total") else Gauge
    return kind(row.name, row.help, row.labels, registry=registry)
