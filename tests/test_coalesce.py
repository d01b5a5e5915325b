"""Single flight: how often the provider is asked, who gets what, and who ends it.

Strategy: a provider that speaks on command behind a gateway with the middleware of config.yaml; clients are real sockets.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from structlog.testing import capture_logs

from middleware import TABLE
from middleware.coalesce import Coalesce
from proxy.app import Gateway
from proxy.config import parse
from proxy.shared import SharedCall
from tests.support.gateway import Answer, Json, ask, chat, until
from tests.support.rawclient import connected
from tests.support.spoken import USAGE, WORDS, Spoken, ending, figure, nothing_left, ours, word
from tests.support.upstream import Upstream, stream, whole

CONFIG = """
server: {{port: 0, drain_timeout: 0s, write_timeout: {write}}}
default_provider: openai
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  text: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789", completions: ["*"]}}
middleware:
  - metrics
{auth}
  - tracking
  - coalesce: {{{options}}}
  - cache
{limits}
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: 5s, call_timeout: 10s}}
"""
KEYS = """  - auth:
      callers_keys: {{}}
      keys: [{{name: a, key: "sk-penstock-aaaaaaaaaaaaaaaa", admin: true}}, {{name: b, key: "sk-penstock-bbbbbbbbbbbbbbbb"}}]"""
TEXT = "".join(WORDS)
CACHED: Json = {"cache": True}


class Rig:
    def __init__(self, running: Gateway, upstream: Upstream, said: Spoken) -> None:
        self.running, self.upstream, self.said = running, upstream, said
        self.coalesce = next(layer for layer in running.layers if isinstance(layer, Coalesce))

    def ask(self, path: str = "/v1/chat/completions", headers: Json | None = None, **fields: Any) -> asyncio.Task[Answer]:
        return asyncio.create_task(ask(self.running.port, chat(**{**CACHED, **fields}), path, headers))

    async def waiting(self, count: int) -> None:
        """So many calls are open."""
        await until(lambda: self.running.edge.open_calls == count)
        await until(lambda: self.said.calls or len(self.upstream.asked))


def running_with(config: str) -> AbstractAsyncContextManager[Gateway]:
    return Gateway(parse(config, {}, TABLE), settle=0.2)


@asynccontextmanager
async def rig(options: str = "", said: Spoken | None = None, write: str = "60s", **fields: str) -> AsyncIterator[Rig]:
    said = said or Spoken()
    more = {"auth": "", "limits": "", "options": options, "write": write, **fields}
    async with Upstream(said) as upstream, running_with(CONFIG.format(url=upstream.url, **more)) as running:
        yield Rig(running, upstream, said)


# --- one call for many


async def test_equal_requests_share_one_call_and_what_it_was_is_the_cache_entry() -> None:
    async with rig() as r:
        first = r.ask()
        await r.waiting(1)
        others = [r.ask() for _ in range(4)]
        await r.waiting(5)
        await r.said.all()
        answers = [await first, *[await other for other in others]]
        assert [answer.headers["X-Cache"] for answer in answers] == ["miss", *["joined"] * 4]
        assert {answer.body for answer in answers} == {answers[0].body}
        assert answers[0].done
        assert answers[0].text == TEXT
        assert (await r.ask()).headers["X-Cache"] == "hit"
        assert r.said.calls == 1


async def test_a_late_joiner_gets_the_prefix_at_once_and_then_each_chunk_as_it_comes() -> None:
    async with rig() as r:
        first = r.ask()
        await r.said.say(2)
        await r.waiting(1)
        with await connected(r.running.port) as late:
            await late.post(chat(**CACHED))
            await late.read_until(b"two ")
            assert b"X-Cache: joined" in late.received
            assert b"three" not in late.received
            await r.said.say()
            await late.read_until(b"three")
            assert b"[DONE]" not in late.received
            await r.said.say()
            await late.read_until(b"[DONE]")
        assert (await first).done
        assert r.said.calls == 1


@pytest.mark.parametrize("said", [0, 2])
async def test_the_leaders_leaving_does_not_end_it_for_the_others(said: int) -> None:
    async with rig() as r:
        with await connected(r.running.port) as leader:
            await leader.post(chat(**CACHED))
            await r.waiting(1)
            await r.said.say(said)
            if said:
                await leader.read_until(b"two ")
            other = r.ask()
            await r.waiting(2)
            leader.leave("rst")
            await until(lambda: r.running.edge.open_calls == 1)
        await r.said.all()
        answer = await other
        assert (answer.headers["X-Cache"], answer.text, answer.done) == ("joined", TEXT, True)
        assert (await r.ask()).headers["X-Cache"] == "hit", "the recorder has survived the leader"
        assert (r.said.calls, r.said.closed) == (1, 0)


@pytest.mark.parametrize("said", [0, 2])
async def test_when_the_last_one_leaves_the_upstream_is_closed_and_nothing_is_left(said: int) -> None:
    async with rig() as r:
        tasks = ours()
        with await connected(r.running.port) as one, await connected(r.running.port) as two:
            await one.post(chat(**CACHED))
            await r.waiting(1)
            await two.post(chat(**CACHED))
            await r.waiting(2)
            await r.said.say(said)
            if said:
                await one.read_until(b"two ")
                await two.read_until(b"two ")
            one.leave("fin")
            await until(lambda: r.running.edge.open_calls == 1)
            assert r.said.closed == 0
            two.leave("fin")
            await until(lambda: r.said.closed == 1)
        await until(lambda: r.coalesce.health() == {"flights": 0})
        await until(lambda: r.upstream.open == 0)
        await nothing_left(r.running, tasks)


async def test_an_ended_flight_leaves_no_object_behind() -> None:
    async with rig() as r:
        asked = [r.ask(), r.ask()]
        await r.waiting(2)
        gone: list[Any] = [weakref.ref(shared) for shared in r.coalesce._open.values()]
        await r.said.say(2)
        await until(lambda: gone[0]().flight is not None)
        gone.append(weakref.ref(gone[0]().flight))
        await r.said.all()
        for one in asked:
            assert (await one).done
        await until(lambda: r.running.edge.open_calls == 0)
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
        assert not [one for one in gc.get_objects() if isinstance(one, SharedCall)]


# --- errors


async def test_an_error_before_the_first_chunk_reaches_all_alike_and_the_next_asks_again() -> None:
    async with rig() as r:
        gate = asyncio.Event()
        refuse = whole(b'{"error": {"message": "Slow down.", "code": "slow"}}', 429)

        async def answer(asked: Any, line: Any) -> None:
            await gate.wait()
            await refuse(asked, line)

        r.upstream.answer = answer
        asked = [r.ask() for _ in range(3)]
        await r.waiting(3)
        gate.set()
        answers = [await one for one in asked]
        assert [answer.status for answer in answers] == [429] * 3
        assert {answer.body for answer in answers} == {answers[0].body}
        assert len(r.upstream.asked) == 1
        assert (await r.ask()).status == 429
        assert len(r.upstream.asked) == 2


async def test_a_break_in_the_middle_reaches_all_as_an_error_chunk() -> None:
    async with rig() as r:
        asked = [r.ask(), r.ask()]
        await r.waiting(2)
        await r.said.say(2)
        await until(lambda: bool(r.upstream.lines))
        await until(lambda: r.coalesce._open and next(iter(r.coalesce._open.values())).flight is not None)
        r.upstream.lines[0].reset()
        for one in asked:
            answer = await one
            assert (answer.text, answer.done) == ("One two ", False)
            assert answer.error is not None
            assert answer.error["code"] == "upstream_cut"


# --- streamed and whole


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
async def test_streamed_and_whole_requests_share(first: bool, second: bool) -> None:
    async with rig() as r:
        leader = r.ask(stream=first, stream_options={"include_usage": True})
        await r.waiting(1)
        joiner = r.ask(stream=second, usage_placement="finish")
        await r.waiting(2)
        await r.said.all()
        for stream_, answer in ((first, await leader), (second, await joiner)):
            if stream_:
                assert (answer.text, answer.done) == (TEXT, True)
                assert answer.chunks[-1]["usage"] == USAGE
            else:
                assert answer.json["choices"][0]["message"]["content"] == TEXT
                assert answer.json["usage"] == USAGE
        assert r.said.calls == 1


async def test_each_face_of_the_same_question_has_its_own_form() -> None:
    """Two completions requests, one with usage and one without."""
    async with rig() as r:
        body = {"model": "text/m", "prompt": "Hi", "stream": True, "cache": True}
        asked = []
        for options in ({}, {"stream_options": {"include_usage": True}}):
            asked.append(asyncio.create_task(ask(r.running.port, {**body, **options}, "/v1/completions")))
            await r.waiting(len(asked))
        await r.said.all()
        plain, with_usage = [await one for one in asked]
        assert "usage" not in plain.chunks[-1]
        assert with_usage.chunks[-1]["usage"] == USAGE
        assert r.said.calls == 1


# --- who shares


TOGETHER: list[tuple[str, Json, Json]] = [
    ("", {}, {}),
    ("", {"name": "one"}, {"name": "two"}),
    ("", {"timeout": {"call_timeout": 9000}}, {"timeout": {"call_timeout": 8000}}),
    ("", {"cache": {"ttl": 5}}, {"cache": {"ttl": 6}}),
    ("", {"metadata": {"a": "b"}}, {}),
    ("", {"cache": None, "coalesce": True}, {"cache": None, "coalesce": True}),
    ("", {"cache": None, "penstock": {"coalesce": True}}, {"cache": None, "coalesce": True}),
    ("mode: all", {"cache": None}, {"cache": None}),
]
APART: list[tuple[str, Json, Json]] = [
    ("", {"cache": None}, {"cache": None}),
    ("", {"coalesce": False}, {}),
    ("", {}, {"coalesce": False}),
    ("mode: all", {"coalesce": False}, {"coalesce": False}),
    ("", {"temperature": 1}, {"temperature": 0}),
    ("", {"temperature": 1}, {"temperature": 1.0}),
    ("", {"user": "a"}, {"user": "b"}),
    ("", {"fallbacks": ["openai/x"]}, {}),
    ("", {"model": "openai/m"}, {"model": "m"}),
    ("", {"strict_params": True}, {}),
    ("", {"cache": True, "coalesce": True}, {"cache": None, "coalesce": True}),
]


@pytest.mark.parametrize(("options", "one", "two"), TOGETHER)
async def test_what_makes_no_difference_to_the_answer_is_shared(options: str, one: Json, two: Json) -> None:
    assert await calls(options, one, two) == 1


@pytest.mark.parametrize(("options", "one", "two"), APART)
async def test_what_may_make_a_difference_is_asked_for_each(options: str, one: Json, two: Json) -> None:
    assert await calls(options, one, two) == 2


async def calls(options: str, one: Json, two: Json) -> int:
    """How often the provider is asked for two requests."""
    async with rig(options) as r:
        first = r.ask(**one)
        await r.waiting(1)
        second = r.ask(**two)
        await r.waiting(2)
        await asyncio.sleep(0.02)
        await r.said.all()
        assert (await first).text == (await second).text == TEXT
        assert "coalesce" not in r.upstream.asked[0].json
        return r.said.calls


@pytest.mark.parametrize("control", ["no-cache", "no-store"])
async def test_who_wants_a_fresh_answer_joins_none(control: str) -> None:
    async with rig("mode: all") as r:
        first = r.ask()
        await r.waiting(1)
        fresh = r.ask(headers={"Cache-Control": control})
        await until(lambda: r.said.calls == 2)
        await r.said.all()
        assert (await fresh).headers["X-Cache"] == "bypass"
        assert (await first).done


async def test_a_wrong_value_is_refused_with_its_path() -> None:
    async with rig() as r:
        answer = await r.ask(penstock={"coalesce": "yes"})
        assert (answer.status, answer.error and answer.error["param"]) == (400, "penstock.coalesce")


@pytest.mark.parametrize(("options", "expected"), [("", 2), ("scope: shared", 1)])
async def test_keys_share_only_where_the_scope_says_so(options: str, expected: int) -> None:
    keys = KEYS.replace("      callers_keys: {{}}\n", "").format()
    async with rig(options, auth=keys) as r:
        asked = []
        for letter in "ab":
            asked.append(r.ask(headers={"Authorization": f"Bearer sk-penstock-{letter * 16}"}))
            await r.waiting(len(asked))
        await asyncio.sleep(0.02)
        await r.said.all()
        for one in asked:
            assert (await one).text == TEXT
        assert r.said.calls == expected


async def test_a_hit_is_each_clients_own() -> None:
    """Two requests at once for what the cache has: each gets it as it asks, and nobody is said to have joined."""
    async with rig() as r:
        await r.said.all()
        assert (await r.ask()).done
        answers = await asyncio.gather(r.ask(), r.ask(cache={"usage": "zero"}, stream_options={"include_usage": True}), r.ask())
        assert [answer.headers["X-Cache"] for answer in answers] == ["hit"] * 3
        assert answers[1].chunks[-1]["usage"]["total_tokens"] == 0
        assert r.said.calls == 1


async def test_a_limit_of_the_leaders_key_is_no_answer_to_another_key() -> None:
    keys = KEYS.replace("      callers_keys: {{}}\n", "").format()
    limits = "  - limits: {per_key: {concurrent: 1}}"
    async with rig("scope: shared", auth=keys, limits=limits) as r:
        as_a, as_b = ({"Authorization": f"Bearer sk-penstock-{letter * 16}"} for letter in "ab")
        blocking = r.ask(headers=as_a, seed=1)
        await r.waiting(1)
        limited, other = r.ask(headers=as_a), r.ask(headers=as_b)
        assert (await limited).status == 429
        await r.said.all()
        assert (await other).text == TEXT
        assert (await blocking).text == TEXT


# --- deadlines, slow clients, bounds


async def test_each_clients_deadline_ends_only_that_client() -> None:
    async with rig() as r:
        leader = r.ask(timeout={"total_timeout": 80})
        await r.waiting(1)
        joiner = r.ask()
        await r.waiting(2)
        answer = await leader
        assert (answer.status, answer.error and answer.error["code"]) == (504, "timeout_total")
        late = r.ask(timeout={"total_timeout": 120})
        await r.said.say(2)
        cut = await late
        assert (cut.done, cut.error and cut.error["code"]) == (False, "timeout_total")
        await r.said.all()
        assert (await joiner).text == TEXT
        assert (r.said.calls, r.said.closed) == (1, 0)


async def test_draining_ends_all() -> None:
    async with rig() as r:
        asked = [r.ask(), r.ask()]
        await r.waiting(2)
        await r.said.say(1)
        await until(lambda: r.coalesce._open and next(iter(r.coalesce._open.values())).flight is not None)
        await r.running.drain()
        for one in asked:
            answer = await one
            assert answer.error is not None
            assert answer.error["code"] == "draining"
        await until(lambda: r.said.closed == 1)


async def test_what_has_grown_too_long_is_joined_no_more() -> None:
    said = Spoken(word("x" * 3000), word("y" * 3000), ending())
    async with rig("max_flight_bytes: 2KiB", said) as r:
        first = r.ask(cache=None, coalesce=True)
        await r.waiting(1)
        await said.say(1)
        await until(lambda: not next(iter(r.coalesce._open.values())).joinable)
        second = r.ask(cache=None, coalesce=True)
        await until(lambda: said.calls == 2)
        await said.all()
        assert (await first).text == (await second).text == "x" * 3000 + "y" * 3000
        assert (await second).headers.get("X-Cache") == (await first).headers.get("X-Cache")


async def test_sixteen_followers_at_sixteen_speeds_get_the_same() -> None:
    words = [word(f"{number} " * 50) for number in range(400)]
    said = Spoken(*words, ending())
    async with rig("max_lag_bytes: 64MiB, max_flight_bytes: 64MiB", said) as r:
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(slowly(r.running.port, number)) for number in range(16)]
            await r.waiting(16)
            await said.all()
        texts = {reader.result() for reader in readers}
        assert len(texts) == 1
        assert b"data: [DONE]" in texts.pop()
        assert said.calls == 1


async def slowly(port: int, number: int) -> bytes:
    """All of an answer's body, read `1 << number % 8` KiB at a time, with as many turns of the loop in between."""
    with await connected(port, receive_buffer=8192) as client:
        await client.post(chat(**CACHED))
        while not client.received.endswith(b"\r\n0\r\n\r\n"):
            assert await client.read(1024 << number % 8)
            for _ in range(number):
                await asyncio.sleep(0)
        events = [part for part in client.received.split(b"\n") if part.startswith(b"data: ")]
        return b"\n".join(events) + b"\r\n0\r\n\r\n"


