"""The conformance kit passes us whole, and fails every gateway that lies: each lie is a tiny gateway of its own here."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conformance import report
from proxy.conformance.client import Endpoint, Received
from proxy.conformance.framing import PAYLOAD
from proxy.conformance.provider import Line, Provider, http_chunk
from proxy.conformance.run import CASES, Unreachable, chosen, run
from proxy.conformance.said import DONE, RICH, Heard, chunk, difference, event, events, heard, prefix_of, text, tool
from proxy.conformance.sse import SseReader
from proxy.conformance.trial import Setting
from proxy.conformance.verdict import Result, broken, intact

ROOT = Path(__file__).parent.parent
Json = dict[str, Any]


def test_our_own_gateway_with_the_shipped_middleware_passes_every_case(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "proxy", "conformance", "--self", "-c", str(ROOT / "config.yaml"), "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(found.read_text())["cases"]
    assert [row["id"] for row in rows] == [case.id for case in CASES]
    assert {row["id"] for row in rows if row["result"] != "pass"} == {"latency-chunk", "latency-first"}
    assert "stumbled" not in done.stdout


# Gateways that relay bytes, each with one fault.


class Relay:
    """An honest one: a request in, the provider's bytes out, re-chunked as they come; an unclean end stays one.

    url: the provider's, without a path. A liar overrides what it lies about.
    """

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
        self.upstream = int(port)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await _message(reader)
            theirs, ours = await asyncio.open_connection(self.host, self.upstream)
            try:
                ours.write(request)
                await self.until_over(asyncio.ensure_future(self.relay(theirs, writer)), reader)
            finally:
                ours.close()

    async def until_over(self, relaying: asyncio.Future[None], reader: asyncio.StreamReader) -> None:
        """Until the reply is relayed, or the client has left."""
        leaving = asyncio.ensure_future(reader.read(1))
        both: set[asyncio.Future[Any]] = {relaying, leaving}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        relaying.cancel()
        leaving.cancel()
        await asyncio.gather(relaying, leaving, return_exceptions=True)

    async def relay(self, theirs: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await theirs.readuntil(b"\r\n\r\n")
        writer.write(head)
        if b"chunked" not in head:
            writer.write(await theirs.read())
            return
        try:
            async for piece in _chunks(theirs):
                await self.piece(piece, writer)
            await self.end(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            await self.cut(writer)

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http_chunk(piece))
        await writer.drain()

    async def end(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"0\r\n\r\n")

    async def cut(self, writer: asyncio.StreamWriter) -> None:
        """Nothing: the client's connection ends without the last chunk."""


class AddsDone(Relay):
    """Ends a cut stream as if it were whole."""

    async def cut(self, writer: asyncio.StreamWriter) -> None:
        writer.write(http_chunk(DONE) + b"0\r\n\r\n")


class EndsQuietly(Relay):
    """Ends a cut stream with a clean HTTP end and not a word."""

    async def cut(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"0\r\n\r\n")


