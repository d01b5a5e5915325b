"""What one worker asks the others: an endpoint's answer, so that any of them can answer for all.

Strategy: every worker answers for itself on a unix socket in the workers' private directory (mode 0700): one connection per
question, a line of JSON and a body each way. Who was asked by a client answers with the others' answers merged. Who does not
answer within a second is reported, not waited for: a dead one has nothing to tell or to forget, and a busy one will do what it
was asked when it comes to it.
Counters outlive their worker: a page of metrics is written to the worker's file before anybody is shown it, and the successor
starts with the counts of that file. So no count that was once shown is ever taken back; a killed worker loses what came after its
last page (at most `HAND_OVER_SECONDS`).
The one rule: sums are made in the order of the workers' numbers, so that all of them show the same.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from proxy.call import Principal
from proxy.errors import GatewayError
from proxy.pipeline import Answer, Endpoint, Merge, Query, ask_one
from proxy.workers.answers import added
from proxy.workers.exposition import Page

log = structlog.get_logger("penstock")

METRICS = "/metrics"
PATIENCE_SECONDS = 1.0
LINE_LIMIT = 2**20
Points = Callable[[str], Endpoint | None]


class Siblings:
    """All workers, as worker `number` of `count` sees them. directory: the private one."""

    def __init__(self, directory: str, number: int, count: int, patience: float = PATIENCE_SECONDS) -> None:
        self._directory = Path(directory)
        self._number = number
        self._others = [other for other in range(count) if other != number]
        self._patience = patience
        self._paging = asyncio.Lock()
        self._points: Points = lambda path: None
        self._inherited = Page()
        for _ in self._inherited.add(self._remembered(number)):
            pass
        self._inherited.keep_lasting()

    @asynccontextmanager
    async def answering(self, points: Points) -> AsyncIterator[None]:
        """Answer the others. points: this gateway's endpoints, by path."""
        self._points = points
        path = self._directory / f"{self._number}.sock"
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._answer, path, limit=LINE_LIMIT)
        try:
            yield
        finally:
            server.close()

    async def ask(self, point: Endpoint, query: Query) -> Answer:
        """The answer of all workers. Raises what this one's handler raises, before any other is asked."""
        own = await self._own(point, query)
        merge = _merge(point)
        if merge == "one" or (own.status >= 400 and merge != "each"):
            return own
        found = await asyncio.gather(*(self._other(other, query) for other in self._others))
        answers = dict(sorted([(self._number, own), *zip(self._others, found, strict=True)]))
        if point.path == METRICS and _is_metrics(own):
            return await self._page(own, answers)
        return _summed(own, answers) if merge == "sum" else _listed(own, answers)

    async def hand_over(self) -> None:
        """Write this worker's counts to its file."""
        if (point := self._points(METRICS)) is not None:
            try:
                await self._own(point, Query("GET", METRICS, {}, {}, b"", Principal("supervisor", admin=True)))
            except Exception:
                log.exception("metrics not handed over")

    # This worker

    async def _own(self, point: Endpoint, query: Query) -> Answer:
        """This worker's answer. Metrics: with the counts of its predecessors, and its number on what is about its process."""
        if point.path != METRICS:
            return await ask_one(point, query)
        # One at a time, so that an older page never replaces a newer one.
        async with self._paging:
            answer = await ask_one(point, query)
            if not _is_metrics(answer):
                return answer
            page = Page()
            for _ in page.add(answer.body.decode(), str(self._number)):
                await asyncio.sleep(0)
            page.absorb(self._inherited)
            text = await _written(page)
            self._remember(text)
        return _altered(answer, text)

    def _remember(self, text: bytes) -> None:
        path = self._directory / f"{self._number}.metrics"
        with suppress(OSError):  # the directory goes when the supervisor does
            path.with_suffix(".new").write_bytes(text)
            os.replace(path.with_suffix(".new"), path)

    def _remembered(self, number: int) -> str:
        with suppress(OSError):
            return (self._directory / f"{number}.metrics").read_text()
        return ""

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head, body = await _received(reader)
            query = Query(**{**head, "body": body, "principal": Principal(**head["principal"])})
            answer = await self._for(query)
            await _sent(writer, {"status": answer.status, "content_type": answer.content_type}, answer.body)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the asker has lost patience
        finally:
            writer.close()

    async def _for(self, query: Query) -> Answer:
        try:
            if (point := self._points(query.path)) is None:
                return Answer(status=404)
            return await self._own(point, query)
        except GatewayError as error:
            return Answer(orjson.dumps({"error": error.envelope()}), error.status)
        except Exception:
            log.exception("request of another worker failed", path=query.path[:200])
            return Answer(status=500)

    # The others

    async def _other(self, number: int, query: Query) -> Answer | None:
        """Another worker's answer; None where there is none in time."""
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(self._patience):
                return await self._asked(number, query)
        return None

    async def _asked(self, number: int, query: Query) -> Answer:
        path = self._directory / f"{number}.sock"
        reader, writer = await asyncio.open_unix_connection(path, limit=LINE_LIMIT)
        try:
            await _sent(writer, _head(query), query.body)
            found, body = await _received(reader)
            return Answer(body, found["status"], found["content_type"])
        finally:
            writer.close()

    async def _page(self, own: Answer, answers: Mapping[int, Answer | None]) -> Answer:
        """The sum of all pages; of a worker that does not answer what it counted, as far as it is known."""
        page, up = Page(), {}
        for number, answer in answers.items():
            here = answer is not None and answer.status == 200
            part = Page()
            for _ in part.add(answer.body.decode() if answer is not None and here else self._remembered(number)):
                await asyncio.sleep(0)
            if not here:
                part.keep_lasting()
            page.absorb(part)
            up[f'penstock_worker_up{{worker="{number}"}}'] = float(here)
        page.gauge("penstock_worker_up", "Whether the worker answered this scrape; if not, its gauges are missing.", up)
        return _altered(own, await _written(page))


