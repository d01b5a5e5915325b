"""Errors of providers: the words in every shape, the status of an error inside a 200, and what a client may not see."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.call import Provider
from proxy.errors import GatewayError, Malformed, UpstreamError, UpstreamUnreachable
from proxy.faults import MESSAGE_LIMIT, ErrorWords, error_words, http_error, in_band_error, parse_error_body, presentable

KEY = "sk-upstream-0123456789"
ROW = Provider(name="acme", api="openai", base_url="https://llm.acme.example:8443/v1", api_key=KEY)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            {"error": {"message": "no", "type": "invalid_request_error", "param": "x", "code": "bad"}},
            ErrorWords("no", "invalid_request_error", "bad", "x"),
        ),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, ErrorWords("no", "overloaded_error")),
        (
            {"error": {"code": 429, "message": "no", "status": "RESOURCE_EXHAUSTED"}},
            ErrorWords("no", None, "RESOURCE_EXHAUSTED", None, 429),
        ),
        (
            [{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}],
            ErrorWords("no", None, "INVALID_ARGUMENT", None, 400),
        ),
        ({"error": {"message": "no", "code": "503"}}, ErrorWords("no", status=503)),
        ({"error": "no"}, ErrorWords("no")),
        ({"error": "Bad Request", "message": "no"}, ErrorWords("no")),
        ({"message": "no"}, ErrorWords("no")),
        ({"id": "x", "message": "no"}, ErrorWords("no")),
        ({"detail": "no"}, ErrorWords("no")),
        ({"detail": [{"msg": "no", "loc": ["body"]}]}, ErrorWords('[{"msg":"no","loc":["body"]}]')),
        (
            {"object": "error", "message": "no", "type": "BadRequestError", "code": 400},
            ErrorWords("no", "BadRequestError", status=400),
        ),
        ({"error": {"msg": "no"}}, ErrorWords("no")),
        ({"title": "no", "status": 404}, ErrorWords("no", status=404)),
        ({"error": {"message": None, "code": None}}, ErrorWords()),
        ({"error": {}}, ErrorWords()),
        ("no", ErrorWords("no")),
        (["no"], ErrorWords("no")),
        ([], ErrorWords()),
        (None, ErrorWords()),
        (5, ErrorWords()),
        ({"error": {"message": "no", "code": 200}}, ErrorWords("no", None, "200")),
        ({"error": {"message": "no", "code": True}}, ErrorWords("no", None, "True")),
    ],
)
def test_words_are_found_in_every_shape(found: Any, expected: ErrorWords) -> None:
    assert error_words(found) == expected


def test_a_gateways_raw_message_beside_its_own_is_kept_short() -> None:
    assert len(error_words({"error": {"message": "x" * 10_000}}).message) == MESSAGE_LIMIT
    assert len(error_words("x" * 10_000).message) == MESSAGE_LIMIT


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no"}}', "no"),
        (b"upstream connect error", "upstream connect error"),
        (b"  <html><body>502</body></html>", ""),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 10_000, "x" * MESSAGE_LIMIT),
        (b'{"error": {"mess', '{"error": {"mess'),
    ],
)
def test_a_body_that_is_no_json_is_its_own_message_unless_it_is_html(body: bytes, message: str) -> None:
    assert parse_error_body(body).message == message


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=3),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["error", "message", "code", "status", "type", "detail", "param"]), inner, max_size=4),
    ),
)


@given(ANY_JSON)
def test_no_json_makes_it_raise_and_the_error_is_always_whole(found: Any) -> None:
    error = in_band_error(error_words(found))
    assert 400 <= error.status <= 599
    assert error.message
    assert isinstance(error.message, str)
    assert isinstance(error.type, str)
    assert isinstance(error.code, str)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (ErrorWords("no", status=418), 418),
        (ErrorWords("no", type="rate_limit_error"), 429),
        (ErrorWords("no", code="rate_limit_exceeded"), 429),
        (ErrorWords("no", type="insufficient_quota"), 429),
        (ErrorWords("no", code="RESOURCE_EXHAUSTED"), 429),
        (ErrorWords("no", type="throttlingException"), 429),
        (ErrorWords("no", type="too_many_requests"), 429),
        (ErrorWords("no", type="overloaded_error"), 503),
        (ErrorWords("no", code="UNAVAILABLE"), 503),
        (ErrorWords("no", type="service_unavailable"), 503),
        (ErrorWords("no", type="server_error"), 502),
        (ErrorWords("no", code="INTERNAL"), 502),
        (ErrorWords("no"), 502),
        (ErrorWords("rate limit is not my type"), 502),
    ],
)
def test_an_error_inside_a_200_takes_its_own_code_else_one_by_its_type(words: ErrorWords, status: int) -> None:
    error = in_band_error(words)
    assert (error.status, error.message) == (status, words.message)
    assert error.native_status == status


@pytest.mark.parametrize("status", [400, 404, 408, 413, 422, 429, 500, 503, 529])
def test_a_status_of_the_upstream_is_passed_on(status: int) -> None:
    error = http_error(status, {}, b'{"error": {"message": "no", "code": 401}}')
    assert (error.status, error.message) == (status, "no")


@pytest.mark.parametrize("status", [301, 304, 307, 600, 999])
def test_a_status_that_is_no_error_status_becomes_502(status: int) -> None:
    assert http_error(status, {}, b"").status == 502


def test_an_empty_or_html_error_still_says_something() -> None:
    assert http_error(503, {}, b"<html>").message == "The provider answered with status 503."


def test_retry_after_is_kept_and_other_headers_are_not() -> None:
    headers = {"retry-after": "7", "retry-after-ms": "7000", "set-cookie": "s"}
    assert dict(http_error(429, headers, b"").headers) == {"retry-after": "7", "retry-after-ms": "7000"}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_our_own_key_is_a_502_without_the_providers_words(status: int) -> None:
    """Section 5: 401/403 on our key reaches the client as 502 upstream_auth without the upstream's text."""
    error = http_error(
        status, {}, b'{"error": {"message": "Incorrect key sk-1...89, see https://acme", "type": "t", "code": "c"}}'
    )
    shown = presentable(error, ROW)
    assert isinstance(shown, UpstreamError)
    assert (shown.status, shown.code, shown.native_status) == (502, "upstream_auth", status)
    assert "acme" in shown.message
    assert "sk-" not in shown.message
    assert "Incorrect" not in str(shown.envelope())


