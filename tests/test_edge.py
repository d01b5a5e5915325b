"""The edge as clients meet it: paths, methods, bodies, headers, the error envelope, and what of a request goes upstream.

Strategy: a real gateway before a real socket for each claim; odd requests are written byte by byte.
The one rule: whatever is wrong with a request, its answer is the OpenAI error envelope and no upstream was asked.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from yarl import URL

from proxy.app import Gateway
from tests.support.formats import FORMATS, TEXT, data, dumped
from tests.support.gateway import CONFIG, Answer, RawClient, answer_of, ask, chat, gateway, raw_request, until
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
BASES = ["/v1", "/v2", "/v2/proxy", "/v2/router", "/v3/router", "/api/v1", ""]
WIRE = FORMATS["openai"]
EMBEDDINGS = {
    "object": "list",
    "model": "m",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}],
    "usage": {"prompt_tokens": 1, "total_tokens": 1},
}


def text_completion(**fields: Any) -> Json:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    choice = {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": usage,
        **fields,
    }


async def answering(asked: Asked, line: Line) -> None:
    """A provider that knows chat, completions and embeddings, streamed and not."""
    if asked.path.endswith("/embeddings"):
        await whole(dumped(EMBEDDINGS))(asked, line)
    elif asked.path.endswith("/chat/completions"):
        streamed = asked.json.get("stream")
        await (stream([WIRE.body]) if streamed else whole(WIRE.whole))(asked, line)
    elif asked.json.get("stream"):
        first = text_completion(choices=[{"index": 0, "text": "Hel", "logprobs": None, "finish_reason": None}])
        last = text_completion(choices=[{"index": 0, "text": "lo", "logprobs": None, "finish_reason": "stop"}])
        await stream([data(first), data(last), b"data: [DONE]\n\n"])(asked, line)
    else:
        await whole(dumped(text_completion()))(asked, line)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(answering) as running:
        yield running


@pytest.fixture
async def here(upstream: Upstream) -> AsyncIterator[Gateway]:
    async with gateway(upstream.url) as running:
        yield running


async def request(port: int, method: str, path: str, **headers: str) -> Answer:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, URL(f"http://127.0.0.1:{port}{path}", encoded=True), headers=headers) as found,
    ):
        return answer_of(found.status, found.headers, await found.read())


async def talk(port: int, *pieces: bytes) -> Answer:
    """The answer to a request sent as these bytes."""
    async with RawClient(port) as client:
        for piece in pieces:
            await client.send(piece)
        return await client.answer()


def assert_refused(answer: Answer, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """The message of an answer that is an error envelope, and nothing else."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Request-Id"]
    assert set(answer.json) == {"error"}
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return str(error["message"])


def assert_closing(answer: Answer, status: int) -> None:
    """Refused, and the connection will not serve another request, for nobody knows where the next one begins."""
    assert_refused(answer, status)
    assert answer.headers["Connection"].lower() == "close"


class TestPaths:
    """The same handlers under every base URL."""

    @pytest.mark.parametrize("base", BASES)
    async def test_every_base_url_serves_all_endpoints(self, upstream: Upstream, here: Gateway, base: str) -> None:
        streamed = await ask(here.port, chat(), f"{base}/chat/completions")
        assert (streamed.status, streamed.done, streamed.text) == (200, True, TEXT)
        folded = await ask(here.port, chat(stream=False), f"{base}/chat/completions")
        assert folded.json["choices"][0]["message"]["content"] == TEXT
        completed = await ask(here.port, {"model": "openai/m", "prompt": "Hi"}, f"{base}/completions")
        assert completed.json["choices"][0]["text"] == TEXT
        embedded = await ask(here.port, {"model": "openai/m", "input": "Hi"}, f"{base}/embeddings")
        assert embedded.json["data"] == EMBEDDINGS["data"]
        listed = await request(here.port, "GET", f"{base}/models")
        assert listed.json["object"] == "list"
        assert (await request(here.port, "GET", f"{base}/models/demo/echo")).json["id"] == "demo/echo"
        assert {asked.path for asked in upstream.asked} == {"/v1/chat/completions", "/v1/embeddings"}

    async def test_a_query_string_is_no_part_of_the_path(self, here: Gateway) -> None:
        assert (await ask(here.port, chat(), "/v1/chat/completions?api-version=2024-10-21")).done

    @pytest.mark.parametrize(
        "path", ["/", "/v1", "/v9/chat/completions", "/v1/chat", "/v1/chat/completions/x", "/v1/modelsx", "/v1//models"]
    )
    async def test_an_unknown_path_is_a_404(self, upstream: Upstream, here: Gateway, path: str) -> None:
        assert_refused(await ask(here.port, chat(), path), 404)
        assert_refused(await request(here.port, "GET", path), 404)
        assert upstream.asked == []

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/completions", "/api/v1/embeddings"])
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
    async def test_a_wrong_method_is_a_405_that_names_the_right_one(self, here: Gateway, path: str, method: str) -> None:
        answer = await request(here.port, method, path)
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        if method != "HEAD":
            assert_refused(answer, 405)

    async def test_models_and_health_are_only_read(self, here: Gateway) -> None:
        for path in ("/v1/models", "/v1/models/demo/echo", "/healthz", "/readyz"):
            answer = await request(here.port, "POST", path)
            assert_refused(answer, 405)
            assert "GET" in answer.headers["Allow"]

    async def test_health_and_readiness(self, here: Gateway) -> None:
        for path in ("/healthz", "/readyz"):
            assert (await request(here.port, "GET", path)).status == 200
            async with RawClient(here.port) as client:
                await client.send(raw_request(path=path, method="HEAD"))
                assert (await client.answer(bodiless=True)).status == 200
                await client.send(raw_request(path="/healthz", method="GET"))
                assert (await client.answer()).status == 200, "a HEAD's answer has no body, so the next answer follows at once"
        here.edge.not_ready()
        assert (await request(here.port, "GET", "/readyz")).status == 503
        assert (await request(here.port, "GET", "/healthz")).status == 200
        assert (await ask(here.port, chat())).done, "calls are still accepted"


