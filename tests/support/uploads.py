"""Files for the tests of retrieval: uploads as any HTTP client sends them, small documents made on the spot, waiting for the end.

The one rule: what a test says of a file it learns over HTTP, as a client would.
"""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp

Json = dict[str, Any]
BOUNDARY = "penstock-test"
TEXT = """# The penstock at Ulm

It is 42 metres long, and was built in 1931 of riveted steel.

# Turbine

A Francis turbine of 3 megawatts turns below it.
"""


@dataclass(frozen=True)
class Got:
    """What came back. json: None where the body is none."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def send(port: int, method: str, path: str, body: Any = None, *, key: str = "", content_type: str = "") -> Got:
    """A request. body: bytes, or what is sent as JSON."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": content_type or "application/json"} if raw is not None else {}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        session.request(
            method, f"http://127.0.0.1:{port}{path}", data=raw if raw is None else io.BytesIO(raw), headers=headers
        ) as response,
    ):
        return Got(response.status, response.headers, await response.read())


def part(name: str, content: bytes | str, filename: str | None = None, content_type: str = "") -> bytes:
    """One part of a form, with its delimiter."""
    data = content.encode() if isinstance(content, str) else content
    file = "" if filename is None else f'; filename="{filename}"'
    kind = f"\r\nContent-Type: {content_type}" if content_type else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}{kind}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


async def posted(port: int, body: bytes, *, key: str = "", path: str = "/v1/files") -> Got:
    """A form as it stands."""
    return await send(port, "POST", path, body, key=key, content_type=f"multipart/form-data; boundary={BOUNDARY}")


async def upload(port: int, content: bytes | str = TEXT, name: str = "ulm.md", *, key: str = "", **fields: str) -> Json:
    """The File object of an upload that is taken."""
    got = await posted(port, form(*(part(field, value) for field, value in fields.items()), part("file", content, name)), key=key)
    assert got.status == 200, got.body
    found: Json = got.json
    return found


async def ended(port: int, id: str, *, key: str = "") -> Json:
    """The File object when its indexing is over, however it ended."""
    async with asyncio.timeout(15):
        while True:
            found: Json = (await send(port, "GET", f"/v1/files/{id}", key=key)).json
            if found["status"] in ("processed", "error"):
                return found
            await asyncio.sleep(0.02)


async def indexed(port: int, content: bytes | str = TEXT, name: str = "ulm.md", *, key: str = "", **fields: str) -> Json:
    """Uploaded, and searchable."""
    found = await ended(port, (await upload(port, content, name, key=key, **fields))["id"], key=key)
    assert found["status"] == "processed", found
    return found


async def listed(port: int, *, key: str = "", **params: Any) -> Json:
    found: Json = (await send(port, "GET", f"/v1/files?{urlencode(params)}", key=key)).json
    return found


def pdf(*lines: str) -> bytes:
    """A PDF of one page."""
    text = " ".join(f"({line}) Tj T*" for line in lines)
    content = f"BT /F1 12 Tf 14 TL 72 720 Td {text} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, each in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return bytes(out) + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer


def zip_bomb() -> bytes:
    """A Word file whose text unpacks to 300 MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with archive.open("word/document.xml", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(b" " * 2**20)
        archive.writestr("[Content_Types].xml", "<Types/>")
    return out.getvalue()
