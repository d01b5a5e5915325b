"""The Messages API as a wire format: what is asked, what comes back, and what a client may send back again.

Fixtures are invented after the documented format: each answer once as a stream (.sse) and once whole (.json), so that the two
decoders check each other. Recordings are read only where a folder of them is given (PENSTOCK_WIRE).
"""

from __future__ import annotations

import base64
import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming._deltas import accumulate_delta

from proxy.call import Options
from proxy.errors import Malformed, Refused, UpstreamCut, UpstreamError
from proxy.reply import Batch
from proxy.wire import anthropic
from tests.support.decoding import Decoded, byte_by_byte, decode, make_call, make_target, split_at, unnumbered

Json = dict[str, Any]
HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures" / "anthropic"
NAMES = ["thinking_tools", "web_search", "mixed_blocks"]
PIXEL = "iVBORw0KGgo="
USER = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def target(model: str = "claude-sonnet-4-5", **row: Any):
    return make_target("anthropic", model, **row)


def encoded(request: Json, model: str = "claude-sonnet-4-5", **fields: Any) -> Json:
    found: Json = orjson.loads(anthropic.encode(make_call(request, **fields), target(model)).body)
    return found


def dropped(request: Json, model: str = "claude-sonnet-4-5", **fields: Any) -> tuple[str, ...]:
    return anthropic.encode(make_call(request, **fields), target(model)).dropped


def turns(*messages: Json, **request: Any) -> list[Json]:
    found: list[Json] = encoded({"messages": list(messages), **request})["messages"]
    return found


