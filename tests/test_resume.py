"""Resumable streams at real sockets: whoever comes back gets the rest, nobody else gets anything, and nothing stays for ever.

Strategy: a provider that says a word whenever the test lets it, readers that break off where the test wants, and the timers of
the middleware rung by hand.
The one rule: whatever the readers did, the provider was asked once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy

from middleware import TABLE
from middleware.resume import Resume
from proxy.app import Gateway
from proxy.config import ConfigError, parse
from tests.support.gateway import ask, chat, gateway, until
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
Event = tuple[int | None, str]
CONFIG = """
server: {{port: 0, drain_timeout: 50ms{more}}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  text: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789", completions: ["*"]}}
middleware:
  - resume: {{{options}}}
  - metrics
{auth}
  - tracking
  - cache: {{mode: opt_in}}
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: 5s, idle_timeout: 5s, call_timeout: 10s}}
"""
AUTH = '  - auth: {keys: [{name: one, key: "sk-one-0123456789abcdef"}, {name: two, key: "sk-two-0123456789abcdef", admin: true}]}'
ONE, TWO = ({"Authorization": f"Bearer sk-{name}-0123456789abcdef"} for name in ("one", "two"))
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def word(text: str) -> bytes:
    chunk = {"id": "c", "created": 1, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: %b\n\n" % json.dumps(chunk).encode()


ENDING = (
    b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    + b'data: {"id":"c","created":1,"choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode()
    + b"data: [DONE]\n\n"
)


class Teller:
    """A provider whose answers the test dictates."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.count = 0

    async def __call__(self, asked: Asked, line: Line) -> None:
        await line.head()
        while (piece := await self.said.get()) is not None:
            await line.chunk(piece)
            if piece is ENDING:
                await line.end()
                return
        line.hang_up()

    def say(self, words: int = 1) -> None:
        for _ in range(words):
            self.count += 1
            self.said.put_nowait(word(f"w{self.count} "))

    def finish(self) -> None:
        self.said.put_nowait(ENDING)

    def cut(self) -> None:
        self.said.put_nowait(None)


class Reader:
    """A client that reads a stream event by event. events: (id, data)."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.events: list[Event] = []

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        return self.response.headers

    @property
    def id(self) -> str:
        return self.response.headers["X-Stream-Id"]

    @property
    def text(self) -> str:
        chunks = [json.loads(data) for _, data in self.events if data != "[DONE]"]
        return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])

    @property
    def ids(self) -> list[int | None]:
        return [number for number, _ in self.events]

    async def next(self) -> Event | None:
        number: int | None = None
        async with asyncio.timeout(10):
            while line := (await self.response.content.readline()).decode():
                if line.startswith("id: "):
                    number = int(line[4:])
                elif line.startswith("data: "):
                    self.events.append((number, line[6:].rstrip("\n")))
                    return self.events[-1]
        return None

    async def some(self, count: int) -> Reader:
        for _ in range(count):
            assert await self.next() is not None
        return self

    async def all(self) -> Reader:
        while await self.next():
            pass
        return self

    def leave(self) -> None:
        self.response.close()


class Here:
    """A gateway, its provider, and a client."""

    def __init__(self, running: Gateway, upstream: Upstream, teller: Teller, session: aiohttp.ClientSession) -> None:
        self.gateway, self.upstream, self.teller, self.session = running, upstream, teller, session
        self.url = f"http://127.0.0.1:{running.port}"
        self.open: list[aiohttp.ClientResponse] = []

    @property
    def layer(self) -> Resume:
        return next(layer for layer in self.gateway.layers if isinstance(layer, Resume))

    async def post(self, headers: Mapping[str, str] | None = None, path: str = "/v1/chat/completions", **fields: Any) -> Reader:
        body = {**chat("openai/m"), "resume": True, **fields}
        return self.reader(await self.session.post(self.url + path, json=body, headers=headers))

    async def get(self, path: str, after: int | None = None, headers: Mapping[str, str] | None = None) -> Reader:
        fields = {**(headers or {}), **({} if after is None else {"Last-Event-ID": str(after)})}
        return self.reader(await self.session.get(self.url + (path if path[0] == "/" else f"/v1/streams/{path}"), headers=fields))

    async def delete(self, identity: str, headers: Mapping[str, str] | None = None) -> Reader:
        return self.reader(await self.session.delete(f"{self.url}/v1/streams/{identity}", headers=headers))

    def reader(self, response: aiohttp.ClientResponse) -> Reader:
        self.open.append(response)
        return Reader(response)

    def samples(self) -> dict[str, float]:
        return {sample.name + "".join(sample.labels.values()): sample.value for sample in self.layer.samples()}


@asynccontextmanager
async def serving(options: str = "", *, auth: bool = False, more: str = "", answer: Any = None) -> AsyncIterator[Here]:
    teller = Teller()
    async with (
        Upstream(answer or teller) as upstream,
        gateway(upstream.url, CONFIG, options=options, auth=AUTH if auth else "", more=more) as running,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        here = Here(running, upstream, teller, session)
        try:
            yield here
        finally:
            for response in here.open:
                response.close()


class Bells:
    """The middleware's timers: they ring when the test says so. set: those that are set now, by their seconds."""

    def __init__(self) -> None:
        self.set: list[tuple[float, Callable[[], object], object]] = []

    def after(self, seconds: float, callback: Callable[[], object]) -> Any:
        bells = self

        class Bell:
            def cancel(self) -> None:
                bells.set = [entry for entry in bells.set if entry[2] is not self]

        bell = Bell()
        self.set.append((seconds, callback, bell))
        return bell

    @property
    def times(self) -> list[float]:
        return [seconds for seconds, _, _ in self.set]

    def ring(self) -> None:
        entries, self.set = self.set, []
        for _, callback, _ in entries:
            callback()


