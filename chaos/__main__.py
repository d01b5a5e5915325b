"""The command line: `scripts/chaos [--seconds 60] [--seed N] [--clients 300] [--keep DIR]`; 1 where an invariant does not hold.

It takes about half a minute more than --seconds: the gateway comes to rest twice, and drains.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sys
import tempfile
from pathlib import Path

from chaos.invariants import judged
from chaos.run import Found, Wanted, run

SHOWN = 5  # faults of each invariant


def main() -> int:
    """Run, print, and say whether all holds."""
    arguments = _parser().parse_args()
    wanted = Wanted(random.randrange(10**6) if arguments.seed is None else arguments.seed, arguments.seconds, arguments.clients)
    print(f"chaos: --seed {wanted.seed} --seconds {wanted.seconds:g} --clients {wanted.clients}", flush=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(run(wanted, arguments.keep or Path(scratch)))
    return report(found)


def report(found: Found) -> int:
    """Print what happened and what holds; the exit status."""
    for name in found.left_out:
        print(f"left out: {name}, which this gateway's config does not know")
    print("  ".join(f"{name} {count}" for name, count in sorted(found.counts.items())))
    before, after = found.evidence.before, found.evidence.after
    print(
        f"at rest: {before.resident / 1e6:.1f} MB, {before.files} files, {before.tasks} tasks before; "
        f"{after.resident / 1e6:.1f} MB, {after.files} files, {after.tasks} tasks after"
    )
    failed = 0
    for name, faults in judged(found.evidence).items():
        print(f"{'FAIL' if faults else 'pass'}  {name}")
        failed += bool(faults)
        for fault in faults[:SHOWN]:
            print(f"      {fault[:400]}")
        if len(faults) > SHOWN:
            print(f"      and {len(faults) - SHOWN} more")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, warm-up included")
    parser.add_argument("--clients", type=int, default=300, help="at the same time")
    parser.add_argument("--keep", type=Path, help="where the gateway's config and log stay")
    return parser


if __name__ == "__main__":
    sys.exit(main())
