"""Bytes to text, where nobody says for sure what they are.

Strategy: a byte order mark decides; then UTF-8, strictly; then what is named (a `charset`), then Windows-1252, which old files of
the West are written in. No guessing by statistics: the same bytes are always the same text, whatever else is installed.
The one rule: bytes that are no text are refused, never turned into signs.
"""

from __future__ import annotations

import codecs

from middleware.retrieval.text.document import ExtractionError

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# What no text has: control bytes, other than tabs, line and page ends, escape, and the end mark of DOS.
_NOT_TEXT = bytes(code for code in range(32) if code not in b"\t\n\r\v\f\x1b\x1a") + b"\x7f"
# As browsers do: who says Latin-1 has always meant Windows-1252.
_SAME = {"iso8859-1": "cp1252", "ascii": "cp1252"}


def is_text(content: bytes) -> bool:
    """Whether these bytes can be text at all."""
    return _marked(content) or len(content.translate(None, _NOT_TEXT)) == len(content)


def decoded(content: bytes, charset: str | None = None) -> str:
    """Text of bytes. charset: what the file or its sender names; an unknown one is passed over. Raises ExtractionError."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return _strictly(content[len(mark) :], encoding)
    for encoding in ("utf-8", _known(charset)):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return _strictly(content, "cp1252")


def _marked(content: bytes) -> bool:
    return content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _known(charset: str | None) -> str:
    """Python's name for a charset that encodes text; cp1252 for any other."""
    try:
        name = codecs.lookup((charset or "cp1252").strip().strip("\"'")).name
        b"".decode(name)
    except (LookupError, ValueError):
        return "cp1252"
    return _SAME.get(name, name)


def _strictly(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise ExtractionError(f"The file's text is neither UTF-8 nor {encoding}: save it as UTF-8.") from None
