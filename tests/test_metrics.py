"""The metrics by themselves and in a real gateway: every request counts once, labels stay bounded, figures are what happened."""

from __future__ import annotations

import asyncio
import random
import re
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, calc_price
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import proxy.relay
from middleware import TABLE as MIDDLEWARE
from middleware.metrics import Metrics
from middleware.metrics.families import TABLE
from middleware.metrics.prices import Price, Prices, counted
from middleware.metrics.samples import MOST, gather, metrics
from proxy.app import Gateway
from proxy.call import Call, Principal, Provider, Route
from proxy.config import ConfigError, parse
from proxy.errors import GatewayError, Outcome, Refused, UpstreamError, UpstreamTimeout
from proxy.pipeline import Query, Sample, Surroundings
from proxy.reply import Batch, Head, Reply, Trailer
from tests.support.decoding import make_call, make_target
from tests.support.gateway import CONFIG, Answer, RawClient, ask, chat, gateway, raw_request, until
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
ROOT = Path(__file__).parent.parent

USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 50,
    "prompt_tokens_details": {"cached_tokens": 20},
    "completion_tokens_details": {"reasoning_tokens": 30},
}


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def no_chunks() -> AsyncIterator[Batch]:
    return
    yield


def series_of(text: str) -> Series:
    """Every sample of a scrape; fails where a series stands twice."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
    return found


async def scraped(made: Metrics) -> Series:
    answer = await made.endpoints[0].handler(Query("GET", "/metrics", {}, {}, b"", Principal()))
    return series_of(answer.body.decode())


def total(series: Series, metric: str, /, **labels: str) -> float:
    """The sum over all series of that name with these labels."""
    return sum(value for (found, having), value in series.items() if found == metric and labels.items() <= set(having))


def asked(**fields: Any) -> Call:
    target = make_target("openai", "m", models=("m",))
    return make_call({"stream": True}, **{"targets": (target,), "route": Route(None, (target,)), **fields})


async def run(made: Metrics, call: Call, end: Reply | BaseException) -> Reply | None:
    """One call through the middleware, in which `next` does what `end` is."""

    async def next(call: Call) -> Reply:
        if isinstance(end, BaseException):
            raise end
        return end

    try:
        return await made(call, next)
    except (GatewayError, asyncio.CancelledError, ZeroDivisionError):
        return None


def reply(target: str = "openai/m", **head: Any) -> Reply:
    return Reply(Head(target, **head), no_chunks(), Trailer())


ENDINGS = st.one_of(
    st.sampled_from([UpstreamError("x", status=429), Refused("x", status=404), UpstreamTimeout("connect", 1), GatewayError("x")]),
    st.sampled_from([asyncio.CancelledError(), asyncio.CancelledError(Outcome.DRAINING), ZeroDivisionError()]),
    st.sampled_from(list(Outcome)),
)


class TestExactlyOnce:
    @given(st.lists(st.tuples(ENDINGS, st.booleans(), st.booleans()), max_size=30))
    async def test_the_sum_of_requests_is_the_number_of_calls_however_they_ended(self, calls: list[Any]) -> None:
        made = Metrics()
        for ending, streamed, twice in calls:
            given = ending if isinstance(ending, BaseException) else reply()
            got = await run(made, replace(asked(), stream=streamed), given)
            if got is not None:
                got.trailer.end(ending)
                if twice:
                    await got.close(Outcome.CANCELLED)
        series = await scraped(made)
        assert total(series, "penstock_requests_total") == len(calls)
        assert total(series, "penstock_request_duration_seconds_count") == len(calls)
        assert total(series, "penstock_open_streams") == 0

    @pytest.mark.parametrize(
        ("outcome", "error", "streamed", "status"),
        [
            (Outcome.COMPLETED, None, True, 200),
            (Outcome.UPSTREAM_CUT, UpstreamError("x", status=502), True, 200),
            (Outcome.CLIENT_GONE, None, True, 200),
            (Outcome.COMPLETED, None, False, 200),
            (Outcome.UPSTREAM_CUT, UpstreamError("x", status=502), False, 502),
            (Outcome.CLIENT_GONE, None, False, 499),
            (Outcome.GATEWAY_ERROR, None, False, 500),
        ],
    )
    async def test_the_status_is_what_the_client_was_told(
        self, outcome: Outcome, error: GatewayError | None, streamed: bool, status: int
    ) -> None:
        made = Metrics()
        got = await run(made, replace(asked(), stream=streamed), reply())
        assert got is not None
        got.trailer.end(outcome, error)
        assert total(await scraped(made), "penstock_requests_total", status=str(status), outcome=outcome.value) == 1

    @pytest.mark.parametrize("streamed", [True, False])
    @pytest.mark.parametrize("outcome", list(Outcome))
    async def test_each_of_a_hundred_replies_counts_once_whatever_its_outcome(self, outcome: Outcome, streamed: bool) -> None:
        made = Metrics()
        for number in range(100):
            got = await run(made, replace(asked(), stream=streamed), reply())
            assert got is not None
            got.trailer.end(outcome)
            if number in (0, 50):
                assert total(await scraped(made), "penstock_requests_total", outcome=outcome.value) == number + 1
        series = await scraped(made)
        for name in ("penstock_requests_total", "penstock_request_duration_seconds_count", "penstock_unpriced_requests_total"):
            assert total(series, name) == 100, name

    async def test_a_deadline_of_the_edges_is_no_departure(self) -> None:
        made = Metrics()
        for words in ((Outcome.TIMEOUT_TOTAL,), ()):
            await run(made, asked(), asyncio.CancelledError(*words))
        series = await scraped(made)
        assert total(series, "penstock_requests_total", outcome="timeout_total", status="504") == 1
        assert total(series, "penstock_requests_total", outcome="client_gone", status="499") == 1

    async def test_a_reply_that_has_ended_holds_on_to_neither_its_call_nor_its_error(self) -> None:
        """Though its figures may wait for others: a prompt may have 32 MiB, and an error's traceback holds on to it."""
        made, call, given, error = Metrics(), asked(), reply(), UpstreamError("x", status=502)
        await run(made, call, given)
        given.trailer.end(Outcome.UPSTREAM_CUT, error)
        gone = weakref.ref(call), weakref.ref(error)
        del call, given, error
        assert [one() for one in gone] == [None, None]
        assert total(await scraped(made), "penstock_requests_total", outcome="upstream_cut") == 1

    async def test_a_stream_is_open_until_it_ends_and_a_whole_reply_never_is(self) -> None:
        made = Metrics()
        streamed, plain = await run(made, asked(), reply()), await run(made, replace(asked(), stream=False), reply())
        assert streamed is not None
        assert plain is not None
        assert total(await scraped(made), "penstock_open_streams") == 1
        streamed.trailer.end(Outcome.CLIENT_GONE)
        assert total(await scraped(made), "penstock_open_streams") == 0


