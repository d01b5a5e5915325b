"""What counts as right: the judgement rules that the cases share.

Two rules carry most of it. A stream that the provider completed reaches the client whole, in order and as valid SSE. A stream
that did not complete never looks complete: no `[DONE]`, no finish reason, and something that a client cannot overlook, which is
an error event, an HTTP status of 400 or more, or an HTTP body that ends as no proper body ends.
The one rule of the module: a judgement returns the first thing that is wrong in words, None where nothing is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from proxy.conformance.client import Received
from proxy.conformance.said import USAGE, Heard, difference, heard, prefix_of

Json = dict[str, Any]
Judge = Callable[[Received], "str | None"]


class Severity(StrEnum):
    """What a failure does to the client: LIE it is told something untrue, LOSS it lacks something, LEAK something is left open
    or mixed up, SHAPE its parser trips, COST it pays in time or money."""

    LIE = "lie"
    LOSS = "loss"
    LEAK = "leak"
    SHAPE = "shape"
    COST = "cost"


class Result(StrEnum):
    PASS = "pass"  # noqa: S105 - no password
    FAIL = "FAIL"
    NOT_JUDGED = "n.a."
    MEASURED = "info"


@dataclass(frozen=True)
class Verdict:
    """figures: what was measured, for the JSON."""

    result: Result
    detail: str = ""
    figures: Json = field(default_factory=dict)


class NotJudged(Exception):
    """Raised by a judge: this gateway cannot be asked this, and why."""


def heard_of(received: Received) -> Heard:
    found = heard(())
    for event in received.events:
        found.add(event.text, event.name)
    return found


def message_of(received: Received) -> str | None:
    """The text of an error envelope `{"error": {"message": …}}`; None where there is none."""
    body = received.json
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) and message else None


def how(received: Received) -> str:
    """How a client learns what became of its request, for the details."""
    if received.status >= 400:
        return f"status {received.status}"
    found = heard_of(received)
    if found.errors:
        return "error event"
    if received.end != "clean":
        return {"cut": "unclean end", "reset": "reset", "open": "no end", "none": "no answer"}[received.end]
    return "complete" if found.done else "clean end"


def intact(said: Heard, *, usage: bool | None = None, done: bool = True) -> Judge:
    """The whole stream, as it was said. usage: must be there, must not, or None for either. done: `[DONE]` must be there."""

    def judge(received: Received) -> str | None:
        got = heard_of(received)
        return (
            _as_stream(received, got)
            or difference(said, got)
            or (f"[DONE] came {got.done} times" if got.done > 1 or (done and not got.done) else None)
            or _usage(got, usage)
        )

    return judge


def _as_stream(received: Received, got: Heard) -> str | None:
    """What is wrong with a complete stream before its content is looked at."""
    if received.status != 200:
        return f"{how(received)}: {message_of(received) or received.faults[:1] or received.body[:80]!r}"
    if not received.streamed:
        return f"content type {received.headers.get('content-type')!r}"
    if got.errors:
        return f"an error event: {str(got.errors[0])[:120]}"
    if received.end != "clean":
        return f"{how(received)} of a stream that the provider completed"
    if got.after_done:
        return f"{got.after_done} events after [DONE]"
    return next(iter([*received.faults, *got.stumbles]), None)


def _usage(got: Heard, wanted: bool | None) -> str | None:
    if wanted is False and (got.usages or any(not chunk["choices"] for chunk in got.chunks)):
        return "a usage chunk that was not asked for"
    if wanted and not got.usages:
        return "usage was asked for and is missing"
    if wanted and any(got.usages[-1].get(name) != count for name, count in USAGE.items() if isinstance(count, int)):
        return f"usage {got.usages[-1]}"
    return None


def broken(said: Heard) -> Judge:
    """A stream that did not complete, and does not look complete. said: all that the provider could have said."""

    def judge(received: Received) -> str | None:
        if received.end == "open":
            return "no end within the time limit"
        if received.status >= 400 or received.end == "none":
            return None
        got = heard_of(received)
        return _lie(got) or _silent(received, got) or next(iter(got.stumbles), None) or prefix_of(said, got)

    return judge


def _lie(got: Heard) -> str | None:
    claims = (["[DONE]"] if got.done else []) + [f"finish_reason {c.finish[0]!r}" for c in got.choices.values() if c.finish]
    told = " (beside an error event)" if got.errors else ""
    return f"looks complete: {' and '.join(claims)}{told}" if claims else None


def _silent(received: Received, got: Heard) -> str | None:
    if got.errors or received.end != "clean":
        return None
    return "ends cleanly, with no error: clients take it for the end" if received.streamed else f"200 with {received.body[:60]!r}"


def whole_or_told(said: Heard) -> Judge:
    """Either is right: the whole stream, or something that a client cannot overlook."""
    whole = intact(said, done=False)

    def judge(received: Received) -> str | None:
        if received.end == "open":
            return "no end within the time limit"
        told = received.status >= 400 or received.end != "clean" or heard_of(received).errors
        return None if told else whole(received)

    return judge


def never_passed_on(judge: Judge) -> Judge:
    """`judge`, with words of its own for a malformed event that reached the client."""

    def stricter(received: Received) -> str | None:
        bad = next(iter([*received.faults, *heard_of(received).stumbles]), None)
        return f"passed on: {bad}" if bad and received.end == "clean" else judge(received)

    return stricter


def enveloped(received: Received) -> str | None:
    """An error status comes with OpenAI's envelope. Raises NotJudged for anything else."""
    if received.status < 400:
        raise NotJudged("this gateway has no error statuses of its own for a broken reply")
    return None if message_of(received) else f"status {received.status} with {received.body[:80]!r}"


def unless_open(judge: Judge) -> Judge:
    """No end within the limit is no judgement: the gateway may have a longer timeout than we wait."""

    def patient(received: Received) -> str | None:
        if received.end == "open":
            raise NotJudged("no end within --stall-limit; is there a timeout for it in the gateway?")
        return judge(received)

    return patient


def refused(statuses: tuple[int, ...], message: str | None, header: tuple[str, str] | None = None) -> Judge:
    """An HTTP error with an envelope. statuses: those that are right; message: must be within the envelope's message."""

    def judge(received: Received) -> str | None:
        if received.status not in statuses:
            return f"status {received.status} instead of {' or '.join(map(str, statuses))}"
        found = message_of(received)
        if found is None:
            return f"no error envelope: {received.body[:80]!r}"
        if message is not None and message not in found:
            return f"the message is {found[:80]!r}"
        if header and received.headers.get(header[0]) != header[1]:
            return f"{header[0]} is {received.headers.get(header[0])!r} instead of {header[1]!r}"
        return None

    return judge
