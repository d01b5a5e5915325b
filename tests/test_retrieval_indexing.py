"""Indexing in the background: what hostile files come to, what a crash leaves behind, and what waits for whom.

Strategy: the loop by itself on a store of SQLite, with a reader of its own where it must stand still; then a running gateway with
hostile uploads beside a stream; then `penstock serve` killed in mid-indexing and started again on the same store.
The one rule: every file ends, and no passage is there twice.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import struct
import subprocess
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware import TABLE
from middleware.retrieval.embedded import read, tokens
from middleware.retrieval.indexing import FAILED, Indexer
from middleware.retrieval.text import ExtractionError
from middleware.retrieval.vectors import NoVectors, Vectors
from proxy.app import Gateway
from proxy.call import Call, Provider, Route, Target
from proxy.config import parse
from proxy.errors import Unconfigured, UpstreamError
from proxy.pipeline import Handler
from proxy.reply import Batch, Head, Reply, Trailer
from proxy.store import File, Passage, Store, StoreUnavailable, Where
from tests.support.gateway import ask, chat, gateway, until
from tests.support.uploads import ended, indexed, pdf, send, upload, zip_bomb
from tests.support.upstream import Asked, Line, Upstream, whole

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
OWNER = "owner"


async def at_once(seconds: float) -> None:
    await asyncio.sleep(0)


def file(number: int) -> File:
    return File(f"file-{number}", f"{number}.txt", "text/plain", 4, f"digest-{number}", float(number))


def cut(content: bytes) -> list[Passage]:
    """A passage per word."""
    return [Passage(number, word) for number, word in enumerate(content.decode().split())]


async def plain(content: bytes, name: str, media_type: str) -> Sequence[Passage]:
    return cut(content)


class Embeds:
    """An innermost handler that gives vectors of `size` numbers, or raises what `faults` has. asked: the texts, per request."""

    def __init__(self, *faults: Exception | None, size: int = 2) -> None:
        self.asked: list[list[str]] = []
        self.size = size
        self._faults = list(faults)

    async def __call__(self, call: Call) -> Reply:
        texts = call.request["input"]
        self.asked.append(texts)
        if self._faults and (fault := self._faults.pop(0)) is not None:
            raise fault
        data = [{"index": number, "embedding": [1.0] * self.size} for number, _ in enumerate(texts)]
        batch = Batch([{"object": "list", "data": data[::-1], "usage": {"prompt_tokens": len(texts)}}], final=True)

        async def batches() -> AsyncIterator[Batch]:
            yield batch

        return Reply(Head(""), batches(), Trailer(), whole=True)


def embedding(attempt: Handler, batch: int = 2, pauses: list[float] | None = None) -> Vectors:
    async def sleep(seconds: float) -> None:
        if pauses is not None:
            pauses.append(seconds)

    made = Vectors("p/m", batch, Counter(), sleep=sleep)
    made.attach(lambda name: Route(None, (Target(Provider("p", "openai", "http://x"), "m"),)), attempt)
    return made


@asynccontextmanager
async def indexing(
    store: Store, read: Any = plain, vectors: Vectors | None = None, lease: float = 60.0, now: float = 1000.0
) -> AsyncIterator[Indexer]:
    """A loop that runs. now: what its clock says."""
    indexer = Indexer(read, vectors, lease, Counter(), clock=lambda: now, sleep=at_once)
    task = asyncio.create_task(indexer.run(lambda: store.files))
    try:
        yield indexer
    finally:
        task.cancel()
        await asyncio.wait({task})


async def add(store: Store, number: int, content: bytes = b"alpha beta gamma") -> None:
    await store.files.add(OWNER, file(number), content)


async def over(store: Store, number: int) -> File:
    """The file when it is indexed, or failed."""
    async with asyncio.timeout(5):
        while True:
            found = await store.files.file(OWNER, f"file-{number}")
            assert found is not None
            if found.status in ("processed", "error"):
                return found
            await asyncio.sleep(0.002)


async def texts(store: Store, query: str = "alpha beta gamma delta") -> list[str]:
    return sorted(hit.passage.text for hit in await store.files.search_text(OWNER, query, 99, Where()))


# The loop


async def test_what_waits_is_indexed_and_an_upload_wakes_the_loop_at_once(store: Store) -> None:
    await add(store, 1)
    async with indexing(store, lease=3600.0) as indexer:
        assert (await over(store, 1)).passages == 3
        await until(lambda: indexer.job is None)
        await add(store, 2, b"delta")
        indexer.wake()
        assert (await over(store, 2)).status == "processed"
    assert await texts(store) == ["alpha", "beta", "delta", "gamma"]
    assert indexer.counts == {"processed": 2, "passages": 4}


async def test_what_is_wrong_with_one_file_is_its_own_affair(store: Store) -> None:
    async def read(content: bytes, name: str, media_type: str) -> Sequence[Passage]:
        if name == "1.txt":
            raise ExtractionError("It is broken.")
        if name == "2.txt":
            raise ZeroDivisionError
        return cut(content)

    for number in (1, 2, 3):
        await add(store, number, b"alpha %d" % number)
    async with indexing(store, read):
        ends = [await over(store, number) for number in (1, 2, 3)]
    assert [(end.status, end.error) for end in ends] == [("error", "It is broken."), ("error", FAILED), ("processed", None)]
    assert await texts(store, "alpha") == ["alpha"]


async def test_so_does_one_that_is_deleted_while_it_is_embedded(store: Store) -> None:
    embeds = Embeds()

    async def removing(call: Call) -> Reply:
        await store.files.remove(OWNER, "file-1")
        return await embeds(call)

    await add(store, 1)
    await add(store, 2, b"delta")
    async with indexing(store, vectors=embedding(removing, 1)):
        await over(store, 2)
    assert embeds.asked == [["alpha"], ["delta"]]
    assert await texts(store) == ["delta"]


class Stands:
    """A reader that stands still until `go`; cancelled: it was told to stop."""

    def __init__(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.cancelled = False

    async def __call__(self, content: bytes, name: str, media_type: str) -> Sequence[Passage]:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return cut(content)


async def test_it_says_what_it_is_at_and_how_many_wait(store: Store) -> None:
    reader = Stands()
    for number in (1, 2, 3):
        await add(store, number, b"alpha %d" % number)
    async with indexing(store, reader) as indexer:
        await reader.begun.wait()
        assert indexer.job is not None
        assert (indexer.job.file.id, indexer.waiting) == ("file-1", 2)
        reader.go.set()
        await over(store, 3)
        await until(lambda: indexer.job is None)
        assert indexer.waiting == 0


async def test_a_mistake_of_ours_with_one_file_ends_that_file(store: Store) -> None:
    """Rather than that it comes again with every lease."""

    async def broken(call: Call) -> Reply:
        raise ZeroDivisionError

    await add(store, 1)
    async with indexing(store, vectors=embedding(broken)):
        found = await over(store, 1)
    assert (found.status, found.error, found.passages) == ("error", FAILED, 0)


async def test_a_file_that_is_deleted_meanwhile_stops_quietly(store: Store) -> None:
    """While it is read: the claim's renewal notices; the next is taken."""
    reader = Stands()
    await add(store, 1)
    async with indexing(store, reader, lease=0.05) as indexer:
        await reader.begun.wait()
        await store.files.remove(OWNER, "file-1")
        await until(lambda: reader.cancelled)
        reader.go.set()
        await add(store, 2, b"delta")
        indexer.wake()
        await over(store, 2)
    assert await texts(store) == ["delta"]
    assert indexer.counts == {"processed": 1, "passages": 1}


