"""What several workers answer, made one (pages of metrics are held against prometheus_client's parser); limits in parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.pipeline import Surroundings
from proxy.workers.answers import added
from proxy.workers.exposition import STEP, Page, labelled
from proxy.workers.restarts import Restarts

Series = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
LABEL = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=6) | st.sampled_from(
    ['"', "\\", "\n", " 1", "} 2"]
)
AMOUNT = st.integers(0, 2**40) | st.floats(0, 1e12)
COUNTS = st.dictionaries(LABEL, AMOUNT, max_size=4)
OBSERVED = st.dictionaries(LABEL, st.lists(st.floats(0, 100), max_size=4), max_size=3)
PARTS = st.lists(st.tuples(COUNTS, COUNTS, OBSERVED), min_size=1, max_size=4)


def written(counts: Mapping[str, float], gauges: Mapping[str, float], observed: Mapping[str, list[float]]) -> str:
    """One worker's page."""
    registry = CollectorRegistry()
    counter = Counter("asked", "Asked for.", ["who"], registry=registry)
    gauge = Gauge("open", "Open\nnow.", ["who"], registry=registry)
    histogram = Histogram("took_seconds", "Took.", ["who"], registry=registry, buckets=(0.5, 10))
    Gauge("build_info", "Always 1.", ["version"], registry=registry).labels("1").set(1)
    Gauge("process_open_fds", "Files.", registry=registry).set(7)
    for who, amount in counts.items():
        counter.labels(who).inc(amount)
    for who, amount in gauges.items():
        gauge.labels(who).set(amount)
    for who, values in observed.items():
        for value in values:
            histogram.labels(who).observe(value)
    return generate_latest(registry).decode()


def merged(texts: Iterable[str]) -> str:
    page = Page()
    for number, text in enumerate(texts):
        list(page.add(text, str(number)))
    return "".join(page.write())


def read(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The page as prometheus_client understands it, without when series began."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def described(text: str) -> set[tuple[str, str, str]]:
    found = {(family.name, family.type, family.documentation) for family in text_string_to_metric_families(text)}
    return {(name, kind, words) for name, kind, words in found if not name.endswith("_created")}


@given(PARTS)
def test_every_series_is_the_sum_of_the_parts(parts: list[tuple[dict, dict, dict]]) -> None:
    texts = [written(*part) for part in parts]
    expected: dict = {}
    for number, text in enumerate(texts):
        for (name, labels), value in read(text).items():
            own = (*labels, ("worker", str(number))) if name.startswith("process_") else labels
            expected[name, own] = expected.get((name, own), 0) + value if name != "build_info" else 1
    assert read(merged(texts)) == expected


@given(PARTS)
def test_kinds_and_help_are_kept(parts: list[tuple[dict, dict, dict]]) -> None:
    texts = [written(*part) for part in parts]
    assert described(merged(texts)) == described(texts[0])


@given(PARTS, st.lists(AMOUNT, min_size=4, max_size=4))
def test_growing_counters_have_growing_sums(parts: list[tuple[dict, dict, dict]], more: list[float]) -> None:
    """Also where floats round."""
    before = read(merged(written(counts, {}, {}) for counts, _, _ in parts))
    grown = ({who: amount + extra for who, amount in counts.items()} for (counts, _, _), extra in zip(parts, more, strict=False))
    after = read(merged(written(counts, {}, {}) for counts in grown))
    assert all(after[series] >= value for series, value in before.items())


@given(PARTS)
def test_what_lasts_are_counts_and_nothing_of_the_process(parts: list[tuple[dict, dict, dict]]) -> None:
    page = Page()
    list(page.add(written(*parts[0]), "0"))
    page.keep_lasting()
    kept = read("".join(page.write()))
    assert kept == {key: value for key, value in read(written(*parts[0])).items() if key[0].startswith(("asked", "took"))}


@given(PARTS)
def test_a_page_read_from_text_is_the_page(parts: list[tuple[dict, dict, dict]]) -> None:
    """A successor reads what its predecessor wrote."""
    once = merged(written(*part) for part in parts)
    page, again = Page(), Page()
    list(again.add(once))
    page.absorb(again)
    assert "".join(page.write()) == once


def test_a_fact_is_the_largest_and_not_the_sum() -> None:
    texts = [f'# HELP s_state x\n# TYPE s_state gauge\ns_state{{target="a"}} {value}\n' for value in (2, 0, 1)]
    assert read(merged(texts)) == {("s_state", (("target", "a"),)): 2}


def test_values_that_are_no_numbers_stay() -> None:
    text = "# HELP g x\n# TYPE g gauge\ng NaN\n# HELP h x\n# TYPE h gauge\nh +Inf\ni 3\n"
    assert merged([text]).splitlines()[2::3] == ["g NaN", "h +Inf"]


def test_a_label_is_put_where_labels_stand() -> None:
    assert labelled("a", "0") == 'a{worker="0"}'
    assert labelled("a{}", "0") == 'a{worker="0"}'
    assert labelled('a{b="}"}', "1") == 'a{b="}",worker="1"}'


def test_a_long_page_is_read_in_steps() -> None:
    text = "# TYPE a counter\n" + "".join(f'a_total{{n="{number}"}} 1\n' for number in range(3 * STEP))
    assert len(list(Page().add(text))) == 3


# JSON


def test_numbers_of_equal_shapes_are_added_up() -> None:
    shapes = [
        {"deleted": 3, "by": {"ttl": 1}, "all": True, "scope": "key"},
        {"deleted": 2, "by": {"ttl": 2}, "all": True, "scope": "key"},
    ]
    assert added(shapes) == {"deleted": 5, "by": {"ttl": 3}, "all": True, "scope": "key"}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 99)), min_size=1))
def test_what_only_some_have_is_added_up_too(values: list[dict[str, int]]) -> None:
    assert added(values) == {
        name: sum(value.get(name, 0) for value in values) for name in {name for value in values for name in value}
    }


# Parts of limits


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_the_parts_of_a_limit_are_the_limit(limit: int, workers: int) -> None:
    """Only a limit below the number of workers is exceeded, since each lets one through; nothing is nothing for all."""
    parts = [Surroundings((), lambda model: None, {}, workers, worker).share(limit) for worker in range(workers)]  # type: ignore[arg-type, return-value]
    assert sum(parts) == (max(limit, workers) if limit else 0)
    assert max(parts) - min(parts) <= 1


# Restarts


def test_a_worker_is_restarted_at_once_then_later_then_given_up() -> None:
    restarts = Restarts((0, 0.5, 1), window=60)
    assert [restarts.after(now) for now in (10, 11, 12, 13)] == [0, 0.5, 1, None]


def test_ends_that_are_long_ago_do_not_count() -> None:
    restarts = Restarts((0, 0.5), window=60)
    assert [restarts.after(now) for now in (0, 59, 61, 130)] == [0, 0.5, 0.5, 0]
