"""The `openai` wire format: chat, text completions and embeddings, as OpenAI and the vendors that speak its format have them.

A vendor is a row in config.yaml, never code: what differs between vendors is a field of the row (`proxy.call.Provider`) or one
of the small named functions in `quirks`.

API: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from proxy.faults import http_error as decode_error
from proxy.wire.openai.decode import Decoder
from proxy.wire.openai.encode import encode
from proxy.wire.openai.whole import decode_whole

__all__ = ["Decoder", "decode_error", "decode_whole", "encode"]
