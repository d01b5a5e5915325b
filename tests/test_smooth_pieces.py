"""Joined pieces: folded, they are the reply that the single chunks are, whatever these were; only what may be joined is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.smooth.pieces import Pieces
from proxy.fold import fold
from proxy.reply import Batch, Item, Run, sse_events

Json = dict[str, Any]
TEXTS = st.text('ab "\\\n\u00e9\u65e5\U0001f600', min_size=1, max_size=4)
TOP: st.SearchStrategy[Json] = st.sampled_from([{}, {"system_fingerprint": "f"}, {"system_fingerprint": "g"}, {"usage": None}])
BESIDE: st.SearchStrategy[Json] = st.sampled_from([
    {"finish_reason": None}, {"finish_reason": None, "logprobs": None}, {"logprobs": {"content": [{"token": "a"}]}},
    {"finish_reason": None, "filter": {"hate": 1}},
])  # fmt: skip


def chunk(delta: Json, index: int = 0, beside: Json | None = None, **top: Any) -> Json:
    choice = {"index": index, "delta": delta, **({"finish_reason": None} if beside is None else beside)}
    return {"id": "c", "object": "chat.completion.chunk", "created": 5, "model": "m", **top, "choices": [choice]}


def arguments(text: str, index: int = 0, kind: str = "function") -> Json:
    return {"tool_calls": [{"index": index, kind: {"arguments" if kind == "function" else "input": text}}]}


@st.composite
def chunks(draw: st.DrawFn) -> list[Json]:
    """Any chunks of a reply of up to two choices: each choice's tool calls open in order, the rest in any."""
    found: list[Json] = []
    opened: dict[int, int] = {}
    for _ in range(draw(st.integers(0, 12))):
        index, text = draw(st.sampled_from([0, 0, 0, 1])), draw(TEXTS)
        deltas: list[Json] = [
            {"content": text}, {"content": text}, {"reasoning_content": text}, {"role": "assistant", "content": text},
            {"content": text, "refusal": text}, {"annotations": [{"index": 0, "url": text}]}, {"content": None}, {},
            {"reasoning_details": [{"type": "reasoning.text", "format": "f", "index": 0, "text": text}]},
        ]  # fmt: skip
        number = opened.get(index, 0)
        first = {"index": number, "id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": text}}
        deltas.append({"tool_calls": [first]})
        if number:
            deltas += [arguments(text, number - 1)] * 3
        delta = draw(st.sampled_from(deltas))
        if delta.get("tool_calls") == [first]:
            opened[index] = number + 1
        found.append(chunk(delta, index, draw(BESIDE), **draw(TOP)))
    return found


def joined(items: Iterable[Item], most: int = 1000) -> list[Item]:
    pieces = Pieces(most)
    for item in items:
        pieces.add(item)
    return pieces.take()


def encoded(chunk: Json) -> bytes:
    return sse_events([chunk])


@given(chunks(), st.data(), st.integers(1, 20))
def test_folded_they_are_the_same_reply_in_any_spelling(found: list[Json], data: st.DataObject, most: int) -> None:
    """Decoded, encoded, or in runs; with departures anywhere between; usage, two choices and tool calls included."""
    items: list[Item] = []
    for one in found:
        kind = data.draw(st.sampled_from(["decoded", "encoded", "run"]))
        items.append(one if kind == "decoded" else encoded(one) if kind == "encoded" else Run(encoded(one)))
    pieces, out = Pieces(most), []
    for item in items:
        pieces.add(item)
        if data.draw(st.booleans()):
            out += pieces.take()
    out += pieces.take()
    usage = {"total_tokens": 3}
    assert fold(Batch(out).chunks, usage) == fold(found, usage)
    assert pieces.take() == []


@given(st.lists(TEXTS, min_size=1, max_size=6), st.booleans())
def test_pieces_of_one_text_become_one(texts: list[str], as_events: bool) -> None:
    single = [chunk({"content": text}, system_fingerprint="f") for text in texts]
    (item,) = joined([encoded(one) for one in single] if as_events else single)
    assert Batch([item]).chunks == [chunk({"content": "".join(texts)}, system_fingerprint="f")]


def test_a_run_is_joined_too() -> None:
    run = Run(b"".join(encoded(chunk({"content": text})) for text in "abc"))
    assert joined([run]) == [encoded(chunk({"content": "abc"}))]


@pytest.mark.parametrize("kind", ["function", "custom"])
def test_arguments_of_one_call_are_joined_and_those_of_another_are_not(kind: str) -> None:
    items = [chunk(arguments(text, index, kind)) for text, index in [("{", 0), ("}", 0), ("[", 1), ("]", 1)]]
    assert joined(items) == [chunk(arguments("{}", 0, kind)), chunk(arguments("[]", 1, kind))]


@pytest.mark.parametrize(
    "other",
    [
        chunk({"content": "b"}, 1),
        chunk({"reasoning_content": "b"}),
        chunk({"content": "b"}, id="d"),
        chunk({"content": "b"}, created=6),
        chunk({"content": "b"}, model="n"),
        chunk({"content": "b"}, system_fingerprint="g"),
        chunk({"content": "b"}, beside={"finish_reason": None, "logprobs": {"content": []}}),
        chunk({"content": "b"}, beside={"finish_reason": "stop"}),
        chunk({"content": "b"}, usage={"total_tokens": 1}),
        chunk({"content": "b", "refusal": "c"}),
        {**chunk({"content": "b"}), "choices": []},
    ],
)
@pytest.mark.parametrize("spelling", [lambda one: one, encoded])
def test_what_says_more_or_other_than_text_stays_apart_and_in_its_place(other: Json, spelling: Any) -> None:
    items = [spelling(one) for one in (chunk({"content": "a"}), other, chunk({"content": "c"}))]
    assert Batch(joined(items)).sse() == Batch(items).sse()


def test_a_text_that_looks_like_json_is_still_a_text() -> None:
    texts = ['x"},"finish_reason":null}]}\n\n', '"content":"', "\\"]
    (item,) = joined([encoded(chunk({"content": text})) for text in texts])
    assert isinstance(item, bytes)
    assert orjson.loads(item[6:-2]) == chunk({"content": "".join(texts)})


def test_a_joined_piece_is_closed_when_it_is_large_enough() -> None:
    items = joined([encoded(chunk({"content": "ab"})) for _ in range(5)], most=4)
    assert [one["choices"][0]["delta"]["content"] for one in Batch(items).chunks] == ["abab", "abab", "ab"]


def test_the_chunks_stay_as_they_are() -> None:
    """They may be shared with other readers, and stored."""
    found = [chunk(arguments("a")), chunk(arguments("b"))]
    before = orjson.dumps(found)
    joined(found)
    assert orjson.dumps(found) == before
