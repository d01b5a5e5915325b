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
from proxy.reply import LISTS, Chunk, Item, Run, Usage

Json = dict[str, Any]


class ToolCall:
    """One tool call of a choice: its number in the normalized stream, its id, and the argument text so far.

    kind: `function`, or `custom` for OpenAI's custom tools, whose text is called `input`.
    """

    __slots__ = ("_parts", "id", "index", "kind", "name")

    def __init__(self, index: int, id: str, name: str, kind: str) -> None:
        self.index = index
        self.id = id
        self.name = name
        self.kind = kind
        self._parts: list[str] = []

    @property
    def arguments(self) -> str:
        """Joined when somebody looks: adding to one text with every delta would take quadratic time."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def add(self, text: str) -> Json:
        """Note more argument text; returns it as a delta has it."""
        self._parts.append(text)
        return {"input": text} if self.kind == "custom" else {"arguments": text}


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

    sent: how many chunks were handed over. finishing: some choice has its finish reason (a flag, because it is asked once per
    read).
    """

    __slots__ = ("_call", "_out", "choices", "created", "extras", "finishing", "id", "model", "sent", "usage")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._out: list[Item] = []
        self.sent = 0
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
        if not self.created and isinstance(created, int | float) and 0 < created < 2**53 and created is not True:
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

    def open_tool(
        self,
        key: object,
        id: object,
        name: str,
        text: str = "",
        index: int = 0,
        extras: Json | None = None,
        kind: str = "function",
    ) -> ToolCall:
        """A tool call begins. key: what the provider will call it by; text: argument text that came with it; extras: its further
        fields, kept as they are.

        A missing id is made: unique over requests, and the same for any split of the bytes.
        """
        choice = self.choice(index)
        number = len(choice.tools)
        tool = ToolCall(number, str(id) if id else f"call_{self._call.nonce}_{index}_{number}", name, kind)
        choice.tools.append(tool)
        choice.by_key[key] = tool
        first = {"index": number, "id": tool.id, "type": kind, kind: {"name": name, **tool.add(text)}}
        self.put({"tool_calls": [{**(extras or {}), **first}]}, index)
        return tool

    def tool_text(self, tool: ToolCall, text: str, index: int = 0) -> None:
        """More argument text of an open tool call."""
        if text:
            self.put({"tool_calls": [{"index": tool.index, tool.kind: tool.add(text)}]}, index)

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
    def waiting(self) -> bool:
        """Some field waits in `extras` for the next chunk."""
        if self.extras:
            return True
        for choice in self.choices.values():  # noqa: SIM110 - asked per event; a generator takes three times as long
            if choice.extras:
                return True
        return False

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
            self.sent += len(out)
        return out

    def stamp(self, chunk: Chunk) -> None:
        """Send a chunk that the provider already sent in the right shape, marked as this stream's."""
        self.mark(chunk)
        self._out.append(chunk)

    def mark(self, chunk: Chunk) -> None:
        """Give a chunk the stream's own id, created and model."""
        if not self.id or not self.created:
            self._settle_identity()
        chunk["id"] = self.id
        chunk["object"] = "chat.completion.chunk"
        chunk["created"] = self.created
        chunk["model"] = self.model

    def put_event(self, event: bytes) -> None:
        """A chunk that is already encoded as a complete event, with this stream's own id, created and model."""
        self._out.append(event)

    def put_run(self, events: Run, count: int) -> None:
        """As `put_event`, for `count` chunks at once."""
        self._out.append(events)
        self.sent += count - 1

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
