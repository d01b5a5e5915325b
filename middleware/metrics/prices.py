"""What a reply cost, in US dollars, by a price table that is kept offline (genai-prices' own snapshot) and by the operator's.

Strategy: a price is linear in the tokens within one tier, so a target's four rates are probed once per tier and hour (prices may
differ by time of day) and a reply costs one multiplication per kind of token; asking the library takes 50 µs each time.
The one rule: what is not in the table has no cost, rather than a guessed one.

https://github.com/pydantic/genai-prices
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar

from proxy.call import Provider

Json = dict[str, Any]
Tokens = tuple[int, int, int, int]  # input (cache reads and writes included), output, read from a cache, written to one
MILLION = 1_000_000
HOUR = 3600
KEPT = 1024


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens. cached, cache_write: of input that was read from, or written to, the provider's cache; like
    `input` where nothing is said.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None

    def __post_init__(self) -> None:
        if not all(0 <= value < MILLION for value in (self.input, self.output, self.cached or 0, self.cache_write or 0)):
            raise ValueError("a price must be from 0 to 999999 US dollars per million tokens")

    @property
    def rates(self) -> Rates:
        read = self.input if self.cached is None else self.cached
        written = self.input if self.cache_write is None else self.cache_write
        return Rates(self.input / MILLION, self.output / MILLION, read / MILLION, written / MILLION)


@dataclass(frozen=True, slots=True)
class Rates:
    """US dollars per token, by kind."""

    input: float
    output: float
    cached: float
    written: float

    def cost(self, tokens: Tokens) -> float:
        prompt, completion, cached, written = tokens
        return (prompt - cached - written) * self.input + cached * self.cached + written * self.written + completion * self.output


def counted(usage: Json) -> Tokens:
    """What OpenAI's usage object says; what is no number counts as 0, cached and written are at most the input."""
    details = usage.get("prompt_tokens_details")
    prompt, completion = count(usage, "prompt_tokens"), count(usage, "completion_tokens")
    if not details:
        return prompt, completion, 0, 0
    cached = min(prompt, count(details, "cached_tokens"))
    written = min(prompt - cached, count(details, "cache_write_tokens") or count(details, "cache_creation_tokens"))
    return prompt, completion, cached, written


def count(found: Any, name: str) -> int:
    """A number of tokens in an object of a provider's, 0 where there is none."""
    value = found.get(name) if isinstance(found, dict) else None
    return value if type(value) is int and value > 0 else 0


class Prices:
    """prices: the operator's own, by `provider/model`; they come first. now: Unix seconds."""

    def __init__(self, prices: Mapping[str, Price], *, now: Callable[[], float] = time.time) -> None:
        # Imported here: it takes 170 ms, which only a gateway that counts money should spend.
        from genai_prices import Usage, calc_price

        self._own = {target: price.rates for target, price in prices.items()}
        self._usage, self._calc = Usage, calc_price
        self._now = now
        self._hour = 0.0  # Unix seconds: when the one began in which `_known` holds
        self._known: dict[str, _Tiers | None] = {}

    def cost(self, target: str, tokens: Tokens, provider: Provider | None = None) -> float | None:
        """US dollars, or None where there is no price. target: `provider/model`. provider: its row, if at hand: its URL tells
        more than its name."""
        if (rates := self._own.get(target)) is not None:
            return rates.cost(tokens)
        if not 0 <= self._now() - self._hour < HOUR or len(self._known) >= KEPT:
            self._hour = self._now() // HOUR * HOUR
            self._known.clear()
        if target not in self._known:
            self._known[target] = self._tiers(target, provider)
        tiers = self._known[target]
        return None if tiers is None else tiers.rates(tokens[0]).cost(tokens)

    def _tiers(self, target: str, provider: Provider | None) -> _Tiers | None:
        name, _, model = target.partition("/")
        at = datetime.fromtimestamp(self._hour, UTC)
        places: list[Json] = [{"provider_api_url": provider.base_url}] if provider is not None else []
        for place in (*places, {"provider_id": name}):
            price = partial(self._price, model_ref=model, genai_request_timestamp=at, **place)
            try:
                found = price(input_tokens=1, output_tokens=1).model_price
            except (LookupError, ValueError):
                continue
            starts = sorted({tier.start for kind in vars(found).values() for tier in getattr(kind, "tiers", ())})
            return _Tiers(starts, price)
        return None

    def _price(self, *, model_ref: str, genai_request_timestamp: datetime, **more: Any) -> Any:
        """What the library says. more: token counts, and where the model is."""
        where = {name: more.pop(name) for name in ("provider_id", "provider_api_url") if name in more}
        return self._calc(self._usage(**more), model_ref, genai_request_timestamp=genai_request_timestamp, **where)


class _Tiers:
    """The rates of one target. starts: above how many input tokens each further tier applies. price: asks the library."""

    def __init__(self, starts: list[int], price: Callable[..., Any]) -> None:
        self._starts = starts
        self._price = price
        self._rates: dict[int, Rates] = {}

    def rates(self, prompt: int) -> Rates:
        tier = bisect_right(self._starts, prompt - 1)
        rates = self._rates.get(tier)
        if rates is None:
            rates = self._rates[tier] = self._probed(self._starts[tier - 1] + 1 if tier else 1)
        return rates

    def _probed(self, size: int) -> Rates:
        """size: a number of input tokens in the tier."""

        def price(**tokens: int) -> float:
            return float(self._price(**tokens).total_price)

        plain = price(input_tokens=size)
        output = price(input_tokens=size, output_tokens=MILLION) - plain
        cached = price(input_tokens=size, cache_read_tokens=size)
        written = price(input_tokens=size, cache_write_tokens=size)
        return Rates(plain / size, output / MILLION, cached / size, written / size)
