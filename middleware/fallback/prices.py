"""What a target costs, for `strategy: cheapest`: the operator's own prices, else a kept, offline table (genai-prices).

Strategy: one number per target (a blend of input and output), looked up once and remembered. The library takes a sixth of a
second to import and 50 µs and more per look-up, so both happen in a thread and only for routes that ask for it.
The one rule: a target without a known price is never taken for a cheap one.

https://github.com/pydantic/genai-prices
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from proxy.call import Target

KEPT = 1024
MILLION = 1_000_000
# Chats send about three tokens for each that they get: the blend in which comparisons of models are commonly given.
INPUT_SHARE = 0.75
# Our names of APIs, where they differ from the table's names of providers.
VENDORS = {"anthropic": "anthropic", "gemini": "google", "cohere": "cohere"}


def blend(price: tuple[float, float]) -> float:
    """(input, output) in US dollars per million tokens -> one number."""
    return price[0] * INPUT_SHARE + price[1] * (1 - INPUT_SHARE)


class Prices:
    """Remembers the table's price of at most `KEPT` targets."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], float] = {}

    async def of(self, targets: Sequence[Target]) -> list[float]:
        """US dollars per million tokens, blended; infinite where there is no price."""
        unknown = [target for target in targets if _key(target) not in self._known]
        if unknown:
            found = await asyncio.to_thread(_looked_up, unknown)
            if len(self._known) + len(found) > KEPT:
                self._known.clear()
            self._known.update(found)
        return [self._known.get(_key(target), math.inf) for target in targets]


def _key(target: Target) -> tuple[str, str, str]:
    return target.provider.name, target.provider.base_url, target.model


def _looked_up(targets: Sequence[Target]) -> dict[tuple[str, str, str], float]:
    from genai_prices import Usage, calc_price

    usage = Usage(input_tokens=MILLION * 3, output_tokens=MILLION)
    return {_key(target): _price(calc_price, usage, target) for target in targets}


def _price(calc: Any, usage: Any, target: Target) -> float:
    """Where the URL is a known vendor's it says most; then the row's name, then its API."""
    provider = target.provider
    places: list[dict[str, str]] = [{"provider_api_url": provider.base_url}, {"provider_id": provider.name}]
    if provider.api in VENDORS:
        places.append({"provider_id": VENDORS[provider.api]})
    for place in places:
        try:
            return float(calc(usage, model_ref=target.model, **place).total_price) / 4
        except (LookupError, ValueError):
            continue
    return math.inf