class TestFigures:
    async def test_times_and_tokens_and_cost_are_those_of_the_call(self) -> None:
        clock, made = Clock(), Metrics(prices={"openai/m": Price(input=10, output=100, cached=1)})
        made._clock = clock

        async def next(call: Call) -> Reply:
            clock.now += 0.5
            return reply(upstream_seconds=0.49)

        call = asked(principal=Principal("web"), name="bot", route=Route("fast", ()))
        got = await made(call, next)
        clock.now += 7
        got.trailer.usage, got.trailer.longest_gap, got.trailer.stalls = USAGE, 3.0, 2
        got.trailer.end(Outcome.COMPLETED)
        series = await scraped(made)
        who = {"route": "fast", "target": "openai/m", "key": "web", "name": "bot"}
        genai = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "openai", "gen_ai_request_model": "m"}
        tokens = {
            kind: total(series, "penstock_tokens_total", type=kind, **who) for kind in ("input", "output", "cached", "reasoning")
        }
        assert tokens == {"input": 100, "output": 50, "cached": 20, "reasoning": 30}
        assert total(series, "penstock_cost_usd_total", **who) == pytest.approx((80 * 10 + 20 * 1 + 50 * 100) / 1e6)
        assert total(series, "gen_ai_client_operation_duration_seconds_sum", error_type="", **genai) == pytest.approx(7.5)
        assert total(series, "gen_ai_client_operation_time_to_first_chunk_seconds_sum", **genai) == pytest.approx(0.5)
        assert total(series, "penstock_gateway_seconds_sum", route="fast") == pytest.approx(0.01)
        assert total(series, "penstock_longest_gap_seconds_sum", route="fast", target="openai/m") == 3.0
        assert total(series, "penstock_stalls_total", route="fast", target="openai/m") == 2
        assert total(series, "gen_ai_client_token_usage_sum", gen_ai_token_type="output", **genai) == 50

    @pytest.mark.parametrize("cache", ["hit", "joined"])
    async def test_what_no_provider_was_asked_for_costs_nothing_and_is_nobodys_time(self, cache: str) -> None:
        made = Metrics(prices={"openai/m": Price(input=1, output=1)})
        got = await run(made, asked(), reply(cache=cache))
        assert got is not None
        got.trailer.usage = USAGE
        got.trailer.end(Outcome.COMPLETED)
        series = await scraped(made)
        assert total(series, "penstock_requests_total") == 1
        assert total(series, "penstock_request_duration_seconds_count", cache=cache) == 1
        gone = ("penstock_tokens_total", "penstock_cost_usd_total", "gen_ai_client_operation_duration_seconds_count")
        assert [total(series, name) for name in gone] == [0, 0, 0]

    @pytest.mark.parametrize(("usage", "reason"), [(None, "no_usage"), (USAGE, "no_price")])
    async def test_a_reply_without_a_cost_is_counted_with_the_reason(self, usage: Any, reason: str) -> None:
        made = Metrics()
        got = await run(made, asked(), reply())
        assert got is not None
        got.trailer.usage = usage
        got.trailer.end(Outcome.COMPLETED)
        series = await scraped(made)
        assert total(series, "penstock_unpriced_requests_total", reason=reason, target="openai/m") == 1
        assert total(series, "penstock_cost_usd_total") == 0

    async def test_usage_that_is_nonsense_spoils_nothing(self) -> None:
        made = Metrics()
        got = await run(made, asked(), reply())
        assert got is not None
        got.trailer.usage = {"prompt_tokens": "many", "completion_tokens": -3, "prompt_tokens_details": 7}
        got.trailer.end(Outcome.COMPLETED)
        series = await scraped(made)
        assert (total(series, "penstock_requests_total"), total(series, "penstock_tokens_total")) == (1, 0)

    async def test_what_was_refused_before_any_provider_is_no_time_of_a_providers(self) -> None:
        made = Metrics()
        for error in (Refused("x"), UpstreamError("x")):
            await run(made, asked(), error)
        assert total(await scraped(made), "gen_ai_client_operation_duration_seconds_count") == 1


