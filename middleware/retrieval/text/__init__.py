"""The text of uploaded files: what they say, cut into passages.

Strategy: the kind of a file chooses the module that reads it, and only that one is imported, because the libraries behind some
are large; `extract_apart` and `passages_apart` do all of it in a process of its own, which is what a gateway calls.
The one rule: no clock, no store and no network here, and the same bytes always give the same passages.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from middleware.retrieval.text.document import Block, Document, ExtractionError, Limits
from middleware.retrieval.text.kinds import kind_of

_READERS = {
    "txt": "plain", "md": "markdown", "html": "hypertext", "csv": "tables", "json": "values", "jsonl": "values", "pdf": "pdf",
    "docx": "word",
}  # fmt: skip
_NEEDED = {"bs4": "beautifulsoup4", "lxml": "lxml", "pypdf": "pypdf", "docx": "python-docx"}
Reader = Callable[[bytes, str, Limits], Document]

__all__ = ["Block", "Document", "ExtractionError", "Limits", "absent", "extract", "kind_of"]


def extract(content: bytes, name: str = "", media_type: str = "", limits: Limits = Limits()) -> Document:  # noqa: B008 - frozen
    """What a file says. Raises ExtractionError. May take long, much memory, or both: see `extract_apart`."""
    if len(content) > limits.bytes:
        raise ExtractionError(f"The file has {len(content):,} bytes; the most that is taken is {limits.bytes:,}.")
    if not content.strip():
        raise ExtractionError("The file is empty.")
    kind = kind_of(content, name, media_type)
    read: Reader = import_module(f"{__name__}.{_READERS[kind]}").read
    return read(content, _charset(media_type), limits)


def absent() -> list[str]:
    """The packages that are needed and not installed; nothing is imported to find out."""
    return [package for module, package in _NEEDED.items() if find_spec(module) is None]


def _charset(media_type: str) -> str:
    """`utf-8` of `text/html; charset=utf-8`; "" where none is named."""
    for parameter in media_type.split(";")[1:]:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "charset":
            return value.strip().strip('"')
    return ""
