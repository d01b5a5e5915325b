"""Server-sent events out of bytes: the rules of the SSE specification, and that no cut of the bytes changes what comes out.

Strategy: every stream is fed whole, byte by byte and at random cuts, against a reference that reads the whole body with one
regular expression and one loop. Linear time is shown by counting joins, never by a clock.
The one rule: the reference follows https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6, and knows
nothing of the framer; the two additions are the contract's: an end without a blank line counts, and bare JSON is an event.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sse import EVENT_LIMIT, BareText, ErrorEvent, Framer
from tests.support.decoding import byte_by_byte, split_at

Event = tuple[str, bytes]
KINDS = {bytes: "data", ErrorEvent: "error", BareText: "bare"}


def frame(pieces: Iterable[bytes], limit: int = EVENT_LIMIT) -> list[Event]:
    """Every event of a stream with its kind."""
    framer = Framer(limit)
    found = [event for piece in pieces for event in framer.feed(piece)] + framer.close()
    assert not framer.overflow
    # A line end behind bare text is no part of it, and does no harm to JSON.
    return [(KINDS[type(event)], event.rstrip(b"\n") if type(event) is BareText else bytes(event)) for event in found]


def reference(body: bytes) -> list[Event]:
    """The same, read off the whole body."""
    found: list[Event] = []
    block: list[bytes] = []
    for line in [*re.split(rb"\r\n|\r|\n", body.removeprefix(b"\xef\xbb\xbf")), b""]:
        if line:
            block.append(line)
        else:
            found += of_block(block)
            block = []
    return found


def of_block(lines: list[bytes]) -> list[Event]:
    values: list[bytes] = []
    kind = "data"
    bare: list[Event] = []
    for number, line in enumerate(lines):
        name, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if name == b"data":
            values.append(value)
        elif name == b"event":
            kind = "error" if value == b"error" else "data"
        elif re.match(rb"\s*[{\[]", line):
            bare = [("bare", b"\n".join(lines[number:]))]
            break
    return ([(kind, b"\n".join(values))] if values else []) + bare


def data(*values: bytes) -> list[Event]:
    return [("data", value) for value in values]


def check(body: bytes, *expected: Event) -> None:
    """Whole, byte by byte, and cut in two at every place: always these events."""
    assert frame([body]) == list(expected)
    assert frame(byte_by_byte(body)) == list(expected)
    for cut in range(1, len(body)):
        assert frame([body[:cut], body[cut:]]) == list(expected), f"cut at {cut}"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_each_of_the_three_line_ends_ends_a_line(end: bytes) -> None:
    check(b"data: a" + end * 2 + b"data: b" + end + b"data: c" + end * 2, *data(b"a", b"b\nc"))


def test_line_ends_may_be_mixed_in_one_stream() -> None:
    check(b"data: a\r\n\rdata: b\n\r\ndata: c\r\r\ndata: d\n\n", *data(b"a", b"b", b"c", b"d"))


def test_a_line_feed_right_after_a_cut_carriage_return_belongs_to_it() -> None:
    framer = Framer()
    assert framer.feed(b"data: a\r") == []
    assert framer.feed(b"\ndata: b\r") == []
    assert framer.feed(b"\n\r") == [b"a\nb"]
    assert framer.feed(b"\n") == []
    assert framer.close() == []


def test_an_event_ended_by_a_carriage_return_does_not_wait_for_a_line_feed() -> None:
    """A provider that ends lines with CR alone sends nothing more; the event may not hang until its next one."""
    assert Framer().feed(b"data: a\r\r") == [b"a"]


def test_an_empty_read_between_cr_and_lf_changes_nothing() -> None:
    assert frame([b"data: a\r", b"", b"\ndata: b\r\n", b"", b"\r\n"]) == data(b"a\nb")


def test_an_event_leaves_with_the_read_that_completes_it() -> None:
    framer = Framer()
    assert framer.feed(b"data: a\n\ndata: b\n\nda") == [b"a", b"b"]
    assert framer.feed(b"ta: c\n") == []
    assert framer.feed(b"\n") == [b"c"]


def test_a_byte_order_mark_at_the_very_start_is_no_text() -> None:
    check(b"\xef\xbb\xbfdata: a\n\n", *data(b"a"))


def test_a_byte_order_mark_is_taken_off_once_and_only_at_the_start() -> None:
    check(b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: \xef\xbb\xbfb\n\n\xef\xbb\xbfdata: c\n\n", *data(b"\xef\xbb\xbfb"))


def test_a_byte_order_mark_before_the_only_event_that_has_no_blank_line() -> None:
    check(b"\xef\xbb\xbfdata: a", *data(b"a"))


def test_the_beginning_of_a_byte_order_mark_is_not_one() -> None:
    check(b"\xef\xbbdata: a\n\ndata: b\n\n", *data(b"b"))


def test_a_stream_of_nothing_but_a_byte_order_mark_is_empty() -> None:
    check(b"\xef\xbb\xbf")


def test_comments_and_fields_without_data_are_no_events() -> None:
    check(b": OPENROUTER PROCESSING\n\n:\n\nid: 1\n\nretry: 10\n\nevent: ping\n\n")


def test_comments_and_other_fields_may_stand_around_the_data() -> None:
    check(b": c\nid: 7\ndata: a\n:data: no\nretry: 3\nevent: message\ndata: b\nunknown: x\n\n", *data(b"a\nb"))


def test_a_name_of_an_event_without_data_does_not_stick_to_the_next() -> None:
    check(b"event: error\n\ndata: a\n\n", *data(b"a"))


def test_several_data_lines_are_one_event_joined_by_line_feeds() -> None:
    check(b'data: {\r\ndata:  "a": 1\r\ndata: }\r\n\r\n', *data(b'{\n "a": 1\n}'))


def test_one_blank_after_the_colon_is_not_data_and_the_second_is() -> None:
    check(b"data:a\n\ndata: b\n\ndata:  c\n\ndata:\td\n\n", *data(b"a", b"b", b" c", b"\td"))


def test_data_without_a_colon_is_an_empty_line_of_data() -> None:
    check(b"data\ndata: a\ndata\n\n", *data(b"\na\n"))


def test_a_field_name_counts_only_whole_and_in_lower_case() -> None:
    check(b"Data: a\ndatas: b\n data: c\ndata : d\n\n")


def test_an_event_named_error_says_so() -> None:
    check(
        b"event: error\ndata: a\n\nevent:error\ndata: b\n\ndata: c\nevent: error\n\n", *(("error", x) for x in (b"a", b"b", b"c"))
    )


def test_only_the_name_error_makes_an_error() -> None:
    check(b"event: errors\ndata: a\n\nevent: message\ndata: b\n\n", *data(b"a", b"b"))


def test_leading_and_surplus_blank_lines_are_nothing() -> None:
    check(b"\n\r\n\n\ndata: a\n\n\n\n\ndata: b\n\n\r\n", *data(b"a", b"b"))


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"])
def test_the_last_event_needs_no_blank_line(end: bytes) -> None:
    check(b"data: a\n\ndata: [DONE]" + end, *data(b"a", b"[DONE]"))


def test_characters_of_several_bytes_survive_every_cut() -> None:
    text = "é€𝄞 \u2028\x85".encode()
    check(b"data: " + text + b"\n\n", *data(text))


def test_bytes_that_are_no_utf8_are_handed_on_for_the_decoder_to_judge() -> None:
    check(b"data: \xff\xfe\n\n", *data(b"\xff\xfe"))


@pytest.mark.parametrize("text", [b'{"error":{"message":"no"}}', b'  {"error":\n{"message": "no"}\n}', b'[{"error": 1}]', b"{"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_json_that_is_no_field_is_an_event_of_its_own(text: bytes, end: bytes) -> None:
    check(b"data: a\n\n" + text + end, *data(b"a"), ("bare", text))


def test_bare_json_right_behind_a_data_line_comes_after_that_event() -> None:
    check(b'data: a\n{"error": 1}\n\ndata: b\n\n', *data(b"a"), ("bare", b'{"error": 1}'), *data(b"b"))


def test_text_that_is_neither_a_field_nor_json_is_left_out() -> None:
    """The specification ignores unknown fields; HTML is recognized where a body opens, not here."""
    check(b"upstream timed out\n\n<html>\n\ndata: a\n\n", *data(b"a"))


def test_nothing_is_left_after_close() -> None:
    framer = Framer()
    framer.feed(b"data: a")
    assert framer.close() == [b"a"]
    assert framer.close() == []


class TestLimit:
    def test_an_event_up_to_the_limit_passes(self) -> None:
        body = b"data: " + b"x" * 58 + b"\n\n"
        assert frame([body], limit=66) == frame(byte_by_byte(body), limit=66) == data(b"x" * 58)

    def test_an_event_beyond_the_limit_overflows_and_nothing_is_kept_or_read_any_more(self) -> None:
        framer = Framer(limit=64)
        assert framer.feed(b"data: a\n\ndata: ") == [b"a"]
        assert framer.feed(b"x" * 100) == []
        assert framer.overflow
        assert framer.feed(b"\n\ndata: b\n\n") == []
        assert framer.close() == []

    @pytest.mark.parametrize("size", [1, 7, 64, 1000])
    def test_an_event_beyond_the_limit_overflows_however_it_is_cut(self, size: int) -> None:
        """Any split gives the same events: a read that brings the blank line, too, is no way around the limit."""
        framer = Framer(limit=64)
        body = b"data: a\n\ndata: " + b"x" * 100 + b"\n\ndata: b\n\n"
        found = [event for at in range(0, len(body), size) for event in framer.feed(body[at : at + size])]
        assert (found, framer.overflow) == ([b"a"], True)

    def test_many_events_in_one_read_may_be_larger_than_the_limit_together(self) -> None:
        assert frame([b"data: 0123456789\n\n" * 100], limit=64) == data(*[b"0123456789"] * 100)

    def test_many_events_over_many_reads_are_measured_one_by_one(self) -> None:
        body = b"data: 0123456789\n\n" * 100
        assert frame([body[i : i + 7] for i in range(0, len(body), 7)], limit=64) == data(*[b"0123456789"] * 100)


class TestLinearTime:
    def test_an_event_of_two_megabytes_may_come_one_byte_at_a_time(self) -> None:
        """Quadratic copying would move 2 TB here; it would never end."""
        text = bytes(range(97, 123)) * 80660
        framer = Framer()
        feed = framer.feed
        for byte in byte_by_byte(b"data: " + text + b"\n"):
            assert not feed(byte)
        assert feed(b"\n") == [text]

    @pytest.mark.parametrize(
        "body", [b"data: " + b"x" * 20000, b"data: x\n" * 2500, b":\r\n" * 6000, b"\r" + b"data: x\r\n" * 2000]
    )
    def test_bytes_are_joined_once_per_event_and_not_once_per_read(self, body: bytes) -> None:
        assert joins(byte_by_byte(body + b"\n\n")) <= 10

    def test_the_rest_of_a_read_is_not_copied_once_per_event_in_it(self) -> None:
        """One split for the whole read: 5,000 events in it cost no call per event that would touch the rest."""
        assert joins([b"data: x\n\n" * 5000]) <= 1


def joins(pieces: list[bytes]) -> int:
    """How many times bytes were joined while the pieces were fed, counted by the interpreter's own profile hook."""
    counted = 0

    def count(frame: Any, event: str, called: Any) -> None:
        nonlocal counted
        counted += event == "c_call" and called.__name__ in ("join", "split")

    framer = Framer()
    sys.setprofile(count)
    try:
        for piece in pieces:
            framer.feed(piece)
    finally:
        sys.setprofile(None)
    return counted


