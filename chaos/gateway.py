"""The gateway under test: `python -m proxy serve` as a process of its own, its log, its signals, and what it says of itself.

The one rule: it is ended here, however the run ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from chaos.line import Line
from chaos.records import State

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
SERVING = re.compile(r"serving http://\S+:(\d+)/")
SAMPLE = re.compile(r"^(\w+)(?:\{.*\})? (\S+)$", re.M)
# What must be 0 when nothing is going on, where this gateway has it.
GAUGES = (
    "penstock_open_streams", "penstock_open_calls", "penstock_waiting_calls", "penstock_upstream_connections",
    "penstock_buffered_bytes", "penstock_concurrent", "penstock_flights", "penstock_detached", "penstock_resume_kept",
    "penstock_resume_readers", "penstock_memory_waiting", "penstock_retrieval_indexing", "penstock_retrieval_waiting",
)  # fmt: skip
POLL = 0.05
# Python's own allocator keeps an arena as long as anything lives in it: what is held would hide behind what was once (inside.py).
ENVIRONMENT = {"PYTHONMALLOC": "malloc"}


class Gateway:
    def __init__(self, process: asyncio.subprocess.Process, config: Path, log: Path, port: int) -> None:
        self.process, self.config, self.port = process, config, port
        self._log = log

    async def get(self, path: str) -> tuple[int, bytes]:
        line = await Line.open(self.port)
        answer = await line.ask("GET", path)
        body = await answer.body()
        line.leave()
        return answer.status, body

    async def verbose(self) -> Json:
        _, body = await self.get("/readyz?verbose")
        found: Json = orjson.loads(body)
        return found

    async def figures(self) -> Counter[str]:
        """All metrics, series of a name added up."""
        found: Counter[str] = Counter()
        for name, value in SAMPLE.findall((await self.get("/metrics"))[1].decode()):
            found[name] += float(value)  # type: ignore[assignment]
        return found

    async def state(self) -> State:
        figures, (_, body) = await self.figures(), await self.get("/chaos/inside")
        inside = orjson.loads(body)
        return State(
            {name: figures[name] for name in GAUGES if name in figures}, int(figures["penstock_requests_total"]),
            inside["tasks"], inside["names"], self.files, inside["resident"],
        )  # fmt: skip

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def reload(self, text: str) -> None:
        """The new file, and the signal. What became of it is seen in `verbose`."""
        self.config.write_text(text)
        self.process.send_signal(signal.SIGHUP)

    def drain(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def lines(self) -> tuple[list[Json], list[str]]:
        """Its `request` lines, and all that it wrote as warnings, errors, or not as JSON."""
        requests, words = [], []
        for raw in self._log.read_bytes().splitlines():
            if not raw.startswith(b"{"):
                words.append(raw.decode(errors="replace"))
                continue
            line = orjson.loads(raw)
            if line["event"] == "request":
                requests.append(line)
            elif line["level"] != "info":
                words.append(raw.decode())
        return requests, words


@asynccontextmanager
async def running(text: str, scratch: Path) -> AsyncIterator[Gateway]:
    """Serving this config. scratch: where its config and its log are written. Raises RuntimeError with its own words."""
    config, log = scratch / "config.yaml", scratch / "gateway.log"
    config.write_text(text)
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "serve", "-c", str(config), cwd=ROOT, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL, stderr=stderr, env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
    try:
        while not (found := SERVING.search(log.read_text())):
            if process.returncode is not None:
                raise RuntimeError(log.read_text())
            await asyncio.sleep(POLL)
        yield Gateway(process, config, log, int(found[1]))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