class TestBounds:
    async def test_ten_thousand_invented_names_and_models_add_no_more_series_than_the_bounds_allow(self) -> None:
        """Half of the models even answer, as those of a provider that takes any name do."""
        made = Metrics(max_names=50, max_models=200, max_sets=500)
        chance = random.Random(7)
        before = len(await scraped(made))
        counts = []
        for number in range(10_000):
            target = make_target("openai", f"invented-{chance.random()}")
            call = asked(name=f"name-{chance.random()}", model=str(target), targets=(target,), route=Route(None, (target,)))
            got = await run(made, call, reply(str(target)) if number % 2 else UpstreamError("no such model", status=404))
            if got is not None:
                got.trailer.usage = USAGE
                got.trailer.end(Outcome.COMPLETED)
            if number in (4_999, 9_999):
                counts.append(len(await scraped(made)))
        assert counts[0] == counts[1], "nothing has been added by the last five thousand"
        assert counts[1] - before < 500 * 9 + 202 * 70
        assert total(await scraped(made), "penstock_requests_total") == 10_000

    async def test_even_every_pair_of_a_name_and_a_model_stays_under_the_bound(self) -> None:
        made = Metrics(max_names=30, max_models=30, max_sets=100)
        for name in range(30):
            for model in range(30):
                got = await run(made, asked(name=f"n{name}"), reply(f"openai/m{model}"))
                assert got is not None
                got.trailer.end(Outcome.COMPLETED)
        series = await scraped(made)
        sets = [labels for name, labels in series if name == "penstock_requests_total"]
        assert len(sets) == 101
        assert total(series, "penstock_requests_total", name="other", target="other") == 800

    async def test_names_are_bounded_per_key_and_kept_once_known(self) -> None:
        made = Metrics(max_names=2)
        for key in ("web", "app"):
            for name in ("a", "b", "c", "a", "d"):
                await run(made, asked(principal=Principal(key), name=name), UpstreamError("x"))
        series = await scraped(made)
        found = {name: total(series, "penstock_requests_total", key="app", name=name) for name in ("a", "b", "c", "other")}
        assert found == {"a": 2, "b": 1, "c": 0, "other": 2}

    async def test_a_model_that_a_provider_does_not_know_is_other_and_a_configured_one_is_not(self) -> None:
        made = Metrics()
        invented = make_target("openai", "invented")
        route = Route("fast", (make_target("openai", "routed"),))
        missing = UpstreamError("no such model", status=404)
        await run(made, asked(targets=(invented,), route=Route(None, (invented,))), missing)
        await run(made, asked(), missing)
        await run(made, asked(targets=route.targets, route=route), missing)
        await run(made, asked(targets=(invented,), route=route), missing)  # a request's own targets under a route's name
        series = await scraped(made)
        targets = {
            target: total(series, "penstock_requests_total", target=f"openai/{target}") for target in ("other", "m", "routed")
        }
        assert targets == {"other": 2, "m": 1, "routed": 1}

    @pytest.mark.parametrize("name", ["\udc80", "x" * 1000, 'a"b\\c\nd'])
    async def test_no_name_breaks_the_page(self, name: str) -> None:
        made = Metrics()
        await run(made, asked(name=name), UpstreamError("x"))
        assert total(await scraped(made), "penstock_requests_total") == 1

    def test_histograms_carry_neither_key_nor_name(self) -> None:
        assert [row.name for row in TABLE.values() if row.buckets and {"key", "name"} & set(row.labels)] == []

    def test_buckets_of_the_first_chunk_reach_from_10_ms_to_two_minutes(self) -> None:
        assert (TABLE["first_chunk"].buckets[0], TABLE["first_chunk"].buckets[-1]) == (0.01, 120)


