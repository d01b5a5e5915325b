"""What is kept of messages, and when two of them are the same.

Strategy: pure functions over chat messages. Instructions (system, developer) belong to a request and are never remembered; what
is not text is kept up to a size, beyond which a mark stands in its place; of an answer only what can be sent back is kept.
The one rule: a message of the client's is never changed, only copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

Json = dict[str, Any]

INSTRUCTIONS = frozenset({"system", "developer"})
RESULTS = frozenset({"tool", "function"})
# Of an answer, what a provider takes back. The rest (annotations, log probabilities, sounds) is for the client alone.
SENT_BACK = ("content", "name", "refusal", "tool_calls", "function_call", "provider_blocks")
REASONING = ("reasoning_content", "reasoning", "reasoning_details")
# In front of the name by which a call of the older form is known.
OLDER = "function:"
WORDS = {"image_url": "image", "input_audio": "audio", "file": "file"}


@dataclass(frozen=True, slots=True)
class Keeping:
    """What the operator decided. reasoning: kept, too. part: bytes of JSON that a part beside text may have."""

    reasoning: bool
    part: int

    def of_client(self, messages: Sequence[Json]) -> list[Json]:
        """The client's messages without instructions."""
        return [self._short(message) for message in messages if message["role"] not in INSTRUCTIONS]

    def of_answer(self, message: Json) -> Json:
        """A reply's message, as it would be sent back."""
        kept = {name: value for name in SENT_BACK if (value := message.get(name)) not in (None, [])}
        kept |= self._reasoning(message)
        return self._short({"role": "assistant", "content": None, **kept})

    def _reasoning(self, message: Json) -> Json:
        if self.reasoning:
            return {name: value for name in REASONING if (value := message.get(name))}
        # A signature on a tool call is no reasoning to read, and without it some providers refuse the call's result.
        details = message.get("reasoning_details") if message.get("tool_calls") else None
        signed = [entry for entry in details if _of_a_call(entry)] if isinstance(details, list) else []
        return {"reasoning_details": signed} if signed else {}

    def _short(self, message: Json) -> Json:
        kept = {name: value for name, value in message.items() if name not in REASONING} | self._reasoning(message)
        if isinstance(parts := kept.get("content"), list):
            kept["content"] = [self._part(part) for part in parts]
        return kept

    def _part(self, part: Any) -> Any:
        if not isinstance(part, dict) or "text" in part or len(orjson.dumps(part)) <= self.part:
            return part
        return {"type": "text", "text": f"[{WORDS.get(str(part.get('type')), 'attachment')} left out]"}


def _of_a_call(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("type") == "reasoning.encrypted" and "id" in entry


def leading(messages: Sequence[Json]) -> int:
    """How many instructions stand in front."""
    return next((at for at, message in enumerate(messages) if message["role"] not in INSTRUCTIONS), len(messages))


def text_of(message: Json) -> str:
    """What a message says, without the blanks around it, which clients trim."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "").strip()


def likeness(message: Json) -> Hashable:
    """Equal for two messages that say the same, however their other fields are written."""
    calls = tuple(calls_of(message))
    return message["role"], text_of(message), calls, str(message.get("tool_call_id") or "")


def calls_of(message: Json) -> list[str]:
    """The ids of the tool calls that an assistant makes; a call of the older form (`function_call`) is known by its name."""
    calls = message.get("tool_calls")
    found = [str(call.get("id")) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    older = message.get("function_call")
    return [*found, f"{OLDER}{older.get('name')}"] if isinstance(older, dict) else found


def answered(message: Json) -> str:
    """The id of the call that a result answers."""
    return f"{OLDER}{message.get('name')}" if message["role"] == "function" else str(message.get("tool_call_id"))
