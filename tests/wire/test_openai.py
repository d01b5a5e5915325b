"""The OpenAI format: what goes upstream for each kind of row, and what a client gets for every odd thing that vendors send.

Strategy: every stream here is invented after a vendor's shape and decoded twice, whole and byte by byte, and both must agree; the
expectations are the contract's sections 2 and 3. Whole replies get the same oddities as streams.
The one rule: what a vendor sends may be moved, renamed or completed, but never lost, and never a fault of the decoder's own.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import GatewayError, Malformed, UpstreamCut, UpstreamError
from proxy.fold import fold
from proxy.wire.openai import Decoder, decode_error, decode_whole, encode
from proxy.wire.openai import encode as encode_module
from tests.support.decoding import Decoded, byte_by_byte, decode, make_call, make_target, split_at

Json = dict[str, Any]
TARGET = make_target("openai", "vendor-model")
DONE = b"data: [DONE]\n\n"
USER = {"role": "user", "content": "Hi"}


def sse(*found: Json | bytes) -> bytes:
    return b"".join(event if isinstance(event, bytes) else b"data: %b\n\n" % json.dumps(event).encode() for event in found)


def chunk(
    delta: Json | None = None, finish: str | None = None, index: int = 0, *, beside: Json | None = None, **top: Any
) -> Json:
    """A vendor's chunk. beside: further fields of the choice; top: further fields of the chunk."""
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish, **(beside or {})}
    head = {"id": "cmpl-1", "object": "chat.completion.chunk", "created": 1700000001, "model": "vendor-model"}
    return {**head, "choices": [choice], **top}


def tool(id: Any = None, name: Any = None, arguments: Any = "", **fields: Any) -> Json:
    """A delta with one tool call; what is None is left out."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"tool_calls": [{**({"id": id} if id is not None else {}), "function": function, **fields}]}


def run(*found: Json | bytes, clean: bool = True, **request: Any) -> Decoded:
    """Decode whole and byte by byte; both give the same."""
    body = sse(*found)
    call = make_call({"stream": True, **request})
    one = decode(Decoder(call, TARGET), [body], clean_end=clean)
    many = decode(Decoder(call, TARGET), byte_by_byte(body), clean_end=clean)
    assert (one.chunks, one.usage, repr(one.fault)) == (many.chunks, many.usage, repr(many.fault))
    for got in one.chunks:
        assert got["object"] == "chat.completion.chunk"
        assert got["model"] == "public-model"
        assert (got["id"], got["created"]) == (one.chunks[0]["id"], one.chunks[0]["created"])
    return one


def fine(*found: Json | bytes, **request: Any) -> Decoded:
    """A stream that completes: DONE is added."""
    got = run(*found, DONE, **request)
    assert got.fault is None
    assert set(got.finish) == set(got.text), "every choice has its finish reason"
    return got


def fault(*found: Json | bytes, clean: bool = True) -> GatewayError:
    got = run(*found, clean=clean).fault
    assert got is not None
    return got


def tools(*deltas: Json) -> list[Json]:
    """The tool calls that a client puts together from these deltas."""
    return fine(*(chunk(delta) for delta in deltas), chunk(finish="tool_calls")).tools[0]


def whole(body: Json, kind: str = "chat") -> Json:
    return decode_whole(make_call({}, kind=kind), TARGET, json.dumps(body).encode())


def reply(message: Json | None = None, finish: str | None = "stop", *, beside: Json | None = None, **top: Any) -> Json:
    """A vendor's whole reply."""
    choice = {
        "index": 0,
        "message": message or {"role": "assistant", "content": "Yes"},
        "finish_reason": finish,
        **(beside or {}),
    }
    head = {"id": "cmpl-1", "object": "chat.completion", "created": 1700000001, "model": "vendor-model"}
    return {**head, "choices": [choice], **top}


def message_of(body: Json) -> Json:
    return dict(whole(body)["choices"][0]["message"])


