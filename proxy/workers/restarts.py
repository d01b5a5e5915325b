"""When a worker that has ended is started again: at once, then later and later, then not any more. Pure; the clock is passed in.

The one rule: it counts every end within the window, clean ones too, so that nothing can spin.
"""

from __future__ import annotations

from collections.abc import Sequence

WAITS = (0.0, 0.5, 1.0, 2.0, 4.0)
WINDOW = 60.0


class Restarts:
    """Of one worker. waits: seconds before each restart within the last `window` seconds; after that many it is given up."""

    def __init__(self, waits: Sequence[float] = WAITS, window: float = WINDOW) -> None:
        self._waits = waits
        self._window = window
        self._ends: list[float] = []

    def after(self, now: float) -> float | None:
        """The worker has ended: seconds until it is started again; None where it is given up."""
        self._ends = [end for end in self._ends if now - end < self._window] + [now]
        return self._waits[len(self._ends) - 1] if len(self._ends) <= len(self._waits) else None

    @property
    def recent(self) -> str:
        """In words, how often it ended."""
        return f"{len(self._ends)} times within {self._window:g} s"
