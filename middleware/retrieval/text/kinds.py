"""What a file is: told from its content first, then from its name, then from its media type.

Strategy: the formats that begin with a mark are known by it, whatever they are called; of what is text, the name tells which
kind. A name that promises a format which the content is not is an error, because reading it as something else would hide it.
The one rule: what cannot be read is refused with the list of what can.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from middleware.retrieval.text.decoding import is_text
from middleware.retrieval.text.document import ExtractionError

TAKEN = "PDF, Word (docx), HTML, Markdown, CSV, JSON, JSON Lines and plain text"

_BY_SUFFIX = {
    ".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".xhtml": "html", ".csv": "csv", ".tsv": "csv",
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".text": "txt", ".pdf": "pdf", ".docx": "docx",
}  # fmt: skip
_BY_TYPE = {
    "text/markdown": "md", "text/x-markdown": "md", "text/html": "html", "application/xhtml+xml": "html", "text/csv": "csv",
    "text/tab-separated-values": "csv", "application/json": "json", "application/jsonl": "jsonl",
    "application/x-ndjson": "jsonl", "application/x-jsonlines": "jsonl", "application/pdf": "pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
}  # fmt: skip
_MARKED = {"pdf": "PDF", "docx": "Word file (docx)"}
_HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]{0,200}>\s*)?(?:<!--.{0,2000}?-->\s*)?<(?:!doctype\s+html|html)\b", re.I | re.S
)
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_OLE = bytes.fromhex("d0cf11e0a1b11ae1")


def kind_of(content: bytes, name: str = "", media_type: str = "") -> str:
    """`txt`, `md`, `html`, `csv`, `json`, `jsonl`, `pdf` or `docx`. Raises ExtractionError. Nothing is unpacked or parsed, so it
    is cheap enough to be asked while the client waits, whatever it sent."""
    if content.startswith(b"%PDF-") or (b"%PDF-" in content[:1024] and b"endobj" in content):
        return "pdf"  # readers allow for rubbish before the mark; a text may speak of it
    if content.startswith(_ZIP):
        return _zipped(content)
    if content.startswith(_OLE):
        raise ExtractionError(
            f"The file is an old or a protected Office file; save it as docx without a password. Taken: {TAKEN}."
        )
    if not is_text(content[:65536]):
        raise ExtractionError(f"The file is no text, and of no format that is taken: {TAKEN}.")
    return _of_text(content, name, media_type)


def _of_text(content: bytes, name: str, media_type: str) -> str:
    by_type = _BY_TYPE.get(media_type.partition(";")[0].strip().lower())
    kind = _BY_SUFFIX.get(PurePath(name).suffix.lower()) or by_type or "txt"
    # A page that was saved under another name; but Markdown may begin with a tag of its own accord.
    if kind in ("txt", "pdf", "docx") and _HTML.match(content[:4096]):
        return "html"
    if kind in _MARKED:
        raise ExtractionError(f"The file is called a {_MARKED[kind]}, but its content is none.")
    return kind


def _zipped(content: bytes) -> str:
    """The names of an archive's parts stand in it as they are."""
    if b"word/document.xml" not in content:
        raise ExtractionError(f"The file is a zip archive, or an Office file other than Word's. Taken: {TAKEN}.")
    return "docx"
