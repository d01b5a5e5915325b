"""auth: who is let in and for what, through real sockets; keys that leave no trace; a keys file that changes underneath.

Strategy: a running gateway with keys in each form is asked by raw requests and by the official SDK; what no socket shows (scopes,
the targets that a caller's key is put on, the keys file's states) is looked at in the middleware itself, with injected clocks.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import openai
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from middleware import TABLE
from middleware.auth import Auth, Key
from middleware.auth.allowance import Allowance
from middleware.auth.keys import NOBODY, Keyring, instant
from middleware.auth.keysfile import KeysFile
from proxy.app import Gateway
from proxy.call import Call, Provider, Route, Target
from proxy.config import ConfigError, json_schema, parse
from proxy.errors import Refused
from proxy.own_fields import OwnFields
from proxy.pipeline import Answer, Endpoint, Handler, Query, Surroundings
from proxy.reply import Reply
from tests.support.decoding import make_call
from tests.support.gateway import Answer as Got
from tests.support.gateway import RawClient, chat, gateway, raw_request
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]

PLAIN = "pk-plain-0123456789abcdef"
HASHED = "pk-hashed-0123456789abcdef"
ADMIN = "pk-admin-0123456789abcdef"
NARROW = "pk-narrow-0123456789abcdef"
OLD = "pk-old-0123456789abcdef"
PAGE = "pk-page-0123456789abcdef"
WRONG = "pk-wrong-0123456789abcdef"
CALLERS = "sk-or-callers-own-0123456789abcdef"
CONFIGURED = "sk-upstream-0123456789"

CONFIG = """
server: {{port: 0, admin_listen: "127.0.0.1:0"}}
default_provider: openai
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "{upstream_key}", models: [m]}}
  openrouter: {{api: openai, base_url: "{url}/v1", api_key: "${{UNSET_FOR_TEST}}", models: [r]}}
  both: {{api: openai, base_url: "{url}/v1", api_key: "{upstream_key}"}}
  demo: {{api: demo, models: [echo]}}
