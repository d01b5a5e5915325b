"""The bench can be believed: a wrong reply never counts, medians and verdicts are computed, and the harness runs end to end."""

from __future__ import annotations

import itertools
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import said
from bench.checking import Reply, Wanted, WrongReply, check, check_start
from bench.contestants import PLACES, name, penstock, shipped, with_layers
from bench.job import Job
from bench.many import Tally
from bench.medians import ratio, summaries
from bench.picture import BAR, BEYOND, Panel, svg
from bench.provider import OPENAI, STREAM_HEAD, Paced, at_once, ending, frame, in_one_piece, opening
from bench.report import compared, markdown
from bench.run import cast, job_of, place_for, verified
from bench.stage import Cores, Stage
from bench.targets import Target, verdict
from bench.workloads import WORKS, Work, chosen
from middleware import TABLE
from proxy.config import load

COUNT = 5
STREAM = at_once(OPENAI, COUNT)
MACHINE = {"CPU": "a CPU", "Python": "3"}


def reply(*reads: bytes) -> Reply:
    """A reply that came in these reads, and is at its end after the last."""
    found = Reply()
    ends = [found.feed(read, number) for number, read in enumerate(reads)]
    assert ends == [False] * (len(reads) - 1) + [True]
    return found


def paced() -> bytes:
    """A paced stream as the provider writes it."""
    stream = Paced(OPENAI, COUNT, 0.02, 0.0)
    chunks = [stream.next() for _ in range(COUNT)]
    return STREAM_HEAD + b"".join([*map(frame, opening(OPENAI)), *chunks, *map(frame, ending(OPENAI, COUNT))]) + b"0\r\n\r\n"


def streamed(events: list[bytes]) -> bytes:
    return STREAM_HEAD + b"".join(map(frame, events)) + b"0\r\n\r\n"


def said_in_events() -> list[bytes]:
    middle = [OPENAI.event % said.word(number) for number in range(COUNT)]
    return opening(OPENAI) + middle + ending(OPENAI, COUNT)


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=20))
def test_a_right_stream_is_right_wherever_its_reads_are_cut(cuts: list[int]) -> None:
    bounds = [0, *sorted(set(cuts)), len(STREAM)]
    check(reply(*(STREAM[start:stop] for start, stop in itertools.pairwise(bounds))), Wanted(COUNT), thorough=True)


def test_a_right_whole_reply_is_right() -> None:
    check(reply(in_one_piece(OPENAI, COUNT)), Wanted(COUNT, whole=True))


def test_a_right_paced_stream_is_right_and_carries_its_times() -> None:
    before = time.monotonic_ns()
    found = reply(paced())
    check(found, Wanted(COUNT, paced=True), thorough=True)
    assert len(found.stamps()) == COUNT - 1, "the last chunk is the checksum"
    assert all(before <= written <= time.monotonic_ns() for written, _ in found.stamps())


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (streamed(said_in_events()[:2] + said_in_events()[3:]), "4 content chunks instead of 5"),
        (streamed([*said_in_events(), OPENAI.event % b" token5"]), "does not end with"),
        (streamed(said_in_events()[:-1]), "does not end with"),
        (streamed(said_in_events()[:-3] + said_in_events()[-2:]), "finish reason"),
        (STREAM.replace(b" token3", b" token4", 1), "not what the provider said"),
        (STREAM.replace(b"\r\n0\r\n\r\n", b"\r\n0\r\n\r\n0\r\n\r\n"), "bytes after its end"),
        (STREAM.replace(b"\r\n\r\n", b"\r\n\r\nf", 1), "HTTP"),
        (STREAM.replace(b"200 OK", b"500 Oh", 1), "not a 200"),
        (streamed([event.replace(b'"delta":', b'"delta"') for event in said_in_events()]), "not a completion chunk"),
    ],
    ids=["short", "goes on", "no [DONE]", "no finish reason", "altered", "more bytes", "framing", "status", "no JSON"],
)  # fmt: skip
def test_a_wrong_stream_does_not_count(wrong: bytes, why: str) -> None:
    with pytest.raises(WrongReply, match=why.replace("[", r"\[")):
        check(reply(wrong), Wanted(COUNT), thorough=True)


