"""What workers ask each other, with two of them in one process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from proxy.call import Principal
from proxy.errors import Refused
from proxy.pipeline import Answer, Endpoint, Query
from proxy.workers.siblings import Siblings

Handler = Callable[[Query], Any]
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Pair:
    """Two workers. points: the endpoints of each, by path. asked: (worker, query), in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: list[dict[str, Endpoint]] = [{}, {}]
        self.asked: list[tuple[int, Query]] = []
        self.siblings = [Siblings(str(folder), number, 2, patience=0.2) for number in range(2)]

    def serve(self, path: str, *handlers: Handler, method: str = "DELETE", **fields: Any) -> None:
        """handlers: of each worker, made from the query."""
        for number, handler in enumerate(handlers):

            async def answer(query: Query, number: int = number, handler: Handler = handler) -> Answer:
                self.asked.append((number, query))
                made = handler(query)
                return made if isinstance(made, Answer) else await made

            self.points[number][path] = Endpoint(method, path, answer, **{"admin": True, **fields})

    async def ask(self, number: int, path: str, **fields: Any) -> Answer:
        point = self.points[number][path]
        params, headers = fields.get("params", {}), fields.get("headers", {})
        query = Query(point.method, path, params, headers, b"body", Principal("ops", admin=True))
        return await self.siblings[number].ask(point, query)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    found = Pair(tmp_path)
    async with AsyncExitStack() as stack:
        for number, sibling in enumerate(found.siblings):
            await stack.enter_async_context(sibling.answering(found.points[number].get))
        yield found


def said(value: Any, status: int = 200) -> Handler:
    return lambda query: Answer(json.dumps(value).encode(), status)


def page(requests: int, opened: int = 0) -> Handler:
    text = f"# TYPE asked counter\nasked_total {requests}\n# TYPE open gauge\nopen {opened}\n"
    return lambda query: Answer(text.encode(), content_type=PROMETHEUS)


async def refuse(query: Query) -> Answer:
    raise Refused("No.", param="key")


async def fail(query: Query) -> Answer:
    raise RuntimeError("broken")


async def silent(query: Query) -> Answer:
    await asyncio.Event().wait()
    raise AssertionError


async def test_the_other_worker_sees_the_same_question(pair: Pair) -> None:
    pair.serve("/admin/x", said({"deleted": 1}), said({"deleted": 2}))
    headers = {"X-Odd": "half \udce9", "Accept": "a"}
    assert json.loads((await pair.ask(1, "/admin/x", params={"key": "ä"}, headers=headers)).body) == {"deleted": 3}
    (_, own), (_, seen) = pair.asked
    assert (seen.method, seen.path, seen.params, seen.body, seen.principal) == (
        own.method, own.path, own.params, own.body, own.principal,
    )  # fmt: skip
    assert seen.headers == {"x-odd": "half \udce9", "accept": "a"}


async def test_get_lists_what_each_worker_says_with_the_worst_status(pair: Pair) -> None:
    pair.serve("/admin/x", said({"a": 1}), said([7], 503), method="GET")
    for number in range(2):
        answer = await pair.ask(number, "/admin/x")
        assert (answer.status, json.loads(answer.body)) == (
            503,
            {"workers": [{"worker": 0, "a": 1}, {"worker": 1, "answer": [7]}]},
        )


async def test_what_one_cannot_do_the_others_are_not_asked(pair: Pair) -> None:
    pair.serve("/admin/x", said({"why": "full"}, 507), said({"deleted": 1}))
    answer = await pair.ask(0, "/admin/x")
    assert (answer.status, json.loads(answer.body)) == (507, {"why": "full"})
    assert len(pair.asked) == 1


OWN_WORDS: list[tuple[dict[str, Any], int]] = [
    ({"admin": False}, 1),
    ({"merge": "one"}, 1),
    ({"admin": False, "merge": "sum"}, 2),
]


@pytest.mark.parametrize(("fields", "asked"), OWN_WORDS)
async def test_who_is_asked_is_the_endpoints_own_word(pair: Pair, fields: dict[str, Any], asked: int) -> None:
    pair.serve("/x", said({"n": 1}), said({"n": 1}), **fields)
    assert json.loads((await pair.ask(0, "/x")).body) == {"n": asked}


async def test_a_refusal_is_raised_before_anybody_else_is_asked(pair: Pair) -> None:
    pair.serve("/admin/x", refuse, refuse)
    with pytest.raises(Refused):
        await pair.ask(0, "/admin/x")
    assert [number for number, _ in pair.asked] == [0]


@pytest.mark.parametrize("other", [refuse, fail, silent, said({}, 500)])
async def test_a_worker_that_did_not_do_it_is_named(pair: Pair, other: Handler) -> None:
    pair.serve("/admin/x", said({"deleted": 1}), other)
    answer = await pair.ask(0, "/admin/x")
    assert (answer.status, json.loads(answer.body)) == (200, {"deleted": 1, "workers_not_reached": [1]})


async def test_workers_that_ask_each_other_at_once_both_get_the_sum(pair: Pair) -> None:
    pair.serve("/metrics", page(1), page(2), method="GET")
    answers = await asyncio.gather(*(pair.ask(number, "/metrics") for number in (0, 1, 0, 1)))
    assert {answer.body for answer in answers} == {answers[0].body}
    assert b"asked_total 3.0\n" in answers[0].body


async def test_a_silent_workers_counts_are_those_last_shown_and_its_gauges_are_missing(pair: Pair) -> None:
    pair.serve("/metrics", page(1, 10), page(2, 20), method="GET")
    assert b"\nopen 30.0\n" in (await pair.ask(0, "/metrics")).body
    pair.serve("/metrics", page(1, 10), silent, method="GET")
    body = (await pair.ask(0, "/metrics")).body
    assert b"asked_total 3.0\n" in body
    assert b"\nopen 10.0\n" in body
    assert b'penstock_worker_up{worker="1"} 0.0' in body


async def test_a_successor_goes_on_from_what_was_handed_over(pair: Pair) -> None:
    pair.serve("/metrics", page(5, 10), page(0), method="GET")
    await pair.siblings[0].hand_over()
    for _ in range(2):  # and so does its own successor
        pair.siblings[0] = successor = Siblings(str(pair.folder), 0, 2)
        async with successor.answering(pair.points[0].get):
            pair.serve("/metrics", page(1), page(0), method="GET")
            await successor.hand_over()
    body = (await pair.ask(0, "/metrics")).body
    assert b"asked_total 7.0\n" in body
    assert b"\nopen 0.0\n" in body


async def test_without_metrics_nothing_is_handed_over(pair: Pair) -> None:
    await pair.siblings[0].hand_over()
    assert list(pair.folder.glob("*.metrics")) == []


async def test_a_directory_that_is_gone_takes_no_answer_with_it(tmp_path: Path) -> None:
    """The supervisor was killed: its workers still serve what they have open."""
    pair = Pair(tmp_path / "gone")
    pair.serve("/metrics", page(4), page(0), method="GET")
    assert b"asked_total 4.0\n" in (await pair.ask(0, "/metrics")).body
