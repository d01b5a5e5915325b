"""One reply that several readers follow, each at its own pace: what single flight and resumable streams are made of.

Strategy: the flight reads its reply as soon as it is made and keeps what comes (`recording`); a follower has a position in it
(`follower`). Who has caught up gets what comes in the callback in which it came, the only one by a way on which next to nothing
is done (`straight`); who is behind, or came later, gets what it has missed when it asks. The reply is read no further while all
followers are behind (`flight`).
The one rule: a follower never slows the others.
"""

from __future__ import annotations

from proxy.flight.flight import Flight
from proxy.flight.follower import TooFarBehind
from proxy.flight.straight import GROWTH, Bounds

__all__ = ["GROWTH", "Bounds", "Flight", "TooFarBehind"]
