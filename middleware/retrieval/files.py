"""The files API: upload, list, look, download, delete, in the shape of OpenAI's `/v1/files`, as its SDKs use it.

Strategy: a file belongs to the key that uploaded it (`Principal.scope`); every look-up takes the owner, so a file of somebody
else's is not found, like one that never was. The same content in the same collection is one file, however often it is uploaded.
The one rule: what was uploaded comes back as bytes to be saved, never as something that a browser would show or run.

Shapes: https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from weakref import WeakValueDictionary

from middleware.retrieval.refusals import answered, bad, missing, stored
from middleware.retrieval.text import ExtractionError, kind_of
from middleware.retrieval.uploads import Upload, read
from proxy.errors import Refused
from proxy.pipeline import Answer, Endpoint, Query
from proxy.store import File, Library

Json = dict[str, Any]
MOST_LISTED = 10_000
LIST_FIELDS = frozenset({"limit", "after", "order", "purpose"})


@dataclass(frozen=True, slots=True)
class Bounds:
    """file_bytes: of one file. files, bytes: of one key."""

    file_bytes: int
    files: int
    bytes: int


class Files:
    """The endpoints. library: where files are kept. uploaded: called when there is something to index. clock: Unix seconds."""

    def __init__(
        self, library: Callable[[], Library], bounds: Bounds, uploaded: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self._library, self._bounds, self._uploaded, self._clock = library, bounds, uploaded, clock
        # By owner, for as long as somebody uploads.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def endpoints(self, base: str) -> Sequence[Endpoint]:
        path = f"{base}/files"
        return (
            Endpoint("POST", path, stored(self._upload)),
            Endpoint("GET", path, stored(self._list)),
            Endpoint("GET", path + "/{id}", stored(self._look)),
            Endpoint("DELETE", path + "/{id}", stored(self._delete)),
            Endpoint("GET", path + "/{id}/content", stored(self._content)),
        )

    async def _upload(self, query: Query) -> Answer:
        """`POST /v1/files`. The file is there when this returns; indexing follows."""
        sent = await asyncio.to_thread(read, query.body, query.headers.get("content-type", ""), self._bounds.file_bytes)
        try:
            await asyncio.to_thread(kind_of, sent.content, sent.name, sent.declared)
        except ExtractionError as error:
            raise Refused(f"file: {error}", code="unsupported_file", param="file") from None
        owner = query.principal.scope
        # One after the other: each would see the room that all of them together have not.
        async with self._turns.setdefault(owner, asyncio.Lock()):
            found = await self._same(owner, sent) or await self._library().add(owner, self._file(sent), sent.content)
        self._uploaded()
        return answered(shown(found))

    async def _same(self, owner: str, sent: Upload) -> File | None:
        """None where there is room for one more; where there is none, the file of the same content. Raises Refused."""
        count, size = await self._library().held(owner)
        if count < self._bounds.files and size + len(sent.content) <= self._bounds.bytes:
            return None
        for file in await self._library().files(owner, MOST_LISTED):
            if (file.digest, file.knowledge) == (sent.digest, sent.knowledge):
                return file
        most = f"{self._bounds.files} files and {self._bounds.bytes} bytes"
        raise Refused(f"A key may keep at most {most}; delete some first.", status=413, code="too_many_files", param="file")

    def _file(self, sent: Upload) -> File:
        return File(
            id=f"file-{secrets.token_hex(12)}",
            name=sent.name,
            media_type=sent.declared,
            bytes=len(sent.content),
            digest=sent.digest,
            created=self._clock(),
            purpose=sent.purpose,
            knowledge=sent.knowledge,
        )

    async def _list(self, query: Query) -> Answer:
        """`GET /v1/files?limit=&after=&order=asc|desc&purpose=`."""
        owner, params = query.principal.scope, query.params
        for name in params.keys() - LIST_FIELDS:
            raise bad(name[:64], "is not known here")
        limit = _limit(params.get("limit"))
        after, order, purpose = params.get("after") or None, params.get("order") or "desc", params.get("purpose") or None
        if order not in ("asc", "desc"):
            raise bad("order", "must be asc or desc")
        if after is not None and await self._library().file(owner, after) is None:
            raise bad("after", "there is no such file")
        if order == "desc":
            found = list(await self._library().files(owner, limit + 1, after, purpose))
        else:
            found = _behind(list(await self._library().files(owner, MOST_LISTED, None, purpose))[::-1], after)
        return answered({**listed([shown(file) for file in found[:limit]]), "has_more": len(found) > limit})

    async def _look(self, query: Query) -> Answer:
        """`GET /v1/files/{id}`."""
        return answered(shown(await self._found(query)))

    async def _content(self, query: Query) -> Answer:
        """`GET /v1/files/{id}/content`: the bytes as they were uploaded."""
        file = await self._found(query)
        content = await self._library().content(query.principal.scope, file.id)
        if content is None:
            raise missing()
        headers = {
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name, safe='')}",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-store",
        }
        return Answer(content, content_type="application/octet-stream", headers=headers)

    async def _delete(self, query: Query) -> Answer:
        """`DELETE /v1/files/{id}`: with its passages; an indexing of it stops."""
        identity = _id(query.path)
        if not await self._library().remove(query.principal.scope, identity):
            raise missing()
        return answered({"id": identity, "object": "file", "deleted": True})

    async def _found(self, query: Query) -> File:
        file = await self._library().file(query.principal.scope, _id(query.path))
        if file is None:
            raise missing()
        return file


def shown(file: File) -> Json:
    """OpenAI's File object; what it has no place for is under `penstock`. Its status knows no `processing`: that is `uploaded`
    with some progress."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created),
        "expires_at": None,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "uploaded" if file.status == "processing" else file.status,
        "status_details": file.error,
        "penstock": {
            "progress": round(file.progress, 3),
            "passages": file.passages,
            "error": file.error,
            "knowledge_id": file.knowledge or None,
        },
    }


def listed(entries: Sequence[Json]) -> Json:
    """OpenAI's list object."""
    ids = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"]} if entries else {"first_id": None, "last_id": None}
    return {"object": "list", "data": entries, **ids}


def _id(path: str) -> str:
    return path.partition("/files/")[2].removesuffix("/content")


def _limit(written: str | None) -> int:
    if written is None or written == "":
        return MOST_LISTED
    if not (written.isascii() and written.isdigit() and len(written) < 6 and 1 <= int(written) <= MOST_LISTED):
        raise bad("limit", f"must be a whole number from 1 to {MOST_LISTED}")
    return int(written)


def _behind(files: list[File], after: str | None) -> list[File]:
    """Those behind `after`; all where it is None or, by its purpose, not among them."""
    place = next((number for number, file in enumerate(files) if file.id == after), -1)
    return files[place + 1 :]