class TestModels:
    async def test_the_list_has_the_routes_and_the_providers_models(self, upstream: Upstream) -> None:
        config = CONFIG.replace(
            "middleware:", "models:\n  fast: openai/gpt\n  team/best: {{targets: [demo/echo, openai/m]}}\nmiddleware:"
        )
        async with gateway(upstream.url, config) as here:
            listed = (await request(here.port, "GET", "/v1/models")).json["data"]
            assert {"fast", "team/best", "demo/echo"} <= {model["id"] for model in listed}
            for model in listed:
                assert model["object"] == "model"
                assert {"id", "object", "created", "owned_by"} <= set(model)
                single = await request(here.port, "GET", f"/v1/models/{model['id']}")
                assert single.json == model
            encoded = await request(here.port, "GET", "/v1/models/team%2Fbest")
            assert encoded.json["id"] == "team/best"

    @pytest.mark.parametrize("model", ["nonesuch/x", "nonesuch/a/b", "%2e%2e/x", "demo/..%2f", "x%00y"])
    async def test_an_unknown_one_is_an_error_envelope(self, here: Gateway, model: str) -> None:
        answer = await request(here.port, "GET", f"/v1/models/{model}")
        assert answer.status in (400, 404)
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}

    async def test_an_unknown_model_is_a_404_that_lists_close_matches(self, upstream: Upstream, here: Gateway) -> None:
        answer = await ask(here.port, chat("opnai/gpt"))
        assert answer.status == 404
        assert "openai" in answer.json["error"]["message"]
        assert answer.json["error"]["type"] == "invalid_request_error"
        assert upstream.asked == []

    async def test_a_bare_model_goes_to_the_default_provider_under_its_own_name(self, upstream: Upstream, here: Gateway) -> None:
        answer = await ask(here.port, chat("gpt-x"))
        assert {chunk["model"] for chunk in answer.chunks} == {"gpt-x"}
        assert upstream.asked[0].json["model"] == "gpt-x"
        assert answer.headers["X-Penstock-Target"] == "openai/gpt-x"

    async def test_without_a_default_provider_a_bare_model_is_a_404(self, upstream: Upstream) -> None:
        async with gateway(upstream.url, CONFIG.replace("default_provider: openai\n", "")) as here:
            assert (await ask(here.port, chat("gpt-x"))).status == 404

    async def test_the_model_part_may_contain_slashes(self, upstream: Upstream, here: Gateway) -> None:
        answer = await ask(here.port, chat("openai/org/model:free@v1.2+x"))
        assert answer.done
        assert upstream.asked[0].json["model"] == "org/model:free@v1.2+x"
        assert {chunk["model"] for chunk in answer.chunks} == {"openai/org/model:free@v1.2+x"}

    @pytest.mark.parametrize(
        "model",
        [
            "openai/..", "openai/../x", "openai/a/../b", "openai/.", "openai/./x", "..", "openai//x", "openai/", "/openai", " ",
            "openai/a%2fb", "openai/%2e%2e", "openai/a b", "openai/a?b", "openai/a#b", "openai/a\\b", "openai/m\n",
            "openai/m\r\nX: y", "openai/a\0", "gemini/../x", "gemini/m:x?key=1", "anthropic/..",
        ],
    )  # fmt: skip
    async def test_a_name_that_could_bend_a_url_is_a_400(self, upstream: Upstream, here: Gateway, model: str) -> None:
        assert_refused(await ask(here.port, chat(model)), 400, param="model")
        assert upstream.asked == []

    async def test_a_disabled_provider_is_a_503_that_names_the_variable(self, upstream: Upstream) -> None:
        config = CONFIG.replace('"sk-upstream-0123456789"}}\n  text', '"${{SOME_VENDOR_KEY}}"}}\n  text')
        async with gateway(upstream.url, config) as here:
            for streamed in (True, False):
                assert "SOME_VENDOR_KEY" in assert_refused(await ask(here.port, chat(stream=streamed)), 503)
            assert (await ask(here.port, chat("text/m"))).done, "the rest works"
        assert len(upstream.asked) == 1


