"""The fast way of text chunks, spliced without parsing, against the long way of the same decoder.

Strategy: generated streams of text chunks in one vendor's spelling (any text, any head and tail, others in between) are decoded
twice: as they are, and by a decoder whose template never fills. The long way is the reference.
The one rule: no payload may come out otherwise than the long way has it; that the fast way is really taken is checked apart.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.reply import Batch, Item, Run, sse_events
from proxy.wire.openai import Decoder
from proxy.wire.openai.template import LESSONS, Template
from tests.support.decoding import make_call, make_target

Json = dict[str, Any]
TARGET = make_target("openai", "vendor-model")
HEAD = '{"id":"c1","object":"chat.completion.chunk","created":17,"model":"m","choices":[{"index":0,"delta":{"content":'
TAIL = '},"finish_reason":null}]}'


class NeverFills(Template):
    """A template that recognizes nothing."""

    def fill(self, payload: bytes) -> bytes | None:
        return None

    def single(self, data: bytes) -> bytes | None:
        return None

    def run(self, data: bytes) -> tuple[Run, int, bytes] | None:
        return None


def decoder(template: Template | None = None) -> Decoder:
    made = Decoder(make_call({"stream": True}), TARGET)
    if template is not None:
        made._template = template
    return made


def both(*payloads: bytes) -> list[Item]:
    """Decode the fast and the long way, one event per read; they agree. Returns the fast way's items."""
    fast, long = decoder(), decoder(NeverFills())
    items: list[Item] = []
    for payload in payloads:
        event = payload if payload.startswith(b"event:") else b"data: " + payload
        ours, theirs = fast.feed(event + b"\n\n"), long.feed(event + b"\n\n")
        assert semantic(ours) == semantic(theirs), payload
        assert repr(fast.fault) == repr(long.fault), payload
        assert ours == [] or all(type(item) is dict for item in theirs)
        items += ours
    last, reference = fast.close(), long.close()
    assert semantic(last) == semantic(reference)
    assert repr(fast.fault) == repr(long.fault)
    assert fast.stream.usage == long.stream.usage
    return items


def semantic(items: list[Item]) -> list[Json]:
    """The chunks as a client reads them off the bytes."""
    return [json.loads(event.removeprefix(b"data: ")) for event in sse_events(items).split(b"\n\n") if event]


def spliced(items: list[Item]) -> int:
    return sum(type(item) is bytes for item in items)


def text(content: str, head: str = HEAD, tail: str = TAIL, *, ascii: bool = False) -> bytes:
    return (head + json.dumps(content, ensure_ascii=ascii) + tail).encode("utf-8", "surrogatepass")


def test_text_after_the_first_lessons_is_spliced() -> None:
    """Otherwise all that follows here would compare the long way with itself."""
    items = both(*(text(f"word {number}") for number in range(20)))
    assert spliced(items) >= 20 - LESSONS - 1


def test_a_spliced_chunk_is_byte_for_byte_what_the_long_way_writes() -> None:
    words = ["a", "Hi there", "  ", "é€𝄞", "[DONE]", "data: x", "{a}", "null", ",]}", "`/'", "0" * 500]
    fast, long = decoder(), decoder(NeverFills())
    body = b"".join(b"data: " + text(word) + b"\n\n" for word in words * 2)
    assert sse_events(fast.feed(body)) == sse_events(long.feed(body))


