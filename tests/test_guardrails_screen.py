"""All texts of a stream at once: fields, choices and tool calls mixed, in every spelling of a chunk; nothing is lost."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.guardrails.edits import OWN, Look, Vault, Watched
from middleware.guardrails.rules import BUILT_IN
from middleware.guardrails.rules.detector import Scanner
from middleware.guardrails.rules.engine import installed
from middleware.guardrails.rules.words import Allowed
from middleware.guardrails.screen import Screen
from middleware.guardrails.verdict import Action, Finding
from proxy.fold import fold, unfold
from proxy.reply import Batch, Item, Run, sse_events

Json = dict[str, Any]
EMAIL = BUILT_IN["email"]
SCANNER = Scanner([*EMAIL, *BUILT_IN["card"]], installed())
RESTORING = Scanner([OWN], installed())


def look(action: Action = "redact", found: list[Finding] | None = None) -> Look:
    watched = [Watched(detector, detector.name, action) for detector in SCANNER.detectors]
    return Look("output", SCANNER, watched, Allowed(()), Vault(), (found if found is not None else []).append)


def restoring(**originals: str) -> Look:
    vault = Vault()
    vault.originals = {f"[{name}]": value for name, value in originals.items()}
    return Look("output", RESTORING, [Watched(OWN, None, "redact")], Allowed(()), vault, lambda finding: None)


def chunk(delta: Json, index: int = 0, finish: str | None = None, **fields: Any) -> Json:
    around = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**around, "choices": [{"index": index, "delta": delta, "finish_reason": finish, **fields}]}


def content(text: str, index: int = 0) -> Json:
    return chunk({"content": text}, index)


def opened(number: int = 0, text: str = "", kind: str = "function") -> Json:
    field = "arguments" if kind == "function" else "input"
    return chunk({"tool_calls": [{"index": number, "id": f"t{number}", "type": kind, kind: {"name": "f", field: text}}]})


def argument(text: str, number: int = 0, kind: str = "function") -> Json:
    field = "arguments" if kind == "function" else "input"
    return chunk({"tool_calls": [{"index": number, kind: {field: text}}]})


WAYS: list[tuple[str, Any]] = [
    ("content", content),
    ("other choice", lambda text: content(text, 1)),
    ("reasoning", lambda text: chunk({"reasoning_content": text})),
    ("refusal", lambda text: chunk({"refusal": text})),
    ("arguments", argument),
    ("input", lambda text: argument(text, 1, "custom")),
    ("transcript", lambda text: chunk({"audio": {"transcript": text, "data": "jo@x.com"}})),
    ("older call", lambda text: chunk({"function_call": {"arguments": text}})),
]
PIECES = st.sampled_from(["Hi", " jo", "@", "exa", "mple.com", " 4111 ", "1111 1111", " 1111", ".", " and", "é", "😀", "\u200b"])
ENDS = [chunk({}, 0, "stop"), chunk({}, 1, "stop")]


def run(screen: Screen, chunks: list[Json], sizes: list[int], spelling: str, ends: list[Json] = ENDS) -> list[Json]:
    """The chunks behind the screen, in batches of these sizes."""
    out: list[Item] = []
    while chunks and not screen.blocked:
        size = sizes.pop() if sizes else 1
        batch, chunks = chunks[:size], chunks[size:]
        items: list[Item] = [*batch]
        if spelling == "encoded":
            items = [sse_events([one]) for one in batch]
        elif spelling == "run":
            items = [Run(sse_events(batch))]
        out += screen.see(Batch(items))
    if not screen.blocked:
        out += screen.see(Batch([*ends], final=True))
    return [one for item in out for one in Batch([item]).chunks]


def said(completion: Json) -> dict[str, str]:
    """Each way's text, numbers of placeholders taken out."""
    first = completion["choices"][0]["message"]
    other = completion["choices"][1]["message"] if len(completion["choices"]) > 1 else {}
    calls = first.get("tool_calls") or [{"function": {}}, {"custom": {}}]
    texts = {
        "content": first.get("content"),
        "other choice": other.get("content"),
        "reasoning": first.get("reasoning_content"),
        "refusal": first.get("refusal"),
        "arguments": calls[0]["function"].get("arguments"),
        "input": calls[1]["custom"].get("input"),
        "transcript": (first.get("audio") or {}).get("transcript"),
        "older call": (first.get("function_call") or {}).get("arguments"),
    }
    return {name: re.sub(r"_\d+\]", "]", text or "") for name, text in texts.items()}


