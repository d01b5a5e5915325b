"""Everything at once: all middleware of config.yaml in its order, and what each promises while all others are on.

Strategy: the commented lines of the shipped file are uncommented, and a few options set so that a test sees what it looks for;
behind them a provider that answers by its script, before them the official SDK, plain sockets and two keys.
The one rule: what is claimed is seen from outside: by the client, by the provider, in the log line, in the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML
from structlog.testing import capture_logs

from middleware import TABLE
from middleware.coalesce import Coalesce
from middleware.disconnect import Disconnect
from proxy.app import Gateway
from proxy.config import Config, parse
from tests.support.gateway import Answer, RawClient, answer_of, ask, raw_request, until
from tests.support.uploads import indexed, send
from tests.support.upstream import Asked, Held, Line, Upstream, stream, whole

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
SHIPPED = (ROOT / "config.yaml").read_text(encoding="utf-8")
ORDER = (
    "resume", "metrics", "auth", "tracking", "disconnect", "memory", "retrieval", "coalesce", "smooth", "bounds", "guardrails",
    "cache", "limits", "tool_guard", "continuation", "fallback", "retry", "timeout",
)  # fmt: skip
ONE, TWO, OPS = "pk-one-0123456789abcdef", "pk-two-0123456789abcdef", "pk-ops-0123456789abcdef"
ADA, DAM = "ada@example.org", "keeper@dam.example"
FILE = f"# The penstock at Ulm\n\nThe penstock at Ulm is 42 metres long. Its keeper is {DAM}.\n"
QUESTION = f"How long is the penstock at Ulm? Write to {ADA}."
# What differs from the shipped lines. A machine that stands still for a second is no store that is down.
SET: Mapping[str, Json] = {
    "auth": {"keys": [{"name": "one", "key": ONE}, {"name": "two", "key": TWO}, {"name": "ops", "key": OPS, "admin": True}]},
    "memory": {"timeout": "10s"},
    "retrieval": {"embeddings": "demo/embed", "question_timeout": "10s"},
    "guardrails": {"rules": ["email", {"kind": "deny", "id": "titan", "words": ["Project Titan"]}], "restore": True},
    "continuation": {"prefill": {"*": "message"}},
    "retry": {"count": 1, "base": "1ms", "cap": "2ms"},
}  # fmt: skip


def uncommented(text: str = SHIPPED) -> str:
    """config.yaml with every middleware line, and what these need."""
    head, layers = text.split("\nmiddleware:\n")
    head = re.sub(r"^# (data_dir:)", r"\1", head, flags=re.MULTILINE)
    return f"{head}\nmiddleware:\n" + re.sub(r"^  # - ", "  - ", layers, flags=re.MULTILINE)


def onion(**changed: Json) -> list[Json]:
    layers = YAML(typ="safe").load(uncommented())["middleware"]
    named = [layer if isinstance(layer, dict) else {layer: {}} for layer in layers]
    return [
        {name: {**options, **SET.get(name, {}), **changed.get(name, {})} for name, options in layer.items()} for layer in named
    ]


def config(url: str, folder: Path, **changed: Json) -> Config:
    """changed: options by middleware."""
    row = {"api": "openai", "base_url": f"{url}/v1", "api_key": "sk-upstream-0123456789"}
    document = {
        "server": {"port": 0, "drain_timeout": "1s"},
        "data_dir": str(folder),
        "store": {"timeout": "10s"},
        "providers": {"first": row, "second": row, "demo": {"api": "demo"}},
        "models": {"pair": {"targets": ["first/a", "second/b"], "strategy": "fallback"}},
        "middleware": onion(**changed),
    }
    return parse(json.dumps(document), {}, TABLE)


def event(delta: Json, finish: str | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices}).encode()


def words(*texts: str) -> list[bytes]:
    return [event({"content": text}) for text in texts]


END = [event({}, "stop"), b"data: [DONE]\n\n"]


async def cut(asked: Asked, line: Line) -> None:
    """Three words, and the line is dead."""
    await line.head()
    await line.chunk(*words("The ", "first ", "half "))
    line.hang_up()


def endless(*texts: str) -> Callable[[Asked, Line], Any]:
    """These, and then nothing until the gateway has closed."""

    async def answer(asked: Asked, line: Line) -> None:
        await line.head()
        await line.chunk(*words(*texts))
        await line.forever()

    return answer


@dataclass
class Here:
    gateway: Gateway
    upstream: Upstream
    log: Sequence[MutableMapping[str, Any]]

    async def say(self, text: str, *, key: str = ONE, model: str = "first/a", stream: bool = True, **fields: Any) -> Answer:
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": text}], **fields}
        got = await ask(self.gateway.port, body, headers={"Authorization": f"Bearer {key}"})
        plain = re.sub(rb"(?m)^(id: \d+|:.*)\n", b"", got.body) if got.events else got.body
        return answer_of(got.status, got.headers, plain, got.clean)

    async def turns(self, session: str = "s", key: str = ONE) -> list[Json]:
        """The messages of a session's turns, one after the other."""
        got = await send(self.gateway.port, "GET", f"/v1/sessions/{session}", key=key)
        return [message for turn in got.json["data"] for message in turn["messages"]] if got.status == 200 else []

    async def line(self, number: int = 1) -> Json:
        """The last log line, once there are so many."""
        lines: Callable[[], list[Any]] = lambda: [one for one in self.log if one["event"] == "request"]  # noqa: E731
        await until(lambda: len(lines()) >= number)
        assert len(lines()) == number
        return dict(lines()[-1])

    async def figures(self, name: str) -> dict[str, float]:
        """A counter's samples that are not 0, by the values of the labels that tell them apart."""
        page = (await send(self.gateway.port, "GET", "/metrics", key=OPS)).body.decode()
        samples = [one for family in text_string_to_metric_families(page) for one in family.samples if one.name == name]
        told = ("outcome", "result", "action", "end")
        found: dict[str, float] = {}
        for one in samples:
            label = ",".join(one.labels[each] for each in told if each in one.labels)
            found[label] = found.get(label, 0) + one.value
        return {label: value for label, value in found.items() if value}

    def prompt(self, number: int = -1) -> list[Json]:
        """The messages that the provider got."""
        found: list[Json] = self.upstream.asked[number].json["messages"]
        return found


