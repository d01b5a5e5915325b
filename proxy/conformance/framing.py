"""Cases about framing: the same stream, however it is cut, folded and dressed up on its way from the provider."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise

from proxy.conformance.provider import Answer, Line, head, http_chunk
from proxy.conformance.said import DONE, RICH, ROLE, chunk, event, events, heard, text, usage
from proxy.conformance.trial import Case, Trial, Variant
from proxy.conformance.verdict import Severity, Verdict, intact

ASKED = {"stream_options": {"include_usage": True}}
WRITTEN = [*events([*RICH, usage()]), DONE]
PAYLOAD = b"".join(WRITTEN)
SAID = heard(RICH)
WHOLE = intact(SAID, usage=True)
HEAD = head(200, {"Content_Type": "text/event-stream", "Transfer_Encoding": "chunked"})
WIRE = HEAD + b"".join(map(http_chunk, WRITTEN)) + b"0\r\n\r\n"
PAUSE = 0.003  # long enough for the gateway to read what came before, on a machine that is not overloaded


def pieces(*found: bytes, pause: float = 0.0) -> Answer:
    """The raw bytes of an answer, each piece in a write of its own."""

    async def answer(line: Line) -> None:
        await line.send(*found, pause=pause)

    return answer


def streamed(*payload: bytes, status: int = 200, **headers: str) -> Answer:
    """A chunked event stream, properly ended, one HTTP chunk and one write per piece."""

    async def answer(line: Line) -> None:
        await line.open(status, **headers)
        await line.chunk(*payload)
        await line.end()

    return answer


def sized(payload: bytes, size: int, first: int = 0) -> list[bytes]:
    """`payload` in pieces of `size`, after a first one of `first`."""
    cuts = [0, *range(first or size, len(payload), size), len(payload)]
    return [payload[a:b] for a, b in pairwise(cuts) if a < b]


def over(make: Callable[[], Iterator[Variant]], at_once: int = 24) -> Callable[[Trial], Awaitable[Verdict]]:
    """A case's run that is nothing but its variants."""

    async def run(trial: Trial) -> Verdict:
        return await trial.each(make(), at_once)

    return run


def one(answer: Answer, judge: Callable[..., str | None] = WHOLE, **fields: object) -> Callable[[Trial], Awaitable[Verdict]]:
    """A case's run of one request; asked with usage, unless fields are given."""
    return over(lambda: iter([Variant("", answer, judge, fields or ASKED)]), 1)


def _two_reads() -> Iterator[Variant]:
    for at in range(1, len(WIRE)):
        yield Variant(f"cut at byte {at}", pieces(WIRE[:at], WIRE[at:], pause=PAUSE), WHOLE, ASKED)


def _chunk_boundaries() -> Iterator[Variant]:
    for size in (1, 2, 3, 7, 16):
        for first in range(size):
            cut = sized(PAYLOAD, size, first)
            wire = HEAD + b"".join(map(http_chunk, cut)) + b"0\r\n\r\n"
            yield Variant(f"HTTP chunks of {size} bytes from {first}", pieces(wire), WHOLE, ASKED)


def _small_reads() -> Iterator[Variant]:
    for size in (1, 2, 3, 5, 11, 64):
        yield Variant(f"{size} bytes per read", pieces(*sized(WIRE, size), pause=0.0005), WHOLE, ASKED)


def _characters() -> Iterator[Variant]:
    said = [chunk(ROLE), *text("é", "日本", "👩‍👩‍👧", "\u2028\ufffe", "ж"), chunk(finish="stop")]
    payload, judge = b"".join(events(said)) + DONE, intact(heard(said))
    for at in (n for n in range(1, len(payload)) if payload[n] & 0xC0 == 0x80):
        cut = [http_chunk(payload[:at]), http_chunk(payload[at:]) + b"0\r\n\r\n"]
        yield Variant(f"cut inside the character at byte {at}", pieces(HEAD, *cut, pause=PAUSE), judge)


def _line_ends() -> Iterator[Variant]:
    for name, end in (("CRLF", "\r\n"), ("CR", "\r"), ("LF", "\n")):
        payload = b"".join([*events([*RICH, usage()], end), event("[DONE]", end)])
        yield Variant(name, streamed(payload), WHOLE, ASKED)
        yield Variant(f"{name}, one byte per HTTP chunk", streamed(*sized(payload, 1)), WHOLE, ASKED)
    mixed = [event(found, "\r\n" if number % 2 else "\n") for number, found in enumerate([*RICH, usage()])]
    yield Variant("CRLF and LF in turn", streamed(b"".join(mixed) + DONE), WHOLE, ASKED)


