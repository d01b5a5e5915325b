"""Smoothed streams: what waits and how long, pushed and pulled; and at the socket, with the official SDK."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware import TABLE
from middleware.smooth.flow import Smoothed
from middleware.smooth.waiting import Merging, Spreading, Waiting
from proxy.config import ConfigError, parse
from proxy.errors import GatewayError, UpstreamCut
from proxy.reply import Batch, Ended, Receive, Trailer
from tests.support.gateway import CONFIG, Answer, ask, chat, gateway, until
from tests.support.upstream import Asked, Line, Upstream, stream

Json = dict[str, Any]
SMOOTH = CONFIG.replace("  - tracking\n", "  - tracking\n  - smooth{options}\n")


class Clock:
    """Time that passes when the test says so. timers: those that are set."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        self.timers.append(Timer(self, when, callback))
        return self.timers[-1]

    def to(self, seconds: float) -> None:
        """On to `seconds` since the beginning; what is due goes off at its time."""
        end = 100.0 + seconds
        while due := [timer for timer in self.timers if timer.when <= end]:
            first = min(due, key=lambda timer: timer.when)
            self.timers.remove(first)
            self.now = max(self.now, first.when)
            first.callback()
        self.now = end


class Timer:
    def __init__(self, clock: Clock, when: float, callback: Callable[[], object]) -> None:
        self._clock, self.when, self.callback = clock, when, callback

    def cancel(self) -> None:
        if self in self._clock.timers:
            self._clock.timers.remove(self)


class Inner:
    """A flow that a test pushes."""

    pushes = True

    def __init__(self) -> None:
        self.paused = 0
        self.resumed = 0
        self.was_finished = 0

    def push(self, receive: Receive, ended: Ended) -> None:
        self.receive, self.ended = receive, ended

    def pause(self) -> None:
        self.paused += 1

    def resume(self) -> None:
        self.resumed += 1

    async def finished(self) -> None:
        self.was_finished += 1

    def __aiter__(self) -> AsyncIterator[Batch]:
        raise AssertionError("it is pushed")

    async def __anext__(self) -> Batch:
        raise AssertionError("it is pushed")

    async def aclose(self) -> None:
        return


class Stage:
    """A smoothed flow between an `Inner` and a reader that notes the texts of each batch it gets."""

    def __init__(self, waiting: Waiting) -> None:
        self.clock, self.inner, self.trailer = Clock(), Inner(), Trailer()
        self.flow = Smoothed(self.inner, waiting, self.trailer, self.clock)
        self.got: list[list[str]] = []
        self.ends: list[Exception | None] = []
        self.flow.push(lambda batch: self.got.append(texts(batch)), self.ends.append)

    def say(self, *said: str, final: bool = False) -> None:
        self.inner.receive(batch_of(*said, final=final))

    def at(self, seconds: float, *said: str) -> None:
        self.clock.to(seconds)
        self.say(*said)


