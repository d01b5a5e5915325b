"""The clients that people have, against a running gateway: what their parsers and error classes make of its answers.

Strategy: the official SDKs, requests and curl ask a real gateway; behind it stands the built-in demo, or a scripted provider
where the answer must be exact or break. What a client cannot be run here for is skipped with the reason.
The one rule: no client is told anything but a base URL.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from proxy.app import Gateway
from tests.support.gateway import gateway, until
from tests.support.upstream import Answer, Asked, Line, Upstream, stream, whole

T = TypeVar("T")
Json = dict[str, Any]
NODE = Path(__file__).parent / "node"
CONFIG = """
server: {{port: 0, drain_timeout: 1s}}
default_provider: openai
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789", models: [gpt-one]}}
  anthropic: {{api: anthropic, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  keyless: {{api: openai, base_url: "{url}/v1", api_key: "${{PENSTOCK_TEST_UNSET_KEY}}"}}
  demo: {{api: demo, models: [echo, fast]}}
models: {{quick: demo/fast}}
middleware:
  - tracking
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: 5s, call_timeout: 10s}}
"""
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ENVIRON = dict(os.environ)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of this machine's between a client and the gateway, and no key or address of the developer's own."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)


def event(delta: Json, finish: str | None = None, **fields: Any) -> bytes:
    found = {"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}
    return b"data: %b\n\n" % json.dumps(found).encode()


def call(index: int, text: str, **fields: Any) -> Json:
    """A delta of one tool call, as OpenAI sends them."""
    name = fields.pop("name", None)
    return {"tool_calls": [{"index": index, **fields, "function": {**({"name": name} if name else {}), "arguments": text}}]}


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
WORDS = stream(
    [
        event({"role": "assistant", "content": ""}),
        event({"content": "Grüße, "}),
        event({"content": "🌊"}),
        event({}, "stop"),
        b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": [], "usage": USAGE}).encode(),
        DONE,
    ]
)
TOOLS = stream(
    [
        event(call(0, "", id="call_a", type="function", name="weather")),
        event(call(0, '{"ci')),
        event(call(0, 'ty": "Ulm"}')),
        event(call(1, "", id="call_b", type="function", name="weather")),
        event(call(1, '{"city": "Bonn"}')),
        event({}, "tool_calls"),
        DONE,
    ]
)
CALLS = [{"name": "weather", "arguments": '{"city": "Ulm"}'}, {"name": "weather", "arguments": '{"city": "Bonn"}'}]
ERROR_BODY = {"error": {"message": "the provider's words", "type": "some_error", "param": "temperature", "code": "some_code"}}
BROKEN = stream([event({"content": "half "}), b"data: %b\n\n" % json.dumps(ERROR_BODY).encode()])


def refusal(status: int) -> Answer:
    return whole(json.dumps(ERROR_BODY).encode(), status)


async def cut(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(event({"content": "half "}))
    line.hang_up()


async def held(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(event({"content": "half "}))
    await line.forever()


@asynccontextmanager
async def serving(answer: Answer | None = None, config: str = CONFIG) -> AsyncIterator[tuple[Gateway, Upstream]]:
    async with Upstream(answer) as upstream, gateway(upstream.url, config) as running:
        yield running, upstream


def base(running: Gateway) -> str:
    return f"http://127.0.0.1:{running.port}/v1"


async def in_thread(running: Gateway, use: Callable[[OpenAI], T]) -> T:
    """What `use` returns, run with a synchronous client beside the event loop."""

    def run() -> T:
        with OpenAI(base_url=base(running), api_key="unused", max_retries=0, timeout=10) as client:
            return use(client)

    return await asyncio.to_thread(run)


def asynchronous(running: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=base(running), api_key="unused", max_retries=0, timeout=10)


# openai, the Python SDK.


class Seen:
    """What a user of the SDK puts together from a stream."""

    def __init__(self) -> None:
        self.text = ""
        self.finish: str | None = None
        self.usage: Any = None
        self.ids: set[str] = set()

    def add(self, chunk: Any) -> None:
        self.ids.add(chunk.id)
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            self.text += choice.delta.content or ""
            self.finish = choice.finish_reason or self.finish


def check_words(seen: Seen) -> None:
    assert (seen.text, seen.finish) == ("Grüße, 🌊", "stop")
    assert len(seen.ids) == 1
    assert (seen.usage.prompt_tokens, seen.usage.completion_tokens, seen.usage.total_tokens) == (7, 2, 9)


async def test_python_streams() -> None:
    def use(client: OpenAI) -> Seen:
        seen = Seen()
        found = client.chat.completions.create(
            model="openai/m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        for chunk in found:
            seen.add(chunk)
        return seen

    async with serving(WORDS) as (running, _):
        check_words(await in_thread(running, use))


async def test_python_streams_asynchronously() -> None:
    seen = Seen()
    async with serving(WORDS) as (running, _), asynchronous(running) as client:
        found = await client.chat.completions.create(
            model="openai/m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in found:
            seen.add(chunk)
    check_words(seen)


async def test_python_sees_no_usage_that_it_did_not_ask_for() -> None:
    seen = Seen()
    async with serving(WORDS) as (running, _), asynchronous(running) as client:
        async for chunk in await client.chat.completions.create(model="openai/m", messages=MESSAGES, stream=True):
            assert chunk.choices, "a chunk without choices breaks clients that index the first"
            seen.add(chunk)
    assert seen.text == "Grüße, 🌊"
    assert seen.usage is None


def calls_of(completion: Any) -> list[Json]:
    assert completion.choices[0].finish_reason == "tool_calls"
    calls = completion.choices[0].message.tool_calls
    assert len({found.id for found in calls}) == len(calls)
    return [{"name": found.function.name, "arguments": found.function.arguments} for found in calls]


async def test_python_accumulates_tool_calls() -> None:
    def use(client: OpenAI) -> Any:
        with client.chat.completions.stream(model="openai/m", messages=MESSAGES, tools=[WEATHER]) as found:
            return found.get_final_completion()

    async with serving(TOOLS) as (running, _):
        assert calls_of(await in_thread(running, use)) == CALLS
        async with (
            asynchronous(running) as client,
            client.chat.completions.stream(model="openai/m", messages=MESSAGES, tools=[WEATHER]) as found,
        ):
            assert calls_of(await found.get_final_completion()) == CALLS


async def test_python_accumulates_tool_calls_of_the_demo() -> None:
    async with (
        serving() as (running, _),
        asynchronous(running) as client,
        client.chat.completions.stream(model="demo/tool", messages=MESSAGES, tools=[WEATHER]) as found,
    ):
        (called,) = calls_of(await found.get_final_completion())
    assert called["name"] == "weather"
    assert "city" in json.loads(called["arguments"])


async def test_python_gets_whole_replies() -> None:
    async with serving(WORDS) as (running, _):
        found = await in_thread(running, lambda client: client.chat.completions.create(model="quick", messages=MESSAGES))
        assert found.model == "quick"
        assert found.choices[0].message.content
        assert found.choices[0].finish_reason == "stop"
        assert found.usage is not None
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        async with asynchronous(running) as client:
            folded = await client.chat.completions.create(model="openai/m", messages=MESSAGES)
    assert folded.choices[0].message.content == "Grüße, 🌊"
    assert folded.object == "chat.completion"


async def test_python_gets_completions() -> None:
    async with serving() as (running, _), asynchronous(running) as client:
        text = ""
        async for chunk in await client.completions.create(model="demo/fast", prompt="Say something", stream=True):
            assert chunk.object == "text_completion"
            text += chunk.choices[0].text
        whole_reply = await in_thread(running, lambda sync: sync.completions.create(model="demo/fast", prompt="Say something"))
    assert "Say something" in text
    assert whole_reply.choices[0].text == text
    assert whole_reply.choices[0].finish_reason == "stop"


async def test_python_gets_embeddings() -> None:
    """The SDK asks for base64 unless told otherwise, and decodes it."""
    async with serving() as (running, _), asynchronous(running) as client:
        packed = await client.embeddings.create(model="demo/embed", input=["water", "wheel"])
        plain = await client.embeddings.create(model="demo/embed", input=["water", "wheel"], encoding_format="float")
    assert [found.index for found in packed.data] == [0, 1]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert packed.usage.prompt_tokens == 2


async def test_python_lists_models() -> None:
    async with serving() as (running, _):
        names = await in_thread(running, lambda client: [model.id for model in client.models.list()])
        one = await in_thread(running, lambda client: client.models.retrieve("demo/echo"))
    assert {"quick", "demo/echo", "demo/fast", "openai/gpt-one"} <= set(names)
    assert one.id == "demo/echo"
    assert one.object == "model"


REFUSALS = [
    (400, openai.BadRequestError), (404, openai.NotFoundError), (422, openai.UnprocessableEntityError),
    (429, openai.RateLimitError), (500, openai.InternalServerError), (503, openai.InternalServerError),
]  # fmt: skip


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("status", "kind"), REFUSALS)
async def test_python_raises_a_providers_refusal_by_its_class(
    status: int, kind: type[openai.APIStatusError], streamed: bool
) -> None:
    def use(client: OpenAI) -> None:
        client.chat.completions.create(model="openai/m", messages=MESSAGES, stream=streamed)

    async with serving(refusal(status)) as (running, upstream):
        with pytest.raises(kind) as caught:
            await in_thread(running, use)
        async with asynchronous(running) as client:
            with pytest.raises(kind):
                await client.chat.completions.create(model="openai/m", messages=MESSAGES, stream=streamed)
    assert type(caught.value) is kind
    assert "the provider's words" in caught.value.message
    assert caught.value.request_id
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    ("model", "fields", "status", "param"),
    [
        ("nobody/m", {}, 404, "model"),
        ("openai/m", {"n": 0}, 400, "n"),
        ("openai/m", {"extra_body": {"stream_options": 1}}, 400, "stream_options"),
        ("keyless/m", {}, 503, None),
        ("demo/fail-429", {}, 429, None),
    ],
)
async def test_python_raises_the_gateways_own_refusals(model: str, fields: Json, status: int, param: str | None) -> None:
    async with serving() as (running, upstream), asynchronous(running) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model=model, messages=MESSAGES, **fields)
    assert caught.value.status_code == status
    assert caught.value.code if model != "demo/fail-429" else True
    if param is not None:
        assert caught.value.param == param
    assert upstream.asked == []


@pytest.mark.parametrize(
    ("answer", "model"),
    [(BROKEN, "openai/m"), (cut, "openai/m"), (BROKEN, "demo/fail-midstream"), (BROKEN, "demo/cut")],
    ids=["error", "cut", "demo-error", "demo-cut"],
)
async def test_python_raises_in_mid_stream(answer: Answer, model: str) -> None:
    """The text so far is not lost, and what is raised is an APIError, neither a status nor a broken connection."""
    seen, seen_sync = Seen(), Seen()

    def use(client: OpenAI) -> None:
        for chunk in client.chat.completions.create(model=model, messages=MESSAGES, stream=True):
            seen_sync.add(chunk)

    async def use_async(client: AsyncOpenAI) -> None:
        async for chunk in await client.chat.completions.create(model=model, messages=MESSAGES, stream=True):
            seen.add(chunk)

    async with serving(answer) as (running, _):
        async with asynchronous(running) as client:
            with pytest.raises(openai.APIError) as caught:
                await use_async(client)
        with pytest.raises(openai.APIError) as caught_sync:
            await in_thread(running, use)
    for found in (caught, caught_sync):
        assert type(found.value) is openai.APIError
        assert found.value.message
    assert seen.text == seen_sync.text != ""


# Comments in silences, and a stream that begins before its first chunk (docs/streams.md).
EARLY = CONFIG.replace("drain_timeout: 1s", "drain_timeout: 1s, keepalive_after: 20ms, keepalive_interval: 20ms")


def halting(comments: list[bytes]) -> Answer:
    """The words, with a silence before them and one in between, each until two comments were written."""

    async def answer(asked: Asked, line: Line) -> None:
        await until(lambda: len(comments) >= 2)
        await line.head()
        await line.chunk(event({"role": "assistant", "content": ""}), event({"content": "Grüße, "}))
        before = len(comments)
        await until(lambda: len(comments) >= before + 2)
        await line.chunk(event({"content": "🌊"}), event({}, "stop"))
        await line.chunk(
            b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": [], "usage": USAGE}).encode()
        )
        await line.chunk(DONE)
        await line.end()

    return answer


def failing_late(comments: list[bytes]) -> Answer:
    async def answer(asked: Asked, line: Line) -> None:
        await until(lambda: len(comments) >= 2)
        await refusal(429)(asked, line)

    return answer


async def test_python_reads_over_comments_and_a_late_commit(comments: list[bytes]) -> None:
    seen, seen_sync = Seen(), Seen()
    asked: Any = {"model": "openai/m", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}

    def use(client: OpenAI) -> None:
        for chunk in client.chat.completions.create(**asked):
            seen_sync.add(chunk)

    async with serving(halting(comments), EARLY) as (running, _), asynchronous(running) as client:
        async for chunk in await client.chat.completions.create(**asked):
            seen.add(chunk)
        comments.clear()
        await in_thread(running, use)
    check_words(seen)
    check_words(seen_sync)


async def test_python_raises_the_error_that_comes_after_a_late_commit(comments: list[bytes]) -> None:
    def use(client: OpenAI) -> None:
        for _ in client.chat.completions.create(model="openai/m", messages=MESSAGES, stream=True):
            pytest.fail("there was no chunk")

    async with serving(failing_late(comments), EARLY) as (running, _):
        with pytest.raises(openai.APIError) as caught:
            await in_thread(running, use)
    assert type(caught.value) is openai.APIError
    assert (caught.value.message, caught.value.code) == ("the provider's words", "some_code")


async def test_python_that_closes_its_stream_closes_the_upstream() -> None:
    async with serving(held) as (running, upstream), asynchronous(running) as client:
        found = await client.chat.completions.create(model="openai/m", messages=MESSAGES, stream=True)
        async for chunk in found:
            assert chunk.choices[0].delta.content == "half "
            break
        assert not upstream.lines[0].closed.is_set()
        await found.close()
        await asyncio.wait_for(upstream.lines[0].closed.wait(), 1.0)


# Clients that parse by hand.


async def test_requests_reads_lines_by_hand() -> None:
    requests = pytest.importorskip("requests", reason="the requests package is not installed")

    def use() -> tuple[str, list[str]]:
        body = {"model": "openai/m", "messages": MESSAGES, "stream": True}
        with requests.post(f"{base(running)}/chat/completions", json=body, stream=True, timeout=10) as response:
            assert response.status_code == 200
            lines = [line.decode() for line in response.iter_lines() if line]
        return response.headers["Content-Type"], lines

    async with serving(WORDS) as (running, _):
        kind, lines = await asyncio.to_thread(use)
    assert kind == "text/event-stream; charset=utf-8"
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "Grüße, 🌊"


async def test_curl_shows_each_word_as_it_comes() -> None:
    """The command that the gateway prints at its start."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    second = asyncio.Event()

    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "first"}))
        await second.wait()
        await line.chunk(event({"content": "second"}), event({}, "stop"), DONE)
        await line.end()

    body = json.dumps({"model": "openai/m", "stream": True, "messages": MESSAGES})
    async with serving(answer) as (running, _):
        process = await asyncio.create_subprocess_exec(
            curl, "-sS", "-N", "--noproxy", "*", f"{base(running)}/chat/completions",
            "-H", "Content-Type: application/json", "-d", body, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        async with asyncio.timeout(10):
            early = await process.stdout.readuntil(b"\n\n")
            assert b'"first"' in early
            second.set()
            rest, _ = await process.communicate()
    assert process.returncode == 0
    assert b'"second"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")


# openai, the Node SDK.


async def start(node: Json, running: Gateway, scenario: str, model: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        node["program"],
        str(NODE / "client.cjs"),
        base(running),
        scenario,
        model,
        env=node["env"],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )


async def ended(process: asyncio.subprocess.Process) -> Json:
    """The last line that the scenario told."""
    async with asyncio.timeout(20):
        out, err = await process.communicate(b"")  # and the end of its stdin
    assert process.returncode == 0, err.decode()
    found: Json = json.loads(out.decode().splitlines()[-1])
    return found


async def told(node: Json, answer: Answer | None, scenario: str, model: str = "openai/m", config: str = CONFIG) -> Json:
    async with serving(answer, config) as (running, _):
        return await ended(await start(node, running, scenario, model))


async def test_node_streams(node: Json) -> None:
    found = await told(node, WORDS, "stream")
    assert (found["text"], found["finish"]) == ("Grüße, 🌊", "stop")
    assert found["usage"].items() >= USAGE.items()


@pytest.mark.parametrize("model", ["openai/m", "demo/tool"])
async def test_node_accumulates_tool_calls(node: Json, model: str) -> None:
    found = await told(node, TOOLS, "tools", model)
    assert found["finish"] == "tool_calls"
    if model == "openai/m":
        assert [(one["name"], one["arguments"]) for one in found["calls"]] == [(one["name"], one["arguments"]) for one in CALLS]
    else:
        assert "city" in json.loads(found["calls"][0]["arguments"])


async def test_node_gets_whole_replies(node: Json) -> None:
    assert await told(node, WORDS, "whole") == {"text": "Grüße, 🌊", "finish": "stop"}


@pytest.mark.parametrize(
    ("answer", "model", "error", "status"),
    [
        (refusal(400), "openai/m", "BadRequestError", 400),
        (refusal(429), "openai/m", "RateLimitError", 429),
        (refusal(503), "openai/m", "InternalServerError", 503),
        (None, "nobody/m", "NotFoundError", 404),
    ],
)
async def test_node_raises_refusals_by_their_class(
    node: Json, answer: Answer | None, model: str, error: str, status: int
) -> None:
    found = await told(node, answer, "error", model)
    assert (found["error"], found["status"]) == (error, status)


@pytest.mark.parametrize("answer", [BROKEN, cut], ids=["error", "cut"])
async def test_node_raises_in_mid_stream(node: Json, answer: Answer) -> None:
    found = await told(node, answer, "midstream")
    assert (found["error"], found["status"], found["text"]) == ("APIError", None, "half ")
    assert found["code"]


async def test_node_reads_over_comments_and_a_late_commit(node: Json, comments: list[bytes]) -> None:
    found = await told(node, halting(comments), "stream", config=EARLY)
    assert (found["text"], found["finish"]) == ("Grüße, 🌊", "stop")
    assert found["usage"].items() >= USAGE.items()


async def test_node_raises_the_error_that_comes_after_a_late_commit(node: Json, comments: list[bytes]) -> None:
    found = await told(node, failing_late(comments), "midstream", config=EARLY)
    assert (found["error"], found["status"], found["code"], found["text"]) == ("APIError", None, "some_code", "")


async def test_node_that_aborts_closes_the_upstream(node: Json) -> None:
    async with serving(held) as (running, upstream):
        process = await start(node, running, "abort", "openai/m")
        try:
            assert process.stdout is not None
            first = await asyncio.wait_for(process.stdout.readline(), 20)
            assert json.loads(first) == {"first": "half "}
            await asyncio.wait_for(upstream.lines[0].closed.wait(), 1.0)
            await until(lambda: running.edge.open_calls == 0)
            assert process.returncode is None, "it was the abort, not the process's end"
        finally:
            found = await ended(process)
    assert found == {"aborted": True}