def refusal(request: Json, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        encoded(request, **fields)
    assert caught.value.status == 400
    return caught.value


def text(words: str) -> Json:
    return {"type": "text", "text": words}


# --- Request: envelope and headers


def test_the_request_goes_to_messages_with_key_and_version():
    request = anthropic.encode(make_call(headers={"anthropic-beta": "beta-a,beta-b"}), target(query=(("q", "1"),)))
    assert request.url == "http://127.0.0.1:9/v1/messages?q=1"
    headers = {name.lower(): value for name, value in request.headers.items()}
    assert headers["x-api-key"] == "sk-upstream-0123456789"
    assert headers["anthropic-version"] == "2023-06-01"
    assert headers["anthropic-beta"] == "beta-a,beta-b"
    assert "authorization" not in headers
    assert request.dropped == ()


def test_a_plain_request_has_model_bound_and_turns():
    assert encoded({}) == {
        "model": "claude-sonnet-4-5",
        "stream": False,
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": [text("Hi")]}],
    }
    assert encoded({"stream": True, "stream_options": {"include_usage": True}})["stream"] is True


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_clients_bound_is_kept(field: str):
    assert encoded({field: 7})["max_tokens"] == 7
    assert refusal({field: "7"}).param == "max_tokens"


def test_fields_that_anthropic_documents_pass_under_their_names():
    native = {
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "container": "c1",
        "mcp_servers": [{"type": "url", "url": "https://mcp.example", "name": "m"}],
        "context_management": {"edits": []},
        "output_config": {"effort": "low"},
        "inference_geo": "eu",
        "cache_control": {"type": "ephemeral"},
        "speed": "fast",
    }
    body = encoded(native)
    assert {name: body[name] for name in native} == native
    assert body["max_tokens"] == 4096 + 2000
    assert encoded({"top_k": 5})["top_k"] == 5


def test_what_is_left_over_is_dropped_or_refused():
    assert dropped({"seed": 1, "logit_bias": {}, "n": 1}) == ("logit_bias", "seed")
    assert refusal({"seed": 1}, options=Options(strict_params=True)).param == "seed"
    assert refusal({"n": 2}).param == "n"
    assert refusal({"modalities": ["audio"]}).param == "modalities"
    assert refusal({}, kind="embeddings").param == "model"


def test_stop_is_a_string_or_a_list_and_blank_sequences_are_dropped():
    assert encoded({"stop": "END"})["stop_sequences"] == ["END"]
    assert encoded({"stop": ["a", "\n", "b"]})["stop_sequences"] == ["a", "b"]
    assert dropped({"stop": ["a", "\n"]}) == ("stop",)
    assert "stop_sequences" not in encoded({"stop": "  "})
    assert refusal({"stop": [1]}).param == "stop"


def test_sampling_is_fitted_to_what_the_model_takes():
    both = {"temperature": 0.3, "top_p": 0.9}
    assert both.items() <= encoded(both, model="claude-3-7-sonnet-20250219").items()
    assert "top_p" not in encoded(both)
    assert dropped(both) == ("top_p",)
    assert encoded({"temperature": 1.7})["temperature"] == 1
    assert dropped({"temperature": 1.7}) == ("temperature",)
    assert dropped({"temperature": 0.2, "top_k": 3}, model="claude-opus-4-8") == ("temperature", "top_k")
    assert refusal({"temperature": "hot"}).param == "temperature"


def test_who_asks_and_how_urgently():
    assert encoded({"user": "u1"})["metadata"] == {"user_id": "u1"}
    assert encoded({"metadata": {"user_id": "u2", "team": "x"}, "user": "u1"})["metadata"] == {"user_id": "u2"}
    assert dropped({"metadata": {"team": "x"}}) == ("metadata",)
    assert encoded({"service_tier": "auto"})["service_tier"] == "auto"
    assert encoded({"service_tier": "default"})["service_tier"] == "standard_only"
    assert dropped({"service_tier": "flex"}) == ("service_tier",)


def test_a_json_schema_becomes_the_output_format_and_any_json_is_refused():
    schema = {"type": "object", "properties": {}}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    assert encoded({"response_format": wanted})["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    assert "output_config" not in encoded({"response_format": {"type": "text"}})
    assert refusal({"response_format": {"type": "json_object"}}).param == "response_format"
    assert refusal({"response_format": {"type": "json_schema"}}).param == "response_format.json_schema.schema"
    assert refusal({"response_format": "json"}).param == "response_format"
    assert refusal({"output_config": 1}).param == "output_config"


# --- Request: thinking


@pytest.mark.parametrize(("effort", "budget"), [("low", 1024), ("medium", 4096), ("high", 16384)])
def test_an_effort_is_a_budget_below_the_bound(effort: str, budget: int):
    body = encoded({"reasoning_effort": effort})
    assert body["thinking"] == {"type": "enabled", "budget_tokens": budget}
    assert body["max_tokens"] == 4096 + budget


def test_thinking_gives_way_to_the_clients_bound():
    body = encoded({"reasoning_effort": "high", "max_completion_tokens": 3000})
    assert (body["thinking"]["budget_tokens"], body["max_tokens"]) == (1500, 3000)
    assert encoded({"reasoning_effort": "high", "max_tokens": 1500})["thinking"]["budget_tokens"] == 1024
    assert "thinking" not in encoded({"reasoning_effort": "high", "max_tokens": 1024})
    assert dropped({"reasoning_effort": "high", "max_tokens": 1024}) == ("reasoning_effort",)


def test_thinking_leaves_no_room_for_temperature():
    request = {"reasoning_effort": "low", "temperature": 0.5, "top_p": 0.97, "top_k": 3}
    body = encoded(request)
    assert body["top_p"] == 0.97
    assert not {"temperature", "top_k"} & body.keys()
    assert dropped(request) == ("temperature", "top_k")


@pytest.mark.parametrize("effort", ["none", "minimal"])
def test_no_effort_is_no_thinking(effort: str):
    assert "thinking" not in encoded({"reasoning_effort": effort})
    assert encoded({"reasoning_effort": effort}, model="claude-fable-5")["output_config"] == {"effort": "low"}


def test_newer_models_think_adaptively():
    body = encoded({"reasoning_effort": "medium"}, model="claude-opus-4-7")
    assert body["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert body["output_config"] == {"effort": "medium"}
    assert encoded({"reasoning_effort": "xhigh"}, model="claude-opus-4-6")["output_config"] == {"effort": "high"}
    assert encoded({"reasoning_effort": "low"}, model="claude-mythos-preview")["thinking"]["type"] == "adaptive"
    forced = encoded({"reasoning_effort": "low", "tools": [WEATHER], "tool_choice": "required"}, model="claude-sonnet-5")
    assert "thinking" not in forced


def test_the_clients_own_thinking_wins():
    request = {"thinking": {"type": "disabled"}, "reasoning_effort": "high"}
    assert encoded(request)["thinking"] == {"type": "disabled"}
    assert dropped(request) == ("reasoning_effort",)
    assert refusal({"reasoning_effort": "enormous"}).param == "reasoning_effort"


def test_no_budget_where_anthropic_would_refuse_it():
    """A forced call, or a call whose signed thinking the client did not send back."""
    assert "thinking" not in encoded({"reasoning_effort": "low", "tools": [WEATHER], "tool_choice": "required"})
    call = {"role": "assistant", "tool_calls": [tool_call("a", "{}")]}
    request = {"reasoning_effort": "low", "messages": [USER, call, {"role": "tool", "tool_call_id": "a", "content": "1"}]}
    assert "thinking" not in encoded(request)
    signed = {**call, "reasoning_details": [detail(0, text="t", signature="s")]}
    assert "thinking" in encoded({**request, "messages": [USER, signed, request["messages"][2]]})


# --- Request: messages


def test_system_and_developer_messages_go_in_front_wherever_they_stand():
    body = encoded(
        {
            "messages": [
                {"role": "system", "content": "One"},
                {"role": "developer", "content": [{**text("Two"), "cache_control": {"type": "ephemeral"}}]},
                USER,
                {"role": "system", "content": "Three"},
                {"role": "user", "content": "there"},
            ]
        }
    )
    assert body["system"] == [text("One"), {**text("Two"), "cache_control": {"type": "ephemeral"}}, text("Three")]
    assert body["messages"] == [{"role": "user", "content": [text("Hi"), text("there")]}]


def test_blank_text_is_left_out():
    found = turns({"role": "user", "content": " "}, USER, {"role": "user", "content": [text(""), text("\n"), text("x")]})
    assert found == [{"role": "user", "content": [text("Hi"), text("x")]}]
    assert refusal({"messages": [{"role": "user", "content": ""}]}).param == "messages"
    assert refusal({"messages": [{"role": "system", "content": "only"}]}).param == "messages"


def test_a_prefill_ends_without_white_space():
    assert turns(USER, {"role": "assistant", "content": "Answer: \n"})[-1] == {"role": "assistant", "content": [text("Answer:")]}


def test_images_are_inlined_or_named_by_url():
    parts = [
        text("See"),
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "auto"}},
        {"type": "image_url", "image_url": {"url": "https://pics.example/a.png"}, "cache_control": {"type": "ephemeral"}},
    ]
    assert turns({"role": "user", "content": parts})[0]["content"][1:] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
        {
            "type": "image",
            "source": {"type": "url", "url": "https://pics.example/a.png"},
            "cache_control": {"type": "ephemeral"},
        },
    ]
    detailed = {"type": "image_url", "image_url": {"url": "https://pics.example/a.png", "detail": "high"}}
    assert dropped({"messages": [{"role": "user", "content": [detailed]}]}) == ("image_url.detail",)
    filed = {"type": "file", "file": {"file_data": f"data:image/png;base64,{PIXEL}"}}
    assert turns({"role": "user", "content": [filed]})[0]["content"][0]["type"] == "image"


