"""What a client is owed for a provider's bytes, read off them the simple way, and what a client got, put together the simple way.

Strategy: the whole body at once, one loop per wire format, no state between chunks but the sums; nothing from `proxy` is used.
The one rule: where the recording and the contract disagree (usage that does not add up, a finish reason that is missing), the
contract's sentence stands beside the line that follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.support.recordings import Exchange

Json = dict[str, Any]


@dataclass
class Tool:
    """A tool call; id: None where the provider gave none. key: the provider's own number for it."""

    id: str | None
    name: str
    arguments: str = ""
    key: object = None

    @property
    def parsed(self) -> Any:
        """The arguments as JSON; as text, where they were cut off."""
        try:
            return json.loads(self.arguments or "{}")
        except ValueError:
            return self.arguments


@dataclass
class Said:
    """One choice. finish: OpenAI's word; native: the provider's own. tokens: those of its logprobs."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tools: list[Tool] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    function: str = ""
    finish: str | None = None
    native: str | None = None


@dataclass
class Owed:
    """A reply as a client is owed it. error: the words of the error that it ends with, or None; status: the error's own code.

    usage: (prompt, completion, cached, reasoning), where the provider said anything. kept: texts that must reach the client
    somewhere (signatures, encrypted reasoning, citations, images). blocks: those of tools that the provider ran itself.
    signed: {(choice, number of its tool call): the signature that belongs to that call}.
    """

    choices: dict[int, Said] = field(default_factory=dict)
    usage: tuple[int, int, int, int] | None = None
    error: str | None = None
    status: int | None = None
    kept: set[str] = field(default_factory=set)
    blocks: set[str] = field(default_factory=set)
    signed: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def began(self) -> bool:
        """Did anything come that a client could use? Before that an error is an HTTP status."""
        return any(said.text or said.reasoning or said.refusal or said.tools for said in self.choices.values())

    def fail(self, error: Any) -> None:
        self.error = error if isinstance(error, str) else error["message"]
        self.status = error["code"] if isinstance(error, dict) and error.get("code") in range(400, 600) else None

    def choice(self, index: int) -> Said:
        return self.choices.setdefault(index, Said())


def owed(exchange: Exchange) -> Owed:
    """Read a reply (status 200) of any wire format."""
    reader = {"openai": _openai, "anthropic": _anthropic, "gemini": _gemini, "cohere": _cohere}[exchange.wire]
    events, bare = sse_json(exchange.body) if exchange.streaming else ([json.loads(exchange.body)], "")
    reply = reader(events, exchange.streaming)
    if bare:  # section 3.5: text that is no SSE field but is JSON is an upstream error
        reply.fail(json.loads(bare)["error"])
    for said in reply.choices.values():
        # section 3.5: [DONE] without any finish reason gives `tool_calls` or `stop`
        said.finish = said.finish or ("tool_calls" if said.tools else "stop")
    return reply


def sse_json(body: bytes) -> tuple[list[Json], str]:
    """(the JSON of every event, the text that is no SSE field). One JSON array is Gemini's stream without alt=sse."""
    if body.lstrip().startswith(b"["):
        return json.loads(body), ""
    lines = re.split(r"\r\n|\r|\n", body.decode("utf-8-sig"))
    bare = "\n".join(line for line in lines if line and not re.match(r"(data|event|id|retry)\b|:", line))
    found: list[str] = []
    held: list[str] = []
    for line in [*lines, "", ""]:
        if line.startswith("data:"):
            held.append(line[5:])
        elif not line and held:
            found.append("\n".join(held).strip())
            held = []
    return [json.loads(text) for text in found if text != "[DONE]"], bare


# --- OpenAI, and Mistral


def _openai(events: list[Json], streaming: bool) -> Owed:
    reply = Owed()
    for event in events:
        if event.get("error"):
            reply.fail(event["error"])
            continue
        usage = event.get("usage") or (event.get("x_groq") or {}).get("usage")
        if usage:
            reply.usage = _openai_usage(usage)
        reply.kept.update(url for url in event.get("citations") or [] if isinstance(url, str))
        for choice in event.get("choices") or []:
            said = reply.choice(choice.get("index", 0))
            _openai_delta(reply, said, (choice.get("delta") if streaming else choice.get("message")) or choice)
            said.tokens += [entry["token"] for entry in (choice.get("logprobs") or {}).get("content") or []]
            if choice.get("finish_reason"):
                said.finish = choice["finish_reason"]
                said.native = choice.get("native_finish_reason") or choice["finish_reason"]
    return reply


