"""Conversation memory at sockets: what goes before a request, what becomes of its answer, whatever else happens.

Strategy: a gateway on SQLite; the provider says what it was asked, the endpoints say what is remembered.
The one rule: what is remembered is looked at through the gateway, which a client could do as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from middleware import TABLE
from middleware.memory import HEADER
from proxy.call import Call
from proxy.config import parse
from proxy.pipeline import Handler
from proxy.reply import Batch, Head, Reply, Trailer
from tests.support.gateway import Answer, ask, until
from tests.support.rawclient import connected
from tests.support.sessions import CONFIG, DONE, Here, event, remembering, says, stream_of, user
from tests.support.upstream import Held

Json = dict[str, Any]
# What goes before.


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_request_is_asked_with_what_was_said_before(tmp_path: Path, streamed: bool) -> None:
    async with remembering(tmp_path) as here:
        first = await here.say("q1", stream=streamed)
        assert (first.headers[HEADER], here.asked) == ("turns=0", [user("q1")])
        second = await here.say("q2", stream=not streamed)
        assert (second.headers[HEADER], here.asked) == ("turns=1", [user("q1"), says("a1"), user("q2")])
        third = await here.say([{"role": "system", "content": "S"}, user("q3")], stream=streamed)
        assert third.headers[HEADER] == "turns=2"
        assert here.asked == [
            {"role": "system", "content": "S"}, user("q1"), says("a1"), user("q2"), says("a2"), user("q3"),
        ]  # fmt: skip
        assert await here.turns() == [[user("q1"), says("a1")], [user("q2"), says("a2")], [user("q3"), says("a3")]]


async def test_a_request_without_a_session_has_no_part_in_it(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1")
        answer = await here.say("q2", None, saveToMemory=True)
        assert HEADER not in answer.headers
        assert here.asked == [user("q2")]
        assert (await here.get("/v1/sessions"))[1]["data"][0]["turns"] == 1


async def test_the_budget_of_turns_and_tokens(tmp_path: Path) -> None:
    async with remembering(tmp_path, "max_turns: 2") as here:
        for question in ("q1", "q2", "q3"):
            await here.say(question)
        assert (await here.say("q4")).headers[HEADER] == "turns=2"
        assert here.asked[0] == user("q2")
    async with remembering(tmp_path, "max_tokens: 10") as here:
        await here.say("a question of twenty tokens or so, as they are counted here, which is by the byte", "t")
        await here.say("short", "t")
        assert (await here.say("next", "t")).headers[HEADER] == "turns=1"
        assert here.asked[0] == user("short")


PLACES = [
    lambda session: {"sessionId": session},
    lambda session: {"session_id": session},
    lambda session: {"sessionId": session, "session_id": session},
    lambda session: {"penstock": {"sessionId": session}},
    lambda session: {"orq": {"session_id": session}},
]


@pytest.mark.parametrize("place", PLACES)
async def test_wherever_the_session_is_named(tmp_path: Path, place: Any) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1", None, **place("s"))
        assert set(here.upstream.asked[-1].json) <= {"model", "messages", "stream", "stream_options"}
        await here.say("q2", None, **place("s"))
        assert here.asked == [user("q1"), says("a1"), user("q2")]


async def test_a_thread_is_a_session_only_where_the_operator_says_so(tmp_path: Path) -> None:
    thread = {"orq": {"thread": {"id": "t", "tags": ["a"]}}}
    async with remembering(tmp_path) as here:
        assert HEADER not in (await here.say("q1", None, **thread)).headers
    async with remembering(tmp_path, "threads: true") as here:
        await here.say("q1", None, **thread)
        assert (await here.say("q2", None, thread={"id": "t"})).headers[HEADER] == "turns=1"
        assert (await here.say("q3", "s", **thread)).headers[HEADER] == "turns=0", "what is named a session comes first"
        embedded = await here.get("/v1/sessions/t")
        assert embedded[1]["turns"] == 2


@pytest.mark.parametrize("name", ["saveToMemory", "save_to_memory"])
async def test_what_is_not_to_be_saved_is_only_read(tmp_path: Path, name: str) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1")
        await here.say("q2", **{name: False})
        assert here.asked == [user("q1"), says("a1"), user("q2")]
        await here.say("q3", **{name: True})
        assert here.asked == [user("q1"), says("a1"), user("q3")]


FAULTS: list[tuple[Json, str]] = [
    ({"sessionId": ""}, "sessionId"),
    ({"sessionId": 7}, "sessionId"),
    ({"session_id": "a" * 257}, "session_id"),
    ({"sessionId": "a\nb"}, "sessionId"),
    ({"sessionId": "\u202e"}, "sessionId"),
    ({"sessionId": ".."}, "sessionId"),
    ({"orq": {"sessionId": ["s"]}}, "orq.sessionId"),
    ({"sessionId": "s", "session_id": "t"}, "session_id"),
    ({"sessionId": "s", "saveToMemory": "yes"}, "saveToMemory"),
    ({"saveToMemory": 1}, "saveToMemory"),
    ({"sessionId": "s", "penstock": {"save_to_memory": 0}}, "penstock.save_to_memory"),
    ({"sessionId": "s", "saveToMemory": True, "save_to_memory": False}, "save_to_memory"),
    ({"thread": {"id": 7}}, "thread.id"),
]


@pytest.mark.parametrize(("fields", "param"), FAULTS)
async def test_what_cannot_be_a_session_is_refused_before_anybody_is_asked(tmp_path: Path, fields: Json, param: str) -> None:
    async with remembering(tmp_path, "threads: true") as here:
        answer = await here.say("q1", None, **fields)
        assert (answer.status, answer.json["error"]["param"]) == (400, param)
        assert here.upstream.asked == []


@pytest.mark.parametrize(("path", "body"), [("completions", {"prompt": "q"}), ("embeddings", {"input": "q"})])
async def test_only_chat_has_a_memory(tmp_path: Path, path: str, body: Json) -> None:
    async with remembering(tmp_path, "threads: true") as here:
        refused = await post(here, path, {"model": "text/m", "sessionId": "s", **body})
        assert (refused.status, refused.json["error"]["param"]) == (400, "sessionId")
        assert here.upstream.asked == []
        assert (await post(here, path, {"model": "text/m", "thread": {"id": "t"}, **body})).status != 400, "a label there"


async def post(here: Here, path: str, body: Json) -> Answer:
    return await ask(here.gateway.port, body, f"/v1/{path}")


async def test_a_client_that_sends_the_history_itself_is_not_told_it_twice(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1")
        await here.say([user("q1"), says("a1"), user("q2")])
        answer = await here.say([user("q1"), says("a1"), user("q2"), says("a2"), user("q3")])
        assert answer.headers[HEADER] == "turns=0, sent=2"
        assert here.asked == [user("q1"), says("a1"), user("q2"), says("a2"), user("q3")]
        assert await here.turns() == [[user(f"q{n}"), says(f"a{n}")] for n in (1, 2, 3)]
        await here.say("q4")
        assert len(here.asked) == 7


CALL: Json = {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
OPENING: Json = {"tool_calls": [{"index": 0, **CALL, "function": {"name": "weather", "arguments": ""}}]}
ARGUMENTS: Json = {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "Ulm"}'}}]}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_a", "content": "Rain."}


async def test_a_tool_call_and_its_result_stay_together(tmp_path: Path) -> None:
    """The client sends nothing but what is new: the result of the call that it was answered."""
    async with remembering(tmp_path, "max_turns: 2") as here:
        await here.say("q1")
        here.provider.next = stream_of(OPENING, ARGUMENTS, finish="tool_calls")
        await here.say("q2")
        await here.say([RESULT])
        assert here.asked == [user("q1"), says("a1"), user("q2"), CALLING, RESULT]
        await here.say("q3")
        assert here.asked == [user("q2"), CALLING, RESULT, says("a3"), user("q3")]
        await here.say("q4")
        assert here.asked == [user("q3"), says("a4"), user("q4")], "of two turns that belong together not one alone"


async def test_a_call_that_the_client_never_answered_is_left_out(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        here.provider.next = stream_of({"content": "Let me see."}, OPENING, ARGUMENTS, finish="tool_calls")
        await here.say("q1")
        await here.say("never mind")
        assert here.asked == [user("q1"), says("Let me see."), user("never mind")]


# What is remembered.


async def test_of_several_choices_the_first(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        here.provider.next = [
            event({"content": "no"}, index=1), event({"content": "yes"}), event({}, "stop"), event({}, "stop", index=1), DONE,
        ]  # fmt: skip
        assert (await here.say("q1", n=2)).done
        assert await here.turns() == [[user("q1"), says("yes")]]


@pytest.mark.parametrize("kept", [False, True])
async def test_reasoning_only_where_it_is_wanted(tmp_path: Path, kept: bool) -> None:
    async with remembering(tmp_path, f"keep_reasoning: {str(kept).lower()}") as here:
        here.provider.next = stream_of({"reasoning_content": "Hm. "}, {"reasoning_content": "Well."}, {"content": "Yes."})
        await here.say("q1")
        ((_, answer),) = await here.turns()
        assert answer == says("Yes.") | ({"reasoning_content": "Hm. Well."} if kept else {})


async def test_a_large_image_is_remembered_as_a_mark(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9000}}
    question = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}
    mark = {"type": "text", "text": "[image left out]"}
    async with remembering(tmp_path) as here:
        await here.say([question])
        assert here.asked == [question]
        await here.say("Sure?")
        assert here.asked[0]["content"] == [{"type": "text", "text": "What is this?"}, mark]
    async with remembering(tmp_path, "max_part_bytes: 1MiB") as here:
        await here.say([question], "t")
        await here.say("Sure?", "t")
        assert here.asked[0] == question


async def test_a_turn_that_is_too_large_is_not_remembered(tmp_path: Path) -> None:
    async with remembering(tmp_path, "max_turn_bytes: 1KiB") as here:
        here.provider.next = stream_of(*({"content": "word " * 100} for _ in range(400)))
        assert len((await here.say("q1")).text) == 200_000
        assert (await here.say("q2" * 600)).done
        assert here.counts["turns_total/too_large"] == 2
        assert await here.turns() == []


async def test_a_reply_from_the_cache_is_a_turn_and_its_question_the_whole_conversation(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        cached = {"cache": {"type": "exact_match"}}
        assert (await here.say("q1", "s", **cached)).headers["X-Cache"] == "miss"
        assert (await here.say("q1", "t", **cached)).headers["X-Cache"] == "hit"
        assert await here.turns("t") == [[user("q1"), says("a1")]]
        assert (await here.say("q1", "t", **cached)).headers["X-Cache"] == "miss", "another question, with what was before it"
        assert here.asked == [user("q1"), says("a1"), user("q1")]


@pytest.mark.parametrize("keep", [False, True])
async def test_a_broken_reply_is_kept_only_where_the_operator_says_so(tmp_path: Path, keep: bool) -> None:
    async with remembering(tmp_path, f"on_partial: {'keep' if keep else 'drop'}") as here:

        async def cut(asked: Any, line: Any) -> None:
            await line.head()
            await line.chunk(event({"content": "Half an"}))
            line.hang_up()

        here.upstream.answer = cut
        answer = await here.say("q1")
        assert not answer.done
        status, found = await here.get("/v1/sessions/s")
        if keep:
            assert [(turn["partial"], turn["messages"]) for turn in found["data"]] == [(True, [user("q1"), says("Half an")])]
            assert here.counts["turns_total/partial"] == 1
        else:
            assert status == 404
            assert here.counts["turns_total/broken"] == 1


@pytest.mark.parametrize("way", ["fin", "rst"])
async def test_a_client_that_leaves_leaves_nothing_behind(tmp_path: Path, way: str) -> None:
    async with remembering(tmp_path) as here:
        held = Held(event({"content": "Half an"}), b"".join(stream_of({"content": " answer"})))
        here.upstream.answer = held
        body = {"model": "openai/m", "stream": True, "sessionId": "s", "messages": [user("q1")]}
        with await connected(here.gateway.port) as client:
            await client.post(body)
            await client.read_until(b"Half an")
            client.leave(way)
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
            await until(lambda: here.counts.get("turns_total/broken"))
        assert await here.turns() == []
        here.upstream.answer = here.provider
        await here.say("q2")
        assert here.asked == [user("q2")]


@pytest.mark.parametrize(
    "outer", ["  - resume: {mode: all}", "  - disconnect: {on_disconnect: finish_and_cache}"], ids=["resume", "disconnect"]
)
async def test_a_reply_that_is_read_on_without_its_client_is_remembered(tmp_path: Path, outer: str) -> None:
    async with remembering(tmp_path, outer=outer) as here:
        held = Held(event({"content": "Half an"}), b"".join(stream_of({"content": " answer"})))
        here.upstream.answer = held
        body = {"model": "openai/m", "stream": True, "sessionId": "s", "messages": [user("q1")]}
        with await connected(here.gateway.port) as client:
            await client.post(body)
            await client.read_until(b"Half an")
            client.leave("rst")
            await until(lambda: here.gateway.edge.open_calls == 0)
            held.go.set()
            await until(lambda: here.counts.get("turns_total/saved"))
        assert await here.turns() == [[user("q1"), says("Half an answer")]]


async def test_a_refusal_and_a_providers_error_leave_nothing_behind(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        assert (await here.say("q1", model="demo/fail-500")).status == 500
        assert (await here.say("q1", model="nobody/m")).status == 404
        assert await here.turns() == []


async def test_in_postgres_as_well(database: str) -> None:
    config = CONFIG.replace('data_dir: "{folder}"\nstore: {{', 'store: {{url: "{folder}", ')
    async with remembering(database, config=config) as here:
        alice, bob = ({"X-ORQ-IDENTITY-ID": name} for name in ("alice", "bob"))
        answers = await asyncio.gather(*(here.say(f"q{number}", "ö/1", headers=alice) for number in range(5)))
        assert all(answer.done for answer in answers)
        assert (await here.say("q5", "ö/1", headers=alice)).headers[HEADER] == "turns=5"
        assert (await here.say("q1", "ö/1", headers=bob)).headers[HEADER] == "turns=0"
        assert len(await here.turns("ö/1", headers=alice)) == 6
        assert (await here.get("/v1/sessions/%C3%B6%2F1", "DELETE", headers=alice))[0] == 200
        assert len(await here.turns("ö/1", headers=bob)) == 1


# The store fails, or is slow.


async def test_without_its_store_the_gateway_answers_without_memory(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1")
        store = here.faulty()
        store.down = True
        answer = await here.say([user("q1"), says("a1"), user("q2")])
        assert (answer.done, answer.headers[HEADER]) == (True, "unavailable")
        assert here.asked == [user("q1"), says("a1"), user("q2")]
        assert here.counts["lookups_total/unavailable"] == 1
        store.down = False
        await until(lambda: not here.memory.health()["waiting"])
        assert (await here.say("q3")).headers[HEADER].startswith("turns=")


async def test_or_refuses_where_the_operator_says_so(tmp_path: Path) -> None:
    async with remembering(tmp_path, "on_unavailable: refuse") as here:
        here.faulty().down = True
        answer = await here.say("q1")
        assert (answer.status, answer.json["error"]["code"]) == (503, "memory_unavailable")
        assert "Retry-After" in answer.headers
        assert "database" not in answer.body.decode()
        assert here.upstream.asked == []


async def test_the_end_of_a_stream_does_not_wait_for_the_store_but_the_sessions_next_request_does(tmp_path: Path) -> None:
    async with remembering(tmp_path, "timeout: 10s") as here:
        store = here.faulty()
        store.go.clear()
        assert (await here.say("q1")).done
        assert (await here.say("other", "t")).headers[HEADER] == "turns=0", "another session's does not"
        next = asyncio.create_task(here.say("q2"))
        await until(lambda: here.gateway.edge.open_calls == 1)
        assert len(here.upstream.asked) == 2
        store.go.set()
        assert (await next).headers[HEADER] == "turns=1"
        assert here.asked == [user("q1"), says("a1"), user("q2")]


async def test_it_waits_no_longer_than_the_timeout(tmp_path: Path) -> None:
    async with remembering(tmp_path, "timeout: 20ms") as here:
        store = here.faulty()
        store.go.clear()
        await here.say("q1")
        answer = await here.say("q2")
        assert (answer.done, answer.headers[HEADER], here.asked) == (True, "unavailable", [user("q2")])
        assert (await here.get("/v1/sessions/s"))[0] == 503
        store.go.set()
        await until(lambda: not here.memory.health()["waiting"])
        assert await here.turns() == [[user("q1"), says("a1")], [user("q2"), says("a2")]], "in the order of their ends"


async def test_a_save_is_tried_again_and_then_given_up_without_a_word_of_its_content(tmp_path: Path, lines: list[Json]) -> None:
    async with remembering(tmp_path) as here:
        store = here.faulty()
        store.down = True
        await here.say("a secret question")
        await until(lambda: here.counts.get("turns_total/failed"))
        assert (store.tries, len(here.paused)) == (4, 3)
        assert here.paused == sorted(here.paused)
        told = [line for line in lines if line["event"] == "a turn was not saved"]
        assert [line["why"] for line in told] == ["the words of the database"]
        assert "secret" not in json.dumps(lines)
        store.down = False
        assert (await here.say("q2")).headers[HEADER] == "turns=0"


async def test_what_fails_for_a_moment_is_saved_all_the_same(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        store = here.faulty()
        store.go.clear()
        await here.say("q1")
        store.faults = 1
        store.go.set()
        assert (await here.say("q2")).headers[HEADER] == "turns=1"
        assert len(here.paused) == 1
        assert "turns_total/failed" not in here.counts


async def test_a_save_that_fails_again_is_not_waited_for(tmp_path: Path) -> None:
    async with remembering(tmp_path, "timeout: 60s") as here:
        store = here.faulty()
        here.rested, store.go = asyncio.Semaphore(1), asyncio.Event()
        await here.say("q1")
        store.faults = 2
        store.go.set()
        await until(lambda: len(here.paused) == 2)
        assert (await here.say("q2", saveToMemory=False)).headers[HEADER] == "unavailable"
        assert (await here.say("q3", "t")).headers[HEADER] == "turns=0"
        assert [found["id"] for found in (await here.get("/v1/sessions"))[1]["data"]] == ["t"]
        assert (await here.get("/v1/sessions/s", "DELETE"))[0] == 503
        here.rested.release()
        await until(lambda: not here.memory.health()["waiting"])
        assert (await here.say("q4")).headers[HEADER] == "turns=1"


async def test_what_waits_is_written_before_the_gateway_ends(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        store = here.faulty()
        store.go.clear()
        for question in ("q1", "q2"):
            await here.say(question, "s" + question, stream=False)
        asyncio.get_running_loop().call_later(0.02, store.go.set)
    async with remembering(tmp_path) as here:
        assert await here.turns("sq1") == [[user("q1"), says("a1")]]
        assert await here.turns("sq2") == [[user("q2"), says("a2")]]


async def test_what_cannot_be_written_then_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[Json]) -> None:
    monkeypatch.setattr("middleware.memory.LAST", 0.01)
    async with remembering(tmp_path) as here:
        here.faulty().go.clear()
        await here.say("q1")
        memory = here.memory
    assert memory._saves.counts["failed"] == 1
    assert memory._saves.waiting == 0
    assert [line["why"] for line in lines if line["event"] == "a turn was not saved"] == ["the gateway was stopped"]


async def test_no_more_turns_wait_than_there_is_room_for(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        store = here.faulty()
        store.go.clear()
        here.memory._saves._most = 2
        for number in range(4):
            assert (await here.say("q", f"s{number}")).done
        assert (here.counts["waiting"], here.counts["turns_total/failed"]) == (2, 2)
        store.go.set()


async def test_two_requests_of_one_session_at_once_lose_nothing(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        answers = await asyncio.gather(*(here.say(f"q{number}") for number in range(10)))
        assert all(answer.done for answer in answers)
        found = await here.turns()
        assert sorted(turn[0]["content"] for turn in found) == [f"q{number}" for number in range(10)]
        assert {turn[1]["content"] for turn in found} == {f"a{number}" for number in range(1, 11)}


async def test_a_client_that_repeats_its_request_id_loses_nothing(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        for question in ("q1", "q2"):
            await here.say(question, headers={"X-Request-Id": "always-the-same"})
        assert await here.turns() == [[user("q1"), says("a1")], [user("q2"), says("a2")]]


class Closed:
    """Answers by itself, as an accepted job does."""

    async def __call__(self, call: Call, next: Handler) -> Reply:
        async def batches() -> AsyncIterator[Batch]:
            yield Batch([{"object": "job"}])

        return Reply(Head("", status=202), batches(), Trailer(), whole=True)


async def test_a_middlewares_own_answer_is_no_turn(tmp_path: Path, lines: list[Json]) -> None:
    config = CONFIG.replace("  - coalesce\n", "  - closed\n")
    async with remembering(tmp_path, config=config, table={"closed": Closed}) as here:
        answer = await here.say("q1")
        assert (answer.status, answer.json) == (202, {"object": "job"})
        assert HEADER not in answer.headers
        assert here.counts == {"lookups_total/new": 1}


# One config after another, and the figures.


async def test_a_reload_changes_the_options_and_loses_nothing(tmp_path: Path) -> None:
    async with remembering(tmp_path, "timeout: 10s") as here:
        store = here.faulty()
        store.go.clear()
        await here.say("q1")
        again = CONFIG.format(url=here.upstream.url, folder=tmp_path, options="max_turns: 1, timeout: 9s", outer="")
        before = here.memory
        await here.gateway.reload(parse(again, {}, TABLE))
        assert here.memory is not before
        waiting = asyncio.create_task(here.say("q2"))
        await until(lambda: here.gateway.edge.open_calls == 1)
        store.go.set()
        assert (await waiting).headers[HEADER] == "turns=1"
        assert (await here.say("q3")).headers[HEADER] == "turns=1"
        assert here.asked[0] == user("q2")
        await until(lambda: here.counts["turns_total/saved"] == 3)


async def test_its_figures(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        for question in ("q1", "q2", "q3"):
            await here.say(question)
        await here.turns()
        assert here.counts == {
            "turns_total/saved": 3, "lookups_total/found": 2, "lookups_total/new": 1, "turns_put_in_total": 3,
        }  # fmt: skip
        async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{here.gateway.port}/metrics") as response:
            assert 'penstock_memory_turns_total{result="saved"} 3.0' in await response.text()
        verbose = (await here.get("/readyz?verbose"))[1]
        assert verbose["middleware"]["memory"] == {"waiting": 0, "failed": 0, "unavailable": 0}
