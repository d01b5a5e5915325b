"""What the pieces of a Cohere reply mean, for replies that are streamed and replies that are not.

Strategy: pure functions and one table, each from a documented object to its OpenAI shape.
The one rule: Cohere's own object stays reachable (`citation`, `billed_units`, `native_finish_reason`) wherever it says more.
"""

from __future__ import annotations

from typing import Any, NoReturn

from proxy.faults import ErrorWords, in_band_error

Json = dict[str, Any]

FORMAT = "cohere-v2"
TOOL_PLAN = "tool_plan"

# https://docs.cohere.com/reference/chat#response.body.finish_reason; the ERROR_ reasons are version 1's, seen on older models.
FINISH_REASONS = {
    "COMPLETE": "stop",
    "STOP_SEQUENCE": "stop",
    "MAX_TOKENS": "length",
    "ERROR_LIMIT": "length",
    "TOOL_CALL": "tool_calls",
    "ERROR_TOXIC": "content_filter",
}
FAILURES = frozenset({"ERROR", "TIMEOUT", "USER_CANCEL"})


def finish_reason(native: Any, error: Any) -> str | None:
    """OpenAI's word for Cohere's, "stop" for one that is not documented; None for None. Raises UpstreamError for a failure."""
    if error or native in FAILURES:
        failed(native, error)
    return FINISH_REASONS.get(native, "stop") if native else None


def failed(native: Any, error: Any) -> NoReturn:
    """The reply ended in an error: 504 for TIMEOUT, else by the words."""
    if isinstance(error, dict):
        error = error.get("message") or str(error)
    words = str(error) if error else f"The provider ended its reply with {native}."
    raise in_band_error(ErrorWords(message=words, status=504 if native == "TIMEOUT" else None))


def reasoning_detail(text: str, index: int, plan: bool) -> Json:
    """One entry of `reasoning_details`. index: which piece of reasoning of the message this is, or is part of."""
    detail: Json = {"type": "reasoning.text", "text": text, "format": FORMAT, "index": index}
    if plan:
        detail["id"] = TOOL_PLAN
    return detail


def usage(found: Any) -> Json | None:
    """OpenAI's usage object, or None. `tokens` is what went in and out; `billed_units`, what is paid for, stays beside it.

    Cohere's numbers are JSON numbers that may have a fraction (`12.0`).
    """
    if not isinstance(found, dict):
        return None
    billed = found.get("billed_units")
    counts = found.get("tokens") or billed
    if not isinstance(counts, dict) or not {"input_tokens", "output_tokens"} & counts.keys():
        return None
    prompt, completion = int(counts.get("input_tokens") or 0), int(counts.get("output_tokens") or 0)
    counted: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    for details, name, value in (
        ("prompt_tokens_details", "cached_tokens", found.get("cached_tokens")),
        ("completion_tokens_details", "reasoning_tokens", counts.get("reasoning_tokens")),
    ):
        if value is not None:
            counted[details] = {name: int(value)}
    if billed:
        counted["billed_units"] = billed
    return counted


def citation_notes(citation: Json) -> list[Json]:
    """A citation as OpenAI's `url_citation`s, one per source with a URL, else as `{"type": "citation"}`.

    Cohere's own object is `citation` on the first of them. Citations of a plan or of thinking count their offsets in other
    text than the content, so they never become `url_citation`s.
    """
    found: list[Json] = []
    if citation.get("type") in (None, "TEXT_CONTENT"):
        for source in citation.get("sources") or []:
            url, title = _address(source)
            if url:
                where = {"start_index": citation.get("start"), "end_index": citation.get("end"), "url": url, "title": title}
                found.append({"type": "url_citation", "url_citation": where})
    found = found or [{"type": "citation"}]
    found[0]["citation"] = citation
    return found


def _address(source: Json) -> tuple[str | None, str]:
    """URL and title of a source: a document, or a tool's output that is an object."""
    fields = source.get("document") or source.get("tool_output")
    fields = fields if isinstance(fields, dict) else {}
    for url in (fields.get("url"), source.get("id")):
        if isinstance(url, str) and url.startswith(("http://", "https://")):
            return url, str(fields.get("title") or "")
    return None, ""


def logprobs(items: list[Json]) -> Json:
    """OpenAI's logprobs of a choice. An item of several tokens has one text: its logprob is the sum, its `token_ids` stay."""
    content = []
    for item in items:
        text = item.get("text") or ""
        total = float(sum(item.get("logprobs") or []))
        entry = {"token": text, "logprob": total, "bytes": list(text.encode()), "top_logprobs": []}
        content.append({**entry, "token_ids": item.get("token_ids") or []})
    return {"content": content, "refusal": None}
