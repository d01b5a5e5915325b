"""The indexing of files, in the background: claimed, read, cut into passages, embedded, kept, settled.

Strategy: one loop per process takes one file at a time, so that uploads never crowd out streams; reading a file happens in a
process of its own. Passages are kept batch by batch, each with the file's progress, so what was done before a crash stays done:
the next worker reads the file anew, gets the same passages, and goes on behind those that are kept. While it waits for anything
long, the claim is renewed. Without vectors (no target, or one that stays away for half a minute) a file is found by its words.
The one rule: a file ends as `processed` or `error`, or is claimed again; nothing that is wrong with one keeps the others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from middleware.retrieval.text import ExtractionError
from middleware.retrieval.vectors import NoVectors, Vectors
from proxy.store import Job, Library, Passage, StoreUnavailable, Vector

T = TypeVar("T")
Read = Callable[[bytes, str, str], Coroutine[Any, Any, Sequence[Passage]]]  # content, name, media type
Sleep = Callable[[float], Awaitable[None]]

BATCH = 64
STORE_PAUSE = 5.0  # seconds until a store that was down is asked again
LONG_AGO = 0.0  # Unix seconds
FAILED = "The gateway failed to index this file."

log: Any = structlog.get_logger("penstock")


class Gone(Exception):
    """The file was deleted, or has become somebody else's: stop, and say nothing."""


class Indexer:
    """Indexes what waits. read: a file's passages; raises ExtractionError. vectors: None where there are none.

    job: the one in hand. waiting: files of anybody's that nobody has begun, as of when this one was taken.
    lease: seconds after which a worker that is not heard of has lost its file. clock: Unix seconds. counts: files by end
    (`processed`, `error`), `passages`, and `unembedded` ones among them.
    """

    def __init__(
        self,
        read: Read,
        vectors: Vectors | None,
        lease: float,
        counts: Counter[str],
        *,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._read, self._vectors, self._lease, self.counts = read, vectors, lease, counts
        self._clock, self._sleep = clock, sleep
        self._worker = secrets.token_hex(8)
        self._bell = asyncio.Event()
        self.job: Job | None = None
        self.waiting = 0

    def wake(self) -> None:
        """There is something to do."""
        self._bell.set()

    async def run(self, library: Callable[[], Library]) -> None:
        """For ever, until cancelled. A file that is being indexed then can be claimed at once."""
        down = False
        while True:
            self._bell.clear()
            try:
                job = await library().claim(self._worker, self._lease, self._clock())
                down = False
                if job is not None:
                    await self._index(library(), job)
                else:
                    self.waiting = 0
                    await self._rest()
            except StoreUnavailable as error:
                if not down:
                    log.warning("indexing waits for the store", error=str(error))
                down = True
                await self._sleep(STORE_PAUSE)
            except Exception:
                log.exception("indexing failed")
                await self._sleep(STORE_PAUSE)

    async def _rest(self) -> None:
        """Until somebody uploads, or it is time to look for files whose worker has died."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._lease):
                await self._bell.wait()

    async def _index(self, library: Library, job: Job) -> None:
        self.job = job
        try:
            with contextlib.suppress(StoreUnavailable):
                self.waiting = await library.waiting()
            error = await self._fault(library, job)
            if await library.settle(job.file.id, self._worker, error):
                self.counts["error" if error else "processed"] += 1
        except Gone:
            pass
        except asyncio.CancelledError:
            # As if never heard of, so that whoever serves next need not wait for the lease.
            with contextlib.suppress(StoreUnavailable):
                await library.keep(job.file.id, self._worker, (), self._progress(), LONG_AGO)
            raise
        finally:
            self.job = None

    async def _fault(self, library: Library, job: Job) -> str | None:
        """Keep all passages of a file; what is wrong with it, if anything is."""
        try:
            await self._keep_all(library, job)
        except ExtractionError as error:
            return str(error)
        except (Gone, StoreUnavailable):
            raise
        except Exception:
            # Ours, and it would come again: the file must not be claimed for ever.
            log.exception("a file could not be indexed", file=job.file.id)
            return FAILED
        return None

    async def _keep_all(self, library: Library, job: Job) -> None:
        file = job.file
        passages = await self._meanwhile(library, job, self._read(job.content, file.name, file.media_type))
        patient, size = True, self._vectors.batch if self._vectors is not None else BATCH
        for start in range(job.done, len(passages), size):
            some = passages[start : start + size]
            vectors = await self._meanwhile(library, job, self._embedded(library, some)) if patient else None
            patient = vectors is not None
            await self._keep(library, job, some, vectors, min(1.0, (start + len(some)) / len(passages)))

    async def _keep(
        self, library: Library, job: Job, some: Sequence[Passage], vectors: Sequence[Vector] | None, progress: float
    ) -> None:
        """One batch. Raises Gone."""
        self.counts["passages"] += len(some)
        if vectors is not None:
            some = [replace(passage, vector=vector) for passage, vector in zip(some, vectors, strict=True)]
        elif self._vectors is not None:
            self.counts["unembedded"] += len(some)
        if not await library.keep(job.file.id, self._worker, some, progress, self._clock()):
            raise Gone
        self.job = replace(job, file=replace(job.file, progress=progress))

    async def _embedded(self, library: Library, passages: Sequence[Passage]) -> Sequence[Vector] | None:
        """Their vectors; None where there are none to be had."""
        if self._vectors is None:
            return None
        texts = [f"{passage.heading}\n{passage.text}" if passage.heading else passage.text for passage in passages]
        try:
            return await self._vectors.of_passages(texts, library)
        except NoVectors:
            return None

    def _progress(self) -> float:
        return self.job.file.progress if self.job is not None else 0.0

    async def _meanwhile(self, library: Library, job: Job, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, the claim being renewed while it takes long. Raises Gone, and then `work` is cancelled."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=self._lease / 3))[0]:
                if not await library.keep(job.file.id, self._worker, (), self._progress(), self._clock()):
                    raise Gone
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