class Buffers(Relay):
    """Collects the stream, and sends it at the end."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.held = b""

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        self.held += piece

    async def end(self, writer: asyncio.StreamWriter) -> None:
        writer.write(http_chunk(self.held) + b"0\r\n\r\n")
        self.held = b""


class DecodesReads(Relay):
    """Decodes each read by itself, so that a character cut in two becomes replacement characters."""

    async def relay(self, theirs: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while read := await theirs.read(2**16):
            writer.write(read.decode(errors="replace").encode())
            await writer.drain()


class ParsesReads(Relay):
    """Takes each HTTP chunk for whole events, and drops what is not."""

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        for part in piece.split(b"\n\n"):
            if part.startswith(b"data: ") and (part.endswith(b"}") or part == b"data: [DONE]"):
                await super().piece(part + b"\n\n", writer)


class KnowsOnlyLf(Relay):
    """Lets CRLF through as text: a blank line is none."""

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        await super().piece(piece.replace(b"\r", b"?"), writer)


class StopsAtDone(Relay):
    """Looks for [DONE] anywhere in the bytes."""

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        await super().piece(piece.partition(b"[DONE]")[0], writer)


class NeverClosesUpstream(Relay):
    """Does not look whether its client is still there."""

    async def until_over(self, relaying: asyncio.Future[None], reader: asyncio.StreamReader) -> None:
        await asyncio.gather(relaying, return_exceptions=True)


class MixesStreams(Relay):
    """Writes to whoever came last."""

    last: asyncio.StreamWriter | None = None

    async def relay(self, theirs: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.last = writer
        await super().relay(theirs, writer)

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await super().piece(piece, self.last or writer)


class SaysStop(Relay):
    """Every finish reason is `stop`."""

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        await super().piece(piece.replace(b'"length"', b'"stop"').replace(b'"tool_calls"}', b'"stop"}'), writer)


class KnowsItsFields(Relay):
    """Drops what it does not know."""

    async def piece(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        for name in (b'"logprobs"', b'"x_delta"', b'"reasoning_content"', b'"usage"'):
            piece = piece.replace(name, b'"dropped"')
        await super().piece(piece, writer)


class AlwaysOk(Relay):
    """Every status is 200."""

    async def relay(self, theirs: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await theirs.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + head.partition(b"\r\n")[2] + await theirs.read())


LIES: list[tuple[type[Relay], tuple[str, ...]]] = [
    (AddsDone, ("cut-fin", "cut-rst", "cut-inside")),
    (EndsQuietly, ("cut-fin", "cut-rst")),
    (Buffers, ("lock-step", "lock-step-tools")),
    (DecodesReads, ("utf8-cut", "split-small", "split-reads")),
    (ParsesReads, ("split-chunks",)),
    (KnowsOnlyLf, ("line-ends",)),
    (StopsAtDone, ("quoted",)),
    (NeverClosesUpstream, ("cancel-silent", "cancel-first", "cancel-whole")),
    (MixesStreams, ("concurrent",)),
    (SaysStop, ("finish-reason",)),
    (KnowsItsFields, ("logprobs", "unknown-fields", "reasoning", "usage")),
    (AlwaysOk, ("status-4xx", "status-5xx", "status-429")),
]


@pytest.mark.parametrize(("liar", "cases"), LIES, ids=[liar.__name__ for liar, _ in LIES])
async def test_the_kit_finds_the_lie(liar: type[Relay], cases: tuple[str, ...]) -> None:
    assert await judged(liar, cases) == dict.fromkeys(cases, Result.FAIL)


async def test_an_honest_relay_passes_the_cases_that_find_the_lies() -> None:
    """So each of them fails because of its lie, and not because it is no full gateway."""
    cases = tuple(sorted({case for _, cases in LIES for case in cases}))
    assert await judged(Relay, cases) == dict.fromkeys(cases, Result.PASS)


async def test_a_pass_through_fails_what_only_a_gateway_can_mend() -> None:
    cases = (
        "cut-clean",
        "cut-unframed",
        "not-a-stream",
        "error-done",
        "malformed",
        "tool-call-index",
        "choice-index",
        "role-odd",
    )
    assert await judged(Relay, cases) == dict.fromkeys(cases, Result.FAIL)


async def test_a_stall_without_a_timeout_in_the_gateway_is_not_judged() -> None:
    assert await judged(Relay, ("stall-first", "stall-middle")) == {
        "stall-first": Result.NOT_JUDGED,
        "stall-middle": Result.NOT_JUDGED,
    }


async def judged(relay: type[Relay], cases: tuple[str, ...]) -> dict[str, Result]:
    """The results of these cases for a gateway that is this relay."""
    async with Provider() as provider, listening(relay(provider.url)) as url:
        found = await run(chosen(cases, ()), _setting(provider, url), lambda line: None)
        assert provider.faults == []
    return {case.id: verdict.result for case, verdict in found}


def _setting(provider: Provider, url: str) -> Setting:
    return Setting(Endpoint(url, limit=10.0), provider, "test", "{model}", stall_limit=0.3, cancel_limit=1.0)


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    tasks: set[asyncio.Task[Any]] = set()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(asyncio.CancelledError):  # Python 3.11 logs it otherwise
            try:
                await serve(reader, writer)
            finally:
                writer.close()

    server = await asyncio.start_server(served, "127.0.0.1", 0, limit=2**23)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A request with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + await reader.readexactly(length)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


# The checker's own eyes.


@given(st.lists(st.integers(min_value=1, max_value=len(PAYLOAD) - 1), max_size=30), st.sampled_from(["\n", "\r\n", "\r"]))
def test_the_reader_sees_the_same_events_in_any_split(cuts: list[int], end: str) -> None:
    payload = b"".join(events(RICH, end)) + event("[DONE]", end)
    reader, texts = SseReader(), list[str]()
    edges = [0, *sorted(set(cuts)), len(payload)]
    for start, stop in pairwise(edges):
        texts += [found.text for found in reader.feed(payload[start:stop])]
    texts += [found.text for found in reader.close()]
    assert [json.loads(found) for found in texts[:-1]] == RICH
    assert texts[-1] == "[DONE]"
    assert reader.faults == []


@pytest.mark.parametrize("body", [b"data: a", b"data: a\n", b'data: "\xff"\n\n', b'{"error": 1}\n\n'])
def test_the_reader_notes_what_is_no_sse(body: bytes) -> None:
    reader = SseReader()
    reader.feed(body)
    reader.close()
    assert reader.faults


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([*text("ab"), chunk(finish="stop")], "text differs at 1"),
        ([*text("a"), chunk(finish="length")], "finish_reason"),
        ([*text("a")], "finish_reason"),
        ([*text("a"), chunk({"reasoning_content": "x"}), chunk(finish="stop")], "reasoning"),
        ([*text("a"), tool(0, "{}", "i", "f"), chunk(finish="stop")], "1 tool calls instead of 0"),
        ([*text("a"), *text("b", index=1), chunk(finish="stop")], "choices [0, 1]"),
    ],
)
def test_a_difference_is_told_in_words(chunks: list[Json], words: str) -> None:
    assert words in str(difference(heard([*text("a"), chunk(finish="stop")]), heard(chunks)))


def test_what_was_never_said_is_no_prefix() -> None:
    said = heard(text("abc"))
    assert prefix_of(said, heard(text("ab"))) is None
    assert prefix_of(said, heard(text("ax"))) is not None
    assert prefix_of(said, heard(text("a", index=1))) is not None


@pytest.mark.parametrize(
    ("body", "end", "right"),
    [
        (events(text("a")), "cut", True),
        ([*events(text("a")), event({"error": {"message": "m"}})], "clean", True),
        (events(text("a")), "clean", False),
        ([*events(text("a")), DONE], "cut", False),
        ([*events(text("a")), event({"error": {"message": "m"}}), DONE], "clean", False),
        (events([*text("a"), chunk(finish="stop")]), "cut", False),
        (events(text("x")), "cut", False),
        (events(text("a")), "open", False),
    ],
    ids=[
        "unclean end",
        "error event",
        "silent end",
        "[DONE] and a cut",
        "[DONE] after an error",
        "finish reason",
        "invented",
        "open",
    ],
)
def test_the_rule_for_broken_streams(body: list[bytes], end: str, right: bool) -> None:
    assert (broken(heard(text("abc")))(_received(body, end)) is None) is right


@pytest.mark.parametrize(
    "body",
    [
        events([*text("a"), chunk(finish="stop")]),
        [*events([*text("a"), chunk(finish="stop")]), DONE, DONE],
        [*events([*text("a"), chunk(finish="stop")]), DONE, *events(text("b"))],
    ],
    ids=["no [DONE]", "two [DONE]", "more after [DONE]"],
)
def test_the_rule_for_whole_streams(body: list[bytes]) -> None:
    said: Heard = heard([*text("a"), chunk(finish="stop")])
    assert intact(said)(_received([*events([*text("a"), chunk(finish="stop")]), DONE], "clean")) is None
    assert intact(said)(_received(body, "clean"))


def _received(body: list[bytes], end: str) -> Received:
    reader = SseReader()
    found = [one for piece in body for one in reader.feed(piece)] + reader.close()
    return Received(200, {"content-type": "text/event-stream"}, end, found, faults=reader.faults)


@pytest.mark.parametrize(
    ("wire", "end"),
    [
        (b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\nok", "clean"),
        (b"HTTP/1.1 200 X\r\nContent-Length: 3\r\n\r\nok", "cut"),
        (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "clean"),
        (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", "cut"),
        (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nok\r\n0\r\n\r\n", "cut"),
        (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\noops\r\n", "cut"),
        (b"HTTP/1.1 103 X\r\n\r\nHTTP/1.1 200 X\r\n\r\nok", "clean"),
        (b"HTTP/1.1 200", "none"),
        (b"", "none"),
    ],
)
async def test_how_a_body_ended_is_seen(wire: bytes, end: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _message(reader)
        writer.write(wire)

    async with listening(serve) as url:
        assert (await Endpoint(url, limit=5.0).ask({"model": "m"})).end == end


async def test_a_gateway_that_is_not_there_or_points_elsewhere_is_said_once() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _message(reader)
        writer.write(b"HTTP/1.1 404 X\r\nContent-Length: 7\r\n\r\nno such")

    async with Provider() as provider:
        with pytest.raises(Unreachable, match="cannot connect"):
            await run(CASES, _setting(provider, "http://127.0.0.1:9/v1"), lambda line: None)
        async with listening(serve) as url:
            with pytest.raises(Unreachable, match="404: no such"):
                await run(CASES, _setting(provider, url), lambda line: None)


async def test_the_provider_lists_models_and_refuses_unknown_cases() -> None:
    async with Provider() as provider:
        endpoint = Endpoint(provider.url, limit=5.0)
        assert (await endpoint.ask({"model": "conf-unknown"})).status == 404
        reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in await reader.readline()
        writer.close()


async def test_a_script_that_fails_is_told() -> None:
    """The kit's own mistake must not pass for the gateway's."""

    async def fails(line: Line) -> None:
        raise ZeroDivisionError

    async with Provider() as provider:
        setting = _setting(provider, provider.url)
        from proxy.conformance.trial import Trial

        await Trial("x", setting).ask(fails, 0.2)
        assert provider.faults == ["ZeroDivisionError()"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "proxy", "conformance", *arguments]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_without_a_gateway_it_says_how_to_set_one_up() -> None:
    done = command("--provider-listen", "127.0.0.1:9555")
    assert done.returncode == 0
    assert "http://127.0.0.1:9555/v1" in done.stdout


def test_the_exit_status_tells_wrong_usage_and_no_gateway() -> None:
    assert command("--url", "http://127.0.0.1:9/v1", "--only", "no-such-case").returncode == 2
    done = command("--url", "http://127.0.0.1:9/v1", "--provider-listen", "127.0.0.1:0", "--wait", "0")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_wrong_option_is_a_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("prot: 1")
    gateway = ("--url", "http://127.0.0.1:9/v1")
    for wrong in (
        (*gateway, "--provider-listen", "nowhere"), (*gateway, "--body", "[1"), (*gateway, "--header", "x"),
        ("--url", "127.0.0.1:80"),
        ("--self", "-c", str(tmp_path / "c.yaml")),
    ):  # fmt: skip
        done = command(*wrong)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), wrong


def test_list_names_every_case_once() -> None:
    lines = command("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [case.id for case in CASES]
    assert len({case.id for case in CASES}) == len(CASES)


def test_the_page_has_a_row_for_every_judged_case() -> None:
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert [case.id for case in CASES if f"| `{case.id}` |" not in page] == ["latency-chunk", "latency-first"]


def test_globs_choose() -> None:
    assert {case.id for case in chosen(["cut-*"], ["cut-r*"])} == {
        "cut-fin",
        "cut-inside",
        "cut-clean",
        "cut-unframed",
        "cut-late",
    }


async def test_a_failure_is_an_exit_status_of_1_and_says_how_grave_it_is() -> None:
    async with Provider() as provider, listening(AddsDone(provider.url)) as url:
        found = await run(chosen(["cut-fin", "split-none"], ()), _setting(provider, url), lambda line: None)
    assert report.status(found) == 1
    assert report.summary(found) == "1 pass, 1 FAIL (lie 1)"
    assert any("looks complete: [DONE]" in line for line in report.table(found))
    assert report.as_json(found, {})["summary"] == {"pass": 1, "FAIL": 1}
