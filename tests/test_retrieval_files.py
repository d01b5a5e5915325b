"""The files API: what is taken and what is refused, lists and pages, downloads that run nowhere, and whose files are whose.

Strategy: a running gateway on a store of SQLite, asked by raw requests; the parser of forms also by any bytes that hypothesis
finds. The official SDKs ask in tests/test_retrieval_clients.py.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from middleware.retrieval import layer
from middleware.retrieval.uploads import MOST_NAME, clean_name, read
from proxy.app import Gateway
from proxy.config import ConfigError
from proxy.errors import Refused
from proxy.pipeline import BASES
from proxy.store import StoreUnavailable
from proxy.store.sqlite.files import SqliteLibrary
from tests.support.gateway import gateway
from tests.support.uploads import BOUNDARY, TEXT, ended, form, indexed, listed, part, pdf, posted, send, upload

Json = dict[str, Any]
CONFIG = """
server: {{port: 0, max_body: 1MiB}}
data_dir: {folder}
providers: {{demo: {{api: demo}}}}
middleware:
  - auth: {{keys: [{{name: one, key: {one}}}, {{name: two, key: {two}}}]}}
  - metrics
  - retrieval: {{{options}}}
"""
ONE, TWO = "key-one-0123456789abcdef", "key-two-0123456789abcdef"
KIND = f"multipart/form-data; boundary={BOUNDARY}"


@asynccontextmanager
async def serving(folder: Path, options: str = "") -> AsyncIterator[Gateway]:
    async with gateway(config=CONFIG, folder=str(folder), one=ONE, two=TWO, options=options) as running:
        yield running


# Uploads


async def test_an_upload_becomes_a_file_in_openais_shape_and_is_indexed(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        sent = await upload(running.port, key=ONE, purpose="user_data", knowledge_id="handbook")
        found = await ended(running.port, sent["id"], key=ONE)
    assert sent.pop("created_at") > 1_700_000_000
    assert sent.pop("id").startswith("file-")
    own = {"progress": 0.0, "passages": 0, "error": None, "knowledge_id": "handbook"}
    rest = {"object": "file", "bytes": len(TEXT), "expires_at": None, "filename": "ulm.md", "purpose": "user_data"}
    assert sent == {**rest, "status": "uploaded", "status_details": None, "penstock": own}
    assert found["status"] == "processed"
    assert found["penstock"] == {**own, "progress": 1.0, "passages": 2}


async def test_the_same_content_is_the_same_file_within_its_collection(tmp_path: Path) -> None:
    """Whatever it is called then; also where there is no room for another."""
    async with serving(tmp_path, "max_files: 2") as running:
        first = await indexed(running.port, key=ONE)
        again = await upload(running.port, name="other.md", key=ONE)
        elsewhere = await upload(running.port, knowledge_id="handbook", key=ONE)
        full = await upload(running.port, key=ONE)
        others = await upload(running.port, key=TWO)
    assert again == first == full
    assert len({first["id"], elsewhere["id"], others["id"]}) == 3


FILE = part("file", "text", "a.txt")
REFUSED = [
    (form(), 400, "invalid_value", "file"),
    (form(part("purpose", "assistants")), 400, "invalid_value", "file"),
    (form(part("file", "text")), 400, "invalid_value", "file"),
    (form(part("file", "", "a.txt")), 400, "invalid_value", "file"),
    (form(FILE, FILE), 400, "invalid_value", "file"),
    (form(FILE, part("expires_after[seconds]", "3600")), 400, "invalid_value", "expires_after[seconds]"),
    (form(FILE, part("purpose", "two words")), 400, "invalid_value", "purpose"),
    (form(FILE, part("purpose", "x" * 300)), 400, "invalid_value", "purpose"),
    (form(FILE, part("knowledge_id", "../up")), 400, "invalid_value", "knowledge_id"),
    (form(*[FILE] * 17), 400, "invalid_multipart", None),
    (form(part("file", b"\x00\x01\x02" * 99, "a.bin")), 400, "unsupported_file", "file"),
    (form(part("file", b"PK\x03\x04 no archive", "a.zip")), 400, "unsupported_file", "file"),
    (form(part("file", "no pdf", "a.pdf")), 400, "unsupported_file", "file"),
    (form(part("file", "x" * 2000, "a.txt")), 413, "file_too_large", "file"),
    (b"", 400, "invalid_multipart", None),
    (b"garbage", 400, "invalid_multipart", None),
    (FILE, 400, "invalid_multipart", None),
    (form(FILE)[:-4], 400, "invalid_multipart", None),
]


async def test_what_cannot_be_taken_is_refused_with_its_field_and_keeps_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, "max_file_bytes: 1999") as running:
        for body, status, code, param in REFUSED:
            got = await posted(running.port, body, key=ONE)
            error = got.json["error"]
            assert (got.status, error["code"], error["param"]) == (status, code, param), (body[:99], error)
            assert error["type"] == "invalid_request_error"
        large = await posted(running.port, form(part("file", "x" * 2**20, "a.txt")), key=ONE)
        assert (large.status, large.json["error"]["code"]) == (413, "body_too_large")
        assert (await listed(running.port, key=ONE))["data"] == []


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 415), ("multipart/mixed; boundary=x", 415), ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400), ("multipart/form-data; boundary=" + "x" * 2000, 400),
        ("multipart/form-data; boundary=other", 400),
    ],
)  # fmt: skip
async def test_a_content_type_that_frames_nothing_is_refused(tmp_path: Path, kind: str, status: int) -> None:
    with pytest.raises(Refused) as caught:
        read(form(FILE), kind, 1000)
    assert caught.value.status == status


@settings(max_examples=40)
@given(st.binary(max_size=300), st.text(max_size=30))
def test_any_bytes_are_an_upload_or_a_refusal(noise: bytes, kind: str) -> None:
    for body in (noise, form(FILE)[: len(noise)] + noise, form(part("file", noise, "a.txt"))):
        for content_type in (KIND, kind, f"multipart/form-data; boundary={kind}"):
            with suppress(Refused):
                read(body, content_type, 1000)


@given(st.binary(min_size=1, max_size=200))
def test_a_files_bytes_are_what_was_sent(content: bytes) -> None:
    assert read(form(part("file", content, "a.txt"), part("purpose", "vision")), KIND, 1000).content == content


async def test_a_key_keeps_no_more_by_uploading_all_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, "max_files: 2") as running:
        sent = [form(part("file", f"text {number}", "a.txt")) for number in range(8)]
        found = await asyncio.gather(*(posted(running.port, body, key=ONE) for body in sent))
        assert sorted(got.status for got in found) == [200] * 2 + [413] * 6
        assert len((await send(running.port, "GET", "/v1/files", key=ONE)).json["data"]) == 2


async def test_a_key_may_keep_so_much_and_no_more(tmp_path: Path) -> None:
    async with serving(tmp_path, "max_files: 2, max_bytes: 1024") as running:
        await upload(running.port, "a" * 500, "a.txt", key=ONE)
        full = await posted(running.port, form(part("file", "b" * 525, "b.txt")), key=ONE)
        assert (full.status, full.json["error"]["code"]) == (413, "too_many_files")
        second = await upload(running.port, "c", "c.txt", key=ONE)
        many = await posted(running.port, form(part("file", "d", "d.txt")), key=ONE)
        assert (many.status, many.json["error"]["code"]) == (413, "too_many_files")
        await upload(running.port, "d", "d.txt", key=TWO)
        await send(running.port, "DELETE", f"/v1/files/{second['id']}", key=ONE)
        await upload(running.port, "d", "d.txt", key=ONE)


# Names


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"), ("C:\\files\\plan.pdf", "plan.pdf"), ("a\r\nSet-Cookie: b=c", "aSet-Cookie: b=c"),
        ("..", "file"), ("", "file"), ("/", "file"), ("\u202egnp.txt", "gnp.txt"), ("Größe 🌊.md", "Größe 🌊.md"),
        ("a  b.txt", "a b.txt"),
        ("x" * 300 + ".md", "x" * 197 + ".md"), ("y" * 300, "y" * 200),
    ],
)  # fmt: skip
def test_a_name_is_a_label_and_no_path(sent: str, kept: str) -> None:
    assert clean_name(sent) == kept


@given(st.text())
def test_a_clean_name_is_short_and_has_no_control_characters(sent: str) -> None:
    name = clean_name(sent)
    assert 1 <= len(name) <= MOST_NAME
    assert not any(unicodedata.category(character)[0] == "C" or character in "/\\" for character in name)
    assert clean_name(name) == name


async def test_a_download_is_the_same_bytes_to_be_saved_and_its_name_ends_no_header(tmp_path: Path) -> None:
    content = "<html><script>alert(1)</script><p>Grüße</p></html>"
    async with serving(tmp_path) as running:
        sent = await upload(running.port, content, 'x%0d%0aSet-Cookie: a=b";ö.html', key=ONE)
        got = await send(running.port, "GET", f"/v1/files/{sent['id']}/content", key=ONE)
    assert got.body == content.encode()
    assert got.headers["Content-Type"] == "application/octet-stream"
    assert got.headers["X-Content-Type-Options"] == "nosniff"
    name = "x%250d%250aSet-Cookie%3A%20a%3Db"
    assert got.headers["Content-Disposition"].startswith(f"attachment; filename*=UTF-8''{name}")
    assert "Set-Cookie" not in got.headers


# Lists


async def test_lists_have_pages_an_order_and_a_purpose(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        port = running.port
        ids = [(await upload(port, f"text {number}", f"{number}.txt", key=ONE))["id"] for number in range(5)]
        ids.append((await upload(port, "for you", "u.txt", purpose="user_data", key=ONE))["id"])
        for order, wanted in (("desc", ids[::-1]), ("asc", ids)):
            seen: list[str] = []
            while len(seen) < 6:
                behind = {"after": seen[-1]} if seen else {}
                page = await listed(port, key=ONE, limit=4, order=order, **behind)
                seen += [file["id"] for file in page["data"]]
                assert page["object"] == "list"
                assert page["has_more"] is (len(seen) < 6)
                assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            assert seen == wanted
        assert [file["id"] for file in (await listed(port, key=ONE, purpose="user_data"))["data"]] == ids[5:]
        empty: Json = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        assert await listed(port, key=TWO) == empty
        for wrong in ("limit=0", "limit=x", "limit=10001", "order=up", "after=file-unknown", "limt=3"):
            got = await send(port, "GET", f"/v1/files?{wrong}", key=ONE)
            assert (got.status, got.json["error"]["param"]) == (400, wrong.partition("=")[0])


async def test_every_base_url_has_the_files(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        sent = await upload(running.port, key=ONE)
        for base in BASES:
            got = await send(running.port, "GET", f"{base}/files/{sent['id']}", key=ONE)
            assert got.json["id"] == sent["id"]
            assert (await send(running.port, "POST", f"{base}/search", {"query": "x"}, key=ONE)).status == 200


async def test_a_deleted_file_is_gone_with_its_passages(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        port, file = running.port, await indexed(running.port, key=ONE)
        assert (await send(port, "POST", "/v1/search", {"query": "turbine"}, key=ONE)).json["data"]
        gone = await send(port, "DELETE", f"/v1/files/{file['id']}", key=ONE)
        assert gone.json == {"id": file["id"], "object": "file", "deleted": True}
        assert (await send(port, "POST", "/v1/search", {"query": "turbine"}, key=ONE)).json["data"] == []
        assert (await send(port, "DELETE", f"/v1/files/{file['id']}", key=ONE)).status == 404


# Tenants

POINTS = [("GET", "/v1/files/{id}"), ("HEAD", "/v1/files/{id}"), ("GET", "/v1/files/{id}/content"), ("DELETE", "/v1/files/{id}")]


async def test_a_foreign_file_is_as_one_that_never_was(tmp_path: Path) -> None:
    """Answered alike at every endpoint, and untouched by all of it."""
    async with serving(tmp_path) as running:
        port, file = running.port, await indexed(running.port, knowledge_id="handbook", key=ONE)
        for method, path in POINTS:
            foreign = await send(port, method, path.format(id=file["id"]), key=TWO)
            unknown = await send(port, method, path.format(id="file-0123456789abcdef01234567"), key=TWO)
            assert (foreign.status, foreign.body) == (unknown.status, unknown.body)
            assert foreign.status == 404
        assert (await listed(port, key=TWO))["data"] == []
        after = [await send(port, "GET", f"/v1/files?after={id}", key=TWO) for id in (file["id"], "file-unknown")]
        assert after[0].body == after[1].body
        for body in ({}, {"knowledge": "handbook"}, {"search_type": "keyword_search"}):
            assert (await send(port, "POST", "/v1/search", {"query": "turbine", **body}, key=TWO)).json["data"] == []
        named = [await send(port, "POST", "/v1/search", {"query": "x", "files": [id]}, key=TWO) for id in (file["id"], "file-x")]
        assert [got.status for got in named] == [404, 404]
        assert named[0].body == named[1].body
        assert named[0].json["error"]["param"] == "files[0]"
        assert (await send(port, "GET", f"/v1/files/{file['id']}", key=ONE)).status == 200
        assert len((await send(port, "POST", "/v1/search", {"query": "turbine"}, key=ONE)).json["data"]) == 1


async def test_without_a_key_there_is_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        for method, path in (*POINTS, ("GET", "/v1/files"), ("POST", "/v1/files"), ("POST", "/v1/search")):
            assert (await send(running.port, method, path.format(id="file-1"), b"" if method == "POST" else None)).status == 401


# Search without a model


async def test_a_search_shows_what_a_model_would_be_given(tmp_path: Path) -> None:
    async with serving(tmp_path, "embeddings: demo/embed") as running:
        port = running.port
        file = await indexed(port, key=ONE)
        other = await indexed(port, pdf("The dam at Bonn is low."), "bonn.pdf", knowledge_id="dams", key=ONE)

        async def search(**body: Any) -> list[Json]:
            got = await send(port, "POST", "/v1/search", {"query": "penstock Ulm riveted steel", **body}, key=ONE)
            assert got.status == 200, got.body
            assert got.headers["X-Penstock-Retrieval"] == f"passages={len(got.json['data'])}"
            assert got.json["object"] == "list"
            found: list[Json] = got.json["data"]
            return found

        best, *_ = await search()
        assert best.pop("score") > 0
        text = "It is 42 metres long, and was built in 1931 of riveted steel."
        place = {"file_id": file["id"], "filename": "ulm.md", "passage": 0, "page": None, "heading": "The penstock at Ulm"}
        assert best == {**place, "text": text}
        (dam,) = await search(knowledge="dams", search_type="keyword_search", query="dam")
        assert (dam["file_id"], dam["page"], dam["heading"]) == (other["id"], 1, None)
        assert len(await search(top_k=1)) == 1
        assert {hit["file_id"] for hit in await search(files=[other["id"]], query="is")} == {other["id"]}
        assert {hit["file_id"] for hit in await search(knowledge=["dams", "none"], query="is")} == {other["id"]}
        assert await search(threshold=1) == []
        assert await search(search_type="vector_search", query="riveted steel")
        assert await search(query="   ") == []


WRONG: list[tuple[Any, str | None]] = [
    ({}, "query"),
    ({"query": ""}, "query"),
    ({"query": 1}, "query"),
    ({"query": "x" * 4001}, "query"),
    ({"query": "x", "top_k": 0}, "top_k"),
    ({"query": "x", "top_k": 51}, "top_k"),
    ({"query": "x", "files": "f"}, "files"),
    ({"query": "x", "files": [1]}, "files[0]"),
    ({"query": "x", "files": []}, "files"),
    ({"query": "x", "knowledge": []}, "knowledge"),
    ({"query": "x", "knowledge": "a b"}, "knowledge"),
    ({"query": "x", "knowledge": ["a", "/"]}, "knowledge[1]"),
    ({"query": "x", "threshold": 1.1}, "threshold"),
    ({"query": "x", "search_type": "psychic"}, "search_type"),
    ({"query": "x", "search_type": "vector_search"}, "search_type"),
    ({"query": "x", "flies": ["f"]}, "flies"),
    (b"{", None),
    (b"[]", None),
]


async def test_a_search_of_the_wrong_shape_is_refused_with_its_path(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        for body, param in WRONG:
            got = await send(running.port, "POST", "/v1/search", body, key=ONE)
            assert (got.status, got.json["error"]["param"]) == (400, param), body


# The store is down


async def test_without_the_store_the_endpoints_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def down(*_: Any) -> Any:
        raise StoreUnavailable("no words of this reach a client")

    async with serving(tmp_path) as running:
        for name in ("file", "files", "content", "remove", "held", "search_text"):
            monkeypatch.setattr(SqliteLibrary, name, down)
        asked = [
            send(running.port, method, path.format(id="file-1"), key=ONE) for method, path in (*POINTS, ("GET", "/v1/files"))
        ]
        asked += [posted(running.port, form(FILE), key=ONE), send(running.port, "POST", "/v1/search", {"query": "x"}, key=ONE)]
        for got in await asyncio.gather(*asked):
            assert got.status == 503
            assert got.headers["Retry-After"] == "5"
            assert b"no words" not in got.body


# Config


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("embeddings: embed", "must be provider/model"),
        ("embeddings: nobody/embed", "there is no such provider"),
        ("lease: 0s", "must be from 1 to 3600"),
    ],
)
async def test_a_faulty_option_is_named(tmp_path: Path, options: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        async with serving(tmp_path, options):
            pass


async def test_packages_that_are_missing_are_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs python-multipart, numpy: pip install 'penstock\[retrieval\]'"):
        async with serving(tmp_path, "embeddings: demo/embed"):
            pass
