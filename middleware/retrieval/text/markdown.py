"""Markdown: its headings, its code and its tables; the rest is text as it was written.

Strategy: one pass over the lines with one state, the fence that is open. The marks inside a line (emphasis, links) stay: models
read them, and full text passes over them.
The one rule: what stands in a fence is code, whatever it looks like, and a fence is one block.
"""

from __future__ import annotations

import re

from middleware.retrieval.text.decoding import decoded
from middleware.retrieval.text.document import Document, Limits, Outline, Shape

_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_NOT_A_TITLE = re.compile(r" {0,3}(?:[-*+>|]|\d{1,9}[.)])|\s*$| {4}|\t")


def read(content: bytes, charset: str, limits: Limits) -> Document:
    lines = decoded(content, charset).splitlines()
    reading = _Reading(Outline(limits))
    start = _front_matter(lines)
    if start:
        reading.outline.add("\n".join(lines[:start]), "code")
    for line in lines[start:]:
        reading.line(line)
    reading.flush()
    return reading.outline.document("md")


def _front_matter(lines: list[str]) -> int:
    """How many lines of settings stand before the text."""
    if not lines or lines[0].rstrip() != "---":
        return 0
    return next((number + 1 for number, line in enumerate(lines[1:200], 1) if line.rstrip() in ("---", "...")), 0)


class _Reading:
    """The lines of one block, as far as they have come. fence: the mark that a closing one must repeat."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self._lines: list[str] = []
        self._shape: Shape = "text"
        self._fence = ""

    def line(self, line: str) -> None:
        if self._fence:
            self._in_fence(line)
        elif (opened := _FENCE.match(line)) and not ("`" in opened[1] and "`" in opened[2]):
            self._begin("code", line)
            self._fence = opened[1]
        elif heading := _ATX.match(line):
            self.flush()
            self.outline.heading(len(heading[1]), _closed(heading[2] or ""))
        elif self._underlined(line):
            title = self._lines.pop()
            self.flush()
            self.outline.heading(1 if "=" in line else 2, title)
        else:
            self._plain(line)

    def flush(self) -> None:
        if self._lines:
            self.outline.add("\n".join(self._lines), self._shape)
        self._lines, self._shape, self._fence = [], "text", ""

    def _begin(self, shape: Shape, line: str) -> None:
        self.flush()
        self._shape, self._lines = shape, [line]

    def _in_fence(self, line: str) -> None:
        self._lines.append(line)
        if (closed := _FENCE.match(line)) and closed[1].startswith(self._fence) and not closed[2].strip():
            self.flush()

    def _underlined(self, line: str) -> bool:
        """Whether this is the line under a title, which stands alone between blank lines or behind a block."""
        if self._shape != "text" or not self._lines or not _UNDERLINE.match(line):
            return False
        alone = len(self._lines) == 1 or not self._lines[-2].strip()
        return alone and not _NOT_A_TITLE.match(self._lines[-1])

    def _plain(self, line: str) -> None:
        shape: Shape = "rows" if line.lstrip().startswith("|") else "text"
        if shape != self._shape:
            self._begin(shape, line)
        else:
            self._lines.append(line)


def _closed(title: str) -> str:
    """Without the marks that may close it."""
    bare = title.rstrip()
    without = bare.rstrip("#")
    return without if not without or without[-1] in " \t" else bare