@pytest.fixture
def bells(monkeypatch: pytest.MonkeyPatch) -> Bells:
    made = Bells()
    monkeypatch.setattr("middleware.resume.streams.after", made.after)
    return made


class TestReading:
    async def test_every_event_carries_its_number_and_the_reply_names_its_stream(self) -> None:
        async with serving() as here:
            here.teller.say(3)
            here.teller.finish()
            reader = await (await here.post(stream_options={"include_usage": True})).all()
            assert reader.ids == [1, 2, 3, 4, 5, 6], "words, finish, usage, [DONE]"
            assert reader.events[-1] == (6, "[DONE]")
            assert len(reader.id) >= 22 + 4, "128 bits in base64, and a prefix"

    async def test_ids_differ(self) -> None:
        async with serving() as here:
            here.upstream.answer = stream([word("x"), ENDING])
            assert len({(await (await here.post()).all()).id for _ in range(5)}) == 5

    async def test_who_comes_back_gets_the_rest_live(self) -> None:
        async with serving() as here:
            here.teller.say(3)
            first = await (await here.post()).some(2)
            first.leave()
            again = await (await here.get(first.id, after=2)).some(1)
            here.teller.say(1)
            assert (await again.next() or (0, ""))[0] == 4
            here.teller.finish()
            await again.all()
            assert again.ids == [3, 4, 5, 6]
            assert first.text + again.text == "w1 w2 w3 w4 "
            assert len(here.upstream.asked) == 1

    async def test_the_position_may_stand_in_the_query_and_the_header_goes_before_it(self) -> None:
        async with serving() as here:
            here.teller.say(4)
            here.teller.finish()
            first = await (await here.post()).all()
            path = f"/v1/streams/{first.id}?after=1"
            assert (await (await here.get(path)).all()).ids == [2, 3, 4, 5, 6]
            assert (await (await here.get(path, after=3)).all()).ids == [4, 5, 6]

    async def test_the_upstream_is_read_on_while_nobody_reads(self) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            first.leave()
            await until(lambda: here.samples()["penstock_resume_readers"] == 0)
            here.teller.say(5)
            here.teller.finish()
            await until(lambda: here.samples()["penstock_resume_keptover"] == 1)
            assert (await (await here.get(first.id, after=1)).all()).text == "w2 w3 w4 w5 w6 "

    async def test_from_the_start_all_is_replayed_also_while_it_runs(self) -> None:
        async with serving() as here:
            here.teller.say(3)
            first = await (await here.post()).some(3)
            second = await (await here.get(first.id)).some(3)
            here.teller.finish()
            assert (await first.all()).events == (await second.all()).events
            assert (await (await here.get(first.id)).all()).events == first.events
            assert second.headers["Content-Type"] == first.headers["Content-Type"]

    async def test_a_reader_has_a_request_id_of_its_own(self) -> None:
        async with serving() as here:
            here.teller.say(1)
            here.teller.finish()
            first = await (await here.post({"X-Request-Id": "mine-1"})).all()
            again = await here.get(first.id, headers={"X-Request-Id": "mine-2"})
            assert (first.headers["X-Request-Id"], again.headers["X-Request-Id"]) == ("mine-1", "mine-2")
            assert again.id == first.id
            assert again.headers["X-Penstock-Target"] == "openai/m"

    async def test_past_the_end_of_a_finished_stream_there_is_nothing(self) -> None:
        async with serving() as here:
            here.teller.say(1)
            here.teller.finish()
            first = await (await here.post()).all()
            last = first.ids[-1]
            assert last is not None
            assert (await here.get(first.id, after=last)).status == 204
            cut = await (await here.get(first.id, after=last - 1)).all()
            assert cut.events == first.events[-1:]

    @pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}], ids=["no usage", "usage"])
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_whoever_has_some_of_the_last_write_gets_the_rest_of_it_and_nothing_twice(self, path: str, usage: Json) -> None:
        """Text, finish chunk, usage and `[DONE]` came in one read: a line may break between any two of them."""
        async with serving() as here:
            here.teller.said.put_nowait(word("a") + word("b") + ENDING)
            here.teller.cut()
            asked: Json = {"prompt": "Hi"} if path.endswith("/v1/completions") else {}
            first = await (await here.post(path=path, **usage, **asked)).all()
            assert first.events[-1][1] == "[DONE]"
            for has in range(1, len(first.events)):
                assert (await (await here.get(first.id, after=has)).all()).events == first.events[has:]

    async def test_a_broken_stream_ends_with_its_numbered_error_for_everybody_and_then_a_204(self) -> None:
        async with serving() as here:
            here.teller.say(2)
            first = await (await here.post()).some(2)
            here.teller.cut()
            await first.all()
            assert first.ids == [1, 2, 3]
            again = await (await here.get(first.id, after=2)).all()
            assert [number for number, _ in again.events] == [3]
            assert json.loads(again.events[0][1])["error"]["code"] == "upstream_cut"
            assert (await here.get(first.id, after=3)).status == 204

    @pytest.mark.parametrize("written", ["x", "-1", "1.5", "9" * 20])
    async def test_a_position_that_is_none_is_refused(self, written: str) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            assert (await here.get(first.id, headers={"Last-Event-ID": written})).status == 400
            assert (await here.get(f"/v1/streams/{first.id}?after={written}")).status == 400

    async def test_a_position_that_has_not_come_yet_is_refused(self) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            assert (await here.get(first.id, after=2)).status == 400

    async def test_head_says_that_it_is_there(self) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            async with here.session.head(f"{here.url}/v1/streams/{first.id}") as response:
                assert (response.status, response.headers["X-Stream-Id"]) == (200, first.id)

    async def test_text_completions_are_read_again_in_their_own_form(self) -> None:
        async with serving() as here:
            here.upstream.answer = stream([
                b'data: {"id":"c","choices":[{"index":0,"text":"word","finish_reason":null}]}\n\n',
                b'data: {"id":"c","choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n',
                b"data: [DONE]\n\n",
            ])  # fmt: skip
            first = await here.post(path="/v1/completions", model="text/m", prompt="p")
            await first.all()
            again = await (await here.get(first.id)).all()
            assert again.events == first.events
            assert json.loads(again.events[0][1])["choices"][0]["text"] == "word"
            assert first.ids == [1, 2, 3]

    async def test_a_hit_of_the_cache_that_was_stored_whole_is_resumable_too(self) -> None:
        body = {"id": "c", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]}
        async with serving(answer=whole(json.dumps(body).encode())) as here:
            first = await here.post(stream=False, cache=True)
            assert (await first.response.json())["choices"][0]["message"]["content"] == "Hi"
            assert "X-Stream-Id" not in first.headers
            hit = await (await here.post(cache=True)).all()
            assert (hit.text, hit.headers["X-Cache"]) == ("Hi", "hit")
            assert (await (await here.get(hit.id, after=1)).all()).events == hit.events[1:]


