"""Starts what takes part, each on its core, and ends it.

Strategy: what is measured is pinned to one core, provider and load generator to another. A contestant is ready when it has
answered a request rightly, not after some time; one that does not come up is left out, with its last words.
The one rule: only processes that were started here are ended here, and all of them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import kernel, said
from bench.contestants import ROOT, Contestant, Place, direct
from bench.job import KEY, Job, write

Json = dict[str, Any]
START_SECONDS = 120.0  # LiteLLM takes half a minute on one core
POLL_SECONDS = 0.05
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Cores:
    """Which cores are whose. measured: one per worker of the gateway."""

    measured: tuple[int, ...]
    load: int

    @classmethod
    def of_machine(cls) -> Cores:
        there = kernel.cores()
        if len(there) == 1:
            print("one core only: nothing is pinned, and load and gateway share it", flush=True)
            return cls((there[0], there[0]), there[0])
        # With two cores a second worker has to share the load generator's.
        return cls((there[0], there[2] if len(there) > 2 else there[1]), there[1])


@dataclass(frozen=True)
class Running:
    contestant: Contestant
    process: subprocess.Popen[bytes] | None
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0


class Stage:
    """Starts processes and ends them. Use it as a context."""

    def __init__(self, place: Place, cores: Cores) -> None:
        self.place, self.cores = place, cores
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Stage:
        self.provider = self._start(
            [sys.executable, "-m", "bench.provider", str(self.place.provider)], [self.cores.load], "provider"
        )
        if not answers(direct(self.place), self.provider, time.monotonic() + START_SECONDS):
            self.end(self.provider)
            raise SystemExit("the fake provider does not answer")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            self.end(process)

    def run(self, contestant: Contestant) -> Running | None:
        """Started and ready, or None where it does not come up."""
        if not contestant.command:
            return Running(contestant, None, Path())
        cores = self.cores.measured[: contestant.cores]
        process = self._start(contestant.command, cores, contestant.name, contestant.environment)
        found = Running(contestant, process, self._log(contestant.name))
        if answers(contestant, process, time.monotonic() + START_SECONDS):
            return found
        self.end(process)
        lines = found.log.read_text(errors="replace").strip().splitlines()[-3:]
        print(f"left out: {contestant.name} does not answer: {' | '.join(lines)[-400:]}", flush=True)
        return None

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Ask it to end, then see to it, with the children that it leaves behind."""
        children = kernel.tree(process.pid)[1:] if process.poll() is None else []
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def load(self, job: Job) -> Json:
        """The load generator's line."""
        command = pinned([self.cores.load], [sys.executable, "-m", "bench.load", write(job)])
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        if done.returncode:
            return {"ok": 0, "wrong": 1, "first_wrong": f"the load generator failed: {done.stderr.decode()[-400:]}"}
        line: Json = json.loads(done.stdout)
        return line

    def calls(self) -> int:
        """How many calls the provider has answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.place.provider, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/stats")
            return int(json.loads(connection.getresponse().read())["served"])

    def _start(
        self, command: Sequence[str], cores: Sequence[int], name: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                pinned(cores, command),
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the gateway's request lines go there, as to a pipe
                stderr=log,
            )
        self._processes.append(process)
        return process

    def _log(self, name: str) -> Path:
        return self.place.scratch / f"{name}.log"


def pinned(cores: Sequence[int], command: Sequence[str]) -> list[str]:
    """The command with its cores before it; the process that it becomes keeps its id."""
    return [sys.executable, "-m", "bench.kernel", ",".join(map(str, cores)), *command]


def answers(contestant: Contestant, process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether it answers a request rightly before `limit` (time.monotonic)."""
    dialect = contestant.dialects["openai"]
    body = json.dumps({"model": f"{dialect.prefix}bench-1-0", "messages": [{"role": "user", "content": "ready?"}]})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **dialect.headers}
    while time.monotonic() < limit and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", contestant.port, timeout=10)
        with contextlib.suppress(OSError, ValueError, KeyError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", body, headers)
            found = json.loads(connection.getresponse().read())
            if found["choices"][0]["message"]["content"].encode() == said.text(1):
                return True
        time.sleep(POLL_SECONDS)
    return False
