"""Content codings that a provider (or a proxy before it) applies although `identity` was asked for.

Strategy: zlib, incrementally, in pieces of bounded size: what is compressed stays compressed until somebody takes it, so a few
bytes that unpack to gigabytes cost no more memory than any other reply.
The one rule: input that is not what it says, or stops early, is an error, never a short reply.
"""

from __future__ import annotations

import zlib

PIECE = 2**18  # bytes unpacked at a time
GZIP = 16 + zlib.MAX_WBITS


class Inflater:
    """Unpacks gzip or deflate. coding: `gzip` or `deflate`. pending: bytes fed and not yet unpacked. drained: nothing can be
    taken before more is fed."""

    __slots__ = ("_gzip", "_zlib", "drained", "pending")

    def __init__(self, coding: str) -> None:
        self._gzip = coding == "gzip"
        self._zlib: zlib._Decompress | None = None
        self.pending = b""
        self.drained = True

    @property
    def complete(self) -> bool:
        """Has the packed stream had its own end (or not even begun: an empty body is empty)?"""
        return self._zlib is None or self._zlib.eof

    def feed(self, packed: bytes) -> None:
        self.pending += packed
        self.drained = False

    def take(self) -> bytes:
        """At most PIECE unpacked bytes; b"" when more must be fed first. Raises zlib.error."""
        # A full output may leave bytes inside zlib with no input pending: it is asked once more with none.
        while self.pending or (self._zlib is not None and not self._zlib.eof):
            unpacker = self._unpacker()
            piece = unpacker.decompress(self.pending, PIECE)
            self.pending = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            if piece:
                return piece
            if not unpacker.eof:
                break
        self.drained = True
        return b""

    def _unpacker(self) -> zlib._Decompress:
        """The one at work, or a new one: at the start, and for the next member of a gzip file (RFC 1952, 2.2)."""
        if self._zlib is None or (self._gzip and self._zlib.eof):
            self._zlib = zlib.decompressobj(GZIP if self._gzip else self._deflate())
        elif self._zlib.eof:
            raise zlib.error("bytes behind the end")
        return self._zlib

    def _deflate(self) -> int:
        """`deflate` means zlib's wrapping (RFC 9110, 8.4.1.2), but some send it bare; the first byte tells."""
        return zlib.MAX_WBITS if self.pending[0] & 0xF == 8 else -zlib.MAX_WBITS


def codings(header: str) -> list[str]:
    """The codings a Content-Encoding header names, `identity` left out, old names made new."""
    names = (name.strip().lower().removeprefix("x-") for name in header.split(","))
    return [name for name in names if name and name != "identity"]