def _dressed() -> Iterator[Variant]:
    def with_each(name: str, dress: Callable[[bytes], bytes]) -> Variant:
        return Variant(name, streamed(*map(dress, WRITTEN)), WHOLE, ASKED)

    yield with_each("comments between events", lambda e: b": ping\n\n" + e + b":\n\n")
    yield with_each("comments within events", lambda e: b": ping\n" + e)
    yield with_each("id, event and retry fields", lambda e: b"id: 7\nevent: message\nretry: 3000\n" + e)
    yield with_each("no space after data:", lambda e: e.replace(b"data: ", b"data:", 1))
    yield with_each("blank lines before events", lambda e: b"\n\n\n" + e)
    yield with_each("JSON over two data: lines", lambda e: e.replace(b',"choices"', b'\ndata: ,"choices"', 1))
    yield Variant("a byte order mark", streamed(b"\xef\xbb\xbf" + PAYLOAD), WHOLE, ASKED)


def _unended() -> Iterator[Variant]:
    yield Variant("no blank line at the very end", streamed(PAYLOAD[:-1]), WHOLE, ASKED)
    yield Variant("no line end at the very end", streamed(PAYLOAD[:-2]), WHOLE, ASKED)


def _http() -> Iterator[Variant]:
    fields = {"Content_Type": "text/event-stream"}
    length = head(200, {**fields, "Content_Length": str(len(PAYLOAD))})
    yield Variant("Content-Length", pieces(length, *WRITTEN, pause=0.001), WHOLE, ASKED)
    yield Variant("the end of the connection", _until_close(head(200, {**fields, "Connection": "close"}) + PAYLOAD), WHOLE, ASKED)
    extended = b"".join(b"%x;name=value\r\n%b\r\n" % (len(e), e) for e in WRITTEN)
    yield Variant("chunk extensions and a trailer", pieces(HEAD + extended + b"0\r\nX-Sum: 1\r\n\r\n"), WHOLE, ASKED)
    yield Variant("charset in the content type", streamed(PAYLOAD, Content_Type="text/event-stream; charset=utf-8"), WHOLE, ASKED)


def _until_close(wire: bytes) -> Answer:
    async def answer(line: Line) -> None:
        await line.send(wire)
        line.hang_up()

    return answer


CASES = (
    Case(
        "split-reads", f"the same stream, cut in two reads at each of its {len(WIRE) - 1} bytes", Severity.LOSS,
        "networks cut anywhere: in a chunk size, in a line end, in a character", over(_two_reads, 40),
    ),
    Case(
        "split-chunks", "the same stream, whatever the boundaries of its HTTP chunks", Severity.LOSS,
        "an HTTP chunk is no event; servers and proxies choose the boundaries", over(_chunk_boundaries),
    ),
    Case(
        "split-small", "the same stream in reads of one byte and a few", Severity.LOSS,
        "slow and lossy lines deliver like this", over(_small_reads),
    ),
    Case(
        "split-none", "the same stream in a single read", Severity.LOSS,
        "fast providers and buffers on the way deliver like this", one(pieces(WIRE)),
    ),
    Case(
        "utf8-cut", "characters that are cut in two across reads arrive whole", Severity.LOSS,
        "a decoder per read turns them into replacement characters", over(_characters),
    ),
    Case(
        "line-ends", "CRLF, CR and LF are all line ends", Severity.LOSS,
        "the SSE standard has all three, and providers use them", over(_line_ends),
    ),
    Case(
        "dressed", "comments, other fields, split data: lines and odd blanks change nothing", Severity.LOSS,
        "the SSE standard allows all of it; pings are everyday", over(_dressed),
    ),
    Case(
        "last-blank", "a last event that lacks its blank line arrives with it", Severity.SHAPE,
        "by the standard an event without it is thrown away", over(_unended),
    ),
    Case(
        "http-framing", "the same stream by Content-Length, by the connection's end, with extensions and trailers", Severity.LOSS,
        "providers and the proxies in front of them frame bodies in every way HTTP has", over(_http),
    ),
)  # fmt: skip
