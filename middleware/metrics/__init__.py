"""Figures for Prometheus at /metrics: what was asked, how it ended, how fast it came, what it used and cost.

Cost: around the head, and one callback at the end; nothing per chunk (the relay keeps a stream's gaps in its trailer).
It belongs outermost: what a middleware outside of it refuses, it never sees; what the edge refuses is told through `refused`.
The one rule: each request counts exactly once in penstock_requests_total, however it ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

from middleware.metrics.families import Families
from middleware.metrics.labels import OTHER, Labels
from middleware.metrics.later import Later
from middleware.metrics.prices import Price, Prices, count, counted
from middleware.metrics.samples import gather, page
from middleware.metrics.series import Index, Series
from proxy.call import Call, Provider, Target
from proxy.errors import STATUSES, GatewayError, Outcome, why_cancelled
from proxy.estimate import estimated_usage
from proxy.pipeline import Answer, Endpoint, Handler, Middleware, Query, Surroundings
from proxy.reply import Head, Reply, Trailer
from proxy.units import Between

Json = dict[str, Any]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Nobody outside was asked, so neither a provider's time nor its tokens.
NOT_ASKED = frozenset({Outcome.REFUSED, Outcome.LIMITED, Outcome.BLOCKED})
REPLAYED = frozenset({"hit", "joined"})


class Used(NamedTuple):
    """What a provider was used for. usage: as it said. estimate: where it said nothing, and something was streamed."""

    usage: Json | None
    estimate: Json | None


class End(NamedTuple):
    """What is left to count of a reply that has ended: neither its call nor its error, which hold on to much.

    asked: was a provider? stream: did the client get one? seconds: until the end; first: until the head; share: the gateway's own
    of these, None where not the first attempt answered. used: None where nothing was, or where it is not known yet. target: which
    answered, one of the call's targets as a rule. prices: of the config that the call had.
    """

    series: Series
    asked: bool
    stream: bool
    seconds: float
    first: float
    share: float | None
    longest_gap: float
    stalls: int
    used: Used | None
    target: str
    targets: Sequence[Target]
    prices: Prices


class Metrics:
    """Counts, and serves `/metrics`.

    prices: US dollars per million tokens by `provider/model`; they come before the built-in table. max_names: tracking names with
    a label of their own, per key; max_models: models; max_sets: combinations of route, target, key and name. Beyond, `other`.
    """

    def __init__(
        self,
        *,
        prices: Mapping[str, Price] | None = None,
        max_names: Annotated[int, Between(0, 10_000)] = 50,
        max_models: Annotated[int, Between(1, 10_000)] = 200,
        max_sets: Annotated[int, Between(1, 100_000)] = 2000,
        _clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.families = Families()
        self._prices = Prices(prices or {})
        self._labels = Labels(max_names, max_models, max_sets)
        self._series = Index(self.families, self._labels)
        self._clock = _clock
        self._later = Later(_settle)
        self._tell: Sequence[Middleware | Surroundings] = ()
        self._gauges: Mapping[str, Callable[[], float]] = {}
        self.endpoints = (Endpoint("GET", "/metrics", self._scrape, admin=True),)

    def attach(self, surroundings: Surroundings) -> None:
        # The gateway's own figures come last, under the same name as a middleware's.
        self._tell = (*surroundings.layers, surroundings)
        self._gauges = surroundings.gauges

    def adopt(self, previous: Metrics) -> None:
        """All that was counted lives on, and which labels there are."""
        self.families, self._later = previous.families, previous._later
        self._labels.adopt(previous._labels)
        self._series = Index(self.families, self._labels)

    async def _scrape(self, query: Query) -> Answer:
        self._later.settle()
        return Answer(await page(self.families, gather(self._tell, self._gauges)), content_type=CONTENT_TYPE)

    def refused(self, error: GatewayError) -> None:
        """A request that the edge turned away before there was a call; who asked is not known."""
        self.families.requests(OTHER, OTHER, "", "", str(error.status), error.outcome.value).inc()

    async def __call__(self, call: Call, next: Handler) -> Reply:
        started = self._clock()
        try:
            reply = await next(call)
        except GatewayError as error:
            self._failed(call, started, error.outcome, error.status, error)
            raise
        except asyncio.CancelledError as error:
            outcome = why_cancelled(error)
            self._failed(call, started, outcome, STATUSES.get(outcome, 499))
            raise
        except Exception:
            self._failed(call, started, Outcome.GATEWAY_ERROR, 500)
            raise
        stream = streamed(call)
        if stream:
            self.families.open_streams.inc()
        reply.trailer.on_end(partial(self._ended, call, reply.head, stream, started, self._clock() - started))
        return reply

    def _failed(self, call: Call, started: float, outcome: Outcome, status: int, error: GatewayError | None = None) -> None:
        """Before the head."""
        tried = error.tries[-1].target if error is not None and error.tries else None
        target = tried or (str(call.target or call.targets[0]) if call.target or call.targets else OTHER)
        series = self._series(call, target, outcome, status, "", answered=False)
        _count(series, self._clock() - started, outcome not in NOT_ASKED)

    def _ended(self, call: Call, head: Head, stream: bool, started: float, first: float, trailer: Trailer) -> None:
        """stream: does the client get one? started: by the clock. first: seconds until the head."""
        if stream:
            self.families.open_streams.inc(-1)
        outcome = trailer.outcome or Outcome.GATEWAY_ERROR
        asked = head.cache not in REPLAYED
        status = 200 if stream else trailer.error.status if trailer.error else STATUSES.get(outcome, 500)
        series = self._series(call, head.target, outcome, status, head.cache or "", answered=True)
        share = None if head.tries else first - head.upstream_seconds
        used = None
        if asked:
            source = trailer.source or trailer
            if source.outcome is None:
                # Read on for others, or to its end; whoever asked for it is charged when it is over.
                source.on_end(partial(self._outlived, series, head.target, call))
            else:
                used = _used(call, source)
        self._later.add(
            End(
                series, asked, stream, self._clock() - started, first, share,
                trailer.longest_gap, trailer.stalls, used, head.target, call.targets,
                self._prices,
            )
        )  # fmt: skip

    def outlived(self, call: Call, reply: Reply) -> None:
        """A reply is read on; its client, which left before the head, has been counted, but not what it uses."""
        if reply.head.cache not in REPLAYED:
            target = reply.head.target
            series = self._series(call, target, Outcome.CLIENT_GONE, 499, "", answered=True)
            source = reply.trailer.source or reply.trailer
            source.on_end(partial(self._outlived, series, target, call))

    def _outlived(self, series: Series, target: str, call: Call, source: Trailer) -> None:
        _count_used(series, self._prices, target, call.targets, _used(call, source))


def _used(call: Call, trailer: Trailer) -> Used:
    return Used(trailer.usage, estimated_usage(call, trailer) if trailer.usage is None else None)


def streamed(call: Call) -> bool:
    """Does the client get a stream? Embeddings have none."""
    return call.stream and call.kind != "embeddings"


def _settle(end: End) -> None:
    series = end.series
    _count(series, end.seconds, end.asked)
    if end.share is not None:
        series.overhead.observe(max(0.0, end.share))
    if end.stream:
        series.gap.observe(end.longest_gap)
        if end.stalls:
            series.stalls.inc(end.stalls)
    if end.asked and end.stream:
        series.first_chunk.observe(end.first)
    if end.used is not None:
        _count_used(series, end.prices, end.target, end.targets, end.used)


def _count_used(series: Series, prices: Prices, target: str, targets: Sequence[Target], used: Used) -> None:
    """Tokens and cost of what a provider was really asked. targets: of the call, among them the one that answered."""
    usage, estimate = used
    if usage is None:
        series.no_usage.inc()
        if estimate is not None:
            _count_estimate(series, prices, target, targets, estimate)
        return
    prompt, completion, cached, _ = tokens = counted(usage)
    reasoning = count(usage.get("completion_tokens_details"), "reasoning_tokens")
    if prompt:
        series.input.inc(prompt)
    if completion:
        series.output.inc(completion)
    if cached:
        series.cached.inc(cached)
    if reasoning:
        series.reasoning.inc(reasoning)
    series.usage_input.observe(prompt)
    series.usage_output.observe(completion)
    cost = prices.cost(target, tokens, _provider(targets, target))
    if cost is None:
        series.no_price.inc()
    else:
        series.cost.inc(max(0.0, cost))


def _count_estimate(series: Series, prices: Prices, target: str, targets: Sequence[Target], estimate: Json) -> None:
    tokens = counted(estimate)
    series.estimated_input.inc(tokens[0])
    series.estimated_output.inc(tokens[1])
    cost = prices.cost(target, tokens, _provider(targets, target))
    if cost is not None:
        series.estimated_cost.inc(max(0.0, cost))


def _count(series: Series, seconds: float, asked: bool) -> None:
    series.requests.inc()
    series.request.observe(seconds)
    if asked:
        series.duration.observe(seconds)


def _provider(targets: Sequence[Target], target: str) -> Provider | None:
    """The row of the provider that answered, where the call knows it."""
    for one in targets:
        if target.startswith(f"{one.provider.name}/"):
            return one.provider
    return None
