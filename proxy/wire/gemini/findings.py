"""What a Gemini response says beside its content: usage, citations, log probabilities, safety.

Strategy: pure functions from Gemini's objects to OpenAI's, for the decoder to put where they belong.
The one rule: what OpenAI has a shape for is translated; the rest is kept under Gemini's own name.

https://ai.google.dev/api/generate-content#UsageMetadata, #GroundingMetadata, #LogprobsResult
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

KEPT = ("groundingMetadata", "citationMetadata", "urlContextMetadata", "avgLogprobs", "groundingAttributions")
AUDIO = ("AUDIO", 4)


def usage_of(metadata: Json | None) -> Json | None:
    """OpenAI's usage of a `usageMetadata` (running totals), or None while it counts nothing."""
    if not metadata or not any(name.endswith("TokenCount") for name in metadata):
        return None
    thoughts = metadata.get("thoughtsTokenCount") or 0
    prompt = (metadata.get("promptTokenCount") or 0) + (metadata.get("toolUsePromptTokenCount") or 0)
    completion = (metadata.get("candidatesTokenCount") or 0) + thoughts
    usage: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    details = {
        "cached_tokens": metadata.get("cachedContentTokenCount"),
        "audio_tokens": _audio_tokens(metadata.get("promptTokensDetails")),
    }
    made = {"reasoning_tokens": thoughts, "audio_tokens": _audio_tokens(metadata.get("candidatesTokensDetails"))}
    for name, found in (("prompt_tokens_details", details), ("completion_tokens_details", made)):
        known = {key: count for key, count in found.items() if count}
        if known:
            usage[name] = known
    return usage


def _audio_tokens(details: list[Json] | None) -> int:
    return sum(item.get("tokenCount") or 0 for item in details or () if item.get("modality") in AUDIO)


def extras_of(candidate: Json) -> Json:
    """The fields of a candidate that go out beside its delta."""
    extras = {name: candidate[name] for name in KEPT if candidate.get(name)}
    ratings = candidate.get("safetyRatings")
    if ratings and any(rating.get("blocked") for rating in ratings):
        extras["safetyRatings"] = ratings
    logprobs = candidate.get("logprobsResult")
    if logprobs:
        extras["logprobs"] = _logprobs(logprobs)
    return extras


def _logprobs(result: Json) -> Json:
    """OpenAI's `logprobs` of a LogprobsResult: one entry per chosen token, with its alternatives."""
    tops = result.get("topCandidates") or []
    content = []
    for number, chosen in enumerate(result.get("chosenCandidates") or ()):
        top = tops[number].get("candidates") or () if number < len(tops) else ()
        content.append({**_token(chosen), "top_logprobs": [_token(other) for other in top]})
    return {"content": content, "refusal": None}


def _token(candidate: Json) -> Json:
    token = candidate.get("token") or ""
    return {"token": token, "logprob": candidate.get("logProbability") or 0.0, "bytes": list(token.encode())}


def citations(grounding: Json, text: str, cited: set[tuple[object, ...]]) -> list[Json]:
    """The url_citations of a groundingMetadata that are not in `cited` yet; they are added to it.

    Gemini counts a segment in bytes of UTF-8, OpenAI in characters of `text`. A source without a segment is cited at 0..0.
    """
    found: list[Json] = []
    for citation in _cited(grounding, text.encode()):
        key = tuple(citation.values())
        if key not in cited:
            cited.add(key)
            found.append({"type": "url_citation", "url_citation": citation})
    return found


def _cited(grounding: Json, text: bytes) -> Iterator[Json]:
    sources = [_source(chunk) for chunk in grounding.get("groundingChunks") or ()]
    named: set[int] = set()
    for support in grounding.get("groundingSupports") or ():
        segment = support.get("segment") or {}
        start, end = (_characters(text, segment.get(edge) or 0) for edge in ("startIndex", "endIndex"))
        for number in support.get("groundingChunkIndices") or ():
            if 0 <= number < len(sources) and sources[number]:
                named.add(number)
                yield {**sources[number], "start_index": start, "end_index": end}
    for number, source in enumerate(sources):
        if source and number not in named:
            yield {**source, "start_index": 0, "end_index": 0}


def _source(chunk: Json) -> Json:
    """{"url", "title"} of a GroundingChunk: web, maps or retrievedContext; {} where it has no address."""
    place = chunk.get("web") or chunk.get("maps") or chunk.get("retrievedContext") or {}
    return {"url": place["uri"], "title": place.get("title") or ""} if place.get("uri") else {}


def _characters(text: bytes, offset: int) -> int:
    return len(text[:offset].decode("utf-8", "ignore"))
