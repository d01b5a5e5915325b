"""The chunks behind a seam, made to fit those before it.

Strategy: id, time and first role are the stream's own already; what repeats text is taken away (`overlap`); thoughts about
how to go on are not the answer's and are left out. The first chunk says that there is a seam, and so does a comment before it.
The one rule: a chunk is altered in a copy, for batches may be shared.
"""

from __future__ import annotations

from typing import Any

from middleware.continuation.overlap import Overlap
from middleware.continuation.said import REASONING, Said
from proxy.reply import Batch, Chunk, Switch

Json = dict[str, Any]
LEFT_OUT = REASONING | {"role"}


class Seam:
    """said: what went out before. switch: what the client is told, unless it had nothing of the answer."""

    def __init__(self, said: Said, switch: Switch) -> None:
        self._identity = {"id": said.id, "created": said.created}
        self._overlap = Overlap(said.text)
        told = bool(said.text)
        self._comment = b": penstock continued by %b\n\n" % switch.target.encode() if told else b""
        self._note: Json = {"penstock": {"continued": _told(switch)}} if told else {}

    def joined(self, batch: Batch) -> Batch | None:
        """The batch as it goes on; None where nothing of it is new."""
        items = [made for chunk in batch.chunks for made in self._chunks(chunk)]
        if not items:
            return None
        items[0] |= self._note
        comment, self._comment, self._note = self._comment, b"", {}
        return Batch(items, final=batch.final, comment=comment)

    def _chunks(self, chunk: Chunk) -> list[Chunk]:
        """None, one, or two: text that was held back comes before what is no text."""
        chunk = {**chunk, **self._identity}
        if not chunk["choices"]:
            return [chunk]
        choice = chunk["choices"][0]
        delta = {name: value for name, value in choice["delta"].items() if name not in LEFT_OUT}
        fresh = self._overlap.feed(delta.pop("content", None) or "")
        ends = choice.get("finish_reason") is not None
        made = []
        if self._overlap.open and (ends or any(delta.values())):
            fresh += self._overlap.close()
        if fresh and ends:
            made.append({**chunk, "choices": [{"index": 0, "delta": {"content": fresh}, "finish_reason": None}]})
        elif fresh:
            delta = {"content": fresh, **delta}
        if ends or any(delta.values()):
            made.append({**chunk, "choices": [{**choice, "delta": delta}]})
        return made


def _told(switch: Switch) -> Json:
    return {"from": switch.source, "to": switch.target, "reason": switch.reason}