async def test_a_claim_is_renewed_while_a_file_is_read_and_given_back_at_the_end(store: Store) -> None:
    reader, told = Stands(), 0

    def later() -> float:
        nonlocal told
        told += 1
        return 2000.0

    await add(store, 1)
    async with indexing(store, reader, lease=0.05, now=1000.0) as indexer:
        await reader.begun.wait()
        indexer._clock = later
        await until(lambda: told == 2)  # with the second renewal, the first is over
        assert await store.files.claim("other", 60.0, 2059.0) is None
    assert reader.cancelled
    assert await store.files.claim("other", 60.0, 2001.0) is not None


async def test_after_a_crash_the_next_worker_goes_on_behind_what_is_kept(store: Store) -> None:
    """What was embedded is not asked for again, kept or not."""
    await add(store, 1, b"alpha beta gamma delta")
    job = await store.files.claim("dead", 60.0, 1000.0)
    assert job is not None
    await store.files.keep("file-1", "dead", cut(b"alpha beta"), 0.5, 1000.0)
    await store.files.remember("p/m", {digest("gamma"): [1.0, 1.0]})
    embeds = Embeds()
    async with indexing(store, vectors=embedding(embeds), now=1061.0) as indexer:
        found = await over(store, 1)
    assert (found.status, found.passages, found.progress) == ("processed", 4, 1.0)
    assert await texts(store) == ["alpha", "beta", "delta", "gamma"]
    assert indexer.counts["passages"] == 2
    assert embeds.asked == [["delta"]]