@given(
    mixed=st.lists(st.tuples(st.integers(0, len(WAYS) - 1), PIECES), max_size=24),
    sizes=st.lists(st.integers(1, 6), max_size=24),
    spelling=st.sampled_from(["decoded", "encoded", "run"]),
)
def test_every_text_is_what_it_would_be_by_itself(mixed: list[tuple[int, str]], sizes: list[int], spelling: str) -> None:
    chunks = [opened(), opened(1, kind="custom"), *(WAYS[way][1](text) for way, text in mixed)]
    whole = {name: "".join(text for at, text in mixed if WAYS[at][0] == name) for name, _ in WAYS}
    out = run(Screen(look(), None), chunks, sizes, spelling)
    expected = {name: look().settled(text, json=name in ("arguments", "older call")) or "" for name, text in whole.items()}
    assert said(fold(out, None)) == {name: re.sub(r"_\d+\]", "]", text) for name, text in expected.items()}
    assert [choice["finish_reason"] for one in out[-2:] for choice in one["choices"]] == ["stop", "stop"]


@given(
    texts=st.lists(st.sampled_from(["Hi ", "there", " 12", "é", " you"]), max_size=10),
    sizes=st.lists(st.integers(1, 4), max_size=10),
    spelling=st.sampled_from(["decoded", "encoded", "run"]),
)
def test_what_holds_nothing_comes_out_as_it_went_in(texts: list[str], sizes: list[int], spelling: str) -> None:
    """Folded the same, the role first and once, every chunk one of those that came."""
    chunks = [content(text) for text in texts]
    if chunks:
        chunks[0] = chunk({"role": "assistant", "content": texts[0]})
    out = run(Screen(look(), None), [*chunks], sizes, spelling, [ENDS[0]])
    assert out == [*chunks, ENDS[0]]


def test_a_tool_call_does_not_wait_for_the_text_before_it_and_the_role_goes_first() -> None:
    screen = Screen(look(), None)
    assert screen.see(Batch([chunk({"role": "assistant", "content": "Looking"})])) == []
    (second,) = Batch(screen.see(Batch([opened(text='{"a":')]))).chunks
    assert second["choices"][0]["delta"]["role"] == "assistant"
    assert second["choices"][0]["delta"]["tool_calls"][0]["id"] == "t0"
    rest = screen.see(Batch([ENDS[0]], final=True))
    assert rest == [content("Looking"), ENDS[0]]


def test_log_probabilities_go_with_their_text_and_are_dropped_with_it() -> None:
    def token(text: str) -> Json:
        return chunk({"content": text}, logprobs={"content": [{"token": text}]})

    screen = Screen(look(), None)
    out = run(screen, [token("Hi "), token("jo@"), token("x.com"), token(" you")], [], "decoded", [ENDS[0]])
    assert [one["choices"][0].get("logprobs") for one in out] == [token("Hi ")["choices"][0]["logprobs"], None,
                                                                 token(" you")["choices"][0]["logprobs"], None]  # fmt: skip
    assert "jo@" not in repr(out)


def test_reasoning_that_stands_twice_is_one_text_and_a_changed_one_has_no_signature() -> None:
    def thought(text: str, **more: Any) -> Json:
        entry = {"type": "reasoning.text", "text": text, "format": "anthropic-claude-v1", "index": 0, **more}
        return chunk({"reasoning_content": text, "reasoning_details": [entry]})

    sound = [thought("Let me"), thought(" see. ", signature="c2ln")]
    assert run(Screen(look(), None), [*sound], [], "decoded", [ENDS[0]]) == [*sound, ENDS[0]]
    out = run(Screen(look(), None), [thought("It is jo@"), thought("x.com. ", signature="c2ln")], [], "decoded", [ENDS[0]])
    message = fold(out, None)["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning_details"][0]["text"] == "It is [EMAIL_1]. "
    assert "signature" not in message["reasoning_details"][0]