def _openai_delta(reply: Owed, said: Said, delta: Json) -> None:
    content: Any = delta.get("content") or delta.get("text") or ""
    parts: list[Json] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if part["type"] == "text":
            said.text += part["text"]
        elif part["type"] == "thinking":
            said.reasoning += "".join(inner["text"] for inner in part["thinking"])
    details = delta.get("reasoning_details") or []
    in_details = "".join(entry.get("text") or entry.get("summary") or "" for entry in details)
    said.reasoning += delta.get("reasoning_content") or delta.get("reasoning") or in_details
    said.refusal += delta.get("refusal") or ""
    said.function += json.dumps(delta["function_call"], sort_keys=True) if delta.get("function_call") else ""
    reply.kept.update(entry[field] for entry in details for field in ("data", "signature") if entry.get(field))
    reply.kept.update(entry["url_citation"]["url"] for entry in delta.get("annotations") or [])
    reply.kept.update(call["arguments"] for call in delta.get("executed_tools") or [] if call.get("arguments"))
    if delta.get("audio"):
        reply.kept.update(text for text in delta["audio"].values() if isinstance(text, str))
    for call in delta.get("tool_calls") or []:
        _openai_tool(said, call)


def _openai_tool(said: Said, call: Json) -> None:
    """A delta goes on with the newest call of its index (of any, if it has none), unless it brings an id or name of its own."""
    function, id, key = call["function"], call.get("id") or None, call.get("index")
    name, text = function.get("name"), function.get("arguments") or ""
    known = next((tool for tool in reversed(said.tools) if key is None or tool.key == key), None)
    if known is None or (id and known.id and id != known.id) or (key is None and name):
        said.tools.append(Tool(id, name, text, key))
    elif id and name and known.arguments and text.startswith(known.arguments):
        known.arguments = text  # the arguments so far, sent again and again
    else:
        known.arguments += text


def _openai_usage(usage: Json) -> tuple[int, int, int, int]:
    """Section 3.4: prompt is all input, completion includes reasoning, total is the sum."""
    prompt, completion = usage["prompt_tokens"], usage.get("completion_tokens") or 0
    inputs, outputs = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    cached, reasoning = inputs.get("cached_tokens") or 0, outputs.get("reasoning_tokens") or 0
    gap = (usage.get("total_tokens") or 0) - prompt - completion
    if gap > 0 and gap == inputs.get("audio_tokens"):
        prompt += gap
    elif gap > 0:
        completion += gap
    elif reasoning > completion:  # a part cannot be larger than the whole: it was left out
        completion += reasoning
    return prompt, completion, cached, reasoning


# --- Anthropic

