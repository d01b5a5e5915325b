"""Where the question is in a request, and how passages are put before it.

Strategy: they go into the last user message, as a text part of its own or as text before its text. A message of their own would
need a role: as a user's it breaks the alternation that some APIs demand, as a system's it would speak with the operator's voice.
So every wire sees as many messages as before, in the same order, and a tool call stays beside its result.
The one rule: nothing that the client sent is changed or moved; what is new stands before it.
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call

Json = dict[str, Any]


def question_of(call: Call) -> str:
    """The text of the last user message, or the prompt; "" where there is none."""
    if call.kind == "completions":
        prompt = call.request.get("prompt")
        return prompt if isinstance(prompt, str) else ""
    messages = call.request["messages"]
    place = _place(messages)
    return "" if place is None else _text(messages[place].get("content"))


def with_context(call: Call, context: str) -> Json:
    """The request with `context` before its question, which it has."""
    if call.kind == "completions":
        return {**call.request, "prompt": f"{context}\n\n{call.request['prompt']}"}
    messages: list[Json] = list(call.request["messages"])
    place = _place(messages)
    assert place is not None, "there is a question"
    content = messages[place].get("content")
    before = f"{context}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": context}, *content]  # type: ignore[misc]
    messages[place] = {**messages[place], "content": before}
    return {**call.request, "messages": messages}


def _place(messages: list[Json]) -> int | None:
    return next((number for number in reversed(range(len(messages))) if messages[number].get("role") == "user"), None)


def _text(content: object) -> str:
    """A message's text: all of its text parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text")
    return "\n".join(text for text in texts if isinstance(text, str))