class TestWho:
    async def test_on_by_request_and_off_by_default(self) -> None:
        async with serving() as here:
            here.upstream.answer = stream([word("x"), ENDING])
            plain = await (await here.post(resume=None)).all()
            assert "X-Stream-Id" not in plain.headers
            assert plain.ids == [None] * 3
            assert "X-Stream-Id" in (await here.post(resume=None, penstock={"resume": True})).headers
            refused = await here.post(resume="yes")
            assert (refused.status, (await refused.response.json())["error"]["param"]) == (400, "resume")
            assert not {"resume", "background", "penstock"} & here.upstream.asked[0].json.keys()

    async def test_on_by_config_and_off_by_request(self) -> None:
        async with serving("mode: all") as here:
            here.upstream.answer = stream([word("x"), ENDING])
            assert "X-Stream-Id" in (await here.post(resume=None)).headers
            assert "X-Stream-Id" not in (await here.post(resume=False)).headers

    async def test_unknown_foreign_and_forgotten_streams_are_one_404(self, bells: Bells) -> None:
        async with serving(auth=True) as here:
            here.upstream.answer = stream([word("x"), ENDING])
            first = await (await here.post(ONE)).all()
            assert (await here.get(first.id, headers=ONE)).status == 200
            foreign = await here.get(first.id, headers=TWO)
            unknown = await here.get("str_" + "a" * 32, headers=ONE)
            tokened = await here.get(f"/v1/streams/{first.id}?token=wrong", headers=ONE)
            bells.ring()
            expired = await here.get(first.id, headers=ONE)
            bodies = {await found.response.read() for found in (foreign, unknown, tokened, expired)}
            assert {found.status for found in (foreign, unknown, tokened, expired)} == {404}
            assert len(bodies) == 1
            assert first.id.encode() not in bodies.pop()
            assert (await here.get(first.id)).status == 401

    async def test_a_foreign_key_cannot_cancel(self) -> None:
        async with serving(auth=True) as here:
            here.teller.say(1)
            first = await (await here.post(ONE)).some(1)
            assert (await here.delete(first.id, TWO)).status == 404
            assert here.upstream.open == 1
            assert (await here.delete(first.id, ONE)).status == 200


