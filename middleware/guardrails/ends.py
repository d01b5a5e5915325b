"""The last chunks of a guarded reply: the provider's own with what was found, or those of a reply that was blocked.

The one rule: a blocked reply ends as the contract has it for every end that the gateway makes: `content_filter`, with
`penstock:guardrails` beside it, on every choice that was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from middleware.guardrails.verdict import Finding, shown
from proxy.call import Call
from proxy.reply import Chunk, Item, noted


def finishes(item: Item) -> bool:
    """Is it a finish chunk?"""
    return isinstance(item, dict) and any(choice.get("finish_reason") for choice in item["choices"])


def with_findings(items: Sequence[Item], found: Sequence[Finding]) -> list[Item]:
    """Finish chunks, with what was found on the last of them."""
    last = items[-1] if items else None
    if not found or not isinstance(last, dict):
        return list(items)
    return [*items[:-1], noted(last, "guardrails", shown(found))]


def filtered(call: Call, chunk: Chunk, found: Sequence[Finding]) -> list[Item]:
    """The finish chunks of a blocked reply. chunk: any of its stream, whose id and time they share."""
    wanted = call.request.get("n")
    same = {"id": chunk["id"], "object": "chat.completion.chunk", "created": chunk["created"], "model": call.model}
    end = {"delta": {}, "finish_reason": "content_filter", "native_finish_reason": "penstock:guardrails"}
    count = wanted if isinstance(wanted, int) and wanted > 0 else 1
    return with_findings([{**same, "choices": [{"index": index, **end}]} for index in range(count)], found)
