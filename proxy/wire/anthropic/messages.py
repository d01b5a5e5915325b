"""OpenAI's messages into Anthropic's `system` and turns (https://docs.anthropic.com/en/api/messages).

Strategy: one pass; each message becomes content blocks, and blocks of one role in a row become one turn. System and developer
messages, wherever they stand, are put together in front, as Anthropic's own OpenAI-compatible endpoint does
(https://docs.anthropic.com/en/api/openai-sdk): they keep their authority, which a user turn would not give them.
The one rule: Anthropic refuses blocks of blank text, so those are left out; everything else is carried or refused by its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from proxy.translation import Fields, arguments_of, invalid, messages_of, unsupported
from proxy.wire.anthropic.parts import blocks_of, text_blocks
from proxy.wire.anthropic.signed import thinking_blocks

Json = dict[str, Any]

# Blocks that Anthropic puts at the head of a message, before its thinking.
LEADING = ("compaction", "fallback")


class Turns:
    """The conversation as it is put together.

    function_id: of the last call in the legacy `function_call` form, which has no ids of its own.
    """

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.system: list[Json] = []
        self.messages: list[Json] = []
        self.function_id = ""

    def add(self, role: str, blocks: list[Json]) -> None:
        """Blocks of one role; results of tools stand before anything else in their turn, as Anthropic demands."""
        if not blocks:
            return
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": blocks})
            return
        content = self.messages[-1]["content"]
        if blocks[0]["type"] == "tool_result":
            results = sum(1 for block in content if block["type"] == "tool_result")
            content[results:results] = blocks
        else:
            content += blocks


def conversation(fields: Fields, system: object = None) -> tuple[list[Json], list[Json]]:
    """(blocks of `system`, turns). system: Anthropic's own top-level field, where a client gave it; it comes first."""
    turns = Turns(fields)
    turns.system += text_blocks(system, "system", fields)
    for number, message in enumerate(messages_of(fields.call)):
        path = f"messages[{number}]"
        add = ROLES.get(message["role"])
        if add is None:
            unsupported(fields.target, f"{path}.role", f"The role '{message['role']}'")
        add(turns, message, path)
    if not turns.messages:
        invalid("messages", "must hold at least one message of a user that is not empty")
    _trim_prefill(turns.messages)
    return turns.system, turns.messages


def _trim_prefill(messages: list[Json]) -> None:
    """A last turn of the assistant is text to be continued; Anthropic refuses white space at its end."""
    last = messages[-1]["content"][-1]
    if messages[-1]["role"] == "assistant" and last["type"] == "text":
        last["text"] = last["text"].rstrip()


def _cached(message: Json, blocks: list[Json]) -> list[Json]:
    """`cache_control` on a message holds for all of it, so it goes to its last block."""
    if message.get("cache_control") is not None and blocks and "thinking" not in blocks[-1]["type"]:
        blocks[-1] = {**blocks[-1], "cache_control": message["cache_control"]}
    return blocks


def _system(turns: Turns, message: Json, path: str) -> None:
    turns.system += _cached(message, text_blocks(message.get("content"), f"{path}.content", turns.fields))


def _user(turns: Turns, message: Json, path: str) -> None:
    turns.add("user", _cached(message, blocks_of(message.get("content"), f"{path}.content", turns.fields)))


def _assistant(turns: Turns, message: Json, path: str) -> None:
    """In Anthropic's order: thinking, blocks of its own tools, text, calls of the client's tools.

    OpenAI's shape does not tell where between the texts a provider block stood; its own order among the others is kept.
    """
    if message.get("audio") is not None:
        unsupported(turns.fields.target, f"{path}.audio", "Audio of an earlier answer")
    kept = _provider_blocks(message.get("provider_blocks"), f"{path}.provider_blocks")
    blocks = [block for block in kept if block["type"] in LEADING]
    blocks += thinking_blocks(message.get("reasoning_details"), f"{path}.reasoning_details")
    blocks += [block for block in kept if block["type"] not in LEADING]
    blocks += blocks_of(message.get("content"), f"{path}.content", turns.fields, own=True)
    blocks += text_blocks(message.get("refusal"), f"{path}.refusal", turns.fields)
    blocks += _calls(turns, message, path)
    turns.add("assistant", _cached(message, blocks))


def _provider_blocks(blocks: object, path: str) -> list[Json]:
    """Blocks that the gateway gave out, without the `index` it gave them; those of another provider's format have no `type`."""
    if blocks is None:
        return []
    if not isinstance(blocks, list):
        invalid(path, "must be a list")
    own = [block for block in blocks if isinstance(block, dict) and isinstance(block.get("type"), str)]
    return [{name: value for name, value in block.items() if name != "index"} for block in own]


def _calls(turns: Turns, message: Json, path: str) -> list[Json]:
    calls = [] if message.get("tool_calls") is None else message["tool_calls"]
    if not isinstance(calls, list):
        invalid(f"{path}.tool_calls", "must be a list")
    found = [_call(turns, call, f"{path}.tool_calls[{number}]") for number, call in enumerate(calls)]
    legacy = message.get("function_call")
    if isinstance(legacy, dict):
        turns.function_id = f"function_{len(turns.messages)}"
        found.append(_call(turns, {"id": turns.function_id, "function": legacy}, path))
    return found


def _call(turns: Turns, call: object, path: str) -> Json:
    if not isinstance(call, dict):
        invalid(path, "must be an object")
    if call.get("type", "function") != "function":
        unsupported(turns.fields.target, path, f"A tool call of type '{call.get('type')}'")
    function = call.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        invalid(f"{path}.function.name", "must be a string")
    return {"type": "tool_use", "id": _id(call.get("id"), f"{path}.id"), "name": name, "input": arguments_of(call, path)}


def _id(id: object, path: str) -> str:
    """Anthropic takes ids of letters, digits, _ and - only; those of other providers may have been made of more."""
    if not isinstance(id, str) or not id:
        invalid(path, "must be a string")
    return re.sub(r"[^a-zA-Z0-9_-]", "_", id)


def _tool(turns: Turns, message: Json, path: str) -> None:
    _result(turns, message, path, _id(message.get("tool_call_id"), f"{path}.tool_call_id"))


def _function(turns: Turns, message: Json, path: str) -> None:
    if not turns.function_id:
        invalid(path, "there is no function_call that this could be the result of")
    _result(turns, message, path, turns.function_id)


def _result(turns: Turns, message: Json, path: str, id: str) -> None:
    """https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/implement-tool-use#handling-tool-use-and-tool-result-content-blocks"""
    block: Json = {"type": "tool_result", "tool_use_id": id}
    content = message.get("content")
    if isinstance(content, str):
        if content.strip():
            block["content"] = content
    elif blocks := blocks_of(content, f"{path}.content", turns.fields):
        block["content"] = blocks
    if isinstance(message.get("is_error"), bool):
        block["is_error"] = message["is_error"]
    turns.add("user", _cached(message, [block]))


ROLES: Mapping[str, Callable[[Turns, Json, str], None]] = {
    "system": _system,
    "developer": _system,
    "user": _user,
    "assistant": _assistant,
    "tool": _tool,
    "function": _function,
}
