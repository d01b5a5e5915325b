"""The cache in front of a real provider: who is cached, what is stored, how a hit comes back, and how entries are deleted."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from itertools import accumulate
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from middleware.cache import Cache
from middleware.cache.entry import Entry
from middleware.cache.recorder import Recorder
from middleware.cache.replay import Replayed
from middleware.cache.store import MemoryStore
from proxy.app import Gateway
from proxy.call import Call, Principal
from proxy.errors import GatewayError, Outcome, Refused, UpstreamCut
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, compose
from proxy.reply import Batch, Head, Reply, Trailer, single_events
from tests.support import gateway as gate
from tests.support.decoding import make_call
from tests.support.gateway import ask, chat, until
from tests.support.upstream import Answer, Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 2}}
ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
DONE = b"data: [DONE]\n\n"


def event(delta: Json, finish: str | None = None, **fields: Any) -> bytes:
    found = {"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}
    return b"data: %b\n\n" % json.dumps(found).encode()


def ending(finish: str = "stop") -> bytes:
    usage = {"id": "c", "created": 1, "model": "m", "choices": [], "usage": USAGE}
    return event({}, finish) + b"data: %b\n\n" % json.dumps(usage).encode() + DONE


WORDS = stream(
    [event({"role": "assistant", "content": "One "}), event({"content": "two "}), event({"content": "three"}), ending()]
)
WHOLE = whole(
    json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "One two three"}, "finish_reason": "stop"}],
            "usage": USAGE,
        }
    ).encode()
)
VECTORS = whole(
    json.dumps({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}], "model": "m"}).encode()
)


def config(options: str = "", auth: str = "") -> str:
    return gate.CONFIG.replace("  - tracking\n", f"  - tracking\n{auth}  - cache: {{{{{options}}}}}\n")


class Rig:
    """A gateway with a cache and the provider behind it."""

    def __init__(self, running: Gateway, upstream: Upstream) -> None:
        self.running = running
        self.upstream = upstream
        self.cache = next(layer for layer in running.layers if isinstance(layer, Cache))

    @property
    def asked(self) -> int:
        return len(self.upstream.asked)

    async def ask(
        self, path: str = "/v1/chat/completions", headers: Mapping[str, str] | None = None, **fields: Any
    ) -> gate.Answer:
        return await ask(self.running.port, chat(**fields), path, headers)

    async def state(self, *given: Json) -> list[str]:
        """X-Cache of these requests, one after the other."""
        return [(await self.ask(**fields)).headers.get("X-Cache", "") for fields in given]

    async def delete(self, query: str = "", headers: Mapping[str, str] | None = None) -> tuple[int, Json]:
        url = f"http://127.0.0.1:{self.running.port}/admin/cache{query}"
        async with aiohttp.ClientSession() as session, session.delete(url, headers=headers) as response:
            return response.status, await response.json()


class rig:
    """`async with rig("mode: opt_out") as r`: options of the cache as they stand in config.yaml."""

    def __init__(self, options: str = "", answer: Answer = WORDS, auth: str = "", **fields: Any) -> None:
        self._upstream = Upstream(answer)
        self._config = config(options, auth)
        self._fields = fields

    async def __aenter__(self) -> Rig:
        await self._upstream.__aenter__()
        self._gateway = gate.gateway(self._upstream.url, self._config, **self._fields)
        return Rig(await self._gateway.__aenter__(), self._upstream)

    async def __aexit__(self, *error: Any) -> None:
        await self._gateway.__aexit__(*error)
        await self._upstream.__aexit__(*error)


def figures(cache: Cache) -> dict[str, float]:
    return {found.name + "".join(found.labels.values()): found.value for found in cache.samples()}


# --- who is cached


ASKS: list[Json] = [
    {"cache": {"type": "exact_match", "ttl": 60}},
    {"cache": {}},
    {"cache": True},
    {"cache": {"ttl": 259200}},
    {"orq": {"cache": {"type": "exact_match"}}},
    {"penstock": {"cache": {"ttl": 1.5}}},
]


@pytest.mark.parametrize("fields", ASKS)
async def test_a_request_that_asks_is_cached(fields: Json) -> None:
    async with rig() as r:
        first = await r.ask(**fields)
        second = await r.ask(**fields)
        assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("miss", "hit")
        assert ("Age" in first.headers, second.headers["Age"]) == (False, "0")
        assert first.text == "One two three"
        assert second.body == first.body
        assert r.asked == 1
        assert not {"cache", "orq", "penstock"} & set(r.upstream.asked[0].json)


async def test_by_default_only_requests_that_ask_are_cached() -> None:
    async with rig() as r:
        assert await r.state({}, {}, {"cache": False}, {"cache": None}, {"orq": {"cache": False}}) == ["bypass"] * 5
        assert r.asked == 5
        assert r.cache.health() == {"entries": 0, "bytes": 0}


async def test_with_opt_out_all_that_do_not_refuse_are_cached() -> None:
    async with rig("mode: opt_out") as r:
        assert await r.state({}, {}, {"cache": {"ttl": 5}}, {"cache": False}, {"orq": {"cache": False}}) == [
            "miss",
            "hit",
            "hit",
            "bypass",
            "bypass",
        ]
        assert r.asked == 3


async def test_the_first_place_that_speaks_of_the_cache_counts() -> None:
    async with rig() as r:
        assert await r.state(*[{"cache": False, "orq": {"cache": {}}}] * 2) == ["bypass", "bypass"]
        assert await r.state(*[{"cache": {}, "orq": {"cache": False}}] * 2) == ["miss", "hit"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"cache": {"ttl": 0}}, "cache.ttl"),
        ({"cache": {"ttl": 259201}}, "cache.ttl"),
        ({"cache": {"ttl": "60"}}, "cache.ttl"),
        ({"cache": {"ttl": True}}, "cache.ttl"),
        ({"cache": {"type": "semantic"}}, "cache.type"),
        ({"cache": "yes"}, "cache"),
        ({"cache": []}, "cache"),
        ({"cache": {"replay": "slow"}}, "cache.replay"),
        ({"cache": {"replay": {}}}, "cache.replay"),
        ({"cache": {"replay": {"chunks_per_second": 0}}}, "cache.replay.chunks_per_second"),
        ({"replay": {"chunks_per_second": "fast"}}, "replay.chunks_per_second"),
        ({"cache": {"usage": "none"}}, "cache.usage"),
        ({"orq": {"cache": {"ttl": -1}}}, "orq.cache.ttl"),
        ({"penstock": {"cache": {"ttl": -1}}}, "penstock.cache.ttl"),
        ({"penstock": {"replay": 5}}, "penstock.replay"),
    ],
)
async def test_a_wrong_field_is_a_400_with_its_path_before_anybody_is_asked(fields: Json, param: str) -> None:
    async with rig() as r:
        answer = await r.ask(**fields)
        assert (answer.status, answer.json["error"]["param"]) == (400, param)
        assert r.asked == 0


async def test_a_request_may_not_outlive_the_operators_bound() -> None:
    async with rig("max_ttl: 1m") as r:
        answer = await r.ask(cache={"ttl": 61})
        assert (answer.status, answer.json["error"]["param"]) == (400, "cache.ttl")
        assert (await r.ask(cache={"ttl": 60})).status == 200


@pytest.mark.parametrize(
    ("header", "states", "stored"),
    [
        ("no-cache", ["bypass", "bypass", "hit"], 2),
        ("No-Store", ["bypass", "bypass", "miss"], 1),
        ("max-age=0, NO-CACHE", ["bypass", "bypass", "hit"], 2),
    ],
)
async def test_cache_control_of_the_request(header: str, states: list[str], stored: int) -> None:
    """no-cache: do not read, but store; no-store: neither."""
    async with rig("mode: opt_out") as r:
        fields = {"Cache-Control": header}
        given = [await r.ask(headers=fields), await r.ask(headers=fields), await r.ask()]
        assert [answer.headers["X-Cache"] for answer in given] == states
        assert figures(r.cache)["penstock_cache_stores_total"] == stored


async def test_no_cache_replaces_what_was_there() -> None:
    async with rig() as r:
        await r.ask(cache={})
        r.upstream.answer = stream([event({"content": "new"}), ending()])
        assert (await r.ask(cache={}, headers={"cache-control": "no-cache"})).text == "new"
        again = await r.ask(cache={})
        assert (again.headers["X-Cache"], again.text) == ("hit", "new")


async def test_another_question_is_a_miss() -> None:
    async with rig() as r:
        asked = {"cache": {}, "temperature": 0}
        assert (
            await r.state(asked, {**asked, "temperature": 1}, {**asked, "model": "openai/other"}, {**asked, "user": "ann"})
            == ["miss"] * 4
        )
        assert await r.state({**asked, "name": "other", "metadata": {"k": "v"}, "identity": {"id": "x"}}) == ["hit"]


# --- one entry, both forms


@pytest.mark.parametrize("answer", [WORDS, WHOLE], ids=["the provider streams", "the provider does not"])
@pytest.mark.parametrize("first", [True, False])
async def test_one_entry_serves_streamed_and_whole_requests(answer: Answer, first: bool) -> None:
    async with rig(answer=answer) as r:
        await r.ask(cache={}, stream=first)
        streamed = await r.ask(cache={}, stream=True, stream_options={"include_usage": True})
        completion = await r.ask(cache={}, stream=False)
        assert [found.headers["X-Cache"] for found in (streamed, completion)] == ["hit", "hit"]
        assert r.asked == 1
        assert streamed.done
        assert streamed.text == "One two three" == completion.json["choices"][0]["message"]["content"]
        assert streamed.chunks[-1]["usage"] == USAGE == completion.json["usage"]
        assert completion.json["choices"][0]["finish_reason"] == "stop"


async def test_the_entries_of_text_completions_and_chats_are_apart() -> None:
    async with rig() as r:
        paths = ["/v1/chat/completions", "/v1/completions"] * 2
        found = [await r.ask(path, cache={}, prompt="Hi") for path in paths]
        assert [answer.headers["X-Cache"] for answer in found] == ["miss", "miss", "hit", "hit"]
        assert found[2].body == found[0].body
        assert found[3].body == found[1].body
        assert "".join(choice["text"] for chunk in found[3].chunks for choice in chunk["choices"]) == "One two three"


async def test_embeddings_are_cached() -> None:
    async with rig(answer=VECTORS) as r:
        body = {"model": "openai/m", "input": "Hi", "cache": {}}
        first, second = [await ask(r.running.port, body, "/v1/embeddings") for _ in range(2)]
        assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("miss", "hit")
        assert second.body == first.body
        assert r.asked == 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "/v2/proxy",
            {
                "orq": {
                    "cache": {"type": "exact_match", "ttl": 60},
                    "tracking": {"name": "bot"},
                    "timeout": {"call_timeout": 9000},
                }
            },
        ),
        ("/v3/router", {"name": "bot", "cache": {"type": "exact_match", "ttl": 60}, "timeout": {"call_timeout": 9000}}),
    ],
)
@pytest.mark.parametrize("answer", [WORDS, WHOLE], ids=["stream", "whole"])
async def test_through_the_official_sdk_the_second_call_is_a_hit_with_equal_chunks(
    path: str, fields: Json, answer: Answer
) -> None:
    async with rig(answer=answer) as r:
        http = f"http://127.0.0.1:{r.running.port}{path}"
        async with AsyncOpenAI(api_key="sk-client", base_url=http, max_retries=0) as client:
            told = []
            for _ in range(2):
                raw = await client.chat.completions.with_raw_response.create(
                    model="openai/m", messages=[{"role": "user", "content": "Hi"}], stream=True, extra_body=fields
                )
                told.append((raw.headers["x-cache"], [chunk.model_dump() async for chunk in raw.parse()]))
        assert [state for state, _ in told] == ["miss", "hit"]
        assert told[0][1] == told[1][1] != []
        assert r.asked == 1


# --- what is stored


async def cut(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(event({"content": "half "}))
    line.hang_up()


FAILURES: dict[str, Answer] = {
    "cut": cut,
    "no end marker": stream([event({"content": "half "})]),
    "error event": stream([event({"content": "half "}), b'data: {"error": {"message": "no", "type": "server_error"}}\n\n']),
    "malformed": stream([event({"content": "half "}), b"data: {no json\n\n", ending()]),
    "error at once": stream([b'data: {"error": {"message": "no", "type": "server_error"}}\n\n']),
    "status 500": whole(b'{"error": {"message": "no"}}', 500),
    "whole, cut": stream([b'{"id": "c", "choices": [']),
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
async def test_what_did_not_complete_is_never_stored(failure: str, streamed: bool) -> None:
    async with rig(answer=FAILURES[failure]) as r:
        first = await r.ask(cache={}, stream=streamed)
        assert first.status >= 400 or first.error
        assert r.cache.health() == {"entries": 0, "bytes": 0}
        r.upstream.answer = WORDS
        second = await r.ask(cache={}, stream=streamed)
        assert second.headers["X-Cache"] == "miss"
        assert r.asked == 2


async def test_a_stream_whose_client_leaves_in_the_middle_is_never_stored() -> None:
    async def held(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(event({"content": "half "}))
        await line.forever()

    async with rig(answer=held) as r:
        async with gate.RawClient(r.running.port) as client:
            await client.send(gate.raw_request(chat(cache={})))
            await client.first_byte()
        await until(lambda: not r.running.edge.open_calls)
        await until(r.upstream.lines[0].closed.is_set)
        assert r.cache.health()["entries"] == 0
        r.upstream.answer = WORDS
        assert await r.state({"cache": {}}, {"cache": {}}) == ["miss", "hit"]


@pytest.mark.parametrize(("reason", "kept"), [("stop", True), ("tool_calls", True), ("length", False), ("content_filter", False)])
async def test_with_which_finish_reasons_a_reply_is_stored(reason: str, kept: bool) -> None:
    async with rig(answer=stream([event({"content": "x"}), ending(reason)])) as r:
        assert await r.state({"cache": {}}, {"cache": {}}) == ["miss", "hit" if kept else "miss"]


async def test_length_and_content_filter_are_stored_by_choice() -> None:
    async with rig("store: [length]") as r:
        r.upstream.answer = stream([event({"content": "x"}), ending("length")])
        assert await r.state({"cache": {}}, {"cache": {}}) == ["miss", "hit"]
        r.upstream.answer = WORDS
        assert await r.state({"cache": {}, "seed": 2}, {"cache": {}, "seed": 2}) == ["miss", "miss"], "stop was not chosen"


async def test_a_reply_over_max_entry_bytes_goes_through_and_is_not_stored() -> None:
    long = stream([event({"content": "x" * 600}), event({"content": "y" * 600}), ending()])
    async with rig("max_entry_bytes: 1KiB", answer=long) as r:
        first, second = await r.ask(cache={}), await r.ask(cache={})
        assert [first.headers["X-Cache"], second.headers["X-Cache"]] == ["miss", "miss"]
        assert second.text == "x" * 600 + "y" * 600
        assert second.done
        assert r.cache.health() == {"entries": 0, "bytes": 0}


async def test_a_cache_that_is_full_lets_the_oldest_go() -> None:
    async with rig("max_bytes: 6KiB") as r:
        for seed in range(12):
            await r.ask(cache={}, seed=seed)
        assert r.cache.health()["bytes"] <= 6 * 1024
        assert figures(r.cache)["penstock_cache_evictions_totalsize"] > 0
        assert await r.state({"cache": {}, "seed": 11}, {"cache": {}, "seed": 0}) == ["hit", "miss"]


# --- usage


@pytest.mark.parametrize("answer", [WORDS, WHOLE], ids=["stream", "whole"])
async def test_usage_of_a_hit_is_the_original_or_zero(answer: Answer) -> None:
    async with rig(answer=answer) as r:
        shown: Json = {"stream_options": {"include_usage": True}}
        await r.ask(cache={"usage": "zero"}, stream=False)
        for usage, expected in [("zero", ZERO), ("original", USAGE)]:
            assert (await r.ask(cache={"usage": usage}, **shown)).chunks[-1]["usage"] == expected
            assert (await r.ask(cache={"usage": usage}, stream=False)).json["usage"] == expected
        assert r.asked == 1


async def test_the_first_reply_is_never_free_and_config_decides_where_the_request_does_not() -> None:
    async with rig("usage: zero") as r:
        assert (await r.ask(cache={}, stream=False)).json["usage"] == USAGE
        assert (await r.ask(cache={}, stream=False)).json["usage"] == ZERO
        assert (await r.ask(cache={"usage": "original"}, stream=False)).json["usage"] == USAGE


# --- scopes and deletion


class Doorman:
    """Who calls is what the header says; `admin` may delete."""

    def authenticate(self, headers: Mapping[str, str]) -> Principal:
        name = headers.get("x-key", "")
        if not name:
            raise Refused("no", status=401)
        return Principal(name, admin=name == "admin", scope=f"scope of {name}")

    async def __call__(self, call: Call, next: Handler) -> Reply:
        return await next(call)


def guarded(options: str = "") -> rig:
    return rig(options, auth="  - tests.test_cache:Doorman\n")


async def test_an_entry_is_found_by_nobody_but_the_key_that_stored_it() -> None:
    async with guarded() as r:
        states = [(await r.ask(cache={}, headers={"x-key": name})).headers["X-Cache"] for name in ("a", "b", "a", "b")]
        assert states == ["miss", "miss", "hit", "hit"]


async def test_a_shared_cache_is_found_by_all() -> None:
    async with guarded("scope: shared") as r:
        states = [(await r.ask(cache={}, headers={"x-key": name})).headers["X-Cache"] for name in ("a", "b", "c")]
        assert states == ["miss", "hit", "hit"]


@pytest.mark.parametrize(
    ("query", "deleted"),
    [("", 4), ("?key=a", 2), ("?key=nobody", 0), ("?name=bot", 2), ("?key=a&name=bot", 1), ("?key=", 0)],
)
async def test_entries_are_deleted_all_by_key_or_by_tracking_name(query: str, deleted: int) -> None:
    async with guarded() as r:
        for key in "ab":
            for name in ("bot", "app"):
                await r.ask(cache={}, seed=name == "bot", name=name, headers={"x-key": key})
        assert await r.delete(query, {"x-key": "admin"}) == (200, {"deleted": deleted})
        assert r.cache.health()["entries"] == 4 - deleted
        again = await r.ask(cache={}, seed=True, name="bot", headers={"x-key": "a"})
        assert again.headers["X-Cache"] == ("miss" if query in ("", "?key=a", "?name=bot", "?key=a&name=bot") else "hit")


async def test_deleting_needs_an_admin_key_and_a_known_parameter() -> None:
    async with guarded() as r:
        await r.ask(cache={}, headers={"x-key": "a"})
        status, body = await r.delete("", {"x-key": "a"})
        assert (status, body["error"]["code"]) == (403, "admin_only")
        assert (await r.delete())[0] == 401
        status, body = await r.delete("?keys=a", {"x-key": "admin"})
        assert (status, body["error"]["param"]) == (400, "keys")
        assert r.cache.health()["entries"] == 1


# --- by itself, with a clock that the test moves


class Clock:
    """Seconds, and timers that fire as soon as the loop turns, moving the clock to their time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, wake: Callable[[], None]) -> asyncio.Handle:
        self.waits.append(round(seconds, 6))

        def fire() -> None:
            self.now += seconds
            wake()

        return asyncio.get_running_loop().call_soon(fire)


