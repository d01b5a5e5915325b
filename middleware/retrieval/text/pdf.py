"""PDF: the text layer, page by page.

Strategy: pypdf reads it; words that the typesetter parted at a line's end are joined again. A page that cannot be read fails the
file, because a file that silently lacks a page answers wrongly; how long and how much memory it takes is bounded from outside.
The one rule: a file without a text layer says so, rather than being taken and never found.
"""

from __future__ import annotations

import io
import re

from pypdf import PageObject, PasswordType, PdfReader
from pypdf.errors import DependencyError, LimitReachedError

from middleware.retrieval.text.document import Document, ExtractionError, Limits, Outline

_PARTED = re.compile(r"(?<=[^\W\d_])[-\u2010]\n(?=[^\W\d_])")
_IMAGES_ONLY = "The PDF has no text, only images; run it through text recognition (OCR) first."


def read(content: bytes, charset: str, limits: Limits) -> Document:
    reader = _opened(content)
    number = _pages(reader)
    if number > limits.pages:
        raise ExtractionError(f"The PDF has {number:,} pages; the most that is taken is {limits.pages:,}.")
    outline, found = Outline(limits), False
    for page in range(number):
        outline.page = page + 1
        text = _joined(_text(reader, page))
        found = found or bool(text.strip())
        outline.add(text)
    if not found:
        raise ExtractionError(_IMAGES_ONLY)
    return outline.document("pdf")


def _opened(content: bytes) -> PdfReader:
    try:
        reader = PdfReader(io.BytesIO(content))
        locked = reader.is_encrypted and reader.decrypt("") is PasswordType.NOT_DECRYPTED
    except DependencyError:
        raise ExtractionError("The PDF is protected in a way that cannot be opened here; save it without protection.") from None
    except MemoryError:
        raise
    except Exception as error:
        raise _broken() from error
    if locked:
        raise ExtractionError("The PDF needs a password; save it without one.")
    return reader


def _pages(reader: PdfReader) -> int:
    try:
        return len(reader.pages)
    except MemoryError:
        raise
    except Exception as error:
        raise _broken() from error


def _text(reader: PdfReader, page: int) -> str:
    try:
        found: PageObject = reader.pages[page]
        return found.extract_text()
    except MemoryError:
        raise
    except LimitReachedError as error:
        raise ExtractionError(f"Page {page + 1} of the PDF unpacks to more than is taken.") from error
    except Exception as error:
        raise ExtractionError(f"Page {page + 1} of the PDF cannot be read.") from error


def _broken() -> ExtractionError:
    return ExtractionError("The PDF is broken or incomplete.")


def _joined(text: str) -> str:
    """Without the hyphens at the ends of lines, where a small letter goes on."""
    return _PARTED.sub(lambda found: "" if text[found.end()].islower() else found[0], text)