def test_documents_are_inlined():
    pdf = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="}}
    note = {"type": "file", "file": {"file_data": "data:text/plain;base64," + base64.b64encode(b"hello").decode()}}
    stored = {"type": "file", "file": {"file_id": "file_1"}}
    native = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
    found = turns({"role": "user", "content": [{**pdf, "citations": {"enabled": True}}, note, stored, native]})[0]["content"]
    assert found == [
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="},
            "title": "a.pdf",
            "citations": {"enabled": True},
        },
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hello"}},
        {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
        native,
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "ftp://pics.example/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AA=="}},
        {"type": "file", "file": {"file_data": "data:application/zip;base64,AA=="}},
        {"type": "file", "file": {"file_data": "AA=="}},
        {"type": "tool_use", "id": "a", "name": "b", "input": {}},
        "text",
    ],
)
def test_a_part_that_cannot_be_carried_is_refused_by_its_path(part: object):
    assert refusal({"messages": [USER, {"role": "user", "content": [text("x"), part]}]}).param == "messages[1].content[1]"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "oracle", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": 7}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "file"}]}, "messages[1].content[0].file"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0].image_url.url"),
        (
            {"role": "user", "content": [{"type": "file", "file": {"file_data": "data:text/plain;base64,/w=="}}]},
            "messages[1].content[0].file.file_data",
        ),
        ({"role": "system", "content": [{"type": "image_url"}]}, "messages[1].content[0]"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages[1].audio"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [1]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": {}}]}, "messages[1].tool_calls[0].function.name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "messages[1].tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "id": "a"}]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "reasoning_details": 1}, "messages[1].reasoning_details"),
        ({"role": "assistant", "reasoning_details": [1]}, "messages[1].reasoning_details[0]"),
        ({"role": "assistant", "provider_blocks": 1}, "messages[1].provider_blocks"),
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[1]"),
    ],
)
def test_a_message_of_the_wrong_shape_is_refused_by_its_path(message: Json, param: str):
    assert refusal({"messages": [USER, message]}).param == param


