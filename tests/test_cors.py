"""Pages of other origins: who may call, and that whoever may can read every answer, whatever it is and whichever way it came in.

Strategy: raw sockets, through the lane and through aiohttp's parser, against one gateway after another: with cors on, off, for
everybody. The list of refusals is the whole of what can happen before and in a call. At the end a real browser has the last word.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from middleware import TABLE
from proxy import origins
from proxy.app import Gateway
from proxy.config import ConfigError, parse
from proxy.cors import Cors, Policy
from proxy.origins import Origins
from tests.support.formats import FORMATS
from tests.support.gateway import Answer, RawClient, chat, gateway, raw_request, until
from tests.support.upstream import Upstream, whole

Json = dict[str, Any]
APP, EVIL = "https://app.example", "https://evil.example"
KEY = "sk-page-0123456789abcdef"
CONFIG = """
server: {{port: 0, drain_timeout: 50ms, max_body: 1KiB{server}}}
default_provider: openai
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  gone: {{api: openai, base_url: "http://127.0.0.1:9/v1", api_key: "sk-upstream-0123456789"}}
  off: {{api: openai, base_url: "http://127.0.0.1:9/v1", api_key: "${{NOT_SET}}"}}
  demo: {{api: demo}}
middleware: [{middleware}]
"""
ON = f', cors: {{origins: ["{APP}", "https://*.app.example", "http://localhost:5173"], max_age: 10m, headers: [X-Team]}}'
EVERYBODY = ', allow_anonymous: true, cors: {origins: ["*"]}'
AUTH = f"auth: {{keys: [{{name: page, key: {KEY}}}]}}"
WAYS = ("lane", "aiohttp")


@asynccontextmanager
async def serving(server: str = ON, *middleware: str) -> AsyncIterator[Gateway]:
    wire = FORMATS["openai"]
    async with (
        Upstream(whole(wire.whole)) as upstream,
        gateway(upstream.url, CONFIG, server=server, middleware=", ".join(middleware)) as running,
    ):
        yield running


async def asked(here: Gateway, request: bytes, way: str = "lane", *, bodiless: bool = False) -> Answer:
    """way: HTTP/1.1 as usual, or with something that only aiohttp reads."""
    if way == "aiohttp":
        head, _, body = request.partition(b"\r\n\r\n")
        request = head + b"\r\nTE: trailers\r\n\r\n" + body
    async with RawClient(here.port) as client:
        await client.send(request)
        return await client.answer(bodiless=bodiless)


def preflight(path: str, method: str = "POST", origin: str = APP, wanted: str = "", **headers: str) -> bytes:
    fields: Any = {"Origin": origin, "Access_Control_Request_Method": method, "Access_Control_Request_Headers": wanted, **headers}
    return raw_request(path=path, method="OPTIONS", Content_Type="", Content_Length="", **fields)


def allowed(answer: Answer) -> tuple[str | None, str | None, str | None]:
    """(who may read it, what of its head, what it depends on)"""
    headers = answer.headers
    return (
        headers.get("Access-Control-Allow-Origin"),
        headers.get("Access-Control-Expose-Headers"),
        headers.get("Vary"),
    )


READABLE = (APP, "*", "Origin")
HIDDEN = (None, None, "Origin")


class TestPreflight:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("path", "methods"),
        [
            ("/v1/chat/completions", "POST"),
            ("/chat/completions", "POST"),
            ("/v3/router/chat/completions", "POST"),
            ("/v1/completions", "POST"),
            ("/api/v1/embeddings", "POST"),
            ("/v1/models", "GET"),
            ("/v2/models/openai/gpt-4o", "GET"),
            ("/v1/streams/str_0123", "GET, DELETE, HEAD"),
            ("/v1/streams/str_0123?token=x", "GET, DELETE, HEAD"),
            ("/metrics", "GET, HEAD"),
            ("/healthz", "GET, HEAD"),
            ("/readyz?verbose", "GET, HEAD"),
        ],
    )
    async def test_every_path_says_which_methods_it_takes_without_a_key(self, path: str, methods: str, way: str) -> None:
        async with serving(ON, "resume", "metrics", AUTH) as here:
            answer = await asked(here, preflight(path), way)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["Access-Control-Allow-Methods"] == methods
        assert (answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"]) == (APP, "Origin")
        assert answer.headers["Access-Control-Max-Age"] == "600"
        assert "Access-Control-Allow-Credentials" not in answer.headers

    async def test_the_headers_that_clients_send_are_allowed_and_no_others(self) -> None:
        wanted = "authorization,content-type,x-stainless-lang,x-penstock-name,x-team,last-event-id,x-evil,x: y"
        async with serving() as here:
            answer = await asked(here, preflight("/v1/chat/completions", wanted=wanted))
            everything = await asked(here, preflight("/v1/chat/completions"))
        found = answer.headers["Access-Control-Allow-Headers"].split(", ")
        assert set(wanted.split(",")) - set(found) == {"x-evil", "x: y"}
        assert len(found) == len(set(found))
        assert "authorization" in everything.headers["Access-Control-Allow-Headers"], "remembered for the next request"

    async def test_any_header_is_allowed_where_the_operator_says_so_but_nothing_that_is_none(self) -> None:
        async with serving(', cors: {origins: ["https://app.example"], headers: ["*"]}') as here:
            answer = await asked(here, preflight("/v1/models", wanted="x-any, X-Other,\tb@d,"))
        assert answer.headers["Access-Control-Allow-Headers"].endswith("user-agent, x-any, x-other")

    @pytest.mark.parametrize("way", WAYS)
    async def test_other_origins_get_a_403_that_names_the_setting_and_allows_nothing(self, way: str) -> None:
        async with serving(ON, AUTH) as here:
            answer = await asked(here, preflight("/v1/chat/completions", origin=EVIL), way)
        assert (answer.status, answer.json["error"]["code"]) == (403, "origin_not_allowed")
        assert "server.cors.origins" in answer.json["error"]["message"]
        assert [name for name in answer.headers if name.lower().startswith("access-control")] == []
        assert answer.headers["Vary"] == "Origin"

    async def test_a_path_where_nothing_is_has_none(self) -> None:
        async with serving() as here:
            answer = await asked(here, preflight("/v1/nowhere"))
        assert (answer.status, answer.json["error"]["code"]) == (404, "unknown_path")
        assert allowed(answer) == READABLE

    async def test_without_auth_not_even_a_preflight_is_answered_to_another_host(self) -> None:
        async with serving() as here:
            answer = await asked(here, preflight("/v1/chat/completions", Host="evil.example"))
        assert (answer.status, answer.json["error"]["code"]) == (403, "host_not_allowed")

    async def test_an_options_that_is_no_preflight_is_refused_as_ever(self) -> None:
        async with serving() as here:
            answer = await asked(here, preflight("/v1/chat/completions", method=""))
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")

    @pytest.mark.parametrize(("server", "found"), [(ON, "true"), (EVERYBODY, None)])
    async def test_only_a_named_origin_may_come_from_a_public_page_into_a_private_network(
        self, server: str, found: str | None
    ) -> None:
        async with serving(server) as here:
            request = preflight("/v1/models", Access_Control_Request_Private_Network="true")
            answer = await asked(here, request)
            other = await asked(here, preflight("/v1/models"))
        assert answer.status == 204
        assert answer.headers.get("Access-Control-Allow-Private-Network") == found
        assert "Access-Control-Allow-Private-Network" not in other.headers

    async def test_it_takes_no_slot_and_is_answered_while_the_gateway_is_full(self) -> None:
        async with serving(ON + ", max_streams: 1", "resume") as here, RawClient(here.port) as busy:
            await busy.send(raw_request(chat("demo/slow")))
            await busy.first_byte()
            refused = await asked(here, raw_request(chat("demo/slow"), Origin=APP))
            found = [(await asked(here, preflight(path))).status for path in ("/v1/chat/completions", "/v1/streams/x")]
        assert (refused.status, found) == (503, [204, 204])


class TestAnswers:
    async def test_an_error_is_as_readable_as_a_reply(self) -> None:
        """Every refusal before and in a call."""
        bearer: Any = {"Authorization": f"Bearer {KEY}"}
        asks: list[tuple[int, bytes]] = [
            (200, raw_request(chat(stream=False), **bearer)),
            (200, raw_request(chat("demo/fast"), **bearer)),
            (200, raw_request(path="/v1/models", method="GET", **bearer)),
            (200, raw_request(path="/healthz", method="GET")),
            (401, raw_request(chat())),
            (401, raw_request(chat(), Authorization="Bearer sk-wrong-0123456789abcdef")),
            (403, raw_request(path="/metrics", method="GET", **bearer)),
            (404, raw_request(path="/nowhere", **bearer)),
            (404, raw_request(chat("nonesuch/x"), **bearer)),
            (404, raw_request(path="/v1/streams/str_none", method="GET", **bearer)),
            (405, raw_request(path="/v1/chat/completions", method="GET", **bearer)),
            (400, raw_request(b"{", **bearer)),
            (415, raw_request(chat(), Content_Type="image/png", **bearer)),
            (413, raw_request(Content_Length="99999", **bearer)),
            (408, raw_request(Content_Length="9", **bearer)),
            (502, raw_request(chat("gone/m"), **bearer)),
            (503, raw_request(chat("off/m"), **bearer)),
        ]
        async with serving(ON + ", body_timeout: 1ms", "resume", "metrics", AUTH) as here:
            for way in WAYS:
                for status, request in asks:
                    page = request.replace(b"\r\n", f"\r\nOrigin: {APP}\r\n".encode(), 1)
                    answer = await asked(here, page, way)
                    assert (answer.status, allowed(answer)) == (status, READABLE), (way, request)
                    if status >= 400:
                        assert answer.json["error"]["message"]

    @pytest.mark.parametrize("way", WAYS)
    async def test_limits_overload_and_drain_are_readable(self, way: str) -> None:
        bearer: Any = {"Authorization": f"Bearer {KEY}"}
        async with serving(ON + ", max_streams: 1", AUTH, "limits: {per_key: {requests_per_minute: 1}}") as here:
            request = raw_request(chat(stream=False), Origin=APP, **bearer)
            async with RawClient(here.port) as busy:
                await busy.send(raw_request(chat("demo/slow"), **bearer))
                await busy.first_byte()
                found = [await asked(here, request, way)]
            await until(lambda: here.edge.open_calls == 0)
            found.append(await asked(here, request, way))
            here.edge.draining = True
            found.append(await asked(here, request, way))
        assert [(answer.status, answer.json["error"]["code"]) for answer in found] == [
            (503, "overloaded"), (429, "rate_limit_exceeded"), (503, "draining"),
        ]  # fmt: skip
        assert [allowed(answer) for answer in found] == [READABLE] * 3
        assert all("Retry-After" in answer.headers for answer in found)

    async def test_what_the_gateway_fails_on_is_readable(self, monkeypatch: pytest.MonkeyPatch, lines: object) -> None:
        async with serving() as here:
            monkeypatch.setattr(type(here.edge), "_check_host", lambda *_: 1 / 0)
            answer = await asked(here, raw_request(chat(), Origin=APP))
        assert (answer.status, allowed(answer)) == (500, READABLE)

    @pytest.mark.parametrize(
        "odd",
        [
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nOrigin: %b\r\nX : 1\r\n\r\n",
            b"GET /%b HTTP/1.1\r\nHost: a\r\nOrigin: %%b\r\n\r\n" % (b"x" * 40_000),
            b"POST /v1/x HTTP/1.1\r\nHost: a\r\noRiGin:  %b\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        ],
    )
    @pytest.mark.parametrize(
        ("server", "who", "expected"),
        [(ON, APP, READABLE), (ON, EVIL, HIDDEN), (EVERYBODY, EVIL, ("*", "*", None)), ("", APP, (None, None, None))],
    )
    async def test_what_aiohttp_refuses_by_itself_is_readable_too(
        self, odd: bytes, server: str, who: str, expected: tuple[str | None, ...]
    ) -> None:
        async with serving(server) as here, RawClient(here.port) as client:
            await client.send(odd % who.encode())
            answer = await client.answer()
        assert answer.status == 400
        assert allowed(answer) == expected

    async def test_a_stream_that_begins_before_its_first_chunk_is_readable(self) -> None:
        async with serving(ON + ", keepalive_after: 10ms", "timeout: {first_chunk_timeout: 60s}") as here:
            late = await asked(here, raw_request(chat("demo/slow", max_tokens=1), Origin=APP))
        assert (late.status, allowed(late)) == (200, READABLE)
        assert late.body.startswith(b": keep-alive\n\n")

    async def test_head_and_http_1_0_are_told_the_same(self) -> None:
        async with serving() as here:
            head = raw_request(path="/healthz", method="HEAD", Origin=APP)
            old = raw_request(chat(stream=False), Origin=APP).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
            assert allowed(await asked(here, head, bodiless=True)) == READABLE
            assert allowed(await asked(here, old)) == READABLE

    async def test_requests_on_one_connection_are_answered_each_for_its_own_origin(self) -> None:
        async with serving(ON, AUTH) as here, RawClient(here.port) as client:
            found = []
            for origin in (APP, "https://a.app.example", EVIL, "", APP):
                await client.send(raw_request(path="/healthz", method="GET", Origin=origin))
                found.append(allowed(await client.answer()))
        assert found == [READABLE, ("https://a.app.example", "*", "Origin"), HIDDEN, HIDDEN, READABLE]

    async def test_for_everybody_an_answer_is_the_same_with_and_without_an_origin(self) -> None:
        async with serving(EVERYBODY) as here:
            for origin in ("", EVIL, "null"):
                answer = await asked(here, raw_request(path="/v1/models", method="GET", Origin=origin))
                assert allowed(answer) == ("*", "*", None)

    async def test_cookies_are_only_for_named_origins_and_see_a_list_of_headers(self) -> None:
        async with serving(f', cors: {{origins: ["{APP}"], credentials: true}}') as here:
            answer = await asked(here, raw_request(chat(stream=False), Origin=APP))
            none = await asked(here, raw_request(path="/healthz", method="GET", Origin=EVIL))
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
        shown = answer.headers["Access-Control-Expose-Headers"].lower().split(", ")
        ours = {name.lower() for name in answer.headers if name.lower().startswith(("x-", "server-timing"))}
        assert ours
        assert ours <= set(shown)
        assert {"retry-after", "x-stream-id", "x-cache", "x-ratelimit-remaining-tokens"} <= set(shown)
        assert "Access-Control-Allow-Credentials" not in none.headers


class TestOff:
    async def test_an_origin_changes_nothing(self) -> None:
        """Byte by byte, but for what is of the moment. A page of this machine: no other may post without auth."""
        moment = re.compile(rb"(Date|Server-Timing): [^\r]*\r\n")
        requests = [
            raw_request(chat(stream=False), X_Request_Id="r"),
            raw_request(path="/v1/models", method="GET", X_Request_Id="r"),
            raw_request(path="/v1/chat/completions", method="OPTIONS", X_Request_Id="r", Access_Control_Request_Method="POST"),
            raw_request({}, X_Request_Id="r"),
            raw_request(path="/healthz", method="GET"),
        ]
        async with serving("") as here:
            for request in requests:
                for way in WAYS:
                    plain, page = [
                        moment.sub(b"", await raw_bytes(here, request.replace(b"\r\n", line, 1), way))
                        for line in (b"\r\n", b"\r\nOrigin: http://localhost:5173\r\n")
                    ]
                    assert plain == page
                    assert b"Vary" not in plain
                    assert b"Access-Control" not in plain


async def raw_bytes(here: Gateway, request: bytes, way: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
    extra = b"\r\nTE: trailers" if way == "aiohttp" else b""
    writer.write(request.replace(b"\r\n", extra + b"\r\nConnection: close\r\n", 1))
    try:
        return await reader.read()
    finally:
        writer.close()


class TestWithoutAuth:
    """A page can send a simple request (text/plain) without asking first; only what it may read was its browser's business."""

    SIMPLE = raw_request(chat("demo/fast", stream=False), Content_Type="text/plain", Origin=EVIL)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("server", [ON, ", cors: {origins: []}"])
    async def test_with_cors_on_a_page_that_is_not_named_cannot_even_spend(self, server: str, way: str) -> None:
        async with serving(server) as here:
            answer = await asked(here, self.SIMPLE, way)
        assert (answer.status, answer.json["error"]["code"]) == (403, "origin_not_allowed")
        assert allowed(answer) == HIDDEN

    @pytest.mark.parametrize(
        "origin", [EVIL, "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example:80", "app://x"]
    )
    async def test_with_cors_off_it_cannot_either(self, origin: str) -> None:
        async with serving("") as here:
            answer = await asked(here, raw_request(chat("demo/fast", stream=False), Content_Type="text/plain", Origin=origin))
        assert (answer.status, answer.json["error"]["code"]) == (403, "origin_not_allowed")

    @pytest.mark.parametrize("origin", ["http://localhost:5173", "http://127.0.0.1:8080", "https://[::1]:8443"])
    async def test_a_page_of_this_machine_is_its_users_own(self, origin: str) -> None:
        """A development server hands its page's Origin on."""
        async with serving("") as here:
            assert (await asked(here, raw_request(chat("demo/fast", stream=False), Origin=origin))).status == 200

    async def test_with_auth_a_key_is_what_it_takes(self) -> None:
        """Servers forward the Origin of their own clients."""
        async with serving(ON, AUTH) as here:
            forwarded = raw_request(chat("demo/fast", stream=False), Origin=EVIL, Authorization=f"Bearer {KEY}")
            answer = await asked(here, forwarded)
        assert (answer.status, allowed(answer)) == (200, HIDDEN)


