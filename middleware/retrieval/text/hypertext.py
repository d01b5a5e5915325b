"""HTML: what a reader of the page sees, with its headings, tables and preformatted text.

Strategy: one walk over the tree with a stack of its own, because pages nest deeper than Python's; words gather in a line until a
block begins or ends. Tables that hold data become rows; tables that only lay out a page are blocks like any other.
The one rule: what is never shown (scripts, styles, templates) or is the same on every page (navigation) is not text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, Tag, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, PageElement, PreformattedString

from middleware.retrieval.text.decoding import decoded
from middleware.retrieval.text.document import Document, Limits, Outline
from middleware.retrieval.text.tables import row_text

_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.I)
_UNSEEN = {
    "script", "style", "nav", "template", "noscript", "iframe", "object", "embed", "canvas", "svg", "math", "head", "audio",
    "video", "map", "datalist", "select", "title",
}  # fmt: skip
_INLINE = {
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd",
    "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u",
    "var", "wbr",
}  # fmt: skip
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_CELLS = ("td", "th")
_OF_LAYOUT = ["table", *_HEADINGS, "ul", "ol", "pre"]  # no cell of data has one
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
_TITLE_LEVEL = 0  # above all headings


def read(content: bytes, charset: str, limits: Limits) -> Document:
    named = _META.search(content[:4096])
    soup = _parsed(decoded(content, charset or (named[1].decode() if named else "")))
    outline = Outline(limits)
    # A first heading says the same as the title, and better.
    if soup.title is not None and soup.find("h1") is None:
        outline.heading(_TITLE_LEVEL, soup.title.get_text())
    _Walk(outline).over(soup)
    return outline.document("html")


def _parsed(page: str) -> BeautifulSoup:
    with warnings.catch_warnings():
        # What it looks like has been decided by then.
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        return BeautifulSoup(page, "lxml")


class _Walk:
    """Through a page. line: the words since the last block began or ended."""

    def __init__(self, outline: Outline) -> None:
        self._outline = outline
        self._line: list[str] = []
        self._stack: list[tuple[Tag, Iterator[PageElement]]] = []
        self._layouts: set[int] = set()

    def over(self, root: Tag) -> None:
        self._layouts = _layouts(root)
        self._stack.append((root, iter(root.children)))
        while self._stack:
            tag, children = self._stack[-1]
            if (child := next(children, None)) is None:
                self._stack.pop()
                self._edge(tag)
            elif isinstance(child, Tag):
                self._enter(child)
            elif isinstance(child, NavigableString) and not isinstance(child, PreformattedString):
                self._line.append(str(child))  # not a comment, a declaration or the like

    def _enter(self, tag: Tag) -> None:
        if _is_unseen(tag):
            return
        if tag.name in _HEADINGS:
            self._end_line()
            self._outline.heading(_HEADINGS[tag.name], _words(tag))
        elif tag.name == "pre":
            self._end_line()
            self._outline.add("".join(_texts(tag)), "code")
        elif tag.name == "table" and id(tag) not in self._layouts:
            self._end_line()
            self._outline.add("\n".join(filter(None, _rows(tag))), "rows")
        else:
            self._into(tag)

    def _into(self, tag: Tag) -> None:
        self._edge(tag)
        if tag.name == "li":
            self._line.append("- ")
        elif tag.name == "img" and (described := tag.get("alt")):
            self._line.append(f" {described} ")
        self._stack.append((tag, iter(tag.children)))

    def _edge(self, tag: Tag) -> None:
        """The begin or the end of an element: of a block's, the line ends."""
        if tag.name == "br":
            self._line.append(" ")
        elif tag.name not in _INLINE and tag.name != "img":
            self._end_line()

    def _end_line(self) -> None:
        if (text := " ".join("".join(self._line).split())) and text != "-":
            self._outline.add(text)
        self._line.clear()


def _is_unseen(tag: Tag) -> bool:
    return tag.name in _UNSEEN or tag.has_attr("hidden") or _HIDDEN.search(str(tag.get("style", ""))) is not None


def _texts(tag: Tag) -> Iterator[str]:
    """The strings in an element, but for those never shown."""
    for child in tag.descendants:
        if isinstance(child, NavigableString) and not isinstance(child, PreformattedString):
            if child.parent is None or child.parent.name not in _UNSEEN:
                yield str(child)
        elif isinstance(child, Tag) and child.name == "br":
            yield "\n"


def _words(tag: Tag) -> str:
    return " ".join("".join(_texts(tag)).split())


def _layouts(root: Tag) -> set[int]:
    """The tables that lay out the page rather than hold data, by identity. Every tag is climbed over once, however deep it is."""
    tables: dict[int, Tag | None] = {}
    found = set()
    for tag in root.find_all(_OF_LAYOUT):
        path: list[int] = []
        above = tag.parent
        while above is not None and above.name != "table" and id(above) not in tables:
            path.append(id(above))
            above = above.parent
        table = above if above is None or above.name == "table" else tables[id(above)]
        tables.update(dict.fromkeys(path, table))
        if table is not None:
            found.add(id(table))
    return found


def _rows(table: Tag) -> Iterator[str]:
    """Its rows; named by the first one where that is all headings."""
    header: list[str] | None = None
    if table.caption is not None:
        yield _words(table.caption)
    for number, row in enumerate(table.find_all("tr")):
        cells = row.find_all(_CELLS)
        texts = [_words(cell) for cell in cells]
        if number == 0 and len(cells) > 1 and all(cell.name == "th" for cell in cells):
            header = texts
        else:
            yield row_text(texts, header)
    if header is not None and len(table.find_all("tr")) == 1:
        yield row_text(header, None)