# --- Request: tools


def tool_call(id: str, arguments: str, name: str = "weather") -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tools_are_rewritten_and_anthropics_own_pass():
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "description": "d", "parameters": schema, "strict": True},
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "function", "function": {"name": "clock"}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 2},
        {"name": "native", "input_schema": schema},
    ]
    body = encoded({"tools": tools, "functions": [{"name": "old", "parameters": {"properties": {}}}]})
    cached = {"type": "ephemeral"}
    assert body["tools"] == [
        {"name": "weather", "description": "d", "input_schema": schema, "strict": True, "cache_control": cached},
        {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
        tools[2],
        tools[3],
        {"name": "old", "input_schema": {"type": "object", "properties": {}}},
    ]


@pytest.mark.parametrize(
    ("request_", "choice"),
    [
        ({}, None),
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none"}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, {"type": "tool", "name": "weather"}),
        ({"tool_choice": {"type": "any"}}, {"type": "any"}),
        ({"function_call": {"name": "weather"}}, {"type": "tool", "name": "weather"}),
        ({"parallel_tool_calls": True}, None),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        ({"parallel_tool_calls": False, "tool_choice": "required"}, {"type": "any", "disable_parallel_tool_use": True}),
        ({"parallel_tool_calls": False, "tool_choice": "none"}, {"type": "none"}),
    ],
)
def test_the_choice_among_tools(request_: Json, choice: Json | None):
    assert encoded({"tools": [WEATHER], **request_}).get("tool_choice") == choice


def test_no_tools_no_choice():
    assert "tool_choice" not in encoded({"tool_choice": "auto", "parallel_tool_calls": False, "tools": []})


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ],
)
def test_a_tool_that_cannot_be_carried_is_refused_by_its_path(request_: Json, param: str):
    assert refusal(request_).param == param


def test_parallel_results_share_one_turn_before_anything_else():
    """Also where the user spoke before the last result; ids of other providers are made fit."""
    calls = [tool_call("call.1", '{"city": "A"}'), tool_call("b", "")]
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    found = turns(
        USER,
        {"role": "assistant", "content": "Looking.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call.1", "content": "rain"},
        {"role": "user", "content": "Hurry"},
        {"role": "tool", "tool_call_id": "b", "content": [text("see"), image], "cache_control": {"type": "ephemeral"}},
    )
    assert found[1]["content"] == [
        text("Looking."),
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "A"}},
        {"type": "tool_use", "id": "b", "name": "weather", "input": {}},
    ]
    pixel = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    cached = {"type": "ephemeral"}
    assert found[2:] == [
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "b", "content": [text("see"), pixel], "cache_control": cached},
                text("Hurry"),
            ],
        }
    ]


def test_an_empty_or_failed_result_is_still_a_result():
    found = turns(
        USER,
        {"role": "assistant", "tool_calls": [tool_call("a", "{}")]},
        {"role": "tool", "tool_call_id": "a", "content": "", "is_error": True},
    )
    assert found[2]["content"] == [{"type": "tool_result", "tool_use_id": "a", "is_error": True}]


def test_legacy_function_calls_have_ids_made_for_them():
    found = turns(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a":1}'}},
        {"role": "function", "name": "f", "content": "done"},
    )
    use, result = found[1]["content"][0], found[2]["content"][0]
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "f", {"a": 1})
    assert result == {"type": "tool_result", "tool_use_id": use["id"], "content": "done"}


def test_cache_control_on_a_message_goes_to_its_last_block():
    found = turns({"role": "user", "content": [text("a"), text("b")], "cache_control": {"type": "ephemeral"}})
    assert found[0]["content"] == [text("a"), {**text("b"), "cache_control": {"type": "ephemeral"}}]


# --- Reasoning on its way back


def detail(index: int | None, format: str = "anthropic-claude-v1", **fields: Any) -> Json:
    return {"type": "reasoning.text", "format": format, "index": index, **fields}


def own_blocks(*details: Json) -> list[Json]:
    found = turns(USER, {"role": "assistant", "content": "x", "reasoning_details": list(details)}, USER)
    blocks: list[Json] = found[1]["content"][:-1]
    return blocks


def thinking(words: str, signature: str) -> Json:
    return {"type": "thinking", "thinking": words, "signature": signature}


def test_pieces_of_one_index_are_one_block():
    pieces = [detail(0, text="a"), detail(0, text="b"), detail(0, signature="s"), detail(1, text="c", signature="t")]
    assert own_blocks(*pieces) == [thinking("ab", "s"), thinking("c", "t")]


