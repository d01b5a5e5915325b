"""Server-sent events out of bytes, however the network cut them.

Strategy: line ends are made `\\n` as bytes arrive (a `\\r` counts at once, a `\\n` right after it is swallowed), so an event ends
at the first `\\n\\n`. Bytes are only joined when an end is among the new ones, and one read is split once: linear in its size,
also for a 10 MB event that comes one byte at a time. Bytes, not text: a UTF-8 character may be cut in two.
The one rule: any split of the same bytes gives the same events.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

EVENT_LIMIT = 16 * 2**20
# As a number: `b"\r" in data` first tries to take the bytes for one, and fails, at ten times the cost.
RETURN = 0x0D


class ErrorEvent(bytes):
    """The data of an event that was named `error`."""


class BareText(bytes):
    """Text that is no SSE field but begins like JSON: some servers write an error into the stream like that."""


class Framer:
    """Bytes in, the data of each complete event out.

    limit: the size in bytes of one event from which on `overflow` is set and nothing more is kept. between: the next byte begins
    a new event, and nothing of an earlier one is kept.
    """

    __slots__ = ("_after_cr", "_at_start", "_limit", "_parts", "_size", "between", "overflow")

    def __init__(self, limit: int = EVENT_LIMIT) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True
        self.overflow = False
        self.between = False

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes, in order; comments and empty events are left out."""
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
            self._after_cr = False
        if not data or self.overflow:
            return []
        if RETURN in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        elif self._after_cr:
            self._after_cr = False
        parts = self._parts
        if parts:
            last = parts[-1]
            if data.find(b"\n\n") < 0 and not (data[0] == 10 and last[-1] == 10):
                self._keep(data)
                return []
            parts.append(data)
            data = b"".join(parts)
            parts.clear()
            self._size = 0
        if self._at_start:
            if len(data) < 3 and b"\xef\xbb\xbf".startswith(data):
                self._keep(data)
                return []
            self._at_start = False
            data = data.removeprefix(b"\xef\xbb\xbf")
        pieces = data.split(b"\n\n")
        rest = pieces.pop()
        if rest:
            self._keep(rest)
        self.between = not (rest or self._after_cr)
        events: list[bytes] = []
        oversized = len(data) > self._limit
        for piece in pieces:
            if oversized and len(piece) >= self._limit:
                self.overflow = True
                self.between = False
                self._parts.clear()
                return events
            if piece[:6] == b"data: " and piece.find(b"\n", 6) < 0:
                events.append(piece[6:])
            else:
                events += _events(piece)
        return events

    def close(self) -> list[bytes]:
        """What the end of the stream completes: an event whose blank line never came."""
        rest = b"".join(self._parts)
        self._parts.clear()
        if self._at_start:
            rest = rest.removeprefix(b"\xef\xbb\xbf")
        return _events(rest)

    def _keep(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limit:
            self.overflow = True
            self.between = False
            self._parts.clear()
        else:
            self._parts.append(data)


def _events(block: bytes) -> list[bytes]:
    """The events of one block of lines: usually one, none for a comment, more where bare text follows a data line."""
    values: list[bytes] = []
    found: list[bytes] = []
    name = b""
    lines = block.split(b"\n")
    for number, line in enumerate(lines):
        if line.startswith(b":"):
            continue
        field, _, value = line.partition(b":")
        if field == b"data":
            values.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
        elif line.lstrip()[:1] in (b"{", b"["):
            found.append(BareText(b"\n".join(lines[number:])))
            break
    if values:
        data = b"\n".join(values)
        found.insert(0, ErrorEvent(data) if name == b"error" else data)
    return found
