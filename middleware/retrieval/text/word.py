"""Word files: paragraphs, headings, lists and tables in the order of the document.

Strategy: the file is a zip archive, so it is unpacked once with a bound on what comes out, before anything interprets it; then
python-docx opens it, and the body's elements are walked here, because its own walk leaves out tracked insertions and controls.
The one rule: nothing declares an XML entity, and no archive is believed about its own size.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import docx
from docx.oxml.ns import qn

from middleware.retrieval.text.document import Document, ExtractionError, Limits, Outline
from middleware.retrieval.text.tables import row_text

_PIECE = 2**16
# A document type in any encoding that XML may have: the sign between its letters is NUL in UTF-16 and UTF-32.
_DOCTYPE = re.compile(
    rb"<\0{0,3}!\0{0,3}(?:D\0{0,3}O\0{0,3}C\0{0,3}T\0{0,3}Y\0{0,3}P\0{0,3}E|E\0{0,3}N\0{0,3}T\0{0,3}I\0{0,3}T\0{0,3}Y)"
)
_OVERHANG = 40  # bytes that the longest match may begin before the end of a piece
_HEADING = re.compile(r"heading ([1-9])$", re.I)
_TITLE_LEVEL, _LIST = 0, -1
_MOST_STYLES = 10  # that build on one another
_P, _TBL, _TR, _TC, _T = (qn(f"w:{name}") for name in ("p", "tbl", "tr", "tc", "t"))
_SPACES = {qn("w:tab"): "\t", qn("w:br"): "\n", qn("w:cr"): "\n"}
_VAL = qn("w:val")
# Said twice, once for old readers; and marks that are no text.
_SKIPPED = {qn("w:pPr"), qn("w:rPr"), qn("w:del"), "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"}


def read(content: bytes, charset: str, limits: Limits) -> Document:
    _unpack(content, limits)
    try:
        opened = docx.Document(io.BytesIO(content))
        body: Any = opened.element.body
        levels = _levels(opened.styles)
    except MemoryError:
        raise
    except ValueError as error:
        raise ExtractionError("The Word file is a template or has macros; save it as docx.") from error
    except Exception as error:  # what python-docx and lxml raise on a broken part is of every kind
        raise _broken() from error
    outline = Outline(limits)
    for element in _outermost(body, {_P, _TBL}):
        if element.tag == _TBL:
            outline.add("\n".join(filter(None, _rows(element))), "rows")
        else:
            _paragraph(element, levels, outline)
    return outline.document("docx")


def _broken() -> ExtractionError:
    return ExtractionError("The Word file is broken or incomplete.")


def _unpack(content: bytes, limits: Limits) -> None:
    """Go through every part once. Raises ExtractionError where there are too many, too large, or dangerous ones."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = archive.infolist()
            if len(parts) > limits.entries:
                raise ExtractionError(f"The Word file has {len(parts):,} parts; the most that is taken is {limits.entries:,}.")
            _bounded(sum(part.file_size for part in parts), limits)
            total = 0
            for part in parts:
                total += _inflated(archive, part, limits, total)
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise _broken() from error


def _inflated(archive: zipfile.ZipFile, part: zipfile.ZipInfo, limits: Limits, before: int) -> int:
    """The real size of a part. before: of those already unpacked."""
    size, end = 0, b""
    with archive.open(part) as stream:
        while piece := stream.read(_PIECE):
            size += len(piece)
            _bounded(before + size, limits)
            if part.filename.endswith((".xml", ".rels")) and _DOCTYPE.search(end + piece):
                raise ExtractionError("The Word file declares XML entities, which no honest one does.")
            end = piece[-_OVERHANG:]
    return size


def _bounded(size: int, limits: Limits) -> None:
    if size > limits.inflated:
        raise ExtractionError(f"The Word file unpacks to more than {limits.inflated:,} bytes, which is the most that is taken.")


def _levels(styles: Any) -> dict[str, int]:
    """The level of heading that each style is, by its id."""
    named = {style.styleId: style for style in styles.element.style_lst}
    return {id: level for id in named if (level := _level_of(id, named)) is not None}


def _level_of(id: str | None, named: dict[str, Any]) -> int | None:
    """Its own, or that of the style which it builds on, as companies' styles do."""
    for _ in range(_MOST_STYLES):
        style = named.get(id or "")
        if style is None or (level := _level(style.name_val)) is not None:
            return None if style is None else level
        id = style.basedOn_val
    return None


def _level(name: str | None) -> int | None:
    """Of a style. Names are English in the file, whatever language Word speaks."""
    if heading := _HEADING.match(name or ""):
        return int(heading[1])
    lowered = (name or "").lower()
    return _TITLE_LEVEL if lowered == "title" else _LIST if lowered.startswith("list") else None


def _outermost(root: Any, tags: set[str]) -> Iterator[Any]:
    """The elements of these tags under another, not those inside one; controls, insertions and the like are looked through."""
    stack = [iter(root)]
    while stack:
        if (child := next(stack[-1], None)) is None:
            stack.pop()
        elif child.tag in tags:
            yield child
        elif child.tag not in _SKIPPED:
            stack.append(iter(child))


def _paragraph(element: Any, levels: dict[str, int], outline: Outline) -> None:
    text = _text(element)
    style = element.style
    level = levels.get(style) if style else None
    if level is not None and level >= 0:
        outline.heading(level, text)
    elif text.strip() and (level == _LIST or element.find(f"{qn('w:pPr')}/{qn('w:numPr')}") is not None):
        outline.add(f"- {text}")
    else:
        outline.add(text)


def _text(element: Any) -> str:
    return "".join(_SPACES.get(found.tag) or found.text or "" for found in _outermost(element, {_T, *_SPACES}))


def _rows(table: Any) -> Iterator[str]:
    """Its rows; named by the first one where that is marked as a header."""
    header: list[str] | None = None
    rows = list(_outermost(table, {_TR}))
    for number, row in enumerate(rows):
        texts = [_cell(cell) for cell in _outermost(row, {_TC})]
        if number == 0 and len(rows) > 1 and row.find(f"{qn('w:trPr')}/{qn('w:tblHeader')}") is not None:
            header = texts
        else:
            yield row_text(texts, header)


def _cell(cell: Any) -> str:
    """A cell's paragraphs, those of tables in it too. One that goes on from the cell above is empty."""
    return " ".join(filter(None, (_text(paragraph).strip() for paragraph in _outermost(cell, {_P}))))