@contextmanager
def _logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as lines:
        yield lines


@asynccontextmanager
async def serving(folder: Path, **changed: Json) -> AsyncIterator[Here]:
    with _logged() as lines:
        async with Upstream() as upstream, Gateway(config(upstream.url, folder, **changed), settle=0.2) as gateway:
            yield Here(gateway, upstream, lines)


def last(answer: Answer) -> Json:
    """What the gateway says of its own on the last chunk."""
    found: Json = answer.chunks[-1].get("penstock", {})
    return found


# The shipped file


def test_the_shipped_file_has_them_all_in_the_documented_order() -> None:
    assert tuple(name for layer in onion() for name in layer) == ORDER
    assert set(ORDER) == set(TABLE)


async def test_every_commented_line_uncommented_is_sound_and_serves(tmp_path: Path) -> None:
    text = uncommented().replace("data_dir: data ", f"data_dir: {tmp_path / 'data'} ").replace("${PENSTOCK_PORT:-8080}", "0")
    (tmp_path / "config.yaml").write_text(text)
    environ = {"PENSTOCK_KEY": ONE, "OPENAI_API_KEY": "sk-not-asked-0123456789"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "check", "-c", str(tmp_path / "config.yaml"), cwd=ROOT, env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    async with Gateway(parse(text, environ, TABLE)) as gateway:
        body = {"model": "demo/fast", "stream": True, "messages": [{"role": "user", "content": f"Hi from {ADA}"}]}
        answer = await ask(gateway.port, {**body, "sessionId": "s", "resume": True}, headers={"x-api-key": ONE})
        assert (answer.status, answer.headers["X-Penstock-Memory"]) == (200, "turns=0")
        assert (await ask(gateway.port, body)).status == 401
    assert b"data: [DONE]" in answer.body
    assert "[EMAIL_1]" in answer.body.decode()


# All of it for one client


def sdk(here: Here, key: str = ONE) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{here.gateway.port}/v1",
        api_key=key,
        max_retries=0,
        timeout=20,
        default_headers={"X-Seen": "1"},
    )


async def streamed(client: openai.AsyncOpenAI, text: str, **own: Any) -> tuple[str, Json, Mapping[str, str]]:
    """The text, what the gateway says of its own on the chunk with the finish reason, and the head."""
    said = ""
    own_words: Json = {}
    raw = await client.chat.completions.with_raw_response.create(
        model="first/a", messages=[{"role": "user", "content": text}], stream=True, extra_body=own
    )
    async for chunk in raw.parse():
        said += "".join(choice.delta.content or "" for choice in chunk.choices)
        own_words = (chunk.model_extra or {}).get("penstock") or own_words
    return said, own_words, raw.headers


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of this machine's between a client and the gateway, and no key or address of the developer's own."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", *(name for name in os.environ if name.startswith("OPENAI_"))):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


