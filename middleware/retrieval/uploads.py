"""An upload, out of the bytes of a multipart/form-data body (RFC 7578), in the shape of OpenAI's `POST /v1/files`.

Strategy: `python_multipart` frames the body, without I/O; what it calls back with is put together part by part, and then looked
at as a whole: one `file`, and small text fields. Ten megabytes take 4 ms and a digest, so it is done beside the event loop.
The one rule: what a client calls its file is a label. It is cleaned before anybody sees it, and never is a path.

OpenAI's shape: https://platform.openai.com/docs/api-reference/files/create
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from middleware.retrieval.asked import collection
from middleware.retrieval.refusals import bad
from proxy.errors import Refused
from proxy.own_fields import Field

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELDS = ("purpose", "knowledge_id")
PURPOSE = re.compile(r"[\w-]{1,64}", re.ASCII)
# It warns of every body that is no form; clients are told, and fill no log.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

MOST_PARTS, MOST_FIELD, MOST_NAME = 16, 256, 200


@dataclass(frozen=True, slots=True)
class Upload:
    """What was uploaded. declared: its media type with its parameters, as the client says. digest: SHA-256, hexadecimal."""

    name: str
    content: bytes
    declared: str
    digest: str
    purpose: str = "assistants"
    knowledge: str = ""


@dataclass(slots=True)
class Part:
    """One part of a form. headers: by name in lower case, as bytes."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    name: str = ""
    filename: str | None = None

    @property
    def content(self) -> bytes:
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)


def read(body: bytes, content_type: str, most: int) -> Upload:
    """The upload in a request's body. most: bytes of the file. Raises Refused (400, 413, 415)."""
    parts = _parts(body, _boundary(content_type))
    files = [part for part in parts if part.name == "file"]
    if not files:
        raise bad("file", "must be there, as a part with a filename")
    if len(files) > 1:
        raise bad("file", "must be one file per upload")
    fields = _fields(part for part in parts if part.name != "file")
    file = files[0]
    if file.filename is None:
        raise bad("file", "must have a filename")
    content = file.content
    if not content:
        raise bad("file", "must not be empty")
    if len(content) > most:
        raise Refused(f"file: is larger than the {most} bytes that are allowed.", status=413, code="file_too_large", param="file")
    purpose = fields.get("purpose", "assistants")
    if not PURPOSE.fullmatch(purpose):
        raise bad("purpose", "must be a word such as assistants")
    knowledge = collection(Field(fields["knowledge_id"], "knowledge_id")) if fields.get("knowledge_id") else ""
    declared = file.headers.get(b"content-type", b"").decode("ascii", "replace").strip()[:MOST_NAME]
    return Upload(clean_name(file.filename), content, declared, sha256(content).hexdigest(), purpose, knowledge)


def _boundary(content_type: str) -> bytes:
    kind = ""
    options: dict[bytes, bytes] = {}
    try:
        found, options = parse_options_header(content_type)
        kind = found.decode("latin-1")
    except UnicodeError:
        pass  # then it is no multipart type
    if kind != "multipart/form-data":
        message = "An upload must be multipart/form-data, as `curl -F file=@name` sends it."
        raise Refused(message, status=415, code="unsupported_media_type")
    if not (boundary := options.get(b"boundary")):
        raise Refused("Content-Type: has no boundary.", code="invalid_multipart")
    return boundary


def _parts(body: bytes, boundary: bytes) -> list[Part]:
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
    except FormParserError as error:
        raise Refused(f"The body is not the multipart/form-data that it says: {error}.", code="invalid_multipart") from None
    if parser.state != MultipartState.END:
        raise Refused("The body ends before its last multipart boundary.", code="invalid_multipart")
    return form.parts


class _Form:
    """What the parser calls back with, put together."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._name = self._value = b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self.part_begin,
            "on_header_field": self.header_field,
            "on_header_value": self.header_value,
            "on_header_end": self.header_end,
            "on_headers_finished": self.headers_finished,
            "on_part_data": self.part_data,
        }

    def part_begin(self) -> None:
        if len(self.parts) >= MOST_PARTS:
            raise Refused(f"The form has more than {MOST_PARTS} parts.", code="invalid_multipart")
        self.parts.append(Part())

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self.parts[-1].headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def headers_finished(self) -> None:
        part = self.parts[-1]
        _, options = parse_options_header(part.headers.get(b"content-disposition", b""))
        part.name = options.get(b"name", b"").decode(errors="replace")
        if (filename := options.get(b"filename")) is not None:
            part.filename = filename.decode(errors="replace")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].pieces.append(data[start:end])


def _fields(parts: Iterable[Part]) -> dict[str, str]:
    """The text fields. One that is not known is refused: who sends `expires_after` relies on it."""
    found: dict[str, str] = {}
    for part in parts:
        name = re.sub(r"[^\w\[\].-]", "?", part.name[:64], flags=re.ASCII)
        if part.name not in FIELDS:
            raise bad(name, f"is not known here, only file, {', '.join(FIELDS)}")
        if len(part.content) > MOST_FIELD:
            raise bad(name, f"must be at most {MOST_FIELD} bytes")
        found[name] = part.content.decode(errors="replace")
    return found


def clean_name(sent: str) -> str:
    """The last segment of what may have been a path, without control and format characters; `file` where nothing is left."""
    name = re.split(r"[/\\]", sent)[-1]
    name = "".join(" " if character.isspace() else character for character in name if unicodedata.category(character)[0] != "C")
    name = " ".join(name.split())
    if len(name) > MOST_NAME:
        stem, dot, ending = name.rpartition(".")
        name = stem[: MOST_NAME - 1 - len(ending)] + dot + ending if dot and len(ending) < 16 else name[:MOST_NAME]
    return name if name.strip(". ") else "file"