TRAPS = [
    "\"", "\\", "\\\"", "\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u00ad", "\ufeff", "\ue000", "𝄞", "é",
    '"},"finish_reason":"stop"}]}', '","content":"x', '"content":"', '"content": "', "}", ",", "[DONE]", "", " ", "a\\",
    '\\u0041',
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("ascii", [True, False], ids=["escaped", "utf-8"])
@pytest.mark.parametrize("lesson", [True, False], ids=["also as the lesson", "after the lessons"])
def test_texts_that_look_like_json_or_cannot_be_seen(trap: str, ascii: bool, lesson: bool) -> None:
    before = [] if lesson else [text("a")] * 3
    both(*before, *(text(content, ascii=ascii) for content in (trap, f"a{trap}", f"{trap}b", f"a{trap}b", "plain")))


@pytest.mark.parametrize(
    "odd",
    [
        HEAD.encode() + b'"\xff"' + TAIL.encode(),
        HEAD.encode() + b'"\xc3"' + TAIL.encode(),
        HEAD.encode() + b'"\xed\xa0\x80"' + TAIL.encode(),
        HEAD.encode() + b'"a\nb"' + TAIL.encode(),
        HEAD.encode() + b'"a\x00b"' + TAIL.encode(),
        HEAD.encode() + b'"\\ud83d"' + TAIL.encode(),
        HEAD.encode() + b'"\\q"' + TAIL.encode(),
        HEAD.encode() + b'"' + TAIL.encode(),
        HEAD.encode() + b'"a","role":"x"' + TAIL.encode(),
        HEAD.encode() + b'"a"' + TAIL[:-1].encode(),
        HEAD.encode() + b'"a"' + TAIL.encode() + b" x",
        HEAD.encode() + b"null" + TAIL.encode(),
        HEAD.encode() + b'"a"' + b'},"finish_reason":"stop"}]}',
        b"event: error\ndata: " + text("a"),
        text("a"),
        b"[DONE]",
    ],
)
def test_payloads_that_nearly_fit(odd: bytes) -> None:
    """Whatever is wrong with them is a fault, or another chunk, as on the long way."""
    both(text("a"), text("b"), text("c"), odd, text("d"))


def test_a_bare_chunk_outside_of_any_field_is_an_error_on_both_ways() -> None:
    fast, long = decoder(), decoder(NeverFills())
    body = b"".join(b"data: " + text(word) + b"\n\n" for word in "abc") + text("d") + b"\n\n"
    assert (semantic(fast.feed(body)), repr(fast.fault)) == (semantic(long.feed(body)), repr(long.fault))


def test_what_stands_between_text_chunks_rides_on_the_same_chunk() -> None:
    extra = b'{"choices":[],"object":"chat.completion.chunk","mid":1}'
    beside = b'{"choices":[{"index":0,"delta":{},"content_filter_offsets":{"a":1}}]}'
    both(*[text("a")] * 4, extra, text("b"), text("c"), beside, text("d"), text("e"))


def test_a_field_of_the_head_that_changes_ends_the_splicing_and_is_kept() -> None:
    """Padding, clocks, fingerprints."""
    heads = [HEAD.replace('"created":17', f'"created":17,"clock":{number}') for number in range(12)]
    items = both(*(text("a", head) for head in heads))
    assert [chunk["clock"] for chunk in semantic(items)] == list(range(12))


def test_lessons_are_given_up_where_every_chunk_differs() -> None:
    template = Template()
    for number in range(20):
        payload = text("a", HEAD.replace("17", str(100 + number)))
        template.learn(payload, orjson.loads(payload))
    assert template.before == HEAD.replace("17", str(100 + LESSONS - 1)).encode() + b'"'


HEADS = st.sampled_from(
    [
        HEAD,
        HEAD.replace(":", ": ").replace(",", ", "),
        HEAD.replace('"index":0', '"index":1'),
        HEAD.replace('"created":17', '"created":18,"system_fingerprint":"fp_é"'),
        HEAD.replace('"model":"m"', '"model":"\\u0022content\\u0022"'),
        HEAD.replace('"model":"m"', '"model":"m","p":{"content":"x"}'),
        HEAD.replace('"model":"m"', '"model":"m","usage":null,"service_tier":null'),
        HEAD.replace('{"content"', '{"role":"assistant","content"'),
        HEAD.replace('"delta":{', '"logprobs":null,"delta":{'),
    ]
)
TAILS = st.sampled_from(
    [
        TAIL,
        "}}]}",
        '},"logprobs":{"content":[{"token":"x","logprob":-0.1}]},"finish_reason":null}]}',
        '},"finish_reason":null}],"usage":null}',
        '},"finish_reason":null}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}',
        '},"finish_reason":null}],"obfuscation":"Ab3"}',
        '},"finish_reason":null}],"x_groq":{"id":"r"}}',
        '},"finish_reason":null}],"citations":["https://a.example"]}',
        '},"finish_reason":"stop"}]}',
    ]
)
CONTENT = st.one_of(st.text(max_size=6), st.sampled_from(TRAPS), st.text("abc ", min_size=1, max_size=5))
BETWEEN = st.sampled_from(
    [
        b'{"choices":[]}',
        b'{"choices":[],"mid":[1]}',
        b'{"choices":[{"index":0,"delta":{"reasoning":"r"}}]}',
        b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
        b'{"choices":[{"index":1,"delta":{"content":"other"}}]}',
        b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"t","function":{"name":"f","arguments":"{"}}]}}]}',
        b'{"error":{"message":"no"}}',
        b"[DONE]",
    ]
)
STEADY = st.builds(
    lambda contents, head, tail, ascii: [text(content, head, tail, ascii=ascii) for content in contents],
    st.lists(CONTENT, min_size=3, max_size=10), HEADS, TAILS, st.booleans(),
)  # fmt: skip
CHANGING = st.lists(st.one_of(BETWEEN, st.builds(text, CONTENT, HEADS, TAILS)), max_size=4)


@given(STEADY, CHANGING, STEADY)
@settings(max_examples=300)
def test_any_stream_of_text_gives_the_chunks_of_the_long_way(first: list[bytes], middle: list[bytes], last: list[bytes]) -> None:
    both(*first, *middle, *first, *last)


@given(
    st.lists(
        st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"\\", b"\n", b"x", "é".encode(), b'","a":"'])), max_size=4
    ).map(b"".join)
)
def test_any_bytes_in_the_place_of_the_text_give_what_the_long_way_gives(raw: bytes) -> None:
    raw = raw.replace(b"\n", b"").replace(b"\r", b"")
    both(text("a"), text("b"), HEAD.encode() + b'"' + raw + b'"' + TAIL.encode(), text("c"))


