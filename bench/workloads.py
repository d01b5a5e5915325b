"""What is measured: one row per kind of work, and who takes part in it.

The one rule: a row says all there is to say about the load; nothing about a contestant is special-cased elsewhere, except that a
cache hit is for nginx a file of the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OTHERS = ("smg", "relay", "bare", "nginx", "workers-1")
EVERYONE = ("nginx", "relay", "bare", "penstock", "smg", "portkey", "litellm")
# Milliseconds between a stream's chunks, such that all streams together bring about 2,000 chunks a second.
FLAT = {1: 1, 10: 5, 100: 50, 1000: 500, 5000: 2500}
ENDLESS = 10_000_000
REQUEST, CHUNK, FIRST, RATE = "cpu_us_per_request", "cpu_us_per_chunk", "first_ms.p50", "requests_per_s"


@dataclass(frozen=True)
class Work:
    """title: what it is, in the report. clients: connections of the closed loop. who: names of contestants; "+" stands for each
    middleware alone. levels: streams that are held open, instead of a closed loop. fresh: in a process of its own. wire: of the
    provider. ratio: of which figure ratios are shown, and against: to whom. share: so many requests in a row are one question.
    together: all clients' streams open at once. merged: whoever is asked may merge chunks. default: it runs unasked.
    """

    title: str
    model: str
    clients: int = 32
    who: Sequence[str] = EVERYONE
    ratio: str = REQUEST
    whole: bool = False
    same: bool = False
    prompt: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    wire: str = "openai"
    levels: tuple[int, ...] = ()
    fresh: bool = False
    against: Sequence[str] = OTHERS
    share: int = 1
    together: bool = False
    merged: bool = False
    default: bool = True


WORKS: Mapping[str, Work] = {
    "json": Work("JSON request and reply", "bench-10-0", whole=True),
    "burst": Work("stream of 100 chunks in one burst", "bench-100-0"),
    "paced": Work("50 chunks, 20 ms apart, 200 open streams", "bench-50-20", 200, ("direct", *EVERYONE), CHUNK),
    "paced-2000": Work(
        # LiteLLM needs a minute of CPU for each round of this one.
        "50 chunks, 20 ms apart, 2,000 open streams",
        "bench-50-20", 2000, ("direct", *(who for who in EVERYONE if who != "litellm")), CHUNK,
    ),
    "one": Work("one client, 10 chunks: added latency", "bench-10-0", 1, ("direct", *EVERYONE), FIRST),
    "hit": Work(
        "cache hit, stream of 100 chunks; nginx: the same bytes from a file",
        "bench-100-0", who=("nginx", "penstock"), same=True, extra={"cache": {"ttl": 3600}},
    ),
    "prompt": Work("JSON, prompt of 100 KB", "bench-10-0", whole=True, prompt=100_000),
    "anthropic": Work(
        "Anthropic's stream of 100 chunks to OpenAI's",
        "bench-100-0", who=("bare", "penstock", "portkey", "litellm"), wire="anthropic",
    ),
    "alone-json": Work("each middleware alone: JSON", "bench-10-0", who=("bare", "+"), whole=True),
    "alone-burst": Work("each middleware alone: 100 chunks in one burst", "bench-100-0", who=("bare", "+")),
    "open": Work(
        "memory of open streams, 4 chunks a second each",
        f"bench-{ENDLESS}-250", ratio=CHUNK, levels=(200, 400), fresh=True,
    ),
    **{
        f"flat-{streams}": Work(
            f"CPU per chunk at {streams:,} open streams",
            f"bench-{ENDLESS}-{gap}", who=("relay", "penstock"), ratio=CHUNK, levels=(streams,),
        )
        for streams, gap in FLAT.items()
    },
    "followers": Work(
        "16 followers on one flight, 192 open streams: 50 chunks, 20 ms apart",
        "bench-50-20", 192, ("penstock", "flights"), CHUNK, share=16, against=("penstock",),
    ),
    "surviving": Work(
        "streams that can be shared and resumed: 50 chunks, 20 ms apart, 200 open streams",
        "bench-50-20", 200, ("penstock", "flights", "resumable", "flights-resumable"), CHUNK, against=("penstock",),
    ),
    "surviving-held": Work(
        "the same, a chunk of streams that are held open: 200 streams, 20 ms apart",
        f"bench-{ENDLESS}-20", who=("penstock", "flights", "resumable", "flights-resumable"), ratio=CHUNK, levels=(200,),
        against=("penstock",), fresh=True,  # what is resumable is read on when this is over
    ),
    "smooth": Work(
        "merged to a write per 50 ms: 50 chunks, 20 ms apart, 200 open streams",
        "bench-50-20", 200, ("penstock", "smooth"), CHUNK, merged=True, against=("penstock",),
    ),
    "many": Work(
        "10,000 open streams: 12 chunks, 2.5 s apart",
        "bench-12-2500", 10_000, ("flights",), CHUNK, fresh=True, together=True, default=False,
    ),
    "workers": Work("JSON with one worker and with two", "bench-10-0", 64, ("workers-1", "workers-2"), RATE, whole=True),
}  # fmt: skip


def chosen(names: Sequence[str]) -> dict[str, Work]:
    """The rows by name; `flat` and `alone` stand for all of theirs. Raises KeyError with a name that is none."""
    found: dict[str, Work] = {}
    for name in names:
        rows = {key: work for key, work in WORKS.items() if name == key or (key.startswith(f"{name}-") and name != "paced")}
        if not rows:
            raise KeyError(name)
        found |= rows
    return found
