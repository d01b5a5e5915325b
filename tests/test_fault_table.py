"""What a client gets when an upstream fails, for every wire format and every way to fail: the promise of the fault table.

Strategy: the same representative stream per format (`tests.support.formats`), cut, delayed, broken or replaced at the network's
edge; the answer, the log line and the upstream's connection are all looked at.
The one rule: a stream that did not complete never looks complete, and a complete one is never called broken.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.errors import UpstreamError
from proxy.faults import presentable
from proxy.wire import WIRES
from tests.support.decoding import Decoded, decode, make_call, make_target
from tests.support.formats import ARGUMENTS, FORMATS, TEXT, THOUGHT, Format, data, dumped, named
from tests.support.gateway import CONFIG, Answer, RawClient, ask, chat, gateway, raw_request
from tests.support.upstream import Answer as Script
from tests.support.upstream import Asked, Line, Upstream, http_head, stream, whole

Json = dict[str, Any]
KEY = "sk-upstream-0123456789"
every_format = pytest.mark.parametrize("wire", FORMATS.values(), ids=FORMATS)


@dataclass
class Scene:
    """A gateway before an upstream. lines: the gateway's log lines, one per request, complete when the scene is over."""

    upstream: Upstream
    port: int
    lines: list[Json] = field(default_factory=list)

    async def ask(self, model: str, *, stream: bool = True, **fields: Any) -> Answer:
        return await ask(self.port, chat(model, stream=stream, **fields))


@asynccontextmanager
async def scene(script: Script | None = None, **limits: str) -> AsyncIterator[Scene]:
    """limits: of the timeout middleware, in place of the usual ones."""
    config = CONFIG
    for name, value in limits.items():
        config = re.sub(rf"{name}: \d+s", f"{name}: {value}", config)
    with capture_logs() as logs:
        async with Upstream(script) as upstream, gateway(upstream.url, config) as running:
            found = Scene(upstream, running.port)
            yield found
        found.lines[:] = [dict(line) for line in logs if line["event"] == "request"]
        assert not [line for line in logs if line["log_level"] == "error"], "the gateway itself has not failed"


def assert_failed(answer: Answer, status: int | None = None, code: str | None = None) -> Json:
    """The error of a streamed answer that did not complete: an envelope, or an error chunk as its last event."""
    assert answer.clean, "the HTTP body is ended as HTTP wants it"
    assert "[DONE]" not in answer.events
    if status is not None:
        assert answer.status == status, answer.body
    error = assert_error_chunk(answer) if answer.status == 200 else answer.json["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["message"]
    if code is not None:
        assert error["code"] == code
    return dict(error)


def assert_error_chunk(answer: Answer) -> Json:
    assert len(answer.events) > 1, "before the first chunk a failure is an HTTP status"
    *before, last = answer.chunks
    assert set(last) == {"id", "object", "created", "model", "error", "choices"}
    assert last["object"] == "chat.completion.chunk"
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "error"}]
    assert last["error"]["param"] is None
    assert {(c["id"], c["created"], c["model"]) for c in answer.chunks} == {(last["id"], last["created"], last["model"])}
    assert not any("error" in chunk for chunk in before)
    assert not any(choice["finish_reason"] for chunk in before for choice in chunk["choices"]), "no finish reason ever left"
    return dict(last["error"])


def gathered(answer: Answer) -> Decoded:
    """What the content chunks of an answer add up to."""
    return Decoded([chunk for chunk in answer.chunks if "error" not in chunk], None, None)


def assert_complete(answer: Answer, *, usage: bool = True) -> None:
    assert (answer.status, answer.clean, answer.done) == (200, True, True), answer.body[-300:]
    assert answer.events.count("[DONE]") == 1
    found = gathered(answer)
    assert (found.text[0], found.reasoning[0], found.finish[0][0]) == (TEXT, THOUGHT, "tool_calls")
    (call,) = found.tools[0]
    assert call["name"] == "get_tide"
    assert json.loads(call["arguments"]) == json.loads(ARGUMENTS)
    if usage:
        totals = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
        assert answer.chunks[-1]["usage"].items() >= totals.items()


def unended(*pieces: bytes) -> Script:
    """A stream that comes so far, on a connection that stays open until the gateway closes it."""

    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(*pieces)
        await line.forever()

    return answer


def outcomes(scene: Scene) -> list[str]:
    return [line["outcome"] for line in scene.lines]


