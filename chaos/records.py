"""What was seen on each side: the client's, the provider's, the gateway's own word.

The one rule: facts only; what must hold between them is said in `invariants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass
class Heard:
    """What a client got for one request, over all lines that it read it on. asked: the request's id.

    end: clean (as HTTP wants it) | cut | left (by the client itself) | open (never) | none (no answer). dropped: this client gave
    the gateway a reason to hang up. must_finish: it came back until it had all of it. finishes: finish reasons in their order,
    natives: the provider's own words for them. error: its code, from an error chunk or an envelope.
    """

    asked: str
    question: str
    behaviour: str = "read"
    status: int = 0
    text: str = ""
    streamed: bool = True
    finishes: list[str] = field(default_factory=list)
    natives: list[str] = field(default_factory=list)
    done: bool = False
    error: str | None = None
    end: str = "none"
    cache: str = ""
    lines: int = 1
    dropped: bool = False
    must_finish: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def truncated(self) -> bool:
        """The gateway ended it on purpose, and says so."""
        return any(native.startswith("penstock:") for native in self.natives)

    @property
    def completed(self) -> bool:
        return self.status == 200 and self.error is None and (self.done or (not self.streamed and self.end == "clean"))


@dataclass
class Called:
    """One call that the provider got. said: characters of the question's text that it may have written, from the start.

    ended: it wrote its own end. open: it is still being answered.
    """

    question: str
    attempt: int = 0
    said: int = 0
    ended: bool = False
    open: bool = True


@dataclass(frozen=True)
class State:
    """The gateway from outside and from inside, while nothing is going on. gauges: those that must be 0. requests: the sum of
    penstock_requests_total. tasks: asyncio's. files: open ones. resident: bytes."""

    gauges: Mapping[str, float] = field(default_factory=dict)
    requests: int = 0
    tasks: int = 0
    names: Mapping[str, int] = field(default_factory=dict)
    files: int = 0
    resident: int = 0


@dataclass(frozen=True)
class Evidence:
    """All that was seen. text: what a question's answer is. lines: the gateway's `request` lines. lines_at_rest: how many there
    were at `after`. before: at rest after the warm-up; after: at rest after the storm; unfinished: calls open at the provider
    then. reloads: (wanted, made, refused ones wanted, made). drained: those that were open at SIGTERM and cannot have finished.
    exit: the gateway's status. words: what it logged as errors. faults: of the run itself."""

    text: Callable[[str], str]
    heard: Sequence[Heard] = ()
    called: Sequence[Called] = ()
    lines: Sequence[Json] = ()
    lines_at_rest: int = 0
    before: State = field(default_factory=State)
    after: State = field(default_factory=State)
    unfinished: int = 0
    reloads: tuple[int, int] | None = None
    drained: Sequence[Heard] = ()
    exit: int | None = 0
    words: Sequence[str] = ()
    faults: Sequence[str] = ()
