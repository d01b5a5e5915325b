"""Files that clients upload, and passages of them before the question: retrieval without a service beside.

Strategy: `files` is the API, `indexing` reads and embeds in the background, `search` finds; a call that asks (`useRAG`, `rag`,
orq's `knowledge_bases`) goes on with the passages inserted, and its reply says where they are from. It stands outside of coalesce
and cache, whose keys thereby take the expanded question and whose answers get the sources as any other; and inside of what keeps
a conversation, so that passages are in no history.
Cost: nothing for calls that do not ask; for those that do, the search, and per chunk a look at a flag.
The one rule: whose files are searched is decided by the caller's key alone; nothing in a request can widen it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from middleware.retrieval.asked import MOST_PASSAGES, MOST_QUERY, Asked, Wanted, asked_of
from middleware.retrieval.indexing import Indexer
from middleware.retrieval.insertion import question_of, with_context
from middleware.retrieval.look import HEADER, Look, summary
from middleware.retrieval.refusals import bad, unavailable
from middleware.retrieval.search import Found, Search, within
from middleware.retrieval.sources import framed, sources
from middleware.retrieval.telling import told
from middleware.retrieval.text import Limits, absent
from middleware.retrieval.text.apart import passages_apart
from middleware.retrieval.vectors import Vectors
from proxy.call import Call, altered
from proxy.own_fields import OwnFields
from proxy.pipeline import BASES, Handler, Sample, Surroundings
from proxy.reply import Reply
from proxy.store import Library, Passage, Store, StoreUnavailable
from proxy.units import Between, ByteSize, Seconds

Size = Annotated[ByteSize, Between(1024, 2**40)]
COUNTERS = {
    "uploads": "Files that were uploaded, those that were there already counted too.",
    "passages": "Passages that were indexed.",
    "unembedded": "Passages that were indexed without a vector, because the embeddings target gave none.",
}
EMBEDDINGS = {
    "requests": "Requests for embeddings.",
    "failures": "Requests for embeddings that failed.",
    "tokens": "Tokens that were embedded, as far as the target tells.",
}
RESULTS = ("found", "empty", "unavailable")


class Retrieval:
    """Answers from uploaded files.

    embeddings: the target (`provider/model`) that makes vectors; without one, full text alone is searched. batch: texts in one
    request to it; question_timeout: how long a question's vector may take. top_k, threshold: where a request does not say.
    max_context_tokens: of the passages before one question, estimated. max_file_bytes: of one file; max_files, max_bytes: of one
    key. lease: how long a worker that is not heard of keeps the file it indexes. on_unavailable: what becomes of calls that want
    passages while the store is down.
    """

    FIELDS = ("useRAG", "use_rag", "rag", "knowledge_bases")
    NEEDS_STORE = True

    def __init__(
        self,
        *,
        embeddings: Annotated[str, "target"] | None = None,
        batch: Annotated[int, Between(1, 2048)] = 64,
        question_timeout: Annotated[Seconds, Between(0.05, 60)] = 3.0,
        top_k: Annotated[int, Between(1, MOST_PASSAGES)] = 5,
        threshold: Annotated[float, Between(0, 1)] = 0.0,
        max_context_tokens: Annotated[int, Between(500, 1_000_000)] = 2000,
        max_file_bytes: Size = 20 * 2**20,
        max_files: Annotated[int, Between(1, 10_000)] = 1000,
        max_bytes: Size = 2**30,
        lease: Annotated[Seconds, Between(1, 3600)] = 60.0,
        on_unavailable: Literal["continue", "refuse"] = "continue",
        _clock: Callable[[], float] = time.time,
        _sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        _check_installed(vectors=embeddings is not None)
        # Here, because it needs what is only there with the extra.
        from middleware.retrieval.files import Bounds, Files

        self._counts: Counter[str] = Counter()
        self._vectors = Vectors(embeddings, batch, self._counts, sleep=_sleep) if embeddings is not None else None
        self._default = Wanted(top_k, threshold, vectors=embeddings is not None)
        self._context_tokens = max_context_tokens
        self._limits = Limits(bytes=max_file_bytes)
        self._refuses = on_unavailable == "refuse"
        self._search = Search(self._vectors, question_timeout)
        self._indexer = Indexer(self._passages, self._vectors, lease, self._counts, clock=_clock, sleep=_sleep)
        self._store: Store | None = None
        self._workers = 1
        self._task: asyncio.Task[None] | None = None
        look = Look(self._library, self._search, self._default)
        files = Files(self._library, Bounds(max_file_bytes, max_files, max_bytes), self._uploaded, _clock)
        self.endpoints = tuple(point for base in BASES for point in (*files.endpoints(base), look.endpoint(base)))

    # With the gateway

    def attach(self, surroundings: Surroundings) -> None:
        if surroundings.store is None or surroundings.attempt is None:
            raise ValueError("retrieval needs a store")
        self._store, self._workers = surroundings.store, surroundings.workers
        if self._vectors is not None:
            self._vectors.attach(surroundings.route, surroundings.attempt)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._indexer.run(self._library))

    def adopt(self, previous: Retrieval) -> None:
        """What was counted lives on; its indexing ends, and the file that it was at is claimed anew."""
        self._counts = self._indexer.counts = previous._counts
        if self._vectors is not None:
            self._vectors.counts = previous._counts
        if previous._task is not None:
            previous._task.add_done_callback(lambda _: self._indexer.wake())
            previous._task.cancel()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _library(self) -> Library:
        assert self._store is not None, "attached before the first call"
        return self._store.files

    # Calls

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `useRAG`, `rag` and `knowledge_bases`. Raises Refused (400) with the path."""
        asked = asked_of(own, self._default)
        if asked is None:
            return call
        if call.kind == "embeddings":
            raise bad("useRAG", "passages can only go before a question, and embeddings have none")
        if call.kind == "completions" and not isinstance(call.request["prompt"], str):
            raise bad("prompt", "must be one text, for passages to go before it")
        return altered(call, extensions={**call.extensions, Asked: asked})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        asked = call.extension(Asked)
        if asked is None:
            return await next(call)
        try:
            found = await self._found(call, asked)
        except StoreUnavailable:
            self._counts["unavailable"] += 1
            if self._refuses:
                raise unavailable() from None
            return (await next(call)).with_header(HEADER, "unavailable")
        hits = within(found.hits, self._context_tokens)
        self._counts["found" if hits else "empty"] += 1
        if hits:
            call = altered(call, request=with_context(call, framed(hits)))
        reply = await next(call)
        if reply.head.status != 200:
            return reply
        return told(call, reply.with_header(HEADER, summary(found, len(hits))), sources(hits))

    async def _found(self, call: Call, asked: Asked) -> Found:
        """Raises StoreUnavailable, and Refused (404) for a file that this key has not."""
        library, owner, question = self._library(), call.principal.scope, question_of(call)
        if not question.strip():
            return Found(())
        queries = [(wanted.query or question[-MOST_QUERY:], wanted) for wanted in asked.searches]
        return await self._search.all(library, owner, queries)

    # Indexing

    def _uploaded(self) -> None:
        self._counts["uploads"] += 1
        self._indexer.wake()

    async def _passages(self, content: bytes, name: str, media_type: str) -> Sequence[Passage]:
        return await passages_apart(content, name, media_type, self._limits)

    # Figures

    def health(self) -> dict[str, Any]:
        job = self._indexer.job
        now = None if job is None else {"id": job.file.id, "progress": round(job.file.progress, 3)}
        return {"indexing": now, "waiting": self._indexer.waiting}

    def samples(self) -> Iterable[Sample]:
        counts = self._counts
        for name, words in COUNTERS.items():
            yield Sample(f"penstock_retrieval_{name}_total", "counter", words, counts[name])
        for end in ("processed", "error"):
            words = "Files whose indexing ended, by end."
            yield Sample("penstock_retrieval_files_total", "counter", words, counts[end], {"end": end})
        for result in RESULTS:
            words = "Calls that wanted passages, by what there was: found, empty, or the store was unavailable."
            yield Sample("penstock_retrieval_calls_total", "counter", words, counts[result], {"result": result})
        for name, words in EMBEDDINGS.items():
            yield Sample(f"penstock_retrieval_embedding_{name}_total", "counter", words, counts[name])
        words = "Files that are being indexed now: one at a time."
        yield Sample("penstock_retrieval_indexing", "gauge", words, self._indexer.job is not None)
        words = "Files that wait for indexing, as of when one was last looked for."
        # All workers see the same files, and what they tell is added up.
        yield Sample("penstock_retrieval_waiting", "gauge", words, self._indexer.waiting / self._workers)


def _check_installed(vectors: bool) -> None:
    """Raises ValueError, for the operator, where a package is not there. vectors: numpy is needed, too."""
    wanted = {"python_multipart": "python-multipart"} | ({"numpy": "numpy"} if vectors else {})
    if missing := [*absent(), *(package for module, package in wanted.items() if find_spec(module) is None)]:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'penstock[retrieval]'")