ANTHROPIC_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def _anthropic(events: list[Json], streaming: bool) -> Owed:
    reply = Owed()
    usage: dict[str, int] = {}
    said, block, thinking = reply.choice(0), "", 0
    for event in events if streaming else _anthropic_events(events[0]):
        kind = event["type"]
        if kind == "error":
            reply.fail(event["error"])
        elif kind == "content_block_start":
            block = event["content_block"]["type"]
            _anthropic_block(reply, said, event["content_block"])
        elif kind == "content_block_delta":
            _anthropic_delta(reply, said, event["delta"], block)
        elif kind == "message_delta" and event["delta"].get("stop_reason"):
            said.native = event["delta"]["stop_reason"]
            said.finish = ANTHROPIC_FINISH[said.native]
        # A count in message_delta is the newer one of the same count in message_start.
        usage.update({name: count for name, count in _usage_of(event).items() if isinstance(count, int)})
        thinking = (_usage_of(event).get("output_tokens_details") or {}).get("thinking_tokens") or thinking
    prompt = sum(usage.get(name, 0) for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"))
    reply.usage = (prompt, usage.get("output_tokens", 0), usage.get("cache_read_input_tokens", 0), thinking)
    return reply


def _usage_of(event: Json) -> Json:
    return event.get("usage") or (event.get("message") or {}).get("usage") or {}


def _anthropic_events(message: Json) -> Iterator[Json]:
    """A whole message as a stream would have told it."""
    for block in message["content"]:
        yield {"type": "content_block_start", "content_block": block}
    yield {"type": "message_delta", "delta": {"stop_reason": message["stop_reason"]}, "usage": message["usage"]}


def _anthropic_block(reply: Owed, said: Said, block: Json) -> None:
    said.text += block.get("text") or "" if block["type"] == "text" else ""
    if block["type"] == "thinking":
        said.reasoning += block.get("thinking") or ""
        reply.kept.update(filter(None, [block.get("signature")]))
    elif block["type"] == "redacted_thinking":
        reply.kept.add(block["data"])
    elif block["type"] == "tool_use":
        said.tools.append(Tool(block["id"], block["name"], json.dumps(block["input"]) if block.get("input") else ""))
    elif block["type"] != "text":
        reply.blocks.update(filter(None, [block["type"], block.get("id"), block.get("tool_use_id")]))
    for citation in block.get("citations") or []:
        reply.kept.add(citation["cited_text"])


def _anthropic_delta(reply: Owed, said: Said, delta: Json, block: str) -> None:
    said.text += delta.get("text") or ""
    said.reasoning += delta.get("thinking") or ""
    if delta["type"] == "input_json_delta" and block == "tool_use":
        said.tools[-1].arguments += delta["partial_json"]
    reply.kept.update(filter(None, [delta.get("signature")]))
    if delta["type"] == "citations_delta":
        reply.kept.add(delta["citation"]["cited_text"])
    if delta["type"] == "compaction_delta":
        reply.kept.add(delta["content"])


# --- Gemini

GEMINI_FINISH = {"STOP": "stop", "MAX_TOKENS": "length"} | dict.fromkeys(
    ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"), "content_filter"
)


def _gemini(events: list[Json], streaming: bool) -> Owed:
    reply = Owed()
    for event in events:
        if event.get("error"):
            reply.fail(event["error"])
        if (event.get("promptFeedback") or {}).get("blockReason"):
            said = reply.choice(0)
            said.finish, said.native = "content_filter", event["promptFeedback"]["blockReason"]
        usage = event.get("usageMetadata") or {}
        if "promptTokenCount" in usage:
            prompt = usage["promptTokenCount"] + usage.get("toolUsePromptTokenCount", 0)
            thoughts = usage.get("thoughtsTokenCount", 0)
            reply.usage = (
                prompt,
                usage.get("candidatesTokenCount", 0) + thoughts,
                usage.get("cachedContentTokenCount", 0),
                thoughts,
            )
        for candidate in event.get("candidates") or []:
            said = reply.choice(candidate.get("index", 0))
            for part in (candidate.get("content") or {}).get("parts") or []:
                _gemini_part(reply, said, part)
                if part.get("thoughtSignature") and "name" in (part.get("functionCall") or {}):
                    reply.signed[candidate.get("index", 0), len(said.tools) - 1] = part["thoughtSignature"]
            if native := candidate.get("finishReason"):
                said.native, said.finish = native, GEMINI_FINISH.get(native)
                if said.finish is None:  # section 3.3: MALFORMED_FUNCTION_CALL, OTHER -> upstream error
                    reply.error = candidate.get("finishMessage") or native
                elif said.finish == "stop" and said.tools:
                    said.finish = "tool_calls"
            for found in (candidate.get("groundingMetadata") or {}).get("groundingChunks") or []:
                reply.kept.add(found["web"]["uri"])
            for found in (candidate.get("citationMetadata") or {}).get("citations") or []:
                reply.kept.update(filter(None, [found.get("uri")]))
    return reply


def _gemini_part(reply: Owed, said: Said, part: Json) -> None:
    if part.get("thought"):
        said.reasoning += part.get("text") or ""
    else:
        said.text += part.get("text") or ""
    if part.get("thoughtSignature"):
        reply.kept.add(part["thoughtSignature"])
    if "inlineData" in part:
        reply.kept.add(part["inlineData"]["data"])
    if "executableCode" in part:
        reply.blocks.add(part["executableCode"]["code"])
    if "codeExecutionResult" in part:
        reply.blocks.add(part["codeExecutionResult"]["output"])
    call = part.get("functionCall")
    if call is None:
        return
    if "name" in call:
        said.tools.append(Tool(call.get("id"), call["name"], json.dumps(call["args"]) if call.get("args") else "{}"))
    for piece in call.get("partialArgs") or []:
        _gemini_piece(said.tools[-1], piece)


def _gemini_piece(tool: Tool, piece: Json) -> None:
    """One piece of an argument, addressed by a path like `$.a.b` or `$.list[0].c`."""
    whole = json.loads(tool.arguments)
    found = re.findall(r"\[(\d+)\]|\['([^']+)'\]|([^.$\[\]]+)", piece["jsonPath"])
    steps: list[Any] = [int(number) if number else quoted or name for number, quoted, name in found]
    value = next((piece[name] for name in ("stringValue", "numberValue", "boolValue") if name in piece), None)
    at: Any = whole
    for step, following in pairwise(steps):
        fresh: Any = [] if isinstance(following, int) else {}
        at = _slot(at, step, fresh)
    old = _slot(at, steps[-1], "" if isinstance(value, str) else None)
    at[steps[-1]] = old + value if isinstance(value, str) else value
    tool.arguments = json.dumps(whole)


def _slot(at: Any, step: Any, fresh: Any) -> Any:
    if isinstance(at, list):
        while len(at) <= step:
            at.append(fresh)
    else:
        at.setdefault(step, fresh)
    return at[step]


# --- Cohere

COHERE_FINISH = {"COMPLETE": "stop", "STOP_SEQUENCE": "stop", "MAX_TOKENS": "length", "TOOL_CALL": "tool_calls"}


def _cohere(events: list[Json], streaming: bool) -> Owed:
    reply = Owed()
    said = reply.choice(0)
    for event in events if streaming else _cohere_events(events[0]):
        delta = event.get("delta") or {}
        message = delta.get("message") or {}
        kind = event.get("type")
        content, calls = message.get("content") or {}, message.get("tool_calls") or {}
        if kind in ("content-start", "content-delta"):
            said.text += content.get("text") or ""
            said.reasoning += content.get("thinking") or ""
        elif kind == "tool-plan-delta":
            said.reasoning += message["tool_plan"]  # the plan is what the model thought before it called
        elif kind == "tool-call-start":
            said.tools.append(Tool(calls["id"], calls["function"]["name"], calls["function"].get("arguments") or ""))
        elif kind == "tool-call-delta":
            said.tools[-1].arguments += calls["function"]["arguments"]
        elif kind == "citation-start":
            reply.kept.add(message["citations"]["text"])
        elif kind == "message-end":
            said.native = delta["finish_reason"]
            said.finish = COHERE_FINISH[said.native]
            reply.usage = _cohere_usage(delta.get("usage") or {})
    return reply


def _cohere_events(whole: Json) -> Iterator[Json]:
    message = whole["message"]
    if message.get("tool_plan"):
        yield {"type": "tool-plan-delta", "delta": {"message": {"tool_plan": message["tool_plan"]}}}
    for part in message.get("content") or []:
        yield {"type": "content-start", "delta": {"message": {"content": part}}}
    for call in message.get("tool_calls") or []:
        yield {"type": "tool-call-start", "delta": {"message": {"tool_calls": call}}}
    for citation in message.get("citations") or []:
        yield {"type": "citation-start", "delta": {"message": {"citations": citation}}}
    yield {"type": "message-end", "delta": {"finish_reason": whole["finish_reason"], "usage": whole.get("usage")}}


def _cohere_usage(usage: Json) -> tuple[int, int, int, int] | None:
    tokens = usage.get("tokens") or usage.get("billed_units")
    if not tokens:
        return None
    counts = (
        tokens["input_tokens"],
        tokens["output_tokens"],
        usage.get("cached_tokens") or 0,
        tokens.get("reasoning_tokens") or 0,
    )
    return int(counts[0]), int(counts[1]), int(counts[2]), int(counts[3])


# --- the client's side


def got(chunks: Iterable[Json]) -> dict[int, Said]:
    """What a client puts together from the chunks of a stream, or from one whole reply; either face."""
    choices: dict[int, Said] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            said = choices.setdefault(choice["index"], Said())
            delta = choice.get("delta") or choice.get("message") or choice
            said.text += (delta.get("content") if "text" not in choice else choice["text"]) or ""
            said.reasoning += delta.get("reasoning_content") or ""
            said.refusal += delta.get("refusal") or ""
            said.function += json.dumps(delta["function_call"], sort_keys=True) if delta.get("function_call") else ""
            said.tokens += [entry["token"] for entry in (choice.get("logprobs") or {}).get("content") or []]
            for number, call in enumerate(delta.get("tool_calls") or []):
                _got_tool(said, call, call.get("index", number))
            if choice.get("finish_reason"):
                said.finish, said.native = choice["finish_reason"], choice.get("native_finish_reason")
    return choices


def _got_tool(said: Said, call: Json, number: int) -> None:
    if number == len(said.tools):
        said.tools.append(Tool(call["id"], call["function"]["name"]))
    said.tools[number].arguments += call["function"].get("arguments") or ""


def texts(found: Any) -> Iterator[str]:
    """All texts that stand anywhere in it."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict | list):
        for inner in found.values() if isinstance(found, dict) else found:
            yield from texts(inner)