class TestEnds:
    async def test_delete_closes_the_upstream_and_readers_get_an_error_chunk(self) -> None:
        async with serving() as here:
            here.teller.say(2)
            first = await (await here.post()).some(2)
            gone = await here.delete(first.id)
            assert (gone.status, (await gone.response.json())["cancelled"]) == (200, True)
            await first.all()
            assert json.loads(first.events[-1][1])["error"]["code"] == "cancelled"
            await until(lambda: here.upstream.open == 0)
            assert (await here.get(first.id)).status == 404
            assert (await here.delete(first.id)).status == 404
            assert here.samples()["penstock_resume_bytes"] == 0

    async def test_after_its_grace_the_upstream_is_closed(self, bells: Bells, lines: list[Json]) -> None:
        async with serving("grace: 7s, keep: 60s") as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            assert bells.times == []
            first.leave()
            await until(lambda: bells.times == [7])
            assert here.upstream.open == 1
            bells.ring()
            await until(lambda: here.upstream.open == 0)
            assert [line["outcome"] for line in lines if line["event"] == "request"] == ["client_gone"]
            again = await (await here.get(first.id)).all()
            assert again.text == "w1 "
            assert json.loads(again.events[-1][1])["error"]["code"] == "stream_abandoned"

    async def test_who_comes_back_within_the_grace_stops_it(self, bells: Bells) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            first.leave()
            await until(lambda: bells.times == [60])
            again = await (await here.get(first.id)).some(1)
            assert bells.times == []
            again.leave()
            await until(lambda: bells.times == [60])

    async def test_usage_of_a_stream_that_ended_without_readers_is_counted_once(self, bells: Bells, lines: list[Json]) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            first.leave()
            await until(lambda: bells.times == [60])
            here.teller.say(1)
            here.teller.finish()
            await until(lambda: bells.times == [300])
            await (await here.get(first.id)).all()
            found = [line for line in lines if line["event"] == "request"]
            assert [(line["outcome"], line["prompt_tokens"], line["completion_tokens"]) for line in found] == [
                ("completed", 3, 4)
            ]
            text = await (await here.get("/metrics")).response.text()
            assert re.findall(r'^penstock_tokens_total\{.*type="input".*\} (\S+)$', text, re.M) == ["3.0"]
            assert sum(float(value) for value in re.findall(r"^penstock_requests_total\{.*\} (\S+)$", text, re.M)) == 1

    async def test_the_longest_gap_is_that_of_the_provider(self, lines: list[Json]) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            await asyncio.sleep(0.05)
            here.teller.finish()
            await first.all()
            assert next(line for line in lines if line["event"] == "request")["longest_gap_ms"] >= 40

    async def test_the_total_deadline_ends_the_stream_and_not_those_who_read_it_later(self, bells: Bells) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post(timeout={"total_timeout": 300})).all()
            assert json.loads(first.events[-1][1])["error"]["code"] == "timeout_total"
            await until(lambda: here.upstream.open == 0)
            again = await (await here.get(first.id)).all()
            assert json.loads(again.events[-1][1])["error"]["code"] == "timeout_total"
            assert again.text == "w1 "

    async def test_draining_counts_readers_and_ends_them_with_an_error_chunk(self) -> None:
        async with serving() as here:
            here.teller.say(1)
            first = await (await here.post()).some(1)
            again = await (await here.get(first.id)).some(1)
            assert here.gateway.edge.open_calls == 2
            await here.gateway.drain()
            for reader in (first, again):
                await reader.all()
                number, last = reader.events[-1]
                assert json.loads(last)["error"]["code"] == "draining"
                assert number is None, "the reader is told, the stream has not ended: the browser keeps its place"
            assert here.gateway.edge.open_calls == 0

    async def test_the_gateways_end_closes_what_nobody_reads(self, lines: list[Json]) -> None:
        async with Upstream(teller := Teller()) as upstream:
            async with (
                gateway(upstream.url, CONFIG, options="", auth="", more="") as running,
                aiohttp.ClientSession() as session,
            ):
                here = Here(running, upstream, teller, session)
                teller.say(1)
                first = await (await here.post()).some(1)
                first.leave()
                await until(lambda: here.samples()["penstock_resume_readers"] == 0)
            await until(lambda: upstream.open == 0)
            assert [line["outcome"] for line in lines if line["event"] == "request"] == ["draining"]

    async def test_an_error_before_the_first_event_keeps_its_status(self) -> None:
        async with serving(answer=whole(b'{"error":{"message":"no"}}', 418)) as here:
            reader = await here.post()
            assert reader.status == 418
            assert here.samples()["penstock_resume_streams_total"] == 0


