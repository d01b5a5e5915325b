"""What outlives a request: conversations, and files with their passages. One narrow interface, two homes.

Strategy: records and the two protocols are here; `sqlite` keeps them in a file under `data_dir`, `postgres` in a database that
several machines share, and `guard` bounds how long anybody waits for either. Who owns a record is one opaque text (`owner`), made
by the middleware from the caller's key and identity; every look-up takes it, so that one tenant cannot name another's record.
Owners, ids and names of collections are any text of up to 200 characters; whoever takes them from a client sees to that.
The one rule: a method that changes something has done all of it when it returns, or nothing if it raises or the process dies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Json = dict[str, Any]
Vector = Sequence[float]
Status = Literal["uploaded", "processing", "processed", "error"]


class StoreUnavailable(Exception):
    """The store is down, too slow, or refuses. Its text is for operators, never for clients."""


class UnusableStore(Exception):
    """There is a store, or there should be one, but this program cannot work with it: a newer program's, no access. Its text is
    for operators."""


# Conversations


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange of a conversation.

    messages: what the client added, then the answer, as chat messages. tokens: an estimate over all of them. created: Unix
    seconds. partial: the answer broke off. request: the call's id; the same one is kept once, so a save may be repeated.
    number: from 1 within its session, given by the store.
    """

    messages: Sequence[Json]
    tokens: int
    created: float
    request: str
    model: str = ""
    partial: bool = False
    number: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation. created, updated: Unix seconds of its first and last turn."""

    id: str
    created: float
    updated: float
    turns: int
    tokens: int


class Conversations(Protocol):
    """The memory of sessions. All methods raise StoreUnavailable."""

    async def append(self, owner: str, session: str, turn: Turn) -> int:
        """Add a turn behind all others, whoever else appends at the same time; returns its number."""
        ...

    async def turns(self, owner: str, session: str, most: int, before: int = 0) -> Sequence[Turn]:
        """The newest `most` turns, the oldest of them first; with `before`, those whose number is smaller. None where there is
        no such session."""
        ...

    async def session(self, owner: str, session: str) -> Session | None: ...

    async def sessions(self, owner: str, most: int, after: str | None = None) -> Sequence[Session]:
        """Those of this owner, the last used first; with `after`, those behind that one."""
        ...

    async def forget(self, owner: str, session: str) -> bool:
        """Delete a session with its turns; whether there was one."""
        ...

    async def expire(self, before: float, most_sessions: int, most_turns: int) -> int:
        """Retention, over all owners: sessions not used since `before` (Unix seconds), those beyond the last used `most_sessions`
        of an owner, turns beyond the newest `most_turns` of a session; 0 is no bound. Returns how many turns went."""
        ...


# Files and passages


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded file. bytes: its size. digest: SHA-256 of its content, hexadecimal. progress: of indexing, 0 to 1. error: why
    it could not be indexed, for the client. knowledge: the collection that it was put into, "" for none."""

    id: str
    name: str
    media_type: str
    bytes: int
    digest: str
    created: float
    purpose: str = "assistants"
    knowledge: str = ""
    status: Status = "uploaded"
    progress: float = 0.0
    passages: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a file's text. number: from 0 within its file. heading: the headings that it stands under, outermost first,
    joined by " > ". page: from 1, where the format has pages. vector: its embedding, where there is one."""

    number: int
    text: str
    heading: str = ""
    page: int | None = None
    vector: Vector | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found, without its vector. score: the larger the better; of full text in the engine's own unit, of
    vectors the cosine."""

    file: str
    name: str
    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class Job:
    """A file to be indexed by whoever claimed it. done: how many of its passages are kept already."""

    owner: str
    file: File
    content: bytes
    done: int


@dataclass(frozen=True, slots=True)
class Where:
    """Which files are searched: those named, and those of the collections named; all of the owner's where both are empty."""

    files: Collection[str] = ()
    knowledge: Collection[str] = ()


class Library(Protocol):
    """Files and what is found in them. All methods raise StoreUnavailable."""

    async def add(self, owner: str, file: File, content: bytes) -> File:
        """Keep a file; where this owner has one of the same digest in the same collection, that one is returned instead."""
        ...

    async def file(self, owner: str, id: str) -> File | None: ...

    async def content(self, owner: str, id: str) -> bytes | None: ...

    async def files(self, owner: str, most: int, after: str | None = None, purpose: str | None = None) -> Sequence[File]:
        """The newest first; with `after`, those behind that one."""
        ...

    async def remove(self, owner: str, id: str) -> bool:
        """Delete a file with its passages; whether there was one."""
        ...

    async def held(self, owner: str) -> tuple[int, int]:
        """How many files, and how many bytes of content, this owner has."""
        ...

    async def waiting(self) -> int:
        """How many files nobody has claimed yet, over all owners."""
        ...

    async def claim(self, worker: str, lease: float, now: float) -> Job | None:
        """The oldest file that waits for indexing, or whose worker has not been heard of for `lease` seconds; nobody else gets
        it until then. now: Unix seconds."""
        ...

    async def keep(self, id: str, worker: str, passages: Sequence[Passage], progress: float, now: float) -> bool:
        """Add passages behind those that are kept, and renew the claim. False where the file is gone or somebody else's: stop."""
        ...

    async def settle(self, id: str, worker: str, error: str | None) -> bool:
        """The file is `processed` and searchable, or `error`, without passages then. False as above."""
        ...

    async def search_text(self, owner: str, query: str, most: int, where: Where) -> Sequence[Hit]:
        """Full text, the best first; any of the query's words may match. Any text is a valid query."""
        ...

    async def search_vectors(self, owner: str, vector: Vector, most: int, where: Where) -> Sequence[Hit]:
        """The nearest by cosine, the best first; vectors of another length are passed over."""
        ...

    async def vectors(self, model: str, digests: Collection[str]) -> Mapping[str, Vector]:
        """Embeddings that were made before, by the digest of their text."""
        ...

    async def remember(self, model: str, vectors: Mapping[str, Vector]) -> None:
        """Keep embeddings by the digest of their text."""
        ...


@dataclass(frozen=True, slots=True)
class Store:
    """The homes of both, as handed to middleware. kind: `sqlite` or `postgres`."""

    kind: str
    conversations: Conversations
    files: Library