class TestBodies:
    """Size, time, type and JSON."""

    SMALL = CONFIG.replace("drain_timeout: 1s", "drain_timeout: 1s, max_body: 1KiB, body_timeout: 200ms")

    async def test_a_declared_size_is_refused_before_it_is_sent(self, upstream: Upstream) -> None:
        async with gateway(upstream.url, self.SMALL) as here, RawClient(here.port) as client:
            await client.send(raw_request(b"{", Content_Length="1025"))
            assert_closing(await client.answer(), 413)
            await client.send(b" " * 1024 + raw_request(chat()))
            assert await client.closed(), "what comes behind the refused body is not answered"
        assert upstream.asked == []

    async def test_a_chunked_body_is_refused_when_it_grows_too_large(self, upstream: Upstream) -> None:
        head = raw_request(Content_Length="", Transfer_Encoding="chunked")
        async with gateway(upstream.url, self.SMALL) as here, RawClient(here.port) as client:
            await client.send(head + b"400\r\n" + b" " * 0x400 + b"\r\n")
            await client.send(b"1\r\n \r\n")
            assert_closing(await client.answer(), 413)
            await client.send(b"0\r\n\r\n" + raw_request(chat()))
            assert await client.closed()

    async def test_a_body_at_the_limit_passes(self, upstream: Upstream) -> None:
        body = json.dumps(chat()).encode().ljust(1024)
        async with gateway(upstream.url, self.SMALL) as here:
            assert (await ask(here.port, body)).done
            chunks = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
            assert (await talk(here.port, raw_request(Content_Length="", Transfer_Encoding="chunked") + chunks)).done

    async def test_a_body_that_inflates_beyond_the_limit_is_refused(self, upstream: Upstream) -> None:
        body = gzip.compress(b" " * 2**20 + json.dumps(chat()).encode())
        async with gateway(upstream.url, self.SMALL.replace("1KiB", "16KiB")) as here:
            assert_refused(await ask(here.port, body, headers={"Content-Encoding": "gzip"}), 413)
            small = gzip.compress(json.dumps(chat()).encode())
            assert (await ask(here.port, small, headers={"Content-Encoding": "gzip"})).done

    async def test_a_body_that_comes_too_slowly_is_a_408(self, upstream: Upstream) -> None:
        async with gateway(upstream.url, self.SMALL) as here, RawClient(here.port) as client:
            await client.send(raw_request(b'{"model"', Content_Length="99"))
            assert_closing(await client.answer(), 408)
            await client.send(b" " * 91 + raw_request(chat()))
            assert await client.closed()

    @pytest.mark.parametrize(
        "kind", ["text/html", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "image/png"]
    )
    async def test_another_content_type_is_a_415(self, upstream: Upstream, here: Gateway, kind: str) -> None:
        assert_refused(await ask(here.port, chat(), headers={"Content-Type": kind}), 415)
        assert upstream.asked == []

    @pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json", ""])
    async def test_json_by_any_name_passes(self, here: Gateway, kind: str) -> None:
        assert (await talk(here.port, raw_request(chat(), Content_Type=kind))).done

    @pytest.mark.parametrize(
        "body",
        [
            b"", b" ", b"{", b"oops", b"{'a': 1}", b"[]", b"[1]", b"7", b"null", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf",
            b"[" * 100_000, b'{"a":' * 50_000, b'{"model":"openai/m","messages":[{"role":"user","content":"\\ud800"}]}',
            b'{"model":"openai/m","messages":[{"role":"user","content":"\xff"}]}',
            b'{"model":"openai/m","messages":[{"role":"user","content":"Hi"}],"top_p":NaN}',
        ],
        ids=lambda body: repr(body[:24]),
    )  # fmt: skip
    async def test_what_is_no_json_object_is_a_400(self, upstream: Upstream, here: Gateway, body: bytes) -> None:
        assert_refused(await ask(here.port, body), 400)
        assert upstream.asked == []

    async def test_nesting_is_bounded(self, upstream: Upstream, here: Gateway) -> None:
        def nested(depth: int) -> Any:
            found: Any = "x"
            for _ in range(depth):
                found = [found]
            return found

        assert_refused(await ask(here.port, chat(extra=nested(100))), 400)
        assert upstream.asked == []
        assert (await ask(here.port, chat(extra=nested(40)))).done
        assert (await ask(here.port, chat(extra=[[]] * 5000))).done, "wide is not deep"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"model": None}, "model"),
            ({"model": 5}, "model"),
            ({"model": ""}, "model"),
            ({"messages": None}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "Hi"}, "messages"),
            ({"messages": {"role": "user"}}, "messages"),
            ({"messages": ["Hi"]}, "messages[0]"),
            ({"stream": "yes"}, "stream"),
            ({"stream": 1}, "stream"),
            ({"n": 0}, "n"),
            ({"n": "2"}, "n"),
            ({"n": 1.5}, "n"),
            ({"n": True}, "n"),
            ({"orq": []}, "orq"),
            ({"orq": "x"}, "orq"),
            ({"penstock": 1}, "penstock"),
            ({"name": 5}, "name"),
            ({"name": "x" * 100_000}, "name"),
            ({"usage_placement": "x"}, "usage_placement"),
            ({"strict_params": "no"}, "strict_params"),
            ({"stream_options": []}, "stream_options"),
            ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
            ({"orq": {"name": 5}}, "orq.name"),
            ({"orq": {"tracking": {"name": 5}}}, "orq.tracking.name"),
            ({"orq": {"tracking": []}}, "orq.tracking"),
            ({"penstock": {"usage_placement": "x"}}, "penstock.usage_placement"),
            ({"penstock": {"strict_params": 1}}, "penstock.strict_params"),
            ({"penstock": {"name": []}}, "penstock.name"),
            ({"name": []}, "name"),
            ({"name": 0}, "name"),
            ({"name": False}, "name"),
        ],
    )
    async def test_a_field_of_the_wrong_shape_is_named(self, upstream: Upstream, here: Gateway, fields: Json, param: str) -> None:
        message = assert_refused(await ask(here.port, {**chat(), **fields}), 400, param=param)
        assert param.split(".")[-1] in message
        assert len(message) < 1000
        assert upstream.asked == []

    @pytest.mark.parametrize("missing", ["model", "messages"])
    async def test_a_field_that_is_missing_is_named(self, here: Gateway, missing: str) -> None:
        body = chat()
        del body[missing]
        assert_refused(await ask(here.port, body), 400, param=missing)

    @pytest.mark.parametrize(("path", "param"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
    async def test_the_other_faces_name_theirs(self, upstream: Upstream, here: Gateway, path: str, param: str) -> None:
        for value in (None, 5, False):
            assert_refused(await ask(here.port, {"model": "openai/m", param: value}, path), 400, param=param)
        assert_refused(await ask(here.port, {"model": "openai/m"}, path), 400, param=param)
        assert upstream.asked == []


GATEWAY_FIELDS: Json = {
    "penstock": {"usage_placement": "chunk"},
    "orq": {"name": "Bot", "cache": {"type": "exact_match"}, "tracking": {"name": "Bot"}},
    "name": "StreamingBot-v1",
    "cache": {"type": "exact_match", "ttl": 3600},
    "timeout": {"call_timeout": 30000},
    "retry": {"count": 3, "on_codes": [429]},
    "fallbacks": [{"model": "anthropic/m"}],
    "models": ["openai/other"],
    "load_balancer": {"type": "weight_based", "models": [{"model": "openai/m", "weight": 1}]},
    "identity": {"id": "i-1"},
    "contact": {"id": "c-1"},
    "thread": {"id": "t-1", "tags": ["a"]},
    "usage_placement": "chunk",
    "strict_params": False,
    "sessionId": "s-1",
    "saveToMemory": True,
    "save_to_memory": True,
}


@pytest.mark.parametrize("path", ["guardrails", "orq.guardrails", "penstock.guardrails"])
async def test_guardrails_that_nobody_keeps_are_refused(upstream: Upstream, here: Gateway, path: str) -> None:
    asked: Any = [{"id": "orq_pii_detection", "execute_on": "input"}]
    for name in reversed(path.split(".")):
        asked = {name: asked}
    assert_refused(await ask(here.port, chat(**asked)), 400, code="unsupported", param=path)
    assert upstream.asked == []


async def test_those_that_nobody_asks_for_are_no_matter(here: Gateway) -> None:
    assert (await ask(here.port, chat(guardrails=[]))).status == 200


class TestWhatGoesUpstream:
    @pytest.mark.parametrize("field", GATEWAY_FIELDS)
    @pytest.mark.parametrize("api", FORMATS)
    async def test_the_gateways_fields_stay_here(self, upstream: Upstream, here: Gateway, field: str, api: str) -> None:
        upstream.answer = stream([FORMATS[api].body])
        assert (await ask(here.port, chat(f"{api}/m", **{field: GATEWAY_FIELDS[field]}))).done
        assert field not in upstream.asked[0].json
        assert "StreamingBot-v1" not in upstream.asked[0].body.decode()

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
    async def test_nor_from_the_other_faces(self, upstream: Upstream, here: Gateway, path: str) -> None:
        body = {"model": "text/m", "prompt": "Hi", "input": "Hi", **GATEWAY_FIELDS}
        assert (await ask(here.port, body, path)).status == 200
        assert not set(GATEWAY_FIELDS) & set(upstream.asked[0].json)

    async def test_everything_else_does(self, upstream: Upstream, here: Gateway) -> None:
        fields: Json = {
            "metadata": {"team": "a"},
            "temperature": 0.5,
            "top_logprobs": 3,
            "made_up": {"deep": [1, None, "☂"]},
            "seed": 2**53,
        }
        assert (await ask(here.port, chat(**fields))).done
        sent = upstream.asked[0].json
        assert {name: sent[name] for name in fields} == fields

    async def test_the_clients_headers_stay_here_and_the_key_is_the_gateways(self, upstream: Upstream, here: Gateway) -> None:
        private = {
            "Authorization": "Bearer client-key",
            "Cookie": "a=b",
            "X-Penstock-Name": "Bot",
            "X-Api-Key": "client",
            "X-ORQ-CONTACT-ID": "c",
        }
        assert (await ask(here.port, chat(), headers=private)).done
        sent = upstream.asked[0].headers
        assert sent["authorization"] == "Bearer sk-upstream-0123456789"
        assert not {"cookie", "x-penstock-name", "x-api-key", "x-orq-contact-id"} & set(sent)
        assert not any("client" in value for value in sent.values())

    async def test_usage_is_asked_for_but_shown_only_when_the_client_asks(self, upstream: Upstream, here: Gateway) -> None:
        answer = await ask(here.port, chat())
        assert upstream.asked[0].json["stream_options"] == {"include_usage": True}
        assert not any(chunk.get("usage") for chunk in answer.chunks)
        assert all(chunk["choices"] for chunk in answer.chunks)

    @pytest.mark.parametrize("fields", [{"usage_placement": "finish"}, {"penstock": {"usage_placement": "finish"}}])
    async def test_usage_may_stand_on_the_finish_chunk(self, here: Gateway, fields: Json) -> None:
        last = (await ask(here.port, chat(**fields))).chunks[-1]
        assert last["usage"]["total_tokens"] == 16
        assert last["choices"][0]["finish_reason"] == "tool_calls"

    async def test_a_place_nearer_to_the_top_wins(self, here: Gateway) -> None:
        fields: Json = {"usage_placement": "finish", "penstock": {"usage_placement": "chunk"}}
        last = (await ask(here.port, chat(stream_options={"include_usage": True}, **fields))).chunks[-1]
        assert last["choices"], "on the finish chunk"


class TestHost:
    """Without auth, only to the Host localhost, 127.0.0.1 and [::1]: a page whose name was rebound to loopback gets nothing."""

    @pytest.mark.parametrize("host", ["localhost", "LocalHost:80", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:8080"])
    async def test_loopback_names_pass(self, here: Gateway, host: str) -> None:
        assert (await talk(here.port, raw_request(chat(), Host=host))).done

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:80",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "[::2]",
            "evil@localhost.x",
        ],
    )
    async def test_any_other_is_a_403(self, upstream: Upstream, here: Gateway, host: str) -> None:
        assert_refused(await talk(here.port, raw_request(chat(), Host=host)), 403)
        assert_refused(await talk(here.port, raw_request(path="/v1/models", method="GET", Host=host)), 403)
        assert (await talk(here.port, raw_request(path="/healthz", method="GET", Host=host))).status == 200
        assert upstream.asked == []

    async def test_allow_anonymous_is_the_operators_word_that_any_may(self, upstream: Upstream) -> None:
        config = CONFIG.replace("drain_timeout: 1s", "drain_timeout: 1s, allow_anonymous: true")
        async with gateway(upstream.url, config) as here:
            assert (await talk(here.port, raw_request(chat(), Host="evil.example"))).done


class TestHeaders:
    @pytest.mark.parametrize("sent", ["abc-123", "req_0.1:2", "A" * 100])
    async def test_a_sane_request_id_is_echoed(self, here: Gateway, sent: str) -> None:
        for body in (chat(), chat(stream=False), {}):
            assert (await ask(here.port, body, headers={"X-Request-Id": sent})).headers["X-Request-Id"] == sent
        assert (await ask(here.port, {}, "/nowhere", {"X-Request-Id": sent})).headers["X-Request-Id"] == sent

    @pytest.mark.parametrize("sent", ["", "a b", "A" * 5000, "é", '"x"', "<script>", "a;b"])
    async def test_any_other_is_replaced(self, here: Gateway, sent: str) -> None:
        for body in (chat(), {}):
            found = (await ask(here.port, body, headers={"X-Request-Id": sent})).headers["X-Request-Id"]
            assert found != sent
            assert re.fullmatch(r"[\w.:-]{8,128}", found, re.ASCII)

    async def test_two_requests_have_two_ids(self, here: Gateway) -> None:
        assert len({(await ask(here.port, chat())).headers["X-Request-Id"] for _ in range(3)}) == 3

    async def test_one_request_id_used_twice_gives_two_completions(self, upstream: Upstream, here: Gateway) -> None:
        """Ids that the gateway mints do not repeat where a client repeats its own."""
        upstream.answer = stream([FORMATS["gemini"].body])
        ids = {(await ask(here.port, chat("gemini/m"), headers={"X-Request-Id": "same"})).chunks[0]["id"] for _ in range(2)}
        assert len(ids) == 2

    @pytest.mark.parametrize("streamed", [True, False])
    async def test_the_answer_says_who_answered_and_how_long_it_took(self, here: Gateway, streamed: bool) -> None:
        answer = await ask(here.port, chat("openai/m", stream=streamed))
        assert answer.headers["X-Penstock-Target"] == "openai/m"
        assert answer.headers["X-Penstock-Attempts"] == "1"
        assert re.fullmatch(r"upstream;dur=\d+(\.\d+)?, gateway;dur=\d+(\.\d+)?", answer.headers["Server-Timing"])
        assert "X-Penstock-Dropped" not in answer.headers

    async def test_a_stream_is_not_to_be_cached_or_buffered(self, here: Gateway) -> None:
        headers = (await ask(here.port, chat())).headers
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert headers["Cache-Control"] == "no-cache"
        assert headers["X-Accel-Buffering"] == "no"

    @pytest.mark.parametrize("streamed", [True, False])
    async def test_what_a_format_cannot_carry_is_listed_as_dropped(
        self, upstream: Upstream, here: Gateway, streamed: bool
    ) -> None:
        wire = FORMATS["anthropic"]
        upstream.answer = stream([wire.body]) if streamed else whole(wire.whole)
        answer = await ask(here.port, chat("anthropic/m", stream=streamed, seed=1, presence_penalty=0.5))
        assert answer.status == 200
        assert set(answer.headers["X-Penstock-Dropped"].split(", ")) == {"seed", "presence_penalty"}
        assert not {"seed", "presence_penalty"} & set(upstream.asked[0].json)

    @pytest.mark.parametrize("wide", ["server", "request", "penstock"])
    async def test_strict_params_refuses_it_instead(self, upstream: Upstream, wide: str) -> None:
        config = CONFIG.replace("drain_timeout: 1s", "drain_timeout: 1s, strict_params: true") if wide == "server" else CONFIG
        own = {"strict_params": True}
        places: dict[str, Json] = {"server": {}, "request": own, "penstock": {"penstock": own}}
        async with gateway(upstream.url, config) as here:
            assert_refused(await ask(here.port, chat("anthropic/m", seed=1, **places[wide])), 400, param="seed")
            if wide == "server":
                upstream.answer = stream([FORMATS["anthropic"].body])
                assert (await ask(here.port, chat("anthropic/m", seed=1, strict_params=False))).done, (
                    "the request's own word wins"
                )
            else:
                assert upstream.asked == []

    @pytest.mark.parametrize("api", ["anthropic", "gemini", "cohere"])
    async def test_the_name_of_a_dropped_field_cannot_write_headers(self, upstream: Upstream, here: Gateway, api: str) -> None:
        upstream.answer = stream([FORMATS[api].body])
        names = ["a\r\nX-Injected: 1", "b\nX-Injected: 1", "c\0", "фу", "d, e", "x" * 50_000, "logit_bias\r\n\r\n<html>"]
        async with RawClient(here.port) as client:
            await client.send(raw_request({**chat(f"{api}/m", seed=1), **dict.fromkeys(names, 1)}))
            answer = await client.answer()
        assert (answer.status, answer.done) == (200, True)
        assert "X-Injected" not in answer.headers
        assert len(answer.headers.get("X-Penstock-Dropped", "")) < 8000

    async def test_an_error_says_its_request_id_too(self, upstream: Upstream, here: Gateway) -> None:
        upstream.answer = whole(b"no", 500)
        assert (await ask(here.port, chat(), headers={"X-Request-Id": "mine"})).headers["X-Request-Id"] == "mine"


class TestHttp:
    async def test_an_http_1_0_client_gets_its_stream_without_chunks_until_the_close(self, here: Gateway) -> None:
        old = raw_request(chat()).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        async with RawClient(here.port) as client:
            await client.send(old)
            answer = await client.answer()
        assert "Transfer-Encoding" not in answer.headers
        assert (answer.status, answer.done, answer.text) == (200, True, TEXT)

    async def test_an_http_1_0_client_gets_whole_replies_and_errors(self, here: Gateway) -> None:
        for body, status in ((chat(stream=False), 200), ({}, 400)):
            answer = await talk(here.port, raw_request(body).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            assert answer.status == status
            assert answer.json

    async def test_expect_100_continue_is_answered_before_the_body(self, here: Gateway) -> None:
        head, _, body = raw_request(chat(), Expect="100-continue").partition(b"\r\n\r\n")
        async with RawClient(here.port) as client:
            await client.send(head + b"\r\n\r\n")
            assert (await client.answer()).status == 100
            await client.send(body)
            assert (await client.answer()).done
            await client.send(raw_request(chat()))
            assert (await client.answer()).done, "the connection goes on"

    async def test_expect_100_continue_is_not_answered_for_a_body_that_will_be_refused(self, upstream: Upstream) -> None:
        async with gateway(upstream.url, TestBodies.SMALL) as here:
            for status, refused in (
                (413, raw_request(Content_Length="99999", Expect="100-continue")),
                (415, raw_request(Content_Length="9", Expect="100-continue", Content_Type="image/png")),
                (403, raw_request(Content_Length="9", Expect="100-continue", Host="evil.example")),
            ):
                assert_refused(await talk(here.port, refused), status)

    async def test_requests_share_a_connection(self, upstream: Upstream, here: Gateway) -> None:
        async with RawClient(here.port) as client:
            for body, status in ((chat(), 200), (chat(stream=False), 200), ({}, 400), (chat("nonesuch/x"), 404), (chat(), 200)):
                await client.send(raw_request(body))
                assert (await client.answer()).status == status
            await client.send(raw_request(path="/v1/nowhere", method="GET"))
            assert (await client.answer()).status == 404
            await client.send(raw_request(chat()))
            assert (await client.answer()).done
        assert len(upstream.lines) == 1

    async def test_pipelined_requests_are_answered_in_their_order(self, here: Gateway) -> None:
        async with RawClient(here.port) as client:
            await client.send(b"".join(raw_request(chat(stream=n % 2 == 0), X_Request_Id=f"id-{n}") for n in range(5)))
            found = [await client.answer() for _ in range(5)]
        assert [answer.headers["X-Request-Id"] for answer in found] == [f"id-{n}" for n in range(5)]
        assert [answer.done for answer in found] == [True, False, True, False, True]

    async def test_what_is_no_http_gets_a_400_and_is_closed(self, here: Gateway) -> None:
        async with RawClient(here.port) as client:
            await client.send(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
            assert (await client.answer()).status == 400
            assert await client.closed()

    async def test_a_client_that_leaves_within_its_body_leaves_nothing_open(self, upstream: Upstream, here: Gateway) -> None:
        async with RawClient(here.port) as client:
            await client.send(raw_request(b'{"model"', Content_Length="99"))
        assert (await ask(here.port, chat())).done
        await until(lambda: not here.edge.open_calls)
        assert len(upstream.asked) == 1


class TestTextCompletions:
    """`/completions`: through chat where the upstream only chats, natively where its row says so."""

    @staticmethod
    async def ask(here: Gateway, model: str = "openai/m", **fields: Any) -> Answer:
        return await ask(here.port, {"model": model, "prompt": "Once", **fields}, "/v1/completions")

    async def test_through_chat_the_prompt_is_a_users_message(self, upstream: Upstream, here: Gateway) -> None:
        assert (await self.ask(here, max_tokens=5, temperature=0.1)).status == 200
        (asked,) = upstream.asked
        assert asked.path == "/v1/chat/completions"
        assert asked.json["messages"] == [{"role": "user", "content": "Once"}]
        assert asked.json["temperature"] == 0.1
        assert "prompt" not in asked.json

    @pytest.mark.parametrize("api", FORMATS)
    async def test_whole(self, upstream: Upstream, here: Gateway, api: str) -> None:
        upstream.answer = whole(FORMATS[api].whole)
        found = (await self.ask(here, f"{api}/m")).json
        assert found["object"] == "text_completion"
        assert found["model"] == f"{api}/m"
        (choice,) = found["choices"]
        assert (choice["index"], choice["text"], choice["logprobs"], choice["finish_reason"]) == (0, TEXT, None, "stop")
        assert not {"message", "delta"} & set(choice)
        assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]

    @pytest.mark.parametrize("api", FORMATS)
    async def test_streamed(self, upstream: Upstream, here: Gateway, api: str) -> None:
        upstream.answer = stream([FORMATS[api].body])
        answer = await self.ask(here, f"{api}/m", stream=True, stream_options={"include_usage": True})
        assert answer.done
        *chunks, last = answer.chunks
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 16)
        assert {(chunk["object"], chunk["model"], chunk["id"]) for chunk in answer.chunks} == {
            ("text_completion", f"{api}/m", last["id"])
        }
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert all(isinstance(choice["text"], str) and choice["logprobs"] is None for choice in choices)
        assert not any({"delta", "message"} & set(choice) for choice in choices)
        assert "".join(choice["text"] for choice in choices) == TEXT
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]

    async def test_a_list_of_one_prompt_is_a_prompt(self, upstream: Upstream, here: Gateway) -> None:
        assert (await self.ask(here, prompt=["Once"])).status == 200
        assert upstream.asked[0].json["messages"][0]["content"] == "Once"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"echo": True}, "echo"),
            ({"suffix": "end"}, "suffix"),
            ({"best_of": 2}, "best_of"),
            ({"prompt": ["a", "b"]}, "prompt"),
            ({"prompt": [1, 2, 3]}, "prompt"),
            ({"prompt": [[1, 2, 3]]}, "prompt"),
            ({"prompt": [[1], [2]]}, "prompt"),
            ({"logprobs": 2}, "logprobs"),
        ],
    )
    @pytest.mark.parametrize("streamed", [True, False])
    async def test_what_a_chat_cannot_do_is_refused_by_name(
        self, upstream: Upstream, here: Gateway, fields: Json, param: str, streamed: bool
    ) -> None:
        assert_refused(await self.ask(here, stream=streamed, **fields), 400, param=param)
        assert upstream.asked == []

    @pytest.mark.parametrize("fields", [{"echo": False}, {"suffix": None}, {"best_of": 1}, {"logprobs": None}, {"suffix": ""}])
    async def test_asking_for_nothing_special_is_no_fault(self, upstream: Upstream, here: Gateway, fields: Json) -> None:
        assert (await self.ask(here, **fields)).status == 200
        assert not set(fields) & set(upstream.asked[0].json)

    @pytest.mark.parametrize("prompt", ["Once", ["a", "b"], [1, 2], [[1], [2]]])
    async def test_a_native_upstream_gets_the_request_as_it_is(self, upstream: Upstream, here: Gateway, prompt: Any) -> None:
        fields = {"prompt": prompt, "echo": True, "suffix": "end", "best_of": 2, "logprobs": 2}
        found = await self.ask(here, "text/m", **fields)
        (asked,) = upstream.asked
        assert asked.path == "/v1/completions"
        assert {name: asked.json[name] for name in fields} == fields
        assert "messages" not in asked.json
        assert found.json["object"] == "text_completion"
        (choice,) = found.json["choices"]
        assert (choice["text"], choice["finish_reason"], choice["index"], choice["logprobs"]) == ("Hello", "stop", 0, None)

    async def test_a_native_stream(self, here: Gateway) -> None:
        answer = await self.ask(here, "text/m", stream=True)
        assert answer.done
        choices = [choice for chunk in answer.chunks for choice in chunk["choices"]]
        assert "".join(choice["text"] for choice in choices) == "Hello"
        assert {chunk["object"] for chunk in answer.chunks} == {"text_completion"}
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]


class TestEmbeddings:
    async def test_they_pass_as_they_are(self, upstream: Upstream, here: Gateway) -> None:
        body = {"model": "openai/m", "input": ["a", "b"], "dimensions": 2, "encoding_format": "float"}
        answer = await ask(here.port, body, "/v1/embeddings")
        assert answer.json == {**EMBEDDINGS, "model": answer.json["model"]}
        assert upstream.asked[0].json == {**body, "model": "m"}

    @pytest.mark.parametrize("api", ["anthropic", "gemini", "cohere"])
    async def test_where_they_are_not_spoken_it_is_a_400(self, upstream: Upstream, here: Gateway, api: str) -> None:
        answer = await ask(here.port, {"model": f"{api}/m", "input": "a"}, "/v1/embeddings")
        assert answer.status == 400
        assert answer.json["error"]["message"]
        assert upstream.asked == []

    async def test_they_are_not_streamed(self, upstream: Upstream, here: Gateway) -> None:
        assert_refused(
            await ask(here.port, {"model": "openai/m", "input": "a", "stream": True}, "/v1/embeddings"), 400, param="stream"
        )
        assert upstream.asked == []
