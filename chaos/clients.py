"""The clients: each goes on the errands of the plan, one after the other, and writes down what it got.

Strategy: one coroutine per behaviour; `_listen` reads events into the record, for so many events, at a client's pace.
The one rule: whatever the gateway does to a client is written down, never raised; what is raised is a mistake of the run's own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable

import orjson

from chaos.line import Answer, Event, Line
from chaos.plan import Plan, Visit
from chaos.records import Heard

PATH = "/v1/chat/completions"
PATIENCE = 20.0  # seconds for one errand; what takes longer never ends
GONE = (ConnectionError, asyncio.IncompleteReadError)
REST = 3.0  # seconds that a frozen client takes nothing; more than the gateway's write_timeout


class Clients:
    """All of them. port: the gateway's. model: what they ask for."""

    def __init__(self, plan: Plan, port: int, model: str) -> None:
        self._plan, self._port, self._model = plan, port, model
        self._numbers = itertools.count()
        self.heard: list[Heard] = []
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []

    async def visits(self, until: Callable[[], bool]) -> None:
        """One client's life: errand after errand, on the same connection as long as it lasts."""
        line = None
        while not until():
            visit = self._plan.visit(next(self._numbers))
            line = await self._visit(visit, line)
        if line is not None:
            line.leave()

    async def _visit(self, visit: Visit, line: Line | None) -> Line | None:
        """One errand; the connection, where it can be used again."""
        heard = self.new(visit)
        errand: Callable[[Visit, Heard, Line], Awaitable[None]] = getattr(self, f"_{visit.behaviour}", self._read)
        narrow = visit.behaviour in ("slow", "frozen")
        if line is None or narrow or not line.reusable:
            if line is not None:
                line.leave()
            line = await Line.open(self._port, narrow=narrow)
        try:
            async with asyncio.timeout(PATIENCE):
                await errand(visit, heard, line)
        except TimeoutError:
            heard.end = "open"
        except GONE:
            heard.end = "cut" if heard.status else "none"
        except Exception as error:
            self.faults.append(f"{visit.behaviour} {visit.number}: {error!r}")
            heard.end, heard.dropped = "left", True
        self.seen[visit.behaviour] += 1
        # A stream that ends with an error ends its connection.
        if line.reusable and not narrow and heard.end == "clean" and not (heard.streamed and heard.error):
            return line
        line.leave(reset=visit.reset)
        return None

    def new(self, visit: Visit) -> Heard:
        heard = Heard(f"chaos-{visit.number}", visit.question, visit.behaviour)
        self.heard.append(heard)
        return heard

    async def ask(self, visit: Visit, heard: Heard, line: Line) -> Answer:
        messages = [{"role": "user", "content": f"chaos {visit.question}"}]
        body = {"model": self._model, "stream": True, "messages": messages, **visit.fields}
        answer = await line.ask("POST", PATH, body, X_Request_Id=heard.asked)
        _begun(heard, answer)
        if answer.status != 200:
            await _refused(heard, answer)
        return answer

    # Errands

    async def _read(self, visit: Visit, heard: Heard, line: Line) -> None:
        answer = await self.ask(visit, heard, line)
        await listen(heard, answer)

    async def _whole(self, visit: Visit, heard: Heard, line: Line) -> None:
        answer = await self.ask(visit, heard, line)
        if answer.status == 200:
            choice = orjson.loads(await answer.body())["choices"][0]
            heard.text, heard.finishes = choice["message"]["content"], [choice["finish_reason"]]
            heard.natives = [str(choice.get("native_finish_reason"))]
            _ended(heard, answer)

    async def _leave(self, visit: Visit, heard: Heard, line: Line) -> None:
        """Goes away: before there is an answer, or after some events."""
        heard.end, heard.dropped = "left", True
        if not visit.after:
            answering = asyncio.ensure_future(self.ask(visit, heard, line))
            await asyncio.wait([answering], timeout=0.002 + visit.pause)
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        else:
            answer = await self.ask(visit, heard, line)
            await listen(heard, answer, most=visit.after)
        line.leave(reset=visit.reset)
        heard.end = "left"

    _policy = _leave

    async def _slow(self, visit: Visit, heard: Heard, line: Line) -> None:
        answer = await self.ask(visit, heard, line)
        await listen(heard, answer, most=visit.after * 5, pause=visit.pause)
        await listen(heard, answer)

    async def _frozen(self, visit: Visit, heard: Heard, line: Line) -> None:
        """Takes nothing for longer than the gateway waits, then what is still there."""
        heard.dropped = True
        answer = await self.ask(visit, heard, line)
        await listen(heard, answer, most=1)
        await asyncio.sleep(REST)
        await listen(heard, answer)

    async def _crowd(self, visit: Visit, heard: Heard, line: Line) -> None:
        if visit.cuts == 1:
            await self._leave(visit, heard, line)
        elif visit.cuts == 2:
            await self._slow(visit, heard, line)
        else:
            await self._read(visit, heard, line)

    async def _resume(self, visit: Visit, heard: Heard, line: Line) -> None:
        answer = await self.ask(visit, heard, line)
        if answer.status == 200:
            await self._to_the_end(visit, heard, answer, line, f"/v1/streams/{answer.headers['x-stream-id']}")

    async def _background(self, visit: Visit, heard: Heard, line: Line) -> None:
        """As a browser would: 202, then an EventSource that reconnects."""
        answer = await self.ask(visit, heard, line)
        if answer.status != 202:
            return
        url = orjson.loads(await answer.body())["url"]
        heard.status = 0
        answer = await line.ask("GET", url)
        _begun(heard, answer)
        await self._to_the_end(visit, heard, answer, line, url)

    async def _to_the_end(self, visit: Visit, heard: Heard, answer: Answer, line: Line, path: str) -> None:
        """Its line breaks now and then; it comes back until it has the end."""
        heard.must_finish = True
        last = await listen(heard, answer, most=visit.after or 1)
        for cut in range(visit.cuts):
            if answer.end != "open":
                break
            line.leave(reset=visit.reset)
            await asyncio.sleep(visit.pause)
            line = await Line.open(self._port)
            heard.lines += 1
            answer = await line.ask("GET", path, None, **({"Last_Event_ID": last} if last else {}))
            if answer.status == 204:
                heard.end = "clean"
                break
            if answer.status != 200:
                heard.faults.append(f"its stream could not be read on: {answer.status} {(await answer.body())[:200]!r}")
                break
            last = await listen(heard, answer, most=None if cut == visit.cuts - 1 else visit.after or 1) or last
        line.leave()

    async def _cancel(self, visit: Visit, heard: Heard, line: Line) -> None:
        answer = await self.ask(visit, heard, line)
        if answer.status != 200:
            return
        await listen(heard, answer, most=visit.after)
        path = f"/v1/streams/{answer.headers['x-stream-id']}"
        async with asyncio.timeout(PATIENCE):
            other = await Line.open(self._port)
            deleted = await other.ask("DELETE", path)
            found = orjson.loads(await deleted.body())
            await listen(heard, answer)
            again = await other.ask("GET", path)
            other.leave()
        if deleted.status != 200 or again.status != 404:
            heard.faults.append(f"cancelled: {deleted.status} {found}, and then {again.status}")


