"""Our own gateway, started for a run on ourselves: a process of its own, as an operator starts it.

The one rule: it is ended here, however the run ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

# Served where no file is named: a provider and the usual middleware.
CONFIG = """\
default_provider: openai
providers:
  openai: {api: openai, base_url: "${OPENAI_BASE_URL}", api_key: "${OPENAI_API_KEY}"}
middleware:
  - tracking
  - timeout
"""
SERVING = re.compile(rb"serving (http\S+)")


@asynccontextmanager
async def own_gateway(provider_url: str, config: Path | None) -> AsyncIterator[str]:
    """`penstock serve` on a port of the system's choice, with the provider as its `openai`; yields the base URL.

    config: a file whose provider `openai` reads ${OPENAI_BASE_URL} and ${OPENAI_API_KEY}, as the shipped one does.
    Raises RuntimeError with the gateway's own words where it does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            config = Path(folder) / "config.yaml"
            config.write_text(CONFIG, encoding="utf-8")
        command = [sys.executable, "-m", "proxy", "serve", "-c", str(config), "--host", "127.0.0.1", "--port", "0"]
        async with _running(command, {**os.environ, "OPENAI_BASE_URL": provider_url, "OPENAI_API_KEY": "sk-conformance"}) as url:
            yield url


@asynccontextmanager
async def _running(command: Sequence[str], environ: dict[str, str]) -> AsyncIterator[str]:
    null, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdin=null, stdout=null, stderr=pipe)
    assert process.stderr is not None
    draining = None
    try:
        url = await _serving(process.stderr)
        draining = asyncio.create_task(_drain(process.stderr))
        yield url
    finally:
        if draining is not None:  # else it has ended by itself, or never began to serve
            with suppress(ProcessLookupError):
                process.terminate()
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if draining is not None:
            await draining


async def _serving(stderr: asyncio.StreamReader) -> str:
    said = b""
    while line := await stderr.readline():
        said += line
        if found := SERVING.search(line):
            return found[1].decode()
    raise RuntimeError(said.decode(errors="replace").strip() or "the gateway ended at once")


async def _drain(stderr: asyncio.StreamReader) -> None:
    while await stderr.read(2**16):
        pass
