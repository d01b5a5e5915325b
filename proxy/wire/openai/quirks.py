"""What vendors do differently, each as one small named function.

The one rule: each names the vendor, and the shape that shows it; a vendor that follows OpenAI pays for none of it.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxy.chunks import Choice, ToolCall
from proxy.errors import UpstreamError
from proxy.reply import Usage

Json = dict[str, Any]

# Finish reasons beside OpenAI's own: vLLM and SGLang engines, Mistral, gateways in front of Anthropic or Gemini.
FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "function_call": "function_call",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "complete": "stop",
    "max_tokens": "length",
    "model_length": "length",
    "max_output_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "tool_call": "tool_calls",
    "safety": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
    "spii": "content_filter",
    "recitation": "content_filter",
    "refusal": "content_filter",
    "content_filtered": "content_filter",
    "sensitive": "content_filter",
}
# Those that say that there is no answer: OpenRouter and Mistral `error`, DeepSeek `insufficient_system_resource`, vLLM `abort`.
FAILURES = {"error": 502, "abort": 502, "network_error": 502, "insufficient_system_resource": 503, "malformed_function_call": 502}


def finish_reason(native: str) -> str:
    """OpenAI's word for a vendor's; raises UpstreamError for those that mean failure. An unknown word is a `stop`."""
    word = native.lower()
    if word in FAILURES:
        raise UpstreamError(f"The provider ended its reply with finish reason '{native}'.", status=FAILURES[word])
    return FINISH_REASONS.get(word, "stop")


COUNTS = {"prompt_tokens", "completion_tokens", "total_tokens"}


def usage(found: Json) -> Usage:
    """OpenAI's usage, with counts that add up; the vendor's further fields are kept.

    Mistral leaves audio out of prompt_tokens; xAI and Gemini's compatible API leave reasoning out of completion_tokens: there
    total_tokens is larger than the sum. Vercel's gateway leaves it out of both; a reasoning count a little above
    completion_tokens, though, is only another tokenizer's (OpenRouter).
    """
    numbers = found.keys() == COUNTS and all(type(count) is int for count in found.values())
    if numbers and found["total_tokens"] == found["prompt_tokens"] + found["completion_tokens"]:
        return found
    prompt = _count(found.get("prompt_tokens") or found.get("input_tokens"))
    completion = _count(found.get("completion_tokens") or found.get("output_tokens"))
    total = _count(found.get("total_tokens"))
    missing = total - prompt - completion
    reasoning = _count((found.get("completion_tokens_details") or {}).get("reasoning_tokens") or found.get("reasoning_tokens"))
    audio = _count((found.get("prompt_tokens_details") or {}).get("audio_tokens"))
    if missing > 0 and missing == audio:
        prompt += missing
    elif missing > 0:
        completion += missing
    elif reasoning > 1.5 * completion:
        completion += reasoning
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**found, **counts, **_details(found, reasoning)}


def _details(found: Json, reasoning: int) -> Json:
    """The `*_details` of vendors that put cached (DeepSeek, Anthropic-style) and reasoning (Copilot) tokens beside them."""
    details: Json = {}
    cached = found.get("prompt_cache_hit_tokens") or found.get("cache_read_input_tokens") or found.get("cached_tokens")
    inner = found.get("prompt_tokens_details")
    if cached and not (inner or {}).get("cached_tokens"):
        details["prompt_tokens_details"] = {**(inner or {}), "cached_tokens": cached}
    inner = found.get("completion_tokens_details")
    if reasoning and not (inner or {}).get("reasoning_tokens"):
        details["completion_tokens_details"] = {**(inner or {}), "reasoning_tokens": reasoning}
    return details


def _count(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


def usage_of(chunk: Json) -> Json | None:
    """Where vendors put usage: top level, Groq in `x_groq`, Moonshot in the choice."""
    found = chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage")
    if not found:
        for choice in chunk.get("choices") or ():
            found = found or choice.get("usage")
    return found if isinstance(found, dict) else None


def split_content(content: Any) -> tuple[str, str, list[Json]]:
    """(text, reasoning, other parts) of a content: Mistral's Magistral sends a list of parts, others a string or null."""
    if content is None or isinstance(content, str):
        return (content or "", "", [])
    if not isinstance(content, list):
        raise TypeError("content")
    text, thinking, other = [], [], []
    for part in content:
        if part.get("type") == "text":
            text.append(part.get("text") or "")
        elif part.get("type") == "thinking":
            inner = part.get("thinking")
            thinking.append(inner if isinstance(inner, str) else "".join(p.get("text") or "" for p in inner or ()))
        else:
            other.append(part)
    return "".join(text), "".join(thinking), other


def reasoning_of(delta: Json) -> str:
    """Reasoning text: `reasoning_content` (DeepSeek, xAI, vLLM), `reasoning` (OpenRouter, Groq, Ollama), or only in details."""
    text = delta.get("reasoning_content") or delta.get("reasoning")
    if isinstance(text, str) and text:
        return text
    details = delta.get("reasoning_details")
    if not details:
        return ""
    entries = [entry for entry in details if isinstance(entry, dict)]
    return "".join(entry.get("text") or entry.get("summary") or "" for entry in entries)


def arguments_text(arguments: Any) -> str:
    """Argument text: a string, null (OpenRouter/Meta), or an object (Ollama's older versions)."""
    if isinstance(arguments, str):
        return arguments
    return orjson.dumps(arguments).decode() if arguments else ""


def same_call(choice: Choice, native_ids: dict[ToolCall, str], key: object, id: str, name: str, text: str) -> ToolCall | None:
    """The open call that a tool-call delta goes on with; None where it begins another.

    Mistral sends no index; Gemini's compatible API and some others give every call index 0, some without an id.
    """
    if key is None:
        if id:
            return next((tool for tool in choice.tools if native_ids.get(tool) == id), None)
        return None if name or not choice.tools else choice.tools[-1]
    tool = choice.by_key.get(key)
    if tool is None:
        return None
    known = native_ids.get(tool)
    if id and known and id != known:
        return None
    if not id and name and (name != tool.name or (_complete(tool.arguments) and text and not text.startswith(tool.arguments))):
        return None
    return tool


def _complete(arguments: str) -> bool:
    try:
        return isinstance(orjson.loads(arguments), dict)
    except orjson.JSONDecodeError:
        return False


def new_text(tool: ToolCall, id: str, name: str, text: str) -> str:
    """What a delta adds: vendors that repeat id and name in every delta (Kimi on Novita) may repeat the arguments so far, too."""
    if id and name and tool.arguments and text.startswith(tool.arguments):
        return text[len(tool.arguments) :]
    return text


def annotations_of(chunk: Json) -> list[Json]:
    """Perplexity's and xAI's citations beside the choices, as OpenAI's url_citation annotations (without text positions)."""
    titles = {result.get("url"): result.get("title") for result in chunk.get("search_results") or () if isinstance(result, dict)}
    urls = [url for url in chunk.get("citations") or titles if isinstance(url, str)]
    return [{"type": "url_citation", "url_citation": {"url": url, "title": titles.get(url) or url}} for url in urls]
