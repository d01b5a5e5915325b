"""The built-in provider: every model name of its table does what the table says, over OpenAI's own wire, without real time."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from typing import Any

import pytest

from proxy.call import Limits
from proxy.demo import DemoResponse, DemoTransport
from proxy.demo.answers import sample, words
from proxy.errors import UpstreamCut, UpstreamTimeout
from proxy.transport import Transport, UpstreamRequest

Json = dict[str, Any]
USER = [{"role": "user", "content": "red green blue"}]
ECHO = "This is Penstock's demo provider; it has no model behind it. You said: red green blue"
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string"}, "hours": {"type": "integer"}, "unit": {"enum": ["m", "ft"]}},
            "required": ["harbour", "unit"],
        },
    },
}


class Naps:
    """A sleep that takes no time and remembers what was asked of it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


async def send(path: str = "chat/completions", naps: Any = None, limits: Limits | None = None, **body: Any) -> DemoResponse:
    transport = DemoTransport(naps or Naps(), clock=lambda: 1700000000.5)
    if path == "chat/completions":
        body = {"messages": USER, **body}
    return await transport.send(UpstreamRequest(f"http://demo/v1/{path}?x=1", {}, json.dumps(body).encode()), limits or Limits())


async def read_all(response: DemoResponse) -> list[bytes]:
    pieces = []
    while piece := await response.read():
        pieces.append(piece)
    return pieces


async def stream(**body: Any) -> tuple[list[Json], DemoResponse]:
    """The chunks of a stream up to `[DONE]`."""
    response = await send(stream=True, **body)
    pieces = await read_all(response)
    assert pieces[-1] == b"data: [DONE]\n\n"
    return [json.loads(piece.removeprefix(b"data: ")) for piece in pieces[:-1]], response


async def whole(at: str = "chat/completions", **body: Any) -> Json:
    response = await send(at, **body)
    return {"status": response.status, **json.loads(b"".join(await read_all(response)))}


def joined(chunks: list[Json], name: str = "content") -> str:
    return "".join(chunk["choices"][0]["delta"].get(name) or "" for chunk in chunks if chunk["choices"])


def test_it_is_a_transport() -> None:
    transport: Transport = DemoTransport()
    assert transport


