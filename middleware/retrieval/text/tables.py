"""Tables: CSV and its relatives, and how a row of any table is written.

Strategy: a row is one line that says by itself what its values are (`name: Ada; born: 1815`), because a passage holds a few rows
and rarely the header. Which sign separates the cells is found by trying the four usual ones on the first lines.
The one rule: a value is never left out, and never cut in two by what stands in it.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice, zip_longest

from middleware.retrieval.text.decoding import decoded
from middleware.retrieval.text.document import Document, ExtractionError, Limits, Outline

_SIGNS = ",;\t|"
_LOOKED_AT = 65536  # characters, and of them so many rows
_ROWS_LOOKED_AT = 50
_NUMBER = re.compile(r"[-+]?[\d.,:/\s%]+$")
_ROWS_PER_BLOCK = 200


def row_text(cells: Sequence[str], header: Sequence[str] | None) -> str:
    """A row as one line, named by the header where there is one; "" for an empty one."""
    values = [" ".join(cell.split()) for cell in cells]
    if header is None:
        return " | ".join(values) if any(values) else ""
    named = zip_longest(header, values[: len(header)], fillvalue="")
    parts = [f"{name}: {value}" if name else value for name, value in named if value]
    return "; ".join([*parts, *filter(None, values[len(header) :])])


def read(content: bytes, charset: str, limits: Limits) -> Document:
    text = decoded(content, charset)
    outline = Outline(limits)
    rows = _rows(text, _sign(text[:_LOOKED_AT]), limits)
    first = next(rows, [])
    header = [" ".join(name.split()) for name in first] if _is_header(first) else None
    if header is None:
        outline.add(row_text(first, None), "rows")
    lines = (row_text(row, header) for row in rows)
    none_but_header = True
    while batch := list(islice(lines, _ROWS_PER_BLOCK)):
        none_but_header = False
        outline.add("\n".join(filter(None, batch)), "rows")
    if header and none_but_header:
        outline.add(" | ".join(header), "rows")
    return outline.document("csv")


def _rows(text: str, sign: str, limits: Limits) -> Iterator[list[str]]:
    # The module's own bound on a field is for the whole process, and below what one honest cell may hold.
    csv.field_size_limit(max(csv.field_size_limit(), limits.characters))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign)
    try:
        for row in reader:
            if any(row):
                yield row
    except csv.Error as error:
        raise ExtractionError(f"The CSV file cannot be read near line {reader.line_num}: {error}.") from None


def _sign(start: str) -> str:
    """What separates the cells: the sign that cuts most of the first rows into the same number of cells, more than one."""
    return max(_SIGNS, key=lambda sign: _agreement(start, sign))


def _agreement(start: str, sign: str) -> tuple[int, int]:
    """How many rows agree on how many cells, up to the first row whose quotes say that it is another sign."""
    widths: Counter[int] = Counter()
    with suppress(csv.Error):
        for row in islice(csv.reader(io.StringIO(start, newline=""), delimiter=sign, strict=True), _ROWS_LOOKED_AT):
            widths[len(row)] += len(row) > 1
    width, times = max(widths.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
    return times, width


def _is_header(row: Sequence[str]) -> bool:
    """Names: none empty, none twice, none a number."""
    names = [name.strip() for name in row]
    return all(names) and len(set(names)) == len(names) and not any(map(_NUMBER.match, names))