async def test_one_that_stays_too_far_behind_is_dropped_and_the_others_go_on() -> None:
    said = Spoken(*[word("x" * 100_000) for _ in range(200)], ending())
    async with rig("max_lag_bytes: 64KiB, max_flight_bytes: 64KiB", said, write="300ms") as r:
        with await connected(r.running.port, receive_buffer=4096) as slow:
            await slow.post(chat(**CACHED))
            await r.waiting(1)
            quick = r.ask()
            await r.waiting(2)
            with capture_logs() as lines:
                await said.all()
                answer = await quick
                assert (answer.done, len(answer.text)) == (True, 20_000_000)
                await until(lambda: r.running.edge.open_calls == 0)
            ends = sorted(line["outcome"] for line in lines if line["event"] == "request")
            assert ends == ["client_gone", "completed"]


async def test_one_that_reads_on_but_too_slowly_gets_an_error_chunk() -> None:
    said = Spoken(*[word("x" * 100_000) for _ in range(200)], ending())
    async with rig("max_lag_bytes: 64KiB, max_flight_bytes: 64KiB", said, write="500ms") as r:
        with await connected(r.running.port, receive_buffer=131072) as slow:
            await slow.post(chat(**CACHED))
            await r.waiting(1)
            quick = r.ask()
            await r.waiting(2)
            await said.all()
            async with asyncio.timeout(10):
                while not slow.received.endswith(b"\r\n0\r\n\r\n"):
                    assert await slow.read(16384)
                    if r.running.edge.open_calls:
                        await asyncio.sleep(0.002)
        assert (await quick).done
        assert b"too_far_behind" in slow.received
        assert b"[DONE]" not in slow.received
        assert slow.received.count(b"xxxxxxxxxx" * 10_000) < 200