class TestRequest:
    def sent(self, request: Json, *, kind: str = "chat", **row: Any) -> Json:
        return dict(json.loads(encode(make_call(request, kind=kind), make_target("openai", "vendor-model", **row)).body))

    def back(self, message: Json, reasoning: str = "none") -> Json:
        """How an assistant's earlier message goes to a row with this `reasoning`."""
        return dict(self.sent({"messages": [message]}, reasoning=reasoning)["messages"][0])

    def test_goes_to_chat_completions_with_a_bearer_token_and_the_targets_model(self) -> None:
        request = encode(make_call(), TARGET)
        assert request.url == "http://127.0.0.1:9/v1/chat/completions"
        assert request.headers["Authorization"] == "Bearer sk-upstream-0123456789"
        assert request.headers["Content-Type"] == "application/json"
        assert json.loads(request.body) == {"model": "vendor-model", "messages": [USER]}

    def test_a_compressed_answer_is_not_asked_for(self) -> None:
        assert encode(make_call(), TARGET).headers["Accept-Encoding"] == "identity"

    def test_fields_that_the_gateway_does_not_know_pass_as_they_are(self) -> None:
        odd = {"top_k": 3, "provider": {"order": ["x"]}, "reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "x": None}
        message = {"role": "user", "content": [{"type": "new", "new": [1]}], "cache_control": {"type": "ephemeral"}}
        assert self.sent({**odd, "messages": [message]}) == {**odd, "model": "vendor-model", "messages": [message]}

    @pytest.mark.parametrize(
        ("usage", "asked", "expected"),
        [
            ("stream_options", None, {"include_usage": True}),
            ("stream_options", {"include_usage": False}, {"include_usage": True}),
            ("stream_options", {"include_obfuscation": False}, {"include_obfuscation": False, "include_usage": True}),
            ("always", {"include_usage": True}, None),
            ("none", {"include_usage": True}, None),
            ("always", None, None),
        ],
    )
    def test_a_stream_asks_for_usage_where_the_row_allows(self, usage: str, asked: Json | None, expected: Json | None) -> None:
        request = {"stream": True, **({} if asked is None else {"stream_options": asked})}
        body = self.sent(request, usage=usage)
        assert body.get("stream_options") == expected
        assert ("stream_options" in body) == (expected is not None)
        assert body["stream"] is True

    def test_a_whole_reply_is_asked_for_without_stream_options(self) -> None:
        """OpenAI refuses stream_options where `stream` is not true."""
        body = self.sent({"stream": False, "stream_options": {"include_usage": True}})
        assert body == {"model": "vendor-model", "messages": [USER]}

    def test_text_completions_go_to_their_path_with_the_prompt_as_it_is(self) -> None:
        call = make_call({"prompt": ["a", [1, 2]], "stream": True}, kind="completions")
        request = encode(call, TARGET)
        assert request.url == "http://127.0.0.1:9/v1/completions"
        assert json.loads(request.body)["prompt"] == ["a", [1, 2]]
        assert json.loads(request.body)["stream_options"] == {"include_usage": True}

    def test_embeddings_go_to_their_path_untouched(self) -> None:
        call = make_call({"input": ["a"], "dimensions": 3, "stream": True}, kind="embeddings")
        del call.request["messages"]
        request = encode(call, TARGET)
        assert request.url == "http://127.0.0.1:9/v1/embeddings"
        assert json.loads(request.body) == {"model": "vendor-model", "input": ["a"], "dimensions": 3, "stream": True}

    def test_a_deployment_in_the_path_a_version_in_the_query_and_a_key_header_are_a_matter_of_the_row(self) -> None:
        azure = make_target(
            "openai",
            "my dep/ü",
            base_url="https://x.example/openai/deployments/{model}",
            query=(("api-version", "2024-10-21 a&b"),),
            key_header="api-key",
            headers=(("X-Own", "1"),),
        )
        request = encode(make_call(), azure)
        path = "https://x.example/openai/deployments/my%20dep/%C3%BC/chat/completions"
        assert request.url == path + "?api-version=2024-10-21%20a%26b"
        assert request.headers["api-key"] == "sk-upstream-0123456789"
        assert request.headers["X-Own"] == "1"
        assert "Authorization" not in request.headers

    def test_a_key_header_that_is_authorization_in_any_case_carries_a_bearer_token(self) -> None:
        request = encode(make_call(), make_target("openai", key_header="authorization"))
        assert request.headers["authorization"] == "Bearer sk-upstream-0123456789"

    def test_a_row_without_a_key_sends_none(self) -> None:
        assert "Authorization" not in encode(make_call(), make_target("openai", api_key=None)).headers

    @pytest.mark.parametrize(
        ("reasoning", "expected"),
        [
            ("none", {"content": "Yes"}),
            ("reasoning_content", {"content": "Yes", "reasoning_content": "Hm"}),
            ("reasoning", {"content": "Yes", "reasoning": "Hm"}),
            ("reasoning_details", {"content": "Yes", "reasoning": "Hm"}),
            (
                "thinking_parts",
                {
                    "content": [
                        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]},
                        {"type": "text", "text": "Yes"},
                    ]
                },
            ),
        ],
    )
    @pytest.mark.parametrize("spelling", ["reasoning_content", "reasoning"])
    def test_earlier_reasoning_goes_back_as_the_row_says(self, reasoning: str, expected: Json, spelling: str) -> None:
        assert self.back({"role": "assistant", "content": "Yes", spelling: "Hm"}, reasoning) == {"role": "assistant", **expected}

    def test_details_go_back_to_the_row_that_takes_them_and_nowhere_else(self) -> None:
        details = [{"type": "reasoning.encrypted", "data": "x", "format": "anthropic-claude-v1", "index": 0}]
        message = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm", "reasoning_details": details}
        assert self.back(message, "reasoning_details") == {"role": "assistant", "content": "Yes", "reasoning_details": details}
        for other in ("none", "reasoning_content", "reasoning", "thinking_parts"):
            assert "reasoning_details" not in self.back(message, other)

    def test_details_that_another_wire_made_are_left_out_and_the_text_goes_instead(self) -> None:
        details: list[Any] = [{"type": "reasoning.text", "text": "Hm", "format": "cohere-v2", "index": 0}, "noise"]
        message = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm", "reasoning_details": details}
        assert self.back(message, "reasoning_details") == {"role": "assistant", "content": "Yes", "reasoning": "Hm"}

    @pytest.mark.parametrize(
        ("content", "expected"), [(None, []), ("", []), ([{"type": "text", "text": "a"}], [{"type": "text", "text": "a"}])]
    )
    def test_thinking_parts_stand_before_whatever_the_content_is(self, content: Any, expected: list[Any]) -> None:
        got = self.back({"role": "assistant", "content": content, "reasoning_content": "Hm"}, "thinking_parts")["content"]
        assert got == [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}, *expected]

    @pytest.mark.parametrize("reasoning", ["none", "reasoning_content", "reasoning", "reasoning_details", "thinking_parts"])
    def test_what_the_gateway_invented_never_goes_upstream(self, reasoning: str) -> None:
        message = {"role": "assistant", "content": "Yes", "provider_blocks": [{"type": "x"}], "native_finish_reason": "eos"}
        assert self.back(message, reasoning) == {"role": "assistant", "content": "Yes"}

    @pytest.mark.parametrize("reasoning", ["none", "reasoning_content", "reasoning", "reasoning_details", "thinking_parts"])
    def test_empty_reasoning_does_no_harm(self, reasoning: str) -> None:
        got = self.back({"role": "assistant", "content": "Yes", "reasoning_content": None, "reasoning_details": None}, reasoning)
        assert {name: value for name, value in got.items() if value is not None} == {"role": "assistant", "content": "Yes"}

    def test_tool_calls_of_earlier_messages_pass_with_unknown_fields(self) -> None:
        """Gemini's compatible API wants its signature back in extra_content."""
        call = {
            "id": "c",
            "type": "function",
            "function": {"name": "f", "arguments": "{}"},
            "extra_content": {"google": {"s": "x"}},
        }
        message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm"}
        assert self.back(message) == {"role": "assistant", "content": None, "tool_calls": [call]}

    def test_the_request_stays_as_it_was_for_the_next_attempt(self) -> None:
        request = {
            "stream": True,
            "stream_options": {"include_usage": False},
            "messages": [
                USER,
                {"role": "assistant", "content": "a", "reasoning": "b", "reasoning_details": [{"format": "cohere-v2"}]},
            ],
        }
        call = make_call(request)
        before = copy.deepcopy(call.request)
        for reasoning in ("none", "reasoning_details", "thinking_parts"):
            encode(call, make_target("openai", reasoning=reasoning))
        assert call.request == before

    def test_a_message_that_need_not_change_is_not_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Json] = []
        module = __import__(encode_module.__module__, fromlist=["json_body"])

        def json_body(body: Json) -> bytes:
            seen.append(body)
            return b"{}"

        monkeypatch.setattr(module, "json_body", json_body)
        call = make_call({"messages": [USER, {"role": "assistant", "content": "a"}], "tools": [{"type": "function"}]})
        encode(call, TARGET)
        assert seen[0]["tools"] is call.request["tools"]
        assert all(ours is theirs for ours, theirs in zip(seen[0]["messages"], call.request["messages"], strict=True))

    def test_a_message_that_is_no_object_is_the_vendors_to_refuse(self) -> None:
        assert self.sent({"messages": ["text"]})["messages"] == ["text"]