async def listen(heard: Heard, answer: Answer, most: int | None = None, pause: float = 0.0) -> str:
    """Read so many events, or to the end, into the record; the id of the last one."""
    last = ""
    while most is None or most > 0:
        event = await answer.event()
        if event is None:
            _ended(heard, answer)
            return last
        last = event.number
        take(heard, event)
        most = most if most is None else most - 1
        if pause:
            await asyncio.sleep(pause)
    return last


def take(heard: Heard, event: Event) -> None:
    """One event into the record."""
    if heard.done or heard.error is not None:
        heard.faults.append(f"something behind its end: {event.text[:80]}")
    if event.text == "[DONE]":
        heard.done = True
        return
    chunk = orjson.loads(event.text)
    if (error := chunk.get("error")) is not None:
        heard.error = str(error["code"])
        return
    for choice in chunk["choices"]:
        heard.text += choice["delta"].get("content") or ""
        if (finish := choice.get("finish_reason")) is not None:
            heard.finishes.append(finish)
            heard.natives.append(str(choice.get("native_finish_reason")))


def _begun(heard: Heard, answer: Answer) -> None:
    heard.status, heard.streamed = answer.status, answer.streamed
    heard.cache = answer.headers.get("x-cache", "")


def _ended(heard: Heard, answer: Answer) -> None:
    heard.end = answer.end
    heard.faults += answer.faults


async def _refused(heard: Heard, answer: Answer) -> None:
    """An error envelope, or what a middleware answers by itself."""
    if answer.status < 400:
        return
    heard.error = orjson.loads(await answer.body())["error"]["code"]
    _ended(heard, answer)