class TestBounds:
    async def test_a_position_that_was_let_go_of_is_a_410_and_who_keeps_up_is_not_touched(self) -> None:
        async with serving("max_stream_bytes: 64KiB") as here:
            first = await self.long(here, 300)
            lost = await here.get(first.id, after=1)
            assert (lost.status, (await lost.response.json())["error"]["code"]) == (410, "stream_position_gone")
            assert (await here.get(first.id)).status == 410
            last = await (await here.get(first.id, after=299)).some(1)
            assert last.ids == [300]
            assert here.samples()["penstock_resume_bytes"] <= 64 * 1024 + 4 * 4096

    async def long(self, here: Here, words: int) -> Reader:
        reader = await self.begun(here)
        for _ in range(words - 1):
            here.teller.say(1)
            await reader.some(1)
        return reader

    async def begun(self, here: Here) -> Reader:
        here.teller.say(1)
        return await (await here.post()).some(1)

    async def test_finished_streams_go_first_when_all_together_are_too_large(self, bells: Bells) -> None:
        async with serving("max_bytes: 64KiB") as here:
            here.upstream.answer = stream([word("x" * 1000), word("y" * 1000), ENDING])
            found = [await (await here.post()).all() for _ in range(12)]
            statuses = [(await here.get(reader.id)).status for reader in found]
            assert statuses == sorted(statuses, reverse=True), "the oldest have gone"
            assert set(statuses) == {200, 404}
            assert here.samples()["penstock_resume_bytes"] <= 64 * 1024
            assert here.samples()["penstock_resume_expired_totalsize"] == statuses.count(404)

    async def test_running_streams_let_go_of_their_beginnings_before_memory_grows(self) -> None:
        async with serving("max_bytes: 64KiB") as here:
            first = await self.long(here, 200)
            assert here.samples()["penstock_resume_bytes"] <= 64 * 1024
            assert (await here.get(first.id)).status == 410
            here.teller.finish()
            assert len((await first.all()).events) == 202

    async def test_after_its_time_it_is_forgotten(self, bells: Bells) -> None:
        async with serving("keep: 9s") as here:
            here.upstream.answer = stream([word("x"), ENDING])
            reader = await (await here.post()).all()
            assert bells.times == [9]
            bells.ring()
            assert (await here.get(reader.id)).status == 404
            assert (here.samples()["penstock_resume_bytes"], here.samples()["penstock_resume_expired_totalage"]) == (0, 1)

    async def test_what_is_forgotten_is_free_at_once(self, bells: Bells) -> None:
        """Nothing waits for the garbage collector, which would come much later."""
        async with serving() as here:
            here.upstream.answer = stream([word("x"), ENDING])
            reader = await (await here.post()).all()
            kept = here.layer._streams.find(reader.id)
            assert kept is not None
            flight = weakref.ref(kept.flight)
            gc.disable()
            try:
                del kept
                bells.ring()
                await until(lambda: flight() is None)
            finally:
                gc.enable()

    @pytest.mark.parametrize("options", ["keep: 2d", "max_bytes: 1", "mode: some"])
    def test_options_out_of_range_are_faults(self, options: str) -> None:
        with pytest.raises(ConfigError, match="resume"):
            parse(CONFIG.format(url="http://h", options=options, auth="", more=""), {}, TABLE)

    def test_it_needs_one_worker(self) -> None:
        with pytest.raises(ConfigError, match="known to one process only"):
            parse(CONFIG.format(url="http://h", options="", auth="", more=", workers: 2"), {}, TABLE)


