"""Our own figures beside prometheus_client's: the page is the same, it shows one moment, and what is remembered is bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import middleware.metrics.series
from middleware.metrics.families import PIECE, TABLE, Families, Row
from middleware.metrics.labels import Labels
from middleware.metrics.later import MOST, Later
from middleware.metrics.samples import page
from middleware.metrics.series import Index
from proxy.call import Call, Principal, Route
from proxy.errors import Outcome
from tests.support.decoding import make_call, make_target

HISTOGRAMS = [key for key, row in TABLE.items() if row.buckets]
COUNTERS = [key for key, row in TABLE.items() if row.name.endswith("_total")]
WORDS = st.text(max_size=5)  # no half characters, which labels.py keeps out


class Theirs:
    """The same table in prometheus_client's own classes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.made: dict[str, Any] = {key: self._made(row) for key, row in TABLE.items()}

    def _made(self, row: Row) -> Any:
        if row.buckets:
            return Histogram(row.name, row.help, row.labels, registry=self.registry, buckets=row.buckets)
        return (Counter if row.name.endswith("_total") else Gauge)(row.name, row.help, row.labels, registry=self.registry)

    def lines(self) -> list[str]:
        return shown(generate_latest(self.registry))


def shown(text: bytes) -> list[str]:
    """The lines of the table's metrics but `build_info`, without the moments at which series began, which are never shown."""
    found, hidden = [], False
    for line in text.decode().split("\n"):
        if line.startswith("#"):
            hidden = "_created" in line or "process_" in line or "build_info" in line
        if not hidden:
            found.append(line)
    return [line for line in found if line]


async def ours(families: Families) -> list[str]:
    return shown(await page(families, []))


class TestTheSameAsPrometheusClient:
    @given(st.data())
    async def test_histograms_show_what_its_histograms_show_for_any_values(self, data: Any) -> None:
        """Values on a bound, below the first one, above the last one and infinite too."""
        families, theirs = Families(), Theirs()
        for _ in range(data.draw(st.integers(0, 5))):
            key = data.draw(st.sampled_from(HISTOGRAMS))
            row = TABLE[key]
            labels = [data.draw(WORDS) for _ in row.labels]
            values = st.one_of(st.sampled_from(row.buckets), st.floats(allow_nan=False), st.integers(-(10**9), 10**9))
            for value in data.draw(st.lists(values, min_size=1, max_size=20)):
                getattr(families, key)(*labels).observe(value)
                theirs.made[key].labels(*labels).observe(value)
        assert await ours(families) == theirs.lines()

    @given(st.lists(st.tuples(st.sampled_from(COUNTERS), st.integers(0, 3), st.floats(0, 1e18) | st.integers(0, 2**52))))
    async def test_counters_show_what_its_counters_show(self, increases: list[Any]) -> None:
        families, theirs = Families(), Theirs()
        for key, word, amount in increases:
            labels = [f'{word}"\\\n'] * len(TABLE[key].labels)
            getattr(families, key)(*labels).inc(amount)
            theirs.made[key].labels(*labels).inc(amount)
        assert await ours(families) == theirs.lines()

    @given(st.lists(st.sampled_from([1, -1])))
    async def test_the_gauge_of_open_streams_rises_and_falls_as_its_gauge(self, steps: list[int]) -> None:
        families, theirs = Families(), Theirs()
        for step in steps:
            families.open_streams.inc(step)
            theirs.made["open"].inc(step)
        assert await ours(families) == theirs.lines()


def samples(families: Families) -> list[Any]:
    """All samples of a scrape but the process' own."""
    return [sample for metric in families.collect() for sample in metric.samples if not metric.name.startswith("process_")]


class TestAScrape:
    def test_shows_one_moment_however_long_its_writing_takes(self) -> None:
        families = Families()

        def count(times: int) -> None:
            for _ in range(times):
                for number in range(300):
                    families.requests(str(number), "t", "k", "n", "200", "completed").inc()
                    families.gap(str(number), "t").observe(0.3)

        count(1)
        before = samples(families)
        during = []
        for metric in families.collect():
            during += [] if metric.name.startswith("process_") else metric.samples
            count(1)
        assert during == before
        assert samples(families) != before

    def test_no_piece_is_much_longer_than_what_is_written_in_one_go(self) -> None:
        families = Families()
        for number in range(500):
            families.requests(str(number), "t", "k", "n", "200", "completed").inc()
            families.duration("chat", "p", str(number), "").observe(1)
        lengths = [len(metric.samples) for metric in families.collect()]
        assert max(lengths) <= PIECE
        assert len([length for length in lengths if length > PIECE / 2]) >= 500 / PIECE + 500 * 18 / PIECE