class TestText:
    def test_a_plain_stream(self) -> None:
        got = run(
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "Hel"}),
            chunk({"content": "lo"}),
            chunk(finish="stop"),
            DONE,
        )
        assert got.fault is None
        deltas = [choice["delta"] for each in got.chunks for choice in each["choices"]]
        assert deltas == [{"role": "assistant", "content": "Hel"}, {"content": "lo"}, {}]
        assert got.finish == {0: ("stop", "stop")}
        assert (got.chunks[0]["id"], got.chunks[0]["created"]) == ("cmpl-1", 1700000001)

    def test_nothing_leaves_before_there_is_content(self) -> None:
        decoder = Decoder(make_call({"stream": True}), TARGET)
        opening = sse(
            chunk({"role": "assistant"}),
            chunk({"content": ""}),
            chunk({}),
            chunk({"content": None}),
            b": ping\n\n",
            b"data: {}\n\n",
        )
        assert decoder.feed(opening) == []
        assert len(decoder.feed(sse(chunk({"content": "a"})))) == 1

    def test_finish_chunks_wait_for_the_upstreams_own_end(self) -> None:
        decoder = Decoder(make_call({"stream": True}), TARGET)
        assert len(decoder.feed(sse(chunk({"content": "a"}), chunk(finish="stop")))) == 1
        assert decoder.finished
        assert not decoder.over()
        assert len(decoder.feed(DONE)) == 1
        assert decoder.ended
        assert decoder.feed(sse(chunk({"content": "b"}))) == []

    def test_silence_after_the_finish_reason_settles_the_stream(self) -> None:
        decoder = Decoder(make_call({"stream": True}), TARGET)
        decoder.feed(sse(chunk({"content": "a"}, "length")))
        (item,) = decoder.settle()
        assert isinstance(item, dict)
        assert item["choices"][0]["finish_reason"] == "length"
        assert decoder.settle() == []

    def test_the_role_stands_on_the_first_delta_of_each_choice_and_only_there(self) -> None:
        got = fine(chunk({"content": "a"}), chunk({"content": "b", "role": "assistant"}), chunk({"content": "c"}, index=1), n=2)
        first = {0: 0, 1: 0}
        for each in got.chunks:
            for choice in each["choices"]:
                assert ("role" in choice["delta"]) == (first[choice["index"]] == 0)
                first[choice["index"]] += 1

    def test_text_beside_the_finish_reason_is_kept(self) -> None:
        got = fine(chunk({"content": "a"}), chunk({"content": "b"}, "stop"))
        assert got.text == {0: "ab"}

    def test_a_list_of_parts_becomes_text_reasoning_and_blocks(self) -> None:
        """Mistral's Magistral."""
        parts = [
            {"type": "thinking", "thinking": [{"type": "text", "text": "H"}, {"type": "text", "text": "m"}]},
            {"type": "thinking", "thinking": "…"},
            {"type": "text", "text": "Yes"},
            {"type": "reference", "reference_ids": [1]},
        ]
        got = fine(chunk({"content": parts}), chunk({"content": "!"}, "stop"))
        assert (got.text[0], got.reasoning[0]) == ("Yes!", "Hm…")
        assert got.blocks[0] == [{"type": "reference", "reference_ids": [1]}]

    @pytest.mark.parametrize("content", [5, 1.5, True, {"a": 1}])
    @pytest.mark.parametrize("before", [0, 1])
    def test_content_that_is_no_text_is_malformed_and_not_passed_on(self, content: Any, before: int) -> None:
        got = run(*[chunk({"content": "a"})] * before, chunk({"content": content}), DONE)
        assert isinstance(got.fault, Malformed)
        assert got.text.get(0, "") == "a" * before

    def test_a_stream_of_messages_instead_of_deltas(self) -> None:
        event = chunk()
        event["choices"] = [{"index": 0, "message": {"role": "assistant", "content": "Yes"}, "finish_reason": "stop"}]
        assert fine(event).text == {0: "Yes"}

    def test_the_text_so_far_beside_a_delta_is_not_said_twice(self) -> None:
        """Perplexity."""
        got = fine(*(chunk({"content": text}, beside={"message": {"content": far}}) for text, far in (("a", "a"), ("b", "ab"))))
        assert got.text == {0: "ab"}
        assert not any("message" in choice for each in got.chunks for choice in each["choices"])

    def test_text_completions(self) -> None:
        events = [
            {"id": "c", "object": "text_completion", "created": 5, "choices": [{"text": t, "index": 0, "logprobs": None}]}
            for t in "ab"
        ]
        end = {
            "id": "c",
            "object": "text_completion",
            "created": 5,
            "choices": [{"text": "", "index": 0, "finish_reason": "length"}],
        }
        got = fine(*events, end)
        assert (got.text, got.finish) == ({0: "ab"}, {0: ("length", "length")})

    @pytest.mark.parametrize("field", ["refusal", "new_field"])
    def test_other_text_of_a_delta_passes(self, field: str) -> None:
        got = fine(chunk({"role": "assistant", field: "N"}), chunk({field: "o"}), chunk(finish="stop"))
        assert fold(got.chunks, None)["choices"][0]["message"][field] == "No"

    def test_lists_of_a_delta_are_numbered_over_the_stream(self) -> None:
        """The SDKs add list entries up by `index`, and raise where there is none."""
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        note = {"type": "url_citation", "url_citation": {"url": "https://a.example", "title": "a"}}
        got = fine(chunk({"images": [image, image], "annotations": [note]}), chunk({"images": [image]}), chunk(finish="stop"))
        deltas = [choice["delta"] for each in got.chunks for choice in each["choices"]]
        assert [entry["index"] for delta in deltas for entry in delta.get("images", [])] == [0, 1, 2]
        assert [entry["index"] for delta in deltas for entry in delta.get("annotations", [])] == [0]


