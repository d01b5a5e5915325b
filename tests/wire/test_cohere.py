"""Cohere's chat API v2: what is sent for a request, and what a client gets for each reply, however its bytes are cut."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Malformed, Refused, UpstreamCut, UpstreamError
from proxy.wire.cohere import Decoder, decode_error, decode_whole, encode
from tests.support.decoding import Decoded, byte_by_byte, decode, make_call, make_target, split_at, unnumbered

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "cohere"
NAMES = ["text", "citations", "tools", "thinking_tool"]
RECORDINGS = Path(os.environ.get("PENSTOCK_WIRE") or ROOT.parent / "shared" / "wire")
TARGET = make_target("cohere", "command-a", base_url="https://api.cohere.com/v2")
TOOL = {"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object", "properties": {}}}}


def sent(**request: Any) -> Json:
    return dict(json.loads(encode(make_call(request), TARGET).body))


def sent_message(message: Json) -> Json:
    return dict(sent(messages=[message])["messages"][0])


def refusal(**request: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        encode(make_call(request), TARGET)
    assert caught.value.status == 400
    return caught.value


def sse(name: str) -> bytes:
    return (FIXTURES / f"{name}.sse").read_bytes()


def stream(*pieces: bytes, **request: Any) -> Decoded:
    return decode(Decoder(make_call({"stream": True, **request}), TARGET), pieces)


def events(*found: Json) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (str(e.get("type")).encode(), json.dumps(e).encode()) for e in found)


def text_event(text: str, **more: Any) -> Json:
    return {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": text}}}, **more}


def end_event(reason: str | None, **more: Any) -> Json:
    return {"type": "message-end", "delta": {"finish_reason": reason, **more}}


class TestRequest:
    def test_goes_to_chat_with_the_key_as_a_bearer_token(self) -> None:
        request = encode(make_call(), TARGET)
        assert request.url == "https://api.cohere.com/v2/chat"
        assert request.headers["Authorization"] == "Bearer sk-upstream-0123456789"
        assert request.dropped == ()
        messages = [{"role": "user", "content": "Hi"}]
        assert json.loads(request.body) == {"model": "command-a", "messages": messages, "stream": False}

    def test_a_stream_is_asked_for_and_usage_comes_unasked(self) -> None:
        body = sent(stream=True, stream_options={"include_usage": True})
        assert body["stream"] is True
        assert "stream_options" not in body

    def test_parameters_get_their_documented_names(self) -> None:
        body = sent(
            max_tokens=10,
            stop="END",
            temperature=0.2,
            top_p=0.9,
            top_k=40,
            seed=7,
            frequency_penalty=0.1,
            presence_penalty=0.3,
            logprobs=True,
        )
        del body["model"], body["messages"], body["stream"]
        assert body == {
            "max_tokens": 10,
            "stop_sequences": ["END"],
            "temperature": 0.2,
            "p": 0.9,
            "k": 40,
            "seed": 7,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.3,
            "logprobs": True,
        }

    def test_max_completion_tokens_wins_over_max_tokens(self) -> None:
        assert sent(max_tokens=10, max_completion_tokens=20)["max_tokens"] == 20

    def test_fields_that_cohere_documents_pass_and_win_over_openai_names(self) -> None:
        native = {
            "documents": [{"id": "1", "data": {"text": "x"}}],
            "citation_options": {"mode": "fast"},
            "safety_mode": "STRICT",
            "thinking": {"type": "enabled", "token_budget": 99},
            "k": 5,
            "p": 0.5,
            "priority": 3,
            "strict_tools": False,
            "stop_sequences": ["a"],
        }
        body = sent(**native, top_p=0.9, reasoning_effort="none", stop=["b"])
        assert {name: body[name] for name in native} == native

    def test_what_only_tunes_is_dropped_and_listed(self) -> None:
        request = encode(make_call({"user": "u", "logit_bias": {"1": 1}, "top_logprobs": 3, "n": 1}), TARGET)
        assert request.dropped == ("logit_bias", "top_logprobs", "user")

    @pytest.mark.parametrize(
        "extra",
        [{"n": 2}, {"modalities": ["audio"]}, {"web_search_options": {"search_context_size": "low"}}, {"functions": [{}]}],
    )
    def test_what_changes_the_answer_is_refused_by_name(self, extra: Json) -> None:
        (name,) = extra
        assert refusal(**extra).param == name

    @pytest.mark.parametrize("stop", [["a"] * 6, 5])
    def test_more_stop_sequences_than_documented_are_refused(self, stop: Any) -> None:
        assert refusal(stop=stop).param == "stop"
        assert sent(stop=["a"] * 5)["stop_sequences"] == ["a"] * 5

    @pytest.mark.parametrize(
        ("effort", "thinking"),
        [
            ("none", {"type": "disabled"}),
            ("low", {"type": "enabled", "token_budget": 1024}),
            ("high", {"type": "enabled"}),
        ],
    )
    def test_reasoning_effort_becomes_thinking(self, effort: str, thinking: Json) -> None:
        assert sent(reasoning_effort=effort)["thinking"] == thinking

    @pytest.mark.parametrize("effort", ["much", 3, ["high"]])
    def test_an_unknown_reasoning_effort_is_refused(self, effort: Any) -> None:
        assert refusal(reasoning_effort=effort).param == "reasoning_effort"

    def test_response_formats_are_json_object_with_an_optional_schema(self) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        asked = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
        assert sent(response_format=asked)["response_format"] == {"type": "json_object", "json_schema": schema}
        assert sent(response_format={"type": "json_object"})["response_format"] == {"type": "json_object"}
        native = {"type": "json_object", "json_schema": schema}
        assert sent(response_format=native)["response_format"] == native
        assert sent(response_format={"type": "text"})["response_format"] == {"type": "text"}

    @pytest.mark.parametrize(
        ("wanted", "param"),
        [
            ({"type": "grammar"}, "response_format"),
            ("json", "response_format"),
            ({"type": "json_schema"}, "response_format.json_schema"),
        ],
    )
    def test_other_response_formats_are_refused(self, wanted: Any, param: str) -> None:
        assert refusal(response_format=wanted).param == param

    def test_embeddings_are_refused(self) -> None:
        with pytest.raises(Refused):
            encode(make_call({"input": "x"}, kind="embeddings"), TARGET)


class TestTools:
    def test_functions_are_offered_and_one_strict_function_makes_all_strict(self) -> None:
        strict = {"type": "function", "function": {"name": "f", "description": "d", "strict": True}}
        body = sent(tools=[TOOL, strict])
        empty = {"type": "object", "properties": {}}
        assert body["tools"] == [TOOL, {"type": "function", "function": {"name": "f", "description": "d", "parameters": empty}}]
        assert body["strict_tools"] is True
        assert "strict_tools" not in sent(tools=[TOOL])

    @pytest.mark.parametrize(("choice", "carried"), [("required", "REQUIRED"), ("none", "NONE"), ("auto", None), (None, None)])
    def test_tool_choice(self, choice: str | None, carried: str | None) -> None:
        assert sent(tools=[TOOL], tool_choice=choice).get("tool_choice") == carried

    def test_a_certain_function_cannot_be_demanded(self) -> None:
        error = refusal(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "get_tide"}})
        assert (error.param, error.code) == ("tool_choice", "unsupported_by_target")

    def test_required_needs_tools_and_none_does_not(self) -> None:
        assert refusal(tool_choice="required").param == "tool_choice"
        assert "tool_choice" not in sent(tool_choice="none")

    @pytest.mark.parametrize(
        ("tool", "param"),
        [({"type": "web_search"}, "tools[0].type"), ({"type": "function"}, "tools[0].function.name"), ("x", "tools[0]")],
    )
    def test_other_tools_are_refused_by_path(self, tool: Any, param: str) -> None:
        assert refusal(tools=[tool]).param == param
        assert refusal(tools="x").param == "tools"


class TestMessages:
    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_instructions_are_system_messages(self, role: str) -> None:
        parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
        assert sent_message({"role": role, "content": parts}) == {"role": "system", "content": "Be kind."}

    @pytest.mark.parametrize("url", ["data:image/png;base64,aGk=", "https://x.example/a.png"])
    def test_text_and_images_of_a_user(self, url: str) -> None:
        parts = [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
        assert sent_message({"role": "user", "content": parts}) == {"role": "user", "content": parts}

    @pytest.mark.parametrize(
        ("message", "param"),
        [
            ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]"),
            ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}, "messages[0].content[1]"),
            ({"role": "user", "content": ["a"]}, "messages[0].content[0]"),
            ({"role": "user", "content": 5}, "messages[0].content"),
            ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
            (
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]},
                "messages[0].content[0].image_url.url",
            ),
            ({"role": "function", "content": "a"}, "messages[0].role"),
            ({"role": "assistant", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
            ({"role": "assistant", "function_call": {"name": "f"}}, "messages[0].function_call"),
            ({"role": "assistant", "audio": {"id": "a"}}, "messages[0].audio"),
            ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls"),
            ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "messages[0].tool_calls[0].id"),
            ({"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}, "messages[0].tool_calls[0].type"),
            ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function.name"),
            ({"role": "tool", "content": "a"}, "messages[0].tool_call_id"),
            ({"role": "tool", "tool_call_id": "1", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
            ({"role": "tool", "tool_call_id": "1", "content": [{"type": "document"}]}, "messages[0].content[0].document"),
        ],
    )
    def test_what_cohere_does_not_take_is_refused_by_path(self, message: Json, param: str) -> None:
        assert refusal(messages=[message]).param == param

    def test_tool_use_over_several_turns(self) -> None:
        call = {"id": "tide_1", "type": "function", "function": {"name": "get_tide", "arguments": '{"h": 1}'}}
        document = {"type": "document", "document": {"id": "d", "data": {"text": "high"}}}
        plan = {"type": "reasoning.text", "text": "Ask.", "format": "cohere-v2", "index": 0, "id": "tool_plan"}
        messages = [
            {"role": "user", "content": "Tide?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call],
                "reasoning_content": "Ask.",
                "reasoning_details": [plan],
            },
            {"role": "tool", "tool_call_id": "tide_1", "content": "high"},
            {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "tide_2"}], "reasoning_content": "Once more."},
            {"role": "tool", "tool_call_id": "tide_2", "content": [document, {"type": "text", "text": "low"}]},
            {"role": "assistant", "content": "It is low.", "reasoning_content": "unknown make"},
            {"role": "user", "content": "Thanks"},
        ]
        assert sent(messages=messages)["messages"] == [
            {"role": "user", "content": "Tide?"},
            {"role": "assistant", "tool_calls": [call], "tool_plan": "Ask."},
            {"role": "tool", "tool_call_id": "tide_1", "content": "high"},
            {"role": "assistant", "tool_calls": [{**call, "id": "tide_2"}], "tool_plan": "Once more."},
            {"role": "tool", "tool_call_id": "tide_2", "content": [document, {"type": "text", "text": "low"}]},
            {"role": "assistant", "content": "It is low."},
            {"role": "user", "content": "Thanks"},
        ]

    @pytest.mark.parametrize(("given", "carried"), [("", "{}"), (None, "{}"), ({"a": 1}, '{"a":1}'), ('{"a":', '{"a":')])
    def test_arguments_are_text(self, given: Any, carried: str) -> None:
        call = {"id": "1", "function": {"name": "f", "arguments": given}}
        assert sent_message({"role": "assistant", "tool_calls": [call]})["tool_calls"][0]["function"]["arguments"] == carried

    def test_thinking_of_this_format_goes_back_and_of_others_does_not(self) -> None:
        details = [
            {"type": "reasoning.text", "text": "Hm", "format": "cohere-v2", "index": 0},
            {"type": "reasoning.text", "text": "m.", "format": "cohere-v2", "index": 0},
            {"type": "reasoning.text", "text": "Yes.", "format": "cohere-v2", "index": 1},
            {"type": "reasoning.text", "text": "no", "format": "anthropic-claude-v1", "signature": "s", "index": 2},
        ]
        thoughts = [{"type": "thinking", "thinking": "Hmm."}, {"type": "thinking", "thinking": "Yes."}]
        answer = [{"type": "text", "text": "7"}]
        for content in ("7", answer):
            message = {"role": "assistant", "content": content, "reasoning_details": details}
            assert sent_message(message)["content"] == thoughts + answer
        foreign = {"role": "assistant", "content": "7", "reasoning_content": "no", "reasoning_details": details[3:]}
        assert sent_message(foreign) == {"role": "assistant", "content": "7"}

    def test_coheres_own_message_fields_pass(self) -> None:
        own = [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "7"}]
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        message = {"role": "assistant", "content": own, "tool_calls": [call], "tool_plan": "Ask.", "citations": [{"start": 0}]}
        assert sent_message(message) == message
        details = [{"type": "reasoning.text", "text": "again", "format": "cohere-v2", "index": 0}]
        assert sent_message({**message, "reasoning_details": details})["content"] == own

    def test_a_refusal_is_text_of_the_assistant(self) -> None:
        message = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
        assert sent_message(message)["content"] == [{"type": "text", "text": "No."}]

    def test_an_empty_answer_is_an_empty_text(self) -> None:
        assert sent_message({"role": "assistant", "content": None}) == {"role": "assistant", "content": ""}


class TestStream:
    def test_text(self) -> None:
        found = stream(sse("text"))
        assert found.fault is None
        assert found.text == {0: "Grüße aus dem Garten 🌻."}
        assert found.finish == {0: ("stop", "COMPLETE")}
        assert {(c["id"], c["created"], c["model"]) for c in found.chunks} == {
            ("11111111-aaaa-4000-8000-000000000001", 1700000000, "public-model")
        }
        assert found.usage == {
            "prompt_tokens": 71,
            "completion_tokens": 9,
            "total_tokens": 80,
            "billed_units": {"input_tokens": 9, "output_tokens": 7},
        }
        assert all(type(found.usage[name]) is int for name in ("prompt_tokens", "completion_tokens", "total_tokens"))

    def test_nothing_but_the_finish_chunk_comes_at_the_end_and_the_first_delta_has_the_role(self) -> None:
        found = stream(sse("text"))
        assert found.chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "Grüße"}
        assert [c["choices"][0]["finish_reason"] for c in found.chunks] == [None] * 6 + ["stop"]

    def test_thinking_citations_and_cached_tokens(self) -> None:
        found = stream(sse("citations"))
        assert found.reasoning == {0: "The leaflet says so."}
        assert found.details[0][0] == {"type": "reasoning.text", "text": "The", "format": "cohere-v2", "index": 0}
        assert found.text == {0: "Otters sleep holding hands."}
        notes = unnumbered([note for c in found.chunks for note in c["choices"][0]["delta"].get("annotations", [])])
        assert notes[0] == {"type": "citation", "citation": notes[0]["citation"]}
        assert notes[0]["citation"]["sources"][0]["id"] == "doc:0"
        assert notes[1]["type"] == "url_citation"
        assert notes[1]["url_citation"] == {
            "start_index": 13,
            "end_index": 26,
            "url": "https://zoo.example/otters",
            "title": "Zoo facts",
        }
        assert notes[1]["citation"]["text"] == "holding hands"
        assert found.usage is not None
        assert found.usage["prompt_tokens_details"] == {"cached_tokens": 128}
        assert found.usage["completion_tokens_details"] == {"reasoning_tokens": 12}

    def test_parallel_tool_calls_after_a_plan(self) -> None:
        found = stream(sse("tools"))
        assert found.reasoning == {0: "I will ask for both tides."}
        assert {(d["id"], d["index"]) for d in found.details[0]} == {("tool_plan", 0)}
        assert found.tools[0] == [
            {"id": "tide_aaa", "name": "get_tide", "arguments": '{"harbour": "Brest"}'},
            {"id": "tide_bbb", "name": "get_tide", "arguments": '{"harbour": "Łeba"}'},
        ]
        assert found.finish == {0: ("tool_calls", "TOOL_CALL")}

    def test_a_plan_after_thinking_is_the_next_piece_of_reasoning(self) -> None:
        thought = {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"thinking": "a"}}}}
        plan = {"type": "tool-plan-delta", "delta": {"message": {"tool_plan": "b"}}}
        found = stream(events(thought, plan, thought, end_event("COMPLETE")))
        assert [(d["text"], d["index"], d.get("id")) for d in found.details[0]] == [
            ("a", 0, None),
            ("b", 1, "tool_plan"),
            ("a", 0, None),
        ]

    def test_text_in_content_start_and_arguments_in_tool_call_start_count(self) -> None:
        opening = {"type": "content-start", "index": 0, "delta": {"message": {"content": {"type": "text", "text": "A"}}}}
        call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
        tool = {"type": "tool-call-start", "index": 0, "delta": {"message": {"tool_calls": call}}}
        found = stream(events(opening, tool, end_event("TOOL_CALL")))
        assert found.text == {0: "A"}
        assert found.tools[0] == [{"id": "call_0a1b2c3d4e5f_0_0", "name": "f", "arguments": "{}"}]

    def test_lists_where_one_object_is_documented_are_read(self) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
        tool = {"type": "tool-call-start", "index": 3, "delta": {"message": {"tool_calls": [call]}}}
        more = {"type": "tool-call-delta", "index": 3, "delta": {"message": {"tool_calls": [{"function": {"arguments": "{}"}}]}}}
        cite = {"type": "citation-start", "index": 0, "delta": {"message": {"citations": []}}}
        found = stream(events(tool, more, cite, end_event("TOOL_CALL")))
        assert found.tools[0] == [{"id": "1", "name": "f", "arguments": "{}"}]

    def test_contents_of_unknown_types_are_kept_as_blocks(self) -> None:
        block = {"type": "image", "image": {"url": "x"}}
        found = stream(
            events({"type": "content-start", "index": 0, "delta": {"message": {"content": block}}}, end_event("COMPLETE"))
        )
        assert found.blocks == {0: [block]}

    def test_logprobs_keep_their_order_and_sum_up_over_the_tokens_of_a_text(self) -> None:
        empty = text_event("", logprobs={"token_ids": [1], "text": "", "logprobs": [-0.5]})
        full = text_event("Ab", logprobs={"token_ids": [2, 3], "text": "Ab", "logprobs": [-0.25, -0.5]})
        found = stream(events(empty, full, end_event("COMPLETE")))
        assert found.chunks[0]["choices"][0]["logprobs"]["content"] == [
            {"token": "", "logprob": -0.5, "bytes": [], "top_logprobs": [], "token_ids": [1]},
            {"token": "Ab", "logprob": -0.75, "bytes": [65, 98], "top_logprobs": [], "token_ids": [2, 3]},
        ]

    def test_events_of_unknown_types_are_passed_over(self) -> None:
        found = stream(events({"type": "debug", "prompt": "x"}, text_event("A"), {"type": "citation-end"}, end_event("COMPLETE")))
        assert (found.text, found.fault) == ({0: "A"}, None)

    def test_a_citation_of_a_plan_is_no_url_citation(self) -> None:
        source = {"type": "document", "id": "https://x.example", "document": {}}
        for kind, expected in (("PLAN", "citation"), ("TEXT_CONTENT", "url_citation")):
            citation = {"start": 0, "end": 1, "text": "A", "sources": [source, {"type": "tool"}], "type": kind}
            cite = {"type": "citation-start", "index": 0, "delta": {"message": {"citations": citation}}}
            (chunk, _) = stream(events(cite, end_event("COMPLETE"))).chunks
            assert chunk["choices"][0]["delta"]["annotations"][0]["type"] == expected


class TestEnd:
    @pytest.mark.parametrize(
        ("native", "reason"),
        [
            ("COMPLETE", "stop"),
            ("STOP_SEQUENCE", "stop"),
            ("MAX_TOKENS", "length"),
            ("ERROR_LIMIT", "length"),
            ("ERROR_TOXIC", "content_filter"),
            ("TOOL_CALL", "tool_calls"),
            ("SOMETHING_NEW", "stop"),
            (None, "stop"),
        ],
    )
    def test_finish_reasons(self, native: str | None, reason: str) -> None:
        assert stream(events(text_event("A"), end_event(native))).finish == {0: (reason, native)}
        reply = {"message": {"content": [{"type": "text", "text": "A"}]}, "finish_reason": native}
        (choice,) = decode_whole(make_call(), TARGET, json.dumps(reply).encode())["choices"]
        assert (choice["finish_reason"], choice["native_finish_reason"]) == (reason, native)

    def test_a_reply_may_be_empty(self) -> None:
        found = stream(events(end_event("COMPLETE")))
        assert found.chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert found.finish == {0: ("stop", "COMPLETE")}

    @pytest.mark.parametrize(
        ("native", "error", "status", "words"),
        [
            ("ERROR", "The model broke.", 502, "The model broke."),
            ("ERROR", {"message": "It broke."}, 502, "It broke."),
            ("ERROR", None, 502, "ERROR"),
            ("TIMEOUT", None, 504, "TIMEOUT"),
            ("COMPLETE", "but broken", 502, "but broken"),
        ],
    )
    def test_failures_are_upstream_errors_without_a_finish(self, native: str, error: Any, status: int, words: str) -> None:
        found = stream(events(text_event("A"), end_event(native, error=error)))
        assert isinstance(found.fault, UpstreamError)
        assert (found.text, found.finish) == ({0: "A"}, {})
        reply = {"message": {"content": []}, "finish_reason": native, "error": error}
        with pytest.raises(UpstreamError) as whole:
            decode_whole(make_call(), TARGET, json.dumps(reply).encode())
        for fault in (found.fault, whole.value):
            assert fault.status == status
            assert words in fault.message

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b'data: {"message": "broken"}\n\n', 502),
            (b'data: {"type": "error", "error": {"message": "broken", "type": "rate_limit"}}\n\n', 429),
            (b'event: error\ndata: {"message": "broken"}\n\n', 502),
            (b'{"id": "1", "message": "broken"}', 502),
            (b'data: {"message": "broken", "status_code": 503}\n\n', 503),
        ],
    )
    def test_an_error_in_the_stream_is_an_upstream_error(self, body: bytes, status: int) -> None:
        found = stream(events(text_event("A")), body)
        assert isinstance(found.fault, UpstreamError)
        assert (found.fault.status, found.fault.message, found.finish) == (status, "broken", {})

    @pytest.mark.parametrize(
        "body",
        [
            b"data: {no json}\n\n",
            b"data: 5\n\n",
            b"data: {}\n\n",
            b'data: {"type": "content-delta"}\n\n',
            b'data: {"type": "tool-call-delta", "index": 9, "delta": {"message": {"tool_calls": {"function": {}}}}}\n\n',
            b'data: {"type": "message-end", "delta": {"finish_reason": {}}}\n\n',
        ],
    )
    def test_a_broken_event_is_malformed(self, body: bytes) -> None:
        found = stream(events(text_event("A")), body, events(end_event("COMPLETE")))
        assert isinstance(found.fault, Malformed)
        assert found.finish == {}

    def test_done_before_message_end_is_no_end(self) -> None:
        found = stream(events(text_event("A")) + b"data: [DONE]\n\n")
        assert isinstance(found.fault, UpstreamCut)
        assert stream(b"data: [DONE]\n\n" + events(end_event("COMPLETE"))).fault is None

    def test_what_follows_message_end_is_not_read(self) -> None:
        found = stream(events(text_event("A"), end_event("COMPLETE"), text_event("B")) + b"data: {broken\n\n")
        assert (found.text, found.fault) == ({0: "A"}, None)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_cut_at_any_byte_before_message_end_is_a_cut(self, name: str) -> None:
        body = sse(name)
        end = body.index(b"\n", body.index(b'data: {"type": "message-end"'))
        for cut in range(len(body)):
            found = stream(body[:cut])
            if cut < end:
                assert found.finish == {}, cut
                # Inside an event, what there is of it may be no JSON: a fault as well, by another name.
                assert isinstance(found.fault, UpstreamCut | Malformed), cut
                if body[:cut].endswith(b"\n\n"):
                    assert isinstance(found.fault, UpstreamCut), cut
            else:
                assert (found.fault, list(found.finish)) == (None, [0]), cut


class TestSplits:
    @pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
    @pytest.mark.parametrize("name", NAMES)
    def test_byte_by_byte_is_the_same_as_whole(self, name: str, newline: bytes) -> None:
        body = sse(name).replace(b"\n", newline)
        assert stream(*byte_by_byte(body)) == stream(sse(name))

    @given(cuts=st.lists(st.integers(0, 10_000), max_size=12), name=st.sampled_from(NAMES))
    def test_any_split_is_the_same_as_whole(self, cuts: list[int], name: str) -> None:
        assert stream(*split_at(sse(name), cuts)) == stream(sse(name))


class TestWhole:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_whole_reply_says_what_the_stream_says(self, name: str) -> None:
        found = stream(sse(name))
        completion = decode_whole(make_call(), TARGET, (FIXTURES / f"{name}.json").read_bytes())
        assert_same(completion, found)
        assert completion["object"] == "chat.completion"
        first = found.chunks[0]
        assert [completion[key] for key in ("id", "created", "model")] == [first[key] for key in ("id", "created", "model")]

    def test_content_is_null_beside_tool_calls_and_empty_otherwise(self) -> None:
        tools = decode_whole(make_call(), TARGET, (FIXTURES / "tools.json").read_bytes())
        assert tools["choices"][0]["message"]["content"] is None
        empty = decode_whole(make_call(), TARGET, b'{"message": {}, "finish_reason": "COMPLETE"}')
        assert empty["choices"][0]["message"] == {"role": "assistant", "content": ""}
        assert empty["id"] == "chatcmpl-0a1b2c3d4e5f"
        assert "usage" not in empty

    def test_logprobs_and_unknown_contents_are_kept(self) -> None:
        block = {"type": "image", "image": {}}
        message = {"content": [block, {"type": "text", "text": "A"}]}
        reply = {"message": message, "finish_reason": "COMPLETE", "logprobs": [{"text": "A", "token_ids": [1], "logprobs": [-1]}]}
        (choice,) = decode_whole(make_call(), TARGET, json.dumps(reply).encode())["choices"]
        assert choice["message"]["provider_blocks"] == [block]
        assert choice["logprobs"]["content"][0]["logprob"] == -1.0

    def test_content_as_a_string_and_a_missing_finish_reason_after_calls(self) -> None:
        call = {"function": {"name": "f"}}
        reply = {"message": {"content": "A", "tool_calls": [call]}, "usage": {"billed_units": {"input_tokens": 1}}}
        completion = decode_whole(make_call(), TARGET, json.dumps(reply).encode())
        (choice,) = completion["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("A", "tool_calls")
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": ""}
        assert (completion["usage"]["prompt_tokens"], completion["usage"]["total_tokens"]) == (1, 1)

    def test_an_error_inside_a_200_is_an_upstream_error(self) -> None:
        with pytest.raises(UpstreamError, match="broken"):
            decode_whole(make_call(), TARGET, b'{"id": "1", "message": "broken"}')

    @pytest.mark.parametrize(
        "body", [b"<html>", b"[]", b"{}", b'{"message": {"content": 5}}', b'{"message": {"tool_calls": [{}]}}']
    )
    def test_another_shape_is_malformed(self, body: bytes) -> None:
        with pytest.raises(Malformed):
            decode_whole(make_call(), TARGET, body)


def test_http_errors_keep_status_words_and_retry_after() -> None:
    error = decode_error(429, {"retry-after": "3"}, b'{"id": "x", "message": "slow down"}')
    assert (error.status, error.message, error.type, error.headers) == (
        429,
        "slow down",
        "rate_limit_error",
        {"retry-after": "3"},
    )


def recordings() -> list[Json]:
    folder = RECORDINGS / "cohere"
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    return [exchange for exchange in found if exchange["api"] == "cohere.chat.v2"]


def replayed(exchange: Json) -> Json:
    """What a recorded stream adds up to, read here line by line without any of the gateway's code."""
    total: Json = {"text": "", "reasoning": "", "tools": {}, "citations": [], "finish": None, "usage": None}
    for line in exchange["response"]["body_text"].splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        message = event.get("delta", {}).get("message", {})
        if event["type"].startswith("content-") and message:
            total["text"] += message["content"].get("text", "")
            total["reasoning"] += message["content"].get("thinking", "")
        elif event["type"] == "tool-plan-delta":
            total["reasoning"] += message["tool_plan"]
        elif event["type"] == "tool-call-start":
            call = message["tool_calls"]
            total["tools"][event["index"]] = [call["id"], call["function"]["name"], call["function"]["arguments"]]
        elif event["type"] == "tool-call-delta":
            total["tools"][event["index"]][2] += message["tool_calls"]["function"]["arguments"]
        elif event["type"] == "citation-start":
            total["citations"].append(message["citations"])
        elif event["type"] == "message-end":
            total["finish"] = event["delta"]["finish_reason"]
            total["usage"] = event["delta"]["usage"]["tokens"]
    return total