async def test_a_store_that_was_down_is_asked_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await add(store, 1)
    library, failed = type(store.files), []
    for name in ("claim", "keep", "settle"):
        whole_method = getattr(library, name)

        async def once(self: Any, *given: Any, name: str = name, method: Any = whole_method) -> Any:
            if name not in failed:
                failed.append(name)
                raise StoreUnavailable(name)
            return await method(self, *given)

        monkeypatch.setattr(library, name, once)
    async with indexing(store, lease=0.05, now=1000.0) as indexer:
        indexer._clock = iter(range(1000, 100_000)).__next__
        found = await over(store, 1)
    assert sorted(failed) == ["claim", "keep", "settle"]
    assert (found.status, found.passages) == ("processed", 3)


# Vectors


DOWN = UpstreamError("down")


async def test_embeddings_come_in_batches_and_a_target_that_is_down_is_asked_again(store: Store) -> None:
    await add(store, 1)
    pauses: list[float] = []
    embeds = Embeds(None, DOWN, UpstreamError("too many", status=429))
    vectors = embedding(embeds, 2, pauses)
    async with indexing(store, vectors=vectors) as indexer:
        assert (await over(store, 1)).status == "processed"
    assert embeds.asked == [["alpha", "beta"], ["gamma"], ["gamma"], ["gamma"]]
    assert pauses == [1.0, 2.0]
    assert len(await store.files.search_vectors(OWNER, [1.0, 1.0], 9, Where())) == 3
    assert vectors.counts == {"requests": 4, "failures": 2, "tokens": 3}
    assert indexer.counts["unembedded"] == 0


@pytest.mark.parametrize(
    ("faults", "requests"),
    [([DOWN] * 9, 6), ([UpstreamError("no", status=403)], 1), ([Unconfigured("no key")], 1)],
)
async def test_a_target_that_stays_away_costs_the_vectors_and_not_the_file(
    store: Store, faults: list[Exception], requests: int
) -> None:
    """Asked for half a minute where it may come back, once where it will not; the rest of the file goes without."""
    await add(store, 1)
    embeds = Embeds(None, *faults)
    async with indexing(store, vectors=embedding(embeds, 1)) as indexer:
        found = await over(store, 1)
    assert (found.status, found.passages) == ("processed", 3)
    assert len(embeds.asked) == 1 + requests
    assert await texts(store) == ["alpha", "beta", "gamma"]
    assert len(await store.files.search_vectors(OWNER, [1.0, 1.0], 9, Where())) == 1
    assert indexer.counts == {"processed": 1, "passages": 3, "unembedded": 2}


async def test_a_text_is_embedded_once_and_all_anew_where_the_model_has_changed(store: Store) -> None:
    first = Embeds()
    await embedding(first).of_passages(["a", "b"], store.files)
    assert first.asked == [["a", "b"]]
    await embedding(first).of_passages(["b", "c", "c"], store.files)
    assert first.asked[1:] == [["c"]]
    other = Embeds(size=3)
    found = await embedding(other).of_passages(["a", "d"], store.files)
    assert [len(vector) for vector in found] == [3, 3]
    assert other.asked == [["d"], ["a", "d"]]
    await embedding(first).of_questions(["q", "q"], 1.0)
    assert first.asked[-1] == ["q"]
    assert await store.files.vectors("p/m", [digest("q")]) == {}


def digest(text: str) -> str:
    from hashlib import sha256

    return sha256(text.encode()).hexdigest()