def test_what_does_not_grow_is_looked_at_as_it_stands() -> None:
    note = {"type": "url_citation", "index": 0, "url_citation": {"title": "Mail jo@x.com", "url": "https://x.com/?q=1"}}
    image = {"type": "image", "index": 0, "data": "jo@x.com"}
    out = run(Screen(look(), None), [chunk({"annotations": [note], "images": [image]})], [], "decoded", [ENDS[0]])
    delta = out[0]["choices"][0]["delta"]
    assert delta["annotations"][0]["url_citation"]["title"] == "Mail [EMAIL_1]"
    assert delta["images"] == [image], "what is no text is no text"


@pytest.mark.parametrize("spelling", ["decoded", "encoded", "run"])
def test_a_block_ends_it_before_the_match_with_what_was_decided(spelling: str) -> None:
    found: list[Finding] = []
    screen = Screen(look("block", found), None)
    out = run(
        screen, [content("One two three four five six, "), content("seven "), content("jo@x."), content("com is")], [], spelling
    )
    assert screen.blocked
    assert "".join(one["choices"][0]["delta"]["content"] for one in out) == "One two three four five six, seven "
    assert found == [Finding("EMAIL", "block", "output")]


def test_who_only_watches_holds_nothing_and_still_sees_what_is_split() -> None:
    found: list[Finding] = []
    screen = Screen(None, look("flag", found))
    parts = [content("jo@exa"), content("mple.com"), content(" is")]
    assert [screen.see(Batch([part])) for part in parts] == [[part] for part in parts]
    assert found == [Finding("EMAIL", "flag", "output")]
    blocking = Screen(None, look("block", found))
    assert [len(blocking.see(Batch([part]))) for part in parts] == [1, 1, 0]
    assert blocking.blocked


def test_a_match_at_the_very_end_is_seen_by_who_watches() -> None:
    found: list[Finding] = []
    run(Screen(None, look("flag", found)), [content("write to jo@x.com")], [], "encoded", [ENDS[0]])
    assert found == [Finding("EMAIL", "flag", "output")]


@given(cuts=st.lists(st.integers(1, 40), max_size=6), spelling=st.sampled_from(["decoded", "encoded", "run"]))
def test_originals_are_put_back_wherever_their_placeholders_are_split(cuts: list[int], spelling: str) -> None:
    text = "Dear [NAME_1], [OTHER_1] [NAME_12] [NAME_1]"
    places = sorted({cut for cut in cuts if cut < len(text)})
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    screen = Screen(restoring(NAME_1='O\'Neil "Jo"\n'), None)
    chunks = [*map(content, pieces), opened(), *(argument(piece) for piece in ['{"to":"', *pieces, '"}'])]
    chunks += [chunk({"reasoning_content": piece}) for piece in pieces]
    message = fold(run(screen, chunks, [], spelling, [ENDS[0]]), None)["choices"][0]["message"]
    assert message["content"] == text.replace("[NAME_1]", 'O\'Neil "Jo"\n')
    assert message["tool_calls"][0]["function"]["arguments"] == '{"to":"' + text.replace("[NAME_1]", 'O\'Neil \\"Jo\\"\\n') + '"}'
    assert message["reasoning_content"] == text, "reasoning goes back to the provider as it came"


def test_a_whole_message_as_one_delta_is_taken_apart_and_folds_to_the_same() -> None:
    message = {
        "role": "assistant", "content": "Text", "refusal": "No", "reasoning_content": "Hm",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"b":1}'}},
                       {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}],
        "annotations": [{"type": "x"}],
    }  # fmt: skip
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "stop",
        "native_finish_reason": "stop",
        "logprobs": {"content": [{"token": "Text", "logprob": -0.1, "bytes": [*b"Text"]}]},
    }
    completion = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "system_fingerprint": "f",
    }
    first, ends, usage = unfold(completion)
    screen = Screen(look(), None)
    out = [*screen.see(Batch([*first])), *screen.see(Batch([*ends], final=True))]
    assert fold((one for item in out for one in Batch([item]).chunks), usage) == completion
