"""Runs the turns: everything is started first, then each work goes round (A B C A B C ...), because machines drift.

Strategy: what is measured is pinned to one core, provider and load generator to another; a contestant is ready when it has
answered a request rightly; one that does not come up is left out, with its last words. Each measurement is a load generator
process of its own, whose line is kept raw.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import kernel, said
from bench.contestants import ROOT, Contestant, Dialect, Place, direct, free_port, penstock, relay, shipped
from bench.load import KEY, Job, write
from bench.peers import PEERS
from bench.provider import OPENAI, ending, opening
from bench.workloads import Work

Json = dict[str, Any]
Factory = Callable[[], Contestant | None]
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


def cast(place: Place, peers: Sequence[str]) -> dict[str, Factory]:
    """Who may take part, by name; "+name" is the gateway with that middleware alone."""
    _, layers = shipped()
    found: dict[str, Factory] = {
        "direct": lambda: direct(place),
        "relay": lambda: relay(place),
        "bare": lambda: penstock(place, "bare", ()),
        "penstock": lambda: penstock(place, "penstock"),
    }
    for peer in peers:
        found[peer] = lambda peer=peer: PEERS[peer](place)  # type: ignore[misc]
    for name, layer in layers.items():
        found[f"+{name}"] = lambda name=name, layer=layer: penstock(place, f"+{name}", (layer,))  # type: ignore[misc]
    for count in (1, 2):
        found[f"workers-{count}"] = lambda count=count: penstock(place, f"workers-{count}", None, count)  # type: ignore[misc]
    return found


def taking_part(work: Work, names: Sequence[str]) -> list[str]:
    return [name for wanted in work.who for name in names if name == wanted or (wanted == "+" and name.startswith("+"))]


def turns(
    stage: Stage, works: Mapping[str, Work], factories: Mapping[str, Factory], count: int, seconds: float
) -> Iterator[tuple[Json, Contestant]]:
    """Every measurement as it is made, with the contestant; a line says turn, work and who."""
    (stage.place.scratch / "hit.txt").write_bytes(file_of_a_hit(works["hit"].model) if "hit" in works else b"")
    wanted = {name for work in works.values() for name in taking_part(work, list(factories))}
    started = {name: factories[name]() for name in factories if name in wanted}
    for name in (name for name, contestant in started.items() if contestant is None):
        print(f"left out: {name} is not installed (scripts/bench --install)", flush=True)
    running = {name: one for name, contestant in started.items() if contestant and (one := stage.run(contestant))}
    for one in running.values():
        warm_up(stage, one, seconds / 4)
    for turn in range(1, count + 1):
        for key, work in works.items():
            for name in taking_part(work, list(running)):
                one = running[name]
                if work.wire not in one.contestant.dialects:
                    continue
                line = (
                    in_a_fresh_process(stage, work, factories[name], seconds)
                    if work.fresh
                    else measure(stage, work, one, seconds)
                )
                yield {"turn": turn, "work": key, "who": name, **line}, one.contestant


def warm_up(stage: Stage, one: Running, seconds: float) -> None:
    """What compiles or fills pools while it runs does so before it is measured."""
    if one.process:
        for work in (Work("", "bench-10-0", whole=True), Work("", "bench-100-0")):
            stage.load(job_of(work, one, stage, seconds))


def in_a_fresh_process(stage: Stage, work: Work, factory: Factory, seconds: float) -> Json:
    contestant = factory()
    one = stage.run(contestant) if contestant else None
    if one is None or one.process is None:
        return {"ok": 0, "wrong": 1, "first_wrong": "a fresh process did not come up"}
    try:
        return measure(stage, work, one, seconds)
    finally:
        stage.end(one.process)


def measure(stage: Stage, work: Work, one: Running, seconds: float) -> Json:
    """One line. A reply that the provider did not give, or a hit that it did, makes it a wrong one."""
    job = job_of(work, one, stage, seconds)
    if work.same and not job.get:
        stage.load(replace(job, clients=1, requests=1))  # what is now in the cache
    before = stage.calls()
    line = stage.load(job)
    return verified(line, stage.calls() - before, work.same)


def verified(line: Json, calls: int, hits: bool) -> Json:
    """The line with the provider's calls in it; a wrong one where they do not fit the replies."""
    line["calls"] = calls
    if hits and calls:
        return line | {"wrong": line["wrong"] + 1, "first_wrong": f"{calls} hits went to the provider"}
    if not hits and calls < line["ok"]:
        return line | {
            "wrong": line["wrong"] + 1,
            "first_wrong": f"{line['ok']} replies, but the provider was called {calls} times",
        }
    return line


def job_of(work: Work, one: Running, stage: Stage, seconds: float) -> Job:
    dialect: Dialect = one.contestant.dialects[work.wire]
    job = Job(
        one.contestant.port,
        dialect.prefix + work.model,
        work.clients,
        seconds,
        whole=work.whole,
        same=work.same,
        prompt=work.prompt,
        extra=dict(work.extra),
        headers=dialect.headers,
        levels=work.levels,
        watch=one.pid,
        provider=stage.provider.pid,
    )
    return replace(job, get=True, path="/hit.txt") if work.same and one.contestant.name == "nginx" else job


def file_of_a_hit(model: str) -> bytes:
    """The body of a stream that came at once, as a file."""
    count, _ = said.shape(model)
    middle = [OPENAI.event % said.word(number) for number in range(count)]
    return b"".join(opening(OPENAI) + middle + ending(OPENAI, count))


def place_for(tools: Path, scratch: Path) -> Place:
    return Place(free_port(), tools, scratch)
