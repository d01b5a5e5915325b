"""How much one key, identity, tracking name or client may ask: requests and tokens per minute, replies at a time, size of input.

Strategy: what a request may at most cost is reserved before it goes in (`meters`), and settled to what it did cost when its reply
has ended. A slot is a count in this process, freed by the reply's end, by any exception, and at the latest by its `Lease` dying.
Cost: around the head, and one callback at the end; nothing per chunk.
The one rule: whatever was taken is written on the call's lease before the next `await`, so that no ending can lose it.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from middleware.limits.bounds import Bounds, wanted_output
from middleware.limits.client import Proxies
from middleware.limits.lease import Lease, Limited, Share
from middleware.limits.meters import Meters
from middleware.limits.subjects import Subjects
from proxy.call import Call, Peer
from proxy.estimate import estimated_input
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.reply import Reply, Trailer
from proxy.units import Between, ByteSize

Figure = Literal["requests_per_minute", "tokens_per_minute", "concurrent"]
Rates = Mapping[Figure, Annotated[int, Between(1, 10**9)]]
Count = Annotated[int, Between(1, 10**6)]
FIGURES: tuple[Figure, ...] = get_args(Figure)
KINDS = ("key", "identity", "name", "client")


class Limits:
    """Limits what may be asked, with a 429 that says when to come back.

    per_key, per_identity, per_name, per_client: requests_per_minute, tokens_per_minute, concurrent, each optional; a key's own
    entry (`limits` in auth) goes before them, figure by figure. Identities, names and clients count within their key. A client is
    an address; trusted_proxies: whose X-Forwarded-For says which (`10.0.0.0/8`). max_tracked: how many identities, names, clients
    are told apart, each; further ones of a key share one allowance. max_messages, max_tools, max_choices, max_input_bytes
    (of the messages as JSON): what one request may bring, 400 beyond. Nesting is bounded by server.max_depth.
    """

    NEEDS_PEER = True

    def __init__(
        self,
        *,
        per_key: Rates | None = None,
        per_identity: Rates | None = None,
        per_name: Rates | None = None,
        per_client: Rates | None = None,
        trusted_proxies: tuple[str, ...] = (),
        max_tracked: Count = 10_000,
        max_messages: Count = 10_000,
        max_tools: Count = 1024,
        max_choices: Annotated[int, Between(1, 128)] = 128,
        max_input_bytes: Annotated[ByteSize, Between(1, 2**30)] | None = None,
        _meters: Meters | None = None,
    ) -> None:
        written = {"key": per_key, "identity": per_identity, "name": per_name, "client": per_client}
        self._proxies = Proxies(trusted_proxies)
        self._rates: dict[str, dict[str, int]] = {
            kind: {str(figure): most for figure, most in (rates or {}).items()} for kind, rates in written.items()
        }
        self._bounds = Bounds(max_messages, max_tools, max_choices, max_input_bytes)
        self._subjects = {kind: Subjects(max_tracked) for kind in KINDS}
        # Two meters per subject; beside the tracked ones each key has its own and one shared by the rest.
        self._meters = _meters or Meters(10 * max_tracked)
        self._share: Callable[[int], int] | None = None
        self._limited: Counter[str] = Counter()
        self._settling: set[asyncio.Task[None]] = set()

    def attach(self, surroundings: Surroundings) -> None:
        """Each of several workers counts for itself, so each has its part of every limit."""
        self._share = surroundings.share if surroundings.workers > 1 else None

    def adopt(self, previous: Limits) -> None:
        """What was used of the limits stays used, and who holds a slot holds it; meters keep the room they were given first."""
        for kind, subjects in previous._subjects.items():
            subjects.most = self._subjects[kind].most
        self._subjects, self._meters, self._limited = previous._subjects, previous._meters, previous._limited

    def admit(self, call: Call, own: OwnFields) -> Call:
        """Refuses what is too large, with its path."""
        self._bounds.check(call.request)
        return call

    async def __call__(self, call: Call, next: Handler) -> Reply:
        shares = list(self._shares(call))
        if not shares:
            return await next(call)
        lease = Lease()
        try:
            headers = await self._take(call, shares, lease)
        except BaseException as error:
            lease.free()
            if isinstance(error, Limited):
                self._limited[error.which] += 1
            raise
        try:
            reply = await next(call)
        except BaseException:
            # Nothing was generated for this client, so no tokens were used; the request itself counts.
            self._ended(lease, 0)
            raise
        reply.trailer.on_end(lambda trailer: self._ended(lease, _used(lease, reply, trailer)))
        return replace(reply, head=replace(reply.head, headers={**reply.head.headers, **headers}))

    def _shares(self, call: Call) -> Iterator[Share]:
        """Whose limits hold for a call, and what they are."""
        owner = call.principal.name
        own: Mapping[str, Any] = call.principal.facts.get("limits") or {}
        if rates := _over(self._rates["key"], own):
            yield Share("key", owner, self._parts(rates))
        for kind in KINDS[1:]:
            rates = _over(self._rates[kind], own.get(f"per_{kind}"))
            if rates and (label := self._label(kind, call)) is not None:
                yield Share(kind, self._subjects[kind].subject(owner, label), self._parts(rates))

    def _label(self, kind: str, call: Call) -> str | None:
        if kind == "client":
            peer = call.extension(Peer)
            return self._proxies.client(peer.address() if peer is not None else "", call.headers)
        return call.identity if kind == "identity" else call.name

    def _parts(self, rates: Mapping[str, int]) -> Mapping[str, int]:
        share = self._share
        return rates if share is None else {figure: share(most) for figure, most in rates.items()}

    async def _take(self, call: Call, shares: list[Share], lease: Lease) -> dict[str, str]:
        """Take everything that the call needs, or raise Limited having taken nothing. Returns the response headers."""
        headers: dict[str, str] = {}
        for share in shares:
            if (most := share.rates.get("concurrent")) is not None:
                lease.slot(share, self._subjects[share.kind], most, headers)
        if any("tokens_per_minute" in share.rates for share in shares):
            lease.input = estimated_input(call.request)
            lease.estimate = max(1, lease.input + wanted_output(call.request))
        await lease.meter(shares, self._meters, headers)
        return headers

    def _ended(self, lease: Lease, used: int) -> None:
        lease.free()
        if lease.reserved:
            self._later(lease.settle(self._meters, used))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """A reply's end cannot wait, and a meter may be on another machine."""
        task = asyncio.get_running_loop().create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._settling, return_exceptions=True)

    def samples(self) -> Iterable[Sample]:
        """Refusals by limit (`key_requests`…), and what is open by whose limit counts it; both have few labels."""
        for which, count in sorted(self._limited.items()):
            yield Sample("penstock_limited_total", "counter", "Requests refused by a limit.", count, {"limit": which})
        for kind, subjects in self._subjects.items():
            text = "Replies that hold a concurrency slot."
            yield Sample("penstock_concurrent", "gauge", text, subjects.open, {"per": kind})


def _over(rates: Mapping[str, int], own: Mapping[str, Any] | None) -> Mapping[str, int]:
    """The figures that hold for all, and over them those that a key has of its own."""
    if not own:
        return rates
    return {**rates, **{figure: own[figure] for figure in FIGURES if own.get(figure) is not None}}


def _used(lease: Lease, reply: Reply, trailer: Trailer) -> int:
    """Tokens that a reply did cost: what the provider says, else about what went in and out (a chunk is about a token)."""
    if reply.head.cache in ("hit", "joined"):
        return 0
    total = (trailer.usage or {}).get("total_tokens")
    if isinstance(total, int | float) and math.isfinite(total) and total >= 0:
        return int(total)
    return lease.input + trailer.chunks


__all__ = ["Limited", "Limits"]