class TestCutAtEveryByte:
    """The upstream's bytes stop: at every offset of the stream."""

    @staticmethod
    def decoder(wire: Format) -> Any:
        call = make_call({"stream": True, "stream_options": {"include_usage": True}})
        return WIRES[wire.api].Decoder(call, make_target(wire.api))

    @every_format
    def test_a_decoder_finishes_only_at_the_formats_own_end_marker(self, wire: Format) -> None:
        for offset in range(len(wire.body) + 1):
            decoder = self.decoder(wire)
            found = decode(decoder, [wire.body[:offset]], clean_end=False)
            assert decoder.ended == (offset >= wire.complete_at), offset
            assert bool(found.finish) == decoder.ended, offset
            assert found.fault is None, offset

    @every_format
    def test_a_clean_http_end_is_a_fault_before_the_formats_own_end_and_never_both(self, wire: Format) -> None:
        decisive = wire.body[: wire.closes_at].rstrip()
        whole_end = wire.body[: wire.edge(wire.finish if wire.end is None else wire.end)].rstrip()
        for offset in range(len(wire.body) + 1):
            found = decode(self.decoder(wire), [wire.body[:offset]])
            assert bool(found.finish) != bool(found.fault), offset
            if offset < len(decisive):
                assert found.fault is not None, offset
                assert found.fault.status == 502
            elif offset in wire.edges or offset >= len(whole_end):
                assert found.fault is None, offset

    @every_format
    async def test_a_connection_that_breaks_ends_in_an_error_or_is_complete(self, wire: Format) -> None:
        """Each model name holds an offset: so many bytes come in one HTTP chunk, then the connection is closed without an end."""

        async def cut(asked: Asked, line: Line) -> None:
            offset = int((asked.path + asked.body.decode()).split("cut-")[1].split('"')[0].split(":")[0])
            await line.head()
            await line.chunk(wire.body[:offset])
            line.hang_up()

        step = 1 if wire.api == "openai" else 7
        offsets = sorted({*range(0, len(wire.body), step), *wire.edges, *(edge - 1 for edge in wire.edges)})
        async with scene(cut) as here:
            for start in range(0, len(offsets), 40):
                await asyncio.gather(*(self._cut(here, wire, offset) for offset in offsets[start : start + 40]))
        seen = {line["id"]: line["outcome"] for line in here.lines}
        assert len(here.lines) == len(seen) == len(offsets), "one log line per request"
        wrong = {o: seen[f"cut-{o}"] for o in offsets if (seen[f"cut-{o}"] == "completed") != (o >= wire.complete_at)}
        assert not wrong
        assert set(seen.values()) <= {"completed", "upstream_cut"}
        assert here.upstream.open == 0

    async def _cut(self, here: Scene, wire: Format, offset: int) -> None:
        body = chat(f"{wire.api}/cut-{offset}", stream_options={"include_usage": True})
        async with RawClient(here.port) as client:
            await client.send(raw_request(body, X_Request_Id=f"cut-{offset}"))
            answer = await client.answer()
            if offset >= wire.complete_at:
                return assert_complete(answer)
            expected = decode(self.decoder(wire), [wire.body[:offset]], clean_end=False)
            assert_failed(answer, 200 if expected.chunks else 502, "upstream_cut")
            if expected.chunks:
                found = gathered(answer)
                assert (found.text, found.reasoning) == (expected.text, expected.reasoning), "what came before the cut is kept"
                assert await client.closed(), "the connection is closed behind an error chunk"
        return None

    @every_format
    async def test_a_clean_http_end_at_an_event_boundary(self, wire: Format) -> None:
        """Complete for openai and gemini behind a finish reason, for anthropic and cohere behind their end marker only."""
        async with scene() as here:
            for edge in wire.edges:
                here.upstream.answer = stream([wire.body[:edge]])
                answer = await here.ask(f"{wire.api}/m")
                if edge >= wire.closes_at:
                    assert_complete(answer, usage=False)
                else:
                    assert_failed(answer, code="upstream_cut")
        complete = [edge >= wire.closes_at for edge in wire.edges]
        assert outcomes(here) == ["completed" if done else "upstream_cut" for done in complete]

    @every_format
    @pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
    async def test_what_came_before_the_connection_broke_counts_also_for_a_slow_client(self, wire: Format, cut: bool) -> None:
        """The upstream's last bytes and its FIN come while the gateway still waits for its client to take an earlier chunk."""
        if wire.end is None:
            pytest.skip("this format has no end marker")
        long = "x" * 12 * 2**20
        rest = b"".join(wire.events[wire.opening + 1 : wire.finish if cut else None])

        async def answer(asked: Asked, line: Line) -> None:
            await line.head()
            await line.chunk(wire.head.replace(dumped(THOUGHT), dumped(long)))
            await line.chunk(rest)
            line.writer.write_eof()
            await line.forever()

        async with scene(answer) as here, RawClient(here.port) as client:
            await client.send(raw_request(chat(f"{wire.api}/m")))
            await client.first_byte()
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 5)
            found = await client.answer()
            assert gathered(found).reasoning[0] == long
            assert gathered(found).text[0] == TEXT
            assert gathered(found).tools[0]
            if cut:
                assert_failed(found, 200, "upstream_cut")
            else:
                assert found.done
        assert outcomes(here) == ["upstream_cut" if cut else "completed"]

    @every_format
    async def test_one_event_per_read_is_the_same_as_all_in_one(self, wire: Format) -> None:
        async with scene(stream(wire.events)) as here:
            assert_complete(await here.ask(f"{wire.api}/m", stream_options={"include_usage": True}))
            here.upstream.answer = stream([wire.body])
            assert_complete(await here.ask(f"{wire.api}/m", stream_options={"include_usage": True}))
        assert outcomes(here) == ["completed"] * 2


