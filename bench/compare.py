"""What a request and a chunk cost, beside the bare relay and, where it is given, another gateway.

    python bench/compare.py [--kit ../shared/bench] [--turns 3] [--smg PATH] [--bare] [--work json burst paced one hit]

Strategy: the gateway has all middleware of config.yaml on, or none with --bare. Everything runs on loopback; what is measured
is pinned to one core, provider and load generator to another, and the workloads go round in turn (A B C A B C …), because
machines drift: only ratios of medians within one run mean anything.
The load kit (upstream.py, load.py, relay.py) checks every reply and reads the CPU time of the process from the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORTS = {"relay": 9020, "penstock": 9021, "smg": 9022}
UPSTREAM = 9001
WORK = {
    "json": ("cpu_us_per_req", ["--no-stream", "-c", "32", "-n", "5000", "--model", "bench-10-0"]),
    "burst": ("cpu_us_per_req", ["-c", "32", "-n", "1500", "--model", "bench-100-0"]),
    "paced": ("cpu_us_per_chunk", ["-c", "200", "-n", "400", "--model", "bench-50-20"]),
    "one": ("ttft_ms", ["-c", "1", "-n", "500", "--model", "bench-10-0"]),
    # Cache hits: the same request with a cache option, which only the gateway itself understands.
    "hit": (
        "cpu_us_per_req",
        ["-c", "32", "-n", "5000", "--same", "--extra", '{"cache": {"ttl": 600}}', "--model", "bench-100-0"],
    ),
}
ONLY = {"hit": ("penstock",)}
CONFIG = """
server: {port: %d}
providers:
  openai: {api: openai, base_url: "http://127.0.0.1:%d/v1", api_key: x}
"""
SHIPPED = "middleware:" + (ROOT / "config.yaml").read_text().split("\nmiddleware:", 1)[1]


def pinned(core: int, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["taskset", "-c", str(core), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )


def started(kit: Path, config: Path, smg: str | None) -> dict[str, subprocess.Popen[bytes]]:
    """The fake provider on core 1, everything that is measured on core 0."""
    python = sys.executable
    found = {
        "upstream": pinned(1, python, str(kit / "upstream.py"), str(UPSTREAM)),
        "relay": pinned(0, python, str(kit / "relay.py"), str(PORTS["relay"]), str(UPSTREAM)),
        "penstock": pinned(0, python, "-m", "proxy", "serve", "-c", str(config)),
    }
    if smg:
        options = f"launch --host 127.0.0.1 --port {PORTS['smg']} --worker-urls http://127.0.0.1:{UPSTREAM} --backend openai"
        options += " --policy round_robin --disable-circuit-breaker --log-level error --prometheus-port 29123"
        found["smg"] = pinned(0, smg, *options.split())
    return found


def one_turn(kit: Path, name: str, pid: int, arguments: list[str]) -> dict[str, Any]:
    """The load generator's line for one workload; a reply that is not right ends the run."""
    model = arguments[-1] if name == "smg" else f"openai/{arguments[-1]}"
    load = ["taskset", "-c", "1", sys.executable, str(kit / "load.py"), str(PORTS[name]), "--watch", str(pid)]
    line: dict[str, Any] = json.loads(subprocess.run([*load, *arguments[:-1], model], check=True, capture_output=True).stdout)
    if line["bad"]:
        raise SystemExit(f"{name}: {line['bad']} wrong replies, the first: {line['first_bad']}")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, default=Path(os.environ.get("PENSTOCK_BENCH", ROOT.parent / "shared" / "bench")))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--smg", help="path of the smg program (pip install sglang-router)")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--bare", action="store_true", help="no middleware at all")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(CONFIG % (PORTS["penstock"], UPSTREAM) + ("" if arguments.bare else SHIPPED))
        config.flush()
        running = started(arguments.kit, Path(config.name), arguments.smg)
        try:
            time.sleep(5)  # until all of them listen
            report(arguments, running)
        finally:
            for process in running.values():
                process.send_signal(signal.SIGKILL)


def report(arguments: argparse.Namespace, running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Print a line per workload and gateway as turns go by, then the medians and their ratios to the bare relay."""
    names = [name for name in PORTS if name in running]
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.turns):
        for work in arguments.work:
            key, options = WORK[work]
            for name in ONLY.get(work, names):
                line = one_turn(arguments.kit, name, running[name].pid, options)
                value = line["ttft_ms"]["p50"] if key == "ttft_ms" else line[key]
                figures.setdefault((work, name), []).append(value)
                print(f"{work:6} {name:9} {key} {value:8.2f}  first chunk {line['ttft_ms']}  rss {line['rss_mb']} MB", flush=True)
    print("\n| work | " + " | ".join(names) + " | penstock / relay |\n| --- |" + " --- |" * (len(names) + 1))
    for work in arguments.work:
        medians = {name: statistics.median(figures[work, name]) for name in ONLY.get(work, names)}
        cells = " | ".join(f"{medians[name]:.2f}" if name in medians else "" for name in names)
        ratio = f"{medians['penstock'] / medians['relay']:.2f}" if "relay" in medians else ""
        print(f"| {work}, {WORK[work][0]} | {cells} | {ratio} |")


if __name__ == "__main__":
    main()
