"""Plain text: as it is. Its paragraphs are found when it is cut into passages.

The one rule: a line that looks like a heading is text; only formats that mark their headings have any.
"""

from __future__ import annotations

from middleware.retrieval.text.decoding import decoded
from middleware.retrieval.text.document import Document, Limits, Outline


def read(content: bytes, charset: str, limits: Limits) -> Document:
    outline = Outline(limits)
    outline.add(decoded(content, charset))
    return outline.document("txt")