# --- what it used


async def test_what_it_used_counts_once_for_who_led() -> None:
    async with rig() as r:
        leader = r.ask(name="leader")
        await r.waiting(1)
        joiner = r.ask(name="joiner")
        await r.waiting(2)
        await r.said.all()
        assert (await leader).done
        assert (await joiner).done
        assert await figure(r.running, "penstock_tokens_total", type="output") == 3
        assert await figure(r.running, "penstock_tokens_total", type="output", name="leader") == 3
        assert await figure(r.running, "penstock_flights_joined_total") == 1


@pytest.mark.parametrize("said", [0, 2])
async def test_what_it_used_counts_for_who_led_although_it_has_left(said: int) -> None:
    async with rig() as r:
        with capture_logs() as lines:
            with await connected(r.running.port) as leader:
                await leader.post(chat(**CACHED, name="leader"))
                await r.waiting(1)
                await r.said.say(said)
                if said:
                    await leader.read_until(b"two ")
                joiner = r.ask(name="joiner")
                await r.waiting(2)
                leader.leave("fin")
                await until(lambda: r.running.edge.open_calls == 1)
            assert await figure(r.running, "penstock_tokens_total") == 0
            await r.said.all()
            assert (await joiner).done
        assert await figure(r.running, "penstock_tokens_total", type="output") == 3
        assert await figure(r.running, "penstock_tokens_total", type="output", name="leader") == 3
        assert await figure(r.running, "penstock_tokens_estimated_total") == 0
        assert await figure(r.running, "penstock_requests_total", name="leader", outcome="client_gone") == 1
        told = [line for line in lines if line["event"] == "usage"]
        assert [(line["name"], line["completion_tokens"]) for line in told] == [("leader", 3)]


