"""The tool calls of one choice: what every delta must say, and what it should have said.

Strategy: a small table, by the index that the provider uses. Deltas go in one by one and come out as they are, mended, or not at
all (held until the call's name is there); every fault is told to the owner, who may raise.
The one rule: argument text is passed on as it came. Only index, id, type and name are ever mended.

Shape: https://platform.openai.com/docs/api-reference/chat-streaming (delta.tool_calls)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

Json = dict[str, Any]

FAULTS = {
    "index": "a tool call whose index is not the next one",
    "id": "a tool call without an id of its own",
    "type": "a tool call of no known type",
    "name": "a tool call without a name",
    "repeated": "a further piece of a tool call that repeats what only the first one says",
    "nameless": "a tool call that never got a name",
    "arguments": "a tool call whose arguments are not JSON",
    "cut": "a tool call that was cut off before its arguments were complete",
}
# There is nothing to mend them with.
BEYOND_REPAIR = frozenset({"nameless", "arguments", "cut"})
TEXT = {"function": "arguments", "custom": "input"}
ONLY_FIRST = frozenset({"id", "type"})
# With these finish reasons the model says that it was done.
DONE = frozenset({"tool_calls", "stop", "function_call"})


class ToolCall:
    """One call as the client sees it. held: its first delta, while it waits for its name."""

    __slots__ = ("held", "id", "index", "kind", "parts")

    def __init__(self, index: int, id: str, kind: str, text: str) -> None:
        self.index, self.id, self.kind, self.parts = index, id, kind, [text]
        self.held: Json | None = None


class Calls:
    """All calls of one choice. ids: begins the ids that are made for calls without one. name: that of the only function there is
    to call, if so. fault: told of each fault, by its key in `FAULTS`, before it is mended; it must raise for `nameless`, for a
    call that is never sent would leave a gap in the numbers.
    """

    def __init__(self, ids: str, name: str | None, fault: Callable[[str], None]) -> None:
        self._ids, self._name, self._fault = ids, name, fault
        self._calls: list[ToolCall] = []
        self._by_index: dict[object, ToolCall] = {}

    def delta(self, delta: Json) -> Json | None:
        """One entry of `delta.tool_calls` as it should be, itself where it is right; None where it waits for the call's name."""
        call = self._by_index.get(delta.get("index"))
        if call is None and self._calls and not delta.get("id") and not _name(delta):
            self._fault("index")
            call = self._by_index[delta.get("index")] = self._calls[-1]
        if call is None or _begins_another(call, delta):
            return self._first(delta)
        return self._later(call, delta)

    def invalid(self, finish_reason: str) -> list[Json]:
        """The calls that are not JSON at the end, `{index, id, reason}`, reported to `fault` as well."""
        fault, found = "arguments" if finish_reason in DONE else "cut", []
        for call in self._calls:
            if call.held is not None:
                self._fault("nameless")
            if call.kind == "function" and not _is_json("".join(call.parts)):
                self._fault(fault)
                found.append({"index": call.index, "id": call.id, "reason": fault})
        return found

    def _first(self, delta: Json) -> Json | None:
        if self._calls and self._calls[-1].held is not None:
            self._fault("nameless")
        number, index, id = len(self._calls), delta.get("index"), delta.get("id")
        kind = "custom" if delta.get("custom") else "function"
        fields = delta.get(kind) or {}
        mended: Json = {}
        if type(index) is not int or index != number:
            self._fault("index")
            mended["index"] = number
        if not isinstance(id, str) or not id or any(id == call.id for call in self._calls):
            self._fault("id")
            mended["id"] = id = f"{self._ids}_{number}"
        if delta.get("type") != kind:
            self._fault("type")
            mended["type"] = kind
        call = ToolCall(number, id, kind, _text(fields, kind))
        self._calls.append(call)
        self._by_index[index] = call
        if not fields.get("name"):
            if self._name is None:
                call.held = {**delta, **mended}
                return None
            self._fault("name")
            mended[kind] = {**fields, "name": self._name}
        return {**delta, **mended} if mended else delta

    def _later(self, call: ToolCall, delta: Json) -> Json | None:
        fields = delta.get(call.kind) or {}
        call.parts.append(_text(fields, call.kind))
        if (held := call.held) is not None:
            if not fields.get("name"):
                return None
            self._fault("name")
            call.held = None
            whole = {"name": fields["name"], TEXT[call.kind]: "".join(call.parts)}
            return {**held, call.kind: {**(held.get(call.kind) or {}), **whole}}
        repeated = "name" in fields or not ONLY_FIRST.isdisjoint(delta)
        if repeated:
            self._fault("repeated")
        elif delta.get("index") == call.index:
            return delta
        kept = {name: value for name, value in fields.items() if name != "name"}
        rest = {name: value for name, value in delta.items() if name not in ONLY_FIRST}
        return {**rest, "index": call.index, call.kind: kept}


def _begins_another(call: ToolCall, delta: Json) -> bool:
    """Vendors exist that give every call the same index; another id and a name of its own tell it apart."""
    return bool(delta.get("id")) and delta["id"] != call.id and bool(_name(delta))


def _name(delta: Json) -> Any:
    return (delta.get("function") or delta.get("custom") or {}).get("name")


def _text(fields: Json, kind: str) -> str:
    text = fields.get(TEXT[kind])
    return text if isinstance(text, str) else ""


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def only_name(request: Json) -> str | None:
    """The name of the one function that a reply may call: the one the request chose, or its only tool."""
    chosen = request.get("tool_choice")
    tools = [chosen] if isinstance(chosen, dict) else request.get("tools")
    if not isinstance(tools, list) or len(tools) != 1 or not isinstance(tools[0], dict):
        return None
    function = tools[0].get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None