class TestReload:
    async def test_origins_change_with_the_next_request(self) -> None:
        async with serving("") as here, RawClient(here.port) as client:
            request = raw_request(path="/healthz", method="GET", Origin=APP)
            found = []
            for server in (ON, "", EVERYBODY):
                config = parse(CONFIG.format(url="http://127.0.0.1:9", server=server, middleware=""), {}, TABLE)
                named = await here.reload(config)
                await client.send(request)
                found.append(allowed(await client.answer()))
                assert "~cors" in named[0]
        assert found == [READABLE, (None, None, None), ("*", "*", None)]


class TestConfig:
    @pytest.mark.parametrize(
        ("cors", "fault"),
        [
            ('["https://app.example/"]', "origins[0] (line 2): must be an origin as browsers send it"),
            ('["https://App.example"]', "must be an origin as browsers send it"),
            ('["app.example"]', "must be an origin as browsers send it"),
            ('["https://*"]', "must be an origin as browsers send it"),
            ('["https://app.*"]', "must be an origin as browsers send it"),
            ('["https://a*.example.com"]', "must be an origin as browsers send it"),
            ('["https://*.com"]', "a domain of at least two parts"),
            ('["https://app.example:443"]', "leave out the default port"),
            ('["http://app.example:70000"]', "none above 65535"),
            ('["null"]', "it names nobody"),
            ('["*"]', "there is no auth; set allow_anonymous: true if that is meant"),
            ('["https://a.example"], max_age: 2d', "max_age (line 2): must be from 0 to 86400"),
            ('["https://a.example"], header: [x]', "unknown key; did you mean 'headers'?"),
            ('["https://a.example"], headers: ["a b"]', "headers[0] (line 2)"),
            ('["*"], credentials: true', "credentials (line 2): cookies are only for origins that are named"),
        ],
    )
    def test_a_fault_is_named(self, cors: str, fault: str) -> None:
        text = CONFIG.format(url="http://h", server=f", cors: {{origins: {cors}}}", middleware="")
        with pytest.raises(ConfigError, match=re.escape(fault)):
            parse(text, {}, TABLE)

    @pytest.mark.parametrize(
        "origin",
        [
            "https://app.example", "http://localhost:5173", "http://127.0.0.1:3000", "http://[::1]:8080", "https://*.app.example",
            "http://*.localhost:3000", "chrome-extension://abcdefghijklmnop", "capacitor://localhost", "https://xn--bcher-kva.example",
        ],
    )  # fmt: skip
    def test_what_browsers_send_is_taken(self, origin: str) -> None:
        origins.check(origin)
        assert (origin in Origins([origin])) == ("*" not in origin)

    def test_everybody_may_come_where_keys_are_asked_for(self) -> None:
        assert parse(CONFIG.format(url="http://h", server=', cors: {origins: ["*"]}', middleware=AUTH), {}, TABLE).server.cors