# --- clients that people have


async def test_the_official_sdk_joins() -> None:
    async with rig() as r:
        leader = r.ask(temperature=0)
        await r.waiting(1)
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{r.running.port}/v1", api_key="any") as client:
            asked: asyncio.Future[Any] = asyncio.ensure_future(
                client.chat.completions.with_raw_response.create(
                    model="openai/m", messages=[{"role": "user", "content": "Hi"}], temperature=0, stream=True, extra_body=CACHED
                )
            )
            await r.waiting(2)
            await r.said.all()
            response = await asked
            text = [chunk.choices[0].delta.content or "" async for chunk in response.parse()]
        assert response.headers["X-Cache"] == "joined"
        assert "".join(text) == TEXT
        assert (await leader).done
        assert r.said.calls == 1


async def test_the_official_sdk_raises_where_the_shared_stream_breaks() -> None:
    async with rig() as r:
        leader = r.ask(temperature=0)
        await r.waiting(1)
        await r.said.say(2)
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{r.running.port}/v1", api_key="any", max_retries=0) as client:
            joined = await client.chat.completions.create(
                model="openai/m", messages=[{"role": "user", "content": "Hi"}], temperature=0, stream=True, extra_body=CACHED
            )
            r.upstream.lines[0].reset()
            with pytest.raises(openai.APIError):
                async for _ in joined:
                    pass
        assert not (await leader).done


async def test_a_reply_that_is_there_at_once_is_shared_as_well() -> None:
    """The provider writes everything in one piece, and equal requests come in the same turn."""
    async with rig() as r:
        r.upstream.answer = stream([b"".join((*map(word, WORDS), ending()))])
        answers = await asyncio.gather(*[r.ask() for _ in range(20)])
        assert {answer.text for answer in answers} == {TEXT}
        assert {answer.headers["X-Cache"] for answer in answers} <= {"miss", "joined", "hit"}
        assert len(r.upstream.asked) == 1
