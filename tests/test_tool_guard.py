"""The tool-call guard: a sound reply passes byte for byte; what breaks the promise is mended or reported, and counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import aiohttp
import openai
import orjson
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from middleware.tool_guard import Guard, ToolCallInvalid
from proxy.call import Call
from proxy.fold import fold
from proxy.pipeline import Handler
from proxy.reply import Batch, Item, Reply, Run, sse_events, tapped
from tests.support.gateway import CONFIG, Answer, ask, chat, gateway
from tests.support.upstream import Upstream, stream, whole

Json = dict[str, Any]
LAYERS = """  - metrics
  - tracking
  - tool_guard{options}
  - cache
"""
GUARDED = CONFIG.replace("  - tracking\n", LAYERS)
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]


def chunk(delta: Json, finish: str | None = None, index: int = 0) -> Json:
    choices = [{"index": index, "delta": delta, "finish_reason": finish}]
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}


def calls(*entries: Json, index: int = 0) -> Json:
    return chunk({"tool_calls": list(entries)}, index=index)


def first(number: Any = 0, id: Any = "a", name: Any = "f", text: str = "", **fields: Any) -> Json:
    return {"index": number, "id": id, "type": "function", "function": {"name": name, "arguments": text}, **fields}


def more(text: str, number: Any = 0, **fields: Any) -> Json:
    return {"index": number, "function": {"arguments": text}, **fields}


def asked(**request: Any) -> Call:
    return Call(id="r", nonce="n", created=1, kind="chat", request=request, model="m", stream=True)


def guarded(
    items: list[Item], *, strict: bool = False, finish: str = "tool_calls", **request: Any
) -> tuple[list[Json], Counter[Any]]:
    """The chunks behind the guard, the finish chunk behind the items; and what it counted."""
    tally: Counter[Any] = Counter()
    guard = Guard(asked(**request), strict, tally)
    seen = [guard.see(Batch([item])) for item in items]
    seen.append(guard.see(Batch([chunk({}, finish)], final=True)))
    return [one for batch in seen for one in batch.chunks], tally


def deltas(chunks: list[Json]) -> list[Json]:
    return [entry for one in chunks for choice in one["choices"] for entry in choice["delta"].get("tool_calls", ())]


TEXTS = st.text('ab "{}', max_size=4)


@given(
    numbers=st.lists(st.integers(0, 1), max_size=4),
    said=TEXTS,
    spelling=st.sampled_from(["decoded", "encoded", "run"]),
    strict=st.booleans(),
)
def test_a_sound_reply_passes_as_it_is(numbers: list[int], said: str, spelling: str, strict: bool) -> None:
    """The very same batch, in every spelling."""
    sound = [chunk({"role": "assistant", "content": said}), chunk({"content": '"tool_calls"'})]
    for index in (0, 1):
        ids = [f"call_{index}_{number}" for number, _ in enumerate(numbers)]
        sound += [calls(first(number, id, "f", '{"a":'), index=index) for number, id in enumerate(ids)]
        sound += [calls(more(f"{value}}}", number), index=index) for number, value in enumerate(numbers)]
    items: list[Item] = [*sound]
    if spelling == "encoded":
        items = [sse_events([one]) for one in sound]
    elif spelling == "run":
        items = [Run(sse_events(sound))]
    tally: Counter[Any] = Counter()
    guard = Guard(asked(), strict, tally)
    batches = [*(Batch([item]) for item in items), Batch([chunk({}, "tool_calls"), chunk({}, "tool_calls", 1)], final=True)]
    assert all(guard.see(batch) is batch for batch in batches)
    assert not tally


FAULTY: list[tuple[str, list[Json], list[Json]]] = [
    ("index", [calls(first(3)), calls(more("{}", 3))], [first(0), more("{}", 0)]),
    ("index", [calls(first(7)), calls(more("{")), calls(more("}"))], [first(0), more("{"), more("}")]),
    ("index", [calls(first(0)), calls(more("{}", None))], [first(0), more("{}", 0)]),
    ("index", [calls(first(None)), calls(more("{}", None))], [first(0), more("{}", 0)]),
    (
        "index",
        [calls(first(0, text="{}")), calls(first(0, "b", text="[")), calls(more("]"))],
        [first(0, text="{}"), first(1, "b", text="["), more("]", 1)],
    ),
    ("id", [calls(first(id=None, text="{}"))], [first(id="call_n_0_0", text="{}")]),
    ("id", [calls(first(id="", text="{}"))], [first(id="call_n_0_0", text="{}")]),
    ("id", [calls(first(0, text="{}")), calls(first(1, text="{}"))], [first(0, text="{}"), first(1, "call_n_0_1", text="{}")]),
    ("type", [calls(first(text="{}", type=None))], [first(text="{}")]),
    ("repeated", [calls(first()), calls(more("{}", id="a", type="function"))], [first(), more("{}")]),
    ("repeated", [calls(first()), calls(first(text="{}"))], [first(), more("{}")]),
    ("name", [calls(first(name="", text="{")), calls(first(name="g", text="}"))], [first(name="g", text="{}")]),
    ("name", [calls(first(name=None)), calls(more("{")), calls(first(name="g", text="}"))], [first(name="g", text="{}")]),
]


@pytest.mark.parametrize("spelling", [lambda one: one, lambda one: sse_events([one]), lambda one: Run(sse_events([one]))])
@pytest.mark.parametrize(("fault", "chunks", "mended"), FAULTY)
def test_what_can_be_mended_is_mended_and_counted(fault: str, chunks: list[Json], mended: list[Json], spelling: Any) -> None:
    before = orjson.dumps(chunks)
    found, tally = guarded([spelling(one) for one in chunks])
    assert deltas(found) == mended
    assert set(tally) == {(fault, "mended")}
    assert orjson.dumps(chunks) == before, "chunks may be shared"
    assert "penstock" not in found[-1]
    (choice,) = fold(found, None)["choices"]
    assert all(orjson.loads(call["function"]["arguments"]) in ({}, []) for call in choice["message"]["tool_calls"])


@pytest.mark.parametrize(("fault", "chunks", "mended"), FAULTY)
def test_strict_ends_the_stream_at_the_first_fault(fault: str, chunks: list[Json], mended: list[Json]) -> None:
    # A name that comes later has been missing at first, so it is either that or a repetition of the first delta's.
    with pytest.raises(ToolCallInvalid) as caught:
        guarded([*chunks], strict=True)
    assert caught.value.fault in (fault, "repeated", "nameless")


@pytest.mark.parametrize(
    "request_fields",
    [{"tools": TOOLS[:1]}, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}],
)
def test_a_missing_name_is_that_of_the_only_function_there_is(request_fields: Json) -> None:
    found, tally = guarded([calls(first(name="", text="{}"))], **request_fields)
    assert (deltas(found), tally) == ([first(text="{}")], {("name", "mended"): 1})


@pytest.mark.parametrize("items", [[calls(first(name=""))], [calls(first(name="")), calls(first(1, "b"))]])
def test_a_call_that_never_gets_a_name_cannot_be_mended(items: list[Json]) -> None:
    with pytest.raises(ToolCallInvalid, match="never got a name"):
        guarded([*items], tools=TOOLS)


@pytest.mark.parametrize(("finish", "reason"), [("tool_calls", "arguments"), ("stop", "arguments"), ("length", "cut")])
@pytest.mark.parametrize("text", ["", '{"a', "{}}"])
def test_arguments_that_are_not_json_are_reported_and_never_made_up(finish: str, reason: str, text: str) -> None:
    found, tally = guarded([calls(first(text=text))], finish=finish)
    assert deltas(found) == [first(text=text)]
    assert found[-1]["penstock"] == {"tool_calls_invalid": [{"choice": 0, "index": 0, "id": "a", "reason": reason}]}
    assert found[-1]["choices"] == [{"index": 0, "delta": {}, "finish_reason": finish}]
    assert tally == {(reason, "reported"): 1}
    with pytest.raises(ToolCallInvalid):
        guarded([calls(first(text=text))], finish=finish, strict=True)


def test_a_reply_cut_behind_complete_arguments_is_sound() -> None:
    found, tally = guarded([calls(first(text="{}"))], finish="length", strict=True)
    assert ("penstock" in found[-1], tally) == (False, {})


def test_a_custom_tools_input_is_free_text() -> None:
    custom = {"index": 0, "id": "a", "type": "custom", "custom": {"name": "f", "input": "SELECT"}}
    found, tally = guarded([calls(custom), calls({"index": 0, "custom": {"input": " 1"}})], strict=True)
    assert (len(deltas(found)), tally) == (2, {})


def test_what_stands_beside_tool_calls_is_kept() -> None:
    one = chunk({"role": "assistant", "content": "I call", "tool_calls": [first(5, text="{}")]})
    found, _ = guarded([one])
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": "I call", "tool_calls": [first(0, text="{}")]}


# At the socket


def event(one: Json) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(one)


def said(*arguments: str, finish: str = "tool_calls") -> list[bytes]:
    chunks = [calls(first()), *(calls(more(text)) for text in arguments), chunk({}, finish)]
    return [*map(event, chunks), b"data: [DONE]\n\n"]


async def answered(pieces: list[bytes], options: str = "", **fields: Any) -> Answer:
    async with Upstream(stream(pieces)) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        return await ask(running.port, chat(tools=TOOLS, **fields))


ASKED = pytest.mark.parametrize(
    ("options", "fields"),
    [(": {mode: strict}", {}), ("", {"tool_guard": "strict"}), (": {mode: off}", {"orq": {"tool_guard": "strict"}})],
    ids=["config", "request", "orq"],
)


@ASKED
async def test_strict_sends_an_error_chunk_in_place_of_the_end(options: str, fields: Json) -> None:
    async with Upstream(stream(said('{"a', ":1"))) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        with structlog.testing.capture_logs() as lines:
            answer = await ask(running.port, chat(tools=TOOLS, **fields))
        assert answer.error is not None
        assert (answer.error["code"], answer.done) == ("tool_call_invalid", False)
        assert [line["outcome"] for line in lines if line["event"] == "request"] == ["malformed"]
        body = (await metrics(running.port)).splitlines()
        assert 'penstock_tool_call_faults_total{done="reported",fault="arguments"} 1.0' in body


async def metrics(port: int) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
        return await response.text()


async def test_a_turn_that_the_provider_cut_is_reported() -> None:
    answer = await answered(said('{"a', finish="length"))
    assert answer.chunks[-1]["penstock"]["tool_calls_invalid"] == [{"choice": 0, "index": 0, "id": "a", "reason": "cut"}]
    assert (answer.chunks[-1]["choices"][0]["finish_reason"], answer.done) == ("length", True)
    strict = await answered(said('{"a', finish="length"), tool_guard="strict")
    assert strict.error is not None
    assert "cut off" in strict.error["message"]


async def test_off_says_nothing() -> None:
    answer = await answered(said('{"a'), tool_guard="off")
    assert (answer.done, "penstock" in answer.chunks[-1]) == (True, False)


@pytest.mark.parametrize("stream_it", [True, False])
async def test_the_sdk_raises_on_a_strict_end_and_takes_a_sound_call(stream_it: bool) -> None:
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    for arguments, sound in (('{"a":1}', True), ('{"a":', False)):
        call = {name: value for name, value in first(text=arguments).items() if name != "index"}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choices = [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
        answer = stream(said(arguments)) if stream_it else whole(orjson.dumps({**body, "choices": choices}))
        async with (
            Upstream(answer) as upstream,
            gateway(upstream.url, GUARDED, options=": {mode: strict}") as running,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any", max_retries=0) as sdk,
        ):
            asked = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}

            async def completed(sdk: Any = sdk, asked: Json = asked) -> Any:
                if not stream_it:
                    return await sdk.chat.completions.create(**asked)
                async with sdk.chat.completions.stream(**asked) as events:
                    return await events.get_final_completion()

            if sound:
                (made,) = (await completed()).choices[0].message.tool_calls
                assert json.loads(made.function.arguments) == {"a": 1}
            else:
                with pytest.raises(openai.APIError) as caught:
                    await completed()
                assert caught.value.code == "tool_call_invalid"


async def test_a_whole_reply_is_mended_and_marked() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    completion = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    body = {**completion, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    tally: Counter[Any] = Counter()
    found = Guard(asked(), False, tally).whole(Batch([body], final=True)).chunks[0]
    ids = [one["id"] for one in found["choices"][0]["message"]["tool_calls"]]
    assert ids == ["a", "call_n_0_1"]
    assert [one["reason"] for one in found["penstock"]["tool_calls_invalid"]] == ["arguments", "arguments"]
    assert tally == {("id", "mended"): 1, ("arguments", "reported"): 2}
    with pytest.raises(ToolCallInvalid):
        Guard(asked(), True, tally).whole(Batch([body], final=True))


async def test_a_sound_whole_reply_passes_as_it_is() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    choices = [
        {"index": 0, "message": {"tool_calls": [call]}, "finish_reason": "tool_calls"},
        {"index": 1, "message": {"content": "x"}},
    ]
    batch = Batch([{"id": "c", "choices": choices}], final=True)
    assert Guard(asked(), True, Counter()).whole(batch) is batch


class Broken:
    """A middleware of somebody's own that spoils the numbers of tool calls, inside the guard."""

    async def __call__(self, call: Call, next: Handler) -> Reply:
        reply = await next(call)

        def see(batch: Batch) -> Batch:
            return Batch(
                [json.loads(json.dumps(one).replace('"index": 0, "id"', '"index": 7, "id"')) for one in batch.chunks],
                final=batch.final,
            )

        return replace(reply, chunks=tapped(reply.chunks, see))


