"""From a request's JSON to a call: what is refused by path, whose word counts where several stand, and what never goes up."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy import admission
from proxy.admission import Defaults, admit, parse_json, request_id
from proxy.call import Call, Provider, Route, Target
from proxy.errors import Refused
from proxy.routing import Directory

Json = dict[str, Any]
ACME = Provider(name="acme", api="openai", base_url="http://127.0.0.1:9/v1")
DIRECTORY = Directory({"acme": ACME}, {"fast": Route("fast", (Target(ACME, "small"), Target(ACME, "big")))}, "acme")


def admitted(body: Json | None = None, headers: Json | None = None, defaults: Defaults | None = None, **fields: Any) -> Call:
    full = {"model": "acme/m", "messages": [], **(body or {}), **fields}
    return admit(full, "chat", CIMultiDict(headers or {}), DIRECTORY, defaults or Defaults(), "req_1")


def refused(body: Json | None = None, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        admitted(body, **fields)
    assert caught.value.param
    return caught.value


class TestParsing:
    @pytest.mark.parametrize("body", [b"", b"{", b"nul", b"{'a': 1}", b'{"a": NaN}', b'{"a": "\xff"}', b"{} {}", b"<a/>"])
    def test_what_is_no_json_is_a_400(self, body: bytes) -> None:
        with pytest.raises(Refused) as caught:
            parse_json(body, 64)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")

    @pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"text"', b"[{}]"])
    def test_json_that_is_no_object_is_a_400(self, body: bytes) -> None:
        with pytest.raises(Refused) as caught:
            parse_json(body, 64)
        assert caught.value.status == 400

    @pytest.mark.parametrize(
        "make", [lambda n: b'{"a":' * n + b"1" + b"}" * n, lambda n: b'{"a":' + b"[" * (n - 1) + b"]" * (n - 1) + b"}"]
    )
    @pytest.mark.parametrize("limit", [4, 64])
    def test_a_body_may_be_nested_as_deep_as_the_limit_and_no_deeper(self, make: Any, limit: int) -> None:
        assert parse_json(make(limit), limit)
        with pytest.raises(Refused) as caught:
            parse_json(make(limit + 1), limit)
        assert (caught.value.status, caught.value.code) == (400, "too_deep")

    def test_brackets_in_text_and_wide_bodies_are_not_deep(self) -> None:
        wide = {"a": "[{" * 500, "b": [{"c": [1]}] * 500}
        assert parse_json(json.dumps(wide).encode(), 4) == wide

    @pytest.mark.parametrize("depth", [300, 2000, 200_000])
    def test_a_body_nested_beyond_all_measure_is_a_400_and_no_crash(self, depth: int) -> None:
        with pytest.raises(Refused) as caught:
            parse_json(b'{"a":' * depth + b"1" + b"}" * depth, 512 if depth > 512 else 64)
        assert caught.value.status == 400


class TestRequestId:
    @pytest.mark.parametrize("sent", ["a", "req-1:2.3_x", "0" * 128])
    def test_a_sane_one_of_the_client_is_kept(self, sent: str) -> None:
        assert request_id(CIMultiDict({"X-Request-ID": sent})) == sent

    @pytest.mark.parametrize("sent", ["", "a b", "a\nb", "0" * 129, "é", "<x>", "a\n", None])
    def test_any_other_is_replaced_by_a_new_one(self, sent: str | None) -> None:
        got = request_id(CIMultiDict({} if sent is None else {"x-request-id": sent}))
        assert got != sent
        assert got.startswith("req_")
        assert got != request_id(CIMultiDict())


class TestCall:
    def test_what_the_client_asked(self) -> None:
        before = int(time.time())
        call = admitted({"model": "fast", "stream": True, "temperature": 0.5, "x": None}, headers={"A": "b"})
        assert (call.id, call.kind, call.model, call.stream) == ("req_1", "chat", "fast", True)
        assert call.request == {"model": "fast", "messages": [], "stream": True, "temperature": 0.5, "x": None}
        assert [str(target) for target in call.targets] == ["acme/small", "acme/big"]
        assert before <= call.created <= time.time()
        assert call.headers["a"] == "b"

    def test_two_calls_with_one_request_id_have_different_nonces(self) -> None:
        random.seed(1)
        assert admitted().nonce != admitted().nonce

    @pytest.mark.parametrize("model", [None, "", 5, ["m"], {"a": 1}])
    def test_a_model_that_is_no_name_is_a_400(self, model: Any) -> None:
        got = refused(model=model)
        assert (got.status, got.param) == (400, "model")

    def test_a_request_without_a_model_is_a_400(self) -> None:
        with pytest.raises(Refused) as caught:
            admit({"messages": []}, "chat", CIMultiDict(), DIRECTORY, Defaults(), "r")
        assert (caught.value.status, caught.value.param) == (400, "model")

    def test_an_unknown_model_is_a_404(self) -> None:
        assert refused(model="nobody/m").status == 404

    @pytest.mark.parametrize("stream", ["true", 1, [], {}])
    def test_stream_is_true_or_false(self, stream: Any) -> None:
        assert refused(stream=stream).param == "stream"

    def test_stream_null_is_false(self) -> None:
        assert admitted(stream=None).stream is False

    @pytest.mark.parametrize("n", [0, -1, 129, 1.5, "2", True, [1]])
    def test_n_is_a_number_of_choices(self, n: Any) -> None:
        assert refused(n=n).param == "n"

    @pytest.mark.parametrize("n", [None, 1, 128])
    def test_n_in_bounds_passes(self, n: Any) -> None:
        assert admitted(n=n).request["n"] == n

    def test_the_body_stays_as_it_was(self) -> None:
        body = {"model": "acme/m", "messages": [], "name": "n", "orq": {"name": "m"}}
        before = json.loads(json.dumps(body))
        admitted(body)
        assert body == before


OWN_FIELDS = [
    "penstock", "orq", "name", "cache", "timeout", "retry", "fallbacks", "models", "load_balancer", "identity", "contact",
    "thread", "usage_placement", "strict_params",
]  # fmt: skip


class TestOwnFields:
    @pytest.mark.parametrize("field", OWN_FIELDS)
    def test_none_of_them_is_sent_upstream(self, field: str) -> None:
        """Section 2: none of these is sent upstream, `metadata` alone also goes on."""
        value = {"penstock": {}, "orq": {}, "name": "n", "usage_placement": "finish", "strict_params": True}.get(field)
        assert field not in admitted({field: value, "metadata": {"a": "b"}}).request
        assert admitted({field: value, "metadata": {"a": "b"}}).request["metadata"] == {"a": "b"}

    @pytest.mark.parametrize("place", ["orq", "penstock"])
    @pytest.mark.parametrize("value", [[], "x", 5, True])
    def test_the_place_for_them_is_an_object(self, place: str, value: Any) -> None:
        assert refused({place: value}).param == place

    @pytest.mark.parametrize("place", ["orq", "penstock"])
    def test_null_is_no_place(self, place: str) -> None:
        assert admitted({place: None}).name is None

    @pytest.mark.parametrize(
        ("body", "headers", "expected"),
        [
            ({"name": "top"}, {}, "top"),
            ({"penstock": {"name": "own"}}, {}, "own"),
            ({"orq": {"name": "orq"}}, {}, "orq"),
            ({"orq": {"tracking": {"name": "tracked"}}}, {}, "tracked"),
            ({}, {"X-Penstock-Name": "header"}, "header"),
            ({}, {"x-penstock-name": "header"}, "header"),
            ({"name": "top", "penstock": {"name": "own"}, "orq": {"name": "orq"}}, {"X-Penstock-Name": "h"}, "top"),
            ({"name": "top", "orq": {"tracking": {"name": "tracked"}}}, {}, "top"),
            ({"penstock": {"name": "own"}, "orq": {"name": "orq", "tracking": {"name": "t"}}}, {}, "own"),
            ({"name": None, "penstock": {"name": "own"}}, {}, "own"),
            ({"penstock": {"name": None}, "orq": {"name": "orq"}}, {}, "orq"),
            ({"orq": {"tracking": {"name": None}, "name": "orq"}}, {}, "orq"),
            ({"orq": {"tracking": None}}, {}, None),
            ({}, {"X-Penstock-Name": ""}, None),
            ({}, {}, None),
        ],
    )
    def test_the_first_place_that_names_the_call_counts(self, body: Json, headers: Json, expected: str | None) -> None:
        """Top level, then penstock, then orq; then the header."""
        assert admitted(body, headers=headers).name == expected

    @pytest.mark.parametrize(
        ("body", "path"),
        [
            ({"name": 5}, "name"),
            ({"name": ["n"]}, "name"),
            ({"name": "x" * 129}, "name"),
            ({"penstock": {"name": 5}}, "penstock.name"),
            ({"orq": {"name": 5}}, "orq.name"),
            ({"orq": {"tracking": "n"}}, "orq.tracking"),
            ({"orq": {"tracking": {"name": 5}}}, "orq.tracking.name"),
            ({"stream_options": True}, "stream_options"),
            ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
            ({"usage_placement": "top"}, "usage_placement"),
            ({"usage_placement": {"a": 1}}, "usage_placement"),
            ({"orq": {"usage_placement": "top"}}, "orq.usage_placement"),
            ({"strict_params": "yes"}, "strict_params"),
            ({"penstock": {"strict_params": 1}}, "penstock.strict_params"),
        ],
    )
    def test_a_field_of_the_wrong_shape_is_a_400_with_its_path(self, body: Json, path: str) -> None:
        got = refused(body)
        assert (got.status, got.param) == (400, path)

    def test_a_name_may_be_128_characters_long(self) -> None:
        assert admitted(name="x" * 128).name == "x" * 128


HEADERS = st.dictionaries(
    st.sampled_from(["X-Penstock-Name", "X-ORQ-IDENTITY-ID", "X-ORQ-CONTACT-ID"]), st.sampled_from(["", "a", "b"])
)
NAMES = ["n", "stream", "stream_options", "tracking", "metadata", "x", *OWN_FIELDS]
VALUES: list[Any] = [
    None, True, False, 1, "a", "finish", [], {}, {"id": "a"}, {"name": "a"}, {"tracking": {"name": "b"}, "identity": {"id": 5}},
    {"include_usage": True}, {"usage_placement": "finish", "strict_params": True},
]  # fmt: skip


class TestPlainRequests:
    @pytest.mark.parametrize("name", NAMES)
    @given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=2), HEADERS)
    def test_what_is_not_looked_for_would_not_have_been_found(self, name: str, others: Json, headers: Json) -> None:
        """The short way for a body without fields of the gateway's own gives the call, or the refusal, of the long one."""
        for value in VALUES:
            body = {**others, name: value}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(admission, "_unique", lambda: "0")
                short = outcome(body, headers)
                patch.setattr(admission, "READ_HERE", frozenset({"model"}))
                assert outcome(body, headers) == short

    def test_options_are_shared_where_they_are_the_same_and_nowhere_else(self) -> None:
        one, other = admitted(), admitted(stream_options={"include_usage": True})
        assert (one.options.include_usage, other.options.include_usage) == (False, True)
        assert admitted().options is one.options


