"""What the kernel knows of processes: CPU time to the nanosecond, resident memory, cores, open files. Linux only.

    python -m bench.kernel CORE[,CORE] COMMAND...       runs a command on these cores, with as many open files as it may have

The one rule: a process is measured with all its descendants, because a gateway may be several.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(root: int) -> list[int]:
    """The process and its living descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _parent(int(entry))) is not None:
            children[parent].append(int(entry))
    found, rest = [], [root]
    while rest:
        found.append(rest.pop())
        rest += children[found[-1]]
    return found


def _parent(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None  # it has ended meanwhile


def cpu_seconds(processes: Iterable[int]) -> float:
    """User and system time of all their threads, ended ones included. Linux gives each process a clock of its own
    (clock_getcpuclockid(3)), which counts nanoseconds where /proc/PID/stat counts ticks of 10 ms."""
    total = 0.0
    for process in processes:
        try:
            total += time.clock_gettime((~process << 3) | 2)
        except OSError:
            continue
    return total


def resident(processes: Iterable[int]) -> int:
    """Resident memory in bytes; what processes share is counted for each."""
    total = 0
    for process in processes:
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
        except OSError:
            continue
    return total


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def launch(numbers: str, *command: str) -> None:
    """Becomes the command, pinned and with the open files that thousands of streams take."""
    os.sched_setaffinity(0, {int(number) for number in numbers.split(",")})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.execvp(command[0], command)


if __name__ == "__main__":
    launch(*sys.argv[1:])