def test_text_after_a_signature_begins_another_block():
    pieces = [detail(None, text="a"), detail(None, signature="s"), detail(None, text="b"), detail(None, signature="t")]
    assert own_blocks(*pieces) == [thinking("a", "s"), thinking("b", "t")]


def test_foreign_and_unsigned_reasoning_stays_away():
    assert own_blocks(detail(0, "google-gemini-v1", text="a", signature="s"), detail(1, text="unsigned")) == []
    assert own_blocks({"type": "reasoning.summary", "summary": "s", "format": "anthropic-claude-v1", "index": 0}) == []


def test_compaction_stands_before_thinking_and_foreign_blocks_stay_away():
    compaction = {"type": "compaction", "content": "s"}
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    message = {
        "role": "assistant",
        "content": "x",
        "provider_blocks": [search, compaction, {"executableCode": {}}],
        "reasoning_details": [detail(0, text="a", signature="s")],
    }
    assert turns(USER, message, USER)[1]["content"] == [compaction, thinking("a", "s"), search, text("x")]


# --- Replies


def sse(*events: Json) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events)


START = {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 3, "output_tokens": 1}}}
STOP = {"type": "message_stop"}


def block(index: int, content_block: Json, *deltas: Json) -> list[Json]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content_block},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


HELLO = block(0, text(""), {"type": "text_delta", "text": "Hello"})


def ending(reason: str | None, **delta: Any) -> Json:
    return {"type": "message_delta", "delta": {"stop_reason": reason, **delta}, "usage": {"output_tokens": 5}}


def read(*pieces: bytes, clean_end: bool = True) -> Decoded:
    return decode(anthropic.Decoder(make_call(), target()), pieces, clean_end=clean_end)


def whole(body: bytes) -> Json:
    return anthropic.decode_whole(make_call(), target(), body)


def fixture(name: str, suffix: str = "sse") -> bytes:
    return (FIXTURES / f"{name}.{suffix}").read_bytes()


def folded(decoded: Decoded) -> Json:
    """The chunks put together as the OpenAI SDK does, lists without an index appended; then as a whole reply has them."""
    message: dict[object, object] = {}
    lists: dict[str, list[Json]] = {"annotations": [], "provider_blocks": []}
    for chunk in decoded.chunks:
        delta = copy.deepcopy(chunk["choices"][0]["delta"])  # the SDK writes into it
        for name, found in lists.items():
            found += delta.pop(name, [])
        message = accumulate_delta(message, delta)
    for call in message.get("tool_calls", []):  # type: ignore[attr-defined]
        del call["index"]
    message.update({name: found for name, found in lists.items() if found})
    return json.loads(json.dumps(message))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_and_the_whole_reply_say_the_same(name: str):
    decoded, completion = read(fixture(name)), whole(fixture(name, "json"))
    choice, last = completion["choices"][0], decoded.chunks[-1]["choices"][0]
    message, put_together = choice["message"], folded(decoded)
    for details in (message.get("reasoning_details", []), put_together.get("reasoning_details", [])):
        for entry in details:
            entry["format"] = entry["format"][:19]  # the SDK repeats it
            if entry.get("text") == "":
                del entry["text"]
    for name in ("annotations", "provider_blocks"):
        if name in put_together:
            put_together[name] = unnumbered(put_together[name])
    assert put_together == message
    assert {**last, "delta": 0} == {**{k: v for k, v in choice.items() if k != "message"}, "delta": 0}
    assert decoded.usage == completion["usage"]
    assert completion["id"] == decoded.chunks[0]["id"]
    assert decoded.fault is None


@pytest.mark.parametrize("name", NAMES)
def test_one_byte_at_a_time_gives_the_same_chunks(name: str):
    body = fixture(name)
    assert read(*byte_by_byte(body)) == read(body)


