"""Anthropic's words and what they are called on OpenAI's side: stop reasons, usage, citations, error types.

Strategy: tables and pure functions, used by the stream decoder and by the decoder of whole replies alike, so that both forms of
one answer agree.
The one rule: the native word is never lost; an unknown one is a plain `stop` with the word kept beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from proxy.errors import UpstreamError
from proxy.faults import ErrorWords, in_band_error

Json = dict[str, Any]

# What `reasoning_details` are marked with: only entries of this format are ever sent back.
FORMAT = "anthropic-claude-v1"

# https://docs.anthropic.com/en/api/handling-stop-reasons
FINISH_REASONS: Mapping[str, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "compaction": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}

# Fields beside the stop reason that OpenAI has no name for; they stand on the choice, under Anthropic's names.
CHOICE_EXTRAS = ("stop_sequence", "stop_details", "container")

# https://docs.anthropic.com/en/api/errors; overloaded is 529 there as an HTTP status, 503 inside a stream (contract, 3.6).
ERROR_STATUSES: Mapping[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 502,
    "overloaded_error": 503,
    "timeout_error": 504,
}


def finish_reason(native: object) -> str:
    """OpenAI's word for a `stop_reason`."""
    return FINISH_REASONS.get(native, "stop") if isinstance(native, str) else "stop"


def choice_extras(delta: Json) -> Json:
    """What a message (or a `message_delta`) says beside its stop reason: `stop_sequence`, `stop_details`, `container`."""
    return {name: delta[name] for name in CHOICE_EXTRAS if delta.get(name) is not None}


def reported(words: ErrorWords) -> UpstreamError:
    """The error that came inside a 200, with the status that Anthropic documents for its type."""
    status = words.status or ERROR_STATUSES.get(words.type or "")
    return in_band_error(replace(words, status=status))


# Counts that stay under Anthropic's own names; `iterations` is what compaction and fallbacks cost.
USAGE_EXTRAS = ("cache_creation", "server_tool_use", "iterations")


def usage(counts: Json) -> Json | None:
    """OpenAI's usage object, a fresh one each time; None where nothing was counted.

    Anthropic's `input_tokens` leaves out what was read from or written to the prompt cache; `prompt_tokens` is all of it
    (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching#tracking-cache-performance).
    """
    if not counts:
        return None
    read, written = counts.get("cache_read_input_tokens"), counts.get("cache_creation_input_tokens")
    prompt = (counts.get("input_tokens") or 0) + (read or 0) + (written or 0)
    completion = counts.get("output_tokens") or 0
    found: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if read is not None or written is not None:
        found["prompt_tokens_details"] = {
            "cached_tokens": read or 0,
            "cache_write_tokens": written or 0,
            "cache_creation_tokens": written or 0,
        }
    details = counts.get("output_tokens_details")
    if isinstance(details, dict) and details.get("thinking_tokens") is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": details["thinking_tokens"]}
    found.update({name: counts[name] for name in USAGE_EXTRAS if counts.get(name) is not None})
    return found


def merge_usage(counts: Json, event: Json) -> None:
    """Counts are running totals: a later one replaces an earlier one, an absent or null one does not."""
    news = event.get("usage")
    if isinstance(news, dict):
        counts.update({name: value for name, value in news.items() if value is not None})


def annotation(citation: Json, start: int, end: int) -> Json:
    """OpenAI's `url_citation` for a citation of a web page; any other citation as Anthropic wrote it.

    start, end: where the cited text block stands in the message's content, in characters; end exclusive.
    """
    if citation.get("type") != "web_search_result_location" or not isinstance(citation.get("url"), str):
        return citation
    found: Json = {"url": citation["url"], "title": citation.get("title") or "", "start_index": start, "end_index": end}
    if citation.get("cited_text"):
        found["content"] = citation["cited_text"]
    return {"type": "url_citation", "url_citation": found}