class TestFraming:
    """How HTTP says where a body ends."""

    @staticmethod
    def framed(body: bytes, **headers: str) -> Script:
        async def answer(asked: Asked, line: Line) -> None:
            lines = {name.replace("_", "-"): value for name, value in headers.items()}
            await line.send(http_head(200, {"Content-Type": "text/event-stream", **lines}) + body)
            line.hang_up()

        return answer

    @every_format
    async def test_a_full_content_length_is_a_clean_end(self, wire: Format) -> None:
        body = wire.body[: wire.closes_at]
        async with scene(self.framed(body, Content_Length=str(len(body)))) as here:
            assert_complete(await here.ask(f"{wire.api}/m"), usage=False)
        assert outcomes(here) == ["completed"]

    @every_format
    async def test_a_content_length_that_is_not_reached_is_a_cut(self, wire: Format) -> None:
        body = wire.body[: wire.edge(wire.finish - (wire.finish == wire.end))]
        async with scene(self.framed(body, Content_Length=str(len(body) + 1))) as here:
            assert_failed(await here.ask(f"{wire.api}/m"), 200, "upstream_cut")
        assert outcomes(here) == ["upstream_cut"]

    @every_format
    async def test_an_end_marker_counts_even_if_the_content_length_is_not_reached(self, wire: Format) -> None:
        if wire.end is None:
            pytest.skip("this format has no end marker")
        async with scene(self.framed(wire.body, Content_Length=str(len(wire.body) + 1))) as here:
            assert_complete(await here.ask(f"{wire.api}/m"), usage=False)

    @every_format
    async def test_without_any_framing_eof_counts_as_an_end_behind_the_finish(self, wire: Format) -> None:
        async with scene(self.framed(wire.body[: wire.closes_at], Connection="close")) as here:
            assert_complete(await here.ask(f"{wire.api}/m"), usage=False)
            here.upstream.answer = self.framed(wire.head, Connection="close")
            assert_failed(await here.ask(f"{wire.api}/m"), 200, "upstream_cut")
        assert outcomes(here) == ["completed", "upstream_cut"]

    @every_format
    async def test_silence_behind_a_finish_reason_is_an_end(self, wire: Format) -> None:
        """The test's gateway waits 0.2 s for it; the idle limit of 5 s is far away."""
        async with scene(unended(wire.body[: wire.edge(wire.finish)])) as here:
            assert_complete(await here.ask(f"{wire.api}/m"), usage=False)
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert outcomes(here) == ["completed"]

    @every_format
    async def test_after_a_completed_stream_the_connection_serves_the_next_request(self, wire: Format) -> None:
        async with scene(stream(wire.events)) as here:
            for _ in range(3):
                assert_complete(await here.ask(f"{wire.api}/m"), usage=False)
            here.upstream.answer = whole(wire.whole)
            assert (await here.ask(f"{wire.api}/m", stream=False)).status == 200
            assert len(here.upstream.asked) == 4
            assert len(here.upstream.lines) == 1


def gemini_error(code: int, status: str) -> bytes:
    return data({"error": {"code": code, "message": "Said so", "status": status}}, b"\r\n\r\n")


def anthropic_error(kind: str) -> bytes:
    return named({"type": "error", "error": {"type": kind, "message": "Said so"}})


IN_BAND: list[tuple[str, bytes, int]] = [
    ("openai", data({"error": {"message": "Said so", "type": "server_error", "code": None}}), 502),
    ("openai", data({"error": {"message": "Said so", "type": "rate_limit_error", "code": None}}), 429),
    ("openai", data({"error": {"message": "Said so", "type": "overloaded_error"}}), 503),
    ("openai", data({"error": {"message": "Said so", "code": 503}}), 503),
    ("openai", data({"error": {"message": "Said so", "code": "400"}}), 400),
    ("openai", data({"error": "Said so"}), 502),
    ("openai", b'event: error\ndata: {"message":"Said so"}\n\n', 502),
    ("openai", b'{"error":{"message":"Said so","code":429}}\n\n', 429),
    ("openai", b'{\n "error": {\n  "message": "Said so",\n  "code": 429\n }\n}\n\n', 429),
    ("anthropic", anthropic_error("overloaded_error"), 503),
    ("anthropic", anthropic_error("rate_limit_error"), 429),
    ("anthropic", anthropic_error("api_error"), 502),
    ("gemini", gemini_error(503, "UNAVAILABLE"), 503),
    ("gemini", gemini_error(429, "RESOURCE_EXHAUSTED"), 429),
    ("gemini", gemini_error(500, "INTERNAL"), 500),
    ("gemini", gemini_error(400, "INVALID_ARGUMENT"), 400),
    ("cohere", named({"type": "message-end", "delta": {"finish_reason": "ERROR", "error": "Said so"}}), 502),
]


