"""What is done to a text: what was found in it, and what stands there instead.

Strategy: a `Look` is what holds for one side of one request: which rules, and what each does. It turns what a scanner saw into
edits (from, to, instead), or names the rule that blocks. Placeholders come from the request's `Vault`, which knows the originals.
The one rule: what was found goes into the vault and nowhere else; nothing here logs, counts or raises with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from middleware.guardrails.rules.detector import Detector, Scanner
from middleware.guardrails.rules.reading import Read, plain
from middleware.guardrails.rules.reading import escaped as escaped_text
from middleware.guardrails.rules.words import Allowed
from middleware.guardrails.verdict import Action, Finding, Side
from proxy.text_events import escaped

PLACEHOLDER = re.compile(r"\[[A-Z][A-Z0-9_]{0,40}_[1-9][0-9]{0,5}\]")
# The gateway's own, on their way back; found as any rule's.
OWN = Detector("", r"\[[A-Z][A-Z0-9_]{0,40}_[1-9][0-9]{0,5}\]", lambda text, start, end: end, most=64)


class Edit(NamedTuple):
    """From here to there, something else. restores: it is an original in place of its placeholder."""

    start: int
    end: int
    instead: str
    restores: bool = False


class Vault:
    """The placeholders of one request: the same value has the same one. taken: what the client wrote itself and is none of
    ours."""

    def __init__(self, taken: Collection[str] = ()) -> None:
        self._taken = set(taken)
        self._counts: dict[str, int] = {}
        self._names: dict[tuple[str, str], str] = {}
        self.originals: dict[str, str] = {}

    def placeholder(self, name: str, value: str, *, back: bool) -> str:
        """back: it may be put back on the way out."""
        found = self._names.get((name, value))
        if found is None:
            found = self._names[name, value] = self._new(name)
        if back:
            self.originals[found] = value
        return found

    def _new(self, name: str) -> str:
        while True:
            self._counts[name] = number = self._counts.get(name, 0) + 1
            if (made := f"[{name}_{number}]") not in self._taken:
                return made


class _Sealed(Vault):
    """The same placeholders, none of them put back."""

    def __init__(self, vault: Vault) -> None:
        self.__dict__.update(vault.__dict__)
        self.originals = {}


class Watched(NamedTuple):
    """A detector and what becomes of what it finds. rule: its id; None: a placeholder of ours, put back. back: what it redacts
    may be put back later."""

    detector: Detector
    rule: str | None
    action: Action
    back: bool = False


class Judged(NamedTuple):
    """edits: of decided text. held: what stands before is decided. blocked: where the first match that blocks stands."""

    edits: list[Edit]
    held: int
    blocked: int | None = None


class Look:
    """The rules of one side. report: told of every finding, without what was found."""

    def __init__(
        self, side: Side, scanner: Scanner, watched: Sequence[Watched], allowed: Allowed, vault: Vault,
        report: Callable[[Finding], None],
    ) -> None:  # fmt: skip
        self._side, self._scanner, self._watched, self._allowed = side, scanner, watched, allowed
        self._vault, self._report = vault, report

    def onward(self) -> Look:
        """The same without putting originals back: for reasoning, which goes back to the provider as it was signed."""
        return Look(self._side, self._scanner, self._watched, self._allowed, _Sealed(self._vault), self._report)

    def settled(self, text: str, *, json: bool = False) -> str | None:
        """A whole text with its edits made, itself where there are none; None: it is blocked."""
        read = escaped_text(text) if json else plain(text)
        judged = self.judge(read.text, 0, over=True)
        if judged.blocked is not None:
            return None
        return edited(read, 0, len(read.text), judged.edits, Quotes() if json else None) if judged.edits else text

    def judge(self, read: str, start: int, *, over: bool) -> Judged:
        """What becomes of a text that is read from `start` on; see `Scanner.scan`."""
        seen = self._scanner.scan(read, start, over=over)
        edits: list[Edit] = []
        for match in seen.matches:
            watched, found = self._watched[match.which], read[match.start : match.end]
            if watched.rule is None:
                if (original := self._vault.originals.get(found)) is not None:
                    edits.append(Edit(match.start, match.end, original, True))
                continue
            if found in self._allowed:
                continue
            self._report(Finding(watched.rule, watched.action, self._side))
            if watched.action == "block":
                return Judged(edits, seen.held, match.start)
            if watched.action == "redact":
                name = self._vault.placeholder(watched.detector.name, found, back=watched.back)
                edits.append(Edit(match.start, match.end, name))
        return Judged(edits, seen.held)


def edited(read: Read, first: int, last: int, edits: Sequence[Edit], quoted: Quotes | None) -> str:
    """The spelling of a stretch of a text, with the edits that begin in it made, and what others cover left out."""
    parts: list[str] = []
    at = first
    for edit in edits:
        if edit.end <= at or edit.start >= last:
            continue
        if edit.start >= at:
            parts.append(_said(read, at, edit.start, quoted))
            parts.append(edit.instead if quoted is None else quoted.value(edit.instead))
        at = min(edit.end, last)
    parts.append(_said(read, at, last, quoted))
    return "".join(parts)


def _said(read: Read, first: int, last: int, quoted: Quotes | None) -> str:
    spelled = read.text[first:last] if read.spelled is None else "".join(read.spelled[first:last])
    if quoted is not None:
        quoted.passes(read, first, last)
    return spelled


class Quotes:
    """Where in a JSON text we are: in a string, or outside of one, where only a value may stand."""

    def __init__(self) -> None:
        self._inside = False

    def passes(self, read: Read, first: int, last: int) -> None:
        """A quote that is spelled as one begins or ends a string; one that is escaped is a character."""
        spelled = read.text[first:last] if read.spelled is None else read.spelled[first:last]
        if spelled.count('"') % 2:
            self._inside = not self._inside

    def value(self, text: str) -> str:
        found = escaped(text).decode()
        return found if self._inside else f'"{found}"'
