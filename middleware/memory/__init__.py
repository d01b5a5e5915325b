"""Conversations that the gateway remembers: a request that names a session is asked with what was said in it before, and its
answer is remembered in turn.

Strategy: on the way in the newest turns are looked up and put before the new messages (`expand`); on the way out the answer is
taken down as it passes (`recorder`), and when the reply has ended it goes into the store behind the client's back (`saves`).
Whose a session is, is the key's scope and the identity together.
Its place: outside of `coalesce` and `cache`, whose question is the whole conversation, and of all that adds to a request or takes
from a reply what is not to be remembered; inside of `resume` and `disconnect`, which read on for those who have left.
The one rule: nobody waits for the store longer than `timeout`, and no answer is lost by it, however it fails.

Cost: nothing around a request that names no session; else a look-up before it, and 0.14 us per batch of its reply.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal

from middleware.memory.asked import Asked, read
from middleware.memory.expand import Expanded, expanded, unknown
from middleware.memory.messages import Keeping
from middleware.memory.recall import Budget
from middleware.memory.recorder import Recorder
from middleware.memory.retention import Bounds, Retention
from middleware.memory.saves import Key, Saves
from middleware.memory.sessions import Sessions, no_memory, owner_of
from middleware.memory.turn import Policy, turn_of
from proxy.call import Call, altered
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.reply import Reply, Trailer, tapped
from proxy.store import Conversations, StoreUnavailable, Turn
from proxy.units import Between, ByteSize, Seconds

Json = dict[str, Any]
HEADER = "X-Penstock-Memory"
# Seconds for what waits to be written when the gateway stops.
LAST = 5.0
TURNS = "Exchanges of sessions that were to be remembered, by what became of them."
LOOKUPS = "Look-ups of sessions before a request."


class Memory:
    """Remembers the exchanges of a session, and puts them before the messages of its next request.

    max_turns, max_tokens: of what is put in, tokens being an estimate. max_turn_bytes: a larger turn is not remembered.
    max_part_bytes: a part of a message beside text (an image, a file) that is larger is remembered as a mark. keep_reasoning:
    with the answers. on_partial: replies that broke off. on_unavailable: requests whose session cannot be looked up within
    `timeout`. threads: `thread.id` names a session, too. keep, max_sessions, max_turns_kept: what is deleted in time: sessions
    without a turn for so long, those beyond so many of an owner, a session's turns beyond so many; 0 is no bound.
    """

    FIELDS = ("sessionId", "session_id", "saveToMemory", "save_to_memory")
    NEEDS_STORE = True

    def __init__(
        self,
        *,
        max_turns: Annotated[int, Between(1, 1000)] = 20,
        max_tokens: Annotated[int, Between(1, 10**7)] = 8000,
        max_turn_bytes: Annotated[ByteSize, Between(1024, 2**24)] = 256 * 2**10,
        max_part_bytes: Annotated[ByteSize, Between(0, 2**24)] = 4096,
        keep_reasoning: bool = False,
        on_partial: Literal["drop", "keep"] = "drop",
        on_unavailable: Literal["continue", "refuse"] = "continue",
        timeout: Annotated[Seconds, Between(0.001, 60)] = 1.0,
        threads: bool = False,
        keep: Annotated[Seconds, Between(0, 10**9)] = 30 * 86_400.0,
        max_sessions: Annotated[int, Between(0, 10**6)] = 1000,
        max_turns_kept: Annotated[int, Between(0, 10**6)] = 1000,
        _conversations: Conversations | None = None,
        _now: Callable[[], float] = time.time,
        _sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._budget = Budget(max_turns, max_tokens)
        self._policy = Policy(Keeping(keep_reasoning, max_part_bytes), on_partial == "keep", max_turn_bytes)
        self._refuses = on_unavailable == "refuse"
        self._timeout = timeout
        self._threads = threads
        self._conversations = _conversations
        self._now = _now
        self._saves = Saves(_sleep)
        self._retention = Retention(Bounds(keep, max_sessions, max_turns_kept), _now, _sleep)
        self._counts: Counter[str] = Counter()
        self._adopted = False
        self._sweeps = False
        self.endpoints = Sessions(self._store, self._written).endpoints

    # Calls

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read the session and whether to save. Raises Refused (400) with the path."""
        asked = read(call, own, self._threads)
        return call if asked is None else altered(call, extensions={**call.extensions, Asked: asked})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        asked = call.extension(Asked)
        if asked is None:
            return await next(call)
        key = owner_of(call.principal, call.identity), asked.session
        found, word = await self._expanded(key, call.request["messages"])
        reply = await next(altered(call, request={**call.request, "messages": found.messages}))
        if reply.head.status != 200:
            return reply
        reply = reply.with_header(HEADER, word)
        if not asked.save:
            return reply
        recorder = self._policy.recorder(whole=reply.whole)
        reply.trailer.on_end(partial(self._ended, call, key, found.new, recorder))
        return altered(reply, chunks=tapped(reply.chunks, recorder.see))

    async def _expanded(self, key: Key, messages: list[Json]) -> tuple[Expanded, str]:
        """What is asked, and what the client is told of it. Raises GatewayError (503) where the operator wants no answer without
        memory."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._saves.settled(*key)
                turns = await self._store().turns(*key, self._budget.turns)
        except (StoreUnavailable, TimeoutError):
            self._counts["unavailable"] += 1
            if self._refuses:
                raise no_memory() from None
            return unknown(messages, self._policy.keeping), "unavailable"
        found = expanded(messages, turns, self._policy.keeping, self._budget)
        self._counts["found" if turns else "new"] += 1
        self._counts["put_in"] += found.turns
        return found, f"turns={found.turns}" + (f", sent={found.sent}" if found.sent else "")

    def _ended(self, call: Call, key: Key, new: list[Json], recorder: Recorder, trailer: Trailer) -> None:
        """The reply is over, and the client has what it will get of it."""
        assert trailer.outcome is not None, "it has ended"
        turn = turn_of(self._policy, new, recorder, trailer.outcome, self._now(), call.nonce, call.model)
        if isinstance(turn, Turn):
            self._saves.add(self._store(), key, turn)
        else:
            self._saves.counts[turn] += 1

    async def _written(self, owner: str, session: str | None) -> None:
        """Raises StoreUnavailable where what was said in a session, or in all of the owner's, is not written within `timeout`."""
        try:
            async with asyncio.timeout(self._timeout):
                await (self._saves.all_settled(owner) if session is None else self._saves.settled(owner, session))
        except TimeoutError:
            raise StoreUnavailable("turns are still waiting to be written") from None

    # With the gateway

    def _store(self) -> Conversations:
        assert self._conversations is not None, "it was told of its surroundings"
        return self._conversations

    def attach(self, surroundings: Surroundings) -> None:
        if surroundings.store is not None:
            self._conversations = surroundings.store.conversations
        self._sweeps = surroundings.worker == 0

    def adopt(self, previous: Memory) -> None:
        """What is on its way goes on, and this one knows of it."""
        self._saves, self._counts = previous._saves, previous._counts
        self._retention.expired = previous._retention.expired
        previous._adopted = True

    async def start(self) -> None:
        if self._sweeps:
            self._retention.start(self._store())

    async def close(self) -> None:
        await self._retention.close()
        if not self._adopted:
            await self._saves.close(LAST)

    def health(self) -> dict[str, Any]:
        return {
            "waiting": self._saves.waiting,
            "failed": self._saves.counts["failed"],
            "unavailable": self._counts["unavailable"],
        }

    def samples(self) -> Iterable[Sample]:
        for result in ("saved", "partial", "failed", "broken", "filtered", "too_large"):
            labels = {"result": result}
            yield Sample("penstock_memory_turns_total", "counter", TURNS, self._saves.counts[result], labels)
        for result in ("found", "new", "unavailable"):
            yield Sample("penstock_memory_lookups_total", "counter", LOOKUPS, self._counts[result], {"result": result})
        words = "Turns that were put before the messages of a request."
        yield Sample("penstock_memory_turns_put_in_total", "counter", words, self._counts["put_in"])
        words = "Turns that wait to be written."
        yield Sample("penstock_memory_waiting", "gauge", words, self._saves.waiting)
        words = "Turns that were deleted for their age or their number."
        yield Sample("penstock_memory_expired_turns_total", "counter", words, self._retention.expired)
