"""Between the two forms of a reply: nothing is lost on the way, in either direction, whatever stands in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fold import fold, unfold

Json = dict[str, Any]


def round_trip(completion: Json) -> Json:
    content, finish, usage = unfold(completion)
    return fold([*content, *finish], usage)


def completion(message: Json | None = None, **choice: Any) -> Json:
    whole = {"role": "assistant", "content": "Yes", **(message or {})}
    first = {"index": 0, "message": whole, "finish_reason": "stop", "native_finish_reason": "eos", **choice}
    return {"id": "c", "object": "chat.completion", "created": 5, "model": "m", "choices": [first]}


def chunk(delta: Json, finish: str | None = None, index: int = 0, *, beside: Json | None = None, **top: Any) -> Json:
    choice = {"index": index, "delta": delta, "finish_reason": finish, **(beside or {})}
    return {"id": "c", "object": "chat.completion.chunk", "created": 5, "model": "m", **top, "choices": [choice]}


def message_of(*deltas: Json) -> Json:
    """The message that these deltas add up to."""
    (choice,) = fold([*map(chunk, deltas), chunk({}, "stop")], None)["choices"]
    return dict(choice["message"])


class TestFold:
    def test_text_is_joined(self) -> None:
        got = message_of(
            {"role": "assistant", "content": "a"}, {"content": "b"}, {"refusal": "x", "content": None}, {"refusal": "y"}
        )
        assert got == {"role": "assistant", "content": "ab", "refusal": "xy"}

    def test_a_reply_without_text_has_content_null(self) -> None:
        """OpenAI's message always has `content`."""
        assert message_of({"role": "assistant"}) == {"role": "assistant", "content": None}

    def test_tool_calls_are_added_up_by_index(self) -> None:
        first = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
        second = {
            "index": 1,
            "id": "b",
            "type": "function",
            "function": {"name": "g", "arguments": ""},
            "extra_content": {"s": 1},
        }
        got = message_of(
            {"tool_calls": [first]},
            {"tool_calls": [second, {"index": 0, "function": {"arguments": "}"}}]},
            {"tool_calls": [{"index": 1, "function": {"arguments": "[]"}}]},
        )
        assert got["tool_calls"] == [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "[]"}, "extra_content": {"s": 1}},
        ]

    def test_pieces_of_one_reasoning_block_become_one_entry(self) -> None:
        def piece(**fields: Any) -> Json:
            return {"reasoning_details": [{"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0, **fields}]}

        sealed = {"type": "reasoning.encrypted", "data": "x", "format": "anthropic-claude-v1", "index": 1}
        got = message_of(
            piece(text="H"),
            piece(text="m"),
            piece(signature="s"),
            {"reasoning_details": [sealed]},
            {"reasoning_details": [sealed]},
        )
        assert got["reasoning_details"] == [
            {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0, "text": "Hm", "signature": "s"},
            sealed,
            sealed,
        ]

    @pytest.mark.parametrize("other", [{"index": 1}, {"format": "x"}, {"type": "reasoning.summary"}])
    def test_pieces_of_different_blocks_stay_apart(self, other: Json) -> None:
        entry = {"type": "reasoning.text", "format": "f", "index": 0, "text": "a"}
        got = message_of({"reasoning_details": [entry]}, {"reasoning_details": [{**entry, **other}]})
        assert got["reasoning_details"] == [entry, {**entry, **other}]

    def test_a_signed_block_is_closed(self) -> None:
        entry = {"type": "reasoning.text", "format": "f", "index": 0, "text": "a", "signature": "s"}
        assert message_of({"reasoning_details": [entry]}, {"reasoning_details": [entry]})["reasoning_details"] == [entry, entry]

    @pytest.mark.parametrize("name", ["annotations", "images", "provider_blocks"])
    def test_lists_grow_and_lose_the_number_that_was_for_adding_them_up(self, name: str) -> None:
        got = message_of({name: [{"index": 0, "a": 1}]}, {name: [{"index": 1, "a": 2}, "text"]})
        assert got[name] == [{"a": 1}, {"a": 2}, "text"]

    def test_logprobs_are_appended(self) -> None:
        def logprobs(token: str) -> Json:
            return {"logprobs": {"content": [{"token": token}], "refusal": None}}

        chunks = [
            chunk({"content": "a"}, beside=logprobs("a")),
            chunk({"content": "b"}),
            chunk({"content": "c"}, beside=logprobs("c")),
        ]
        (choice,) = fold([*chunks, chunk({}, "stop", beside={"logprobs": None})], None)["choices"]
        assert choice["logprobs"] == {"content": [{"token": "a"}, {"token": "c"}], "refusal": None}

    def test_the_legacy_function_call_and_audio_are_added_up(self) -> None:
        got = message_of(
            {"function_call": {"name": "f", "arguments": "{"}, "audio": {"id": "a", "data": "AA"}},
            {"function_call": {"arguments": "}"}, "audio": {"data": "BB", "expires_at": 5}},
        )
        assert got["function_call"] == {"name": "f", "arguments": "{}"}
        assert got["audio"] == {"id": "a", "data": "AABB", "expires_at": 5}

    def test_fields_that_nobody_knows_survive_at_every_level(self) -> None:
        got = fold([chunk({"content": "a", "odd": 1}, beside={"odder": {"x": 1}}, oddest=[2]), chunk({}, "stop", last="z")], None)
        assert (got["choices"][0]["message"]["odd"], got["choices"][0]["odder"]) == (1, {"x": 1})
        assert (got["oddest"], got["last"]) == ([2], "z")

    def test_choices_come_in_the_order_of_their_index_each_with_its_reason(self) -> None:
        chunks = [chunk({"content": "b"}, index=1), chunk({"content": "a"}), chunk({}, "length", index=1), chunk({}, "stop")]
        got = fold(chunks, {"total_tokens": 3})
        assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in got["choices"]] == [
            (0, "a", "stop"),
            (1, "b", "length"),
        ]
        assert got["usage"] == {"total_tokens": 3}
        assert got["object"] == "chat.completion"

    def test_the_chunks_stay_as_they_are(self) -> None:
        """They may be shared with other readers, and stored."""
        details = [{"type": "reasoning.text", "format": "f", "index": 0, "text": "a"}]
        call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}}
        chunks = [
            chunk(
                {"reasoning_details": details, "tool_calls": [call], "audio": {"data": "A"}},
                beside={"logprobs": {"content": [1]}},
            ),
            chunk(
                {
                    "reasoning_details": details,
                    "tool_calls": [{"index": 0, "function": {"arguments": "}"}}],
                    "audio": {"data": "B"},
                }
            ),
            chunk({}, "stop", beside={"logprobs": {"content": [2]}}),
        ]
        before = copy.deepcopy(chunks)
        fold(chunks, None)
        assert chunks == before
        assert fold(chunks, None) == fold(before, None)