@pytest.mark.parametrize("name", NAMES)
@given(cuts=st.lists(st.integers(min_value=0, max_value=10_000), max_size=12))
def test_any_split_gives_the_same_chunks(name: str, cuts: list[int]):
    body = fixture(name)
    assert read(*split_at(body, cuts)) == read(body)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_is_never_dressed_up_as_an_end(name: str):
    body = fixture(name)
    marker = body.index(b'{"type":"message_stop"}')
    complete = read(body)
    for length in range(len(body)):
        decoder = anthropic.Decoder(make_call(), target())
        decoded = decode(decoder, [body[:length]])
        if length >= marker + len(b'{"type":"message_stop"}'):
            assert (decoded.chunks, decoder.ended, decoded.fault) == (complete.chunks, True, None)
        else:
            assert not decoded.finish
            assert not decoder.ended
            # a cut inside an event leaves half a JSON text; with its line gone, only the end is missing
            assert isinstance(decoded.fault, UpstreamCut | Malformed)
            assert decoded.chunks == complete.chunks[: len(decoded.chunks)]


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_between_events_is_an_upstream_cut(name: str):
    body = fixture(name).replace(b"\r\n", b"\n")
    events = body.split(b"\n\n")
    for count in range(len(events) - 2):
        assert isinstance(read(b"".join(event + b"\n\n" for event in events[:count])).fault, UpstreamCut)


def test_thinking_and_calls_come_out_in_their_promised_shapes():
    decoded = read(fixture("thinking_tools"))
    assert decoded.reasoning[0] == "Two cities, so two calls: Zürich & 東京 🌧."
    assert [(entry["type"], entry["index"]) for entry in decoded.details[0]] == [
        ("reasoning.text", 0),
        ("reasoning.text", 0),
        ("reasoning.text", 0),
        ("reasoning.encrypted", 1),
        ("reasoning.text", 2),
    ]
    assert {entry["format"] for entry in decoded.details[0]} == {"anthropic-claude-v1"}
    assert decoded.tools[0] == [
        {"id": "toolu_a", "name": "weather", "arguments": '{"city":"Zürich"}'},
        {"id": "toolu_b", "name": "weather", "arguments": '{"city":"東京"}'},
        {"id": "toolu_c", "name": "clock", "arguments": "{}"},
    ]
    assert decoded.finish == {0: ("tool_calls", "tool_use")}
    assert decoded.usage == {
        "prompt_tokens": 148,
        "completion_tokens": 93,
        "total_tokens": 241,
        "prompt_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 7, "cache_creation_tokens": 7},
        "completion_tokens_details": {"reasoning_tokens": 30},
    }


def test_web_citations_are_annotations_over_the_cited_text():
    decoded = read(fixture("web_search"))
    notes = [note for chunk in decoded.chunks for note in chunk["choices"][0]["delta"].get("annotations", [])]
    cited = notes[0]["url_citation"]
    assert decoded.text[0][cited["start_index"] : cited["end_index"]] == "It opened in 1902"
    assert (notes[0]["type"], cited["url"], cited["title"]) == ("url_citation", "https://bridges.example/opening", "Openings")
    assert notes[1]["type"] == "char_location"
    assert decoded.usage is not None
    assert decoded.usage["server_tool_use"] == {"web_search_requests": 1}
    assert decoded.usage["prompt_tokens"] == 950


def test_tools_that_the_provider_runs_are_blocks_and_never_calls():
    decoded = read(fixture("mixed_blocks"))
    assert [found["type"] for found in decoded.blocks[0]] == ["compaction", "mcp_tool_use", "mcp_tool_result", "hologram"]
    assert decoded.blocks[0] == [
        found for found in orjson.loads(fixture("mixed_blocks", "json"))["content"] if found["type"] not in ("text", "tool_use")
    ]
    assert decoded.tools[0] == [{"id": "toolu_w", "name": "store", "arguments": '{"value":42}'}]
    assert decoded.chunks[-1]["choices"][0]["stop_sequence"] == "###"


@pytest.mark.parametrize("merged", ["appended", "accumulated", "whole"])
def test_what_was_given_out_and_is_sent_back_is_anthropics_own(merged: str):
    """Whether the client lists every entry, merges them by index as the SDK does, or never streamed."""
    decoded = read(fixture("thinking_tools"))
    message = folded(decoded)
    if merged == "appended":
        message["reasoning_details"] = decoded.details[0]
    elif merged == "whole":
        message = whole(fixture("thinking_tools", "json"))["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": f"toolu_{letter}", "content": letter} for letter in "abc"]
    found = turns(USER, message, *results, tools=[WEATHER])
    assert found[1] == {"role": "assistant", "content": orjson.loads(fixture("thinking_tools", "json"))["content"]}
    assert [entry["tool_use_id"] for entry in found[2]["content"]] == ["toolu_a", "toolu_b", "toolu_c"]


def test_provider_blocks_go_back_verbatim():
    blocks = read(fixture("web_search")).blocks[0]
    found = turns(USER, {"role": "assistant", "content": "It opened in 1902.", "provider_blocks": blocks}, USER)
    assert found[1]["content"] == [*orjson.loads(fixture("web_search", "json"))["content"][1:3], text("It opened in 1902.")]


