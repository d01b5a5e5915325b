"""One thread with one connection to the file, which does one piece of work after another for the event loop.

Strategy: a queue in, futures out. The lane that writes takes what has gathered while it was busy into one transaction, each piece
behind a savepoint of its own, so that one that fails undoes only itself. A caller that has gone before its turn is passed over.
The one rule: nobody is told of a write before it is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from proxy.store import StoreUnavailable

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
MOST_TOGETHER = 64
CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """work: None is the lane's own end."""

    work: Work[Any] | None
    future: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class End:
    """What became of a job."""

    job: Job
    result: Any = None
    error: BaseException | None = None


class Lane:
    """connect: called once, in the thread. writes: whether it changes the file."""

    def __init__(self, name: str, connect: Callable[[], sqlite3.Connection], *, writes: bool = False) -> None:
        self._connect = connect
        self._writes = writes
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._closed = False
        self._thread = Thread(target=self._live, name=f"penstock-{name}", daemon=True)
        self._thread.start()

    async def do(self, work: Work[T]) -> T:
        """Have it done. Raises StoreUnavailable for whatever SQLite has against it."""
        if self._closed:
            raise StoreUnavailable("the store is closed")
        try:
            found: T = await self._asked(work)
            return found
        except sqlite3.Error as error:
            raise StoreUnavailable(f"sqlite: {error}") from error

    async def close(self) -> None:
        """Finish what is waiting, then let go of the file."""
        if not self._closed:
            self._closed = True
            # A thread that a dead disk holds ends with the process.
            await asyncio.wait({self._asked(None)}, timeout=CLOSE_SECONDS)

    def _asked(self, work: Work[Any] | None) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self._jobs.put(Job(work, future))
        return future

    # In the thread

    def _live(self) -> None:
        connection: sqlite3.Connection | None = None
        going = True
        while going:
            jobs = self._gathered()
            last = jobs.pop() if jobs[-1].work is None else None
            try:
                connection = connection or self._connect()
                ends = (_together if self._writes else _singly)(connection, jobs)
            except Exception as error:
                ends = [End(job, error=error) for job in jobs]
            if last is not None:
                going = False
                if connection is not None:
                    connection.close()
                ends = [*ends, End(last)]
            _tell(ends)

    def _gathered(self) -> list[Job]:
        """The next job, with those that are waiting behind it; the lane's end comes last."""
        jobs = [self._jobs.get()]
        with contextlib.suppress(Empty):
            while jobs[-1].work is not None and len(jobs) < MOST_TOGETHER:
                jobs.append(self._jobs.get_nowait())
        return jobs


def _together(connection: sqlite3.Connection, jobs: Sequence[Job]) -> list[End]:
    """In one transaction. Raises sqlite3.Error where it could not begin or be committed; then none is done."""
    wanted = [job for job in jobs if not job.future.cancelled()]
    if not wanted:
        return []
    connection.execute("BEGIN IMMEDIATE")
    try:
        ends = [_saved(connection, job) for job in wanted]
        connection.execute("COMMIT")
        return ends
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _saved(connection: sqlite3.Connection, job: Job) -> End:
    connection.execute("SAVEPOINT job")
    end = _done(connection, job)
    if end.error is not None:
        connection.execute("ROLLBACK TO job")
    connection.execute("RELEASE job")
    return end


def _singly(connection: sqlite3.Connection, jobs: Sequence[Job]) -> list[End]:
    """Each told as soon as it is done: what reads has nothing to wait for."""
    for job in jobs:
        if not job.future.cancelled():
            _tell([_done(connection, job)])
    return []


def _done(connection: sqlite3.Connection, job: Job) -> End:
    assert job.work is not None
    try:
        return End(job, job.work(connection))
    except Exception as error:
        return End(job, error=error)


def _tell(ends: Sequence[End]) -> None:
    """Back to the loops that asked. One that is closed has nobody left to tell."""
    for loop in {end.job.future.get_loop() for end in ends}:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, [end for end in ends if end.job.future.get_loop() is loop])


def _settle(ends: Sequence[End]) -> None:
    for end in ends:
        if end.job.future.done():
            continue
        if end.error is not None:
            end.job.future.set_exception(end.error)
        else:
            end.job.future.set_result(end.result)