LINE = st.one_of(
    st.sampled_from(
        [
            b"",
            b"",
            b"",
            b"data: a",
            b"data:b",
            b"data:",
            b"data",
            b"data: ",
            b"event: error",
            b"event:x",
            b"id: 1",
            b"retry: 2",
            b": comment",
            b":",
            b"data: \xef\xbb\xbf",
            b'{"error": 1}',
            b" [",
            b"noise",
            b"\xef\xbb\xbfdata: c",
            "data: é𝄞".encode(),
        ]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=4).map(lambda text: b"data: " + text.encode()),
)
BODY = st.builds(
    lambda bom, lines, last: bom + b"".join(line + end for line, end in lines) + last,
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xef\xbb"]),
    st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n"]))),
    LINE,
)


@given(BODY, st.lists(st.integers(0, 500), max_size=8))
def test_any_split_of_any_stream_gives_the_events_of_the_reference(body: bytes, cuts: list[int]) -> None:
    expected = reference(body)
    assert frame([body]) == expected
    assert frame(split_at(body, cuts)) == expected
    assert frame(byte_by_byte(body)) == expected


@given(st.lists(st.sampled_from([bytes([byte]) for byte in b"\r\n: dat{\xef\xbb\xbf"]), max_size=40).map(b"".join))
def test_any_bytes_at_all_give_the_events_of_the_reference(body: bytes) -> None:
    assert frame([body]) == frame(byte_by_byte(body)) == reference(body)