async def check_nothing_of_it_for(here: Here, key: str, session: str, file: str, stream_id: str) -> None:
    for path in (f"/v1/sessions/{session}", f"/v1/files/{file}", f"/v1/streams/{stream_id}"):
        assert (await send(here.gateway.port, "GET", path, key=key)).status == 404
    assert (await send(here.gateway.port, "POST", "/v1/search", {"query": "penstock Ulm metres"}, key=key)).json["data"] == []


async def test_a_stream_remembers_answers_from_a_file_hides_an_address_is_cached_and_resumed(tmp_path: Path) -> None:
    async with serving(tmp_path) as here, sdk(here) as client:
        port, upstream = here.gateway.port, here.upstream
        file = await indexed(port, FILE, key=ONE)
        upstream.answer = stream([*words("Noted: [EM", "AIL_1", "]."), *END])
        text, _, _ = await streamed(client, f"I am Ada, {ADA}.", sessionId="s")
        assert text == f"Noted: {ADA}."
        first = [{"role": "user", "content": f"I am Ada, {ADA}."}, {"role": "assistant", "content": f"Noted: {ADA}."}]
        assert await here.turns() == first

        # The exchange before, the file's passage, and no address, neither the client's nor the file's.
        asked = {"sessionId": "s", "useRAG": True, "cache": {"ttl": 60}, "resume": True, "saveToMemory": False}
        rest = [*words("metres [1]; told [EMA", "IL_1] and [EMAIL", "_2]."), *END]
        held = upstream.answer = Held(words("42 ")[0], b"".join(rest))
        whole_text = f"42 metres [1]; told {ADA} and {DAM}."
        body = {"model": "first/a", "stream": True, "messages": [{"role": "user", "content": QUESTION}], **asked}
        auth = {"Authorization": f"Bearer {ONE}"}
        async with RawClient(port) as cut_off:
            await cut_off.send(raw_request(body, **auth))
            head = (await cut_off._reader.readuntil(b"\r\n\r\n")).decode()
            await cut_off._reader.readuntil(b'"content":"42')
        stream_id = re.findall(r"(?i)x-stream-id: (\S+)", head)[0]
        assert re.search(r"(?i)x-penstock-memory: turns=1\r\n", head)
        assert re.search(r"(?i)x-penstock-guardrails: email;action=redact;on=input", head)
        was, asks, question = here.prompt()
        assert (was["content"], asks["content"]) == ("I am Ada, [EMAIL_1].", "Noted: [EMAIL_1].")
        assert "42 metres long" in question["content"]
        assert question["content"].endswith("How long is the penstock at Ulm? Write to [EMAIL_1].")
        assert "[EMAIL_2]" in question["content"]
        assert not any(name.encode() in upstream.asked[-1].body for name in (ADA, DAM))

        # The line was cut; the rest is there for whose stream it is, and once.
        held.go.set()
        got = await send(port, "GET", f"/v1/streams/{stream_id}?after=1", key=ONE)
        again = await send(port, "GET", f"/v1/streams/{stream_id}", key=ONE)
        events = re.findall(r"^data: (\{.*\})$", again.body.decode(), re.MULTILINE)
        chunks = [json.loads(found) for found in events]
        assert "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks) == whole_text
        assert again.body.endswith(got.body)
        assert got.body.endswith(b"data: [DONE]\n\n")
        sources = chunks[-1]["penstock"]["sources"]
        assert [(one["file_id"], one["number"]) for one in sources] == [(file["id"], 1)]

        # From the cache, with its sources, through the SDK; and this time it is remembered.
        text, own, headers = await streamed(client, QUESTION, **{**asked, "saveToMemory": True})
        assert (text, headers["x-cache"], own["sources"]) == (whole_text, "hit", sources)
        assert len(upstream.asked) == 2
        second = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": whole_text}]
        assert await here.turns() == first + second
        await check_nothing_of_it_for(here, TWO, "s", file["id"], stream_id)


