"""Cases about what goes wrong: streams that break off, providers that fail, and what the client is told of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

import orjson

from proxy.conformance.client import Received
from proxy.conformance.content import STOP
from proxy.conformance.framing import SAID, over, streamed
from proxy.conformance.provider import Answer, Line, head
from proxy.conformance.said import DONE, RICH, chunk, event, events, text
from proxy.conformance.trial import Case, Trial, Variant
from proxy.conformance.verdict import (
    Judge,
    Severity,
    Verdict,
    broken,
    enveloped,
    how,
    never_passed_on,
    refused,
    unless_open,
    whole_or_told,
)  # fmt: skip

WRITTEN = events(RICH)
BROKEN = broken(SAID)
LATE = whole_or_told(SAID)
FIRST = WRITTEN[:6]  # some text has been said
Ending = Callable[[Line], Awaitable[None]]
Run = Callable[[Trial], Awaitable[Verdict]]


def breaking(before: Sequence[bytes], ending: Ending, after: bytes = b"") -> Answer:
    """These events, then some more bytes, then an ending of its own kind."""

    async def answer(line: Line) -> None:
        await line.open()
        await line.chunk(*before)
        if after:
            await line.chunk(after)
        await ending(line)

    return answer


async def fin(line: Line) -> None:
    line.hang_up()


async def rst(line: Line) -> None:
    line.reset()


async def clean(line: Line) -> None:
    await line.end()


async def stall(line: Line) -> None:
    await line.silence()


def at_every_event(ending: Ending) -> Callable[[], Iterator[Variant]]:
    """After each event before the one with the finish reason, none included."""

    def variants() -> Iterator[Variant]:
        for count in range(len(WRITTEN)):
            yield Variant(f"after {count} events", breaking(WRITTEN[:count], ending), BROKEN)

    return variants


def _inside() -> Iterator[Variant]:
    for count, written in enumerate(WRITTEN):
        for at in (3, len(written) // 2, len(written) - 2):
            script = breaking(WRITTEN[:count], fin, written[:at])
            judge = LATE if count == len(WRITTEN) - 1 and at == len(written) - 2 else BROKEN
            yield Variant(f"inside event {count}, after {at} bytes", script, judge)


def _unframed() -> Iterator[Variant]:
    start = head(200, {"Content_Type": "text/event-stream", "Connection": "close"})
    for count in range(len(WRITTEN)):

        async def answer(line: Line, count: int = count) -> None:
            await line.send(start + b"".join(WRITTEN[:count]))
            line.hang_up()

        yield Variant(f"after {count} events", answer, BROKEN)


def _after_finish() -> Iterator[Variant]:
    for name, ending in (("FIN", fin), ("RST", rst)):
        yield Variant(f"{name} after the finish reason", breaking(WRITTEN, ending), LATE)
        yield Variant(f"{name} after [DONE]", breaking([*WRITTEN, DONE], ending), LATE)


ERROR = {"error": {"message": "conformance broke", "type": "server_error", "param": None, "code": "server_error"}}
ERRORS = (
    ("OpenAI", event(ERROR)),
    ("vLLM", event({"object": "error", "message": "conformance broke", "type": "InternalServerError", "code": 500})),
    ("event: error", b"event: error\n" + event(ERROR)),
    ("with choices", event({**chunk(finish="error"), **ERROR})),
    ("bare JSON line", orjson.dumps(ERROR) + b"\n\n"),
)


def _error_events(before: Sequence[bytes], after: bytes = b"") -> Callable[[], Iterator[Variant]]:
    def variants() -> Iterator[Variant]:
        for name, written in ERRORS:
            yield Variant(name, breaking(before, clean, written + after), BROKEN)

    return variants


def _malformed() -> Iterator[Variant]:
    whole = event(text("lost")[0])
    for name, bad in (
        ("half an object", whole[:40] + b"\n\n"),
        ("no JSON", b"data: oops\n\n"),
        ("bad UTF-8", b'data: {"a":"\xff"}\n\n'),
    ):
        yield Variant(name, streamed(*FIRST, bad, *events([*text("more"), STOP]), DONE), never_passed_on(BROKEN))


HTML = b"<!doctype html><html><body>502 Bad Gateway</body></html>"


def _not_a_stream() -> Iterator[Variant]:
    for name, kind in (("text/html", "text/html"), ("as an event stream", "text/event-stream")):
        yield Variant(f"HTML, {name}", _whole(HTML, Content_Type=kind), BROKEN)
    yield Variant("JSON error, application/json", _whole(orjson.dumps(ERROR)), BROKEN)
    yield Variant("an empty body", _whole(b"", Content_Type="text/event-stream"), BROKEN)


def _whole(body: bytes, status: int = 200, **headers: str) -> Answer:
    async def answer(line: Line) -> None:
        await line.whole(body, status, **headers)

    return answer


def _stalls(before: Sequence[bytes], opened: bool = True) -> Run:
    async def run(trial: Trial) -> Verdict:
        script = breaking(before, stall) if opened else stall
        judge = unless_open(BROKEN)
        return await trial.each([Variant("", script, judge, limit=trial.setting.stall_limit)], 1)

    return run


def _statuses(*rows: tuple[int, tuple[int, ...]], word: bool = True, header: tuple[str, str] | None = None) -> Run:
    def variants() -> Iterator[Variant]:
        for status, right in rows:
            message = f"conformance says {status}"
            error = {"message": message, "type": "some_error", "param": None, "code": "some_code"}
            headers = {header[0].replace("-", "_"): header[1]} if header else {}
            script = _whole(orjson.dumps({"error": error}), status, **headers)
            judge = refused(right, message if word else None, header)
            yield Variant(f"{status}, streamed", script, judge)
            yield Variant(f"{status}, whole", script, judge, {"stream": False})

    return over(variants)


def _not_json() -> Iterator[Variant]:
    for status in (400, 502):
        yield Variant(f"{status}, HTML", _whole(HTML, status, Content_Type="text/html"), refused((status, 502), None))
        yield Variant(f"{status}, empty", _whole(b"", status), refused((status, 502), None))


def _whole_failed(received: Received) -> str | None:
    if received.status >= 400 or received.end != "clean":
        return None
    return f"{how(received)}, status {received.status}: {received.body[:60]!r}"


def _whole_cuts(judge: Judge = _whole_failed) -> Iterator[Variant]:
    wire = head(200, {"Content_Type": "application/json", "Content_Length": "400"})

    async def short(line: Line) -> None:
        await line.send(wire + b'{"id": "x", "choices": [')
        line.hang_up()

    fields = {"stream": False}
    yield Variant("cut", short, judge, fields)
    yield Variant("half a JSON", _whole(b'{"id": "x", "choices": ['), judge, fields)
    yield Variant("HTML", _whole(HTML, Content_Type="text/html"), judge, fields)
    yield Variant("an error in a 200", _whole(orjson.dumps(ERROR)), judge, fields)


LIE, LOSS, SHAPE = Severity.LIE, Severity.LOSS, Severity.SHAPE
CUT = "a cut answer that looks complete is saved, billed and acted on"
CASES = (
    Case("cut-fin", "a FIN after any event never looks like an end", LIE, CUT, over(at_every_event(fin))),
    Case("cut-rst", "a reset after any event never looks like an end", LIE, CUT, over(at_every_event(rst))),
    Case("cut-inside", "a FIN inside an event never looks like an end, and no half event is passed on", LIE, CUT, over(_inside)),
    Case("cut-clean", "a clean HTTP end without a finish reason never looks like an end", LIE,
         "a proxy before the provider turns cuts into clean ends", over(at_every_event(clean))),
    Case("cut-unframed", "where only the connection's end is the end, one without a finish reason is none", LIE,
         "HTTP/1.0-style framing cannot tell a cut from an end; the format can", over(_unframed)),
    Case("cut-late", "a cut after the finish reason is an end or an error, never half of each", LOSS,
         "usage may be missing, the answer is not", over(_after_finish)),
    Case("error-first", "an error event before any text is an error", LIE, "rate limits and overload come like this",
         over(_error_events(WRITTEN[:1]))),
    Case("error-middle", "an error event after some text is an error", LIE, CUT, over(_error_events(FIRST))),
    Case("error-done", "an error event that is followed by [DONE] is no end", LIE,
         "several servers write [DONE] whatever happened", over(_error_events(FIRST, DONE))),
    Case("malformed", "an event that is no JSON is neither dropped nor passed on", LOSS,
         "dropped it is lost text, passed on it crashes the client's parser", over(_malformed)),
    Case("not-a-stream", "a 200 that is no stream is an error", LIE, "an empty answer is taken for the model's",
         over(_not_a_stream)),
    Case("stall-head", "a provider that never answers is an error in the end", LIE, "a client waits for ever",
         _stalls((), opened=False)),
    Case("stall-first", "a stream that never says anything is an error in the end", LIE, "a client waits for ever", _stalls(())),
    Case("stall-middle", "a stream that falls silent is an error in the end, no clean one", LIE, CUT, _stalls(FIRST)),
    Case("status-4xx", "400, 404 and 422 keep their status and message", LIE, "the client must learn that it is its own fault",
         _statuses((400, (400,)), (404, (404,)), (422, (422,)))),
    Case("status-401", "a refusal of the gateway's own key is an error (401, 403 or a 5xx)", LIE,
         "it is the operator's key, not the client's", _statuses((401, (401, 403, 500, 502, 503)), word=False)),
    Case("status-429", "a 429 keeps its status, message and Retry-After", LOSS, "clients back off by it",
         _statuses((429, (429,)), header=("retry-after", "120"))),
    Case("status-5xx", "500 and 503 stay a 5xx with their message", LIE, "clients retry by it",
         _statuses((500, (500, 502)), (503, (503, 502)))),
    Case("status-no-json", "an error whose body is no JSON gets an envelope", SHAPE, "SDKs read the envelope", over(_not_json)),
    Case("whole-broken", "a whole reply that is cut, no JSON or an error is an error", LIE, "it would be parsed as an answer",
         over(_whole_cuts)),
    Case("own-envelope", "the gateway's own errors come in OpenAI's envelope too", SHAPE, "SDKs read the envelope",
         over(lambda: _whole_cuts(enveloped))),
)  # fmt: skip
