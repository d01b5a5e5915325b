"""Reasoning on its way back: `reasoning_details` into thinking blocks, so that Claude can go on where it called a tool.

Strategy: entries that share an `index` are pieces of one block, whether a client appended every entry of a stream to a list or
merged them by index as the OpenAI SDKs do (which repeats the text of `format`, hence the prefix test).
The one rule: only signed thinking goes back; Anthropic refuses any other
(https://docs.anthropic.com/en/docs/build-with-claude/extended-thinking#preserving-thinking-blocks).
"""

from __future__ import annotations

from typing import Any

from proxy.translation import invalid
from proxy.wire.anthropic.terms import FORMAT

Json = dict[str, Any]


def thinking_blocks(details: object, path: str) -> list[Json]:
    """Thinking and redacted_thinking blocks in their order; entries of other formats are not for Anthropic and are left out."""
    if details is None:
        return []
    if not isinstance(details, list):
        invalid(path, "must be a list")
    blocks: list[Json] = []
    open_blocks: dict[object, Json] = {}
    for number, entry in enumerate(details):
        if not isinstance(entry, dict):
            invalid(f"{path}[{number}]", "must be an object")
        if str(entry.get("format")).startswith(FORMAT):
            _add(blocks, open_blocks, entry)
    return [block for block in blocks if block["type"] == "redacted_thinking" or block["signature"]]


def _add(blocks: list[Json], open_blocks: dict[object, Json], entry: Json) -> None:
    if entry.get("type") == "reasoning.encrypted":
        if entry.get("data"):
            blocks.append({"type": "redacted_thinking", "data": entry["data"]})
        return
    if entry.get("type") != "reasoning.text":
        return
    text, signature = entry.get("text") or "", entry.get("signature") or ""
    block = open_blocks.get(entry.get("index"))
    if block is None or (text and block["signature"]):  # text after a signature: another block under the same number
        block = open_blocks[entry.get("index")] = {"type": "thinking", "thinking": "", "signature": ""}
        blocks.append(block)
    block["thinking"] += text
    block["signature"] += signature
