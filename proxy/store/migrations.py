"""The numbered steps by which a database got its form: `NNNN_name.sql` beside each home, applied once and in order.

Strategy: the files are package data; a database says which numbers it has, and each home applies the rest under a lock of its
own. A step that has been released is never changed; what it got wrong is another step's business.
The one rule: a database that has a step which this program does not know is left alone, since a newer program made it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files

from proxy.store import UnusableStore


@dataclass(frozen=True, slots=True)
class Migration:
    number: int
    name: str
    text: str


def known(package: str) -> Sequence[Migration]:
    """All of a home, in order. package: where it lies, `proxy.store.sqlite`."""
    found = sorted((entry for entry in (files(package) / "migrations").iterdir()), key=lambda entry: entry.name)
    texts = [(entry.name, entry.read_text(encoding="utf-8")) for entry in found if entry.name.endswith(".sql")]
    return [Migration(int(name[:4]), name.removesuffix(".sql"), text) for name, text in texts]


def pending(steps: Sequence[Migration], applied: Collection[int]) -> Sequence[Migration]:
    """Those that a database still needs. Raises UnusableStore where it is newer than this program."""
    newest = max(applied, default=0)
    if newest > (last := max(step.number for step in steps)):
        raise UnusableStore(f"the store is newer than this program: it has migration {newest}, the program knows up to {last}")
    return [step for step in steps if step.number not in applied]
