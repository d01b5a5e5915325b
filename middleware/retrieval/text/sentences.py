"""Where sentences end, in any script, by their marks alone.

Strategy: one pass with one expression that always matches where it tries, so that no run of dots or spaces is looked at twice;
what it finds is then judged by the word before and the sign behind: abbreviations, initials, numbers and what goes on in small
letters do not end a sentence. A list's next item begins one.
The one rule: the pieces joined are the text, sign for sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Possessive throughout: a mark that is followed by no space is passed over once, not tried again from its next sign.
_MARK = re.compile(
    r"(?P<wide>[。！？｡]++[」』）”’》]*+\s*+)"
    r"|(?P<mark>[.!?…‽؟۔।॥։።]++)[\"'”’»›)\]}*_]*+(?P<space>\s*+)"
    r"|(?P<item>\n(?=[ \t]{0,8}(?:[-*+•‣–]|\d{1,3}[.)])[ \t]))"
)
_LONGEST_WORD = 12
_ABBREVIATIONS = {
    "a.d", "a.m", "abb", "abs", "al", "approx", "apr", "art", "arts", "aug", "av", "b.a", "b.c", "bd", "bspw", "bzw", "ca",
    "capt", "cf", "ch", "chap", "cit", "co", "col", "corp", "d.c", "d.h", "dec", "dept", "dr", "e.g", "ed", "eds", "eg",
    "eq", "est", "etc", "evtl", "excl", "feb", "fig", "figs", "gen", "ggf", "gov", "hon", "i.e", "ibid", "ie", "inc",
    "incl", "inkl", "jan", "jr", "jul", "jun", "loc", "lt", "ltd", "m.a", "mar", "max", "messrs", "min", "mlle", "mme",
    "mr", "mrs", "ms", "no", "nos", "nov", "nr", "núm", "o.ä", "oct", "op", "p", "p.m", "ph.d", "pp", "pres", "prof", "pág",
    "rep", "resp", "rev", "s.o", "s.u", "sec", "sect", "sen", "sep", "sept", "sgt", "sog", "sr", "sra", "st", "str", "tab",
    "trans", "u.a", "u.k", "u.n", "u.s", "ud", "uds", "univ", "usw", "vgl", "viz", "vol", "vols", "vs", "z.b", "z.t",
    "zzgl",
}  # fmt: skip
_WORD = re.compile(r"[^\s(\[\"'“‘«]*\Z")


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each with the space behind it."""
    start = 0
    for found in _MARK.finditer(text):
        if found.end() < len(text) and _ends(text, found):
            yield text[start : found.end()]
            start = found.end()
    if start < len(text):
        yield text[start:]


def _ends(text: str, found: re.Match[str]) -> bool:
    if found["mark"] is None:
        return True  # a full-width mark, or a list's next item
    if not found["space"]:
        return False
    if text[found.end()].islower():
        return False
    return found["mark"] != "." or not _is_short(text, found.start())


def _is_short(text: str, dot: int) -> bool:
    """Whether the dot belongs to the word before it: an abbreviation, an initial, the number of a list's item."""
    before = text[max(0, dot - _LONGEST_WORD) : dot]
    found = _WORD.search(before)
    word = found[0] if found else ""
    if len(word) == 1 and word.isalpha():
        return word.isupper()
    if word.isdigit():
        begins = dot - len(word)
        return begins == 0 or text[begins - 1] == "\n"
    return word.lower() in _ABBREVIATIONS