class TestBackground:
    async def accepted(self, here: Here, headers: Mapping[str, str] | None = None, **fields: Any) -> tuple[str, str]:
        """(id, URL) of a stream in the background."""
        reader = await here.post(headers, background=True, resume=None, **fields)
        assert (reader.status, reader.headers["Cache-Control"]) == (202, "no-store")
        found = await reader.response.json()
        assert found["id"] == reader.id
        return found["id"], found["url"]

    async def test_a_202_names_a_url_that_a_browser_can_follow(self) -> None:
        async with serving(auth=True) as here:
            identity, url = await self.accepted(here, ONE, stream=False)
            here.teller.say(2)
            reader = await (await here.get(url)).some(2)
            reader.leave()
            here.teller.say(1)
            here.teller.finish()
            again = await (await here.get(url, after=2)).all()
            assert (reader.text + again.text, again.ids) == ("w1 w2 w3 ", [3, 4, 5])
            assert (await here.get(url, after=5)).status == 204, "this stops the browser"
            assert (await (await here.get(identity, headers=ONE)).all()).text == "w1 w2 w3 "
            assert len(here.upstream.asked) == 1
            assert here.upstream.asked[0].json["stream"] is True

    async def test_the_token_opens_one_stream_and_only_to_read(self) -> None:
        async with serving(auth=True) as here:
            _, url = await self.accepted(here, ONE)
            other, _ = await self.accepted(here, ONE)
            token = url.partition("?")[2]
            assert (await here.get(f"/v1/streams/{other}?{token}")).status == 404
            async with here.session.delete(here.url + url) as refused:
                assert refused.status == 401
            async with here.session.delete(here.url + url, headers=TWO) as foreign:
                assert foreign.status == 404
            async with here.session.post(f"{here.url}/v1/chat/completions?{token}", json=chat("openai/m")) as refused:
                assert refused.status == 401

    async def test_it_is_valid_as_long_as_the_stream_is_kept(self, bells: Bells) -> None:
        async with serving() as here:
            here.upstream.answer = stream([word("x"), ENDING])
            _, url = await self.accepted(here)
            await (await here.get(url)).all()
            bells.ring()
            assert (await here.get(url)).status == 404

    async def test_the_token_is_in_no_log_line_and_no_metric(self, lines: list[Json]) -> None:
        async with serving(auth=True) as here:
            here.upstream.answer = stream([word("x"), ENDING])
            identity, url = await self.accepted(here, ONE)
            token = url.partition("=")[2]
            await (await here.get(url)).all()
            await here.get(f"/v1/streams/str_x?token={token}")
            await here.get(f"/v1/nowhere?token={token}")
            await here.get(f"/v1/streams/{identity}?token={token}&after=x")
            async with here.session.delete(here.url + url) as refused:
                assert token not in await refused.text()
            assert len([line for line in lines if line["event"] == "request"]) == 5
            assert token not in json.dumps(lines, default=str)
            assert token not in await (await here.get("/metrics", headers=TWO)).response.text()

    async def test_a_reader_with_a_key_gets_an_early_errors_status_and_one_with_the_token_an_event(self) -> None:
        async with serving(answer=whole(b'{"error":{"message":"no"}}', 418), auth=True) as here:
            identity, url = await self.accepted(here, ONE)
            with_key = await here.get(identity, headers=ONE)
            assert (with_key.status, (await with_key.response.json())["error"]["message"]) == (418, "no")
            with_token = await (await here.get(url)).all()
            assert (with_token.status, with_token.ids) == (200, [1])
            assert json.loads(with_token.events[0][1])["error"]["message"] == "no"
            assert (await here.get(url, after=1)).status == 204

    async def test_nobody_who_follows_is_as_nobody_who_reads(self, bells: Bells) -> None:
        async with serving("grace: 7s") as here:
            await self.accepted(here)
            await until(lambda: here.upstream.open == 1)
            assert bells.times == [7]
            bells.ring()
            await until(lambda: here.upstream.open == 0)

    async def test_a_reader_who_waits_for_the_first_event_can_leave(self, bells: Bells) -> None:
        async with serving("grace: 7s") as here:
            identity, _ = await self.accepted(here)
            waiting = asyncio.create_task(here.get(identity))
            await until(lambda: here.samples()["penstock_resume_readers"] == 1)
            assert bells.times == []
            waiting.cancel()
            await until(lambda: bells.times == [7])

    async def test_delete_ends_it_before_the_first_event(self, lines: list[Json]) -> None:
        async with serving() as here:
            identity, _ = await self.accepted(here)
            await until(lambda: here.upstream.open == 1)
            waiting = asyncio.create_task(here.get(identity))
            await until(lambda: here.samples()["penstock_resume_readers"] == 1)
            assert (await here.delete(identity)).status == 200
            await until(lambda: here.upstream.open == 0)
            assert (await (await waiting).response.json())["error"]["code"] == "cancelled"
            assert [line["outcome"] for line in lines if "outcome" in line and "model" in line] == ["cancelled"]

    async def test_its_deadline_holds_without_readers(self, bells: Bells) -> None:
        async with serving() as here:
            identity, _ = await self.accepted(here, timeout={"total_timeout": 100})
            assert (await here.get(identity)).status == 504
            await until(lambda: here.upstream.open == 0)
            here.teller.say(1)
            identity, _ = await self.accepted(here, timeout={"total_timeout": 300})
            found = await (await here.get(identity)).all()
            assert json.loads(found.events[-1][1])["error"]["code"] == "timeout_total"

    async def test_draining_tells_who_waits_for_the_first_event(self) -> None:
        async with serving() as here:
            identity, _ = await self.accepted(here)
            waiting = asyncio.create_task(here.get(identity))
            await until(lambda: here.samples()["penstock_resume_readers"] == 1)
            await here.gateway.drain()
            assert ((await waiting).status, (await (await waiting).response.json())["error"]["code"]) == (503, "draining")

    @pytest.mark.parametrize(("fields", "param"), [({"resume": False}, "resume"), ({"background": 1}, "background")])
    async def test_what_makes_no_sense_is_refused(self, fields: Json, param: str) -> None:
        async with serving() as here:
            found = await here.post(**{"background": True, "resume": None, **fields})
            assert (found.status, (await found.response.json())["error"]["param"]) == (400, param)


