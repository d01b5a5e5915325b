"""What a provider says in a stream, and what a client makes of it: both sides of every comparison.

Strategy: `chunk` and `event` build the provider's bytes; `heard` folds a client's events the way a careful client would, and
notes what such a client would stumble over. The expectation of a case is what is heard of the provider's own chunks.
The one rule: nothing here knows any gateway; only OpenAI's format counts.

Format: https://platform.openai.com/docs/api-reference/chat-streaming
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
ID, CREATED = "chatcmpl-conformance", 1700000000
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18, "prompt_tokens_details": {"cached_tokens": 3}}
ROLE = {"role": "assistant", "content": ""}


def chunk(delta: Json | None = None, finish: str | None = None, index: int = 0, **fields: Any) -> Json:
    """One chunk with one choice, as OpenAI writes it; `fields` stand beside `choices`."""
    choice = {"index": index, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    return envelope([choice], **fields)


def envelope(choices: list[Json], **fields: Any) -> Json:
    row = {"id": ID, "object": "chat.completion.chunk", "created": CREATED, "model": "conformance", "choices": choices}
    return {**row, **fields}


def text(*parts: str, index: int = 0) -> list[Json]:
    return [chunk({"content": part}, index=index) for part in parts]


def tool(number: int | None, arguments: str, id: str | None = None, name: str | None = None) -> Json:
    """One tool-call delta. number: its index, None leaves it out; id and name: in the first piece."""
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    entry: Json = {"index": number, "id": id, "type": "function" if id else None, "function": function}
    return chunk({"tool_calls": [{key: value for key, value in entry.items() if value is not None}]})


def usage() -> Json:
    return envelope([], usage=USAGE)


def event(found: Json | str, end: str = "\n") -> bytes:
    """One SSE event with these line ends."""
    written = found if isinstance(found, str) else orjson.dumps(found).decode()
    return f"data: {written}{end}{end}".encode()


def events(chunks: Iterable[Json], end: str = "\n") -> list[bytes]:
    return [event(found, end) for found in chunks]


@dataclass
class Tool:
    """One tool call as put together. id, name: all the non-empty ones that came, in order."""

    id: list[str] = field(default_factory=list)
    name: list[str] = field(default_factory=list)
    arguments: str = ""


@dataclass
class Choice:
    """One choice as put together. finish: its finish reasons in order; roles likewise."""

    text: str = ""
    reasoning: str = ""
    tools: dict[int, Tool] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)


@dataclass
class Heard:
    """A whole stream as put together. errors: error events. stumbles: what a careful client would trip over, in words."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usages: list[Json] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    chunks: list[Json] = field(default_factory=list)
    done: int = 0
    after_done: int = 0
    stumbles: list[str] = field(default_factory=list)

    def choice(self, index: int = 0) -> Choice:
        return self.choices.setdefault(index, Choice())

    @property
    def finished(self) -> bool:
        """Some choice claims a proper finish."""
        return any(choice.finish for choice in self.choices.values())

    def add(self, written: str, name: str = "") -> None:
        """One more event."""
        self.after_done += bool(self.done)
        if written.strip() == "[DONE]":
            self.done += 1
            return
        try:
            found = orjson.loads(written)
        except orjson.JSONDecodeError:
            self.stumbles.append(f"an event is no JSON: {written[:60]!r}")
            return
        if not isinstance(found, dict):
            self.stumbles.append(f"an event is no object: {written[:60]!r}")
        elif found.get("error") or found.get("object") == "error" or name == "error":
            self.errors.append(found.get("error") or found)
        else:
            self.chunks.append(found)
            try:
                self._chunk(found)
            except (AttributeError, TypeError, KeyError):
                self.stumbles.append(f"a chunk has an odd shape: {written[:60]!r}")

    def _chunk(self, found: Json) -> None:
        if isinstance(found.get("usage"), dict):
            self.usages.append(found["usage"])
        choices = found.get("choices")
        if not isinstance(choices, list):
            self.stumbles.append(f"a chunk has no list of choices: {orjson.dumps(found)[:60]!r}")
            return
        for choice in choices:
            if type(choice.get("index")) is not int:
                self.stumbles.append("a choice has no index")
            index = choice.get("index")
            self._choice(choice, self.choice(index if type(index) is int else 0))

    def _choice(self, found: Json, choice: Choice) -> None:
        delta = found.get("delta") or {}
        choice.text += delta.get("content") or ""
        choice.reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
        if delta.get("role"):
            choice.roles.append(delta["role"])
        for token in (found.get("logprobs") or {}).get("content") or ():
            choice.tokens.append(token["token"])
        for entry in delta.get("tool_calls") or ():
            self._tool(entry, choice)
        reason = found.get("finish_reason")
        if reason == "error":
            self.errors.append({"finish_reason": "error"})
        elif reason:
            choice.finish.append(reason)

    def _tool(self, entry: Json, choice: Choice) -> None:
        index = entry.get("index")
        if type(index) is not int:
            self.stumbles.append("a tool call has no index")
            index = len(choice.tools)
        call = choice.tools.setdefault(index, Tool())
        function = entry.get("function") or {}
        call.id += [entry["id"]] if entry.get("id") else []
        call.name += [function["name"]] if function.get("name") else []
        call.arguments += function.get("arguments") or ""


