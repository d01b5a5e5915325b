"""A chunk stream as clients are promised it, whatever the provider's own format is.

Strategy: a decoder says what it understood (`put` a delta, open a tool call, note a finish reason); this class gives it the
promised form: constant id, created and model, the role on the first delta of each choice, tool calls numbered 0, 1, 2…, and
the finish chunks kept back until the decoder has seen the upstream's own end (`end`).
The one rule: nothing that a client could mistake for content leaves before there is content; role-only and empty deltas
only leave their other fields behind, for the next chunk.

Shape: https://platform.openai.com/docs/api-reference/chat-streaming; reasoning_details as OpenRouter has them
(https://openrouter.ai/docs/use-cases/reasoning-tokens).
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call
from proxy.reply import Chunk, Item, Usage

Json = dict[str, Any]

# List-valued fields of a delta. The SDKs' accumulators add lists up by each entry's `index`, and raise where there is none.
LISTS = frozenset({"annotations", "provider_blocks", "images"})


class ToolCall:
    """One tool call of a choice: its number in the normalized stream, its id, and the argument text so far."""

    __slots__ = ("arguments", "id", "index", "name")

    def __init__(self, index: int, id: str, name: str) -> None:
        self.index = index
        self.id = id
        self.name = name
        self.arguments = ""


class Choice:
    """What the stream has to remember of one choice."""

    __slots__ = ("by_key", "counts", "extras", "finish_reason", "native", "started", "tools")

    def __init__(self) -> None:
        self.started = False
        self.tools: list[ToolCall] = []
        self.by_key: dict[object, ToolCall] = {}
        self.finish_reason: str | None = None
        self.native: str | None = None
        self.extras: Json = {}
        self.counts: dict[str, int] = {}

    def numbered(self, name: str, entries: Any) -> Any:
        """The entries of a list-valued field, each with its `index` over the whole stream."""
        first = self.counts.get(name, 0)
        self.counts[name] = first + len(entries)
        return [{**entry, "index": first + number} if isinstance(entry, dict) else entry for number, entry in enumerate(entries)]


class ChunkStream:
    """The normalized side of a decoder. `take` hands over what was put since the last call.

    finishing: some choice has its finish reason (a flag, because it is asked once per read).
    """

    __slots__ = ("_call", "_out", "choices", "created", "extras", "finishing", "id", "model", "usage")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._out: list[Item] = []
        self.id = ""
        self.created = 0
        self.model = call.model
        self.choices: dict[int, Choice] = {}
        self.extras: Json = {}
        self.finishing = False
        self.usage: Usage | None = None

    def identify(self, id: object, created: object = None) -> None:
        """The provider's own id and Unix time; the first ones that say something count, and none after the first chunk."""
        if not self.id and id:
            self.id = str(id)
        if not self.created and isinstance(created, int | float) and created:
            self.created = int(created)

    def choice(self, index: int = 0) -> Choice:
        found = self.choices.get(index)
        if found is None:
            found = self.choices[index] = Choice()
        return found

    def put(self, delta: Json, index: int = 0) -> None:
        """One delta of one choice, not empty. Fields waiting in `extras` (of the stream, of the choice) ride along."""
        choice = self.choice(index)
        if not choice.started:
            choice.started = True
            delta = {"role": "assistant", **delta}
        self._emit(index, choice, delta, None)

    def open_tool(self, key: object, id: object, name: str, text: str = "", index: int = 0) -> ToolCall:
        """A tool call begins. key: what the provider will call it by; text: argument text that came with it.

        A missing id is made: unique over requests, and the same for any split of the bytes.
        """
        choice = self.choice(index)
        number = len(choice.tools)
        tool = ToolCall(number, str(id) if id else f"call_{self._call.nonce}_{index}_{number}", name)
        tool.arguments = text
        choice.tools.append(tool)
        choice.by_key[key] = tool
        function = {"name": name, "arguments": text}
        self.put({"tool_calls": [{"index": number, "id": tool.id, "type": "function", "function": function}]}, index)
        return tool

    def tool_text(self, tool: ToolCall, text: str, index: int = 0) -> None:
        """More argument text of an open tool call."""
        if text:
            tool.arguments += text
            self.put({"tool_calls": [{"index": tool.index, "function": {"arguments": text}}]}, index)

    def finish(self, reason: str, native: str | None, index: int = 0) -> None:
        """Note a choice's finish reason; a later one replaces it. Nothing is sent before `end`."""
        self.finishing = True
        choice = self.choice(index)
        choice.finish_reason = reason
        choice.native = native

    @property
    def finished(self) -> bool:
        """Every choice seen so far has its finish reason."""
        return bool(self.choices) and all(choice.finish_reason for choice in self.choices.values())

    @property
    def empty(self) -> bool:
        """Neither content nor a finish reason came."""
        return not any(choice.started or choice.finish_reason for choice in self.choices.values())

    def end(self) -> None:
        """The upstream's own end was seen: one finish chunk per choice."""
        for index, choice in sorted(self.choices.items()):
            reason = choice.finish_reason or ("tool_calls" if choice.tools else "stop")
            delta: Json = {} if choice.started else {"role": "assistant", "content": ""}
            choice.started = True
            choice.finish_reason = reason
            choice.extras["native_finish_reason"] = choice.native
            self._emit(index, choice, delta, reason)

    def take(self) -> list[Item]:
        out = self._out
        if out:
            self._out = []
        return out

    def stamp(self, chunk: Chunk) -> None:
        """Give a chunk that the provider already sent in the right shape the stream's own id, created and model; send it."""
        if not self.id or not self.created:
            self._settle_identity()
        chunk["id"] = self.id
        chunk["object"] = "chat.completion.chunk"
        chunk["created"] = self.created
        chunk["model"] = self.model
        self._out.append(chunk)

    def put_event(self, event: bytes) -> None:
        """A chunk that is already encoded as a complete event, with this stream's own id, created and model."""
        self._out.append(event)

    def _emit(self, index: int, choice: Choice, delta: Json, finish_reason: str | None) -> None:
        for name in LISTS & delta.keys():
            delta[name] = choice.numbered(name, delta[name])
        if not self.id or not self.created:
            self._settle_identity()
        body: Json = {"index": index, "delta": delta, "finish_reason": finish_reason}
        if choice.extras:
            body.update(choice.extras)
            choice.extras = {}
        chunk: Chunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [body],
        }
        if self.extras:
            chunk = {**self.extras, **chunk}
            self.extras = {}
        self._out.append(chunk)

    def _settle_identity(self) -> None:
        self.id = self.id or f"chatcmpl-{self._call.nonce}"
        self.created = self.created or self._call.created
