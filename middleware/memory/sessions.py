"""What a client sees of its sessions: `GET /v1/sessions`, `GET` and `DELETE /v1/sessions/{id}`.

Strategy: OpenAI's shapes for lists and for what is deleted. A session is shown with its newest turns, in their order; `before`
pages back. What has been said before is written first, so that a client sees, and deletes, all of it.
The one rule: whoever may not read a session cannot tell it from one that is not there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

import orjson

from proxy.call import Principal
from proxy.errors import GatewayError, Refused
from proxy.pipeline import Answer, Endpoint, Query
from proxy.store import Conversations, Session, StoreUnavailable, Turn

Json = dict[str, Any]

PATH = "/v1/sessions"
USUAL_PAGE, LONGEST_PAGE = 20, 100
# Of an owner or an id, in the store (bytes, which are no fewer than characters).
LONGEST = 200


def owner_of(principal: Principal, identity: str | None) -> str:
    """Whose sessions they are. As JSON, so that no scope and identity can be written like two others; as a digest of it, which no
    JSON is like, where that is longer than the store takes."""
    said = orjson.dumps([principal.scope, identity or ""])
    return said.decode() if len(said) <= LONGEST else f"sha256:{sha256(said).hexdigest()}"


def no_memory() -> GatewayError:
    """What a client is told where the store does not answer."""
    return GatewayError(
        "The memory is not available just now.",
        status=503,
        type="service_unavailable",
        code="memory_unavailable",
        headers={"Retry-After": "1"},
    )


class Sessions:
    """The endpoints. conversations: those that there are now. settled: returns when what was said in a session of an owner, or
    in all of them, is written; raises StoreUnavailable where that takes too long."""

    def __init__(self, conversations: Callable[[], Conversations], settled: Callable[[str, str | None], Awaitable[None]]) -> None:
        self._conversations = conversations
        self._settled = settled
        self.endpoints = (
            Endpoint("GET", PATH, _answering(self._list)),
            Endpoint("GET", PATH + "/{id}", _answering(self._read)),
            Endpoint("DELETE", PATH + "/{id}", _answering(self._delete)),
        )

    async def _list(self, query: Query) -> Json:
        """The sessions of who asks, the last used first. `?limit=20&after=<id>`."""
        _known(query, "limit", "after")
        most, after = _number(query, "limit", USUAL_PAGE, LONGEST_PAGE), query.params.get("after")
        owner, conversations = owner_of(query.principal, query.identity), self._conversations()
        await self._settled(owner, None)
        if after is not None and await conversations.session(owner, after) is None:
            raise Refused("after: there is no such session.", code="invalid_value", param="after")
        found = await conversations.sessions(owner, most + 1, after)
        return {"object": "list", **_page([_session(session) for session in found[:most]], more=len(found) > most)}

    async def _read(self, query: Query) -> Json:
        """A session with its newest turns, the oldest of them first. `?limit=20&before=<turn>`."""
        _known(query, "limit", "before")
        most, before = _number(query, "limit", USUAL_PAGE, LONGEST_PAGE), _number(query, "before", 0, 2**53)
        owner, name = await self._named(query)
        conversations = self._conversations()
        session = await conversations.session(owner, name)
        if session is None:
            raise _not_found()
        turns = await conversations.turns(owner, name, most + 1, before)
        return {**_session(session), **_page([_turn(turn) for turn in turns[-most:]], more=len(turns) > most)}

    async def _delete(self, query: Query) -> Json:
        """Forget a session with all that was said in it."""
        owner, name = await self._named(query)
        if not await self._conversations().forget(owner, name):
            raise _not_found()
        return {"id": name, "object": "session.deleted", "deleted": True}

    async def _named(self, query: Query) -> tuple[str, str]:
        """The owner, and the id that the path ends with."""
        owner, name = owner_of(query.principal, query.identity), unquote(query.raw_path.rpartition("/")[2])
        await self._settled(owner, name)
        return owner, name


def _answering(handler: Callable[[Query], Awaitable[Json]]) -> Callable[[Query], Awaitable[Answer]]:
    async def answer(query: Query) -> Answer:
        try:
            return Answer(orjson.dumps(await handler(query)), headers={"Cache-Control": "no-store"})
        except StoreUnavailable:
            raise no_memory() from None

    return answer


def _known(query: Query, *names: str) -> None:
    for unknown in query.params.keys() - set(names):
        message = f"{unknown[:64]}: is not known here, only {' and '.join(names)}."
        raise Refused(message, code="invalid_value", param=unknown[:64])


def _number(query: Query, name: str, default: int, most: int) -> int:
    """A whole number from 1 to `most`."""
    written = query.params.get(name)
    if written is None:
        return default
    if not (written.isascii() and written.isdigit() and len(written) <= 16 and 1 <= int(written) <= most):
        raise Refused(f"{name}: must be a whole number from 1 to {most}.", code="invalid_value", param=name)
    return int(written)


def _not_found() -> Refused:
    return Refused("There is no such session.", status=404, code="session_not_found")


def _page(entries: list[Json], *, more: bool) -> Json:
    first, last = (entries[0]["id"], entries[-1]["id"]) if entries else (None, None)
    return {"data": entries, "first_id": first, "last_id": last, "has_more": more}


def _session(found: Session) -> Json:
    return {
        "id": found.id,
        "object": "session",
        "created_at": int(found.created),
        "updated_at": int(found.updated),
        "turns": found.turns,
        "tokens": found.tokens,
    }


def _turn(found: Turn) -> Json:
    return {
        "id": str(found.number),
        "object": "session.turn",
        "created_at": int(found.created),
        "model": found.model,
        "tokens": found.tokens,
        "partial": found.partial,
        "messages": list(found.messages),
    }