async def test_what_other_middleware_breaks_is_mended() -> None:
    config = GUARDED.replace("  - cache\n", "  - broken\n")
    table = {"broken": Broken}
    async with Upstream(stream(said('{"a":1}'))) as upstream, gateway(upstream.url, config, table=table, options="") as running:
        answer = await ask(running.port, chat(tools=TOOLS))
        assert {entry["index"] for entry in deltas(answer.chunks)} == {0}
        assert answer.done
        mended = 'penstock_tool_call_faults_total{done="mended",fault="index"} 2.0'
        assert mended in await metrics(running.port)


async def test_a_replayed_reply_is_checked_though_it_comes_encoded() -> None:
    """The guard stands above the cache here; hits are encoded events."""
    async with Upstream(stream(said('{"a'))) as upstream, gateway(upstream.url, GUARDED, options="") as running:
        cached: Json = {"cache": {"ttl": 60}, "tools": TOOLS, "tool_guard": "off"}
        await ask(running.port, chat(**cached))
        hit = await ask(running.port, chat(**{**cached, "tool_guard": "strict"}))
        assert (hit.headers["X-Cache"], hit.done) == ("hit", False)
        assert hit.error is not None
        assert hit.error["code"] == "tool_call_invalid"


async def test_the_demos_tool_call_is_sound() -> None:
    async with gateway(config=GUARDED, options=": {mode: strict}") as running:
        answer = await ask(running.port, chat("demo/tool", tools=TOOLS))
        assert answer.done


async def test_a_wrong_mode_is_a_400_with_its_path() -> None:
    async with gateway(config=GUARDED, options="") as running:
        answer = await ask(running.port, chat("demo/fast", tool_guard="loose"))
        assert answer.error is not None
        assert (answer.status, answer.error["param"]) == (400, "tool_guard")


def test_a_reply_without_tool_calls_is_never_decoded() -> None:
    guard = Guard(asked(), True, Counter())
    batch = Batch([b"data: not even JSON\n\n"])
    assert guard.see(batch) is batch
