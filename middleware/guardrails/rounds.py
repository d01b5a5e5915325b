"""Questions about a reply while it runs: text gathers, and every so many characters somebody is asked about it.

Strategy: one round at a time per gate. A round takes all that has gathered, asks every rule of the gate about each text, and
hands on what waited for it (`hold_back`), or nothing (`parallel`, where the chunks have gone already). Rounds begin when enough
has gathered, and at the end, until nothing is left.
The one rule: what waits goes in the order in which it came, and only behind a round that covers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import orjson

from middleware.guardrails.options import Rule
from middleware.guardrails.outside import Said
from middleware.guardrails.texts import Key, parts, with_text
from middleware.guardrails.verdict import Finding
from proxy.reply import Item, Run, single_events

Ask = Callable[[Rule, Sequence[str]], Awaitable[list[Said]]]
# Characters of a text before what is new, which is asked about again with it.
OVERLAP = 200


class Gone(NamedTuple):
    """What came of a round. items: may go on. finding: of a rule that ends the reply here."""

    items: list[Item]
    finding: Finding | None = None


class Gate:
    """rules: who is asked. holds: the chunks wait for the answer. window: characters. ask: puts the question. report: told of
    what was found. gone: told of every round."""

    def __init__(
        self, rules: Sequence[Rule], *, holds: bool, window: float, ask: Ask,
        report: Callable[[Finding], None], gone: Callable[[Gone], None],
    ) -> None:  # fmt: skip
        self._rules, self.holds, self._window = rules, holds, window
        self._ask, self._report, self._gone = ask, report, gone
        self._items: list[Item] = []
        self._texts: dict[Key, str] = {}
        self._before: dict[Key, str] = {}
        self._size = 0
        self._over = False
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Nothing waits, and nobody is being asked."""
        return self._task is None and not self._items and not self._size

    def hears(self, key: Key, text: str) -> None:
        self._texts[key] = self._texts.get(key, "") + text
        self._size += len(text)

    def holds_back(self, items: list[Item]) -> None:
        self._items += items

    def turn(self, *, over: bool = False) -> None:
        """Something has come; over: it was the last."""
        self._over = self._over or over
        if self._task is None and (self._size >= self._window or (self._over and (self._size or self._items))):
            self._task = asyncio.get_running_loop().create_task(self._round())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _round(self) -> None:
        items, self._items = self._items, []
        texts, self._texts, self._size = self._texts, {}, 0
        asked = {key: self._before.get(key, "") + text for key, text in texts.items() if text}
        answers = await asyncio.gather(*(self._ask(rule, list(asked.values())) for rule in self._rules)) if asked else []
        finding: Finding | None = None
        went = dict(asked)
        for rule, said in zip(self._rules, answers, strict=False):
            for key, answer in zip(asked, said, strict=True):
                if answer.caught:
                    items, found = self._caught(rule, key, answer, items, went)
                    finding = finding or found
        self._before |= {key: text[-OVERLAP:] for key, text in went.items()}
        self._task = None
        self._gone(Gone([] if finding else items, finding))
        if finding is None:
            self.turn()

    def _caught(
        self, rule: Rule, key: Key, said: Said, items: list[Item], went: dict[Key, str]
    ) -> tuple[list[Item], Finding | None]:
        """The items as they may go on, or what ends the reply: a block, or a redaction that comes too late. went: the texts as
        they go out."""
        action, before = rule.action, self._before.get(key, "")
        if action != "flag" and said.text is not None and self.holds and said.text.startswith(before):
            self._report(Finding(rule.id, "redact", "output"))
            went[key] = said.text
            return replaced(items, key, said.text[len(before) :]), None
        finding = Finding(rule.id, "flag" if action == "flag" or rule.mode == "after" else "block", "output")
        self._report(finding)
        return items, finding if finding.action == "block" else None


def replaced(items: list[Item], key: Key, text: str) -> list[Item]:
    """The items with one of their texts replaced: the first piece has all of it."""
    found: list[Item] = []
    for item in items:
        for event in single_events(item) if isinstance(item, Run) else (item,):
            chunk = orjson.loads(event[event.index(b"data: ") + 6 : -2]) if isinstance(event, bytes) else event
            for part in parts(chunk):
                if part.key != key:
                    found.append(part.chunk)
                elif (new := with_text(part, text)) is not None:
                    found.append(new)
                    text = ""
    return found
