"""Google's Gemini API: generateContent, and streamGenerateContent as server-sent events; on Vertex AI too.

Strategy: `encode` and `contents` turn an OpenAI-shaped request into Gemini's, `decode` reads its events, `partial_args` puts
streamed function arguments together, `whole` folds what the decoder says about a whole reply into one completion.
The one rule: one place knows what a part of a Gemini candidate means (`decode`), for streams and whole replies alike.

Format: https://ai.google.dev/api/generate-content
"""

from proxy.faults import http_error as decode_error
from proxy.wire.gemini.decode import Decoder
from proxy.wire.gemini.encode import encode
from proxy.wire.gemini.whole import decode_whole

__all__ = ["Decoder", "decode_error", "decode_whole", "encode"]
