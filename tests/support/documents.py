"""Files for the tests of extraction, made by hand: PDFs byte by byte, so that they can be broken on purpose, and Word files."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import docx
from pypdf import PdfReader, PdfWriter


def pdf(pages: Sequence[str], compressed: bytes | None = None) -> bytes:
    """A PDF with a line of text per line of each page (Latin letters). compressed: the content of the first page instead."""
    objects: list[bytes] = [b"", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"]
    kids: list[bytes] = []
    for page in pages:
        stream = _shown(page)
        how = b""
        if compressed is not None and not kids:
            stream, how = compressed, b"/Filter /FlateDecode "
        objects.append(b"<< %s/Length %d >>\nstream\n%s\nendstream" % (how, len(stream), stream))
        resources = b"<< /Font << /F1 3 0 R >> >>"
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources %s /Contents %d 0 R >>" % (resources, len(objects))
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[0] = b"<< /Type /Catalog /Pages 2 0 R >>"
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(kids))
    return _numbered(objects)


def encrypted(content: bytes, password: str) -> bytes:
    """A PDF that this password opens; with "" anybody can read it, and only its owner change it."""
    writer = PdfWriter(PdfReader(io.BytesIO(content)))
    writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    output = io.BytesIO()
    writer.write(output)
    return output.getvalue()


def bomb(size: int) -> bytes:
    """So many spaces, compressed."""
    return zlib.compress(b" " * size, 9)


def word(fill: Callable[[Any], object]) -> bytes:
    """A Word file, with what is put into it."""
    made = docx.Document()
    fill(made)
    output = io.BytesIO()
    made.save(output)
    return output.getvalue()


def rezipped(content: bytes, parts: dict[str, bytes]) -> bytes:
    """A zip archive with these parts replaced or added."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name not in parts:
                new.writestr(name, old.read(name))
        for name, part in parts.items():
            new.writestr(name, part)
    return output.getvalue()


def _shown(page: str) -> bytes:
    """The operators that draw lines of text, one below another."""
    if not page:
        return b""
    lines = (line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").encode("cp1252") for line in page.split("\n"))
    return b"BT /F1 12 Tf 14 TL 72 720 Td " + b" ".join(b"(%s) Tj T*" % line for line in lines) + b" ET"


def _numbered(objects: Sequence[bytes]) -> bytes:
    output = b"%PDF-1.4\n"
    places = []
    for number, text in enumerate(objects, 1):
        places.append(len(output))
        output += b"%d 0 obj\n%s\nendobj\n" % (number, text)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    trailer = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(output))
    return output + b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table) + trailer
