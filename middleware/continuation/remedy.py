"""What can be done about a reply that broke: begin anew, go on from its text, or nothing. Pure functions.

The one rule: what is put together must be what one model could have said: plain text in one choice, bound to no schema.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from middleware.continuation.said import Said
from proxy.call import Call
from proxy.errors import GatewayError, Malformed, UpstreamCut, UpstreamError, UpstreamTimeout

Json = dict[str, Any]
OnBreak = Literal["error", "restart_if_unsent", "continue"]
CHOICES: tuple[OnBreak, ...] = ("error", "restart_if_unsent", "continue")

# What binds an answer to a schema or a grammar, as OpenAI, Anthropic, Gemini, vLLM, SGLang and llama.cpp call it.
BINDING = frozenset({
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "regex", "ebnf", "grammar",
    "json_schema", "output_format", "output_config", "responseSchema", "responseJsonSchema", "responseMimeType",
})  # fmt: skip
GEMINI_PLACES = ("generationConfig", "generation_config")
# Words of an error that another target would have to refuse as well, or that is a verdict on the content.
REFUSALS = re.compile(
    r"content_?(filter|policy)|responsible_?ai|safety|moderation|prohibited|blocked|invalid_request", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Remedy:
    """said: what the client has. anew: it has nothing, so the same is asked again; else the next goes on from `said.text`."""

    said: Said
    anew: bool
    error: GatewayError


def broke(error: GatewayError) -> bool:
    """Did the upstream break the stream: cut, reset, silence, malformed, an error of its own in it? A limit of the gateway's, its
    draining, a filter's verdict and the client's own mistakes are no breaks."""
    if isinstance(error, UpstreamTimeout):
        return error.which == "idle"
    if isinstance(error, UpstreamError):
        return (error.status >= 500 or error.status in (408, 429)) and not REFUSALS.search(f"{error.code} {error.type}")
    return isinstance(error, UpstreamCut | Malformed)


def remedy(on_break: OnBreak, call: Call, said: Said | None, error: GatewayError) -> Remedy | None:
    """None where the client must be told. said: None where more went out than was kept."""
    if said is None or on_break == "error":
        return None
    if said.nothing:
        return Remedy(said, anew=True, error=error)
    if on_break == "continue" and said.plain and said.text and can_be_joined(call):
        return Remedy(said, anew=False, error=error)
    return None


def can_be_joined(call: Call) -> bool:
    """Is the answer that was asked for plain text in one choice?"""
    request = call.request
    if call.kind == "embeddings" or (request.get("n") or 1) != 1 or (request.get("best_of") or 1) != 1:
        return False
    logprobs = request.get("logprobs")  # of a text completion a number, and 0 asks for them too
    if not (logprobs is None or logprobs is False) or request.get("top_logprobs") or _speaks(request):
        return False
    if call.kind == "completions" and (_prompt(request) is None or request.get("suffix") or request.get("echo")):
        return False
    return not _bound(request)


def _speaks(request: Json) -> bool:
    modalities = request.get("modalities")
    return bool(request.get("audio")) or (isinstance(modalities, list) and any(word != "text" for word in modalities))


def _prompt(request: Json) -> str | None:
    prompt = request.get("prompt")
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    return prompt if isinstance(prompt, str) else None


def _bound(request: Json) -> bool:
    wanted = request.get("response_format")
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type", "text") == "text"):
        return True
    places = [request, *(request[name] for name in GEMINI_PLACES if isinstance(request.get(name), dict))]
    return any(place.get(name) for place in places for name in BINDING)
