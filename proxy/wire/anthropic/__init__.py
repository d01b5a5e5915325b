"""Anthropic's Messages API as a wire format (https://docs.anthropic.com/en/api/messages).

Strategy: out, an OpenAI-shaped request becomes `system`, alternating turns of content blocks, and tools (`encode`, `messages`,
`tools`, `thinking`); back, content blocks become deltas (`decode`) or one message (`whole`), in the words of `terms`.
The one rule: a block is either translated whole or kept whole. What OpenAI has no shape for (blocks of tools that Anthropic runs
itself, signatures, compaction) reaches the client untouched, and goes back untouched.
"""

from __future__ import annotations

from proxy.faults import http_error as decode_error
from proxy.wire.anthropic.decode import Decoder
from proxy.wire.anthropic.encode import encode
from proxy.wire.anthropic.whole import decode_whole

__all__ = ["Decoder", "decode_error", "decode_whole", "encode"]