def assert_same(completion: Json, found: Decoded) -> None:
    """A completion says what the chunks add up to. Adjacent pieces of one reasoning entry count as joined."""
    (choice,) = completion["choices"]
    message = choice["message"]
    assert (message["content"] or "") == found.text[0]
    assert message.get("reasoning_content", "") == found.reasoning[0]
    joined: dict[int, Json] = {}
    for detail in found.details[0]:
        entry = joined.setdefault(detail["index"], {**detail, "text": ""})
        entry["text"] += detail["text"]
    assert message.get("reasoning_details", []) == list(joined.values())
    calls = [{"id": c["id"], **c["function"]} for c in message.get("tool_calls", [])]
    assert calls == found.tools[0]
    notes = [note for chunk in found.chunks for note in chunk["choices"][0]["delta"].get("annotations", [])]
    assert message.get("annotations", []) == unnumbered(notes)
    assert (choice["finish_reason"], choice["native_finish_reason"]) == found.finish[0]
    assert completion.get("usage") == found.usage


class TestRecordings:
    """Real traffic, which is not in the repository."""

    @pytest.fixture(autouse=True)
    def present(self) -> None:
        if not recordings():
            pytest.skip("no recordings of Cohere here: set PENSTOCK_WIRE to their folder")

    def test_streams(self) -> None:
        streams = [exchange for exchange in recordings() if exchange["streaming"]]
        assert streams
        for exchange in streams:
            body = exchange["response"]["body_text"].encode()
            found = stream(body)
            expected = replayed(exchange)
            assert found.fault is None
            assert found == stream(*byte_by_byte(body))
            assert (found.text[0], found.reasoning[0]) == (expected["text"], expected["reasoning"])
            tools = [[tool["id"], tool["name"], tool["arguments"]] for tool in found.tools[0]]
            assert tools == list(expected["tools"].values())
            notes = [note for chunk in found.chunks for note in chunk["choices"][0]["delta"].get("annotations", [])]
            assert [note["citation"] for note in notes] == expected["citations"]
            assert found.finish[0][1] == expected["finish"]
            assert (
                found.finish[0][0] == {"COMPLETE": "stop", "TOOL_CALL": "tool_calls", "MAX_TOKENS": "length"}[expected["finish"]]
            )
            assert found.usage is not None
            counts = (found.usage["prompt_tokens"], found.usage["completion_tokens"])
            assert counts == (expected["usage"]["input_tokens"], expected["usage"]["output_tokens"])

    def test_whole_replies(self) -> None:
        for exchange in recordings():
            if exchange["streaming"] or exchange["response"]["status"] != 200:
                continue
            raw = json.loads(exchange["response"]["body_text"])
            completion = decode_whole(make_call(), TARGET, exchange["response"]["body_text"].encode())
            message = completion["choices"][0]["message"]
            contents = raw["message"].get("content", [])
            assert (message["content"] or "") == "".join(part.get("text", "") for part in contents)
            thinking = "".join(part.get("thinking", "") for part in contents) + raw["message"].get("tool_plan", "")
            assert message.get("reasoning_content", "") == thinking
            assert message.get("tool_calls", []) == raw["message"].get("tool_calls", [])
            assert len(message.get("annotations", [])) >= len(raw["message"].get("citations", []))

    def test_errors(self) -> None:
        for exchange in recordings():
            response = exchange["response"]
            if response["status"] >= 400:
                error = decode_error(response["status"], response["headers"], response["body_text"].encode())
                assert (error.status, error.message) == (response["status"], json.loads(response["body_text"])["message"])

    def test_recorded_requests_are_sent_as_they_were(self) -> None:
        """Cohere's own shapes pass: what another client sent to Cohere would be sent by the gateway too."""
        for exchange in recordings():
            body = exchange["request"]["body"]
            given = {**body, "stream": bool(body.get("stream"))}
            request = encode(make_call(given), make_target("cohere", body["model"]))
            assert json.loads(request.body) == given
