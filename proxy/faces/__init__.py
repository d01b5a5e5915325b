"""What clients speak: one module per face, all with the same names, found by the last part of the path.

A face is pure: no I/O, no clock. It has

    KIND                                        what `Call.kind` it makes
    VERBATIM                                    an encoded event leaves as it is
    check(body)                                 the shape of a request of this face; raises Refused with the path
    events(batch) -> bytes                      a batch as server-sent events
    last(batch, trailer, options) -> bytes      the finish chunks, the usage (where asked for), and `[DONE]`, in one piece
    failure(error, ...) -> bytes                the error chunk of a stream that did not complete; number: its `id:`, if any
    whole(completion) -> Json                   a reply that is not streamed

The one rule: inside the gateway every reply is a chat reply; a face only rewrites it on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from proxy.call import Call, Kind, Options
from proxy.errors import GatewayError
from proxy.faces import chat, completions, embeddings
from proxy.reply import Batch, Chunk, Completion, Trailer

Json = dict[str, Any]


class Face(Protocol):
    """The names that every face has."""

    KIND: Kind
    VERBATIM: bool

    def check(self, body: Json) -> None: ...

    def events(self, batch: Batch) -> bytes: ...

    def last(self, batch: Batch, trailer: Trailer, options: Options) -> bytes: ...

    def failure(self, error: GatewayError, call: Call, sent: Chunk | None, number: int | None = None) -> bytes: ...

    def whole(self, completion: Completion) -> Json: ...


FACES: Mapping[str, Face] = {
    "/chat/completions": chat,
    "/completions": completions,
    "/embeddings": embeddings,
}
