"""The key of the cache: equal for the same question however it is written, different where the answer could differ."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from middleware.cache import Cache
from middleware.cache.asked import Asked
from proxy.admission import GATEWAY_FIELDS, Defaults, Readers, admit
from proxy.call import Call, Options, Principal
from proxy.question import Keyed, question_key, scope_of
from proxy.routing import Directory
from tests.support.decoding import make_call, make_target

Json = dict[str, Any]

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
DELIVERY = frozenset({"stream", "stream_options", "metadata"})
OWN = GATEWAY_FIELDS | {"replay"}
NAMES = st.sampled_from(["temperature", "seed", "tools", "n", "user", "top_p", "stop", "thinking", "logit_bias"]) | st.text(
    min_size=1
)
PARAMETERS = st.dictionaries(NAMES.filter(lambda name: name not in DELIVERY | OWN), VALUES, max_size=5)
PROVIDER = make_target("openai").provider
DIRECTORY = Directory({"openai": PROVIDER}, {}, "openai", 0)


def key(request: Json, scope: str | None = "s", routing: Json | None = None, **fields: Any) -> str:
    return question_key(make_call(request, **fields), routing or {}, scope)


def shuffled(value: Any, dice: random.Random) -> Any:
    """The same JSON with the fields of every object in another order."""
    if isinstance(value, dict):
        items = [(name, shuffled(inner, dice)) for name, inner in value.items()]
        dice.shuffle(items)
        return dict(items)
    return [shuffled(inner, dice) for inner in value] if isinstance(value, list) else value


def written(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


@given(request=PARAMETERS, dice=st.randoms(use_true_random=False))
def test_reordered_json_is_the_same_question(request: Json, dice: random.Random) -> None:
    assert key(request) == key(shuffled(request, dice))


@given(request=PARAMETERS)
def test_white_space_and_escapes_are_no_difference(request: Json) -> None:
    again = orjson.loads(orjson.dumps(request, option=orjson.OPT_INDENT_2))
    assert key(again) == key(request)


@given(one=PARAMETERS, other=PARAMETERS)
def test_two_requests_have_one_key_only_if_they_are_one_json(one: Json, other: Json) -> None:
    assert (key(one) == key(other)) == (written(one) == written(other))


@given(request=PARAMETERS, name=NAMES.filter(lambda name: name not in DELIVERY | OWN), value=VALUES)
def test_any_parameter_that_is_added_or_changed_makes_another_question(request: Json, name: str, value: Any) -> None:
    changed = {**request, name: value}
    assume(name not in request or written(request[name]) != written(value))
    assert key(changed) != key(request)


@given(request=PARAMETERS, dice=st.data())
def test_a_change_deep_inside_makes_another_question(request: Json, dice: st.DataObject) -> None:
    deep: Json = {"tools": [{"function": {"parameters": {"properties": request}}}]}
    other = copy.deepcopy(deep)
    other["tools"][0]["function"]["parameters"]["properties"][dice.draw(st.text())] = "changed, by something no strategy draws"
    assert key(deep) != key(other)


@given(request=PARAMETERS, delivery=st.fixed_dictionaries({}, optional=dict.fromkeys(DELIVERY, VALUES)))
def test_how_the_answer_is_delivered_and_labelled_is_no_part_of_the_question(request: Json, delivery: Json) -> None:
    assert key({**request, **delivery}) == key(request)


@given(request=PARAMETERS, one=st.none() | st.text(), other=st.none() | st.text())
def test_the_same_question_of_two_scopes_never_has_one_key(request: Json, one: str | None, other: str | None) -> None:
    """`shared` (None) is a scope of its own: it is never mistaken for a key whose scope is empty."""
    assert (key(request, one) == key(request, other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), ("", None), (0, -0.0), (True, 1), ("1", 1), ([], {}), ("é", "e\u0301"), ([1, 2], [2, 1])],
)
def test_in_doubt_two_values_are_two(one: Any, other: Any) -> None:
    assert key({"x": one}) != key({"x": other})


def test_null_is_not_absence() -> None:
    assert key({"x": None}) != key({})


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "completions"},
        {"kind": "embeddings"},
        {"model": "other"},
        {"options": Options(strict_params=True)},
    ],
)
def test_kind_model_and_strictness_are_part_of_it(other: Json) -> None:
    call = make_call()
    assert question_key(replace(call, **other), {}, "s") != question_key(call, {}, "s")


@pytest.mark.parametrize(
    "other",
    [
        {"id": "req_2"},
        {"nonce": "ffff"},
        {"created": 5},
        {"name": "bot"},
        {"identity": "ann"},
        {"stream": True},
        {"deadline": 1.0},
        {"headers": {"authorization": "Bearer x"}},
        {"options": Options(include_usage=True, usage_on_finish=True)},
        {"principal": Principal("other")},
    ],
)
def test_who_asks_when_and_how_is_not(other: Json) -> None:
    """The scope is handed in; a principal's other facts make no difference."""
    call = make_call()
    assert question_key(replace(call, **other), {}, "s") == question_key(call, {}, "s")


