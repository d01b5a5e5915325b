"""Mid-stream failover: a reply that breaks is begun anew while nobody has seen any of it, or gone on with by the next target.

Strategy: off unless the operator or the request says otherwise (`on_break`). The reply is followed through `Continued`; when it
breaks, `remedy` decides, `asking` asks inward again, and `seam` fits the new chunks to the old ones.
Its place: outside fallback, retry and timeout, which apply to the call that goes on as to any; inside cache and limits, for which
a reply in two pieces is one reply.
Cost: nothing where it is off; where nothing breaks, 0.3 us per batch.
The one rule: the client sees the seam: a comment line, `penstock.continued` in the first chunk, and the outcome `continued`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from middleware.continuation.asking import INSTRUCTION, Asking, Style
from middleware.continuation.flow import Continued
from middleware.continuation.remedy import CHOICES, OnBreak, Remedy, broke, remedy
from middleware.continuation.said import Said
from proxy.call import Call, altered
from proxy.errors import GatewayError
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample
from proxy.reply import Reply
from proxy.units import Between, ByteSize


@dataclass(frozen=True, slots=True)
class Asked:
    """What the request says."""

    on_break: OnBreak


class Continuation:
    """Goes on with streams that break.

    on_break: what is done where the request does not say. max_continues: further calls for one reply, at most; 0 forbids it to
    requests, too. prefill: by globs of `provider/model`, how a model takes text to go on from; the others get `instruction`.
    max_text: of a reply's events, kept to go on from; a longer one ends with its break.
    """

    FIELDS = ("on_break",)

    def __init__(
        self,
        *,
        on_break: OnBreak = "error",
        max_continues: Annotated[int, Between(0, 10)] = 2,
        prefill: Mapping[str, Style] | None = None,
        instruction: str = INSTRUCTION,
        max_text: Annotated[ByteSize, Between(1024, 2**26)] = 2**21,
    ) -> None:
        self._default = on_break
        self._most = max_continues
        self._asking = Asking(prefill or {}, instruction)
        self._max_text = max_text
        self._counts: Counter[tuple[str, str]] = Counter()

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Read `on_break`. Raises Refused."""
        found = own.get("on_break")
        if found is None:
            return call
        word = found.one_of(CHOICES)
        chosen = next(choice for choice in CHOICES if choice == word)
        return altered(call, extensions={**call.extensions, Asked: Asked(chosen)})

    async def __call__(self, call: Call, next: Handler) -> Reply:
        asked = call.extension(Asked)
        on_break = self._default if asked is None else asked.on_break
        reply = await next(call)
        if on_break == "error" or not self._most or reply.whole or reply.head.status != 200:
            return reply
        watch = _Watch(self._most, on_break, call, self._counts)
        chunks = Continued(
            reply,
            streamed=call.stream,
            judge=watch.judge,
            ask=partial(self._ask, call, next),
            most=self._max_text,
        )
        return altered(reply, chunks=chunks, trailer=chunks.trailer)

    async def _ask(self, call: Call, next: Handler, found: Remedy, broken: Sequence[str]) -> Reply:
        reason = found.error.outcome.value
        try:
            if found.anew:
                reply = await self._asking.anew(call, next, broken)
            else:
                reply = await self._asking.on(call, next, broken, found.said.text)
        except BaseException:
            self._counts["failed", reason] += 1
            raise
        self._counts["restarted" if found.anew else "continued", reason] += 1
        return reply

    def samples(self) -> Iterable[Sample]:
        """Breaks in mid-stream by what was done about them, and why they were breaks."""
        text = "Streams that broke and were to go on, by what came of it."
        for (result, reason), count in sorted(self._counts.items()):
            labels = {"result": result, "reason": reason}
            yield Sample("penstock_continuations_total", "counter", text, count, labels)


class _Watch:
    """Judges the breaks of one reply, `left` of them favourably."""

    __slots__ = ("_call", "_counts", "_left", "_on_break")

    def __init__(self, left: int, on_break: OnBreak, call: Call, counts: Counter[tuple[str, str]]) -> None:
        self._left, self._on_break, self._call, self._counts = left, on_break, call, counts

    def judge(self, said: Said | None, error: GatewayError) -> Remedy | None:
        if not broke(error):
            return None
        found = remedy(self._on_break, self._call, said, error) if self._left else None
        if found is None:
            self._counts["impossible", error.outcome.value] += 1
            return None
        self._left -= 1
        return found


__all__ = ["Continuation"]
