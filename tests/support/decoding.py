"""Feeding a wire format's decoder in a test: any split of the bytes, and what a client would have put together from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from proxy.call import Call, Provider, Target
from proxy.decoder import SseDecoder
from proxy.errors import GatewayError
from proxy.reply import Batch, Item

Json = dict[str, Any]


def make_target(api: str, model: str = "some-model", **row: Any) -> Target:
    """A target of a provider with a key; `row` sets further fields of the provider's row."""
    row = {"api_key": "sk-upstream-0123456789", "base_url": "http://127.0.0.1:9/v1", **row}
    return Target(Provider(name=row.pop("name", api), api=api, **row), model)


def make_call(request: Json | None = None, **fields: Any) -> Call:
    """A chat call as the edge would have made it."""
    body = {"model": "public-model", "messages": [{"role": "user", "content": "Hi"}], **(request or {})}
    defaults: Json = {
        "id": "req_1",
        "nonce": "0a1b2c3d4e5f",
        "created": 1700000000,
        "kind": "chat",
        "stream": bool(body.get("stream")),
    }
    return Call(**{**defaults, "model": body["model"], "request": body, **fields})


def unnumbered(entries: list[Any]) -> list[Any]:
    """List entries without the `index` that lets SDKs add deltas up."""
    return [
        {name: value for name, value in entry.items() if name != "index"} if isinstance(entry, dict) else entry
        for entry in entries
    ]


@dataclass
class Decoded:
    """All chunks of a stream, its fault if it had one, and what they add up to per choice."""

    chunks: list[Json]
    fault: GatewayError | None
    usage: Json | None
    text: dict[int, str] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    details: dict[int, list[Json]] = field(default_factory=dict)
    blocks: dict[int, list[Any]] = field(default_factory=dict)
    tools: dict[int, list[Json]] = field(default_factory=dict)
    finish: dict[int, tuple[str, str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for chunk in self.chunks:
            for choice in chunk["choices"]:
                self._add(choice)

    def _add(self, choice: Json) -> None:
        index, delta = choice["index"], choice["delta"]
        self.text[index] = self.text.get(index, "") + (delta.get("content") or "")
        self.reasoning[index] = self.reasoning.get(index, "") + (delta.get("reasoning_content") or "")
        self.details.setdefault(index, []).extend(delta.get("reasoning_details") or [])
        self.blocks.setdefault(index, []).extend(unnumbered(delta.get("provider_blocks") or []))
        tools = self.tools.setdefault(index, [])
        for call in delta.get("tool_calls") or []:
            if "id" in call:
                assert call["index"] == len(tools), "tool calls are numbered 0, 1, 2…"
                tools.append({"id": call["id"], "name": call[call["type"]]["name"], "arguments": ""})
            said = call.get("function") or {"arguments": call["custom"]["input"]}
            tools[call["index"]]["arguments"] += said["arguments"]
        if choice["finish_reason"] is not None:
            assert index not in self.finish, "one finish reason per choice"
            self.finish[index] = (choice["finish_reason"], choice.get("native_finish_reason"))


def decode(decoder: SseDecoder, pieces: Iterable[bytes], *, clean_end: bool = True) -> Decoded:
    """Feed the pieces, then the HTTP end."""
    items: list[Item] = []
    for piece in pieces:
        items += decoder.feed(piece)
    if clean_end:
        items += decoder.close()
    return Decoded(Batch(items).chunks, decoder.fault, decoder.stream.usage)


def byte_by_byte(body: bytes) -> list[bytes]:
    return [body[i : i + 1] for i in range(len(body))]


def split_at(body: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The body cut at the given offsets (taken modulo its length)."""
    edges = [0, *sorted({cut % (len(body) or 1) for cut in cuts}), len(body)]
    return [body[a:b] for a, b in pairwise(edges) if a < b]