def text_chunk(text: str) -> Json:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return {"id": "c", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": choices}


def batch_of(*said: str, final: bool = False, number: int | None = None) -> Batch:
    return Batch([text_chunk(text) for text in said], final=final, number=number)


def texts(batch: Batch) -> list[str]:
    return [chunk["choices"][0]["delta"]["content"] for chunk in batch.chunks]


class TestMerging:
    async def test_the_first_chunk_goes_at_once_the_rest_together_once_per_interval(self) -> None:
        stage = Stage(Merging(0.05, 1000))
        stage.say("a")
        assert stage.got == [["a"]]
        for number, said in enumerate("bcdefg"):
            stage.at(0.01 + 0.01 * number, said)
        stage.clock.to(0.1)
        assert stage.got == [["a"], ["bcde"], ["fg"]]

    async def test_a_chunk_that_comes_later_than_the_interval_goes_at_once(self) -> None:
        stage = Stage(Merging(0.05, 1000))
        for number, said in enumerate("abc"):
            stage.at(number * 0.06, said)
            assert stage.got[-1] == [said]

    async def test_what_is_as_large_as_size_goes_before_the_interval_is_over(self) -> None:
        stage = Stage(Merging(10, 3))
        for said in "abcdefg":
            stage.say(said)
        assert stage.got == [["a"], ["bcd"], ["efg"]]

    async def test_no_timer_is_set_while_nothing_waits_and_one_while_much_does(self) -> None:
        stage = Stage(Merging(0.05, 1000))
        counts = []
        for said in ("a", "b", "c", "d"):
            stage.say(said)
            counts.append(len(stage.clock.timers))
        stage.clock.to(1)
        assert (counts, len(stage.clock.timers)) == ([0, 1, 1, 1], 0)


class TestSpreading:
    async def test_a_burst_goes_out_chunk_by_chunk_the_first_at_once(self) -> None:
        stage = Stage(Spreading(0.1, 10))
        stage.say(*"abc")
        assert stage.got == [["a"]]
        stage.clock.to(0.1)
        assert stage.got == [["a"], ["b"]]
        stage.clock.to(5)
        assert (stage.got, stage.clock.timers) == ([["a"], ["b"], ["c"]], [])

    async def test_a_stream_slower_than_the_rate_is_not_delayed(self) -> None:
        stage = Stage(Spreading(0.1, 10))
        for number, said in enumerate("abc"):
            stage.at(number * 0.2, said)
            assert stage.got[-1] == [said]

    @given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 8)), max_size=12))
    async def test_no_chunk_waits_longer_than_max_delay_and_all_come_in_order(self, bursts: list[tuple[float, int]]) -> None:
        stage = Stage(Spreading(0.1, 0.3))
        said: list[tuple[float, str]] = []
        late: list[float] = []
        now = 0.0
        for pause, count in bursts:
            now += pause
            stage.clock.to(now)
            for _ in range(count):
                said.append((now, str(len(said))))
            stage.say(*(text for _, text in said[-count:]))
        before = stage.clock.now - 100
        for tick in range(100):
            stage.clock.to(before + tick * 0.01)
            out = sum(map(len, stage.got))
            late += [came for came, _ in said[out:] if stage.clock.now - 100 - came > 0.3 + 1e-6]
        assert [text for got in stage.got for text in got] == [text for _, text in said]
        assert late == []


BOTH = pytest.mark.parametrize("waiting", [lambda: Merging(10, 1000), lambda: Spreading(10, 10)], ids=["merging", "spreading"])


class TestBoth:
    @BOTH
    async def test_the_end_does_not_wait_all_that_is_held_leaves_before_it(self, waiting: Callable[[], Waiting]) -> None:
        stage = Stage(waiting())
        stage.say(*"ab")
        stage.say(*"cd")
        stage.say("end", final=True)
        assert ("".join(map("".join, stage.got[:-1])), stage.got[-1]) == ("abcd", ["end"])
        stage.inner.ended(None)
        await stage.flow.finished()
        assert (stage.ends, stage.clock.timers, stage.inner.was_finished) == ([None], [], 1)

    @BOTH
    async def test_an_error_does_not_wait_either_and_comes_behind_what_was_held(self, waiting: Callable[[], Waiting]) -> None:
        stage, cut = Stage(waiting()), UpstreamCut("cut")
        stage.say(*"ab")
        stage.say("c")
        stage.inner.ended(cut)
        assert ("".join(map("".join, stage.got)), stage.ends, stage.clock.timers) == ("abc", [cut], [])

    @BOTH
    async def test_a_reader_that_is_slow_pauses_the_upstream_and_the_timer(self, waiting: Callable[[], Waiting]) -> None:
        stage = Stage(waiting())
        stage.say("a")
        stage.say("b")
        stage.flow.pause()
        stage.say("c")
        assert (stage.got, stage.clock.timers, stage.inner.paused) == ([["a"]], [], 1)
        stage.clock.to(20)
        stage.flow.resume()
        stage.clock.to(50)
        assert ("".join(map("".join, stage.got)), stage.inner.resumed) == ("abc", 1)

    @BOTH
    async def test_after_the_close_nothing_goes_out_and_no_timer_is_left(self, waiting: Callable[[], Waiting]) -> None:
        stage = Stage(waiting())
        stage.say("a")
        stage.say("b")
        stage.trailer.release()
        stage.say("c")
        stage.inner.ended(None)
        assert (stage.got, stage.ends, stage.clock.timers) == ([["a"]], [], [])

    @BOTH
    async def test_numbered_batches_pass_as_they_are(self, waiting: Callable[[], Waiting]) -> None:
        """Somebody has written down which number is which chunk."""
        stage = Stage(waiting())
        for number, said in enumerate("abc", 1):
            stage.inner.receive(batch_of(said, number=number))
        assert stage.got == [["a"], ["b"], ["c"]]

    @BOTH
    async def test_a_chunk_of_a_shape_that_nobody_knows_ends_the_stream(self, waiting: Callable[[], Waiting]) -> None:
        stage = Stage(Merging(10, 1000))
        stage.inner.receive(Batch([{"choices": [{"index": 0}]}]))
        assert [type(error) for error in stage.ends] == [KeyError]


