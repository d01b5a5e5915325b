"""Clients that come back by themselves, behind a line that is cut a hundred times: the text is whole, one call went upstream.

Strategy: a TCP proxy between client and gateway lets a random number of bytes of each answer through and then cuts, by FIN or by
RST, wherever that is: in a head, in a number, inside a character. The helpers of examples/resume run as users run them.
The one rule: nothing is cut before the client knows its stream, because then there is nothing to come back to.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from examples.resume import client
from middleware import TABLE
from proxy.app import Gateway
from proxy.config import parse
from tests.support.gateway import chat, gateway
from tests.support.scissors import Scissors
from tests.support.upstream import Asked, Line, Upstream, stream

Json = dict[str, Any]
HELPERS = Path(__file__).parent.parent / "examples" / "resume"
CONFIG = """
server: {{port: 0, drain_timeout: 50ms, cors: {{origins: [{origins}]}}}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - resume
"""
WORDS = [f"wört {number} 🌊 " for number in range(1500)]
CUTS = 100


def word(text: str) -> bytes:
    chunk = {"id": "c", "created": 1, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False).encode()


ENDING = b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


async def tells(asked: Asked, line: Line) -> None:
    """Some words at a time, so that clients come back to a stream that still runs as well as to one that is over."""
    await line.head()
    for start in range(0, len(WORDS), 5):
        await line.chunk(b"".join(word(text) for text in WORDS[start : start + 5]))
        await asyncio.sleep(0.002)
    await line.chunk(ENDING)
    await line.end()


@asynccontextmanager
async def behind_scissors(
    seed: int, cuts: int = CUTS, origins: str = "", **limits: int
) -> AsyncIterator[tuple[Upstream, Gateway, Scissors]]:
    async with (
        Upstream(tells) as upstream,
        gateway(upstream.url, CONFIG, origins=origins) as running,
        Scissors(running.port, cuts, seed, **limits) as line,
    ):
        yield upstream, running, line


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("file", ["client.py", "client.mjs"])
def test_each_helper_is_short(file: str) -> None:
    assert len((HELPERS / file).read_text().splitlines()) <= 80


@pytest.mark.parametrize("seed", [1, 2])
async def test_python_comes_back_a_hundred_times_and_has_it_all(seed: int) -> None:
    def read(port: int) -> list[str]:
        chunks = client.stream(f"http://127.0.0.1:{port}/v1", chat("openai/m"), attempts=60, pause=0, timeout=10)
        return [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]

    async with behind_scissors(seed) as (upstream, _, line):
        found = await asyncio.to_thread(read, line.port)
        assert "".join(found) == "".join(WORDS)
        assert (line.cuts, len(upstream.asked)) == (0, 1)


async def test_python_tells_what_cannot_be_had() -> None:
    def read(port: int, **options: Any) -> str:
        with pytest.raises(client.StreamFailed) as caught:
            list(client.stream(f"http://127.0.0.1:{port}/v1", chat("openai/m"), pause=0, **options))
        return str(caught.value)

    async with behind_scissors(3, cuts=10**6, most=300) as (_, _, line):
        assert "3 times in a row" in await asyncio.to_thread(read, line.port, attempts=3)
    broken = stream([word("x"), b'data: {"error":{"message":"broke"}}\n\n'])
    async with Upstream(broken) as upstream, gateway(upstream.url, CONFIG, origins="") as running:
        assert "broke" in await asyncio.to_thread(read, running.port)


async def loses_its_line_and_says_so(asked: Asked, line: Line) -> None:
    """A gateway that ends the first line as `draining`, and the stream itself at the second with an error of its own."""
    await line.head(X_Stream_Id="str_x")
    if asked.method == "POST":
        await line.chunk(b"id: 1\n" + word("one "), b'data: {"error":{"message":"draining"},"choices":[]}\n\n')
    else:
        assert asked.headers["last-event-id"] == "1"
        await line.chunk(b"id: 2\n" + word("two"), b'id: 3\ndata: {"error":{"message":"cut"},"choices":[]}\n\n')
    await line.end()


async def test_an_error_without_a_number_is_the_lines_and_one_with_a_number_the_streams() -> None:
    found: list[str] = []

    def read(url: str) -> None:
        chunks = client.stream(f"{url}/v1", chat("openai/m"), pause=0)
        found.extend(chunk["choices"][0]["delta"]["content"] for chunk in chunks)

    async with Upstream(loses_its_line_and_says_so) as upstream:
        with pytest.raises(client.StreamFailed, match="cut"):
            await asyncio.to_thread(read, upstream.url)
    assert found == ["one ", "two"]


NODE_PROGRAM = """
import {{ stream }} from "{helper}";
let text = "";
for await (const chunk of stream("http://127.0.0.1:{port}/v1", {body}, {{ attempts: 60, pause: 0, timeout: 10000 }}))
  text += chunk.choices[0].delta.content ?? "";
process.stdout.write(text);
"""


@pytest.mark.parametrize("seed", [1, 2])
async def test_javascript_comes_back_a_hundred_times_and_has_it_all(seed: int, tmp_path: Path) -> None:
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node is not installed")
    async with behind_scissors(seed) as (upstream, _, line):
        source = NODE_PROGRAM.format(helper=(HELPERS / "client.mjs").as_uri(), port=line.port, body=json.dumps(chat("openai/m")))
        (tmp_path / "run.mjs").write_text(source)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(program, str(tmp_path / "run.mjs"), stdout=pipe, stderr=pipe)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        assert out.decode() == "".join(WORDS)
        assert (line.cuts, len(upstream.asked)) == (0, 1)


PAGE = """<!doctype html><script>
let text = "", opened = 0, done = false;
const source = new EventSource(%s);
source.onopen = () => opened++;
source.onmessage = (event) => {
  if (event.data === "[DONE]") done = true;
  else text += JSON.parse(event.data).choices[0].delta.content ?? "";
};
source.onerror = () => {
  if (source.readyState === EventSource.CLOSED)
    fetch("/told", { method: "POST", body: JSON.stringify({ text, opened, done, last: location.href }) });
};
</script>"""


async def test_a_browsers_event_source_follows_comes_back_and_stops(tmp_path: Path) -> None:
    """Chromium: an EventSource of a page of another origin; its line is cut once, it reconnects, and a 204 stops it."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    told: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
    page = ""

    async def shown(request: web.BaseRequest) -> web.Response:
        if request.method == "POST":
            told.set_result(await request.json())
        return web.Response(text=page, content_type="text/html")

    runner = web.ServerRunner(web.Server(shown))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    origin = "http://{}:{}".format(*runner.addresses[0])
    async with (
        behind_scissors(1, cuts=1, most=60_000, origins=f'"{origin}"') as (upstream, running, line),
        aiohttp.ClientSession() as session,
    ):
        body = {**chat("openai/m", stream=False), "background": True}
        async with session.post(f"http://127.0.0.1:{running.port}/v1/chat/completions", json=body) as response:
            page = PAGE % json.dumps(f"http://127.0.0.1:{line.port}{(await response.json())['url']}")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--no-proxy-server"]
        none = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(browser, *flags, origin, stdout=none, stderr=none)
        try:
            async with asyncio.timeout(60):
                found = await told
        finally:
            process.kill()
            await process.wait()
            await runner.cleanup()
        assert (found["text"], found["done"]) == ("".join(WORDS), True)
        assert found["opened"] == 2, "once, and once again after the cut; the 204 opens nothing"
        assert (line.cuts, len(upstream.asked)) == (0, 1)


async def test_the_curls_of_the_docs_do_what_they_say(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (HELPERS.parent.parent / "docs" / "resume.md").read_text()
    cut, behind = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    demo = "server: {port: 0}\nproviders: {demo: {api: demo}}\nmiddleware: [resume]"
    async with Gateway(parse(demo, {}, TABLE)) as running:

        async def run(script: str) -> str:
            script, pipe = script.replace("127.0.0.1:8080", f"127.0.0.1:{running.port}"), asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec("bash", "-c", script, stdout=pipe, cwd=tmp_path)
            return (await process.communicate())[0].decode()

        rest = await run(cut.replace('"stream"', '"max_tokens": 4, "stream"').replace("--max-time 2", "--max-time 1.2"))
        begin = (tmp_path / "begin.txt").read_text()
        assert rest.endswith("data: [DONE]\n\n")
        whole = begin + rest
        numbers = [int(number) for number in re.findall(r"^id: (\d+)$", whole, re.M)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert json.loads(await run(behind))["url"].startswith("/v1/streams/str_")