class Layer:
    """A middleware with figures."""

    def __init__(self, *samples: Sample) -> None:
        self._samples = samples

    async def __call__(self, call: Call, next: Any) -> Reply:
        raise NotImplementedError

    def samples(self) -> Iterable[Sample]:
        return self._samples


class Broken(Layer):
    def samples(self) -> Iterable[Sample]:
        raise ZeroDivisionError


def surroundings(*layers: Layer, gauges: Mapping[str, Callable[[], float]] | None = None) -> Surroundings:
    return Surroundings(layers, lambda model: Route(None, ()), gauges or {})


class TestSamples:
    async def test_figures_of_other_middleware_and_the_gateways_gauges_are_on_the_page(self) -> None:
        made = Metrics()
        hits = Sample("penstock_cache_hits_total", "counter", "Hits.", 3, {"scope": "key"})
        state = Sample("penstock_circuit_open", "gauge", "Open circuits.", 1, {"target": "a/b"})
        made.attach(surroundings(Layer(hits), Layer(hits, state), gauges={"upstream_connections": lambda: 4.0}))
        series = await scraped(made)
        assert total(series, "penstock_cache_hits_total", scope="key") == 6, "the same series of two layers is added up"
        assert total(series, "penstock_circuit_open", target="a/b") == 1
        assert total(series, "penstock_upstream_connections") == 4

    async def test_nobodys_mistake_makes_a_scrape_fail(self) -> None:
        made = Metrics()
        wrong = (
            Sample("no name", "gauge", "x", 1),
            Sample("x", "summary", "x", 1),
            Sample("y", "gauge", "x", 1, {"__l": "v"}),
            Sample("penstock_requests_total", "counter", "Taken.", 99),
            Sample("z", "gauge", "half a character", 1, {"l": "\udc80"}),
            Sample("both", "gauge", "x", 1),
            Sample("both", "counter", "x", 1),
        )
        made.attach(surroundings(Broken(), Layer(*wrong), gauges={"broken": lambda: 1 / 0}))
        series = await scraped(made)
        assert total(series, "penstock_requests_total") == 0
        assert {name for name, _ in series if not name.startswith(("penstock", "process"))} == {"z", "both"}

    async def test_a_long_page_is_whole_and_lets_others_run_meanwhile(self) -> None:
        made = Metrics()
        for number in range(1000):
            made.families.requests("r", f"t{number}", "k", "n", "200", "completed").inc(number)
        turns, writing = 0, asyncio.create_task(scraped(made))
        while not writing.done():
            turns += 1
            await asyncio.sleep(0)
        assert total(writing.result(), "penstock_requests_total") == sum(range(1000))
        assert turns >= 10

    def test_a_names_series_are_bounded(self) -> None:
        many = [Sample("x", "gauge", "x", 1, {"l": str(number)}) for number in range(2 * MOST)]
        (found,) = metrics(gather([Layer(*many)], {}))
        assert len(found.samples) == MOST