class TestErrorInsideA200:
    @pytest.mark.parametrize(("api", "event", "status"), IN_BAND)
    async def test_before_the_first_chunk_it_is_a_status(self, api: str, event: bytes, status: int) -> None:
        async with scene(unended(FORMATS[api].silent, event)) as here:
            error = assert_failed(await here.ask(f"{api}/m"), status)
            assert "Said so" in error["message"]
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert outcomes(here) == ["upstream_error"]

    @pytest.mark.parametrize(("api", "event", "status"), IN_BAND)
    async def test_as_the_very_first_event_it_is_a_status(self, api: str, event: bytes, status: int) -> None:
        async with scene(stream([event])) as here:
            assert "Said so" in assert_failed(await here.ask(f"{api}/m"), status)["message"]

    @pytest.mark.parametrize(("api", "event", "status"), IN_BAND)
    async def test_after_it_an_error_chunk(self, api: str, event: bytes, status: int) -> None:
        async with scene(unended(FORMATS[api].head, event)) as here:
            error = assert_failed(await here.ask(f"{api}/m"), 200)
            assert "Said so" in error["message"]
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert outcomes(here) == ["upstream_error"]

    @pytest.mark.parametrize(("api", "event", "status"), IN_BAND)
    async def test_behind_a_finish_reason_it_still_counts(self, api: str, event: bytes, status: int) -> None:
        """Which is why finish chunks are held."""
        wire = FORMATS[api]
        if wire.finish == wire.end:
            pytest.skip("the finish reason of this format is its end marker")
        async with scene(stream([wire.body[: wire.edge(wire.finish)] + event])) as here:
            assert_failed(await here.ask(f"{api}/m"), 200)
        assert outcomes(here) == ["upstream_error"]

    @every_format
    async def test_a_stream_that_is_not_streamed_to_the_client_is_the_same_error(self, wire: Format) -> None:
        event, status = next((event, status) for api, event, status in IN_BAND if api == wire.api)
        async with scene(unended(wire.head, event)) as here:
            answer = await here.ask(f"{wire.api}/m", stream=False)
            assert answer.status == status
            assert "Said so" in answer.json["error"]["message"]
        assert outcomes(here) == ["upstream_error"]


class TestNothing:
    """An upstream that answers 200 and then has nothing to say."""

    @every_format
    @pytest.mark.parametrize("silent", [False, True], ids=["nothing", "opening"])
    @pytest.mark.parametrize("streamed", [True, False])
    async def test_an_empty_stream_is_a_502(self, wire: Format, silent: bool, streamed: bool) -> None:
        async with scene(stream([wire.silent] if silent else [])) as here:
            answer = await here.ask(f"{wire.api}/m", stream=streamed)
            assert answer.status == 502
            assert answer.json["error"]["code"] in ("upstream_cut", "upstream_malformed")

    @every_format
    @pytest.mark.parametrize("silence", ["head", "nothing", "opening", "pings"])
    async def test_silence_before_the_first_chunk_is_a_504(self, wire: Format, silence: str) -> None:
        async def answer(asked: Asked, line: Line) -> None:
            if silence == "head":
                return await line.forever()
            await line.head()
            await line.chunk(wire.silent if silence == "opening" else b"")
            while silence == "pings":
                await line.chunk(wire.ping)
                await asyncio.sleep(0.02)
            await line.forever()
            return None

        async with scene(answer, first_chunk_timeout="200ms") as here:
            assert_failed(await here.ask(f"{wire.api}/m"), 504, "timeout_first_chunk")
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert outcomes(here) == ["timeout_first_chunk"]

    @every_format
    @pytest.mark.parametrize("pings", [False, True], ids=["silence", "pings"])
    async def test_silence_mid_stream_is_an_idle_timeout(self, wire: Format, pings: bool) -> None:
        async def answer(asked: Asked, line: Line) -> None:
            await line.head()
            await line.chunk(wire.head)
            while pings:
                await line.chunk(wire.ping)
                await asyncio.sleep(0.02)
            await line.forever()

        async with scene(answer, idle_timeout="200ms") as here:
            error = assert_failed(await here.ask(f"{wire.api}/m"), 200, "timeout_idle")
            assert error["type"] == "timeout_error"
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert outcomes(here) == ["timeout_idle"]

    @every_format
    async def test_pings_behind_a_finish_reason_do_not_hold_the_end_for_ever(self, wire: Format) -> None:
        """Silence is the absence of content: a server that keeps its line alive with comments has ended all the same."""
        if wire.finish == wire.end:
            pytest.skip("the finish reason of this format is its end marker")

        async def answer(asked: Asked, line: Line) -> None:
            await line.head()
            await line.chunk(wire.body[: wire.edge(wire.finish)])
            while True:
                await line.chunk(wire.ping)
                await asyncio.sleep(0.02)

        async with scene(answer, idle_timeout="600ms") as here:
            assert_complete(await here.ask(f"{wire.api}/m"), usage=False)
        assert outcomes(here) == ["completed"]

    @every_format
    async def test_a_whole_reply_that_does_not_come_is_a_504(self, wire: Format) -> None:
        async def answer(asked: Asked, line: Line) -> None:
            await line.send(http_head(200, {"Content-Type": "application/json", "Content-Length": "99"}) + b"{")
            await line.forever()

        async with scene(answer, call_timeout="200ms") as here:
            assert_failed(await here.ask(f"{wire.api}/m", stream=False), 504, "timeout_call")
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert outcomes(here) == ["timeout_call"]