class TestMatching:
    WILD = Origins(["https://*.example.com", "http://*.dev.example.com:3000"])

    @pytest.mark.parametrize(
        "origin",
        ["https://a.example.com", "https://a.b-c.example.com", "https://x1.example.com", "http://a.dev.example.com:3000"],
    )
    def test_whole_labels_match(self, origin: str) -> None:
        assert origin in self.WILD

    @pytest.mark.parametrize(
        "origin",
        [
            "https://example.com", "https://.example.com", "https://evilexample.com", "https://a.example.com.evil.test",
            "http://a.example.com", "https://a.example.com:8443", "https://evil.test/.example.com", "https://evil.test#.example.com",
            "https://evil.test?.example.com", "https://evil.test\\.example.com", "https://user@a.example.com", "https://A.example.com",
            "https://a..example.com", "https://-a.example.com", "https://a.example.com\n", "https://a.exampleXcom", "", "null",
            "https://*.example.com", "https://a.example.com https://b.example.com", "http://a.dev.example.com",
        ],
    )  # fmt: skip
    def test_nothing_else_does(self, origin: str) -> None:
        assert origin not in self.WILD

    @given(st.text(max_size=40))
    def test_no_text_around_a_domain_is_a_subdomain(self, text: str) -> None:
        matches = f"https://{text}.example.com" in self.WILD
        assert matches == bool(
            re.fullmatch(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", text, re.ASCII)
        )

    @given(st.text(max_size=40))
    def test_an_origin_never_becomes_a_header_line_of_its_own(self, origin: str) -> None:
        lines = Cors(Policy(("https://*.example.com",))).lines(origin)
        assert lines == "Vary: Origin\r\n" or "\r" not in origin


async def test_the_curl_of_the_docs_and_the_configs_beside_it() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (Path(__file__).parent.parent / "docs" / "browsers.md").read_text()
    (command,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (said,) = re.findall(r"```\n(HTTP.*?)```", text, re.DOTALL)
    cors, key = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert parse(key, {"SITE_KEY": KEY}, TABLE).middleware[0].options["keys"][0].limits.per_client.concurrent == 2
    async with Gateway(parse(cors.replace("server:", "server:\n  port: 0"), {}, TABLE)) as here:
        command = command.replace("127.0.0.1:8080", f"127.0.0.1:{here.port}")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=pipe)
        out = (await process.communicate())[0].decode()
    for line in said.strip().splitlines():
        assert line.partition("…")[0] in out


PAGE = """<!doctype html><meta charset=utf-8><script>
const base = %s, found = {};
const headers = { "Content-Type": "application/json", "X-Penstock-Name": "page", Authorization: "Bearer %s" };
const chat = (model, more) => ({ method: "POST", headers,
  body: JSON.stringify({ model, messages: [{ role: "user", content: "Hello, page" }], ...more }) });
async function look(name, path, options) {
  try {
    const response = await fetch(base + path, options);
    found[name] = { status: response.status, id: response.headers.get("X-Request-Id"), text: await response.text() };
  } catch (error) { found[name] = { refused: String(error) }; }
}
(async () => {
  await look("whole", "/v1/chat/completions", chat("demo/fast"));
  await look("stream", "/v1/chat/completions", chat("demo/fast", { stream: true }));
  await look("third", "/v1/chat/completions", chat("demo/fast"));
  await look("models", "/v1/models", { headers });
  await look("error", "/v1/chat/completions", chat("nonesuch/x"));
  await look("missing", "/v1/streams/str_none", { method: "DELETE", headers });
  await fetch("/told", { method: "POST", body: JSON.stringify(found) });
})();
</script>"""


@asynccontextmanager
async def pages(profile: Path) -> AsyncIterator[tuple[int, Callable[[str, int], Awaitable[Json]]]]:
    """The port of a server of pages, and: what a page of that host finds out about the gateway at a port, in a real browser."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    told: asyncio.Queue[Json] = asyncio.Queue()
    page = ""

    async def shown(request: web.BaseRequest) -> web.Response:
        if request.method == "POST":
            told.put_nowait(await request.json())
        return web.Response(text=page if request.path == "/" else "", content_type="text/html")

    async def browsed(host: str, port: int) -> Json:
        nonlocal page
        page = PAGE % (json.dumps(f"http://127.0.0.1:{port}"), KEY)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile / host}", "--no-proxy-server"]
        none = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(browser, *flags, f"http://{host}:{own}/", stdout=none, stderr=none)
        try:
            async with asyncio.timeout(60):
                return await told.get()
        finally:
            process.kill()
            await process.wait()

    runner = web.ServerRunner(web.Server(shown))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    own = runner.addresses[0][1]
    try:
        yield own, browsed
    finally:
        await runner.cleanup()


async def test_a_browser_lets_pages_read_what_the_operator_allowed_and_nothing_else(tmp_path: Path) -> None:
    """Chromium: the same page from two origins, of which one is allowed."""
    async with (
        pages(tmp_path) as (port, browsed),
        serving(f', cors: {{origins: ["http://127.0.0.1:{port}"]}}', "resume") as here,
    ):
        page, other = [await browsed(host, here.port) for host in ("127.0.0.1", "localhost")]
    assert (page["whole"]["status"], page["stream"]["status"], page["models"]["status"]) == (200, 200, 200)
    assert "Hello, page" in page["whole"]["text"]
    assert page["stream"]["text"].endswith("data: [DONE]\n\n")
    assert all(page[name]["id"].startswith("req_") for name in ("whole", "stream", "error", "missing"))
    assert (page["error"]["status"], json.loads(page["error"]["text"])["error"]["code"]) == (404, "model_not_found")
    assert (page["missing"]["status"], json.loads(page["missing"]["text"])["error"]["code"]) == (404, "stream_not_found")
    assert other == {name: {"refused": "TypeError: Failed to fetch"} for name in page}


async def test_a_pages_key_is_of_no_use_to_another_page_and_an_error_tells_it_so(tmp_path: Path) -> None:
    """Chromium: both origins may call, the key is bound to one of them, and has two requests a minute for each address."""
    async with pages(tmp_path) as (port, browsed):
        mine, other = (f"http://{host}:{port}" for host in ("127.0.0.1", "localhost"))
        key = f'{{name: page, key: {KEY}, origins: ["{mine}"], limits: {{per_client: {{requests_per_minute: 2}}}}}}'
        async with serving(f', cors: {{origins: ["{mine}", "{other}"]}}', "resume", f"auth: {{keys: [{key}]}}", "limits") as here:
            page, stranger = [await browsed(host, here.port) for host in ("127.0.0.1", "localhost")]
    assert [page[name]["status"] for name in ("whole", "stream", "third", "models")] == [200, 200, 429, 200]
    assert json.loads(page["third"]["text"])["error"]["code"] == "rate_limit_exceeded"
    assert {found["status"] for found in stranger.values()} == {403}
    assert {json.loads(found["text"])["error"]["code"] for found in stranger.values()} == {"origin_not_allowed"}
