"""What the client learns of the passages that its answer was given: `penstock.sources`, on the last chunk and in a whole reply.

Strategy: every batch but the final one passes at the cost of a look at its flag. In that one the last chunk that has a finish
reason is found from behind, and goes out with the sources; nothing before it is decoded.
The one rule: what `penstock` holds already (faults of tool calls, say) stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson

from proxy.call import Call, altered
from proxy.fold import unfolded
from proxy.reply import Batch, Chunk, Item, Reply, Run, noted, single_events, tapped

Json = dict[str, Any]


def told(call: Call, reply: Reply, sources: Sequence[Json]) -> Reply:
    """The reply with these sources, whichever form it has and whichever the client wants."""
    if reply.whole and call.stream:
        # Unfolded here rather than by the relay, which would put what the reply holds on each of its chunks.
        reply = altered(reply, chunks=unfolded(reply), whole=False)
    see = _whole if reply.whole else _last
    return altered(reply, chunks=tapped(reply.chunks, partial(see, sources)))


def _whole(sources: Sequence[Json], batch: Batch) -> Batch:
    return Batch([noted(batch.chunks[0], "sources", sources)], final=batch.final, number=batch.number, comment=batch.comment)


def _last(sources: Sequence[Json], batch: Batch) -> Batch:
    if not batch.final:
        return batch
    twin = Batch(_items(batch.items, sources), final=True, number=batch.number, comment=batch.comment)
    twin.seen = batch.seen
    return twin


def _items(items: Sequence[Item], sources: Sequence[Json]) -> list[Item]:
    for place in reversed(range(len(items))):
        item = items[place]
        singles: list[Item] = [*single_events(item)] if isinstance(item, Run) else [item]
        for number in reversed(range(len(singles))):
            chunk = _chunk(singles[number])
            if any(choice.get("finish_reason") for choice in chunk["choices"]):
                singles[number] = noted(chunk, "sources", sources)
                return [*items[:place], *singles, *items[place + 1 :]]
    return list(items)


def _chunk(item: Item) -> Chunk:
    if not isinstance(item, bytes):
        return item
    chunk: Chunk = orjson.loads(item[item.index(b"data: ") + 6 :])
    return chunk
