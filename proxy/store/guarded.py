"""The two protocols with a guard before each method.

Strategy: what a request waits for, a look-up or a search, has the short patience; what changes something or carries a whole file,
the long one.
The one rule: nothing reaches a home but through here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from proxy.store import Conversations, File, Hit, Job, Library, Passage, Session, Store, Turn, Vector, Where
from proxy.store.guard import Guard


@dataclass(frozen=True, slots=True)
class Guards:
    """One for each part of the store that may fail by itself. short, long: patience in seconds."""

    conversations: Guard
    files: Guard
    search: Guard
    short: float
    long: float

    @property
    def all(self) -> Sequence[Guard]:
        return self.conversations, self.files, self.search


def guarded(store: Store, guards: Guards) -> Store:
    return Store(
        store.kind, GuardedConversations(store.conversations, guards), GuardedLibrary(store.files, guards)
    )  # fmt: skip


class GuardedConversations:
    """See `proxy.store.Conversations`."""

    def __init__(self, home: Conversations, guards: Guards) -> None:
        self._home = home
        self._call, self._short, self._long = guards.conversations.call, guards.short, guards.long

    async def append(self, owner: str, session: str, turn: Turn) -> int:
        return await self._call(self._long, self._home.append, owner, session, turn)

    async def turns(self, owner: str, session: str, most: int, before: int = 0) -> Sequence[Turn]:
        return await self._call(self._short, self._home.turns, owner, session, most, before)

    async def session(self, owner: str, session: str) -> Session | None:
        return await self._call(self._short, self._home.session, owner, session)

    async def sessions(self, owner: str, most: int, after: str | None = None) -> Sequence[Session]:
        return await self._call(self._short, self._home.sessions, owner, most, after)

    async def forget(self, owner: str, session: str) -> bool:
        return await self._call(self._long, self._home.forget, owner, session)

    async def expire(self, before: float, most_sessions: int, most_turns: int) -> int:
        return await self._call(self._long, self._home.expire, before, most_sessions, most_turns)


class GuardedLibrary:
    """See `Library` in `proxy.store`."""

    def __init__(self, home: Library, guards: Guards) -> None:
        self._home = home
        self._call, self._search = guards.files.call, guards.search.call
        self._short, self._long = guards.short, guards.long

    async def add(self, owner: str, file: File, content: bytes) -> File:
        return await self._call(self._long, self._home.add, owner, file, content)

    async def file(self, owner: str, id: str) -> File | None:
        return await self._call(self._short, self._home.file, owner, id)

    async def content(self, owner: str, id: str) -> bytes | None:
        return await self._call(self._long, self._home.content, owner, id)

    async def files(self, owner: str, most: int, after: str | None = None, purpose: str | None = None) -> Sequence[File]:
        return await self._call(self._short, self._home.files, owner, most, after, purpose)

    async def remove(self, owner: str, id: str) -> bool:
        return await self._call(self._long, self._home.remove, owner, id)

    async def held(self, owner: str) -> tuple[int, int]:
        return await self._call(self._short, self._home.held, owner)

    async def waiting(self) -> int:
        return await self._call(self._short, self._home.waiting)

    async def claim(self, worker: str, lease: float, now: float) -> Job | None:
        return await self._call(self._long, self._home.claim, worker, lease, now)

    async def keep(self, id: str, worker: str, passages: Sequence[Passage], progress: float, now: float) -> bool:
        return await self._call(self._long, self._home.keep, id, worker, passages, progress, now)

    async def settle(self, id: str, worker: str, error: str | None) -> bool:
        return await self._call(self._long, self._home.settle, id, worker, error)

    async def search_text(self, owner: str, query: str, most: int, where: Where) -> Sequence[Hit]:
        return await self._search(self._short, self._home.search_text, owner, query, most, where)

    async def search_vectors(self, owner: str, vector: Vector, most: int, where: Where) -> Sequence[Hit]:
        return await self._search(self._short, self._home.search_vectors, owner, vector, most, where)

    async def vectors(self, model: str, digests: Collection[str]) -> Mapping[str, Vector]:
        return await self._call(self._short, self._home.vectors, model, digests)

    async def remember(self, model: str, vectors: Mapping[str, Vector]) -> None:
        return await self._call(self._long, self._home.remember, model, vectors)