def heard(chunks: Iterable[Json | str]) -> Heard:
    """What a client makes of these chunks, or of these events' texts."""
    found = Heard()
    for one in chunks:
        found.add(one if isinstance(one, str) else orjson.dumps(one).decode())
    return found


def difference(said: Heard, got: Heard) -> str | None:
    """The first thing that the client has otherwise than the provider said it, in words; None where there is none."""
    if said.choices.keys() != got.choices.keys():
        return f"choices {sorted(got.choices)} instead of {sorted(said.choices)}"
    for index, choice in said.choices.items():
        other = got.choices[index]
        where = f"choice {index}: " if len(said.choices) > 1 else ""
        for name in ("text", "reasoning"):
            if wrong := _text(getattr(choice, name), getattr(other, name)):
                return f"{where}{name} {wrong}"
        if wrong := _tools(choice.tools, other.tools):
            return where + wrong
        for name in ("tokens", "finish"):
            if getattr(choice, name) != getattr(other, name):
                return f"{where}{LABELS[name]} {getattr(other, name)} instead of {getattr(choice, name)}"
    return None


LABELS = {"tokens": "logprobs of", "finish": "finish_reason"}


def _text(said: str, got: str) -> str | None:
    if said == got:
        return None
    at = next((n for n, (a, b) in enumerate(zip(said, got, strict=False)) if a != b), min(len(said), len(got)))
    return f"differs at {at} of {len(said)}: {got[at : at + 20]!r} instead of {said[at : at + 20]!r}"


def _tools(said: dict[int, Tool], got: dict[int, Tool]) -> str | None:
    if len(said) != len(got):
        return f"{len(got)} tool calls instead of {len(said)}"
    for (_, call), (index, other) in zip(sorted(said.items()), sorted(got.items()), strict=True):
        if len(set(other.id)) != 1 or len(set(other.name)) != 1:
            return f"tool call {index} has ids {other.id} and names {other.name}"
        if call.name[:1] != other.name[:1]:
            return f"tool call {index} is called {other.name[0]!r} instead of {call.name[0]!r}"
        if wrong := _text(call.arguments, other.arguments):
            return f"arguments of tool call {index}: {wrong}"
    return None


def prefix_of(said: Heard, got: Heard) -> str | None:
    """None where everything that the client has is a beginning of what was said; else what is not."""
    for index, other in got.choices.items():
        choice = said.choices.get(index)
        if choice is None:
            return f"choice {index} was never said"
        pairs = [("text", choice.text, other.text), ("reasoning", choice.reasoning, other.reasoning)]
        pairs += [
            ("arguments", c.arguments, o.arguments) for c, o in zip(choice.tools.values(), other.tools.values(), strict=False)
        ]
        for name, whole, part in pairs:
            if not whole.startswith(part):
                return f"{name} that was never said: {part[-40:]!r}"
    return None


def _rich() -> Sequence[Json]:
    logprobs = {"content": [{"token": "né", "logprob": -0.5, "bytes": [110, 195, 169], "top_logprobs": []}]}
    likely = chunk({"content": "né "})
    likely["choices"][0]["logprobs"] = logprobs
    return [
        chunk(ROLE),
        chunk({"reasoning_content": "Wägen… "}),
        chunk({"reasoning_content": "日本 🤔"}),
        *text("Ça va, ", "“naïve” "),
        likely,
        *text("日本語 ", "👩‍👩‍👧 ", '\\n\n\t"{}" '),
        tool(0, "", "call_a", "look_up"),
        tool(0, '{"städte": ["Zü'),
        tool(0, 'rich", "東京"]}'),
        chunk(finish="tool_calls"),
    ]


# A stream with a little of everything; usage and [DONE] follow it.
RICH = _rich()