class TestUnfold:
    def test_content_first_then_the_finish_reason_and_nothing_that_clients_mistake(self) -> None:
        whole = completion(logprobs={"content": []}) | {"usage": {"total_tokens": 3}, "system_fingerprint": "fp"}
        ((first,), (last,), usage) = unfold(whole)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": "Yes"}
        assert first["choices"][0]["finish_reason"] is None
        assert first["choices"][0]["logprobs"] == {"content": []}
        assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop", "native_finish_reason": "eos"}]
        assert usage == {"total_tokens": 3}
        for found in (first, last):
            assert found["object"] == "chat.completion.chunk"
            assert (found["id"], found["created"], found["model"]) == ("c", 5, "m")
            assert "usage" not in found

    def test_tool_calls_are_numbered(self) -> None:
        calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "ab"]
        (first,), _, _ = unfold(completion({"content": None, "tool_calls": calls}))
        assert [call["index"] for call in first["choices"][0]["delta"]["tool_calls"]] == [0, 1]

    @pytest.mark.parametrize("name", ["annotations", "images", "provider_blocks"])
    def test_lists_are_numbered(self, name: str) -> None:
        """As in every stream of the gateway: the SDKs add list entries up by `index`, and raise where there is none."""
        (first,), _, _ = unfold(completion({name: [{"a": 1}, {"a": 2}]}))
        assert [entry["index"] for entry in first["choices"][0]["delta"][name]] == [0, 1]

    @pytest.mark.parametrize("name", ["refusal", "audio", "annotations", "tool_calls", "reasoning_details", "odd"])
    @pytest.mark.parametrize("empty", [None, []])
    def test_what_is_null_or_empty_comes_back_so(self, name: str, empty: Any) -> None:
        """OpenAI's whole replies always have `refusal: null` and `annotations: []`."""
        assert round_trip(completion({name: empty})) == completion({name: empty})

    def test_the_completion_stays_as_it_is(self) -> None:
        whole = completion({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}], "annotations": [{"a": 1}]})
        before = copy.deepcopy(whole)
        round_trip(whole)
        assert whole == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=5,
)
TEXT = st.text(max_size=5)
CALL = st.fixed_dictionaries(
    {"id": TEXT, "type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT})},
    optional={"extra_content": JSON},
)
DETAIL = st.one_of(
    st.fixed_dictionaries({"type": st.just("reasoning.text"), "text": TEXT, "signature": TEXT}),
    st.fixed_dictionaries({"type": st.just("reasoning.summary"), "summary": TEXT}, optional={"id": TEXT}),
    st.fixed_dictionaries({"type": st.just("reasoning.encrypted"), "data": TEXT}, optional={"id": TEXT}),
)
DETAILS = st.lists(DETAIL, min_size=1, max_size=4).map(
    lambda entries: [{**entry, "format": "anthropic-claude-v1", "index": number} for number, entry in enumerate(entries)]
)
NOTE = st.fixed_dictionaries({"type": st.just("url_citation"), "url_citation": JSON})
MESSAGE = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | TEXT},
    optional={
        "reasoning_content": TEXT,
        "reasoning_details": DETAILS,
        "refusal": st.none() | TEXT,
        "tool_calls": st.lists(CALL, min_size=1, max_size=3),
        "annotations": st.lists(NOTE, max_size=2),
        "provider_blocks": st.lists(st.fixed_dictionaries({"type": TEXT}, optional={"x": JSON}), max_size=2),
        "audio": st.dictionaries(st.sampled_from(["id", "data"]), TEXT),
        "function_call": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT}),
        "odd": JSON,
    },
)
LOGPROBS = st.none() | st.fixed_dictionaries(
    {"content": st.none() | st.lists(st.fixed_dictionaries({"token": TEXT, "logprob": st.floats(-9, 0)}), max_size=2)},
    optional={"refusal": st.none()},
)
CHOICE = st.fixed_dictionaries(
    {
        "message": MESSAGE,
        "finish_reason": st.sampled_from(["stop", "length", "tool_calls", "content_filter"]),
        "native_finish_reason": st.none() | TEXT,
    },
    optional={"logprobs": LOGPROBS, "content_filter_results": JSON},
)
COMPLETION = st.builds(
    lambda choices, more, usage: {
        "id": "c",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        **more,
        "choices": [{"index": number, **choice} for number, choice in enumerate(choices)],
        **({} if usage is None else {"usage": usage}),
    },
    st.lists(CHOICE, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["system_fingerprint", "citations", "service_tier"]), JSON),
    st.none() | st.fixed_dictionaries({"prompt_tokens": st.integers(), "total_tokens": st.integers()}),
)


@given(COMPLETION)
def test_a_completion_comes_back_from_its_chunks_as_it_was(whole: Json) -> None:
    """fold(unfold(x)) is x."""
    assert round_trip(whole) == whole


@given(COMPLETION)
def test_chunks_come_back_from_their_completion_as_they_were(whole: Json) -> None:
    first = unfold(whole)
    assert unfold(fold([*first[0], *first[1]], first[2])) == first


@given(COMPLETION, st.data())
def test_a_completion_comes_back_however_its_text_was_cut(whole: Json, data: st.DataObject) -> None:
    """What a stream would have been: the text of content, reasoning and arguments in many deltas."""
    content, finish, usage = unfold(whole)
    pieces: list[Json] = []
    for found in content:
        choice = found["choices"][0]
        text = choice["delta"].get("content")
        if text:
            cut = data.draw(st.integers(0, len(text)))
            pieces.append({**found, "choices": [{**choice, "delta": {**choice["delta"], "content": text[:cut]}}]})
            pieces.append(
                {**found, "choices": [{"index": choice["index"], "delta": {"content": text[cut:]}, "finish_reason": None}]}
            )
        else:
            pieces.append(found)
    assert fold([*pieces, *finish], usage) == whole
