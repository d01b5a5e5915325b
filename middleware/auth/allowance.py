"""How much a key may ask, as it is written: a checked section, which the limits middleware reads as plain figures.

The one rule: a figure that is not written is not said, so that whatever holds for every key goes on to hold for this one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from proxy.units import Between

Figure = Annotated[int, Between(0, 10**9)]


@dataclass(frozen=True, slots=True)
class Rates:
    """Each optional; 0 lets nothing in."""

    requests_per_minute: Figure | None = None
    tokens_per_minute: Figure | None = None
    concurrent: Figure | None = None


@dataclass(frozen=True, slots=True)
class Allowance(Rates):
    """The key's own figures, and those of each of its clients (by address), identities and names."""

    per_client: Rates | None = None
    per_identity: Rates | None = None
    per_name: Rates | None = None

    def said(self) -> dict[str, Any]:
        """What is written, as mappings."""
        return {
            name: {figure: most for figure, most in value.items() if most is not None} if isinstance(value, dict) else value
            for name, value in asdict(self).items()
            if value is not None
        }
