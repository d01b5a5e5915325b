"""The examples' pages for a test: the built pages served as `npm start` serves them, and a Chromium that looks at them.

Strategy: one browser per test run, driven by Playwright in a Node process that takes a chain of its calls per line; the server of
`examples/serve.ts` as a process beside a gateway, or beside a port on which each test has its gateway.
The one rule: a test waits for what a page shows, never for a time to pass.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.gateway import gateway
from tests.support.upstream import Answer, Upstream

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent.parent
CONFIG = """
server: {{port: {port}, drain_timeout: 50ms, allow_anonymous: true, cors: {{origins: ["*"]}}}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  demo: {{api: demo}}
models: {{fast: openai/m}}
middleware: [{middleware}]
"""
SERVER = ROOT / "examples" / "dist" / "server" / "serve.js"


class Browser:
    """The driver of tests/node/browser.cjs. A context manager; `chromium` and `node` are programs' paths."""

    def __init__(self, node: str, env: Mapping[str, str], chromium: str) -> None:
        command = [node, str(ROOT / "tests" / "node" / "browser.cjs"), chromium]
        self._driver = subprocess.Popen(command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with self._driver as driver:
            assert driver.stdin is not None
            driver.stdin.close()  # and with it the browser

    async def open(self, url: str, scale: int = 1) -> None:
        """A page in a fresh profile. scale: pixels of a screenshot per pixel of CSS."""
        await self.do(["open", url, scale])

    async def do(self, *chain: list[Any]) -> Any:
        """Playwright's calls one behind another, from the page on: what the last one gives, where that is JSON."""
        return await asyncio.to_thread(self._do, chain)

    async def sees(self, text: str, role: str = "log") -> None:
        """Waits until the element of a role shows a text among others."""
        await self.do(["getByRole", role], ["filter", {"hasText": text}], ["waitFor"])

    async def misses(self, role: str) -> None:
        """Waits until there is no element of a role."""
        await self.do(["getByRole", role], ["waitFor", {"state": "detached"}])

    async def text(self, role: str = "log") -> str:
        found: str = await self.do(["getByRole", role], ["innerText"])
        return found

    async def press(self, name: str) -> None:
        await self.do(["getByRole", "button", {"name": name}], ["click"])

    async def ask(self, question: str) -> None:
        await self.do(["getByLabel", "Message"], ["fill", question])
        await self.do(["getByLabel", "Message"], ["press", "Enter"])

    def _do(self, chain: tuple[list[Any], ...]) -> Any:
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(json.dumps(chain) + "\n")
        self._driver.stdin.flush()
        answer = json.loads(self._driver.stdout.readline() or '{"error": "the browser has gone"}')
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["found"]


@contextmanager
def site(node: str, gateway: int, **env: str) -> Iterator[str]:
    """The server of the examples beside a gateway on a port of this machine; the address of its pages."""
    given = {**os.environ, "NO_PROXY": "*", "PORT": "0", "GATEWAY": f"http://127.0.0.1:{gateway}/v1", **env}
    with subprocess.Popen([node, str(SERVER)], env=given, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removesuffix("/react-chat/\n")
        finally:
            process.terminate()


@contextmanager
def held_port() -> Iterator[int]:
    """A port that nobody else is given, and on which one server after another may listen."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def event(text: str = "", finish: str | None = None, **fields: Any) -> bytes:
    choices = [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices, **fields}).encode()


class Site:
    """The pages' server, started once, and the port on which each test has a gateway. url: of that one, for pages that ask it."""

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.port = port
        self.url = quote(f"http://127.0.0.1:{port}/v1/chat/completions", "")

    @asynccontextmanager
    async def before(self, answer: Answer, middleware: str = "tracking") -> AsyncIterator[Upstream]:
        async with (
            Upstream(answer) as upstream,
            gateway(upstream.url, CONFIG, port=str(self.port), middleware=middleware),
        ):
            yield upstream
