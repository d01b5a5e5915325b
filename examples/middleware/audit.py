"""At the end, one callback per reply: a line per call in a file of one's own.

middleware:
  - examples.middleware.audit:Audit: {file: audit.log}
"""

from __future__ import annotations

from pathlib import Path

from proxy.call import Call
from proxy.pipeline import Handler
from proxy.reply import Reply, Trailer


class Audit:
    """file: where the lines go. A call that failed before its first chunk has no reply, and no line."""

    def __init__(self, *, file: str) -> None:
        self._file = Path(file)

    async def __call__(self, call: Call, next: Handler) -> Reply:
        reply = await next(call)
        reply.trailer.on_end(lambda trailer: self._write(call, reply.head.target, trailer))
        return reply

    def _write(self, call: Call, target: str, trailer: Trailer) -> None:
        tokens = (trailer.usage or {}).get("total_tokens", "?")
        with self._file.open("a") as file:
            file.write(f"{call.id} {call.principal.name} {call.model} -> {target}: {trailer.outcome}, {tokens} tokens\n")
