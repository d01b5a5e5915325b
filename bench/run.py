"""Runs the turns: everything is started first, then each work goes round (A B C A B C ...), because machines drift.

Strategy: each measurement is a load generator process of its own, whose line is kept raw.
The one rule: the provider's own count of calls has the last word, so that no reply comes from a cache but a cache hit.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import said
from bench.contestants import Contestant, Dialect, Place, direct, free_port, penstock, relay, shipped, with_layers
from bench.job import Job
from bench.peers import PEERS
from bench.provider import OPENAI, ending, opening
from bench.stage import Running, Stage
from bench.workloads import Work

Json = dict[str, Any]
SPARE_FILES = 100
Factory = Callable[[], Contestant | None]


def cast(place: Place, peers: Sequence[str]) -> dict[str, Factory]:
    """Who may take part, by name; "+name" is the gateway with that middleware alone."""
    _, layers = shipped()
    found: dict[str, Factory] = {
        "direct": lambda: direct(place),
        "relay": lambda: relay(place),
        "bare": lambda: penstock(place, "bare", ()),
        "penstock": lambda: penstock(place, "penstock"),
        "flights": lambda: with_layers(place, "flights", coalesce={"mode": "all"}),
        "resumable": lambda: with_layers(place, "resumable", resume={"mode": "all"}),
        "flights-resumable": lambda: with_layers(place, "flights-resumable", coalesce={"mode": "all"}, resume={"mode": "all"}),
        "smooth": lambda: with_layers(place, "smooth", smooth={"interval": "50ms"}),
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
    return verified(line, stage.calls() - before, work.same, work.share if not job.distinct else job.clients / job.distinct)


def verified(line: Json, calls: int, hits: bool, share: float = 1) -> Json:
    """The line with the provider's calls in it; a wrong one where they do not fit the replies.

    share: how many replies one call may have answered.
    """
    line["calls"] = calls
    if hits and calls:
        return line | {"wrong": line["wrong"] + 1, "first_wrong": f"{calls} hits went to the provider"}
    if not hits and calls * share < line["ok"] - 0.5:
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
        share=work.share,
        distinct=distinct(work),
        together=work.together,
        merged=work.merged and one.contestant.name == "smooth",
        watch=one.pid,
        provider=stage.provider.pid,
    )
    return replace(job, get=True, path="/hit.txt") if work.same and one.contestant.name == "nginx" else job


def distinct(work: Work) -> int:
    """How many questions the streams ask, where a process may not open files for a call of each; 0: each its own."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_FILES
    return files - work.clients if work.together and files < 2 * work.clients else 0


def file_of_a_hit(model: str) -> bytes:
    """The body of a stream that came at once, as a file."""
    count, _ = said.shape(model)
    middle = [OPENAI.event % said.word(number) for number in range(count)]
    return b"".join(opening(OPENAI) + middle + ending(OPENAI, count))


def place_for(tools: Path, scratch: Path) -> Place:
    return Place(free_port(), tools, scratch)