def test_a_paced_stream_with_one_altered_digit_does_not_count() -> None:
    stream = paced()
    at = stream.index(b" token2@") + len(b" token2@") + 14
    altered = stream[:at] + (b"0" if stream[at : at + 1] != b"0" else b"1") + stream[at + 1 :]
    with pytest.raises(WrongReply, match="checksum"):
        check(reply(altered), Wanted(COUNT, paced=True))


@pytest.mark.parametrize(("old", "new"), [(b" token2", b" token3"), (b'"stop"', b'"length"'), (b'"choices"', b'"chices"')])
def test_a_wrong_whole_reply_does_not_count(old: bytes, new: bytes) -> None:
    wrong = in_one_piece(OPENAI, COUNT).replace(old, new, 1)
    body = wrong[wrong.index(b"\r\n\r\n") + 4 :]
    with pytest.raises(WrongReply):
        check(reply(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)), Wanted(COUNT, whole=True))


def test_a_stream_that_is_held_open_is_checked_as_far_as_it_came() -> None:
    part = paced()[: paced().index(b" token3")]
    found = Reply()
    assert not found.feed(part, 0)
    check_start(found)
    wrong = Reply()
    wrong.feed(part.replace(b" token1@", b" token7@"), 0)
    with pytest.raises(WrongReply, match="chunk 1"):
        check_start(wrong)


def test_the_checksum_is_of_all_text_before_it() -> None:
    parts = [said.stamped(0, 1), said.stamped(1, 2)]
    assert said.wrong([*parts, said.seal(zlib.crc32(b"".join(parts)))], 3, paced=True) is None


@pytest.mark.parametrize(("calls", "hits", "wrong"), [(10, False, 0), (12, False, 0), (9, False, 1), (0, True, 0), (1, True, 1)])
def test_replies_come_from_the_provider_and_hits_do_not(calls: int, hits: bool, wrong: int) -> None:
    assert verified({"ok": 10, "wrong": 0}, calls, hits)["wrong"] == wrong


def line(who: str, turn: int, cpu: float, work: str = "json", **more: object) -> dict[str, object]:
    return {"turn": turn, "work": work, "who": who, "wrong": 0, "first_wrong": None, "cpu_us_per_request": cpu, **more}


LINES = [line(who, turn, cpu) for turn in (1, 2, 3) for who, cpu in (("smg", 10.0 * turn), ("penstock", [30, 90, 31][turn - 1]))]


def test_ratios_are_of_medians_over_turns() -> None:
    found = summaries(LINES)
    assert found["json", "penstock"].figures["cpu_us_per_request"] == 31
    assert ratio(found, "json", "penstock", "smg", "cpu_us_per_request") == pytest.approx(31 / 20)
    assert ratio(found, "json", "penstock", "litellm", "cpu_us_per_request") is None


def test_added_latency_is_over_the_direct_way_of_the_same_work() -> None:
    lines = [line("direct", 1, 0, first_ms={"p50": 0.25}), line("penstock", 1, 1, first_ms={"p50": 1.0})]
    assert summaries(lines)["json", "penstock"].figures["added_first_ms.p50"] == 0.75


def test_nothing_is_said_of_added_latency_where_the_direct_way_was_late_itself() -> None:
    late = line("direct", 1, 0, first_ms={"p50": 0.25}, bottleneck=True)
    assert (
        "added_first_ms.p50" not in summaries([late, line("penstock", 1, 1, first_ms={"p50": 1.0})])["json", "penstock"].figures
    )


def test_memory_per_further_stream_is_that_between_the_last_two_levels() -> None:
    lines = [line("penstock", 1, 1, "open", resident_at_mb={"0": 40.0, "200": 50.0, "400": 55.0})]
    assert summaries(lines)["open", "penstock"].figures["kb_per_stream"] == 25.0