class TestIdentity:
    def test_missing_ids_are_made_and_the_same_for_the_whole_stream(self) -> None:
        bare = [{"choices": [{"delta": {"content": text}}]} for text in "ab"]
        got = fine(*bare)
        assert (got.chunks[0]["id"], got.chunks[0]["created"]) == ("chatcmpl-0a1b2c3d4e5f", 1700000000)
        assert got.text == {0: "ab"}

    def test_ids_that_change_are_held_to_the_first(self) -> None:
        got = fine(*({**chunk({"content": text}), "id": f"id-{text}", "created": 9 + len(text)} for text in "abc"))
        assert {each["id"] for each in got.chunks} == {"id-a"}

    def test_numbers_as_ids_and_fractions_as_times(self) -> None:
        """Some local servers count their replies, and time them by the float clock."""
        got = fine({**chunk({"content": "a"}), "id": 17, "created": 1700000001.75})
        assert (got.chunks[0]["id"], got.chunks[0]["created"]) == ("17", 1700000001)

    def test_an_empty_id_before_the_real_one_does_not_count(self) -> None:
        """Azure's first event."""
        got = fine(
            {"id": "", "created": 0, "object": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
            chunk({"content": "a"}),
        )
        assert (got.chunks[0]["id"], got.chunks[0]["created"]) == ("cmpl-1", 1700000001)

    def test_choices_without_an_index_are_numbered_by_their_place(self) -> None:
        event = {"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]}
        assert fine(event, n=2).text == {0: "a", 1: "b"}

    def test_an_index_of_null_is_none(self) -> None:
        event = {"choices": [{"index": None, "delta": {"content": "a"}, "finish_reason": "stop"}]}
        assert fine(event).text == {0: "a"}

    @pytest.mark.parametrize("created", ["2024-01-01T00:00:00Z", None, 0, 1e300, True, [1]])
    def test_a_time_that_is_no_unix_time_is_replaced(self, created: Any) -> None:
        got = fine({**chunk({"content": "a"}), "created": created})
        assert got.text == {0: "a"}
        assert 0 < got.chunks[0]["created"] < 2**53


class TestReasoning:
    @pytest.mark.parametrize(
        "spell",
        [
            lambda text: {"reasoning_content": text},
            lambda text: {"reasoning": text},
            lambda text: {"reasoning": text, "reasoning_content": text},
            lambda text: {
                "reasoning": text,
                "reasoning_details": [{"type": "reasoning.text", "text": text, "format": "f", "index": 0}],
            },
            lambda text: {"reasoning_details": [{"type": "reasoning.text", "text": text, "format": "f", "index": 0}]},
            lambda text: {"reasoning_details": [{"type": "reasoning.summary", "summary": text, "format": "f", "index": 0}]},
            lambda text: {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": text}]}]},
        ],
        ids=["reasoning_content", "reasoning", "both", "reasoning and details", "details", "summary", "parts"],
    )
    def test_every_spelling_becomes_reasoning_content_once(self, spell: Any) -> None:
        got = fine(
            chunk({"role": "assistant", **spell("H")}),
            chunk({"content": "", **spell("m")} if "content" not in spell("") else spell("m")),
            chunk({"content": "Yes"}),
        )
        assert (got.reasoning, got.text) == ({0: "Hm"}, {0: "Yes"})
        assert not any("reasoning" in choice["delta"] for each in got.chunks for choice in each["choices"])

    def test_details_are_kept_as_they_are(self) -> None:
        details = [{"type": "reasoning.encrypted", "data": "x", "format": "anthropic-claude-v1", "index": 1, "id": None}]
        got = fine(chunk({"reasoning_details": details}), chunk({"content": "a"}))
        assert got.details[0] == details
        assert got.reasoning[0] == ""


class TestToolCalls:
    def test_as_openai_sends_them(self) -> None:
        got = tools(
            tool("c1", "f", "", index=0, type="function"),
            tool(arguments='{"a"', index=0),
            tool("c2", "g", "", index=1, type="function"),
            tool(arguments=":1}", index=0),
            tool(arguments="{}", index=1),
        )
        assert got == [{"id": "c1", "name": "f", "arguments": '{"a":1}'}, {"id": "c2", "name": "g", "arguments": "{}"}]

    def test_the_first_delta_names_the_call_and_later_ones_only_add_text(self) -> None:
        got = fine(chunk(tool("c1", "f", "", index=0)), chunk(tool("c1", "f", "{}", index=0)), chunk(finish="tool_calls"))
        calls = [call for each in got.chunks for choice in each["choices"] for call in choice["delta"].get("tool_calls", [])]
        assert calls == [
            {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
            {"index": 0, "function": {"arguments": "{}"}},
        ]

    def test_whole_calls_without_an_index(self) -> None:
        """Mistral."""
        got = tools({"tool_calls": [*tool("c1", "f", "{}")["tool_calls"], *tool("c2", "f", '{"a":1}')["tool_calls"]]})
        assert got == [{"id": "c1", "name": "f", "arguments": "{}"}, {"id": "c2", "name": "f", "arguments": '{"a":1}'}]

    def test_pieces_without_an_index_go_on_with_the_newest_call_or_with_the_one_of_their_id(self) -> None:
        got = tools(
            tool("c1", "f", "{"), tool(arguments='"a":'), tool("c2", "g", "{"), tool(arguments="}"), tool("c1", arguments="1}")
        )
        assert got == [{"id": "c1", "name": "f", "arguments": '{"a":1}'}, {"id": "c2", "name": "g", "arguments": "{}"}]

    def test_every_call_at_index_0_with_an_id_of_its_own(self) -> None:
        """Gemini's compatible API, Ollama."""
        got = tools(tool("c1", "f", '{"a":1}', index=0), tool("c2", "f", '{"a":1}', index=0))
        assert [call["id"] for call in got] == ["c1", "c2"]
        assert [call["arguments"] for call in got] == ['{"a":1}', '{"a":1}']

    def test_every_call_at_index_0_without_an_id(self) -> None:
        got = tools(tool("", "f", '{"a":1}', index=0), tool("", "g", "{}", index=0), tool("", "g", '{"b":2}', index=0))
        assert [(call["name"], call["arguments"]) for call in got] == [("f", '{"a":1}'), ("g", "{}"), ("g", '{"b":2}')]
        assert len({call["id"] for call in got}) == 3
        assert all(call["id"] for call in got)

    def test_indexes_from_one_or_with_gaps_count_from_zero(self) -> None:
        got = tools(tool("c1", "f", "{", index=1), tool("c2", "g", "{}", index=5), tool(arguments="}", index=1))
        assert got == [{"id": "c1", "name": "f", "arguments": "{}"}, {"id": "c2", "name": "g", "arguments": "{}"}]

    def test_a_missing_id_is_made_and_differs_over_choices_and_requests(self) -> None:
        events = sse(chunk(tool(None, "f", "{}", index=0)), chunk(tool(None, "f", "{}", index=0), index=1), DONE)
        ids = [
            found.tools[choice][0]["id"]
            for nonce in ("a", "b")
            for found in [decode(Decoder(make_call({"stream": True, "n": 2}, nonce=nonce), TARGET), [events])]
            for choice in (0, 1)
        ]
        assert len(set(ids)) == 4

    def test_a_number_as_an_id_becomes_text(self) -> None:
        assert tools(tool(7, "f", "{}", index=0))[0]["id"] == "7"

    def test_arguments_so_far_in_every_delta_are_sent_once(self) -> None:
        """Kimi on Novita: id, name and all arguments so far, each time."""
        got = tools(*(tool("c1", "f", far, index=0) for far in ("", '{"a"', '{"a":1', '{"a":1}', '{"a":1}')))
        assert got == [{"id": "c1", "name": "f", "arguments": '{"a":1}'}]

    def test_id_and_name_in_every_delta_with_new_text_only(self) -> None:
        got = tools(*(tool("c1", "f", piece, index=0) for piece in ("{", '"a":', "1", "}")))
        assert got == [{"id": "c1", "name": "f", "arguments": '{"a":1}'}]

    def test_the_name_in_every_delta_without_an_id(self) -> None:
        got = tools(tool("c1", "f", "{", index=0), *(tool(None, "f", piece, index=0) for piece in ('"a":', "1", "}")))
        assert got == [{"id": "c1", "name": "f", "arguments": '{"a":1}'}]

    def test_pieces_that_repeat_what_was_said_are_kept(self) -> None:
        """Without id and name a piece is new text, whatever it says."""
        got = tools(
            tool("c1", "f", "", index=0), *(tool(arguments=piece, index=0) for piece in ("[", "1", ",1", ",1", ",1", "]"))
        )
        assert got[0]["arguments"] == "[1,1,1,1]"

    def test_a_name_that_comes_after_the_id_and_the_first_arguments(self) -> None:
        got = tools(tool("c1", None, "", index=0), tool(arguments='{"a"', index=0), tool(None, "f", ":1}", index=0))
        assert got == [{"id": "c1", "name": "f", "arguments": '{"a":1}'}]

    def test_a_call_that_never_gets_a_name_is_not_lost(self) -> None:
        assert tools(tool("c1", None, "{}", index=0)) == [{"id": "c1", "name": "", "arguments": "{}"}]

    def test_arguments_that_were_cut_off_before_they_began_stay_empty(self) -> None:
        got = fine(chunk(tool("c1", "f", "", index=0)), chunk(finish="length"))
        assert got.tools[0] == [{"id": "c1", "name": "f", "arguments": ""}]

    @pytest.mark.parametrize(("arguments", "expected"), [(None, "{}"), ({"a": 1}, '{"a":1}'), ({}, "{}"), ("", "{}")])
    def test_arguments_that_are_no_text_or_none_at_all(self, arguments: Any, expected: str) -> None:
        """A client parses them as JSON, so none are an empty object."""
        delta = {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": arguments}}]}
        assert tools(delta) == [{"id": "c1", "name": "f", "arguments": expected}]

    def test_null_arguments_in_a_later_delta_add_nothing(self) -> None:
        later = {"tool_calls": [{"index": 0, "id": None, "type": None, "function": {"name": None, "arguments": None}}]}
        assert tools(tool("c1", "f", "{}", index=0), later) == [{"id": "c1", "name": "f", "arguments": "{}"}]

    def test_text_beside_a_tool_call_is_kept(self) -> None:
        got = fine(chunk({"content": "Let me see", **tool("c1", "f", "{}", index=0)}), chunk(finish="tool_calls"))
        assert (got.text[0], got.tools[0][0]["id"]) == ("Let me see", "c1")

    def test_further_fields_of_a_tool_call_are_kept(self) -> None:
        """Gemini's compatible API: without its signature in extra_content the next request is refused."""
        extra = {"google": {"thought_signature": "sig"}}
        got = fine(chunk(tool("c1", "f", "{}", index=0, type="function", extra_content=extra)), chunk(finish="tool_calls"))
        assert fold(got.chunks, None)["choices"][0]["message"]["tool_calls"][0]["extra_content"] == extra

    def test_custom_tools_are_kept(self) -> None:
        """OpenAI's custom tools: free text instead of arguments."""
        call = {"index": 0, "id": "c1", "type": "custom", "custom": {"name": "sql", "input": ""}}
        pieces = [{"index": 0, "custom": {"input": text}} for text in ("SELECT ", "1")]
        got = fine(*(chunk({"tool_calls": [piece]}) for piece in (call, *pieces)), chunk(finish="tool_calls"))
        sent = [call for each in got.chunks for choice in each["choices"] for call in choice["delta"].get("tool_calls", [])]
        assert (sent[0]["type"], sent[0]["custom"]["name"]) == ("custom", "sql")
        assert "".join(call["custom"]["input"] for call in sent) == "SELECT 1"

    def test_calls_of_two_choices_are_kept_apart(self) -> None:
        got = fine(
            chunk(tool("c1", "f", "{", index=0)),
            chunk(tool("d1", "g", "[", index=0), index=1),
            chunk(tool(arguments="}", index=0)),
            n=2,
        )
        assert got.tools == {0: [{"id": "c1", "name": "f", "arguments": "{}"}], 1: [{"id": "d1", "name": "g", "arguments": "["}]}

    def test_the_legacy_function_call(self) -> None:
        got = fine(
            chunk({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}),
            chunk({"function_call": {"name": None, "arguments": '{"a"'}}),
            chunk({"function_call": {"arguments": ":1}"}}),
            chunk(finish="function_call"),
        )
        assert fold(got.chunks, None)["choices"][0]["message"]["function_call"] == {"name": "f", "arguments": '{"a":1}'}
        assert got.finish == {0: ("function_call", "function_call")}


class TestFinish:
    @pytest.mark.parametrize(
        ("native", "expected"),
        [
            ("stop", "stop"),
            ("length", "length"),
            ("tool_calls", "tool_calls"),
            ("content_filter", "content_filter"),
            ("eos", "stop"),
            ("end_turn", "stop"),
            ("max_tokens", "length"),
            ("model_length", "length"),
            ("MAX_TOKENS", "length"),
            ("tool_use", "tool_calls"),
            ("SAFETY", "content_filter"),
            ("model_context_window_exceeded", "length"),
            ("RECITATION", "content_filter"),
            ("refusal", "content_filter"),
            ("pause_turn", "stop"),
            ("a_new_word", "stop"),
            ("BLOCKLIST", "content_filter"),
            ("PROHIBITED_CONTENT", "content_filter"),
            ("SPII", "content_filter"),
        ],
    )
    def test_the_vendors_word_is_translated_and_kept_beside(self, native: str, expected: str) -> None:
        """The contract's section 3.3; a gateway in front of Anthropic or Gemini may pass their words on."""
        assert fine(chunk({"content": "a"}), chunk(finish=native)).finish == {0: (expected, native)}

    def test_a_gateways_own_native_word_wins(self) -> None:
        got = fine(chunk({"content": "a"}), chunk(finish="stop", beside={"native_finish_reason": "STOP"}))
        assert got.finish == {0: ("stop", "STOP")}

    @pytest.mark.parametrize(("native", "status"), [("error", 502), ("insufficient_system_resource", 503), ("abort", 502)])
    def test_words_that_mean_failure_are_errors(self, native: str, status: int) -> None:
        got = fault(chunk({"content": "a"}), chunk(finish=native), DONE)
        assert isinstance(got, UpstreamError)
        assert got.status == status
        assert native in got.message

    def test_an_error_beside_its_finish_reason_keeps_its_words(self) -> None:
        """OpenRouter."""
        got = fault(chunk({"content": "a"}), chunk(finish="error", error={"code": 503, "message": "overloaded"}), DONE)
        assert (got.status, got.message) == (503, "overloaded")

    def test_content_after_the_finish_reason_is_kept_and_the_last_reason_counts(self) -> None:
        got = fine(
            chunk({"content": "a"}, "stop"),
            chunk({"content": "b"}),
            chunk(tool("c", "f", "{}", index=0)),
            chunk(finish="tool_calls"),
        )
        assert (got.text[0], got.finish[0][0], len(got.tools[0])) == ("ab", "tool_calls", 1)
        assert [choice["finish_reason"] for each in got.chunks for choice in each["choices"]][:-1] == [None] * (
            len(got.chunks) - 1
        )

    def test_done_without_a_finish_reason_is_a_stop_or_tool_calls(self) -> None:
        assert fine(chunk({"content": "a"})).finish == {0: ("stop", None)}
        assert fine(chunk(tool("c", "f", "{}", index=0))).finish == {0: ("tool_calls", None)}

    def test_a_finish_reason_alone_is_a_reply(self) -> None:
        got = fine(chunk(finish="stop"))
        assert got.chunks[0]["choices"] == [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": "stop", "native_finish_reason": "stop"}
        ]

    def test_a_clean_end_after_the_finish_reasons_needs_no_done(self) -> None:
        assert run(chunk({"content": "a"}), chunk(finish="length")).finish == {0: ("length", "length")}

    @pytest.mark.parametrize("end", [b"data: [DONE]", b"data:[DONE]\r\n\r\n", b"data: [DONE] \n\n"])
    def test_done_in_every_spelling(self, end: bytes) -> None:
        got = run(chunk({"content": "a"}), end)
        assert (got.fault, got.finish) == (None, {0: ("stop", None)})

    def test_two_choices_finish_each_by_themselves(self) -> None:
        got = fine(
            chunk({"content": "a"}), chunk({"content": "b"}, index=1), chunk(finish="length", index=1), chunk(finish="stop"), n=2
        )
        assert (got.text, {i: f[0] for i, f in got.finish.items()}) == ({0: "a", 1: "b"}, {0: "stop", 1: "length"})

    def test_one_finished_choice_of_two_does_not_settle_the_stream(self) -> None:
        decoder = Decoder(make_call({"stream": True, "n": 2}), TARGET)
        decoder.feed(sse(chunk({"content": "a"}, "stop")))
        assert not decoder.finished

    @pytest.mark.parametrize(
        "events",
        [
            [],
            [DONE],
            [b": ping\n\n", DONE],
            [chunk({"role": "assistant", "content": ""}), DONE],
            [chunk({"content": "a"})],
            [chunk({"content": "a"}), chunk({"content": "b"}, index=1), chunk(finish="stop")],
            [chunk({"content": "a"}), b'data: {"choi'],
        ],
        ids=["nothing", "DONE only", "ping and DONE", "role and DONE", "no finish", "one of two finishes", "half an event"],
    )
    def test_a_stream_without_its_end_or_without_a_reply_is_cut(self, events: list[Any]) -> None:
        assert isinstance(fault(*events), UpstreamCut)


class TestUsage:
    COUNTS = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}

    @pytest.mark.parametrize(
        "events",
        [
            [chunk(finish="stop"), {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": COUNTS}],
            [chunk(finish="stop", usage=COUNTS)],
            [chunk(finish="stop", x_groq={"id": "r", "usage": COUNTS})],
            [chunk(finish="stop", beside={"usage": COUNTS})],
            [chunk(finish="stop"), {"usage": COUNTS}],
            [chunk(finish="stop", usage=None), {"choices": None, "object": "chat.completion.chunk", "usage": COUNTS}],
        ],
        ids=["own chunk", "finish chunk", "x_groq", "choice", "no choices", "null choices"],
    )
    def test_usage_is_found_wherever_vendors_put_it(self, events: list[Json]) -> None:
        got = fine(chunk({"content": "a"}), *events)
        assert got.usage == self.COUNTS
        assert "usage" not in json.dumps(got.chunks), "shown only when asked, by the face"

    @pytest.mark.parametrize("place", ["top", "x_groq", "choice"])
    def test_running_totals_on_every_chunk_count_once_and_are_not_shown(self, place: str) -> None:
        def with_usage(count: int, delta: Json) -> Json:
            usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
            return {
                "top": chunk(delta, usage=usage),
                "x_groq": chunk(delta, x_groq={"usage": usage}),
                "choice": chunk(delta, beside={"usage": usage}),
            }[place]

        got = fine(*(with_usage(count, {"content": "a"}) for count in (1, 2, 5)))
        assert got.usage == self.COUNTS
        assert got.text == {0: "aaa"}
        assert "usage" not in json.dumps(got.chunks)

    def test_null_usage_is_no_usage(self) -> None:
        got = fine(chunk({"content": "a"}, usage=None), chunk({"content": "b"}, usage=None), chunk(finish="stop", usage=None))
        assert got.usage is None

    @pytest.mark.parametrize(
        ("vendor", "expected"),
        [
            (
                {
                    "prompt_tokens": 10,
                    "completion_tokens": 5,
                    "total_tokens": 35,
                    "completion_tokens_details": {"reasoning_tokens": 20},
                },
                (10, 25, 35),
            ),
            (
                {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 22, "prompt_tokens_details": {"audio_tokens": 7}},
                (17, 5, 22),
            ),
            (
                {
                    "prompt_tokens": 10,
                    "completion_tokens": 25,
                    "total_tokens": 35,
                    "completion_tokens_details": {"reasoning_tokens": 20},
                },
                (10, 25, 35),
            ),
            ({"prompt_tokens": 10, "completion_tokens": 5}, (10, 5, 15)),
            ({"input_tokens": 10, "output_tokens": 5}, (10, 5, 15)),
            ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 10}, (10, 0, 10)),
        ],
        ids=["xAI leaves reasoning out", "Mistral leaves audio out", "OpenAI", "no total", "other names", "null"],
    )
    def test_counts_add_up(self, vendor: Json, expected: tuple[int, int, int]) -> None:
        for usage in (fine(chunk({"content": "a"}, "stop", usage=vendor)).usage, whole(reply(usage=vendor))["usage"]):
            assert usage is not None
            assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == expected

    @pytest.mark.parametrize(
        ("vendor", "where"),
        [
            ({"prompt_cache_hit_tokens": 7}, ("prompt_tokens_details", "cached_tokens")),
            ({"cached_tokens": 7}, ("prompt_tokens_details", "cached_tokens")),
            ({"cache_read_input_tokens": 7, "prompt_tokens_details": None}, ("prompt_tokens_details", "cached_tokens")),
            ({"prompt_tokens_details": {"cached_tokens": 7}}, ("prompt_tokens_details", "cached_tokens")),
            ({"reasoning_tokens": 7}, ("completion_tokens_details", "reasoning_tokens")),
            (
                {"completion_tokens_details": {"reasoning_tokens": 7, "audio_tokens": 0}},
                ("completion_tokens_details", "reasoning_tokens"),
            ),
        ],
    )
    def test_details_stand_where_openai_has_them(self, vendor: Json, where: tuple[str, str]) -> None:
        got = fine(
            chunk({"content": "a"}, "stop", usage={"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 19, **vendor})
        ).usage
        assert got is not None
        assert got[where[0]][where[1]] == 7

    def test_further_figures_of_a_vendor_are_kept(self) -> None:
        got = fine(chunk({"content": "a"}, "stop", usage={**self.COUNTS, "cost": 0.25, "queue_time": 1})).usage
        assert got == {**self.COUNTS, "cost": 0.25, "queue_time": 1}


class TestNothingIsLost:
    def beside(self, got: Decoded, name: str) -> list[Any]:
        """All values of a field that stood in a choice."""
        return [choice[name] for each in got.chunks for choice in each["choices"] if name in choice]

    def test_fields_of_a_chunk_without_choices_wait_for_the_next(self) -> None:
        results = [{"prompt_index": 0, "content_filter_results": {}}]
        got = fine(
            {"id": "", "choices": [], "prompt_filter_results": results}, chunk({"role": "assistant"}), chunk({"content": "a"})
        )
        assert got.chunks[0]["prompt_filter_results"] == results
        assert got.text == {0: "a"}

    def test_fields_of_the_last_chunk_ride_on_the_finish_chunk(self) -> None:
        got = fine(
            chunk({"content": "a"}),
            chunk({"content": "b"}),
            chunk(finish="stop"),
            {"choices": [], "object": "chat.completion.chunk", "late": 1},
        )
        assert got.chunks[-1]["late"] == 1

    def test_a_field_in_mid_stream_rides_on_the_very_next_chunk(self) -> None:
        texts = [chunk({"content": text}) for text in "abc"]
        got = fine(
            *texts,
            {"choices": [], "object": "chat.completion.chunk", "mid": {"x": 1}},
            chunk({"content": "d"}),
            chunk({"content": "e"}),
        )
        assert ["mid" in each for each in got.chunks] == [False, False, False, True, False, False]

    def test_two_values_of_a_field_in_mid_stream_both_arrive(self) -> None:
        def extra(value: int) -> Json:
            return {"choices": [], "object": "chat.completion.chunk", "mid": value}

        got = fine(
            *(chunk({"content": text}) for text in "abc"), extra(1), chunk({"content": "d"}), extra(2), chunk({"content": "e"})
        )
        assert [each["mid"] for each in got.chunks if "mid" in each] == [1, 2]

    def test_filter_results_beside_empty_deltas_all_arrive(self) -> None:
        """Azure's asynchronous filter sends its verdicts between the text, in choices with an empty delta."""
        verdicts = [{"check_offset": n} for n in (10, 20, 30)]
        events = [event for v in verdicts for event in (chunk({"content": "a"}), chunk({}, beside={"content_filter_offsets": v}))]
        got = fine(chunk({"content": "x"}), *events, chunk(finish="stop"))
        assert self.beside(got, "content_filter_offsets") == verdicts

    def test_fields_beside_a_text_delta_stay_with_it(self) -> None:
        got = fine(
            chunk({"content": "x"}),
            chunk({"content": "a"}, beside={"content_filter_results": {"hate": 1}}, system_fingerprint="fp"),
        )
        assert got.chunks[1]["choices"][0]["content_filter_results"] == {"hate": 1}
        assert got.chunks[1]["system_fingerprint"] == "fp"

    def test_x_groq_is_kept_but_for_its_usage(self) -> None:
        got = fine(chunk({"role": "assistant", "content": ""}, x_groq={"id": "req"}), chunk({"content": "a"}))
        assert got.chunks[0]["x_groq"] == {"id": "req"}

    def test_citations_become_annotations_once(self) -> None:
        """Perplexity repeats its list beside every chunk."""
        urls = ["https://a.example", "https://b.example"]
        results = [{"url": urls[0], "title": "A"}]
        got = fine(*(chunk({"content": text}, citations=urls, search_results=results) for text in "abc"))
        notes = [note for each in got.chunks for choice in each["choices"] for note in choice["delta"].get("annotations", [])]
        assert [(note["index"], note["type"], note["url_citation"]) for note in notes] == [
            (0, "url_citation", {"url": urls[0], "title": "A"}),
            (1, "url_citation", {"url": urls[1], "title": urls[1]}),
        ]
        assert got.chunks[0]["citations"] == urls
        assert got.text == {0: "abc"}

    @pytest.mark.parametrize("delta", [{}, {"content": "d"}], ids=["empty delta", "text delta"])
    def test_citations_that_come_late_become_annotations_too(self, delta: Json) -> None:
        """xAI sends them at the end."""
        got = fine(
            *(chunk({"content": text}) for text in "abc"), chunk(delta, citations=["https://a.example"]), chunk(finish="stop")
        )
        notes = [note for each in got.chunks for choice in each["choices"] for note in choice["delta"].get("annotations", [])]
        assert [note["url_citation"]["url"] for note in notes] == ["https://a.example"]

    def test_logprobs_are_kept_in_order_also_of_tokens_without_text(self) -> None:
        """A token that is part of a character has logprobs and an empty delta."""

        def entry(name: str) -> Json:
            return {"content": [{"token": name, "logprob": -0.5, "bytes": [1], "top_logprobs": []}], "refusal": None}

        said = [("a", "1"), ("", "2"), ("", "3"), ("é", "4"), ("b", "5"), ("", "6"), ("c", "7")]
        got = fine(*(chunk({"content": text}, beside={"logprobs": entry(name)}) for text, name in said), chunk(finish="stop"))
        tokens = [token["token"] for found in self.beside(got, "logprobs") if found for token in found["content"]]
        assert tokens == [name for _, name in said]
        assert got.text == {0: "aébc"}

    def test_logprobs_of_a_refusal_are_kept(self) -> None:
        logprobs = {"content": None, "refusal": [{"token": "N", "logprob": -1.0}]}
        got = fine(chunk({"refusal": "N"}, beside={"logprobs": logprobs}), chunk(finish="stop"))
        assert self.beside(got, "logprobs") == [logprobs]

    def test_empty_logprobs_are_not_invented(self) -> None:
        got = fine(
            chunk({"role": "assistant", "content": "a"}, beside={"logprobs": None}),
            chunk(finish="stop", beside={"logprobs": None}),
        )
        assert [value for value in self.beside(got, "logprobs") if value] == []

    def test_audio_is_kept(self) -> None:
        got = fine(
            chunk({"audio": {"id": "a", "transcript": "Hi"}}),
            chunk({"audio": {"data": "AA=="}}),
            chunk({"audio": {"expires_at": 5}}),
        )
        assert fold(got.chunks, None)["choices"][0]["message"]["audio"] == {
            "id": "a",
            "transcript": "Hi",
            "data": "AA==",
            "expires_at": 5,
        }


ERRORS: list[tuple[Json, int, str]] = [
    ({"error": {"message": "no", "type": "server_error", "code": 503}}, 503, "no"),
    ({"error": {"message": "no", "type": "server_error", "code": "rate_limit_exceeded"}}, 429, "no"),
    ({"error": {"message": "no", "type": "overloaded_error"}}, 503, "no"),
    ({"error": {"message": "no"}}, 502, "no"),
    ({"error": "no"}, 502, "no"),
    ({"error": "no", "status_code": 429}, 429, "no"),
    ({"error": {"message": "no", "code": "400"}}, 400, "no"),
    ({"object": "error", "message": "no", "type": "BadRequestError", "param": None, "code": 400}, 400, "no"),
    ({"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, 503, "no"),
    ({"type": "error", "message": "no", "code": 429}, 429, "no"),
    ({"error": {"message": "no"}, "choices": []}, 502, "no"),
    ({"error": {"error": "x", "message": "no", "status": "RESOURCE_EXHAUSTED"}}, 429, "no"),
]


class TestErrors:
    @pytest.mark.parametrize(("event", "status", "message"), ERRORS)
    def test_an_error_inside_a_200_takes_its_own_code_or_one_by_its_type(self, event: Json, status: int, message: str) -> None:
        for found in (
            fault(event, DONE),
            fault(chunk({"content": "a"}), event, DONE),
            fault(chunk({"content": "a"}), chunk(finish="stop"), event, DONE),
            fault(b"event: error\n", event),
        ):
            assert isinstance(found, UpstreamError)
            assert (found.status, found.message) == (status, message)

    @pytest.mark.parametrize(("body", "status", "message"), ERRORS)
    def test_and_so_it_does_as_a_whole_reply(self, body: Json, status: int, message: str) -> None:
        with pytest.raises(UpstreamError) as caught:
            whole(body)
        assert (caught.value.status, caught.value.message) == (status, message)

    @pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
    def test_bare_json_in_the_stream_is_an_error(self, end: bytes) -> None:
        got = fault(chunk({"content": "a"}), b'{"error": {"message": "no", "code": 500}}' + end)
        assert (type(got), got.status, got.message) == (UpstreamError, 500, "no")

    @pytest.mark.parametrize("name", [b"event: error\n", b""], ids=["event: error", "bare"])
    def test_an_error_event_is_an_error_even_where_it_looks_like_every_other_chunk(self, name: bytes) -> None:
        text = json.dumps(chunk({"content": "x"})).encode()
        odd = name + b"data: " + text + b"\n\n" if name else text + b"\n\n"
        got = run(*(chunk({"content": "a"}) for _ in range(5)), odd, chunk(finish="stop"), DONE)
        assert isinstance(got.fault, UpstreamError)
        assert got.text == {0: "aaaaa"}

    def test_what_came_before_an_error_is_handed_on_and_nothing_after(self) -> None:
        got = run(chunk({"content": "a"}), {"error": "no"}, chunk({"content": "b"}), DONE)
        assert (got.text, got.finish) == ({0: "a"}, {})

    def test_an_error_of_null_is_none(self) -> None:
        assert fine(chunk({"content": "a"}, error=None), chunk({"content": "b"}, error=None)).text == {0: "ab"}

    @pytest.mark.parametrize(
        "event",
        [
            b"data: {oops\n\n",
            b"data: 1\n\n",
            b"data: [1]\n\n",
            b'data: "text"\n\n',
            b"data: null\n\n",
            b'data: "\xff"\n\n',
            b"data: <html>\n\n",
        ]
        + [
            sse(event)
            for event in (
                {"text": "x"},
                {"choices": "x"},
                {"choices": [None]},
                {"choices": {"a": 1}},
                {"choices": [{"delta": "x"}]},
            )
        ],
    )
    @pytest.mark.parametrize("before", [0, 1, 5])
    def test_one_malformed_event_is_a_fault_never_passed_on_never_dropped(self, event: bytes, before: int) -> None:
        got = run(*(chunk({"content": "a"}) for _ in range(before)), event, chunk({"content": "b"}), DONE)
        assert isinstance(got.fault, Malformed)
        assert got.text.get(0, "") == "a" * before

    @pytest.mark.parametrize(
        "event", [{}, {"type": "ping"}, {"object": "chat.completion.chunk", "choices": []}, {"usage": None, "timings": {}}]
    )
    def test_pings_and_figures_without_choices_are_harmless(self, event: Json) -> None:
        assert fine(event, chunk({"content": "a"}), event, chunk(finish="stop"), event).text == {0: "a"}

    def test_an_event_larger_than_the_limit_is_malformed(self) -> None:
        decoder = Decoder(make_call({"stream": True}), TARGET)
        decoder.framer._limit = 1000
        assert len(decoder.feed(sse(chunk({"content": "a"})) + b"data: ")) == 1
        assert decoder.feed(b"x" * 2000) == []
        assert isinstance(decoder.fault, Malformed)
        assert decoder.feed(DONE) == []

    def test_an_http_error_keeps_status_words_and_retry_after(self) -> None:
        got = decode_error(429, {"retry-after": "7"}, b'{"error": {"message": "slow down", "type": "t", "code": "c"}}')
        assert (got.status, got.message, got.type, got.code, got.headers["retry-after"]) == (429, "slow down", "t", "c", "7")


class TestWhole:
    def test_a_plain_reply_keeps_everything_and_names_the_clients_model(self) -> None:
        got = whole(
            reply(
                system_fingerprint="fp",
                service_tier="default",
                beside={"logprobs": {"content": []}, "content_filter_results": {}},
            )
        )
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "Yes"},
            "finish_reason": "stop",
            "native_finish_reason": "stop",
        }
        assert got == {
            "id": "cmpl-1",
            "object": "chat.completion",
            "created": 1700000001,
            "model": "public-model",
            "system_fingerprint": "fp",
            "service_tier": "default",
            "choices": [{**choice, "logprobs": {"content": []}, "content_filter_results": {}}],
        }

    def test_what_is_missing_is_made(self) -> None:
        got = whole({"choices": [{"message": {"content": "Yes"}}]})
        assert (got["id"], got["created"]) == ("chatcmpl-0a1b2c3d4e5f", 1700000000)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "Yes"},
            "finish_reason": "stop",
            "native_finish_reason": None,
        }
        assert got["choices"] == [choice]

    @pytest.mark.parametrize("created", ["2024-01-01T00:00:00Z", None, 0, 1e300, [1]])
    def test_a_time_that_is_no_unix_time_is_replaced(self, created: Any) -> None:
        assert 0 < whole(reply() | {"created": created})["created"] < 2**53

    @pytest.mark.parametrize("index", [None, "absent"])
    def test_a_missing_index_is_the_place(self, index: Any) -> None:
        body = reply()
        body["choices"] = [{**body["choices"][0], "index": index} for _ in range(2)]
        if index == "absent":
            for choice in body["choices"]:
                del choice["index"]
        assert [choice["index"] for choice in whole(body)["choices"]] == [0, 1]

    @pytest.mark.parametrize(
        "message", [{"reasoning": "Hm"}, {"reasoning_content": "Hm"}, {"reasoning": "Hm", "reasoning_content": "Hm"}]
    )
    def test_reasoning_is_reasoning_content(self, message: Json) -> None:
        assert message_of(reply({"role": "assistant", "content": "Yes", **message})) == {
            "role": "assistant",
            "content": "Yes",
            "reasoning_content": "Hm",
        }

    def test_a_list_of_parts(self) -> None:
        parts = [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]},
            {"type": "text", "text": "Yes"},
            {"type": "new"},
        ]
        assert message_of(reply({"role": "assistant", "content": parts})) == {
            "role": "assistant",
            "content": "Yes",
            "reasoning_content": "Hm",
            "provider_blocks": [{"type": "new"}],
        }

    def test_tool_calls_get_an_id_a_type_and_arguments_as_text(self) -> None:
        calls = [
            {"id": "", "index": 0, "function": {"name": "f", "arguments": {"a": 1}}},
            {"id": 7, "type": "function", "function": {"name": "g", "arguments": None}, "extra_content": {"s": 1}},
        ]
        got = whole(reply({"role": None, "content": None, "tool_calls": calls}, finish=None))["choices"][0]
        assert got["finish_reason"] == "tool_calls"
        first, second = got["message"]["tool_calls"]
        assert first.pop("id")
        assert first == {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
        assert second == {"id": "7", "type": "function", "function": {"name": "g", "arguments": "{}"}, "extra_content": {"s": 1}}

    def test_empty_tool_calls_are_none(self) -> None:
        assert "tool_calls" not in message_of(reply({"role": "assistant", "content": "Yes", "tool_calls": []}))

    def test_a_text_completion(self) -> None:
        got = whole(
            {
                "id": "c",
                "object": "text_completion",
                "created": 5,
                "choices": [{"text": "Yes", "index": 0, "finish_reason": "eos"}],
            }
        )
        assert got["choices"][0]["message"]["content"] == "Yes"
        assert (got["choices"][0]["finish_reason"], got["choices"][0]["native_finish_reason"]) == ("stop", "eos")

    @pytest.mark.parametrize("annotations", [{}, {"annotations": []}, {"annotations": None}], ids=["absent", "empty", "null"])
    def test_citations_beside_the_choices_become_annotations(self, annotations: Json) -> None:
        body = reply({"role": "assistant", "content": "Yes", **annotations}, citations=["https://a.example"])
        assert message_of(body)["annotations"] == [
            {"type": "url_citation", "url_citation": {"url": "https://a.example", "title": "https://a.example"}}
        ]
        assert whole(body)["citations"] == ["https://a.example"]

    def test_usage_in_odd_places(self) -> None:
        for body in (
            reply(usage=TestUsage.COUNTS),
            reply(x_groq={"usage": TestUsage.COUNTS}),
            reply(beside={"usage": TestUsage.COUNTS}),
        ):
            assert whole(body)["usage"] == TestUsage.COUNTS

    def test_a_failure_word_is_an_error(self) -> None:
        with pytest.raises(UpstreamError) as caught:
            whole(reply(finish="insufficient_system_resource"))
        assert caught.value.status == 503

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>",
            b"[]",
            b"1",
            b"{}",
            b'{"choices": []}',
            b'{"choices": null}',
            b'{"choices": [null]}',
            b'{"choices": [{}]}',
            b'{"choices": [{"message": "x"}]}',
            b'{"choices": [{"message": {}, "finish_reason": 5}]}',
            b'{"choices": "x"}',
        ],
    )
    def test_any_other_shape_is_malformed(self, body: bytes) -> None:
        with pytest.raises(Malformed):
            decode_whole(make_call(), TARGET, body)

    def test_embeddings_keep_all_but_the_model(self) -> None:
        body = {
            "data": [{"embedding": [0.5], "index": 0}],
            "model": "m",
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
            "x": 1,
        }
        assert whole(body, "embeddings") == {**body, "object": "list", "model": "public-model"}

    @pytest.mark.parametrize("body", [{}, {"data": "x"}, {"data": None}])
    def test_embeddings_without_a_list_are_malformed(self, body: Json) -> None:
        with pytest.raises(Malformed):
            whole(body, "embeddings")

    def test_the_folded_stream_says_what_the_whole_reply_says(self) -> None:
        message = {
            "role": "assistant",
            "content": "Yes",
            "reasoning_content": "Hm",
            "refusal": "no",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "extra_content": {"s": "x"}}
            ],
        }
        streamed = {**message, "tool_calls": [{**message["tool_calls"][0], "index": 0}]}  # type: ignore[dict-item]
        top: Json = {"usage": TestUsage.COUNTS, "citations": ["https://a.example"], "system_fingerprint": "fp"}
        got = fine(chunk(streamed, "tool_calls", **top))
        assert fold(got.chunks, got.usage) == whole(reply(message, "tool_calls", **top))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.sampled_from(["error", "stop", "f", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "index", "text", "type", "name"]), inner, max_size=3)
    ),
    max_leaves=5,
)
DELTA = st.dictionaries(
    st.sampled_from(
        ["role", "content", "reasoning", "reasoning_content", "reasoning_details", "tool_calls", "function_call", "images", "x"]
    ),
    JUNK,
)
CHOICE = st.dictionaries(
    st.sampled_from(["index", "delta", "message", "finish_reason", "logprobs", "usage", "text", "x"]), JUNK | DELTA
)
EVENT = st.dictionaries(
    st.sampled_from(["id", "created", "choices", "usage", "error", "x_groq", "citations", "search_results", "object", "x"]),
    JUNK | st.lists(CHOICE, min_size=1, max_size=2),
)
GOOD = st.one_of(
    st.text(max_size=3).map(lambda text: chunk({"content": text})),
    st.text(max_size=3).map(lambda text: chunk({"reasoning": text})),
    st.text(max_size=3).map(lambda text: chunk(tool(arguments=text, index=0))),
    st.sampled_from(
        [chunk({"content": "b"}, index=1), chunk(tool("c1", "f", "{", index=0)), chunk(finish="stop"), chunk({}, x=1)]
    ),
)


