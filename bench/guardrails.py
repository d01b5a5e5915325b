"""What guardrails cost: the same prose through the gateway without rules, with one, with all, held back.

    python -m bench.guardrails [--streams 200] [--paced 20]

Strategy: a gateway of its own per config, a provider in this process that says English prose, a word per chunk; first each stream
in one burst, then paced at 10 ms a word. Of the gateway: CPU time, and user instructions where `perf` can count them, per chunk.
Of the client: from asking to the first text, paced.
The one rule: the machine may be shared, so instructions and differences are what counts, not times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench import kernel

TEXT = (
    "The gateway stands between a client and a model and looks at what passes. Most of it is prose like this, in words that are "
    "no secret to anybody, with a number such as 42 or a date like 2024-01-31 now and then. "
)
WORDS = [word if number == 0 else " " + word for number, word in enumerate((TEXT * 4).split())]
PACE = 0.01
RULES = {
    "without the middleware": None,
    "guardrails without rules": "{rules: []}",
    "e-mail held back": "{rules: [{kind: email, on: output}]}",
    "all built-in rules held back": "{rules: [{kind: pii, on: output}, {kind: secrets, on: output}]}",
    "the same flagged, nothing held": "{rules: [{kind: pii, action: flag}, {kind: secrets, action: flag}]}",
}
CONFIG = """
server: {{port: {port}}}
providers: {{prose: {{api: openai, base_url: "http://127.0.0.1:{provider}/v1", api_key: any-key-of-sixteen}}}}
middleware:
  - timeout: {{}}
{layer}
"""


def event(word: str | None) -> bytes:
    delta = {} if word is None else {"content": word}
    choice = {"index": 0, "delta": delta, "finish_reason": "stop" if word is None else None}
    body = {"id": "chatcmpl-prose", "object": "chat.completion.chunk", "created": 1700000000, "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(body).encode()


async def provider(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """`paced` in the model's name: a word every 10 ms."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            paced = b"paced" in await reader.readexactly(size)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for word in [*WORDS, None]:
                piece = event(word) + (b"data: [DONE]\n\n" if word is None else b"")
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                if paced:
                    await asyncio.sleep(PACE)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
    writer.close()


async def asked(port: int, model: str) -> float:
    """One stream to its end; seconds to its first text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": f"prose/{model}", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    began = time.perf_counter()
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    received, first = b"", 0.0
    while data := await reader.read(65536):
        received += data
        if not first and b'"content"' in received:
            first = time.perf_counter() - began
    writer.close()
    if not received.rstrip().endswith(b"0") or b"[DONE]" not in received:
        raise SystemExit(f"a reply is not what it should be: {received[-300:]!r}")
    return first


@contextlib.asynccontextmanager
async def gateway(layer: str | None, port: int, folder: Path) -> AsyncIterator[tuple[int, int]]:
    """(its process, its port)."""
    own = _free()
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(port=own, provider=port, layer="" if layer is None else f"  - guardrails: {layer}"))
    process = _served(config)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                (await asyncio.open_connection("127.0.0.1", own))[1].close()
                break
            await asyncio.sleep(0.05)
        await asked(own, "m")
        yield process.pid, own
    finally:
        process.terminate()
        process.wait()


def _served(config: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "proxy", "serve", "-c", str(config)], stderr=subprocess.DEVNULL)


def _free() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Instructions:
    """User instructions of a process, where `perf` is."""

    def __init__(self, process: int) -> None:
        command = ["perf", "stat", "-x,", "-e", "instructions:u", "-p", str(process)]
        self._perf = subprocess.Popen(command, stderr=subprocess.PIPE) if shutil.which("perf") else None

    def read(self) -> float | None:
        if self._perf is None:
            return None
        self._perf.send_signal(signal.SIGINT)
        line = self._perf.communicate()[1].decode().split(",")[0]
        return float(line) if line.isdecimal() else None


async def measured(layer: str | None, port: int, streams: int, paced: int, folder: Path) -> list[float | None]:
    async with gateway(layer, port, folder) as (process, own):
        for _ in range(20):
            await asked(own, "m")
        counting, began = Instructions(process), kernel.cpu_seconds([process])
        await asyncio.sleep(0.3)  # perf attaches
        for _ in range(streams):
            await asked(own, "m")
        cpu = (kernel.cpu_seconds([process]) - began) / streams / len(WORDS)
        burst = counting.read()
        counting, before = Instructions(process), kernel.cpu_seconds([process])
        await asyncio.sleep(0.3)
        first = await asyncio.gather(*(asked(own, "paced") for _ in range(paced)))
        spent = (kernel.cpu_seconds([process]) - before) / paced / len(WORDS)
        counted = counting.read()
    return [cpu * 1e6, _each(burst, streams), spent * 1e6, _each(counted, paced), statistics.median(first) * 1000]


def _each(count: float | None, streams: int) -> float | None:
    return None if count is None else count / streams / len(WORDS)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--paced", type=int, default=20)
    options = parser.parse_args()
    server = await asyncio.start_server(provider, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(f"{len(WORDS)} chunks a stream, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print("| | burst: µs per chunk | instructions | paced: µs per chunk | instructions | first text, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, layer in RULES.items():
            found = await measured(layer, port, options.streams, options.paced, Path(folder))
            print(f"| {name} | " + " | ".join("–" if value is None else f"{value:,.1f}" for value in found) + " |", flush=True)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