@pytest.mark.parametrize(
    ("native", "reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("compaction", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("struck_by_lightning", "stop"),
    ],
)
def test_every_stop_reason_has_its_finish_reason_and_keeps_its_name(native: str, reason: str):
    assert read(sse(START, *HELLO, ending(native), STOP)).finish == {0: (reason, native)}
    choice = whole(orjson.dumps({"content": [text("x")], "stop_reason": native}))["choices"][0]
    assert (choice["finish_reason"], choice["native_finish_reason"]) == (reason, native)


def test_a_refusal_says_why():
    details = {"type": "refusal", "category": "x"}
    last = read(sse(START, ending("refusal", stop_details=details), STOP)).chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_details"], last["delta"]["role"]) == ("content_filter", details, "assistant")


def test_no_finish_chunk_before_the_end():
    assert read(sse(START, *HELLO, ending("end_turn")), clean_end=False).finish == {}


def test_silence_after_the_stop_reason_is_an_end():
    decoder = anthropic.Decoder(make_call(), target())
    decoder.feed(sse(START, *HELLO, ending("end_turn")))
    assert decoder.finished
    assert Batch(decoder.settle()).chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("framing", ["event: error\n", ""])
@pytest.mark.parametrize(
    ("type_", "status"),
    [
        ("overloaded_error", 503),
        ("rate_limit_error", 429),
        ("api_error", 502),
        ("invalid_request_error", 400),
        ("timeout_error", 504),
        ("not_found_error", 404),
        ("new_error", 502),
    ],
)
def test_an_error_in_the_stream_has_the_status_of_its_type(framing: str, type_: str, status: int):
    error = {"type": "error", "error": {"type": type_, "message": "Words"}, "request_id": "r"}
    decoded = read(sse(START, *HELLO) + f"{framing}data: {json.dumps(error)}\n\n".encode())
    assert isinstance(decoded.fault, UpstreamError)
    assert (decoded.fault.status, decoded.fault.message, decoded.fault.type) == (status, "Words", type_)
    assert decoded.text[0] == "Hello"
    assert decoded.finish == {}
    with pytest.raises(UpstreamError) as caught:
        whole(json.dumps(error).encode())
    assert caught.value.status == status


def test_a_ping_is_no_content():
    assert read(sse({"type": "ping"}, START, {"type": "ping"}), clean_end=False).chunks == []


def test_deltas_of_a_block_that_never_began():
    """Text and thinking are kept; arguments without a call are malformed; an unknown delta is ignored."""

    def delta(**fields: Any) -> Json:
        return {"type": "content_block_delta", "index": 9, "delta": fields}

    decoded = read(sse(START, delta(type="text_delta", text="Hi"), {"type": "content_block_stop", "index": 7}), clean_end=False)
    assert (decoded.text, decoded.fault) == ({0: "Hi"}, None)
    decoded = read(
        sse(START, delta(type="thinking_delta", thinking="Hm"), delta(type="signature_delta", signature="s")), clean_end=False
    )
    assert [entry["index"] for entry in decoded.details[0]] == [0, 0]
    assert read(sse(START, delta(type="sparkle_delta")), clean_end=False).fault is None
    assert isinstance(read(sse(START, delta(type="input_json_delta", partial_json="{"))).fault, Malformed)


def test_blocks_left_open_are_handed_over_at_the_end():
    call = block(
        0, {"type": "tool_use", "id": "a", "name": "f", "input": {}}, {"type": "input_json_delta", "partial_json": '{"x'}
    )
    search = block(1, {"type": "server_tool_use", "id": "s"}, {"type": "input_json_delta", "partial_json": '{"q'})
    decoded = read(sse(START, *call[:-1], *search[:-1], ending("max_tokens"), STOP))
    assert decoded.tools[0][0]["arguments"] == '{"x'
    assert decoded.blocks[0] == [{"type": "server_tool_use", "id": "s", "input": '{"q'}]
    assert decoded.finish == {0: ("length", "max_tokens")}


def test_missing_fields_are_tolerated_and_wrong_shapes_are_malformed():
    bare = read(sse({"type": "message_start"}, *HELLO, {"type": "message_delta"}, STOP))
    assert (bare.finish, bare.usage, bare.chunks[0]["id"]) == ({0: ("stop", None)}, None, "chatcmpl-0a1b2c3d4e5f")
    assert isinstance(read(sse({"type": "content_block_start", "index": 0})).fault, Malformed)
    assert isinstance(read(b"data: {nonsense\n\n").fault, Malformed)


