"""The misbehaving provider: it says what the plan says, breaks as the plan wants it, and writes down what it said.

Strategy: the conformance kit's provider serves the raw connection; here is only what is said on it. Every call is written down
before its first byte leaves, and each piece before it leaves, so that no client can have more than what stands here.
The one rule: which question it is stands at the end of the last message that asks one; where there is an assistant's behind it,
the answer goes on from there.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from functools import partial
from typing import Any

import orjson

from chaos.plan import Plan, Question, Script
from chaos.records import Called
from proxy.conformance import provider as kit
from proxy.conformance.provider import Exchange, Line, http_chunk

Json = dict[str, Any]
ASKS = "chaos "
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
ERROR = orjson.dumps({"error": {"message": "The model has broken down.", "type": "server_error", "code": None}})
MALFORMED = b'data: {"choices": [{"delta"\n\n'


class Provider(kit.Provider):
    """seen: what stood before questions, how often. outage: the model that answers nothing but 503 for now."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan
        self._attempts: Counter[str] = Counter()
        self.called: list[Called] = []
        self.seen: Counter[str] = Counter()
        self.outage = ""

    async def __aenter__(self) -> Provider:
        await super().__aenter__()
        return self

    @property
    def unfinished(self) -> int:
        return sum(call.open for call in self.called)

    def hang_up(self) -> None:
        """End the connections that wait for a next request; there are no others when nothing is unfinished."""
        for task in list(self._tasks):
            task.cancel()

    def _exchange(self, line: Line) -> Exchange:
        messages = line.asked["messages"]
        place = max(number for number, one in enumerate(messages) if one["role"] == "user" and ASKS in one["content"])
        before, _, name = messages[place]["content"].rpartition(ASKS)
        self.seen.update({"asked with passages": bool(before), "asked with a history": place > 0})
        call = Called(name, self._attempts[name])
        self._attempts[name] += 1
        self.called.append(call)
        spoken = next((one["content"] for one in messages[place + 1 :] if one["role"] == "assistant"), "")
        return Exchange(partial(self._answer, call, self._plan.question(name), spoken))

    async def _answer(self, call: Called, question: Question, spoken: str, line: Line) -> None:
        try:
            start = question.position(spoken)
            if start is None:
                self.faults.append(f"{call.question} was to go on from what nobody said: {spoken[-80:]!r}")
                start = 0
            script = question.script(call.attempt)
            if line.asked["model"] == self.outage:
                script = Script("status", status=503)
            await _Speech(call, question, script, start - min(script.again, start), line).speak()
        finally:
            call.open = False


class _Speech:
    """One answer. start: its first piece."""

    def __init__(self, call: Called, question: Question, script: Script, start: int, line: Line) -> None:
        self._call, self._question, self._script, self._start, self._line = call, question, script, start, line
        self._dice = random.Random(f"{call.question}:{call.attempt}")

    async def speak(self) -> None:
        line, script = self._line, self._script
        if script.kind == "status":
            await line.whole(ERROR, script.status)
        elif not line.asked.get("stream"):
            await self._whole()
        elif script.kind == "silent":
            await line.open()
            await line.silence()
        elif script.kind == "early":
            await line.open()
            await line.chunk(b"data: " + ERROR + b"\n\n")
            await line.end()
        elif script.kind in ("burst", "trickle"):
            await self._raw()
        else:
            await self._paced()

    async def _whole(self) -> None:
        line, kind = self._line, self._script.kind
        text = "".join(self._question.pieces[self._start :])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = orjson.dumps({"id": "c", "object": "chat.completion", "created": 1, "choices": [choice], "usage": USAGE})
        if kind in ("cut", "half", "reset"):
            await line.send(kit.head(200, {"Content_Type": "application/json", "Content_Length": str(len(body))}), body[:20])
            line.reset() if kind == "reset" else line.hang_up()
        elif kind in ("stall", "silent"):
            await line.silence()
        elif kind in ("error", "early", "malformed", "polite"):
            await line.whole(b'{"choices": [{' if kind == "malformed" else ERROR)
        else:
            self._note(len(self._question.pieces), ended=True)
            await line.whole(body)

    def _note(self, pieces: int, *, ended: bool = False) -> None:
        self._call.said = sum(map(len, self._question.pieces[:pieces]))
        self._call.ended |= ended

    def _event(self, number: int) -> bytes:
        delta = {"content": self._question.pieces[number]}
        return event({**delta, "role": "assistant"} if number == self._start else delta)

    async def _raw(self) -> None:
        """All of it in one write, or in many, cut anywhere: in a character, in a CRLF, in the framing."""
        self._note(len(self._question.pieces), ended=True)
        await self._line.open()
        events = [self._event(number) for number in range(self._start, len(self._question.pieces))]
        raw = b"".join(map(http_chunk, [*events, ending()])) + b"0\r\n\r\n"
        if self._script.kind == "burst":
            await self._line.send(raw)
            return
        cuts = sorted(self._dice.sample(range(1, len(raw)), min(30, len(raw) - 1)))
        await self._line.send(*(raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)), pause=0.001)

    async def _paced(self) -> None:
        line, question, script = self._line, self._question, self._script
        await line.open()
        for number in range(self._start, len(question.pieces)):
            if script.kind != "whole" and number - self._start >= script.after:
                break
            self._note(number + 1)
            await line.chunk(self._event(number))
            if question.pause:
                await asyncio.sleep(question.pause)
        if script.kind == "whole":
            self._note(len(question.pieces), ended=True)
            await line.chunk(ending())
            await line.end()
        else:
            await self._break(script.kind)

    async def _break(self, kind: str) -> None:
        line = self._line
        match kind:
            case "half":
                await line.send(http_chunk(event({"content": "never said"}))[:-20])
                line.hang_up()
            case "polite":
                await line.end()
            case "reset":
                line.reset()
            case "stall":
                await line.silence()
            case "error":
                await line.chunk(b"data: " + ERROR + b"\n\n")
                await line.end()
            case "malformed":
                await line.chunk(MALFORMED, ending())
                await line.end()
            case _:
                line.hang_up()


def event(delta: Json, finish: str | None = None, **fields: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return (
        b"data: "
        + orjson.dumps({"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": choices, **fields})
        + b"\n\n"
    )


def ending() -> bytes:
    usage = {"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": [], "usage": USAGE}
    return event({}, "stop") + b"data: " + orjson.dumps(usage) + b"\n\ndata: [DONE]\n\n"