async def test_a_reload_keeps_sessions_files_streams_and_the_cache(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        port, upstream = here.gateway.port, here.upstream
        file = await indexed(port, FILE, key=ONE)
        upstream.answer = stream([*words("42 metres."), *END])
        kept = await here.say(QUESTION, useRAG=True, sessionId="kept", cache={"ttl": 60}, resume=True)
        held = upstream.answer = Held(words("Half ")[0], b"".join([*words("and half."), *END]))
        running = asyncio.create_task(here.say("Say it", sessionId="s"))
        await until(lambda: len(upstream.asked) == 2)
        await here.gateway.reload(config(upstream.url, tmp_path, memory={"max_turns": 7}, guardrails={"at_once": 7}))
        held.go.set()
        assert (await running).text == "Half and half."
        assert await here.turns() == [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "Half and half."}]
        got = await send(port, "GET", f"/v1/streams/{kept.headers['X-Stream-Id']}", key=ONE)
        assert re.sub(rb"(?m)^id: \d+\n", b"", got.body) == kept.body
        again = await here.say(QUESTION, useRAG=True, sessionId="other", cache={"ttl": 60})
        assert (again.headers["X-Cache"], last(again)["sources"][0]["file_id"]) == ("hit", file["id"])
        assert (await here.turns("kept"))[1] == {"role": "assistant", "content": "42 metres."}
        assert await here.figures("penstock_requests_total") == {"completed": 3.0}


# What goes wrong


async def check_end(here: Here, outcome: str, saved: str, turns: int, *, text: str = "Tell me") -> None:
    """One line, one count, what memory made of it; the provider's line is free or closed; and nothing of it is in the cache."""
    assert (await here.line())["outcome"] == outcome
    assert await here.figures("penstock_requests_total") == {outcome: 1.0}
    assert await here.figures("penstock_memory_turns_total") == ({saved: 1.0} if saved else {})
    assert len(await here.turns()) == turns
    for name in ("cache_stores_total", "open_streams", "open_calls", "concurrent", "flights", "detached", "memory_waiting"):
        assert await here.figures(f"penstock_{name}") == {}, name
    calls = len(here.upstream.asked)
    here.upstream.answer = stream([*words("Afresh."), *END])
    fresh = await here.say(text, sessionId="other", useRAG=True, cache={"ttl": 60})
    assert (fresh.text, fresh.headers["X-Cache"], len(here.upstream.asked)) == ("Afresh.", "miss", calls + 1)


ALL: Json = {"sessionId": "s", "useRAG": True, "cache": {"ttl": 60}, "coalesce": True, "smooth": True, "resume": True}


@pytest.mark.parametrize("streams", [True, False])
async def test_a_cut_stream_is_an_error_and_leaves_nothing(tmp_path: Path, streams: bool) -> None:
    async with serving(tmp_path) as here:
        here.upstream.answer = cut
        answer = await here.say("Tell me", **{**ALL, "on_break": "error"}, stream=streams)
        assert answer.error is not None
        assert answer.error["code"] == "upstream_cut"
        assert not answer.done
        assert answer.status == (200 if streams else 502)
        if streams:
            assert "The first half ".startswith(answer.text)
        await check_end(here, "upstream_cut", "broken", 0)


async def test_a_client_that_leaves_closes_the_upstream_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, resume={"grace": "0s"}) as here:
        here.upstream.answer = endless("Half ", "a ", "word")
        async with RawClient(here.gateway.port) as client:
            body = {"model": "first/a", "stream": True, "messages": [{"role": "user", "content": "Tell me"}], **ALL}
            await client.send(raw_request(body, Authorization=f"Bearer {ONE}"))
            await client._reader.readuntil(b'"content":"Half')
        await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        await check_end(here, "client_gone", "broken", 0)


