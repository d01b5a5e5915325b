"""Content parts of a message into Anthropic's content blocks.

Strategy: a table from the part's type to the function that rewrites it; Anthropic's own block types pass as they are.
The one rule: a part is carried whole or refused with its path (`messages[1].content[0]`); URLs go through, nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

from proxy.translation import Fields, data_url, invalid, unsupported

Json = dict[str, Any]

IMAGE_TYPES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
# https://docs.anthropic.com/en/api/messages#body-messages-content; a client that knows them may use them.
NATIVE_TYPES = frozenset({"image", "document", "search_result", "container_upload", "tool_reference"})
NATIVE_OWN_TYPES = frozenset({"thinking", "redacted_thinking"})
# Fields of a document that clients put on the part.
DOCUMENT_FIELDS = ("title", "context", "citations")


def blocks_of(content: object, path: str, fields: Fields, *, own: bool = False) -> list[Json]:
    """The blocks of a message's content: null, a string or a list of parts. own: of the assistant, which has text only."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content.strip() else []
    if not isinstance(content, list):
        invalid(path, "must be a string or a list of content parts")
    found = (_block(part, f"{path}[{number}]", fields, own=own) for number, part in enumerate(content))
    return [block for block in found if block is not None]


def text_blocks(content: object, path: str, fields: Fields) -> list[Json]:
    """The same, where Anthropic takes text only (`system`)."""
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, dict) or part.get("type") not in TEXT_TYPES:
            invalid(f"{path}[{number}]", "only text parts are possible here")
    return blocks_of(content, path, fields)


def _block(part: object, path: str, fields: Fields, *, own: bool) -> Json | None:
    if not isinstance(part, dict):
        invalid(path, "must be an object")
    kind = part.get("type")
    if kind in TEXT_TYPES:
        return _text(part, path)
    if kind in (NATIVE_OWN_TYPES if own else NATIVE_TYPES):
        return dict(part)
    rewrite = None if own else PARTS.get(kind)
    if rewrite is None:
        unsupported(fields.target, path, f"A content part of type '{kind}'")
    block = rewrite(part, path, fields)
    if part.get("cache_control") is not None:
        block["cache_control"] = part["cache_control"]
    return block


def _text(part: Json, path: str) -> Json | None:
    text = part.get("text") if part.get("type") != "refusal" else part.get("refusal")
    if not isinstance(text, str):
        invalid(f"{path}.text", "must be a string")
    if not text.strip():
        return None
    kept = {name: part[name] for name in ("cache_control", "citations") if part.get(name) is not None}
    return {"type": "text", "text": text, **kept}


def _image(part: Json, path: str, fields: Fields) -> Json:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        invalid(f"{path}.image_url.url", "must be a string")
    detail = image.get("detail") if isinstance(image, dict) else None
    if detail not in (None, "auto") and "image_url.detail" not in fields.dropped:
        fields.drop("image_url.detail")
    if url[:8].lower().startswith(("http://", "https://")):
        return {"type": "image", "source": {"type": "url", "url": url}}
    inline = data_url(url)
    if inline is None or inline[0].lower() not in IMAGE_TYPES:
        unsupported(fields.target, path, "An image that is neither an http(s) URL nor base64 data of JPEG, PNG, GIF or WebP")
    return {"type": "image", "source": _base64(inline)}


def _base64(inline: tuple[str, str]) -> Json:
    return {"type": "base64", "media_type": inline[0].lower(), "data": inline[1]}


def _file(part: Json, path: str, fields: Fields) -> Json:
    """`{"file": {"file_data": "data:…", "filename"}}`, or a `file_id` of Anthropic's Files API."""
    file = part.get("file")
    if not isinstance(file, dict):
        invalid(f"{path}.file", "must be an object")
    block: Json = {"type": "document", "source": _source(file, path, fields)}
    if block["source"].get("media_type") in IMAGE_TYPES:
        return {**block, "type": "image"}
    if isinstance(file.get("filename"), str) and file["filename"]:
        block["title"] = file["filename"]
    block.update({name: part[name] for name in DOCUMENT_FIELDS if part.get(name) is not None})
    return block


def _source(file: Json, path: str, fields: Fields) -> Json:
    """https://docs.anthropic.com/en/docs/build-with-claude/pdf-support; plain text goes as text."""
    if isinstance(file.get("file_id"), str) and file.get("file_data") is None:
        return {"type": "file", "file_id": file["file_id"]}
    text = file.get("file_data")
    inline = data_url(text) if isinstance(text, str) else None
    if inline is None:
        unsupported(fields.target, path, "A file that is not a base64 data: URL")
    kind = inline[0].lower()
    if kind == "text/plain":
        return {"type": "text", "media_type": kind, "data": _plain(inline[1], path)}
    if kind != "application/pdf" and kind not in IMAGE_TYPES:
        unsupported(fields.target, path, f"A file of type '{kind}'")
    return _base64(inline)


def _plain(data: str, path: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        invalid(f"{path}.file.file_data", "must be base64 of UTF-8 text")


PARTS: Mapping[object, Callable[[Json, str, Fields], Json]] = {"image_url": _image, "file": _file}