class TestPrices:
    @pytest.mark.parametrize(
        "target",
        ["openai/gpt-4o", "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-pro", "xai/grok-4", "groq/llama-3.3-70b-versatile"],
    )
    @given(st.data())
    def test_the_remembered_rates_give_what_the_library_says(self, target: str, data: Any) -> None:
        """Two of these have tiers, at 200,000 input tokens."""
        prompt = data.draw(st.one_of(st.integers(0, 10**6), st.sampled_from([199_999, 200_000, 200_001])))
        cached = data.draw(st.integers(0, prompt))
        written = data.draw(st.integers(0, prompt - cached))
        output = data.draw(st.integers(0, 10**5))
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        }
        provider, _, model = target.partition("/")
        asked = Usage(input_tokens=prompt, output_tokens=output, cache_read_tokens=cached, cache_write_tokens=written)
        assert PRICES.cost(target, counted(usage)) == pytest.approx(
            float(calc_price(asked, model, provider_id=provider).total_price)
        )

    def test_what_is_not_in_the_table_has_no_price(self) -> None:
        for target in ("openai/nonesuch", "nobody/gpt-4o", "ollama/llama3.2"):
            assert PRICES.cost(target, counted(USAGE)) is None

    def test_the_rows_url_says_who_is_asked_whatever_the_row_is_called(self) -> None:
        row = Provider("acme", "openai", "https://api.openai.com/v1")
        cost = PRICES.cost("acme/gpt-4o", counted(USAGE), row)
        assert cost is not None
        assert cost == PRICES.cost("openai/gpt-4o", counted(USAGE))

    def test_the_operators_price_comes_first_and_caches_like_input_where_it_says_nothing(self) -> None:
        prices = Prices({"openai/gpt-4o": Price(input=1, output=2)})
        assert prices.cost("openai/gpt-4o", counted(USAGE)) == pytest.approx((100 * 1 + 50 * 2) / 1e6)

    def test_a_target_is_looked_up_once_an_hour(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [1_760_000_000.0]
        prices = Prices({}, now=lambda: now[0])
        looked: list[object] = []
        calc = prices._calc

        def calculated(*args: Any, **fields: Any) -> Any:
            looked.append(args)
            return calc(*args, **fields)

        monkeypatch.setattr(prices, "_calc", calculated)
        for _ in range(3):
            prices.cost("openai/gpt-4o", counted(USAGE))
            prices.cost("openai/nonesuch", counted(USAGE))
        once = len(looked)
        for _ in range(3):
            prices.cost("openai/gpt-4o", counted(USAGE))
        assert len(looked) == once
        now[0] += 3600
        prices.cost("openai/gpt-4o", counted(USAGE))
        assert len(looked) > once


METRICS_CONFIG = CONFIG.replace(
    "middleware:\n", 'middleware:\n  - metrics: {{prices: {{"openai/m": {{input: 10, output: 100}}}}}}\n'
).replace("first_chunk_timeout: 5s", "first_chunk_timeout: 200ms")
SAID = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}\n\n'
LAST = (
    b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],'
    b' "usage": {"prompt_tokens": 100, "completion_tokens": 50}}\n\n'
)
DONE = b"data: [DONE]\n\n"


async def answer(asked: Asked, line: Line) -> None:
    model = asked.json["model"]
    if model == "unknown":
        return await whole(b'{"error": {"message": "no such model"}}', 404)(asked, line)
    if model == "broken":
        return await whole(b'{"error": {"message": "oops"}}', 500)(asked, line)
    if model == "silent":
        return await line.forever()
    if model in ("cut", "endless", "gap"):
        await line.head()
        await line.chunk(SAID)
        if model == "cut":
            return line.hang_up()
        if model == "endless":
            return await line.forever()
        await asyncio.sleep(0.1)
        await line.chunk(SAID, LAST, DONE)
        return await line.end()
    return await stream([SAID, LAST, DONE])(asked, line)


