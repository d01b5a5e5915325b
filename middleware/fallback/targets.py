"""What is known of each target: its circuit, how fast it answers, how often it was asked.

Strategy: targets that the config names (in a route, or in a provider's `models`) are kept for good and shown by name; those that
only clients name are kept while they are recent, and the first few are shown by name, the others as `other`.
The one rule: clients can name models without end, and neither memory nor metrics may grow with them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field

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
class Tally:
    """How often targets of one label were asked, by how that went."""

    answered: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclass(slots=True)
class Known:
    """One target. label: its name in metrics. tally: its label's. speed: of streams; whole: of replies that are not streamed."""

    label: str
    tally: Tally
    breaker: Breaker
    speed: Speed = field(default_factory=Speed)
    whole: Speed = field(default_factory=Speed)

    def answered(self, stream: bool, seconds: float, now: float) -> None:
        """It was asked, and has its first chunk in hand after `seconds`."""
        self.tally.answered += 1
        (self.speed if stream else self.whole).record(seconds, now)

    def left(self, error: BaseException) -> None:
        """It was asked, and what ended that says nothing about it: the call was cancelled, or a layer further in is broken."""
        if isinstance(error, asyncio.CancelledError):
            self.tally.cancelled += 1
        else:
            self.tally.failed += 1


class Targets:
    """clock: seconds, monotonic."""

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._configured: dict[str, Known] = {}
        self._invented: OrderedDict[str, Known] = OrderedDict()
        # By label, of which there are few; what was counted stays when a target is forgotten.
        self._tallies: dict[str, Tally] = {}
        self._labels: set[str] = set()

    def configure(self, name: str) -> None:
        """This target stands in the config."""
        if name not in self._configured:
            known = self._invented.pop(name) if name in self._invented else self._new(name)
            known.label, known.tally = name, self._tally(name)
            self._configured[name] = known

    def follow(self, policy: Policy) -> None:
        """Judge by another policy from now on."""
        self._policy = policy
        for known in (*self._configured.values(), *self._invented.values()):
            known.breaker.follow(policy)

    def renew(self, changed: Collection[str]) -> None:
        """There is another config: what it names will be configured anew when it is met; the rest is kept while it is recent.
        changed: the providers of which nothing is known any more.
        """
        known = {**self._configured, **self._invented}
        self._configured.clear()
        self._invented = OrderedDict((name, one) for name, one in known.items() if name.partition("/")[0] not in changed)

    def of(self, target: Target) -> Known:
        """What is known of it; from now on something is."""
        name = target.name
        if (known := self._configured.get(name)) is not None:
            return known
        if target.model in target.provider.models:
            self.configure(name)
            return self._configured[name]
        if (known := self._invented.get(name)) is not None:
            self._invented.move_to_end(name)
            return known
        while len(self._invented) >= INVENTED:
            self._invented.popitem(last=False)
        known = self._invented[name] = self._new(self._label(name))
        return known

    def attempts(self) -> Iterator[tuple[str, str, int]]:
        """(label, outcome, how often), of what happened at all."""
        for label, tally in sorted(self._tallies.items()):
            for outcome, count in asdict(tally).items():
                if count:
                    yield label, outcome, count

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

    def _tally(self, label: str) -> Tally:
        return self._tallies.setdefault(label, Tally())

    def _new(self, label: str) -> Known:
        return Known(label, self._tally(label), Breaker(self._policy, self._clock))