async def test_a_target_that_refuses_base64_is_asked_for_numbers_from_then_on() -> None:
    spellings: list[str | None] = []
    embeds = Embeds()

    async def picky(call: Call) -> Reply:
        spellings.append(call.request.get("encoding_format"))
        if spellings[-1] is not None:
            raise UpstreamError("encoding_format is not supported", status=422)
        return await embeds(call)

    vectors = embedding(picky)
    for _ in range(2):
        assert list((await vectors.of_questions(["q"], 1.0))["q"]) == [1.0, 1.0]
    assert spellings == ["base64", None, None]


async def test_where_that_was_not_the_reason_it_is_asked_for_again() -> None:
    embeds = Embeds(UpstreamError("no", status=400), UpstreamError("no", status=400))
    vectors = embedding(embeds)
    with pytest.raises(NoVectors):
        await vectors.of_questions(["q"], 1.0)
    await vectors.of_questions(["q"], 1.0)
    assert len(embeds.asked) == 3


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_both_spellings_are_the_same_vectors(numbers: list[list[float]], usage: bool) -> None:
    told: Json = {"usage": {"prompt_tokens": 7}} if usage else {}
    for spelled in (list, lambda vector: b64encode(struct.pack("<3f", *vector)).decode()):
        data = [{"index": at, "embedding": spelled(vector)} for at, vector in enumerate(numbers)]
        found = {"data": data[::-1], **told}
        assert [list(vector) for vector in read(found, len(numbers))] == numbers
        assert tokens(found) == (7 if usage else 0)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        [],
        [{"index": 0}],
        [{"embedding": [1]}],
        [{"index": 0, "embedding": []}],
        [{"index": 0, "embedding": ["x"]}],
        [{"index": 0, "embedding": [float("nan")]}],
        [{"index": 0, "embedding": "AA"}],
        [{"index": 0, "embedding": "?"}],
        [{"index": 0, "embedding": [1]}] * 2,
    ],
)
async def test_what_is_no_vector_is_none(data: Any) -> None:
    async def attempt(call: Call) -> Reply:
        async def batches() -> AsyncIterator[Batch]:
            yield Batch([{"data": data}], final=True)

        return Reply(Head(""), batches(), Trailer(), whole=True)

    with pytest.raises(NoVectors) as caught:
        await embedding(attempt).of_questions(["q"], 1.0)
    assert not caught.value.again


# Hostile files

CONFIG = """
server: {{port: {port}}}
data_dir: {folder}
providers:
  demo: {{api: demo}}
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - tracking
  - metrics
  - retrieval: {{{options}}}
"""


@asynccontextmanager
async def serving(folder: Path, options: str = "", url: str = "http://127.0.0.1:9") -> AsyncIterator[Gateway]:
    async with gateway(url, CONFIG, port="0", folder=str(folder), options=options) as running:
        yield running


async def test_hostile_files_end_as_errors_with_a_sentence_while_the_gateway_streams_on(tmp_path: Path) -> None:
    broken = pdf("The penstock is long.")[:-200].replace(b"/Pages", b"/Paegs")
    hostile = {
        "bomb.docx": zip_bomb(),
        "broken.pdf": broken,
        "line.txt": b"x" * (10 * 2**20 + 1),
    }
    async with serving(tmp_path, "max_file_bytes: 12MiB") as running:
        ids = {name: (await upload(running.port, content, name))["id"] for name, content in hostile.items()}
        stream = asyncio.create_task(ask(running.port, chat("demo/echo")))
        found = {name: await ended(running.port, id) for name, id in ids.items()}
        answer = await stream
        assert answer.done
        for name, one in found.items():
            assert one["status"] == "error", name
            error = one["penstock"]["error"]
            assert error == one["status_details"]
            assert error.endswith(".")
            assert str(ROOT) not in error
            assert one["penstock"]["passages"] == 0
        await indexed(running.port)
        figures = (await send(running.port, "GET", "/metrics")).body.decode()
        state = (await send(running.port, "GET", "/readyz?verbose")).json["middleware"]["retrieval"]
    assert 'penstock_retrieval_files_total{end="error"} 3.0' in figures
    assert 'penstock_retrieval_files_total{end="processed"} 1.0' in figures
    assert state == {"indexing": None, "waiting": 0}


