"""Server-sent events, read strictly by the WHATWG rules, with a note of everything that is out of order.

Strategy: bytes in, events out; what is not UTF-8 or is left over at the end becomes a fault instead of an exception, because a
checker has to say what it saw. Deliberately not the gateway's own framer: a mistake in that one must not hide itself here.
The one rule: nothing is repaired; a byte that cannot be read is a fault, never a replacement character.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\n|\r")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """One event. name: its `event:` field. at: when its last byte was read, in seconds of `time.perf_counter`."""

    text: str
    name: str
    at: float


class SseReader:
    """`feed` bytes in any pieces, then `close`. faults: what was against the format, in words. comments: how many came."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.comments = 0
        self._tail: list[bytes] = []
        self._lines: list[str] = []
        self._name = ""
        self._started = False

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes. Linear: the tail is joined only when a line ends."""
        after_cr = bool(self._tail) and self._tail[-1].endswith(b"\r")
        if b"\n" not in piece and b"\r" not in piece and not after_cr:
            self._tail.append(piece)
            return []
        whole = b"".join([*self._tail, piece])
        # A CR at the very end may be half of a CRLF: it waits for the next byte.
        held = whole.endswith(b"\r")
        lines = LINE_END.split(whole[:-1] if held else whole)
        last = lines.pop()
        self._tail = [last + b"\r" if held else last]
        return self._events(lines)

    def close(self) -> list[Event]:
        """The end of the body: an event whose blank line is a lone CR; what is left beyond it is a fault."""
        tail = b"".join(self._tail)
        lines = [tail[:-1]] if tail.endswith(b"\r") else []
        found = self._events(lines)
        if not lines and tail:
            self.faults.append(f"the body ends inside a line: {tail[:60]!r}")
        elif self._lines:
            self.faults.append(f"the last event lacks its blank line: {self._lines[-1][:60]!r}")
        self._tail = []
        return found

    def _events(self, lines: list[bytes]) -> list[Event]:
        found = []
        for line in lines:
            if not self._started:
                self._started, line = True, line.removeprefix(BOM)
            if line:
                self._field(line)
            elif self._lines:
                found.append(Event("\n".join(self._lines), self._name, time.perf_counter()))
                self._lines, self._name = [], ""
            else:
                self._name = ""
        return found

    def _field(self, line: bytes) -> None:
        try:
            field, _, value = line.decode().partition(":")
        except UnicodeDecodeError:
            self.faults.append(f"a line is not UTF-8: {line[:60]!r}")
            return
        value = value.removeprefix(" ")
        if not field:
            self.comments += 1
        elif field == "data":
            self._lines.append(value)
        elif field == "event":
            self._name = value
        elif field not in ("id", "retry"):
            self.faults.append(f"a line is no SSE field: {line[:60]!r}")