BROKEN = {
    "not JSON": b"data: {oops\n\n",
    "not UTF-8": b'data: {"choices":[{"index":0,"delta":{"content":"\xff\xfe"}}]}\n\n',
    "a list": b"data: [1,2]\n\n",
    "a number": b"data: 7\n\n",
    "null": b"data: null\n\n",
    "a text": b'data: "hello"\n\n',
    "a lone surrogate": b'data: {"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}\n\n',
}
SHAPES: dict[str, list[Json]] = {
    "openai": [
        {"choices": "x"},
        {"choices": [7]},
        {"choices": [{"index": 0, "delta": "x"}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [1]}}]},
    ],
    "anthropic": [
        {"type": "content_block_delta", "index": 7, "delta": 1},
        {"type": "content_block_start", "index": 9, "content_block": "x"},
    ],
    "gemini": [{"candidates": "x"}, {"candidates": [7]}, {"candidates": [{"content": {"parts": "xyz"}}]}],
    "cohere": [
        {"type": "content-delta", "index": 0, "delta": "x"},
        {"type": "tool-call-start", "index": 0, "delta": {"message": 1}},
    ],
}


class TestMalformed:
    """One malformed event is reported as an upstream protocol error: never passed on, never silently dropped."""

    @every_format
    @pytest.mark.parametrize("event", BROKEN.values(), ids=BROKEN)
    async def test_a_broken_event(self, wire: Format, event: bytes) -> None:
        async with scene() as here:
            here.upstream.answer = unended(wire.silent, event, wire.body)
            assert_failed(await here.ask(f"{wire.api}/m"), 502, "upstream_malformed")
            here.upstream.answer = unended(wire.head, event, wire.body)
            answer = await here.ask(f"{wire.api}/m")
            assert_failed(answer, 200, "upstream_malformed")
            assert gathered(answer).text[0] in ("", TEXT[:3]), "nothing of or behind the event is passed on"
            for line in here.upstream.lines:
                await asyncio.wait_for(line.closed.wait(), 2)
        assert outcomes(here) == ["malformed"] * 2

    @pytest.mark.parametrize(("api", "event"), [(api, event) for api, events in SHAPES.items() for event in events])
    async def test_an_event_of_a_shape_that_the_format_does_not_have(self, api: str, event: Json) -> None:
        wire = FORMATS[api]
        async with scene(stream([wire.head, data(event), wire.body])) as here:
            assert_failed(await here.ask(f"{api}/m"), 200, "upstream_malformed")
        assert outcomes(here) == ["malformed"]

    @pytest.mark.parametrize("status", [200, 502])
    @every_format
    @pytest.mark.parametrize("streamed", [True, False])
    async def test_a_load_balancers_page_is_a_502_without_its_html(self, wire: Format, status: int, streamed: bool) -> None:
        page = b"<!DOCTYPE html>\n<html><body><h1>Bad gateway at lb-7.internal</h1></body></html>"
        async with scene(whole(page, status, "text/html")) as here:
            answer = await here.ask(f"{wire.api}/m", stream=streamed)
            assert_failed(answer, 502, "upstream_malformed" if status == 200 else None)
            assert b"html" not in answer.body
            assert b"internal" not in answer.body
        assert outcomes(here) == ["malformed" if status == 200 else "upstream_error"]

    @every_format
    @pytest.mark.parametrize("body", [b"{oops", b"[1,2]", b"7", b"{}", b'{"choices":"x"}', b"\xff"])
    async def test_a_whole_reply_that_is_none(self, wire: Format, body: bytes) -> None:
        async with scene(whole(body)) as here:
            answer = await here.ask(f"{wire.api}/m", stream=False)
            assert (answer.status, answer.json["error"]["type"]) == (502, "upstream_error")
            assert_failed(await here.ask(f"{wire.api}/m"), 502)
        assert len(here.lines) == 2
        assert set(outcomes(here)) <= {"malformed", "upstream_error", "upstream_cut"}

    @every_format
    async def test_an_event_of_five_megabytes_passes(self, wire: Format) -> None:
        long = "☂" * (5 * 2**20 // 3)
        body = wire.body.replace(dumped(TEXT[:3]), dumped(long))
        assert len(body) > 5 * 2**20
        async with scene(stream([body])) as here:
            answer = await here.ask(f"{wire.api}/m")
            assert answer.done
            assert gathered(answer).text[0] == long + TEXT[3:]

    @every_format
    async def test_an_endless_event_is_malformed_and_not_kept(self, wire: Format) -> None:
        """More than 16 MiB in one event are refused long before the upstream has sent its 64."""
        sent = 0

        async def answer(asked: Asked, line: Line) -> None:
            nonlocal sent
            await line.head()
            await line.chunk(wire.head + b'data: {"x":"')
            for _ in range(64):
                await line.chunk(b"x" * 2**20)
                sent += 1
            await line.end()

        async with scene(answer) as here:
            assert_failed(await here.ask(f"{wire.api}/m"), 200, "upstream_malformed")
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert 16 <= sent < 32
        assert outcomes(here) == ["malformed"]


class TestCompression:
    """A provider (or a proxy before it) that compresses its replies."""

    @staticmethod
    def packed(pieces: tuple[bytes, ...]) -> list[bytes]:
        packer = zlib.compressobj(wbits=31)
        return [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces] + [packer.flush()]

    @every_format
    async def test_a_gzipped_stream_is_decoded(self, wire: Format) -> None:
        async with scene(stream(self.packed(wire.events), headers={"Content-Encoding": "gzip"})) as here:
            answer = await here.ask(f"{wire.api}/m")
            assert_complete(answer, usage=False)
            assert "Content-Encoding" not in answer.headers

    @every_format
    async def test_a_gzipped_whole_reply_is_decoded(self, wire: Format) -> None:
        async with scene(whole(gzip.compress(wire.whole), headers={"Content-Encoding": "gzip"})) as here:
            answer = await here.ask(f"{wire.api}/m", stream=False)
            assert answer.json["choices"][0]["message"]["content"] == TEXT

    @every_format
    async def test_a_gzipped_error_is_read(self, wire: Format) -> None:
        body = gzip.compress(b'{"error":{"message":"Said so"},"message":"Said so"}')
        async with scene(whole(body, 400, headers={"Content-Encoding": "gzip"})) as here:
            assert "Said so" in assert_failed(await here.ask(f"{wire.api}/m"), 400)["message"]

    @every_format
    async def test_truncated_or_broken_gzip_is_an_error(self, wire: Format) -> None:
        packed = self.packed(wire.events)
        for pieces in (packed[: wire.opening + 2], [*packed[: wire.opening + 2], b"\xff" * 40]):
            async with scene(stream(pieces, headers={"Content-Encoding": "gzip"})) as here:
                assert_failed(await here.ask(f"{wire.api}/m"))
            assert outcomes(here)[0] in ("upstream_cut", "malformed")
        for body in (gzip.compress(wire.whole)[:60], b"not gzip at all"):
            async with scene(whole(body, headers={"Content-Encoding": "gzip"})) as here:
                assert (await here.ask(f"{wire.api}/m", stream=False)).status == 502


async def reset_at_once(asked: Asked, line: Line) -> None:
    line.reset()


async def close_at_once(asked: Asked, line: Line) -> None:
    line.hang_up()


async def no_http(asked: Asked, line: Line) -> None:
    await line.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    line.hang_up()


class TestConnection:
    @every_format
    @pytest.mark.parametrize("script", [reset_at_once, close_at_once, no_http])
    @pytest.mark.parametrize("streamed", [True, False])
    async def test_no_answer_at_all_is_a_502(self, wire: Format, script: Script, streamed: bool) -> None:
        async with scene(script) as here:
            answer = await here.ask(f"{wire.api}/m", stream=streamed)
            error = assert_failed(answer, 502)
            assert error["type"] == "upstream_error"
        assert outcomes(here)[0] in ("upstream_cut", "upstream_error", "malformed")
        assert len(here.lines) == 1

    @every_format
    async def test_a_reset_before_the_first_chunk_is_a_502(self, wire: Format) -> None:
        async def answer(asked: Asked, line: Line) -> None:
            await line.head()
            await line.chunk(wire.silent)
            line.reset()

        async with scene(answer) as here:
            assert_failed(await here.ask(f"{wire.api}/m"), 502, "upstream_cut")
        assert outcomes(here) == ["upstream_cut"]

    @every_format
    async def test_a_reset_mid_stream_is_an_error_chunk(self, wire: Format) -> None:
        """The reset comes when the client has the first chunk, so that none of it can be overtaken by the reset."""
        go = asyncio.Event()

        async def answer(asked: Asked, line: Line) -> None:
            await line.head()
            await line.chunk(wire.head)
            await go.wait()
            line.reset()

        async with scene(answer) as here, RawClient(here.port) as client:
            await client.send(raw_request(chat(f"{wire.api}/m")))
            await client.first_byte()
            go.set()
            assert_failed(await client.answer(), 200, "upstream_cut")
            assert await client.closed()
        assert outcomes(here) == ["upstream_cut"]

    @every_format
    async def test_a_refused_connection_is_a_502(self, wire: Format) -> None:
        async with Upstream() as gone:
            pass
        with capture_logs() as logs:
            async with gateway(gone.url) as here:
                answer = await ask(here.port, chat(f"{wire.api}/m"))
                assert_failed(answer, 502, "upstream_unreachable")
                assert str(gone.port).encode() not in answer.body
        assert [line["outcome"] for line in logs if line["event"] == "request"] == ["upstream_error"]

    @every_format
    async def test_an_unknown_host_is_a_502(self, wire: Format) -> None:
        with capture_logs() as logs:
            async with gateway("http://no-such-host.invalid") as here:
                answer = await ask(here.port, chat(f"{wire.api}/m"))
                assert_failed(answer, 502)
                assert b"no-such-host" not in answer.body
        assert [line["outcome"] for line in logs if line["event"] == "request"] == ["upstream_error"]

    @every_format
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_is_not_followed(self, wire: Format, status: int) -> None:
        """It would carry the key elsewhere."""
        async with scene() as here:
            here.upstream.answer = whole(b"", status, headers={"Location": f"{here.upstream.url}/elsewhere"})
            answer = await here.ask(f"{wire.api}/m")
            assert_failed(answer, 502)
            assert "Location" not in answer.headers
            assert len(here.upstream.asked) == 1
        assert outcomes(here) == ["upstream_error"]


ERROR_BODIES: dict[str, list[bytes]] = {
    "openai": [
        dumped({"error": {"message": "Said so", "type": "invalid_request_error", "param": None, "code": None}}),
        dumped({"error": "Said so"}),
        dumped({"detail": "Said so"}),
        dumped({"message": "Said so", "code": 3}),
    ],
    "anthropic": [dumped({"type": "error", "error": {"type": "invalid_request_error", "message": "Said so"}, "request_id": "r"})],
    "gemini": [
        dumped({"error": {"code": 400, "message": "Said so", "status": "INVALID_ARGUMENT", "details": []}}),
        dumped([{"error": {"code": 400, "message": "Said so", "status": "INVALID_ARGUMENT"}}]),
    ],
    "cohere": [dumped({"id": "r1", "message": "Said so"}), dumped({"message": "Said so"})],
}


class TestErrorStatus:
    """An upstream that answers 4xx or 5xx."""

    @pytest.mark.parametrize("status", [400, 402, 404, 409, 413, 422, 429, 451])
    @every_format
    @pytest.mark.parametrize("streamed", [True, False])
    async def test_a_4xx_is_passed_on_in_the_envelope(self, wire: Format, status: int, streamed: bool) -> None:
        async with scene() as here:
            for body in [*ERROR_BODIES[wire.api], b"Said so"]:
                here.upstream.answer = whole(body, status)
                error = assert_failed(await here.ask(f"{wire.api}/m", stream=streamed), status)
                assert error["message"] == "Said so"
        assert set(outcomes(here)) == {"upstream_error"}
        assert len(here.lines) == len(ERROR_BODIES[wire.api]) + 1

    async def test_the_fields_of_an_openai_error_are_kept(self) -> None:
        said = {"message": "Said so", "type": "invalid_request_error", "param": "temperature", "code": "out_of_range"}
        async with scene(whole(dumped({"error": said}), 400)) as here:
            assert assert_failed(await here.ask("openai/m"), 400) == said

    @every_format
    @pytest.mark.parametrize("body", [b"", b"{}", b"null", b"[]", b'{"error":null}', b'{"error":{"message":null}}', b"\xff\xfe"])
    async def test_an_error_without_words_has_a_message_all_the_same(self, wire: Format, body: bytes) -> None:
        async with scene(whole(body, 422)) as here:
            assert_failed(await here.ask(f"{wire.api}/m"), 422)

    @every_format
    @pytest.mark.parametrize("status", [500, 503, 529])
    async def test_a_5xx_is_an_error_with_its_words(self, wire: Format, status: int) -> None:
        async with scene(whole(ERROR_BODIES[wire.api][0].replace(b"400", b"%d" % status), status)) as here:
            answer = await here.ask(f"{wire.api}/m")
            assert answer.status in (status, 502)
            assert assert_failed(answer)["message"] == "Said so"
        assert outcomes(here) == ["upstream_error"]

    @every_format
    @pytest.mark.parametrize("status", [401, 403])
    async def test_a_refused_key_is_the_gateways_affair(self, wire: Format, status: int) -> None:
        async with scene(whole(ERROR_BODIES[wire.api][0], status, headers={"WWW-Authenticate": "Bearer"})) as here:
            answer = await here.ask(f"{wire.api}/m")
            error = assert_failed(answer, 502, "upstream_auth")
            assert b"Said so" not in answer.body
            assert wire.api in error["message"]
            assert "WWW-Authenticate" not in answer.headers
        assert outcomes(here) == ["upstream_error"]

    @every_format
    async def test_rate_limit_headers_are_passed_on(self, wire: Format) -> None:
        limits = {"Retry-After": "7", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-tokens": "1s"}
        private = {"Set-Cookie": "a=b", "openai-organization": "acme"}
        async with scene(whole(ERROR_BODIES[wire.api][0], 429, headers={**limits, **private})) as here:
            answer = await here.ask(f"{wire.api}/m")
            assert_failed(answer, 429)
            assert {name: answer.headers[name] for name in limits} == limits
            assert not [name for name in private if name in answer.headers]
            here.upstream.answer = stream(FORMATS[wire.api].events, headers=limits)
            answer = await here.ask(f"{wire.api}/m")
            assert {name: answer.headers[name] for name in limits} == limits

    @every_format
    async def test_a_connection_that_breaks_in_an_error_body_is_still_that_error(self, wire: Format) -> None:
        async def answer(asked: Asked, line: Line) -> None:
            await line.send(http_head(429, {"Content-Length": "999", "Retry-After": "7"}) + b'{"error"')
            line.hang_up()

        async with scene(answer) as here:
            found = await here.ask(f"{wire.api}/m")
            assert_failed(found, 429)
            assert found.headers["Retry-After"] == "7"

    @every_format
    async def test_an_error_body_that_never_ends_is_not_waited_for(self, wire: Format) -> None:
        async def answer(asked: Asked, line: Line) -> None:
            await line.head(400, "application/json")
            while True:
                await line.chunk(b"x" * 2**16)

        async with scene(answer) as here:
            assert_failed(await here.ask(f"{wire.api}/m"), 400)
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)


class TestSecrets:
    """Never with the upstream's key or URL, whoever says it, wherever."""

    @staticmethod
    def said(here: Scene) -> str:
        return f"Key {KEY} at {here.upstream.url}/v1/x on 127.0.0.1:{here.upstream.port} is bad"

    @staticmethod
    def assert_quiet(here: Scene, answer: Answer) -> None:
        text = answer.body + repr(dict(answer.headers)).encode()
        assert KEY.encode() not in text
        assert f"127.0.0.1:{here.upstream.port}".encode() not in text
        assert b"is bad" in answer.body, "the rest of the message is kept"

    @every_format
    @pytest.mark.parametrize("status", [400, 404, 429, 500])
    async def test_in_an_error_body(self, wire: Format, status: int) -> None:
        async with scene() as here:
            for body in ERROR_BODIES[wire.api]:
                here.upstream.answer = whole(body.replace(b"Said so", self.said(here).encode()), status)
                self.assert_quiet(here, await here.ask(f"{wire.api}/m"))

    @pytest.mark.parametrize(("api", "event", "status"), IN_BAND)
    async def test_in_a_stream(self, api: str, event: bytes, status: int) -> None:
        async with scene() as here:
            for opening in (FORMATS[api].silent, FORMATS[api].head):
                here.upstream.answer = stream([opening, event.replace(b"Said so", self.said(here).encode())])
                self.assert_quiet(here, await here.ask(f"{api}/m"))

    async def test_in_the_other_fields_of_an_error(self) -> None:
        said = {"message": "this is bad", "type": f"bad_{KEY}", "param": f"at {KEY}", "code": f"invalid:{KEY}"}
        async with scene(whole(dumped({"error": said}), 400)) as here:
            self.assert_quiet(here, await here.ask("openai/m"))

    async def test_the_host_alone(self) -> None:
        async with Upstream() as upstream, gateway(f"http://localhost:{upstream.port}") as here:
            upstream.answer = whole(b'{"error":{"message":"cannot resolve localhost, bad"}}', 400)
            assert "localhost" not in (await ask(here.port, chat())).body.decode()


@pytest.mark.parametrize("host", ["ai:8000", "ai", "[::1]:8000"])
def test_hiding_a_short_host_name_leaves_the_words_around_it_alone(host: str) -> None:
    """A provider in one's own network may be called `ai`, and other words have these letters too."""
    provider = make_target("openai", base_url=f"http://{host}/v1", name="mine").provider
    said = presentable(UpstreamError(f"The chain failed at http://{host}/v1, said {host}."), provider).message
    assert said == "The chain failed at mine/v1, said mine."


async def test_an_error_on_the_text_face_has_that_faces_shape() -> None:
    """`text_completion`, with `text` in its choices, and no `[DONE]`."""
    wire = FORMATS["openai"]

    async def cut(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(b"".join(wire.events[:3]))
        await line.end()

    async with scene(cut) as here:
        answer = await ask(here.port, {"model": "openai/m", "prompt": "Hi", "stream": True}, "/v1/completions")
        *before, last = answer.chunks
        assert "[DONE]" not in answer.events
        assert {chunk["object"] for chunk in answer.chunks} == {"text_completion"}
        assert last["error"]["code"] == "upstream_cut"
        (choice,) = last["choices"]
        assert (choice["index"], choice["finish_reason"]) == (0, "error")
        assert "".join(choice["text"] for chunk in before for choice in chunk["choices"]) == TEXT[:3]


async def test_two_choices_that_did_not_finish_are_both_in_the_error_chunk() -> None:
    events = [data({"choices": [{"index": number, "delta": {"content": "x"}}]}) for number in (0, 1)]
    async with scene(stream([*events, data({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})])) as here:
        answer = await here.ask("openai/m", n=2)
        errors = answer.chunks[-1]["choices"]
        assert [(choice["index"], choice["finish_reason"]) for choice in errors] == [(0, "error"), (1, "error")]
        assert not any(choice["finish_reason"] for chunk in answer.chunks[:-1] for choice in chunk["choices"])
    assert outcomes(here) == ["upstream_cut"]