async def pulled(*batches: Batch, error: GatewayError | None = None) -> AsyncIterator[Batch]:
    for batch in batches:
        yield batch
    if error is not None:
        raise error


class TestPulled:
    @given(count=st.integers(0, 30), interval=st.sampled_from([0.0, math.inf]))
    async def test_what_is_pulled_on_both_sides_is_whole_and_in_order(self, count: int, interval: float) -> None:
        batches = [batch_of(str(number)) for number in range(count)]
        flow = Smoothed(pulled(*batches, batch_of("end", final=True)), Merging(interval, 10), Trailer(), Clock())
        got = [batch async for batch in flow]
        assert "".join(text for batch in got for text in texts(batch)) == "".join(map(str, range(count))) + "end"
        assert [batch.final for batch in got] == [False] * (len(got) - 1) + [True]

    async def test_an_error_comes_behind_what_was_held(self) -> None:
        flow = Smoothed(pulled(batch_of("a"), batch_of("b"), error=UpstreamCut("cut")), Merging(10, 10), Trailer(), Clock())
        got = [await anext(flow), await anext(flow)]
        with pytest.raises(UpstreamCut):
            await anext(flow)
        assert list(map(texts, got)) == [["a"], ["b"]]

    async def test_a_slow_puller_pauses_what_pushes(self) -> None:
        inner = Inner()
        flow = Smoothed(inner, Merging(0, 1), Trailer(), Clock())
        asked = asyncio.ensure_future(anext(flow))
        await asyncio.sleep(0)
        for number in range(4):
            inner.receive(batch_of(str(number)))
        assert inner.paused == 1
        assert texts(await asked) == ["0"]
        assert [texts(await anext(flow)) for _ in range(3)] == [["1"], ["2"], ["3"]]

    async def test_a_pending_read_hears_of_the_close_and_no_task_is_left(self) -> None:
        async def silent() -> AsyncIterator[Batch]:
            await asyncio.Event().wait()
            yield batch_of("never")

        trailer, before = Trailer(), len(asyncio.all_tasks())
        flow = Smoothed(silent(), Merging(10, 10), trailer)
        asked = asyncio.ensure_future(anext(flow))
        await asyncio.sleep(0)
        trailer.release()
        with pytest.raises(GatewayError):
            await asked
        await flow.aclose()
        assert len(asyncio.all_tasks()) == before


# At the socket

WORDS = ["one", " two", " three", " four", " five", " six"]


def word(text: str) -> bytes:
    return b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % text.encode()


END = [b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n', b"data: [DONE]\n\n"]


def contents(answer: Answer) -> list[str]:
    return [found for chunk in answer.chunks if (found := chunk["choices"][0]["delta"].get("content"))]


async def answered(options: str, pieces: list[bytes], **fields: Any) -> Answer:
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, SMOOTH, options=options) as running:
        return await ask(running.port, chat(**fields))


ASKED = pytest.mark.parametrize(
    ("options", "fields"),
    [(": {interval: 10s}", {}), ("", {"smooth": {"interval": 10_000}})],
    ids=["config", "request"],
)


@ASKED
async def test_small_deltas_are_merged_and_neither_the_first_chunk_nor_the_end_waits(options: str, fields: Json) -> None:
    """The interval is ten seconds; the answer comes at once."""
    answer = await answered(options, [*map(word, WORDS), *END], **fields)
    assert (contents(answer), answer.done) == (["one", " two three four five six"], True)


async def test_size_lets_a_merged_chunk_go_before_the_interval_is_over() -> None:
    answer = await answered("", [*map(word, WORDS), *END], smooth={"interval": 10_000, "size": 10})
    assert contents(answer) == ["one", " two three", " four five", " six"]


async def test_a_burst_is_spread_and_its_end_ends_it() -> None:
    """All words come in one read; the second is due in a second, but the end is there before."""
    answer = await answered("", [b"".join([*map(word, WORDS), *END])], smooth={"chunks_per_second": 1})
    assert (contents(answer), answer.done) == (WORDS, True)


