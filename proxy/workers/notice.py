"""What the supervisor tells the workers of config.yaml: the text that it has checked, or why it was refused.

Strategy: one file in the workers' private directory, replaced whole; a signal says that it is there. So all workers take the very
text that was checked, whatever has become of the operator's file meanwhile.
The one rule: it may hold keys, so nobody but the gateway's user can read it, and it goes with the directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson


@dataclass(frozen=True, slots=True)
class Notice:
    """serial: of notices, so that one is not read twice. number: of the config that is to be served; text: its file's. faults: of
    the last file, where it was refused; else none.
    """

    serial: int
    number: int
    text: str = ""
    faults: Sequence[str] = ()


def post(directory: str, notice: Notice) -> None:
    """Put it up. directory: of mode 0700. Raises OSError."""
    path = _path(directory)
    new = path.with_suffix(".new")
    new.write_bytes(orjson.dumps(asdict(notice)))
    os.replace(new, path)


def posted(directory: str) -> Notice | None:
    """The last one; None where there is none."""
    try:
        return Notice(**orjson.loads(_path(directory).read_bytes()))
    except FileNotFoundError:
        return None


def _path(directory: str) -> Path:
    return Path(directory) / "config.json"