async def page(running: Gateway) -> Series:
    got = await get(running, "/metrics")
    assert got.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return series_of(got.body.decode())


async def get(running: Gateway, path: str, authorization: str = "") -> Answer:
    async with RawClient(running.port) as client:
        await client.send(raw_request(path=path, method="GET", Content_Type="", Content_Length="", Authorization=authorization))
        return await client.answer()


class TestGateway:
    async def test_every_request_counts_once_in_the_outcome_that_it_had(self) -> None:
        async with Upstream(answer) as upstream, gateway(upstream.url, METRICS_CONFIG) as running:
            for body in (chat(), chat(stream=False), chat("openai/unknown"), chat("openai/broken"), chat("openai/cut")):
                await ask(running.port, body)
            await ask(running.port, chat("openai/silent"))
            await ask(running.port, b"no JSON")
            await ask(running.port, chat(cache={"ttl": "x"}, model="nobody/m"))
            await ask(running.port, chat(), path="/nowhere")
            for model in ("openai/endless", "openai/silent"):
                before = len(upstream.asked)
                async with RawClient(running.port) as client:
                    await client.send(raw_request(chat(model)))
                    await until(lambda before=before: len(upstream.asked) > before)
                    if model == "openai/endless":
                        await client.first_byte()
                        assert total(await page(running), "penstock_open_streams") == 1
                await until(lambda: running.edge.open_calls == 0)
            series = await page(running)
        counted = {
            dict(labels)["outcome"] + " " + dict(labels)["status"]: value
            for (name, labels), value in totals(series, "outcome", "status").items()
            if name == "penstock_requests_total"
        }
        assert counted == {
            "completed 200": 2,
            "upstream_error 404": 1,
            "upstream_error 500": 1,
            "upstream_cut 200": 1,
            "timeout_first_chunk 504": 1,
            "refused 400": 1,
            "refused 404": 2,
            "client_gone 200": 1,
            "client_gone 499": 1,
        }
        assert total(series, "penstock_requests_total") == 11
        assert total(series, "penstock_open_streams") == 0
        assert total(series, "penstock_requests_total", target="openai/other") == 4, "models that never answered"
        assert total(series, "penstock_tokens_total", type="output") == 100
        assert total(series, "penstock_cost_usd_total", target="openai/m") == pytest.approx(2 * (100 * 10 + 50 * 100) / 1e6)

    async def test_gaps_and_stalls_are_those_between_the_writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(proxy.relay, "STALL_SECONDS", 0.05)
        async with Upstream(answer) as upstream, gateway(upstream.url, METRICS_CONFIG) as running:
            for model in ("openai/m", "openai/gap"):
                assert (await ask(running.port, chat(model))).done
            series = await page(running)
        assert total(series, "penstock_stalls_total", target="openai/gap") == 1
        assert total(series, "penstock_stalls_total", target="openai/m") == 0
        assert 0.05 <= total(series, "penstock_longest_gap_seconds_sum", target="openai/gap") < 5

    async def test_a_stream_that_is_drained_is_counted_as_that(self) -> None:
        config = METRICS_CONFIG.replace("drain_timeout: 1s", "drain_timeout: 0s")
        async with Upstream(answer) as upstream, gateway(upstream.url, config) as running:
            made = running.layers[0]
            assert isinstance(made, Metrics)
            async with (
                RawClient(running.port) as streaming,
                RawClient(running.port) as waiting,
                RawClient(running.port) as folding,
            ):
                await streaming.send(raw_request(chat("openai/endless")))
                await streaming.first_byte()
                await waiting.send(raw_request(chat("openai/silent")))
                await folding.send(raw_request(chat("openai/endless", stream=False)))
                await until(lambda: len(upstream.asked) == 3)
                await running.drain()
                assert [(await client.answer()).status for client in (waiting, folding)] == [503, 503]
            series = await scraped(made)
        assert total(series, "penstock_requests_total", outcome="draining") == 3
        assert total(series, "penstock_requests_total", outcome="draining", status="503") == 2, "what these two were told"
        assert total(series, "penstock_open_streams") == 0

    async def test_two_gateways_in_one_process_count_apart(self) -> None:
        async with (
            Upstream(answer) as upstream,
            gateway(upstream.url, METRICS_CONFIG) as one,
            gateway(upstream.url, METRICS_CONFIG) as two,
        ):
            await ask(one.port, chat())
            assert [total(await page(each), "penstock_requests_total") for each in (one, two)] == [1, 0]

    async def test_a_price_that_the_file_cannot_mean_is_refused_at_start(self) -> None:
        for wrong in ("{{input: -1, output: 1}}", "{{input: 1, output: 1, extra: 1}}", "{{input: 1}}"):
            config = CONFIG.replace("middleware:\n", f'middleware:\n  - metrics: {{{{prices: {{{{"a/b": {wrong}}}}}}}}}\n')
            with pytest.raises(ConfigError) as caught:
                async with gateway(config=config):
                    pass
            assert "middleware[0].metrics.prices" in str(caught.value)

    async def test_no_key_prompt_or_reply_is_on_the_page(self) -> None:
        secret = "a prompt that nobody else may read"
        async with Upstream(answer) as upstream, gateway(upstream.url, METRICS_CONFIG) as running:
            body = {**chat(), "messages": [{"role": "user", "content": secret}], "identity": {"id": "user-77"}}
            await ask(running.port, body, headers={"Authorization": "Bearer sk-client-0123456789"})
            text = (await get(running, "/metrics")).body.decode()
        assert "penstock_requests_total{" in text
        for word in (secret, "sk-client", "sk-upstream", "user-77", upstream.url, "Hi"):
            assert word not in text, word


