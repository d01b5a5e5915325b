"""A whole Gemini reply as one `chat.completion`.

Strategy: the decoder reads the reply as if it were the only event of a stream, and its chunks are folded. So a stream and a
whole reply cannot come to say different things.
The one rule: no reply without content, finish reason or block: that is the provider's error.

https://ai.google.dev/api/generate-content#v1beta.GenerateContentResponse
"""

from __future__ import annotations

import orjson

from proxy.call import Call, Target
from proxy.errors import Malformed, UpstreamCut, UpstreamError
from proxy.fold import fold
from proxy.reply import Batch, Completion
from proxy.wire.gemini.decode import Decoder


def decode_whole(call: Call, target: Target, body: bytes) -> Completion:
    """One `chat.completion` out of a GenerateContentResponse, or out of an array of them (a stream without `alt=sse`).

    Raises UpstreamError for an error inside a 200 and for a reply that holds nothing, Malformed for what is no reply,
    UpstreamCut for an array whose last response is missing.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Malformed("The provider's reply is not JSON.") from None
    decoder = Decoder(call, target)
    for response in found if isinstance(found, list) else [found]:
        decoder.guarded(response)
        if decoder.fault is not None:
            raise decoder.fault
    if decoder.stream.empty:
        raise UpstreamError("The provider's reply holds no candidates.")
    if isinstance(found, list) and not decoder.stream.finished:
        raise UpstreamCut("The provider's reply ended before it was complete.")
    decoder.end()
    completion = fold(Batch(decoder.stream.take()).chunks, decoder.stream.usage)
    for choice in completion["choices"]:
        choice["message"]["content"] = choice["message"]["content"] or None
    return completion