class TestPages:
    @pytest.mark.parametrize(
        ("cors", "answered"),
        [
            ("", None),
            (', cors: {origins: ["https://app.example"]}', "https://app.example"),
            (', allow_anonymous: true, cors: {origins: ["*"]}', "*"),
        ],
    )
    async def test_pages_of_the_allowed_origins_may_read(self, cors: str, answered: str | None) -> None:
        async with serving(more=cors) as here:
            here.upstream.answer = stream([word("x"), ENDING])
            first = await (await here.post()).all()
            page = {"Origin": "https://app.example"}
            found = [await here.get(first.id, headers=page), await here.get("str_none", headers=page)]
            found.append(await here.get(first.id, after=3, headers=page))
            assert [reader.status for reader in found] == [200, 404, 204]
            assert [reader.headers.get("Access-Control-Allow-Origin") for reader in found] == [answered] * 3

    async def test_a_page_of_another_origin_gets_nothing(self) -> None:
        async with serving(more=', cors: {origins: ["https://other.example"]}') as here:
            here.upstream.answer = stream([word("x"), ENDING])
            first = await (await here.post()).all()
            found = await here.get(first.id, headers={"Origin": "https://app.example"})
            assert (found.status, found.headers.get("Access-Control-Allow-Origin")) == (403, None)

    def test_the_earlier_setting_says_where_it_went(self) -> None:
        with pytest.raises(ConfigError, match=r"resume\.allow_origins \(line 7\): has become server\.cors"):
            parse(CONFIG.format(url="http://h", options='allow_origins: ["*"]', auth="", more=""), {}, TABLE)

    async def test_without_auth_a_page_cannot_come_by_another_name(self) -> None:
        async with serving() as here:
            here.upstream.answer = stream([word("x"), ENDING])
            first = await (await here.post()).all()
            assert (await here.get(first.id, headers={"Host": "evil.example"})).status == 403

    async def test_a_plain_stream_beside_it_is_untouched(self) -> None:
        async with serving() as here:
            here.upstream.answer = stream([word("x"), ENDING])
            answer = await ask(here.gateway.port, chat("openai/m"))
            assert (answer.text, answer.done) == ("x", True)