def _merge(point: Endpoint) -> Merge:
    if point.merge is not None:
        return point.merge
    if not point.admin:
        return "one"
    return "each" if point.method == "GET" else "sum"


def _is_metrics(answer: Answer) -> bool:
    return answer.status == 200 and answer.content_type.startswith("text/plain; version=0.0.4")


def _altered(answer: Answer, body: bytes, status: int | None = None) -> Answer:
    return Answer(body, status or answer.status, answer.content_type, answer.headers)


def _summed(own: Answer, answers: Mapping[int, Answer | None]) -> Answer:
    """One object with the numbers added up; `workers_not_reached` lists those that did not answer, or refused."""
    good = [answer for answer in answers.values() if answer is not None and answer.status < 400]
    found = added([_json(answer) for answer in good])
    silent = [number for number, answer in answers.items() if answer is None or answer.status >= 400]
    if silent and isinstance(found, dict):
        found = {**found, "workers_not_reached": silent}
    return _altered(own, orjson.dumps(found) if own.body else b"")


def _listed(own: Answer, answers: Mapping[int, Answer | None]) -> Answer:
    """`{"workers": [{"worker": 0, …}, {"worker": 1, "error": …}]}`, with the worst status of all."""
    silent = {"error": "does not answer"}
    found = []
    for number, answer in answers.items():
        said = silent if answer is None else _json(answer)
        found.append({"worker": number, **(said if isinstance(said, dict) else {"answer": said})})
    status = max(answer.status for answer in answers.values() if answer is not None)
    return _altered(own, orjson.dumps({"workers": found}), status)


def _json(answer: Answer) -> Any:
    try:
        return orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return {}


async def _written(page: Page) -> bytes:
    parts = []
    for part in page.write():
        parts.append(part)
        await asyncio.sleep(0)
    return "".join(parts).encode()


# One message: a line of JSON that ends with the size of the body, then the body


def _head(query: Query) -> dict[str, Any]:
    """All of a question but its body; headers by lower-case name."""
    who = query.principal
    principal = {"name": who.name, "admin": who.admin, "scope": who.scope, "facts": dict(who.facts)}
    headers = {name.lower(): value for name, value in query.headers.items()}
    lines = {"method": query.method, "path": query.path, "params": dict(query.params), "headers": headers}
    return {**lines, "principal": principal}


async def _sent(writer: asyncio.StreamWriter, head: dict[str, Any], body: bytes) -> None:
    # Not orjson: a client's headers may hold half a character.
    writer.write(json.dumps({"head": head, "size": len(body)}, default=str).encode() + b"\n" + body)
    await writer.drain()


async def _received(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    message = json.loads(await reader.readuntil(b"\n"))
    return message["head"], await reader.readexactly(message["size"])


__all__ = ["Siblings"]
