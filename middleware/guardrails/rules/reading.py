"""Text as rules look at it: one character for one, with the spelling that each stood for.

Strategy: plain text is looked at as it is. Full-width letters and digits, other scripts' digits, odd dashes and spaces are read
as their ASCII ones; characters without width are read over; in the arguments of tools, which are JSON, an escape is read as what
it stands for. Where reading and spelling differ, every character that is read keeps its spelling beside it (`Read.spelled`).
The one rule: joined, the spellings are the text, character for character, so what no rule finds goes on as it came.

Not read as their look-alikes: letters of other scripts (а for a). Whoever hides text from its own gateway with them can do so.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

# Soft hyphen, zero-width space and joiners, direction marks, word joiner, byte order mark.
INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
NOTHING = INVISIBLE[1]
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63"
SPACES = "\u00a0\u2002\u2003\u2007\u2009\u202f\u3000"


def _same() -> dict[int, str]:
    found = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    for code in range(0x660, 0x20000):
        if (digit := unicodedata.digit(chr(code), None)) is not None and unicodedata.category(chr(code)) == "Nd":
            found[code] = str(digit)
    return found | dict.fromkeys(map(ord, DASHES), "-") | dict.fromkeys(map(ord, SPACES), " ")


SAME = _same()
HIDDEN = re.compile(f"[{INVISIBLE}]")
ESCAPE = re.compile(r'\\(?:u[0-9A-Fa-f]{4}|["\\/bfnrt])')
# The beginning of an escape at the end of what has come.
HALF = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3})?\Z")
# What has no width, as JSON may spell it, at the end of what has come.
UNSEEN = re.compile(rf"(?:[{INVISIBLE}]|\\u(?:00ad|200[b-f]|2060|feff))+\Z", re.IGNORECASE)
SHORT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Read(NamedTuple):
    """spelled: for each character of the text how it was spelled; None: as it is."""

    text: str
    spelled: list[str] | None = None


def plain(text: str) -> Read:
    if text.isascii():
        return Read(text)
    looked = text.translate(SAME)
    if HIDDEN.search(looked) is None:
        return Read(looked, None if looked == text else list(text))
    return _joined(list(zip(looked, text, strict=True)))


def escaped(text: str) -> Read:
    """The inside of JSON, with whole escapes only."""
    if "\\" not in text:
        return plain(text)
    pairs: list[tuple[str, str]] = []
    at = 0
    for found in ESCAPE.finditer(text):
        pairs += _each(text[at : found.start()])
        pairs.append((_meant(found[0]), found[0]))
        at = found.end()
    return _joined(pairs + _each(text[at:]))


def whole(text: str, *, json: bool) -> int:
    """How much of what has come can be read: what has no width waits for what follows, half an escape for its other half."""
    if not json:
        return len(text) if text.isascii() else len(text.rstrip(INVISIBLE))
    return whole_escapes(UNSEEN.sub("", text[: whole_escapes(text)]))


def whole_escapes(text: str) -> int:
    """How much of what has come ends with a whole escape."""
    half = HALF.search(text)
    if half is None:
        return len(text)
    before = len(text[: half.start()]) - len(text[: half.start()].rstrip("\\"))
    return len(text) if before % 2 else half.start()


def _each(text: str) -> list[tuple[str, str]]:
    return list(zip(text.translate(SAME), text, strict=True))


def _meant(escape: str) -> str:
    if escape[1] == "u":
        return chr(int(escape[2:], 16)).translate(SAME)
    return SHORT.get(escape[1], escape[1])


def _joined(pairs: list[tuple[str, str]]) -> Read:
    """Characters without width are spelled with the one behind them; at the end they are one that no rule looks for."""
    text: list[str] = []
    spelled: list[str] = []
    waiting = ""
    for read, spelling in pairs:
        if read in INVISIBLE:
            waiting += spelling
        else:
            # Half of a surrogate pair, escaped: no encoder takes it, and no rule looks for it.
            text.append("\ufffd" if "\ud800" <= read <= "\udfff" else read)
            spelled.append(waiting + spelling)
            waiting = ""
    if waiting:
        text.append(NOTHING)
        spelled.append(waiting)
    return Read("".join(text), spelled)