def index(**bounds: int) -> Index:
    return Index(Families(), Labels(**{"max_names": 10, "max_models": 10, "max_sets": 100, **bounds}))


def asked(**fields: Any) -> Call:
    return make_call(**{"principal": Principal("web"), "route": Route("fast", ()), **fields})


class TestIndex:
    def test_a_call_like_an_earlier_one_is_found_by_one_look_up(self) -> None:
        find = index()
        first = find(asked(), "openai/m", Outcome.COMPLETED, 200, "", answered=True)
        find._labels = None  # type: ignore[assignment]
        assert find(asked(), "openai/m", Outcome.COMPLETED, 200, "", answered=True) is first

    @pytest.mark.parametrize(
        "other",
        [
            {"call": asked(name="bot")},
            {"call": asked(kind="completions")},
            {"call": asked(principal=Principal("app"))},
            {"call": asked(route=Route(None, ()))},
            {"target": "openai/n"},
            {"outcome": Outcome.CLIENT_GONE},
            {"status": 499},
            {"cache": "hit"},
        ],
    )
    def test_whatever_a_label_is_made_of_makes_another_series(self, other: dict[str, Any]) -> None:
        find = index()
        one: dict[str, Any] = {"call": asked(), "target": "openai/m", "outcome": Outcome.COMPLETED, "status": 200, "cache": ""}
        series = find(**one, answered=True)
        assert find(**{**one, **other}, answered=True) is not series

    def test_what_clients_invent_is_not_remembered_beyond_the_bounds_of_the_labels(self) -> None:
        find = index(max_names=3, max_models=4, max_sets=5)
        for number in range(200):
            for answered in (True, False):
                call = asked(name=f"n{number % 20}")
                find(call, f"openai/m{number}", Outcome.COMPLETED, 200, "", answered=answered)
        assert 0 < len(find._kept) <= 5

    def test_never_more_than_so_many_are_remembered_and_forgetting_loses_no_figure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(middleware.metrics.series, "KEPT", 7)
        find = index()
        for turn in range(3):
            for status in range(400, 420):
                find(asked(), "openai/m", Outcome.UPSTREAM_ERROR, status, "", answered=True).requests.inc()
                assert len(find._kept) <= 7
            figures = [figure for _, figure in find._families.requests.read()]
            assert figures == [turn + 1] * 20

    def test_a_target_that_nobody_knew_gets_its_label_when_it_answers(self) -> None:
        """So a series that became `other` is none to remember."""
        find = index()
        target = make_target("openai", "new")
        call = asked(route=Route(None, (target,)))
        for answered in (False, True):
            find(call, str(target), Outcome.CLIENT_GONE, 499, "", answered=answered).requests.inc()
        assert [values[1] for values, _ in find._families.requests.read()] == ["openai/other", "openai/new"]

    def test_what_never_happened_has_no_series(self) -> None:
        find = index()
        find(asked(), "openai/m", Outcome.COMPLETED, 200, "", answered=True).requests.inc()
        assert [len(found.read()) for found in (find._families.requests, find._families.cost, find._families.gap)] == [1, 0, 0]


class TestLater:
    @given(st.lists(st.one_of(st.none(), st.integers(1, 2 * MOST))))
    def test_each_is_counted_once_and_in_its_order_and_never_do_many_wait(self, steps: list[int | None]) -> None:
        """A number adds so many, None settles; every seventh fails."""
        done: list[int] = []

        def count(item: int) -> None:
            done.append(item)
            if item % 7 == 0:
                raise ZeroDivisionError

        later, added = Later(count), 0
        for step in steps:
            if step is None:
                later.settle()
                assert len(done) == added
            for _ in range(step or 0):
                added += 1
                later.add(added)
                assert 0 <= added - len(done) < MOST
        later.settle()
        assert done == list(range(1, added + 1))