def at_once(*payloads: bytes, rest: bytes = b"") -> list[Item]:
    """Decode all events in one read, and one by one the long way; they agree. Returns what the one read gave."""
    fast, long = decoder(), decoder(NeverFills())
    read = b"".join(b"data: " + payload + b"\n\n" for payload in payloads) + rest
    ours, theirs = fast.feed(read), [item for payload in payloads for item in long.feed(b"data: " + payload + b"\n\n")]
    theirs += long.feed(rest)
    assert semantic(ours) == semantic(theirs)
    assert fast.stream.sent == long.stream.sent
    assert repr(fast.fault) == repr(long.fault)
    last, reference = fast.close(), long.close()
    assert semantic(last) == semantic(reference)
    assert repr(fast.fault) == repr(long.fault)
    return ours


def runs(items: list[Item]) -> int:
    return sum(isinstance(item, Run) for item in items)


def test_many_text_chunks_of_one_read_are_rewritten_in_one_piece() -> None:
    found = at_once(*(text(f"word {number}") for number in range(50)))
    assert runs(found) == 1
    assert len(found) < 6


def test_a_batch_takes_a_run_apart_for_those_who_look() -> None:
    found = at_once(*(text(f"word {number}") for number in range(50)))
    assert [chunk["choices"][0]["delta"]["content"] for chunk in Batch(found).chunks] == [f"word {n}" for n in range(50)]


FINISH = HEAD.replace('"content":', '"x":') + '""' + TAIL.replace("null", '"stop"')
pieces = st.one_of(
    st.text(max_size=6).map(text),
    st.text(max_size=6).map(lambda content: text(content, ascii=True)),
    st.sampled_from([
        text("other", tail='},"finish_reason":null,"logprobs":null}]}'), text("", HEAD), text('"quoted" \\ \n'),
        b"not json", b"[]", FINISH.encode(),
        text("a").replace(b'"a"', b'"\xff"'), text("a").replace(b'"a"', b'"\\"'), text("a").replace(b'"a"', b'"\\u00e9"'),
        text("a").replace(b'"a"', b'"a\n\n"'), text("a").replace(b'"a"', b'"\xc3'), b'\xa9"' + TAIL.encode(),
    ]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(pieces, max_size=12), st.binary(max_size=5))
def test_one_read_gives_what_the_same_events_give_one_by_one(between: list[bytes], rest: bytes) -> None:
    """Whatever stands among the text chunks, and whatever half an event ends the read."""
    at_once(text("one"), text("two"), text("three"), *between, text("last"), rest=rest)


def long_way_only() -> Decoder:
    """A decoder that knows no short way but the plain text chunk's."""
    made = decoder(NeverFills())
    made._usual = lambda chunk: False  # type: ignore[method-assign]
    return made


USUAL: Json = {"id": "c1", "object": "chat.completion.chunk", "created": 17, "model": "m", "system_fingerprint": "fp_1"}
deltas: st.SearchStrategy[Json] = st.fixed_dictionaries({}, optional={
    "role": st.just("assistant"), "content": st.sampled_from([None, "", "Hi", 3]), "refusal": st.sampled_from([None, "", "No"]),
    "tool_calls": st.just([]), "reasoning_content": st.sampled_from(["", "hm"]),
})  # fmt: skip
usages = st.sampled_from(
    [None, {}, {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, {"prompt_tokens_details": "x"}, 7]
)
choices = st.fixed_dictionaries(
    {"index": st.sampled_from([0, 0, 1, None, "0"]), "delta": deltas},
    optional={
        "finish_reason": st.sampled_from([None, "stop", "length", "error", "eos", 3]),
        "logprobs": st.sampled_from([None, {}, {"content": [{"token": "Hi"}]}]),
        "native_finish_reason": st.just("end"),
        "content_filter_results": st.just({"hate": 1}),
    },
)
chunks = st.fixed_dictionaries(
    {"choices": st.lists(choices, max_size=2)},
    optional={
        "usage": usages, "system_fingerprint": st.sampled_from([None, "", "fp_2", 3]), "service_tier": st.just("default"),
        "object": st.sampled_from(["chat.completion.chunk", "error"]), "error": st.sampled_from([None, {"message": "no"}]),
        "x_groq": st.just({"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}), "p": st.just("pad"),
    },
).map(lambda found: {**USUAL, **found})  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(chunks, max_size=5))
def test_the_usual_chunks_come_out_as_the_long_way_has_them(events: list[Json]) -> None:
    """Whatever stands in them, in whichever order, also where they are wrong."""
    short, long = decoder(), long_way_only()
    for event in events:
        read = b"data: " + json.dumps(event).encode() + b"\n\n"
        assert semantic(short.feed(read)) == semantic(long.feed(read))
        assert repr(short.fault) == repr(long.fault)
    assert semantic(short.close()) == semantic(long.close())
    assert short.stream.usage == long.stream.usage
    assert repr(short.fault) == repr(long.fault)