@given(st.lists(EVENT | GOOD, max_size=6), st.booleans())
@settings(max_examples=300)
def test_no_event_however_odd_makes_the_decoder_raise_or_break_the_form_of_its_chunks(found: list[Json], done: bool) -> None:
    body = sse(*(json.dumps(event).encode().join((b"data: ", b"\n\n")) for event in found), *([DONE] if done else []))
    decoder = Decoder(make_call({"stream": True}), TARGET)
    got = decode(decoder, [sse(chunk({"content": "a"})), body])
    assert decoder.over()
    for each in got.chunks:
        assert isinstance(each["id"], str)
        assert isinstance(each["created"], int)
        for choice in each["choices"]:
            assert type(choice["index"]) is int
            assert isinstance(choice["delta"], dict)


@given(st.lists(EVENT | GOOD, max_size=6), st.lists(st.integers(0, 2000), max_size=6))
@example([{}, chunk({"content": "b"}, index=1), {"id": None}, chunk({"content": "b"}, index=1)], [])  # a fault before a run
@settings(max_examples=150)
def test_any_split_gives_the_same_chunks(found: list[Json], cuts: list[int]) -> None:
    body = sse(*found, DONE)
    results = [
        (got.chunks, got.usage, repr(got.fault))
        for pieces in ([body], split_at(body, cuts), byte_by_byte(body))
        for got in [decode(Decoder(make_call({"stream": True}), TARGET), pieces)]
    ]
    assert results[0] == results[1] == results[2]
