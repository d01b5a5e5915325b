"""Conversation memory with the clients that people have, by the commands of its page, and across a gateway that is killed.

Strategy: Super Agent Stack's way of asking (`superAgentKey`, and the caller's own provider key as Authorization) through the
official SDKs; the caller's provider is a scripted one, and `demo/inspect` says what came to it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from middleware import TABLE
from proxy.app import Gateway
from proxy.config import parse
from tests.support.gateway import ask, until
from tests.support.sessions import Here, event, remembering, says, stream_of, user
from tests.support.upstream import Held

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
AUTH = '  - auth: {keys: [{name: one, key: "sk-one-0123456789abcdef"}], pass_through: [openai]}'
OWN = "sk-own-provider-key"
KEYS = {"superAgentKey": "sk-one-0123456789abcdef", "Authorization": f"Bearer {OWN}"}


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of this machine's between a client and the gateway, and no key or address of the developer's own."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", *(name for name in os.environ if name.startswith("OPENAI_"))):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def inspected(text: str) -> list[Json]:
    """The messages that came to `demo/inspect`."""
    found: list[Json] = json.loads(text)["messages"]
    return found


# The official SDKs.


def sdk(here: Here) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"http://127.0.0.1:{here.gateway.port}/v1", api_key=OWN, max_retries=0, timeout=10,
        default_headers={"superAgentKey": "sk-one-0123456789abcdef"},
    )  # fmt: skip


async def said(client: AsyncOpenAI, model: str, question: Any, **own: Any) -> tuple[str, Any]:
    """The text of a streamed exchange, and its last chunk."""
    text, last = "", None
    async with await client.chat.completions.create(
        model=model, messages=[user(question)], stream=True, stream_options={"include_usage": True}, extra_body=own
    ) as stream:  # type: ignore[call-overload]
        async for last in stream:
            text += last.choices[0].delta.content or "" if last.choices else ""
    return text, last


async def test_python_a_streamed_exchange_remembers_the_one_before(tmp_path: Path) -> None:
    async with remembering(tmp_path, outer=AUTH) as here, sdk(here) as client:
        first, _ = await said(client, "openai/m", "My name is Ada.", sessionId="u", saveToMemory=True)
        assert first == "a1"
        asked = here.upstream.asked[0]
        assert asked.headers["authorization"] == f"Bearer {OWN}", "the caller's own key pays"
        assert not {"sessionId", "saveToMemory", "extra_body"} & set(asked.json)
        text, last = await said(client, "demo/inspect", "What is my name?", sessionId="u", saveToMemory=True)
        assert inspected(text) == [user("My name is Ada."), says("a1"), user("What is my name?")]
        assert last.choices == []
        assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


async def test_python_a_cancelled_exchange_is_not_remembered(tmp_path: Path) -> None:
    async with remembering(tmp_path, outer=AUTH) as here, sdk(here) as client:
        here.upstream.answer = Held(event({"content": "Half an"}), b"".join(stream_of({"content": " answer"})))
        stream = await client.chat.completions.create(
            model="openai/m", messages=[{"role": "user", "content": "q1"}], stream=True, extra_body={"session_id": "u"}
        )
        async for _ in stream:
            break
        await stream.close()
        await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
        await until(lambda: here.counts.get("turns_total/broken"))
        text, _ = await said(client, "demo/inspect", "q2", session_id="u")
        assert inspected(text) == [user("q2")]


@asynccontextmanager
async def node_runs(node: Json, here: Here, scenario: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    program = str(ROOT / "tests" / "node" / "memory.cjs")
    process = await asyncio.create_subprocess_exec(
        node["program"], program, f"http://127.0.0.1:{here.gateway.port}/v1", scenario,
        env=node["env"], stdin=pipe, stdout=pipe, stderr=pipe,
    )  # fmt: skip
    async with asyncio.timeout(30):
        yield process
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()


async def told(process: asyncio.subprocess.Process) -> Json:
    assert process.stdout is not None
    found: Json = json.loads(await process.stdout.readline())
    return found


async def test_node_a_streamed_exchange_remembers_the_one_before(tmp_path: Path, node: Json) -> None:
    async with remembering(tmp_path, outer=AUTH) as here, node_runs(node, here, "remember") as process:
        assert (await told(process))["text"] == "a1"
        second = await told(process)
        assert inspected(second["text"]) == [user("My name is Ada."), says("a1"), user("What is my name?")]
        assert second["finish"] == "stop"
        assert second["last"] == {"choices": 0, "usage": second["usage"]}
        assert second["usage"]["total_tokens"] > 0
        asked = here.upstream.asked[0]
        assert asked.headers["authorization"] == f"Bearer {OWN}"
        assert not {"sessionId", "saveToMemory"} & set(asked.json)


async def test_node_what_an_abort_controller_cancels_is_not_remembered(tmp_path: Path, node: Json) -> None:
    async with remembering(tmp_path, outer=AUTH) as here:
        here.upstream.answer = Held(event({"content": "Half an"}), b"".join(stream_of({"content": " answer"})))
        async with node_runs(node, here, "cancel") as process:
            assert await told(process) == {"aborted": True}
            await asyncio.wait_for(here.upstream.lines[0].closed.wait(), 2)
            await until(lambda: here.counts.get("turns_total/broken"))
            assert process.stdin is not None
            process.stdin.write(b"\n")
            assert inspected((await told(process))["text"]) == [user("What did I ask?")]


# Its page.


async def test_the_commands_of_its_page(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (ROOT / "config.yaml").read_text().replace("port: ${PENSTOCK_PORT:-8080}", "port: 0")
    text, found = re.subn("^  # - memory:", "  - memory:", text, flags=re.MULTILINE)
    assert found == 1
    text = re.sub(r"^(# *)?data_dir:.*\n", "", text, flags=re.MULTILINE) + f"\ndata_dir: {tmp_path / 'data'}\n"
    (script,) = re.findall(r"```sh\n(ask\(\) .*?)```", (ROOT / "docs" / "memory.md").read_text(), re.DOTALL)
    async with Gateway(parse(text, {}, TABLE)) as gateway:
        script = script.replace("127.0.0.1:8080", f"127.0.0.1:{gateway.port}")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec("bash", "-c", script, stdout=pipe, stderr=pipe)
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    first, second, session, deleted = [json.loads(line) for line in out.decode().splitlines() if line]
    answer = first["choices"][0]["message"]["content"]
    assert inspected(second["choices"][0]["message"]["content"]) == [
        user("My name is Ada."), says(answer), user("What is my name?"),
    ]  # fmt: skip
    assert [turn["messages"][0]["content"] for turn in session["data"]] == ["My name is Ada.", "What is my name?"]
    assert deleted == {"id": "user-7", "object": "session.deleted", "deleted": True}


# Killed while it saves.

SERVED = """
server: {{host: 127.0.0.1, port: 0}}
data_dir: {folder}
providers: {{demo: {{api: demo}}}}
middleware: [memory]
"""


@asynccontextmanager
async def served(config: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """`penstock serve` and its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "serve", "-c", str(config), cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            while not (found := re.search(rb"serving http://127\.0\.0\.1:(\d+)/v1", line := await process.stderr.readline())):
                assert line, "it has ended"
        yield process, int(found[1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def sessions(port: int, path: str = "?limit=100") -> Json:
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/v1/sessions{path}") as response:
        found: Json = await response.json()
        return found


async def test_of_a_gateway_that_is_killed_while_it_saves_whole_turns_are_left(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(SERVED.format(folder=tmp_path / "data"))
    answered = 0

    async def talk(port: int, session: str) -> None:
        nonlocal answered
        while True:
            question = f"{session} {answered} " + "word" * 10_000
            await ask(port, {"model": "demo/fast", "sessionId": session, "messages": [user(question)]})
            answered += 1

    async with served(config) as (process, port):
        await ask(port, {"model": "demo/fast", "sessionId": "seen", "messages": [user("first")]})
        seen = await sessions(port, "/seen")
        talking = [asyncio.create_task(talk(port, f"s{number}")) for number in range(8)]
        await until(lambda: answered > 16, 20)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        ends = await asyncio.gather(*talking, return_exceptions=True)
        assert all(isinstance(end, aiohttp.ClientError | ConnectionError) for end in ends), "all were cut off"
    async with served(config) as (_, port):
        assert await sessions(port, "/seen") == seen
        listed = (await sessions(port))["data"]
        assert 1 <= sum(entry["turns"] for entry in listed) <= 1 + answered + len(talking)
        for entry in listed:
            page = await sessions(port, f"/{entry['id']}?limit=100")
            turns = page["data"]
            assert [int(turn["id"]) for turn in turns] == list(range(1, entry["turns"] + 1))
            for turn in turns:
                question, answer = turn["messages"]
                assert answer["content"].endswith(f"You said: {question['content']}"), "a question with its whole answer"
        answer = await ask(port, {"model": "demo/fast", "sessionId": "s0", "messages": [user("next")]})
        assert answer.headers["X-Penstock-Memory"] != "unavailable"