def test_null_counts_are_no_counts_and_each_usage_is_a_fresh_one():
    decoder = anthropic.Decoder(make_call(), target())
    decoder.feed(sse({"type": "message_start", "message": {"usage": {"input_tokens": 4, "output_tokens": None}}}))
    first = decoder.stream.usage
    decoder.feed(sse({"type": "message_delta", "delta": {}, "usage": {"input_tokens": None, "output_tokens": 6}}))
    assert first == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
    assert decoder.stream.usage == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"content": 1}', b'{"content": [1]}', b'{"content": [{"type": "tool_use"}]}']
)
def test_what_is_no_message_is_malformed(body: bytes):
    with pytest.raises(Malformed):
        whole(body)


def test_an_empty_message_has_no_content():
    completion = whole(b'{"id": "msg_2", "content": [], "stop_reason": null}')
    assert completion["choices"][0]["message"] == {"role": "assistant", "content": None}
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert (completion["id"], completion["created"], completion["model"]) == ("msg_2", 1700000000, "public-model")
    assert "usage" not in completion


def test_an_http_error_keeps_its_status_and_words():
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
    error = anthropic.decode_error(529, {"retry-after": "3"}, body)
    assert (error.status, error.message, error.type, error.headers["retry-after"]) == (529, "Overloaded", "overloaded_error", "3")


# --- Recordings, where there are any


def recordings() -> list[Json]:
    folder = Path(os.environ.get("PENSTOCK_WIRE") or HERE.parents[1] / ".." / "shared" / "wire")
    found = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*/*.json"))]
    found = [one for one in found if one.get("api") == "anthropic.messages" and one["response"].get("body_text")]
    if not found:
        pytest.skip("no recorded Messages traffic (set PENSTOCK_WIRE to a folder that has some)")
    return found


def strings(raw: str, kind: str, field: str) -> list[str]:
    """All values of a field in deltas of one kind, read line by line: nothing of the decoder is in it."""
    events = [json.loads(line) for line in re.findall(r"^data: ?(.+)$", raw, re.MULTILINE)]
    return [event["delta"][field] for event in events if event.get("delta", {}).get("type") == kind]


def test_recorded_streams_are_decoded_completely():
    streams = [one["response"]["body_text"] for one in recordings() if one["streaming"] and one["response"]["status"] == 200]
    for raw in streams:
        decoded = read(raw.encode())
        assert decoded.fault is None
        assert decoded == read(*byte_by_byte(raw.encode()))
        assert decoded.text.get(0, "") == "".join(strings(raw, "text_delta", "text"))
        assert decoded.reasoning.get(0, "") == "".join(strings(raw, "thinking_delta", "thinking"))
        signed = [entry["signature"] for entry in decoded.details.get(0, []) if "signature" in entry]
        assert signed == strings(raw, "signature_delta", "signature")
        assert [call["id"] for call in decoded.tools[0]] == re.findall(r'"type": ?"tool_use", ?"id": ?"([^"]+)"', raw)
        assert decoded.finish[0][1] == re.findall(r'"stop_reason": ?"(\w+)"', raw)[-1]
        assert decoded.usage is not None
        assert decoded.usage["completion_tokens"] == int(re.findall(r'"usage":.*?"output_tokens": ?(\d+)', raw)[-1])
        kept = {
            kind for kind in re.findall(r'"content_block": ?{"type": ?"(\w+)"', raw) if kind.endswith(("_result", "mcp_tool_use"))
        }
        assert kept <= {found["type"] for found in decoded.blocks[0]}


def test_recorded_whole_replies_are_decoded_completely():
    for one in recordings():
        raw, status = one["response"]["body_text"], one["response"]["status"]
        if one["streaming"] and status == 200:
            continue
        if status != 200:
            assert json.loads(raw)["error"]["message"] == anthropic.decode_error(status, {}, raw.encode()).message
            continue
        reply, completion = json.loads(raw), whole(raw.encode())
        message = completion["choices"][0]["message"]
        said = [found["text"] for found in reply["content"] if found["type"] == "text"]
        assert (message["content"] or "") == "".join(said)
        called = [found["input"] for found in reply["content"] if found["type"] == "tool_use"]
        assert [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", [])] == called
        assert completion["choices"][0]["native_finish_reason"] == reply["stop_reason"]
        assert completion["usage"]["completion_tokens"] == reply["usage"]["output_tokens"]