def test_the_key_shows_nothing_of_the_question() -> None:
    found = key({"messages": [{"role": "user", "content": "secret"}]})
    assert len(found) == 64
    assert set(found) <= set("0123456789abcdef")


# --- through admission: where the gateway's own fields stand makes no difference, what they say about who answers does


def admitted(fields: Json) -> str:
    """The key that the cache itself would use for this request."""
    layer = Cache(mode="opt_out")
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    call: Call = admit(body, "chat", {}, DIRECTORY, Defaults(), "req_1", Principal(), Readers.of([layer]))
    asked = call.extension(Asked)
    assert asked is not None
    return question_key(call, asked.routing, "")


ROUTINGS: list[Json] = [
    {"fallbacks": ["a/x"]},
    {"fallbacks": ["a/y"]},
    {"models": ["a/x"]},
    {"load_balancer": {"type": "weight_based", "models": [{"model": "a/x", "weight": 1}]}},
]


def test_who_may_answer_is_part_of_the_question() -> None:
    assert len({admitted(fields) for fields in [{}, *ROUTINGS]}) == 1 + len(ROUTINGS)


@pytest.mark.parametrize("fields", ROUTINGS)
@pytest.mark.parametrize("place", [lambda own: {"orq": own}, lambda own: {"penstock": own}], ids=["orq", "penstock"])
def test_where_it_stands_is_not(fields: Json, place: Callable[[Json], Json]) -> None:
    assert admitted(fields) == admitted(place(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "bot"},
        {"orq": {"tracking": {"name": "bot"}}},
        {"timeout": {"call_timeout": 5}},
        {"retry": {"count": 2}},
        {"identity": {"id": "ann"}},
        {"thread": {"id": "t"}},
        {"metadata": {"k": "v"}},
        {"cache": {"type": "exact_match", "ttl": 5}},
        {"replay": "recorded"},
        {"usage_placement": "finish"},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_tracking_timeouts_retries_and_the_cache_itself_are_not(fields: Json) -> None:
    assert admitted(fields) == admitted({})


# --- whose answer it is, and keys that are known


@pytest.mark.parametrize(("shared", "callers_key", "expected"), [(False, False, "s"), (True, False, None), (True, True, "s")])
def test_what_a_callers_own_provider_key_paid_for_is_never_shared(shared: bool, callers_key: bool, expected: str | None) -> None:
    target = make_target("openai", callers_key=callers_key)
    assert scope_of(make_call({}, targets=(target,), principal=Principal(scope="s")), shared) == expected


def test_a_known_key_holds_for_the_same_call_alone() -> None:
    """Whoever alters the question on its way in gets a key of its own."""
    call = make_call({"seed": 1})
    known = replace(call, extensions={Keyed: Keyed(call, {}, "s", "the key")})
    assert question_key(known, {}, "s") == "the key"
    assert question_key(replace(known, name="x", stream=True), {}, "s") == "the key"
    others = [
        question_key(replace(known, request={"seed": 2}), {}, "s"),
        question_key(replace(known, model="other"), {}, "s"),
        question_key(replace(known, kind="completions"), {}, "s"),
        question_key(replace(known, options=Options(strict_params=True)), {}, "s"),
        question_key(known, {}, None),
        question_key(known, {"models": ["a/b"]}, "s"),
    ]
    assert "the key" not in others
    assert len(set(others)) == 6