models: {{fast: openai/m, mixed: [openrouter/r, openai/m]}}
middleware:
  - tracking
  - auth:
      pass_through: [openrouter, both]
      keys:
        - {{name: web, key: "${{WEB_KEY}}"}}
        - {{name: hashed, key: "sha256:{hashed}", limits: {{requests_per_minute: 5}}, metadata: {{team: a}}}}
        - {{name: ops, key: "{admin}", admin: true}}
        - {{name: narrow, key: "{narrow}", models: [fast, demo/*]}}
        - {{name: old, key: "{old}", expires: 2020-01-01}}
        - name: page
          key: "{page}"
          origins: ["https://app.example", "https://*.app.example"]
          limits: {{requests_per_minute: 60, per_client: {{requests_per_minute: 6}}}}
  - probe
"""
FINISHED = json.dumps(
    {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
).encode()  # fmt: skip
STREAMED = stream(
    [
        b'data: {"id":"c","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}\n\n',
        b'data: {"id":"c","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    ]
)


class Probe:
    """Innermost: remembers each call, and serves an admin endpoint."""

    seen: list[Call]

    def __init__(self) -> None:
        self.seen = []
        self.endpoints = (Endpoint("GET", "/admin/probe", self.show, admin=True), Endpoint("GET", "/probe", self.show))

    async def __call__(self, call: Call, next: Handler) -> Reply:
        self.seen.append(call)
        return await next(call)

    async def show(self, query: Query) -> Answer:
        return Answer(query.principal.name.encode(), content_type="text/plain")


@asynccontextmanager
async def served(answer: Any = None) -> AsyncIterator[tuple[Gateway, Upstream, Probe]]:
    async with Upstream(answer or whole(FINISHED)) as upstream:
        fields = {
            "upstream_key": CONFIGURED,
            "hashed": sha256(HASHED.encode()).hexdigest(),
            "admin": ADMIN,
            "narrow": NARROW,
            "old": OLD,
            "page": PAGE,
        }
        config = CONFIG.format(url=upstream.url, **fields)
        checked = parse(config, {"WEB_KEY": PLAIN}, {**TABLE, "probe": Probe})
        async with Gateway(checked, settle=0.2) as running:
            probe = running.layers[-1]
            assert isinstance(probe, Probe)
            yield running, upstream, probe


async def sent(
    port: int, body: Json | bytes = b"", path: str = "/v1/chat/completions", method: str = "POST", **headers: str
) -> Got:
    async with RawClient(port) as client:
        await client.send(raw_request(body, path, method, **headers))
        return await client.answer()


def code(answer: Got) -> tuple[int, str, str]:
    assert answer.error is not None
    return answer.status, answer.error["type"], answer.error["code"]


WHOLE = chat(stream=False)


# Who asks


@pytest.mark.parametrize("key", [PLAIN, HASHED])
@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("Authorization", "Bearer {}"),
        ("authorization", "bearer  {} "),
        ("X-Api-Key", "{}"),
        ("x-api-key", " {}"),
        ("Api-Key", "{}"),
        ("superAgentKey", "{}"),
        ("SUPERAGENTKEY", "{}"),
    ],
)
async def test_a_key_is_taken_from_each_header(key: str, header: str, form: str) -> None:
    async with served() as (running, upstream, probe):
        answer = await sent(running.port, WHOLE, **{header: form.format(key)})
        assert answer.status == 200, answer.body
        assert probe.seen[0].principal.name == {PLAIN: "web", HASHED: "hashed"}[key]
        assert upstream.asked[0].headers["authorization"] == f"Bearer {CONFIGURED}"
        assert key not in str(upstream.asked[0])


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": "Bearer "}, "missing_api_key"),
        ({"Authorization": f"Basic {PLAIN}"}, "missing_api_key"),
        ({"Authorization": PLAIN}, "missing_api_key"),
        ({"Authorization": f"Bearer {WRONG}"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {PLAIN}x"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {PLAIN[:-1]}"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {PLAIN.upper()}"}, "invalid_api_key"),
        ({"Authorization": f"Bearer sha256:{sha256(PLAIN.encode()).hexdigest()}"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {sha256(HASHED.encode()).hexdigest()}"}, "invalid_api_key"),
        ({"Authorization": "Bearer k\u00e9y-with-other-letters"}, "invalid_api_key"),
        ({"x-api-key": WRONG}, "invalid_api_key"),
        ({"superAgentKey": WRONG, "Authorization": f"Bearer {PLAIN}"}, "invalid_api_key"),
        ({"superAgentKey": PLAIN, "Authorization": "Bearer two words"}, "invalid_provider_key"),
        ({"Authorization": f"Bearer {OLD}"}, "expired_api_key"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v3/router/embeddings", "/nowhere", "/probe", "/readyz?verbose"])
async def test_whoever_has_no_valid_key_gets_a_401_everywhere(headers: dict[str, str], expected: str, path: str) -> None:
    async with served() as (running, upstream, _):
        answer = await sent(running.port, WHOLE, path, **headers)
        assert code(answer) == (401, "authentication_error", expected)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.error is not None
        assert answer.error["param"] is None
        assert upstream.asked == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_the_two_health_paths_need_no_key(path: str) -> None:
    async with served() as (running, _, _probe):
        assert (await sent(running.port, path=path, method="GET")).status == 200


async def test_a_stranger_is_refused_before_the_body_is_read() -> None:
    async with served() as (running, upstream, _), RawClient(running.port) as client:
        head = raw_request(b"", Content_Length="1000000", Authorization=f"Bearer {WRONG}")
        await client.send(head)
        assert code(await client.answer()) == (401, "authentication_error", "invalid_api_key")
        assert upstream.asked == []


async def test_a_stranger_that_expects_100_continue_is_not_told_to_go_on() -> None:
    async with served() as (running, _, _probe), RawClient(running.port) as client:
        await client.send(raw_request(b"", Content_Length="1000000", Expect="100-continue"))
        assert (await client.answer()).status == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://app.example", 200),
        ("https://a.b.app.example", 200),
        ("", 403),
        ("null", 403),
        ("http://app.example", 403),
        ("https://app.example.evil.example", 403),
        ("https://app.example, https://evil.example", 403),
    ],
)
async def test_a_pages_key_works_from_its_pages_only(origin: str, status: int) -> None:
    async with served() as (running, upstream, _):
        answer = await sent(running.port, WHOLE, Authorization=f"Bearer {PAGE}", Origin=origin)
        assert answer.status == status
        if status == 403:
            assert code(answer) == (403, "permission_error", "origin_not_allowed")
            assert "WWW-Authenticate" not in answer.headers
            assert upstream.asked == []
        listed = await sent(running.port, path="/v1/models", method="GET", Authorization=f"Bearer {PAGE}", Origin=origin)
        assert listed.status == status


async def test_any_other_key_works_from_anywhere() -> None:
    async with served() as (running, _, _probe):
        for origin in ("", "https://evil.example"):
            assert (await sent(running.port, WHOLE, Authorization=f"Bearer {PLAIN}", Origin=origin)).status == 200


async def test_what_the_entry_says_travels_with_the_principal() -> None:
    async with served() as (running, _, probe):
        await sent(running.port, WHOLE, Authorization=f"Bearer {HASHED}")
        assert probe.seen[0].principal.facts == {"limits": {"requests_per_minute": 5}, "metadata": {"team": "a"}}
        assert not probe.seen[0].principal.admin
        await sent(running.port, WHOLE, Authorization=f"Bearer {PAGE}", Origin="https://app.example")
        limits = {"requests_per_minute": 60, "per_client": {"requests_per_minute": 6}}
        assert probe.seen[1].principal.facts == {"limits": limits}


def keyed(**fields: Any) -> Key:
    return Key(**{"name": "web", "key": PLAIN, **fields})


def bearer(key: str) -> CIMultiDict[str]:
    return CIMultiDict({"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("expires", "at", "valid"),
    [
        ("2027-01-01", "2026-12-31T23:59:59Z", True),
        ("2027-01-01", "2027-01-01T00:00:00Z", False),
        ("2027-01-01T12:00:00", "2027-01-01T11:59:59+00:00", True),
        ("2027-01-01T12:00:00", "2027-01-01T12:00:00+00:00", False),
        ("2027-01-01T12:00:00+02:00", "2027-01-01T10:00:00Z", False),
        ("", "9999-01-01", True),
    ],
)
def test_a_key_works_until_the_moment_it_expires(expires: str, at: str, valid: bool) -> None:
    auth = Auth(keys=(keyed(expires=expires),), _now=lambda: instant(at))
    if valid:
        assert auth.authenticate(bearer(PLAIN)).name == "web"
        return
    with pytest.raises(Refused) as caught:
        auth.authenticate(bearer(PLAIN))
    assert (caught.value.status, caught.value.code) == (401, "expired_api_key")


def test_a_short_key_never_matches_even_where_its_digest_is_configured() -> None:
    short = "a" * 15
    auth = Auth(keys=(keyed(key="sha256:" + sha256(short.encode()).hexdigest()),))
    with pytest.raises(Refused):
        auth.authenticate(bearer(short))


def test_a_hit_and_a_miss_compare_one_pair_of_digests_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant time: what is compared are digests, by compare_digest, whether or not there is such a key."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = Keyring([keyed(), keyed(name="b", key=HASHED)])
    own, wrong = sha256(PLAIN.encode()).digest(), sha256(WRONG.encode()).digest()
    assert ring.find(PLAIN) is not None
    assert ring.find(WRONG) is None
    assert compared == [(own, own), (NOBODY.digest, wrong)]


NAMES = st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True)
# No name and no scope has a "!", so a key that shows up somewhere is really the key.
KEYS = st.from_regex(r"![!-~]{15,40}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, KEYS), min_size=2, max_size=8, unique_by=(lambda e: e[0], lambda e: e[1])), KEYS, KEYS)
def test_no_two_keys_share_a_scope_nor_do_two_provider_keys(entries: list[tuple[str, str]], one: str, two: str) -> None:
    auth = Auth(keys=tuple(Key(name, key) for name, key in entries))
    again = Auth(keys=tuple(Key(name, "sha256:" + sha256(key.encode()).hexdigest()) for name, key in reversed(entries)))
    scopes = []
    for _, key in entries:
        for callers in sorted({"", one, two} - {key for _, key in entries}):
            headers = CIMultiDict({"superAgentKey": key, "Authorization": f"Bearer {callers}"})
            principal = auth.authenticate(headers)
            assert again.authenticate(headers).scope == principal.scope, "stable over restarts, order and form"
            assert key not in repr(principal)
            assert not callers or callers not in repr(principal)
            scopes.append(principal.scope)
    assert len(set(scopes)) == len(scopes)
    assert "" not in scopes


def test_a_key_under_another_name_has_another_scope() -> None:
    one, two = (Auth(keys=(keyed(name=name),)).authenticate(bearer(PLAIN)) for name in ("a", "b"))
    assert one.scope != two.scope


# What for


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "openai/m"}, "model"),
        ({"model": "m"}, "model"),
        ({"model": "mixed"}, "model"),
        ({"models": ["demo/echo", "openai/m"]}, "models[1]"),
        ({"fallbacks": [{"model": "demo/echo"}, {"model": "openai/m"}]}, "fallbacks[1].model"),
        ({"fallbacks": ["openai/m"]}, "fallbacks[0]"),
        ({"fallbacks": ["nobody/knows"]}, "fallbacks[0]"),
        (
            {
                "load_balancer": {
                    "type": "weight_based",
                    "models": [{"model": "fast", "weight": 1}, {"model": "mixed", "weight": 1}],
                }
            },
            "load_balancer.models[1].model",
        ),
        ({"load_balancer": [{"type": "weight_based", "model": "openai/m", "weight": 1}]}, "load_balancer[0].model"),
        ({"orq": {"fallbacks": [{"model": "openai/m"}]}}, "orq.fallbacks[0].model"),
        ({"penstock": {"models": ["openai/m"]}}, "penstock.models[0]"),
        ({"orq": {"load_balancer": {"type": "weight_based", "models": ["openai/m"]}}}, "orq.load_balancer.models[0]"),
    ],
)
async def test_every_model_that_a_request_names_is_checked_before_any_upstream_is_called(fields: Json, param: str) -> None:
    async with served() as (running, upstream, probe):
        answer = await sent(running.port, {**WHOLE, "model": "fast", **fields}, Authorization=f"Bearer {NARROW}")
        assert code(answer) == (403, "permission_error", "model_not_allowed")
        assert answer.error is not None
        assert answer.error["param"] == param
        assert upstream.asked == []
        assert probe.seen == []
        allowed = await sent(running.port, {**WHOLE, "model": "fast", **fields}, Authorization=f"Bearer {PLAIN}")
        assert allowed.status != 403, "a key without models may use all"


@pytest.mark.parametrize("fields", [{"model": "fast"}, {"model": "demo/echo"}, {"model": "fast", "fallbacks": ["demo/any"]}])
async def test_a_route_is_allowed_by_its_own_name_and_others_by_globs(fields: Json) -> None:
    async with served() as (running, _, _probe):
        assert (await sent(running.port, {**WHOLE, **fields}, Authorization=f"Bearer {NARROW}")).status == 200


OPENAI = Provider("openai", "openai", "http://u/v1", api_key=CONFIGURED)
ROUTER = Provider("openrouter", "openai", "http://u/v1", missing="OPENROUTER_API_KEY", further_keys=("another",))


def lead(name: str) -> Route:
    """fast is a route; a bare name is the default provider's."""
    if name == "fast":
        return Route("fast", (Target(ROUTER, "r"), Target(OPENAI, "m")))
    return Route(None, (Target(OPENAI, name.removeprefix("openai/")),))


def admitted(auth: Auth, body: Json, headers: CIMultiDict[str]) -> Call:
    auth.attach(Surroundings((), lead))
    route = lead(body.get("model", "fast"))
    call = make_call(model=body.get("model", "fast"), route=route, targets=route.targets, headers=headers)
    call = auth.admit(replace(call, principal=auth.authenticate(headers)), OwnFields(body, headers))
    assert CALLERS not in repr(call.targets)
    return call


@pytest.mark.parametrize(
    ("globs", "model", "allowed"),
    [
        (("m",), "m", True),
        (("openai/*",), "m", True),
        (("openai/m",), "openai/m", True),
        (("m",), "openai/m", False),
        (("openai/*",), "fast", False),
        (("openrouter/*", "openai/*"), "fast", False),
        (("*",), "fast", True),
        (("M",), "m", False),
        (("openai/*",), "openai/a/b", True),
        (("m?",), "m", False),
        (("m.x",), "max", False),
    ],
)
def test_globs_match_the_name_or_the_provider_and_model_but_a_route_only_by_name(
    globs: tuple[str, ...], model: str, allowed: bool
) -> None:
    auth = Auth(keys=(keyed(models=globs),))
    if allowed:
        admitted(auth, {"model": model}, bearer(PLAIN))
    else:
        with pytest.raises(Refused):
            admitted(auth, {"model": model}, bearer(PLAIN))
    assert auth.allows(auth.authenticate(bearer(PLAIN)), model) is allowed


def test_names_without_end_are_refused_rather_than_checked() -> None:
    auth = Auth(keys=(keyed(models=("*",)),))
    admitted(auth, {"fallbacks": ["x"] * 64}, bearer(PLAIN))
    with pytest.raises(Refused) as caught:
        admitted(auth, {"fallbacks": ["x"] * 100_000}, bearer(PLAIN))
    assert caught.value.status == 400


JSON = st.recursive(
    st.sampled_from(["fast", "openai/m", "x"]) | st.integers() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["model", "models", "type"]), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["models", "fallbacks", "load_balancer"]), JSON))
def test_whatever_shape_the_fields_have_it_is_let_through_or_refused(fields: Json) -> None:
    auth = Auth(keys=(keyed(models=("fast",)),))
    refused: Refused | None = None
    try:
        admitted(auth, fields, bearer(PLAIN))
    except Refused as error:
        refused = error
    # `x` and `openai/m` stand only where models are named, or under `type`, where nobody looks.
    assert (refused is None) == (set(named(list(fields.values()))) <= {"fast"})
    assert refused is None or (refused.status, refused.code) == (403, "model_not_allowed")


def named(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value if isinstance(value, list) else ():
        yield from named(inner)
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name != "type":
            yield from named(inner)


# The caller's own provider key


async def test_a_callers_key_goes_to_the_providers_named_and_to_no_other() -> None:
    async with served() as (running, upstream, probe):
        headers = {"superAgentKey": PLAIN, "Authorization": f"Bearer {CALLERS}"}
        for model, key in (("openrouter/r", CALLERS), ("both/b", CALLERS), ("openai/m", CONFIGURED), ("mixed", CALLERS)):
            answer = await sent(running.port, {**WHOLE, "model": model}, **headers)
            assert answer.status == 200, answer.body
            assert upstream.asked[-1].headers["authorization"] == f"Bearer {key}"
        scopes = {call.principal.scope for call in probe.seen}
        await sent(running.port, WHOLE, Authorization=f"Bearer {PLAIN}")
        assert len(scopes) == 1
        assert probe.seen[-1].principal.scope not in scopes
        assert PLAIN not in str(upstream.asked)


async def test_without_a_callers_key_a_provider_that_has_none_configured_answers_503() -> None:
    async with served() as (running, upstream, _):
        answer = await sent(running.port, {**WHOLE, "model": "openrouter/r"}, superAgentKey=PLAIN)
        assert answer.status == 503
        assert b"UNSET_FOR_TEST" in answer.body
        assert upstream.asked == []


async def test_a_key_of_the_gateways_own_never_goes_to_a_provider() -> None:
    """SDKs send one key as Authorization; a client that puts the same one into superAgentKey must not give it away."""
    async with served() as (running, upstream, _):
        answer = await sent(running.port, {**WHOLE, "model": "both/b"}, superAgentKey=PLAIN, Authorization=f"Bearer {ADMIN}")
        assert answer.status == 200
        assert upstream.asked[0].headers["authorization"] == f"Bearer {CONFIGURED}"


@pytest.mark.parametrize("authorization", ["", f"Basic {CALLERS}"])
async def test_without_a_bearer_beside_it_the_configured_key_is_used(authorization: str) -> None:
    async with served() as (running, upstream, _):
        await sent(running.port, {**WHOLE, "model": "both/b"}, superAgentKey=PLAIN, Authorization=authorization)
        assert upstream.asked[0].headers["authorization"] == f"Bearer {CONFIGURED}"


async def test_what_a_provider_says_of_the_callers_key_reaches_the_caller_without_the_key() -> None:
    async def echo(asked: Asked, line: Line) -> None:
        words = json.dumps({"error": {"message": f"Incorrect key: {asked.headers['authorization']}"}}).encode()
        await whole(words, 401)(asked, line)

    async with served(echo) as (running, _, _probe):
        headers = {"superAgentKey": PLAIN, "Authorization": f"Bearer {CALLERS}"}
        answer = await sent(running.port, {**WHOLE, "model": "both/b"}, **headers)
        assert answer.status == 401
        assert b"Incorrect key" in answer.body
        assert CALLERS.encode() not in answer.body
        answer = await sent(running.port, {**WHOLE, "model": "openai/m"}, **headers)
        assert (answer.status, b"Incorrect" in answer.body) == (502, False)


def test_the_callers_key_is_put_on_route_and_targets_and_other_targets_stay_as_they_are() -> None:
    auth = Auth(keys=(keyed(),), pass_through=("openrouter",))
    headers = CIMultiDict({"superAgentKey": PLAIN, "Authorization": f"Bearer {CALLERS}"})
    call = admitted(auth, {}, headers)
    for found in (call.targets, call.route.targets):
        theirs, ours = found
        assert theirs.provider.api_key == CALLERS
        assert (theirs.provider.callers_key, theirs.provider.missing, theirs.provider.further_keys) == (True, None, ())
        assert ours.provider is OPENAI
    assert ROUTER.api_key is None
    assert admitted(auth, {}, bearer(PLAIN)).targets[0].provider is ROUTER


async def test_targets_that_were_added_after_admission_carry_the_callers_key_too() -> None:
    """`fallbacks` of the request become targets while the middleware further in admits the call."""
    auth = Auth(keys=(keyed(),), pass_through=("openrouter",))
    call = admitted(auth, {"model": "m"}, CIMultiDict({"superAgentKey": PLAIN, "Authorization": f"Bearer {CALLERS}"}))
    seen: list[Call] = []

    async def next(call: Call) -> Reply:
        seen.append(call)
        raise Refused("enough")

    with pytest.raises(Refused):
        await auth(replace(call, targets=(*call.targets, Target(ROUTER, "late"))), next)
    assert [target.provider.api_key for target in seen[0].targets] == [CONFIGURED, CALLERS]
    assert CALLERS not in repr(seen[0].extensions)


async def test_a_call_without_a_callers_key_goes_through_as_it_is() -> None:
    auth = Auth(keys=(keyed(),), pass_through=("openrouter",))
    call = admitted(auth, {}, bearer(PLAIN))
    seen: list[Call] = []

    async def next(call: Call) -> Reply:
        seen.append(call)
        raise Refused("enough")

    with pytest.raises(Refused):
        await auth(call, next)
    assert seen[0] is call


# Admin


@pytest.mark.parametrize(("path", "needs"), [("/admin/probe", True), ("/readyz?verbose", True), ("/probe", False)])
async def test_admin_endpoints_need_a_key_with_admin(path: str, needs: bool) -> None:
    async with served() as (running, _, _probe):
        plain = await sent(running.port, path=path, method="GET", Authorization=f"Bearer {PLAIN}")
        assert plain.status == (403 if needs else 200)
        if needs:
            assert code(plain) == (403, "permission_error", "admin_only")
        assert (await sent(running.port, path=path, method="GET", Authorization=f"Bearer {ADMIN}")).status == 200


async def test_the_admin_address_serves_admin_endpoints_without_a_key_and_nothing_else() -> None:
    async with served() as (running, upstream, _):
        assert running.admin_port not in (0, running.port)
        assert (await sent(running.admin_port, path="/admin/probe", method="GET")).body == b"operator"
        assert (await sent(running.admin_port, path="/readyz", method="GET")).status == 200
        assert (await sent(running.admin_port, WHOLE)).status == 404
        assert upstream.asked == []


async def test_the_admin_address_stays_while_draining_and_goes_at_the_end() -> None:
    async with served() as (running, _, _probe):
        await running.drain()
        assert (await sent(running.admin_port, path="/readyz", method="GET")).status == 503
        with pytest.raises(ConnectionRefusedError):
            await sent(running.port, path="/readyz", method="GET")
    with pytest.raises(ConnectionRefusedError):
        await sent(running.admin_port, path="/readyz", method="GET")


async def test_the_admin_address_is_off_by_default() -> None:
    async with gateway() as running:
        assert running.admin_port == 0


async def test_with_auth_any_host_name_is_answered() -> None:
    async with served() as (running, _, _probe):
        assert (await sent(running.port, WHOLE, Host="gateway.example", Authorization=f"Bearer {PLAIN}")).status == 200
    async with gateway() as running:
        assert (await sent(running.port, WHOLE, Host="gateway.example")).status == 403


# The SDK


async def test_the_official_sdk_raises_its_own_errors() -> None:
    async with served(STREAMED) as (running, _, _probe):
        url = f"http://127.0.0.1:{running.port}/v1"

        async def say(key: str, model: str, **headers: str) -> str:
            async with openai.AsyncOpenAI(base_url=url, api_key=key, default_headers=headers, max_retries=0) as client:
                chunks = await client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "Hi"}], stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

        assert await say(PLAIN, "fast") == "Hello"
        assert await say(CALLERS, "openrouter/r", superAgentKey=PLAIN) == "Hello"
        with pytest.raises(openai.AuthenticationError) as refused:
            await say(WRONG, "fast")
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await say(NARROW, "openai/m")
        assert denied.value.param == "model"


# No key anywhere


async def test_no_key_is_in_any_output(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Logs, errors, health, samples and reprs over a request of every kind, admitted, refused and broken."""
    caplog.set_level(logging.DEBUG)
    before = structlog.get_config()
    structlog.reset_defaults()
    told: list[str] = []
    try:
        with structlog.testing.capture_logs() as lines:
            async with served() as (running, upstream, probe):
                for key in (PLAIN, HASHED, ADMIN, NARROW, OLD, WRONG):
                    for form in (
                        {"Authorization": f"Bearer {key}"},
                        {"x-api-key": key},
                        {"api-key": key},
                        {"superAgentKey": key},
                    ):
                        models = ("fast", "openai/m", "openrouter/r", "nowhere/x")
                        told += [str(await sent(running.port, {**WHOLE, "model": model}, **form)) for model in models]
                    both = {"superAgentKey": key, "Authorization": f"Bearer {CALLERS}"}
                    told.append(str(await sent(running.port, {**WHOLE, "model": "mixed"}, **both)))
                    told.append(
                        str(await sent(running.port, path="/readyz?verbose", method="GET", Authorization=f"Bearer {key}"))
                    )
                upstream.answer = whole(b"<html>", 500)
                told.append(str(await sent(running.port, chat("both/b"), superAgentKey=PLAIN, Authorization=f"Bearer {CALLERS}")))
                auth = next(layer for layer in running.layers if isinstance(layer, Auth))
                told += [repr(vars(auth)), repr(auth.health()), repr(list(auth.samples())), repr(running.config)]
                told += [repr((call.principal, call.targets, call.route, call.extensions)) for call in probe.seen]
                told += [call.principal.scope for call in probe.seen]
    finally:
        structlog.configure(**before)
    out, err = capfd.readouterr()
    told += [json.dumps(lines, default=str), caplog.text, out, err]
    assert len(lines) > 50, "there was something to look at"
    everything = "\n".join(told)
    for key in (PLAIN, HASHED, ADMIN, NARROW, OLD, WRONG, CALLERS, CONFIGURED):
        assert key not in everything
        assert sha256(key.encode()).hexdigest() not in everything


# Faults of the configuration


def faults(auth: str, environ: dict[str, str] | None = None) -> list[str]:
    text = f"providers: {{openrouter: {{api: demo}}}}\nmiddleware:\n  - auth:\n{auth}"
    with pytest.raises(ConfigError) as caught:
        parse(text, environ or {}, TABLE)
    return caught.value.faults


ENTRIES = """\
      pass_through: [openruoter]
      keys:
        - {name: a, key: "${UNSET_KEY}"}
        - {name: b, key: short-secret}
        - {name: c, key: "sha256:abc"}
        - {name: d, key: "with blanks in between"}
        - {name: e, key: 1234567890123456789}
        - {name: "a b", key: long-enough-0123456789, modles: [x], expires: tomorrow, models: [], admin: perhaps}
        - {key: "${EMPTY_KEY}", limits: 5}
        - {name: g, key: "${DEFAULTED:-}"}
        - {name: h, key: long-enough-9876543210, limits: {request_per_minute: 5, concurrent: -1, per_client: {concurrency: 5}}}
        - {name: i, key: long-enough-5432109876, origins: [app.example], limits: {concurrent: true}}
"""


def test_every_fault_of_a_key_has_its_path_and_line_and_no_key_in_it() -> None:
    found = faults(ENTRIES, {"EMPTY_KEY": ""})
    at = "middleware[0].auth.keys"
    assert found == [
        "middleware[0].auth.pass_through[0] (line 4): there is no such provider; did you mean 'openrouter'?",
        f"{at}[0].key (line 6): environment variable UNSET_KEY is not set",
        f"{at}[1].key (line 7): must have at least 16 characters",
        f"{at}[2].key (line 8): must be sha256: and 64 hexadecimal digits",
        f"{at}[3].key (line 9): must be visible ASCII characters without blanks, or no header can carry it",
        f"{at}[4].key (line 10): must be text; put it in quotes",
        f"{at}[5].admin (line 11): must be true or false",
        f"{at}[5].expires (line 11): must be a date or date-time such as 2027-01-31 or 2027-01-31T12:00:00Z",
        f"{at}[5].models (line 11): must be names or globs such as openai/*; leave it out to allow every model",
        f"{at}[5].modles (line 11): unknown key; did you mean 'models'?",
        f"{at}[5].name (line 11): must be 1 to 64 letters, digits or _ . : @ + - (it is shown in logs and metrics)",
        f"{at}[6].key (line 12): environment variable EMPTY_KEY is not set",
        f"{at}[6].limits (line 12): must be a mapping",
        f"{at}[6].name (line 12): is required",
        f"{at}[7].key (line 13): must have at least 16 characters",
        f"{at}[8].limits.concurrent (line 14): must be from 0 to 1000000000",
        f"{at}[8].limits.per_client.concurrency (line 14): unknown key; did you mean 'concurrent'?",
        f"{at}[8].limits.request_per_minute (line 14): unknown key; did you mean 'requests_per_minute'?",
        f"{at}[9].limits.concurrent (line 15): must be a number",
        f"{at}[9].origins (line 15): must be an origin as browsers send it: scheme, host and perhaps a port, in lower case, "
        "without a path; https://app.example, http://localhost:5173 or https://*.app.example",
    ]
    assert "short-secret" not in str(found)


@pytest.mark.parametrize(
    ("auth", "words"),
    [
        ("      {}\n", "needs keys or keys_file; to serve without a key, leave auth out"),
        (f"      keys: [{{name: a, key: {PLAIN}}}, {{name: a, key: {ADMIN}}}]\n", "there are two keys with the name 'a'"),
        (
            f"      keys: [{{name: a, key: {PLAIN}}}, {{name: b, key: 'sha256:{sha256(PLAIN.encode()).hexdigest().upper()}'}}]\n",
            "'a' and 'b' are the same key",
        ),
        ("      keys_file: /nowhere/keys.yaml\n", "keys_file: cannot be read (No such file or directory)"),
    ],
)
def test_what_only_the_whole_entry_shows_is_a_fault_too(auth: str, words: str) -> None:
    (fault,) = faults(auth)
    assert fault == f"middleware[0].auth (line 3): {words}"


def test_the_schema_for_editors_has_the_settings_of_a_key() -> None:
    assert {"name", "key", "models", "expires"} <= json_schema(TABLE)["$defs"]["middleware_auth_keys_Key"]["properties"].keys()


# The keys file


class Wall:
    """The wall clock, an hour ahead: no file is young."""

    def __call__(self) -> float:
        return time.time() + 3600


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    before = structlog.get_config()
    structlog.reset_defaults()
    with structlog.testing.capture_logs() as found:
        yield found
    structlog.configure(**before)


def listed(*keys: str) -> str:
    return "".join(f"- {{name: k{number}, key: {key}}}\n" for number, key in enumerate(keys))


def put(path: Path, text: str) -> None:
    path.write_text(text)


def known(auth: Auth, key: str) -> bool:
    try:
        return bool(auth.authenticate(bearer(key)))
    except Refused:
        return False


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "keys.yaml"
    found.write_text(listed(PLAIN))
    return found


def from_file(path: Path, **fields: Any) -> Auth:
    return Auth(keys=(Key("own", ADMIN),), keys_file=str(path), _now=Wall(), **fields)


async def test_keys_of_the_file_stand_beside_those_of_the_config(path: Path) -> None:
    auth = from_file(path)
    assert known(auth, ADMIN)
    assert known(auth, PLAIN)
    assert auth.health() == {"keys": 2, "keys_file": {"path": str(path), "fault": None}}


@pytest.mark.parametrize("by_rename", [True, False])
async def test_a_changed_file_is_read_and_what_is_gone_from_it_is_refused(path: Path, by_rename: bool) -> None:
    auth = from_file(path)
    for key, gone in ((HASHED, PLAIN), (NARROW, HASHED), (PLAIN, NARROW)):
        target = path.with_suffix(".new") if by_rename else path
        target.write_text(listed(key))
        os.replace(target, path)
        await auth.refresh()
        assert known(auth, key)
        assert not known(auth, gone)


BROKEN = [
    ("- {name: a, key: [", "is no valid YAML (line 1)"),
    (f"- {{name: a, key: {HASHED}, key: {NARROW}}}", "is no valid YAML (line 1)"),
    ("5", "must be a list of keys, or a mapping with the list under 'keys'"),
    ("", "must be a list of keys, or a mapping with the list under 'keys'"),
    ("- 5", "keys[0]: must be a mapping"),
    (f"- {{name: a, key: {HASHED}}}\n- {{name: b}}", "keys[1].key: is required"),
    (
        f"- {{name: a, key: {HASHED}, modles: [x]}}",
        "keys[0]: unknown setting; known: name, key, models, admin, expires, origins, limits, metadata",
    ),
    (f"- {{name: a, key: {HASHED}, models: x}}", "keys[0].models: must be a list of texts"),
    (f"- {{name: a, key: {HASHED}, models: [1]}}", "keys[0].models: must be a list of texts"),
    (f"- {{name: a, key: {HASHED}, admin: 1}}", "keys[0].admin: must be true or false"),
    (f"- {{name: a, key: {HASHED}, limits: 1}}", "keys[0].limits: must be a mapping"),
    (
        f"- {{name: a, key: {HASHED}, limits: {{request_per_minute: 1}}}}",
        "keys[0].limits: unknown setting; known: requests_per_minute, tokens_per_minute, concurrent, per_client, per_identity, "
        "per_name",
    ),
    (f"- {{name: a, key: {HASHED}, limits: {{concurrent: true}}}}", "keys[0].limits.concurrent: must be a whole number"),
    (f"- {{name: a, key: {HASHED}, limits: {{concurrent: -1}}}}", "keys[0].limits.concurrent: must be from 0 to 1000000000"),
    (f"- {{name: a, key: {HASHED}, limits: {{per_client: 1}}}}", "keys[0].limits.per_client: must be a mapping"),
    (
        f"- {{name: a, key: {HASHED}, origins: []}}",
        "keys[0].origins: must be origins such as https://app.example; leave it out for a key that works from anywhere",
    ),
    (
        f"- {{name: a, key: {HASHED}, origins: ['*']}}",
        "keys[0].origins: must be an origin as browsers send it: scheme, host and "
        "perhaps a port, in lower case, without a path; https://app.example, http://localhost:5173 or https://*.app.example",
    ),
    ("- {name: a, key: tooshort-secret}", "keys[0].key: must have at least 16 characters"),
    ("- {name: a, key: 12345678901234567890}", "keys[0].key: must be text; put it in quotes"),
    ("- {name: a, key: '${SOME_LONG_VARIABLE}'}", "keys[0].key: variables are filled in only in config.yaml"),
    (f"- {{name: own, key: {HASHED}}}", "there are two keys with the name 'own'"),
    (f"- {{name: a, key: {ADMIN}}}", "'own' and 'a' are the same key"),
]


@pytest.mark.parametrize(("text", "fault"), BROKEN)
async def test_a_broken_file_keeps_the_old_keys_is_logged_once_and_shown(
    path: Path, lines: list[Any], text: str, fault: str
) -> None:
    auth = from_file(path)
    put(path, text)
    for _ in range(3):
        await auth.refresh()
        assert known(auth, PLAIN)
        assert not known(auth, HASHED)
        assert auth.health()["keys_file"]["fault"] == fault
    assert [line["fault"] for line in lines] == [fault]
    assert HASHED not in str(lines)
    assert "secret" not in str(lines)
    put(path, listed(PLAIN))
    await auth.refresh()
    assert auth.health()["keys_file"]["fault"] is None, "the very content from before is a repair too"
    put(path, text)
    await auth.refresh()
    assert len([line for line in lines if "fault" in line]) == 2, "broken anew is news again"


@pytest.mark.parametrize("text", [text for text, _ in BROKEN if "own" not in text and ADMIN not in text])
def test_a_broken_file_at_start_is_a_fault(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match="keys_file: ") as caught:
        from_file(path)
    assert HASHED not in str(caught.value)


async def test_a_file_that_is_gone_for_a_while_keeps_its_keys(path: Path, lines: list[Any]) -> None:
    auth = from_file(path)
    away = path.with_suffix(".away")
    os.rename(path, away)
    for _ in range(2):
        await auth.refresh()
    assert known(auth, PLAIN)
    assert auth.health()["keys_file"]["fault"] == "cannot be read (No such file or directory)"
    assert len(lines) == 1
    os.rename(away, path)
    await auth.refresh()
    assert auth.health()["keys_file"]["fault"] is None


def test_json_yaml_dates_and_the_list_under_keys_are_read(tmp_path: Path) -> None:
    found = tmp_path / "keys.json"
    found.write_text(json.dumps({"keys": [{"name": "a", "key": PLAIN, "models": ["fast"], "limits": {"concurrent": 2}}]}))
    assert KeysFile(str(found)).changed() == (Key("a", PLAIN, ("fast",), limits=Allowance(concurrent=2)),)
    found = tmp_path / "keys.yaml"
    found.write_text(f"keys:\n  - {{name: a, key: {PLAIN}, admin: true, expires: 2027-01-01}}\n")
    assert KeysFile(str(found)).changed() == (Key("a", PLAIN, admin=True, expires="2027-01-01"),)


def test_a_file_that_did_not_change_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = KeysFile(str(path), Wall())
    assert file.changed()
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    assert file.changed() is None


@pytest.mark.parametrize(("after", "seen"), [(0.001, True), (3.0, False)])
def test_a_second_write_within_the_timestamps_granularity_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch, after: float, seen: bool
) -> None:
    """Two writes in one tick of the file system's clock have one stat. After a while that stat is trusted, and not read again."""
    stat = path.stat()
    monkeypatch.setattr(os, "stat", lambda *_, **__: stat)
    file = KeysFile(str(path), lambda: stat.st_mtime + after)
    assert file.changed() == (Key("k0", PLAIN),)
    assert file.changed() is None
    path.write_text(listed(PLAIN[::-1]))
    assert file.changed() == ((Key("k0", PLAIN[::-1]),) if seen else None)


async def test_the_running_gateway_looks_once_per_second_and_not_per_request(path: Path) -> None:
    slept: list[float] = []
    ticks: asyncio.Queue[None] = asyncio.Queue()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await ticks.get()

    auth = from_file(path, _sleep=sleep)
    await auth.start()
    try:
        put(path, listed(HASHED))
        await asyncio.sleep(0)
        assert not known(auth, HASHED), "a request does not look"
        ticks.put_nowait(None)
        async with asyncio.timeout(5):
            while len(slept) < 2:  # noqa: ASYNC110 - the thread's end is seen by the next sleep
                await asyncio.sleep(0.001)
        assert known(auth, HASHED)
        assert slept == [1.0, 1.0]
    finally:
        await auth.close()
    assert auth._watching is not None
    assert auth._watching.cancelled()


def test_what_was_refused_is_counted_by_reason() -> None:
    auth = Auth(keys=(keyed(models=("fast",)),))
    for headers in (CIMultiDict[str](), bearer(WRONG), bearer(WRONG)):
        with pytest.raises(Refused):
            auth.authenticate(headers)
    with pytest.raises(Refused):
        admitted(auth, {"model": "m"}, bearer(PLAIN))
    counted = {sample.labels["reason"]: sample.value for sample in auth.samples() if sample.labels}
    assert counted == {
        "missing_api_key": 1, "invalid_api_key": 2, "expired_api_key": 0, "origin_not_allowed": 0, "invalid_provider_key": 0,
        "model_not_allowed": 1,
    }  # fmt: skip
