"""The command line of the bench: `scripts/bench`.

scripts/bench                                   all work, all peers that are found, three turns: about 25 minutes
scripts/bench --work json burst paced --turns 5 --peers smg --label after
scripts/bench --quick                           does it run at all
scripts/bench --work many --turns 1             10,000 open streams on one process; only when asked for
scripts/bench --install                         fetch the peers into --tools
scripts/bench --compare bench/results/before.json bench/results/after.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import kernel
from bench.contestants import ROOT, Contestant
from bench.medians import summaries
from bench.peers import PEERS, install
from bench.picture import svg
from bench.report import compared, markdown, panels
from bench.run import cast, place_for, turns
from bench.stage import Cores, Stage
from bench.workloads import WORKS, chosen

Json = dict[str, Any]
LIBRARIES = ("aiohttp", "orjson", "uvloop")
IDLE = 0.7  # load average over the last minute
OURS = ("penstock", "bare", "+", "workers", "flights", "resumable", "smooth")


def main() -> int:
    """Run what is asked; 1 where one of our own replies was wrong."""
    arguments = _parser().parse_args()
    if arguments.compare:
        before, after = (json.loads(path.read_text()) for path in arguments.compare)
        print(compared(before, after))
        return 0
    if arguments.install:
        install(arguments.tools, arguments.peers)
        return 0
    # Ended by a signal, what was started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    result = _run(arguments)
    _store(result, arguments.out)
    wrong = [f"{line['who']} {line['work']}" for line in result["lines"] if line["wrong"] and line["who"].startswith(OURS)]
    if wrong:
        print(f"wrong replies of ours: {', '.join(sorted(set(wrong)))}", file=sys.stderr)
    return 1 if wrong else 0


def _run(arguments: argparse.Namespace) -> Json:
    count, seconds = (1, 0.5) if arguments.quick else (arguments.turns, arguments.seconds)
    works = chosen(arguments.work)
    facts, lines = machine(), list[Json]()
    if facts["load before"] > IDLE:
        print(f"this machine is busy (load average {facts['load before']}): what follows is noise", file=sys.stderr)
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        place = place_for(arguments.tools.resolve(), Path(scratch))
        with Stage(place, Cores.of_machine()) as stage:
            for line, contestant in turns(stage, works, cast(place, arguments.peers), count, seconds):
                lines.append({**line, "cores": len(kernel.cores())})
                versions |= _version(contestant)
                print(_progress(line), flush=True)
    return {
        "label": arguments.label,
        "machine": facts,
        "commit": _commit(),
        "versions": {**versions, **{name: version(name) for name in LIBRARIES}},
        "turns": count,
        "seconds": seconds,
        "lines": lines,
    }


def _version(contestant: Contestant) -> dict[str, str]:
    ours = contestant.name.startswith(OURS) or contestant.name == "relay"
    return {"penstock" if ours else contestant.name: contestant.version}


def _progress(line: Mapping[str, Any]) -> str:
    """One measurement on one line, with what matters most."""
    figures = {
        "CPU us/request": line.get("cpu_us_per_request"),
        "us/chunk": line.get("cpu_us_per_chunk"),
        "first ms": (line.get("first_ms") or {}).get("p50"),
        "MB": line.get("resident_mb") or (line.get("resident_at_mb") or {}).get("400"),
    }
    shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items() if value)
    fault = f"  WRONG {line['wrong']}: {line['first_wrong'][:200]}" if line["wrong"] else ""
    busy = "  (load generator's core busy)" if line.get("bottleneck") else ""
    return f"{line['turn']} {line['work']:12} {line['who']:12} {line['ok']:6} ok  {shown}{busy}{fault}"


def machine() -> Json:
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": cpu,
        "cores": len(kernel.cores()),
        "memory": f"{memory:.0f} GiB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "load before": round(os.getloadavg()[0], 2),
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", "proxy", "middleware", "config.yaml", "bench") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed


def _store(result: Json, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stem = out / result["label"]
    lines: Iterable[str] = (json.dumps(line, ensure_ascii=False) for line in result["lines"])
    head = json.dumps({name: value for name, value in result.items() if name != "lines"}, indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(head[:-2] + ',\n "lines": [\n' + ",\n".join(lines) + "\n]}\n")
    report = markdown(result)
    stem.with_suffix(".md").write_text(report)
    if drawn := panels(summaries(result["lines"])):
        facts = result["machine"]
        caption = (
            f"{facts['CPU']}, one core, Python {facts['Python']}, commit {result['commit']}; medians of {result['turns']} turns"
        )
        stem.with_suffix(".svg").write_text(svg(drawn, caption))
    print(f"\n{report}\nwritten: {stem}.json, .md, .svg")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all that are found")
    parser.add_argument("--tools", type=Path, default=ROOT / ".bench", help="where peers are installed")
    parser.add_argument("--install", action="store_true", help="install the peers there, and stop")
    groups = [*WORKS, "flat", "alone"]
    parser.add_argument(
        "--work",
        nargs="+",
        choices=groups,
        default=[key for key, work in WORKS.items() if work.default],
        metavar="WORK",
        help=", ".join(groups),
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="one turn of half a second each")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--label", default="latest")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="ratios of two results, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