class TestChat:
    async def test_a_stream_is_openais_at_twenty_words_a_second(self) -> None:
        naps = Naps()
        chunks, response = await stream(model="echo", naps=naps)
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert chunks[0]["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        assert joined(chunks) == ECHO
        assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        assert {(c["object"], c["created"], c["model"]) for c in chunks} == {("chat.completion.chunk", 1700000000, "echo")}
        assert naps.seconds == [0.05] * 16
        assert len(chunks) == 18

    async def test_a_whole_reply_says_the_same_and_takes_as_long(self) -> None:
        naps = Naps()
        reply = await whole(model="echo", naps=naps)
        assert reply["object"] == "chat.completion"
        message = {"role": "assistant", "content": ECHO}
        assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
        assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
        assert naps.seconds == [pytest.approx(0.8)]

    @pytest.mark.parametrize(("model", "naps_taken"), [("fast", []), ("slow", [0.5] * 16)])
    async def test_paces(self, model: str, naps_taken: list[float]) -> None:
        naps = Naps()
        chunks, _ = await stream(model=model, naps=naps)
        assert (joined(chunks), naps.seconds) == (ECHO, naps_taken)

    async def test_the_same_request_gets_the_same_bytes_and_another_request_another_id(self) -> None:
        first, again, other = [await stream(model="fast", seed=seed) for seed in (1, 1, 2)]
        assert first[0] == again[0]
        assert first[0][0]["id"] != other[0][0]["id"]

    async def test_the_last_user_message_counts_also_in_parts(self) -> None:
        parts = [{"type": "text", "text": "one "}, {"type": "image_url"}, {"type": "text", "text": "two"}]
        messages = [*USER, {"role": "user", "content": parts}, {"role": "assistant", "content": None}]
        chunks, _ = await stream(model="fast", messages=messages)
        assert joined(chunks).endswith("You said: one two")

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    async def test_a_word_is_a_token(self, name: str) -> None:
        chunks, _ = await stream(model="fast", **{name: 4})
        assert joined(chunks) == "This is Penstock's demo"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        bound: Json = {name: 16}
        assert (await whole(model="fast", **bound))["choices"][0]["finish_reason"] == "stop"

    @pytest.mark.parametrize("stop", ["demo", ["nowhere", "demo", ""], ["provider", "demo"]])
    async def test_stop_sequences_end_the_answer_before_them(self, stop: Any) -> None:
        chunks, _ = await stream(model="fast", stop=stop)
        assert joined(chunks) == "This is Penstock's "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    async def test_usage_comes_last_when_asked_for(self) -> None:
        chunks, _ = await stream(model="long-5", stream_options={"include_usage": True})
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        wrong: list[Any] = [None, {}, "x"]
        for options in wrong:
            assert all("usage" not in chunk for chunk in (await stream(model="fast", stream_options=options))[0])

    async def test_long_answers_have_as_many_words_as_asked_for(self) -> None:
        chunks, _ = await stream(model="long-1234")
        assert len(joined(chunks).split()) == len(chunks) - 2 == 1234

    async def test_reasoning_comes_before_the_answer_and_is_counted(self) -> None:
        chunks, _ = await stream(model="reason")
        kinds = [next(iter(chunk["choices"][0]["delta"]), None) for chunk in chunks]
        assert kinds == ["role", *["reasoning_content"] * 10, *["content"] * 16, None]
        reply = await whole(model="reason")
        assert reply["choices"][0]["message"]["reasoning_content"] == joined(chunks, "reasoning_content")
        assert reply["usage"]["completion_tokens"] == 26
        assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": 10}

    async def test_inspect_answers_with_the_request(self) -> None:
        chunks, _ = await stream(model="inspect", temperature=0.5)
        assert json.loads(joined(chunks)) == {"messages": USER, "model": "inspect", "temperature": 0.5, "stream": True}

    def test_words_joined_are_the_text(self) -> None:
        for text in ("", " ", "a", "a b", " a\n\nb  c ", "\t"):
            assert "".join(words(text)) == text
        assert words("one two\n three ") == ["one", " two", "\n three "]


class TestTools:
    async def test_a_call_is_streamed_in_pieces_and_fits_the_schema(self) -> None:
        chunks, _ = await stream(model="tool", tools=[TOOL])
        calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
        assert calls[0]["function"] == {"name": "get_tide", "arguments": ""}
        assert calls[0]["id"].startswith("call_")
        assert len(calls) > 3
        assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"harbour": "demo", "unit": "m"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    async def test_a_whole_reply_has_the_same_call(self) -> None:
        (choice,) = (await whole(model="tool", tools=[TOOL]))["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"harbour": "demo", "unit": "m"}
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")

    async def test_a_tools_result_is_answered_with_its_text(self) -> None:
        messages = [
            *USER,
            {"role": "assistant", "tool_calls": []},
            {"role": "tool", "tool_call_id": "1", "content": "high at nine"},
        ]
        chunks, _ = await stream(model="tool", messages=messages, tools=[TOOL])
        assert joined(chunks) == "The tool answered: high at nine"

    @pytest.mark.parametrize("tools", [None, [], ["x"], [{"type": "function"}]])
    async def test_without_a_tool_it_is_a_400(self, tools: Any) -> None:
        reply = await whole(model="tool", tools=tools)
        assert (reply["status"], reply["error"]["param"]) == (400, "tools")

    @pytest.mark.parametrize(
        ("schema", "value"),
        [
            ({"type": "string", "minLength": 6}, "demo.."),
            ({"type": ["number", "null"], "minimum": 3}, 3),
            ({"type": "boolean"}, True),
            ({"type": "null"}, None),
            ({"const": 5}, 5),
            ({"type": "string", "default": "x"}, "x"),
            ({"examples": ["y"]}, "y"),
            ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1, 1]),
            ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 1),
            ({"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"type": "string"}}, "required": ["b"]}}}, {"b": "demo"}),
            ({"type": "object", "required": ["undescribed"]}, {"undescribed": None}),
            ({"$ref": "#"}, None),
            (True, None),
        ],
    )
    def test_values_fit_their_schema(self, schema: Any, value: Any) -> None:
        assert sample(schema, schema) == value

    @pytest.mark.parametrize(
        ("wanted", "value"),
        [
            (None, {"answer": "red green blue"}),
            ({"type": "json_object"}, {"answer": "red green blue"}),
            (
                {"type": "json_schema", "json_schema": {"schema": TOOL["function"]["parameters"]}},
                {"harbour": "demo", "unit": "m"},
            ),
        ],
    )
    async def test_json_fits_the_response_format(self, wanted: Any, value: Json) -> None:
        chunks, _ = await stream(model="json", response_format=wanted)
        assert json.loads(joined(chunks)) == value


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "type", "retry"),
        [
            (400, "invalid_request_error", None),
            (429, "rate_limit_error", "1"),
            (500, "server_error", None),
            (503, "server_error", "1"),
            (599, "server_error", None),
        ],
    )
    async def test_fail_answers_with_that_status(self, status: int, type: str, retry: str | None) -> None:
        for path in ("chat/completions", "embeddings"):
            response = await send(path, model=f"fail-{status}", stream=True)
            assert (response.status, response.headers.get("retry-after")) == (status, retry)
            error = json.loads(b"".join(await read_all(response)))["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == type

    @pytest.mark.parametrize("model", ["gpt-4o", "fail-600", "fail-x", "long-0", "long-100000", "long-", "embed", None])
    async def test_an_unknown_model_is_a_404_that_lists_those_there_are(self, model: Any) -> None:
        reply = await whole(model=model)
        assert (reply["status"], reply["error"]["param"]) == (404, "model")
        assert "echo" in reply["error"]["message"]

    @pytest.mark.parametrize(
        "body",
        [
            {"model": "echo", "messages": []},
            {"model": "echo", "messages": "x"},
            {"model": "echo", "messages": ["x"]},
            {"model": "echo", "n": 2},
            {"model": "echo", "stop": [5]},
            {"model": "json", "response_format": "json"},
            {"model": "tool", "tools": [{"function": {"name": "f", "parameters": 5}}]},
        ],
    )
    async def test_a_wrong_request_is_a_400(self, body: Json) -> None:
        reply = await whole(**body)
        assert (reply["status"], reply["error"]["type"]) == (400, "invalid_request_error")

    @pytest.mark.parametrize("content", [b"{", b"[]"])
    async def test_a_body_that_is_no_json_object_is_a_400(self, content: bytes) -> None:
        response = await DemoTransport(Naps()).send(UpstreamRequest("http://demo/v1/chat/completions", {}, content), Limits())
        assert response.status == 400

    async def test_another_path_is_a_404(self) -> None:
        assert (await whole("completions", model="echo", prompt="x"))["status"] == 404

    async def test_models_are_listed(self) -> None:
        names = [model["id"] for model in (await whole("models"))["data"]]
        assert {"echo", "fast", "slow", "tool", "cut", "embed"} <= set(names)


class TestBreaks:
    """What goes wrong does so after three words, and no finish reason was sent by then."""

    @staticmethod
    async def start(model: str, **more: Any) -> tuple[DemoResponse, bytes]:
        response = await send(model=model, stream=True, **more)
        got = b"".join([await response.read() for _ in range(4)])
        assert got.count(b'"content":') == 4
        assert b'"finish_reason":"' not in got
        return response, got

    async def test_an_error_event(self) -> None:
        response, _ = await self.start("fail-midstream")
        last = await response.read()
        assert json.loads(last.removeprefix(b"data: "))["error"]["type"] == "server_error"
        assert await response.read() == b""

    async def test_a_cut(self) -> None:
        response, _ = await self.start("cut")
        for _ in range(2):
            with pytest.raises(UpstreamCut):
                await response.read()

    async def test_an_answer_that_is_shorter_breaks_too(self) -> None:
        response = await send(model="cut", stream=True, max_tokens=1)
        with pytest.raises(UpstreamCut):
            await read_all(response)

    async def test_silence_ends_when_the_response_is_closed(self) -> None:
        response, _ = await self.start("stall-midstream")
        reader = asyncio.ensure_future(response.read())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not reader.done()
        response.close()
        with pytest.raises(UpstreamCut):
            await reader

    async def test_a_silent_head(self) -> None:
        for streamed in (True, False):
            response = await send(model="stall", stream=streamed, limits=Limits(idle=1))
            assert response.status == 200
            reader = asyncio.ensure_future(response.read())
            await asyncio.sleep(0)
            assert not reader.done(), "the idle limit is about the time after the first bytes"
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader

    async def test_the_idle_limit_ends_a_silence(self) -> None:
        naps = Naps()
        response, _ = await self.start("stall-midstream", naps=naps, limits=Limits(idle=9))
        with pytest.raises(UpstreamTimeout) as caught:
            await response.read()
        assert (caught.value.which, naps.seconds[-1]) == ("idle", 9)

    @pytest.mark.parametrize("model", ["cut", "fail-midstream", "stall-midstream"])
    async def test_a_whole_reply_breaks_in_its_middle(self, model: str) -> None:
        response = await send(model=model, limits=Limits(idle=1))
        body = await response.read()
        with pytest.raises(json.JSONDecodeError):
            json.loads(body)
        if model == "fail-midstream":
            assert b"error" in await response.read()
        else:
            with pytest.raises((UpstreamCut, UpstreamTimeout)):
                await response.read()


class TestClosing:
    async def test_a_pending_read_ends_at_once_and_its_timer_is_gone(self) -> None:
        cancelled = asyncio.Event()

        async def sleep(seconds: float) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        response = await send(model="echo", stream=True, naps=sleep)
        await response.read()
        reader = asyncio.ensure_future(response.read())
        for _ in range(3):
            await asyncio.sleep(0)
        response.close()
        response.close()
        with pytest.raises(UpstreamCut):
            await reader
        assert cancelled.is_set()
        with pytest.raises(UpstreamCut):
            await response.read()

    async def test_cancelling_the_reader_is_a_cancellation_even_when_the_response_is_closed_by_then(self) -> None:
        response = await send(model="stall", stream=True)
        reader = asyncio.ensure_future(response.read())
        await asyncio.sleep(0)
        reader.cancel()
        response.close()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert len(asyncio.all_tasks()) == 1

    async def test_done_changes_nothing(self) -> None:
        response = await send(model="fast", stream=True)
        response.done()
        assert (await read_all(response))[-1] == b"data: [DONE]\n\n"

    async def test_real_sleep_is_the_default(self) -> None:
        response = await DemoTransport().send(UpstreamRequest("http://d/models", {}, b""), Limits())
        assert response.sleep is asyncio.sleep


class TestEmbeddings:
    async def test_unit_vectors_that_are_the_same_for_the_same_text(self) -> None:
        reply = await whole("embeddings", model="embed", input=["red fox", "red hen", "blue sky", "red fox"])
        vectors = [item["embedding"] for item in reply["data"]]
        assert [item["index"] for item in reply["data"]] == [0, 1, 2, 3]
        assert [len(vector) for vector in vectors] == [256] * 4
        assert all(math.hypot(*vector) == pytest.approx(1) for vector in vectors)
        assert vectors[0] == vectors[3]
        likeness = [
            math.sumprod(vectors[0], v) if hasattr(math, "sumprod") else sum(map(float.__mul__, vectors[0], v)) for v in vectors
        ]
        assert likeness[1] > likeness[2] + 0.2
        assert reply["usage"] == {"prompt_tokens": 8, "total_tokens": 8}

    async def test_base64_is_float32_little_endian(self) -> None:
        plain = await whole("embeddings", model="embed", input="red fox", dimensions=8)
        packed = await whole("embeddings", model="embed", input="red fox", dimensions=8, encoding_format="base64")
        raw = base64.b64decode(packed["data"][0]["embedding"])
        assert list(struct.unpack("<8f", raw)) == pytest.approx(plain["data"][0]["embedding"])

    @pytest.mark.parametrize(("given", "number"), [([1, 2, 3], 1), ([[1, 2], [3]], 2), ("   ", 1)])
    async def test_tokens_and_blanks_are_texts_too(self, given: Any, number: int) -> None:
        reply = await whole("embeddings", model="embed", input=given)
        assert len(reply["data"]) == number
        assert math.hypot(*reply["data"][0]["embedding"]) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("body", "status", "param"),
        [
            ({"model": "echo", "input": "x"}, 404, "model"),
            ({"model": "embed"}, 400, "input"),
            ({"model": "embed", "input": []}, 400, "input"),
            ({"model": "embed", "input": ["x", ""]}, 400, "input"),
            ({"model": "embed", "input": "w " * 8193}, 400, "input"),
            ({"model": "embed", "input": "x", "dimensions": 1537}, 400, "dimensions"),
            ({"model": "embed", "input": "x", "dimensions": "8"}, 400, "dimensions"),
        ],
    )
    async def test_wrong_requests_are_refused_by_name(self, body: Json, status: int, param: str) -> None:
        reply = await whole("embeddings", **body)
        assert (reply["status"], reply["error"]["param"]) == (status, param)