# A crash


class Slowly:
    """Embeds the first `free` requests, then says nothing any more. asked: all texts that came."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.asked: list[str] = []
        self.silent = asyncio.Event()

    async def __call__(self, asked: Asked, line: Line) -> None:
        texts = asked.json["input"]
        if not self.free:
            self.silent.set()
            await line.forever()
            return
        self.free -= 1
        self.asked += texts
        data = [{"index": at, "embedding": [1.0, float(len(text))]} for at, text in enumerate(texts)]
        await whole(json.dumps({"object": "list", "data": data}).encode())(asked, line)


async def test_a_reload_with_other_options_goes_on_where_the_indexing_was(tmp_path: Path) -> None:
    """The file is claimed anew at once, whatever the lease; what was counted lives on; calls use the new options."""
    document = "\n\n".join(f"# Part {number}\n\nThe wheel of part {number} turns." for number in range(4))
    provider = Slowly(free=1)
    async with Upstream(provider) as upstream:
        options = "embeddings: openai/e, batch: 2, lease: 1h"
        async with serving(tmp_path, options, upstream.url) as running:
            id = (await upload(running.port, document))["id"]
            async with asyncio.timeout(15):
                await provider.silent.wait()
            provider.free = 99
            other = CONFIG.format(port=0, folder=tmp_path, url=upstream.url, options=f"{options}, top_k: 1")
            await running.reload(parse(other, {}, TABLE))
            found = await ended(running.port, id)
            hits = (await send(running.port, "POST", "/v1/search", {"query": "wheel"})).json["data"]
            figures = (await send(running.port, "GET", "/metrics")).body.decode()
    assert (found["status"], found["penstock"]["passages"]) == ("processed", 4)
    assert len(provider.asked) == len(set(provider.asked)) == 5  # and the question
    assert len(hits) == 1
    assert "penstock_retrieval_uploads_total 1.0" in figures
    assert "penstock_retrieval_passages_total 4.0" in figures


def test_what_reads_files_is_never_loaded_into_the_gateway() -> None:
    """Nor is the rest, where no config names it: memory is for streams."""
    code = """
import sys, proxy.app
from middleware import TABLE
heavy = {"pypdf", "docx", "bs4", "lxml", "numpy", "python_multipart"}
loaded = lambda: sorted({name.partition(".")[0] for name in sys.modules} & heavy)
assert "middleware.retrieval" not in sys.modules and loaded() == [], loaded()
TABLE["retrieval"](embeddings="demo/embed")
assert loaded() == ["python_multipart"], loaded()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@asynccontextmanager
async def served(folder: Path, url: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """`penstock serve` in a process of its own, and its port."""
    options = "embeddings: openai/e, batch: 3, lease: 1s"
    (folder / "config.yaml").write_text(CONFIG.format(port=0, folder=folder / "data", url=url, options=options))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "serve", "-c", str(folder / "config.yaml"), cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    try:
        async with asyncio.timeout(20):
            while (found := re.search(r"serving http://127\.0\.0\.1:(\d+)/v1", said)) is None:
                line = await process.stderr.readline()
                assert line, said
                said += line.decode()
        yield process, int(found[1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 while the third batch is being embedded: the six passages before it are kept, and are not embedded again."""
    document = "\n\n".join(f"# Part {number}\n\nThe wheel of part {number} turns." for number in range(10))
    provider = Slowly(free=2)
    async with Upstream(provider) as upstream:
        async with served(tmp_path, upstream.url) as (process, port):
            id = (await upload(port, document))["id"]
            async with asyncio.timeout(15):
                await provider.silent.wait()
            process.send_signal(signal.SIGKILL)
            await process.wait()
        assert len(provider.asked) == 6
        provider.free = 99
        async with served(tmp_path, upstream.url) as (process, port):
            found = await ended(port, id)
            hits = (await send(port, "POST", "/v1/search", {"query": "wheel", "top_k": 50, "search_type": "keyword_search"})).json
    assert found["status"] == "processed"
    assert found["penstock"]["passages"] == 10
    assert sorted(hit["passage"] for hit in hits["data"]) == list(range(10))
    assert len(provider.asked) == len(set(provider.asked)) == 10
