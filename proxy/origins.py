"""Origins of web pages: how an operator writes them, and whether a request's `Origin` is one of them.

Strategy: what is written is held to the very form in which browsers send it, so that matching is a look-up; a wildcard stands for
whole labels of a host name, under one scheme and one port, and becomes a regular expression over all of the header.
The one rule: what is compared is the whole origin. No prefix, no suffix, no search inside it ever grants anything.

Form: https://html.spec.whatwg.org/multipage/browsers.html#ascii-serialisation-of-an-origin
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ANY = "*"
LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
WRITTEN = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9+.-]*)://"
    rf"(?P<host>(?P<wild>\*\.)?{LABEL}(?:\.{LABEL})*|\[[0-9a-f:]+\])"
    rf"(?::(?P<port>[1-9][0-9]{{0,4}}))?",
    re.ASCII,
)
DEFAULT_PORTS = {"http": "80", "https": "443"}


class Origins:
    """Some origins, each exact or with a wildcard (`https://*.example.com`), or all of them (`*`). What `check` lets through."""

    __slots__ = ("_exact", "_wild", "everybody")

    def __init__(self, written: Iterable[str]) -> None:
        listed = set(written)
        self.everybody = ANY in listed
        self._exact = frozenset(origin for origin in listed if ANY not in origin)
        wild = [_pattern(origin) for origin in sorted(listed - {ANY}) if ANY in origin]
        self._wild = re.compile("|".join(wild), re.ASCII) if wild else None

    def __contains__(self, origin: object) -> bool:
        """Is it one of those that are named? `*` names none."""
        if origin in self._exact:
            return True
        return self._wild is not None and isinstance(origin, str) and self._wild.fullmatch(origin) is not None


def _pattern(origin: str) -> str:
    """One label or more in place of the `*`."""
    before, after = origin.split(ANY)
    return rf"{re.escape(before)}{LABEL}(?:\.{LABEL})*{re.escape(after)}"


def check(written: str) -> None:
    """Raises ValueError, in words for the operator, for what no browser would ever send, and for wildcards without bounds."""
    if written.lower() == "null":
        raise ValueError("null is what pages without an origin send, all of them; it names nobody")
    found = WRITTEN.fullmatch(written)
    if found is None:
        raise ValueError(
            "must be an origin as browsers send it: scheme, host and perhaps a port, in lower case, without a path; "
            "https://app.example, http://localhost:5173 or https://*.app.example"
        )
    port = found["port"]
    if port is not None and (int(port) > 65535 or DEFAULT_PORTS.get(found["scheme"]) == port):
        raise ValueError("browsers leave out the default port, and there is none above 65535")
    if found["wild"] and "." not in found["host"][2:] and found["host"] != "*.localhost":
        raise ValueError("the wildcard must stand before a domain of at least two parts, as in https://*.app.example")
