"""In which order targets are tried: each strategy by itself, with the dice and the prices in the test's hand."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.fallback.breaker import Policy
from middleware.fallback.choice import Choice, least, weighted
from middleware.fallback.prices import Prices
from middleware.fallback.targets import HALF_LIFE, Speed, Targets
from proxy.call import Provider, Route, Target

OPENAI = Provider("openai", "openai", "https://api.openai.com/v1", "k")
ANTHROPIC = Provider("claude", "anthropic", "https://api.anthropic.com/v1", "k")
OWN = Provider("own", "openai", "http://10.0.0.1/v1", "k")
DEAR, CHEAP, UNKNOWN = Target(OPENAI, "gpt-4o"), Target(OPENAI, "gpt-4o-mini"), Target(OWN, "no-such-model-x")

dice = st.floats(0, 1, exclude_max=True)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=8), dice)
def test_weighted_names_every_item_once_and_the_rest_by_weight(weights: list[float], drawn: float) -> None:
    found = weighted(range(len(weights)), weights, lambda: drawn)
    assert sorted(found) == list(range(len(weights)))
    rest = [weights[place] for place in found[1:]]
    assert rest == sorted(rest, reverse=True)


def test_weighted_draws_in_proportion_whatever_the_scale() -> None:
    drawn = random.Random(1)
    for scale in (1, 0.001, 1000):
        found = Counter(weighted("abc", [0.5 * scale, 0.3 * scale, 0.2 * scale], drawn.random)[0] for _ in range(20_000))
        assert [found[name] / 20_000 for name in "abc"] == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=8), st.tuples(dice, dice))
def test_least_latency_names_every_item_once_and_never_the_slowest_first(
    seconds: list[float], drawn: tuple[float, float]
) -> None:
    rolls = iter(drawn)
    found = least(range(len(seconds)), seconds, lambda: next(rolls))
    assert sorted(found) == list(range(len(seconds)))
    assert seconds[found[0]] < max(seconds) or seconds.count(max(seconds)) > 1
    assert [seconds[place] for place in found[1:]] == sorted(seconds[place] for place in found[1:])


def test_power_of_two_choices_does_not_send_everybody_to_the_fastest() -> None:
    drawn = random.Random(1)
    first = Counter(least("abcd", [1.0, 2.0, 3.0, 4.0], drawn.random)[0] for _ in range(6000))
    # of the six pairs, three have a, two have b but not a, one is (c, d)
    assert [first[name] / 6000 for name in "abcd"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0], abs=0.03)


def test_an_average_decays_so_that_a_slow_target_is_tried_again() -> None:
    speed = Speed()
    assert speed.average(0) == 0
    speed.record(8.0, 100.0)
    assert (speed.average(100.0), speed.average(100.0 + HALF_LIFE)) == (8.0, 4.0)


def test_p95_needs_twenty_samples_and_forgets_old_ones() -> None:
    speed = Speed()
    for number in range(19):
        speed.record(number / 100, 0.0)
    assert speed.p95(0.0) is None
    for number in range(19, 100):
        speed.record(number / 100, 0.0)
    assert speed.p95(0.0) == 0.95
    assert speed.p95(10_000.0) is None


async def test_cheapest_goes_by_the_kept_table_and_the_unknown_comes_last() -> None:
    route = Route("r", (UNKNOWN, DEAR, CHEAP), "cheapest")
    assert await ordered(route) == ["openai/gpt-4o-mini", "openai/gpt-4o", "own/no-such-model-x"]


async def test_the_operators_price_comes_before_the_tables() -> None:
    route = Route("r", (DEAR, CHEAP, UNKNOWN), "cheapest", (), (None, (100.0, 100.0), (0.0, 0.0)))
    assert await ordered(route) == ["own/no-such-model-x", "openai/gpt-4o", "openai/gpt-4o-mini"]


async def test_a_price_is_looked_up_once_and_known_by_url_or_by_api() -> None:
    prices = Prices()
    [openai, claude, unknown] = await prices.of([DEAR, Target(ANTHROPIC, "claude-haiku-4-5"), UNKNOWN])
    assert openai > claude > 0
    assert unknown == math.inf
    assert len(prices._known) == 3, "an unknown one too"


async def test_a_target_that_another_layer_took_out_is_not_asked_and_weights_stay_with_their_targets() -> None:
    route = Route("r", (DEAR, CHEAP, UNKNOWN), "weighted", (1.0, 1.0, 1000.0))
    assert await ordered(route, without=DEAR) == ["own/no-such-model-x", "openai/gpt-4o-mini"]


async def ordered(route: Route, *, without: Target | None = None) -> list[str]:
    def clock() -> float:
        return 0.0

    choice = Choice(Targets(Policy(), clock), lambda: 0.5, clock)
    here = {str(target): target for target in route.targets if target != without}
    return [str(target) for target in await choice.order(route, here, stream=True)]


async def test_least_latency_asks_the_faster_of_two() -> None:
    targets = Targets(Policy(), lambda: 0.0)
    targets.of(DEAR).speed.record(2.0, 0.0)
    targets.of(CHEAP).speed.record(0.1, 0.0)
    choice = Choice(targets, lambda: 0.0, lambda: 0.0)
    route = Route("r", (DEAR, CHEAP), "least_latency")
    found = await choice.order(route, {str(target): target for target in route.targets}, stream=True)
    assert found == [CHEAP, DEAR]