async def test_a_client_that_leaves_with_its_reply_read_on_finds_it_in_the_cache_and_in_its_session(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        held = here.upstream.answer = Held(words("To ")[0], b"".join([*words("[EMAIL_1] ", "word."), *END]))
        asked = {**ALL, "resume": False, "on_disconnect": "finish_and_cache"}
        async with RawClient(here.gateway.port) as client:
            body = {"model": "first/a", "stream": True, "messages": [{"role": "user", "content": f"To {ADA}"}], **asked}
            await client.send(raw_request(body, Authorization=f"Bearer {ONE}"))
            await client._reader.readuntil(b'"content":"To')
        assert (await here.line())["outcome"] == "client_gone"
        assert here.upstream.open == 1
        held.go.set()
        disconnect = next(layer for layer in here.gateway.layers if isinstance(layer, Disconnect))
        await until(lambda: not disconnect.health()["detached"])
        assert (await here.turns())[1] == {"role": "assistant", "content": f"To {ADA} word."}
        again = await here.say(f"To {ADA}", **{**asked, "sessionId": "other"})
        assert (again.text, again.headers["X-Cache"], len(here.upstream.asked)) == (f"To {ADA} word.", "hit", 1)
        assert await here.figures("penstock_requests_total") == {"client_gone": 1.0, "completed": 1.0}


async def test_a_blocked_stream_ends_closes_the_upstream_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        here.upstream.answer = endless("It is all ", "about Proj", "ect Tit", "an and its ", "gold")
        answer = await here.say("Tell me", **ALL)
        await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert answer.text == "It is all about "
        assert answer.chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert last(answer) == {"guardrails": [{"id": "titan", "action": "block", "on": "output"}], "sources": []}
        assert answer.done
        await check_end(here, "filtered", "filtered", 0)


async def test_a_blocked_request_asks_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        answer = await here.say("Tell me of Project Titan", **ALL)
        assert (answer.status, answer.json["error"]["code"]) == (400, "content_filter")
        assert here.upstream.asked == []
        assert (await here.line())["outcome"] == "blocked"
        assert await here.figures("penstock_requests_total") == {"blocked": 1.0}
        assert await here.turns() == []


async def test_a_failing_target_is_a_status_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        here.upstream.answer = whole(b'{"error": {"message": "down"}}', 503)
        answer = await here.say("Tell me", **ALL)
        assert answer.status == 503
        assert (await here.line())["attempts"] == 2
        await check_end(here, "upstream_error", "", 0)


async def test_a_stream_that_breaks_while_all_of_it_is_held_back_tells_of_every_attempt(tmp_path: Path) -> None:
    async def answer(asked: Asked, line: Line) -> None:
        if asked.json["model"] == "a":
            await whole(b'{"error": {"message": "down"}}', 503)(asked, line)
            return
        await line.head()
        await line.chunk(*words("ada"))
        line.hang_up()

    async with serving(tmp_path) as here:
        here.upstream.answer = answer
        got = await here.say("Tell me", **{**ALL, "on_break": "error"}, model="pair")
        line = await here.line()
        assert (got.status, got.headers["X-Penstock-Attempts"], len(here.upstream.asked)) == (502, "3", 3)
        assert (line["outcome"], line["target"], line["attempts"]) == ("upstream_cut", "second/b", 3)
        assert [one["target"] for one in line["tries"]] == ["first/a", "first/a", "second/b"]
        await check_end(here, "upstream_cut", "", 0)


async def test_a_truncated_stream_ends_with_length_is_remembered_and_not_cached(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        here.upstream.answer = endless(*(f"word{number} " for number in range(60)))
        answer = await here.say("Tell me", **ALL, max_output_tokens_hard=10)
        await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        assert answer.chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert answer.done
        assert (await here.turns())[1] == {"role": "assistant", "content": answer.text}
        await check_end(here, "truncated", "saved", 2)


async def test_a_stream_that_another_target_goes_on_with_is_whole_across_a_placeholder(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:

        async def halves(asked: Asked, line: Line) -> None:
            await line.head()
            if asked.json["model"] == "a":
                await line.chunk(*words("It goes ", "to [EMA"))
                line.hang_up()
                return
            await line.chunk(*words("IL_1], ", "sent."), *END)
            await line.end()

        here.upstream.answer = halves
        answer = await here.say(f"Tell {ADA}", **ALL, model="pair")
        assert (answer.text, answer.done) == (f"It goes to {ADA}, sent.", True)
        assert here.prompt()[-1]["content"] == "It goes to [EMA"
        assert (await here.line())["outcome"] == "continued"
        assert (await here.turns())[1] == {"role": "assistant", "content": answer.text}
        assert await here.figures("penstock_requests_total") == {"continued": 1.0}
        assert await here.figures("penstock_memory_turns_total") == {"saved": 1.0}


async def test_equal_requests_of_two_sessions_share_one_stream_and_are_remembered_each(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        held = here.upstream.answer = Held(words("To ")[0], b"".join([*words("[EMAIL_1]."), *END]))
        both = [asyncio.create_task(here.say(f"To {ADA}", **{**ALL, "sessionId": name})) for name in ("s", "t")]
        coalesce = next(layer for layer in here.gateway.layers if isinstance(layer, Coalesce))
        await until(lambda: any(one.value for one in coalesce.samples() if one.name == "penstock_flights_joined_total"))
        held.go.set()
        assert [(await one).text for one in both] == [f"To {ADA}."] * 2
        assert len(here.upstream.asked) == 1
        exchange = [{"role": "user", "content": f"To {ADA}"}, {"role": "assistant", "content": f"To {ADA}."}]
        assert [await here.turns(name) for name in ("s", "t")] == [exchange, exchange]
        assert await here.figures("penstock_requests_total") == {"completed": 2.0}