async def test_chunks_leave_one_by_one_at_the_rate_while_the_upstream_is_silent() -> None:
    async def burst(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(b"".join(map(word, WORDS)))
        await line.forever()

    async with Upstream(burst) as upstream, gateway(upstream.url, SMOOTH, options="") as running:
        sdk = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any", max_retries=0)
        reply = await sdk.chat.completions.create(
            model="openai/m",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            extra_body={"smooth": {"chunks_per_second": 100}},
        )
        got = [(await anext(reply)).choices[0].delta.content for _ in WORDS]
        assert got == WORDS
        await reply.close()
        await sdk.close()
        await until(lambda: upstream.open == 0)


async def test_the_sdk_gets_the_same_reply_with_tool_calls_two_choices_and_usage() -> None:
    def delta(delta: str, index: int = 0) -> bytes:
        return b'data: {"id":"c","created":1,"choices":[{"index":%d,"delta":%b}]}\n\n' % (index, delta.encode())

    call = '{"tool_calls":[{"index":0,"id":"t","type":"function","function":{"name":"f","arguments":"{"}}]}'
    pieces = [
        delta('{"content":"a"}'), delta('{"content":"b"}'), delta('{"content":"x"}', 1), delta('{"content":"y"}', 1), delta(call),
        delta('{"tool_calls":[{"index":0,"function":{"arguments":"\\"q\\":"}}]}'),
        delta('{"tool_calls":[{"index":0,"function":{"arguments":"1}"}}]}'), delta('{"content":"z"}', 1),
        b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\n',
        b'data: {"id":"c","created":1,"choices":[{"index":1,"delta":{},"finish_reason":"stop"}]}\n\n',
        b'data: {"id":"c","created":1,"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6}}\n\n',
        b"data: [DONE]\n\n",
    ]  # fmt: skip
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, SMOOTH, options="") as running:
        sdk = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any", max_retries=0)

        async def completed(smooth: Any) -> tuple[Json, int]:
            chunks = 0
            asked = sdk.chat.completions.stream(
                model="openai/m",
                messages=[{"role": "user", "content": "Hi"}],
                n=2,
                stream_options={"include_usage": True},
                extra_body={"smooth": smooth},
            )
            async with asked as events:
                async for event in events:
                    chunks += event.type == "chunk"
                return (await events.get_final_completion()).model_dump(), chunks

        plain, many = await completed(False)
        for smooth in (True, {"size": 3}, {"chunks_per_second": 5}):
            smoothed, count = await completed(smooth)
            assert smoothed == plain
            assert count < many or smooth is not True
        await sdk.close()
    assert plain["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"q":1}'
    assert [choice["message"]["content"] for choice in plain["choices"]] == ["ab", "xyz"]


@pytest.mark.parametrize("model", ["demo/fast", "demo/tool"])
@pytest.mark.parametrize("smooth", [True, {"chunks_per_second": 1000, "max_delay": 1}])
async def test_the_demo_which_can_only_be_pulled_says_the_same(model: str, smooth: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"required": ["a"], "properties": {"a": {}}}}}]
    async with gateway(config=SMOOTH, options="") as running:
        plain = await ask(running.port, chat(model, tools=tools))
        answer = await ask(running.port, chat(model, tools=tools, smooth=smooth))
    assert (answer.done, answer.text) == (True, plain.text)


async def test_an_upstream_that_breaks_is_told_behind_what_it_said() -> None:
    answer = await answered("", list(map(word, WORDS)), smooth={"interval": 10_000})
    assert answer.error is not None
    assert ("".join(contents(answer)), answer.error["code"], answer.done) == ("".join(WORDS), "upstream_cut", False)


async def test_whole_replies_are_left_alone() -> None:
    async with gateway(config=SMOOTH, options="") as running:
        answer = await ask(running.port, chat("demo/fast", stream=False, smooth=True))
        assert answer.json["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("smooth", "path"),
    [
        (5, "smooth"),
        ({"interval": 0}, "smooth.interval"),
        ({"size": 0}, "smooth.size"),
        ({"chunks_per_second": "x"}, "smooth.chunks_per_second"),
        ({"max_delay": 10**6}, "smooth.max_delay"),
        ({"interval": 5, "chunks_per_second": 5}, "smooth"),
    ],
)
async def test_a_wrong_value_is_a_400_with_its_path(smooth: Any, path: str) -> None:
    async with gateway(config=SMOOTH, options="") as running:
        answer = await ask(running.port, chat("demo/fast", smooth=smooth))
        assert answer.error is not None
        assert (answer.status, answer.error["param"]) == (400, path)


def test_the_config_cannot_both_merge_and_spread() -> None:
    text = "providers: {demo: {api: demo}}\nmiddleware: [smooth: {size: 5, chunks_per_second: 5}]"
    with pytest.raises(ConfigError, match="not both"):
        parse(text, {}, TABLE)