def totals(series: Series, *labels: str) -> Series:
    """The series summed over all labels but these."""
    found: Series = {}
    for (name, having), value in series.items():
        key = (name, frozenset((label, text) for label, text in having if label in labels))
        found[key] = found.get(key, 0.0) + value
    return found


def test_the_docs_describe_every_metric_with_its_labels() -> None:
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    rows = {match[1]: match[2] for match in re.finditer(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE)}
    for row in TABLE.values():
        assert set(re.findall(r"`(\w+)`", rows[row.name])) == set(row.labels), row.name


PRICES = Prices({})


async def test_the_page_has_every_figure_of_a_gateway_with_everything_on_and_no_other(tmp_path: Path) -> None:
    """Both ways: what a scrape has stands in docs/metrics.md, and what stands there has its name in the code."""
    shipped = (ROOT / "config.yaml").read_text(encoding="utf-8")
    onion = re.sub(r"^  # - ", "  - ", shipped[shipped.index("\nmiddleware:") :], flags=re.MULTILINE)
    onion = re.sub(r"\n  - auth: .*", "\n  - auth: {keys: [{name: web, key: key-0123456789abcdef, admin: true}]}", onion)
    text = f'server: {{port: 0}}\ndata_dir: "{tmp_path}"\nproviders: {{demo: {{api: demo}}}}\n'
    text += onion.replace("openai/text-embedding-3-small", "demo/embed")
    async with Gateway(parse(text, {}, MIDDLEWARE)) as running:
        got = await ask(running.port, chat("demo/fast"), headers={"Authorization": "Bearer key-0123456789abcdef"})
        assert got.status == 200
        scrape = (await get(running, "/metrics", "Bearer key-0123456789abcdef")).body.decode()
    names = re.findall(r"^# TYPE ((?:penstock|gen_ai)_\w+) ", scrape, re.MULTILINE)
    shown = {name for name in names if not name.endswith("_created")}
    assert len(shown) > 60
    told = set(re.findall(r"`((?:penstock|gen_ai)_\w+)`", (ROOT / "docs/metrics.md").read_text(encoding="utf-8")))
    told -= {label for row in TABLE.values() for label in row.labels}
    assert shown - told == set()
    code = "".join(path.read_text() for folder in ("proxy", "middleware") for path in (ROOT / folder).rglob("*.py"))
    # What counts by reason is only there once there was one; so its name is looked for where it is written.
    assert [name for name in told - shown if f'"{name}"' not in code] == []