class Provider:
    """A next that hands out scripted batches: (seconds before it, chunks as dicts or events, final)."""

    def __init__(
        self, clock: Clock, *batches: tuple[float, list[Any]], reasons: dict[int, Any] | None = None, whole: bool = False
    ) -> None:
        self.clock = clock
        self.batches = batches
        self.reasons = {0: "stop"} if reasons is None else reasons
        self.whole = whole
        self.calls = 0

    async def __call__(self, call: Call) -> Reply:
        self.calls += 1
        trailer = Trailer()
        self.clock.now += self.batches[0][0]
        return Reply(Head("acme/m", dropped=("seed",)), self.flow(trailer), trailer, whole=self.whole)

    async def flow(self, trailer: Trailer) -> AsyncIterator[Batch]:
        for number, (gap, items) in enumerate(self.batches):
            self.clock.now += gap if number else 0
            final = number == len(self.batches) - 1
            if final:
                trailer.usage = dict(USAGE)
                trailer.finish_reasons = dict(self.reasons)
                trailer.chunks = sum(len(items) for _, items in self.batches)
            yield Batch(items, final=final)


def chunk(text: str | None, finish: str | None = None) -> Json:
    delta = {"content": text} if text is not None else {}
    return {"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def encoded(text: str) -> bytes:
    return b"data: %b\n\n" % json.dumps(chunk(text)).encode()


A, B, C, D = encoded("a"), encoded("b"), encoded("c"), encoded("d")
END = chunk(None, "stop")
BATCHES = ((0.5, [A]), (0.25, [B, C]), (2.0, [D, END]))


def made(clock: Clock, **options: Any) -> Cache:
    return Cache(mode="opt_out", _clock=clock, _later=clock.later, **options)


def asked(cache: Cache, request: Json | None = None, headers: Json | None = None, **fields: Any) -> Call:
    body = {"stream": True, **(request or {})}
    request = {name: value for name, value in body.items() if name not in ("cache", "replay", "penstock")}
    return cache.admit(make_call(request, **fields), OwnFields(body, headers or {}))


async def taken(reply: Reply, clock: Clock | None = None) -> list[tuple[float, bytes, bool]]:
    """(when it came, its events, final) of every batch."""
    began = clock.now if clock else 0.0
    return [(round((clock.now if clock else 0.0) - began, 6), batch.sse(), batch.final) async for batch in reply.chunks]


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def filled(clock: Clock, cache: Cache, provider: Provider | None = None) -> Provider:
    provider = provider or Provider(clock, *BATCHES)
    await taken(await cache(asked(cache), provider))
    return provider


async def test_by_default_a_hit_comes_at_once_in_one_piece_and_the_finish_behind_it(clock: Clock) -> None:
    cache = made(clock)
    provider = await filled(clock, cache)
    reply = await cache(asked(cache), provider)
    events = await taken(reply, clock)
    assert events == [(0.0, A + B + C + D, False), (0.0, Batch([END]).sse(), True)]
    assert clock.waits == []
    assert provider.calls == 1


async def test_a_recorded_replay_has_the_batches_and_the_gaps_of_the_recording(clock: Clock) -> None:
    cache = made(clock, replay="recorded")
    provider = await filled(clock, cache)
    began = clock.now
    reply = await cache(asked(cache), provider)
    assert clock.now - began == pytest.approx(0.5), "the first chunk is in hand when the head is known, and not before"
    assert await taken(reply, clock) == [
        (0.0, A, False),
        (0.25, B + C, False),
        (2.25, D + Batch([END]).sse(), True),
    ]


class Recording:
    """A recorder that a test shows batches to as a socket would push them, and the entry that it makes."""

    def __init__(self, clock: Clock, most: int = 2**20) -> None:
        self.entries: list[Entry] = []
        trailer = Trailer()
        trailer.finish_reasons = {0: "stop"}
        began = clock.now
        clock.now += 0.5
        reply = Reply(Head("acme/m"), None, trailer)  # type: ignore[arg-type]
        worth = frozenset({"stop"})
        self.recorder = Recorder(make_call(), reply, 60.0, began, most=most, worth=worth, clock=clock, keep=self._keep)

    async def _keep(self, entry: Entry) -> None:
        self.entries.append(entry)


async def test_a_gap_is_the_time_between_two_arrivals_however_late_the_client_takes_the_last(clock: Clock) -> None:
    recording = Recording(clock)
    clock.now += 3  # the first batch was in hand with the head; nobody had asked for it yet
    for number, batch in enumerate([Batch([A]), Batch([B, C]), Batch([D, END], final=True)]):
        clock.now += (0, 0.25, 2.0)[number]
        assert recording.recorder.see(batch) is batch
    clock.now += 60
    assert recording.entries == [], "nothing is stored before the clean end"
    await recording.recorder.finish()
    (entry,) = recording.entries
    assert list(entry.gaps) == [0.5, 3.25, 2.0]
    assert (entry.events, list(entry.ends)) == (A + B + C + D + Batch([END]).sse(), [len(A), len(A + B + C), len(entry.events)])
    assert entry.events[entry.finish :] == Batch([END]).sse()


@given(pieces=st.lists(st.lists(st.sampled_from([A, B, C, D]), min_size=1, max_size=4), max_size=6), end=st.booleans())
def test_an_entry_is_what_was_seen_in_whatever_batches_it_came(pieces: list[list[bytes]], end: bool) -> None:
    recording = Recording(Clock())
    seen = [Batch(items) for items in pieces] + [Batch([D, END] if end else [END], final=True)]
    for batch in seen:
        recording.recorder.see(batch)
    asyncio.run(recording.recorder.finish())
    (entry,) = recording.entries
    assert entry.events == b"".join(batch.sse() for batch in seen)
    assert list(entry.ends) == list(accumulate(len(batch.sse()) for batch in seen))
    assert len(entry.gaps) == len(seen)
    assert entry.events[entry.finish :] == Batch([END]).sse()


async def test_a_replay_at_a_pace_is_one_chunk_at_a_time(clock: Clock) -> None:
    cache = made(clock, replay={"chunks_per_second": 4.0})
    provider = await filled(clock, cache)
    events = await taken(await cache(asked(cache), provider), clock)
    assert events == [(0.0, A, False), (0.25, B, False), (0.5, C, False), (0.75, D, False), (1.0, Batch([END]).sse(), True)]


@pytest.mark.parametrize(
    "request_fields",
    [
        {"cache": {"replay": {"chunks_per_second": 4}}},
        {"replay": {"chunks_per_second": 4}},
        {"penstock": {"replay": {"chunks_per_second": 4}}},
    ],
)
async def test_the_request_may_choose_the_pace(clock: Clock, request_fields: Json) -> None:
    cache = made(clock)
    provider = await filled(clock, cache)
    events = await taken(await cache(asked(cache, request_fields), provider), clock)
    assert [when for when, _, _ in events] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert provider.calls == 1, "the pace is no part of the question"


async def test_who_reads_late_is_not_made_to_wait_again(clock: Clock) -> None:
    """Points in time, not pauses: what was due while the client was slow comes at once."""
    cache = made(clock, replay={"chunks_per_second": 1.0})
    provider = await filled(clock, cache)
    async for _ in (await cache(asked(cache), provider)).chunks:
        clock.now += 2.5
    assert sum(clock.waits) == 0.0


@pytest.mark.parametrize("replay", ["recorded", {"chunks_per_second": 1.0}])
async def test_who_does_not_stream_never_waits(clock: Clock, replay: Any) -> None:
    cache = made(clock, replay=replay)
    provider = await filled(clock, cache)
    reply = await cache(asked(cache, {"stream": False}), provider)
    await taken(reply)
    assert clock.waits == []


async def test_a_whole_reply_is_replayed_whole(clock: Clock) -> None:
    completion = {"id": "c", "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}], "usage": USAGE}
    cache = made(clock)
    provider = await filled(clock, cache, Provider(clock, (0.5, [completion]), whole=True))
    reply = await cache(asked(cache, {"stream": False}), provider)
    assert reply.whole
    (batch,) = [batch async for batch in reply.chunks]
    assert batch.chunks == [completion]
    assert batch.final


async def test_the_trailer_of_a_hit_is_filled_when_the_finish_is_handed_over_and_not_before(clock: Clock) -> None:
    cache = made(clock)
    provider = await filled(clock, cache)
    reply = await cache(asked(cache), provider)
    assert reply.head.target == "acme/m"
    assert reply.head.dropped == ("seed",)
    assert (reply.head.cache, reply.head.age, reply.head.tries) == ("hit", 0.0, ())
    async with aclosing(reply.chunks) as batches:  # type: ignore[type-var]
        await anext(batches)
        assert (reply.trailer.usage, reply.trailer.finish_reasons) == (None, {})
        await anext(batches)
        assert (reply.trailer.usage, reply.trailer.finish_reasons, reply.trailer.chunks) == (USAGE, {0: "stop"}, 5)


async def test_two_hits_share_nothing_that_one_could_change(clock: Clock) -> None:
    cache = made(clock)
    provider = await filled(clock, cache)
    replies = [await cache(asked(cache), provider) for _ in range(2)]
    for reply in replies:
        await taken(reply)
        assert reply.trailer.usage == USAGE
        reply.trailer.usage.clear()
        reply.trailer.finish_reasons.clear()


async def test_age_and_time_to_live_follow_the_clock(clock: Clock) -> None:
    cache = made(clock, ttl=10.0)
    provider = await filled(clock, cache)
    clock.now += 9.9
    assert (await cache(asked(cache), provider)).head.age == pytest.approx(9.9)
    clock.now += 0.1
    assert (await cache(asked(cache), provider)).head.cache == "miss"


async def test_the_time_to_live_comes_from_the_request_that_stored(clock: Clock) -> None:
    cache = made(clock)
    provider = Provider(clock, *BATCHES)
    await taken(await cache(asked(cache, {"cache": {"ttl": 5}}), provider))
    clock.now += 4
    assert (await cache(asked(cache), provider)).head.cache == "hit"
    clock.now += 1
    assert (await cache(asked(cache, {"cache": {"ttl": 600}}), provider)).head.cache == "miss"


async def test_the_default_is_half_an_hour_and_never_above_the_operators_bound(clock: Clock) -> None:
    for options, seconds in [({}, 1800), ({"max_ttl": 60.0}, 60), ({"ttl": 5.0}, 5)]:
        cache = made(clock, **options)
        provider = await filled(clock, cache)
        clock.now += seconds - 0.001
        assert (await cache(asked(cache), provider)).head.cache == "hit"
        clock.now += 0.002
        assert (await cache(asked(cache), provider)).head.cache == "miss"


async def test_recording_stops_and_its_memory_goes_as_soon_as_an_entry_is_too_large(clock: Clock) -> None:
    class Watched(Batch):
        encodings = 0

        def sse(self) -> bytes:
            Watched.encodings += 1
            return super().sse()

    async def next(call: Call) -> Reply:
        async def flow() -> AsyncIterator[Batch]:
            for number in range(10):
                yield Watched([encoded("x" * 500)], final=number == 9)

        return Reply(Head("acme/m"), flow(), Trailer())

    cache = made(clock, max_entry_bytes=1024)
    batches = [batch async for batch in (await cache(asked(cache), next)).chunks]
    assert len(batches) == 10
    assert Watched.encodings == 2, "what comes after the one that was too much is not even looked at"
    assert cache.health() == {"entries": 0, "bytes": 0}


def test_a_recording_that_is_given_up_holds_nothing() -> None:
    recorder = Recording(Clock()).recorder
    tracemalloc.start()
    try:
        for _ in range(20):
            recorder.see(Batch([b"x" * 2**16]))
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert recorder.over
    assert held < 2**16 < 2**19 < most


@pytest.mark.parametrize("reasons", [{}, {0: "stop", 1: "length"}, {0: None}, {0: "error"}])
async def test_every_choice_must_have_ended_well(clock: Clock, reasons: dict[int, Any]) -> None:
    cache = made(clock)
    await filled(clock, cache, Provider(clock, *BATCHES, reasons=reasons))
    assert cache.health()["entries"] == 0


async def test_a_stream_without_a_final_batch_is_not_stored(clock: Clock) -> None:
    async def next(call: Call) -> Reply:
        async def flow() -> AsyncIterator[Batch]:
            yield Batch([A])

        trailer = Trailer()
        trailer.finish_reasons = {0: "stop"}
        return Reply(Head("acme/m"), flow(), trailer)

    cache = made(clock)
    await taken(await cache(asked(cache), next))
    assert cache.health()["entries"] == 0


async def test_a_reply_that_is_closed_closes_what_it_came_from(clock: Clock) -> None:
    closed = []

    async def next(call: Call) -> Reply:
        async def flow() -> AsyncIterator[Batch]:
            try:
                yield Batch([A])
                yield Batch([END], final=True)
            finally:
                closed.append(True)

        trailer = Trailer()
        trailer.finish_reasons = {0: "stop"}
        return Reply(Head("acme/m"), flow(), trailer)

    cache = made(clock)
    reply = await cache(asked(cache), next)
    assert await anext(reply.chunks)
    await reply.close()
    assert closed == [True]
    assert reply.trailer.outcome is Outcome.CANCELLED
    assert cache.health()["entries"] == 0


async def test_errors_of_the_upstream_pass_as_they_are(clock: Clock) -> None:
    error = UpstreamCut("no")

    async def next(call: Call) -> Reply:
        raise error

    cache = made(clock)
    with pytest.raises(UpstreamCut) as caught:
        await compose([cache], next)(asked(cache))
    assert caught.value is error


class Still:
    """Timers that never fire."""

    def __init__(self) -> None:
        self.open = 0

    def __call__(self, seconds: float, wake: Callable[[], None]) -> Still:
        self.open += 1
        return self

    def cancel(self) -> None:
        self.open -= 1


async def test_a_replay_that_waits_is_ended_from_outside_at_once(clock: Clock) -> None:
    """What the relay does when a deadline passes or the gateway drains: release, and the pending read raises."""
    still = Still()
    cache = Cache(mode="opt_out", replay={"chunks_per_second": 0.1}, _clock=clock, _later=still)
    provider = await filled(clock, cache)
    reply = await cache(asked(cache), provider)
    await anext(reply.chunks)
    waiting = asyncio.ensure_future(anext(reply.chunks))
    await until(lambda: still.open)
    reply.trailer.release()
    with pytest.raises(GatewayError):
        async with asyncio.timeout(2):
            await waiting
    assert still.open == 0, "and leaves no timer behind"


async def test_a_client_that_leaves_a_waiting_replay_leaves_no_timer(clock: Clock) -> None:
    still = Still()
    cache = Cache(mode="opt_out", replay="recorded", _clock=clock, _later=still)
    provider = await filled(clock, cache)
    waiting = asyncio.ensure_future(cache(asked(cache), provider))
    await until(lambda: still.open)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert still.open == 0


async def test_draining_ends_a_replay_with_an_error_chunk() -> None:
    async with rig() as r:
        await r.ask(cache={})
        async with gate.RawClient(r.running.port) as client:
            await client.send(gate.raw_request(chat(cache={"replay": {"chunks_per_second": 0.1}})))
            await client.first_byte()
            r.running.edge.end_all()
            answer = await client.answer()
        assert answer.headers["X-Cache"] == "hit"
        assert answer.error is not None
        assert answer.error["code"] == "draining"
        assert not answer.done


# --- small things


def test_a_replayed_batch_is_taken_apart_only_when_somebody_looks() -> None:
    batch = Replayed(A + B)
    assert batch.sse() == A + B
    assert single_events(batch.sse()) == [A, B]
    assert batch.items == [A, B]
    assert batch.chunks == [chunk("a"), chunk("b")]
    final = Replayed(A + Batch([END]).sse(), final=True)
    assert final.items == [A, END]
    assert final.chunks == [chunk("a"), END]
    with pytest.raises(AttributeError):
        final.nothing  # noqa: B018


async def test_its_figures(clock: Clock) -> None:
    cache = made(clock)
    provider = await filled(clock, cache)
    for _ in range(2):
        await taken(await cache(asked(cache), provider))
    await taken(await cache(asked(cache, headers={"cache-control": "no-cache"}), provider))
    await taken(await cache(asked(cache, {"cache": False}), provider))
    clock.now += 3600
    held = cache.health()
    assert held == {"entries": 0, "bytes": 0}
    assert figures(cache) == {
        "penstock_cache_hits_total": 2,
        "penstock_cache_misses_total": 1,
        "penstock_cache_bypass_total": 2,
        "penstock_cache_stores_total": 2,
        "penstock_cache_saved_tokens_total": 20,
        "penstock_cache_evictions_totalsize": 0,
        "penstock_cache_evictions_totalexpired": 1,
        "penstock_cache_bytes": 0,
        "penstock_cache_entries": 0,
    }
    assert all(isinstance(found, Sample) and found.help for found in cache.samples())


async def test_another_store_may_stand_in_for_memory(clock: Clock) -> None:
    store = MemoryStore(2**20, clock)
    one, other = made(clock, _store=store), made(clock, _store=store)
    provider = await filled(clock, one)
    assert (await other(asked(other), provider)).head.cache == "hit"


async def test_the_call_goes_inward_as_it_is(clock: Clock) -> None:
    seen: list[Call] = []

    async def next(call: Call) -> Reply:
        seen.append(call)
        return await Provider(clock, *BATCHES)(call)

    cache = made(clock)
    call = asked(cache)
    await (await cache(call, next)).close()
    assert seen == [call]
    assert replace(call) == call