@pytest.mark.parametrize(
    ("target", "more", "said_of_it"),
    [
        (Target("", "json", "cpu_us_per_request", 3.0, "smg"), {}, "met"),
        (Target("", "json", "cpu_us_per_request", 1.5, "smg"), {}, "missed"),
        (Target("", "json", "cpu_us_per_request", 31.0), {}, "met"),
        (Target("", "json", "cpu_us_per_request", 30.9), {}, "missed"),
        (Target("", "json", "cpu_us_per_request", 30.9, at_least=True), {"cores": 2, "shares": {"gateway": 0.9}}, "met"),
        (Target("", "json", "cpu_us_per_request", 40.0, at_least=True), {"cores": 2, "shares": {"gateway": 0.9}}, "missed"),
        (Target("", "json", "cpu_us_per_request", 40.0, at_least=True), {"cores": 2, "shares": {"gateway": 1.9}}, "no room"),
        (Target("", "json", "cpu_us_per_request", 1.0, "litellm"), {}, "not measured"),
        (Target("", "burst", "cpu_us_per_request", 1.0), {}, "not measured"),
        (Target("", "json", "cpu_us_per_request", 100.0), {"wrong": 1}, "not valid"),
    ],
)
def test_a_verdict_is_computed(target: Target, more: dict[str, object], said_of_it: str) -> None:
    assert verdict(target, summaries([{**one, **more} for one in LINES])).startswith(said_of_it)


def result(label: str, lines: list[dict[str, object]]) -> dict[str, object]:
    return {
        "label": label, "machine": MACHINE, "commit": "abc", "versions": {"smg": "1"}, "turns": 3, "seconds": 2.0, "lines": lines,
    }  # fmt: skip


def test_the_report_has_figures_ratios_and_verdicts() -> None:
    report = markdown(result("now", LINES))
    assert "| penstock | 31.0 | 1.55 |" in report
    assert "| JSON request, × smg | ≤ 3 | 1.55 | met |" in report
    assert "| 100-chunk burst, × smg | ≤ 0.65 |  | not measured |" in report


def test_the_report_names_wrong_replies_and_a_busy_load_generator() -> None:
    lines = [line("penstock", 1, 1.0, requests_per_s=5, bottleneck=True) | {"wrong": 2, "first_wrong": "half of it"}]
    report = markdown(result("now", lines))
    assert "| 5* |" in report
    assert "penstock: 2 wrong replies: half of it" in report


def test_the_report_says_what_each_middleware_adds_and_whether_a_chunk_costs_the_same() -> None:
    lines = [line(who, 1, cpu, "alone-json") for who, cpu in (("bare", 100.0), ("+cache", 107.25))]
    lines += [line("penstock", 1, 0, f"flat-{streams}", cpu_us_per_chunk=streams / 100) for streams in (100, 5000)]
    report = markdown(result("now", lines))
    assert "| +cache | 107.2 (+7.2) |" in report
    assert "| CPU µs/chunk at open streams | 100 | 5,000 |" in report
    assert "| penstock | 1.00 | 50.00 |" in report


def test_two_runs_are_compared_by_their_medians_and_by_what_the_relay_did_meanwhile() -> None:
    before = [line("relay", 1, 10.0), line("penstock", 1, 31.0)]
    after = [line("relay", 1, 8.0), line("penstock", 1, 15.5)]
    table = compared(result("a", before), result("b", after))
    assert "| json penstock | CPU µs/request | 31.00 | 15.50 | 0.500 | 0.625 |" in table


