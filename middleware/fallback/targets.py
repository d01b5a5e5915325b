"""What is known of each target: its circuit, how fast it answers, how often it was asked.

Strategy: targets that the config names (in a route, or in a provider's `models`) are kept for good and shown by name; those that
only clients name are kept while they are recent, and the first few are shown by name, the others as `other`.
The one rule: clients can name models without end, and neither memory nor metrics may grow with them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from middleware.fallback.breaker import Breaker, Policy
from proxy.call import Target

INVENTED = 1024
SHOWN = 50
OTHER = "other"
# Half of what is known of a target's speed is forgotten in this many seconds without news of it, so that it is tried again.
HALF_LIFE = 60.0
WEIGHT = 0.3
SAMPLES, FEWEST, FRESH = 128, 20, 900.0


class Speed:
    """Seconds until the first chunk: a decaying average, and the p95 of recent ones."""

    __slots__ = ("_at", "_average", "_recent")

    def __init__(self) -> None:
        self._average: float | None = None
        self._at = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=SAMPLES)

    def record(self, seconds: float, now: float) -> None:
        known = self._average
        self._average = seconds if known is None else known + WEIGHT * (seconds - known)
        self._at = now
        self._recent.append((now, seconds))

    def average(self, now: float) -> float:
        """0 for a target of which nothing is known."""
        return 0.0 if self._average is None else self._average * 0.5 ** ((now - self._at) / HALF_LIFE)

    def p95(self, now: float) -> float | None:
        """None where too little is known."""
        fresh = sorted(seconds for at, seconds in self._recent if now - at <= FRESH)
        return fresh[int(len(fresh) * 0.95)] if len(fresh) >= FEWEST else None


@dataclass(slots=True)
class Known:
    """One target. label: its name in metrics. speed: of streams; whole: of replies that are not streamed."""

    label: str
    breaker: Breaker
    speed: Speed = field(default_factory=Speed)
    whole: Speed = field(default_factory=Speed)


class Targets:
    """clock: seconds, monotonic. attempts: by label, those that answered and those that did not."""

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._configured: dict[str, Known] = {}
        self._invented: OrderedDict[str, Known] = OrderedDict()
        self._labels: set[str] = set()
        self.attempts: dict[tuple[str, str], int] = {}

    def configure(self, name: str) -> None:
        """This target stands in the config."""
        if name not in self._configured:
            known = self._invented.pop(name) if name in self._invented else self._new(name)
            known.label = name
            self._configured[name] = known

    def of(self, target: Target) -> Known:
        """What is known of it; from now on something is."""
        name = str(target)
        if (known := self._configured.get(name)) is not None:
            return known
        if target.model in target.provider.models:
            self.configure(name)
            return self._configured[name]
        if (known := self._invented.get(name)) is not None:
            self._invented.move_to_end(name)
            return known
        if len(self._invented) >= INVENTED:
            self._invented.popitem(last=False)
        known = self._invented[name] = self._new(self._label(name))
        return known

    def attempted(self, known: Known, outcome: str) -> None:
        key = (known.label, outcome)
        self.attempts[key] = self.attempts.get(key, 0) + 1

    def shown(self) -> Iterator[tuple[str, Known]]:
        """Those that have a label of their own."""
        yield from self._configured.items()
        for name, known in self._invented.items():
            if known.label != OTHER:
                yield name, known

    def __len__(self) -> int:
        return len(self._configured) + len(self._invented)

    def _label(self, name: str) -> str:
        if name not in self._labels and len(self._labels) >= SHOWN:
            return OTHER
        self._labels.add(name)
        return name

    def _new(self, label: str) -> Known:
        return Known(label, Breaker(self._policy, self._clock))