def outcome(body: Json, headers: Json) -> object:
    """The call's facts but for its time, or the path and the words of the refusal."""
    try:
        return {**vars(admitted(body, headers=headers)), "created": 0}
    except Refused as error:
        return error.param, error.message


class TestOptions:
    def test_without_a_word_the_operators_defaults_count(self) -> None:
        options = admitted(defaults=Defaults(usage_on_finish=True, strict_params=True)).options
        assert (options.include_usage, options.usage_on_finish, options.strict_params) == (False, True, True)

    def test_the_request_wins_over_the_defaults(self) -> None:
        body = {"usage_placement": "chunk", "strict_params": False}
        options = admitted(body, defaults=Defaults(usage_on_finish=True, strict_params=True)).options
        assert (options.usage_on_finish, options.strict_params) == (False, False)

    @pytest.mark.parametrize("place", ["penstock", "orq", None])
    def test_they_may_stand_in_all_three_places(self, place: str | None) -> None:
        own = {"usage_placement": "finish", "strict_params": True}
        options = admitted({place: own} if place else own).options
        assert (options.usage_on_finish, options.strict_params) == (True, True)

    def test_the_top_level_wins_over_penstock_and_that_over_orq(self) -> None:
        body = {"orq": {"usage_placement": "finish"}, "penstock": {"usage_placement": "chunk"}}
        assert not admitted(body).options.usage_on_finish
        assert admitted({**body, "usage_placement": "finish"}).options.usage_on_finish

    def test_the_pauses_of_keep_alive_are_milliseconds_and_false_or_0_is_never(self) -> None:
        given = Defaults(keepalive_after=3.0, keepalive_interval=15.0)
        for own, after, interval in (
            ({}, 3.0, 15.0),
            ({"keepalive_after": 2500, "keepalive_interval": 5000}, 2.5, 5.0),
            ({"penstock": {"keepalive_after": 2500}}, 2.5, 15.0),
            ({"orq": {"keepalive_interval": False}}, 3.0, 0.0),
            ({"keepalive_after": False, "keepalive_interval": 0}, 0.0, 0.0),
            ({"keepalive_after": None}, 3.0, 15.0),
        ):
            call = admitted(own, defaults=given)
            assert (call.options.keepalive_after, call.options.keepalive_interval) == (after, interval), own
            assert not {"keepalive_after", "keepalive_interval", "penstock", "orq"} & set(call.request)

    @pytest.mark.parametrize(
        ("own", "param"),
        [
            ({"keepalive_after": 99}, "keepalive_after"),
            ({"keepalive_after": True}, "keepalive_after"),
            ({"keepalive_after": "2s"}, "keepalive_after"),
            ({"penstock": {"keepalive_after": 3_600_001}}, "penstock.keepalive_after"),
            ({"orq": {"keepalive_interval": 999}}, "orq.keepalive_interval"),
            ({"keepalive_interval": -1}, "keepalive_interval"),
        ],
    )
    def test_a_pause_out_of_bounds_is_refused_with_its_path(self, own: Json, param: str) -> None:
        with pytest.raises(Refused) as caught:
            admitted(own)
        assert caught.value.param == param

    @pytest.mark.parametrize(
        ("asked", "expected"), [({"include_usage": True}, True), ({"include_usage": False}, False), ({}, False), (None, False)]
    )
    def test_usage_is_asked_for_in_stream_options(self, asked: Json | None, expected: bool) -> None:
        call = admitted(stream_options=asked)
        assert call.options.include_usage is expected
        assert call.request["stream_options"] == asked