def test_the_picture_is_well_formed_and_its_bars_are_to_scale_up_to_the_cut() -> None:
    panel = Panel("A <title> & more", "µs", [("smg", 20.0, False), ("Penstock", 40.0, True), ("slow", 4000.0, False)])
    root = ElementTree.fromstring(svg([panel, panel], "caption"))
    drawn = [float(one.get("width", 0)) for one in root.iter("{http://www.w3.org/2000/svg}rect")][1:4]
    assert drawn == [BAR / 2, BAR, BAR + BEYOND]
    assert [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")].count("4,000") == 2
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == 2, "the long bar is visibly cut in each panel"


def test_every_layer_of_the_shipped_config_can_be_measured_alone(tmp_path: Path) -> None:
    """Those that it shows commented out included; and what is measured as `penstock` is what is shipped."""
    document, layers = shipped()
    assert {name(entry) for entry in document["middleware"]} <= set(layers)
    assert {"auth", "limits"} <= set(layers)
    assert set(layers) <= set(TABLE)
    place = place_for(tmp_path, tmp_path)
    for called, entry in layers.items():
        config = load(Path(penstock(place, called, [entry]).command[-1]), {"PENSTOCK_KEY": "sk-0123456789abcdef0123"}, TABLE)
        assert [spec.name for spec in config.middleware] == [called]
    whole = load(Path(penstock(place, "penstock").command[-1]), {}, TABLE)
    assert [spec.name for spec in whole.middleware] == [name(entry) for entry in document["middleware"]]


def test_a_group_of_work_is_chosen_by_its_name() -> None:
    assert list(chosen(["alone", "paced"])) == ["alone-json", "alone-burst", "paced"]
    assert len(chosen(["flat"])) == 5
    assert set(chosen(list(WORKS))) == set(WORKS)
    with pytest.raises(KeyError):
        chosen(["nothing"])


def test_a_text_that_was_merged_on_the_way_is_compared_in_the_pieces_in_which_it_was_said() -> None:
    """Two chunks as one are right where that may be, and only there; a piece that is missing never is."""
    events = said_in_events()
    both = OPENAI.event % (said.word(1) + said.word(2))
    merged = reply(streamed([*events[:2], both, *events[4:]]))
    check(merged, Wanted(COUNT, merged=True), thorough=True)
    with pytest.raises(WrongReply, match="4 content chunks"):
        check(merged, Wanted(COUNT))
    with pytest.raises(WrongReply, match="4 content chunks"):
        check(reply(streamed([*events[:2], *events[3:]])), Wanted(COUNT, merged=True))


def test_as_many_requests_in_a_row_are_alike_as_are_to_share_a_flight() -> None:
    def asked(**fields: int) -> list[bytes]:
        return list(itertools.islice(Job(1, "bench-1-0", **fields).written(), 6))  # type: ignore[arg-type]

    assert len(set(asked())) == 6
    shared = asked(share=3)
    assert shared[0] == shared[2] != shared[3] == shared[5]
    again = asked(distinct=4)
    assert again[:2] == again[4:]
    assert len(set(again)) == 4


def test_a_flight_may_answer_as_many_as_share_it_and_no_more() -> None:
    line = {"ok": 32, "wrong": 0, "first_wrong": None}
    assert verified(dict(line), calls=2, hits=False, share=16)["wrong"] == 0
    assert verified(dict(line), calls=1, hits=False, share=16)["wrong"] == 1


def test_layers_that_are_off_as_shipped_are_put_where_they_belong(tmp_path: Path) -> None:
    """A gateway that has no such layer does not take part."""
    place = place_for(tmp_path, tmp_path)
    for called in ("flights", "resumable", "flights-resumable", "smooth"):
        found = cast(place, [])[called]()
        assert found is not None
        onion = [spec.name for spec in load(Path(found.command[-1]), {}, TABLE).middleware]
        assert [one for one in onion if one not in PLACES] == [name(entry) for entry in shipped()[0]["middleware"]]
        assert all(onion.index(one) < onion.index(PLACES[one]) for one in onion if one in PLACES)
    assert with_layers(place, "none", nothing={}) is None


def test_a_closed_loop_cannot_pass_for_streams_that_are_open_at_once() -> None:
    """How many were open at the same time is counted from first chunks to ends."""
    tally = Tally(3)
    tally.begin()
    tally.begin()
    tally.end(True)
    tally.begin()
    tally.end(True)
    assert (tally.most, tally.over.is_set()) == (2, False)
    tally.end(True)
    assert (tally.open, tally.over.is_set()) == (0, True)


@pytest.mark.skipif(sys.platform != "linux", reason="the bench reads /proc")
def test_the_harness_end_to_end(tmp_path: Path) -> None:
    """Provider, bare gateway and load generator: five right replies of each kind, and a look at streams that are held open."""
    with Stage(place_for(tmp_path, tmp_path), Cores.of_machine()) as stage:
        bare = cast(stage.place, [])["bare"]()
        assert bare is not None
        one = stage.run(bare)
        assert one is not None, (tmp_path / "bare.log").read_text()
        for work in (
            Work("", "bench-5-0", 2, whole=True),
            Work("", "bench-5-2", 2),
            Work("", "bench-5-0", 2, wire="anthropic"),
            Work("", "bench-9999-5", levels=(2, 5)),
            Work("", "bench-20-20", 5, together=True),
        ):
            job = job_of(work, one, stage, 0.1)
            found = stage.load(job if work.levels or work.together else replace(job, requests=5, seconds=0.0))
            assert (found["ok"], found["wrong"]) == (5, 0), found["first_wrong"]
            assert found["cpu_us_per_chunk"] > 0
        assert stage.calls() >= 20
        processes = [stage.provider, one.process]
    assert all(process is not None and process.poll() is not None for process in processes), "what was started has ended"
