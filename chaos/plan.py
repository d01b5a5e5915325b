"""What will happen, as pure functions of the seed: what each question's answer says, how it breaks, and what each client does.

Strategy: everything is drawn from a generator seeded with the seed and the thing's own name, so that nothing depends on the order
in which things happen. The texts are full of what trips parsers, and no two of their pieces are alike.
The one rule: a question's text is the same whichever provider is asked, however often; only how it breaks differs by attempt.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

Json = dict[str, Any]
# None ends in a blank: a provider that goes on from a text gets it without those.
WORDS = (
    "plain", "naïve", "🦊🦊", '"quoted"', "back\\slash", "line\nline", "data: [DONE]", "\n\ndata: {}\n\nx", "[DONE]", "中文字",
    "\u2028sep", "e\u0301", "tab\tbed", "\r\nx", "{}", "<b>", "null", "é" * 30, ": no comment",
)  # fmt: skip
WHOLE, BREAKS = "whole", ("cut", "half", "polite", "reset", "stall", "error", "malformed")
# How an attempt goes, and how often. Before the first chunk: status, early (an error inside the 200), silent.
SCRIPTS = {
    WHOLE: 40, "burst": 10, "trickle": 8, "cut": 6, "half": 3, "polite": 3, "reset": 5, "stall": 3, "error": 4, "malformed": 2,
    "status": 6, "early": 2, "silent": 1,
}  # fmt: skip
# What a client does, how often, and what the gateway must have for it.
BEHAVIOURS = {
    "read": (30, ""), "whole": (8, ""), "leave": (14, ""), "slow": (5, ""), "frozen": (1, ""), "crowd": (16, ""),
    "resume": (12, "resume"), "background": (5, "resume"), "cancel": (4, "resume"), "policy": (6, "disconnect"),
    "continue": (10, "continuation"), "smooth": (5, "smooth"), "bounded": (3, "bounds"), "early": (4, "keepalive"),
    "session": (8, "memory"), "files": (5, "retrieval"), "guarded": (4, "guardrails"),
}  # fmt: skip
CROWD = 8  # visits that ask the same question
SESSIONS = 7
HUGE = 4096
USAGE = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Script:
    """How one attempt goes: kind, of SCRIPTS; after: pieces before it breaks; status: of an error; again: pieces of the text that
    a provider repeats where it is asked to go on."""

    kind: str = WHOLE
    after: int = 0
    status: int = 500
    again: int = 0


@dataclass(frozen=True)
class Question:
    """name: what is asked. pieces: of its text. pause: seconds between them. scripts: by attempt, the last for all further."""

    name: str
    pieces: tuple[str, ...]
    pause: float = 0.0
    scripts: tuple[Script, ...] = (Script(),)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def script(self, attempt: int) -> Script:
        return self.scripts[min(attempt, len(self.scripts) - 1)]

    def position(self, said: str) -> int | None:
        """How many pieces `said` is; None where it is not just some of the first."""
        ends = list(accumulate(map(len, self.pieces), initial=0))
        return ends.index(len(said)) if len(said) in ends and self.text.startswith(said) else None


@dataclass(frozen=True)
class Visit:
    """One client's errand. after: events until it leaves, is cut, or cancels; pause: seconds that it takes its time; fields: of
    the request."""

    number: int
    behaviour: str
    question: str
    after: int = 0
    pause: float = 0.0
    reset: bool = False
    cuts: int = 0
    fields: Json = field(default_factory=dict)


class Plan:
    """features: what the gateway has; what needs others is left out."""

    def __init__(self, seed: int, features: Collection[str] = ()) -> None:
        self.seed = seed
        self._weights = {name: much for name, (much, needs) in BEHAVIOURS.items() if not needs or needs in features}
        self._coalesce = "coalesce" in features
        self.question = lru_cache(4096)(self._question)

    def _dice(self, *name: object) -> random.Random:
        return random.Random(":".join(map(str, (self.seed, *name))))

    def visit(self, number: int) -> Visit:
        dice = self._dice("visit", number)
        behaviour = _drawn(dice, self._weights)
        crowd = f"crowd-{number // (CROWD * len(self._weights))}"
        question = {"crowd": crowd, "frozen": f"huge-{number}"}.get(behaviour, f"own-{number}")
        return Visit(
            number, behaviour, question, after=dice.choice((0, 1, 1, 2, 3, 5, 8, 20)), pause=dice.choice((0.0, 0.0, 0.01, 0.05)),
            reset=dice.random() < 0.5, cuts=dice.randint(1, 4),
            fields={**self._fields(behaviour, dice), **dice.choice(({}, USAGE))},
        )  # fmt: skip

    def _fields(self, behaviour: str, dice: random.Random) -> Json:
        match behaviour:
            case "whole":
                return {"stream": False}
            case "crowd":
                return {"cache": {"ttl": 5}, **({"coalesce": True} if self._coalesce else {})}
            case "resume" | "cancel":
                return {"resume": True}
            case "background":
                return {"background": True}
            case "policy":
                policy = dice.choice(("cancel", "finish_and_cache", "finish_for_usage"))
                return {"on_disconnect": policy, "cache": {"ttl": 5}}
            case "continue":
                return {"on_break": dice.choice(("continue", "continue", "restart_if_unsent"))}
            case "smooth":
                return {"smooth": dice.choice((True, {"interval": 20}, {"chunks_per_second": 200}))}
            case "bounded":
                return {"max_output_tokens_hard": dice.randint(1, 60)}
            case "early":
                return {"keepalive_after": 100, "keepalive_interval": 1000}
            case "session":
                return {"sessionId": f"s-{dice.randrange(SESSIONS)}", "saveToMemory": dice.random() < 0.8}
            case "files":
                return {"useRAG": True, "cache": {"ttl": 5}}
            case "guarded":
                return {"plugins": [{"id": "pii_redaction"}]}
        return {}

    def _question(self, name: str) -> Question:
        dice = self._dice("question", name)
        if name.startswith("endless"):
            return Question(name, _text(dice, 2000), 0.05)
        if name.startswith("huge"):
            return Question(name, _text(dice, HUGE, 1000))
        pieces = _text(dice, dice.choice((1, 3, 10, 20, 40)))
        bad = dice.choice((1, 1, 2, 9))
        scripts = [self._script(dice, len(pieces)) for _ in range(bad)]
        return Question(name, pieces, dice.choice((0.0, 0.002, 0.01, 0.03)), (*scripts, Script(again=dice.choice((0, 0, 1)))))

    def _script(self, dice: random.Random, pieces: int) -> Script:
        kind = _drawn(dice, SCRIPTS)
        return Script(kind, dice.randint(1, pieces), dice.choice((429, 500, 502, 503, 404)), dice.choice((0, 0, 1)))


def _drawn(dice: random.Random, weights: dict[str, int]) -> str:
    return dice.choices(list(weights), list(weights.values()))[0]


def _text(dice: random.Random, count: int, padding: int = 0) -> tuple[str, ...]:
    """Numbered, so that no piece can be taken for the repetition of another one."""
    return tuple(f" {number}·{dice.choice(WORDS)}{'x' * padding}" for number in range(count))
