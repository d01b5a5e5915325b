"""Text on its way into a home: what any database takes, and a question as the words in it. Pure.

Strategy: PostgreSQL's text knows no NUL and UTF-8 no half characters. In what people wrote they become the mark for an unknown
character; in an owner or an id, which must stay apart from all others, they are spelled out.
The one rule: two owners or ids that differ still differ when they are stored.
"""

from __future__ import annotations

import re
from hashlib import sha256

MOST_WORDS = 64  # of a question; a whole book in the place of one would be looked up word by word
LONGEST = 100
WORD = re.compile(r"[^\W_]+")
SPELLED = re.compile("[\\\\\0\ud800-\udfff]")


def shown(text: str) -> str:
    """Text that any database takes, for what is only shown or searched."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def key(text: str) -> str:
    """An owner or an id in a form that any database takes, each in its own."""
    return SPELLED.sub(lambda found: f"\\{ord(found[0]):04x}", text)


def unkey(text: str) -> str:
    """The owner or id that `key` was given."""
    return re.sub(r"\\([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), text)


def words(query: str) -> list[str]:
    """The different words of a question, in lower case, as letters and digits only; the first `MOST_WORDS` of them."""
    found = dict.fromkeys(match[0].lower() for match in WORD.finditer(query) if len(match[0]) <= LONGEST)
    return list(found)[:MOST_WORDS]


def scope(owner: str) -> str:
    """A word that stands for this owner. Another owner of the same word would cost time and give nothing away."""
    return "o" + sha256(owner.encode()).hexdigest()[:16]