def test_a_refusal_of_our_own_key_inside_a_200_is_hidden_as_well() -> None:
    shown = presentable(in_band_error(error_words({"error": {"code": 401, "message": "bad key"}})), ROW)
    assert (shown.status, shown.code) == (502, "upstream_auth")
    assert "bad key" not in shown.message


@pytest.mark.parametrize(
    "said",
    [
        f"key {KEY} is over its limit",
        "cannot reach https://llm.acme.example:8443/v1/chat/completions",
        "cannot reach llm.acme.example:8443",
        "no such host llm.acme.example",
        "see HTTPS://LLM.ACME.EXAMPLE:8443/v1",
    ],
)
@pytest.mark.parametrize("kind", [UpstreamError, Malformed, UpstreamUnreachable])
def test_key_and_host_are_taken_out_of_every_other_message(said: str, kind: type[GatewayError]) -> None:
    """Section 5: passed on with its message, never with the upstream's key or URL."""
    shown = presentable(kind(said), ROW)
    assert KEY not in shown.message
    assert "acme.example" not in shown.message.lower()
    assert KEY not in str(shown.envelope())


@pytest.mark.parametrize("field", ["type", "code", "param"])
def test_key_and_host_are_taken_out_of_the_other_fields_too(field: str) -> None:
    error = http_error(400, {}, f'{{"error": {{"message": "no", "{field}": "{KEY} at llm.acme.example:8443"}}}}'.encode())
    shown = str(presentable(error, ROW).envelope())
    assert KEY not in shown
    assert "acme.example" not in shown


def test_a_message_that_says_nothing_secret_stays_as_it_is() -> None:
    error = http_error(400, {}, b'{"error": {"message": "max_tokens: 5 is too small", "param": "max_tokens"}}')
    shown = presentable(error, Provider(name="x", api="openai", base_url="demo:"))
    assert shown is error
    assert (shown.message, shown.param) == ("max_tokens: 5 is too small", "max_tokens")
