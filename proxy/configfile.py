"""config.yaml as a file that may change while the gateway runs: what it says now, and whether that is worth loading.

Strategy: each look opens the path anew and hashes the content, so it makes no difference whether an editor writes in place, a
deployment renames over it or a ConfigMap swaps a symlink, and a touched file is no change (a look takes 8 us, without any
guessing from timestamps). A new content counts once two looks have found the same: a file that is just being written, or is empty
for a moment, is not loaded.
The one rule: every content is offered once, right or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from proxy.config import Config, ConfigError, parse
from proxy.reading import Known

# What sockets and processes were made from, and where the store that is open lies.
FIXED = ("host", "port", "admin_listen", "workers")
FIXED_STORE = ("data_dir", "store")


class ConfigFile:
    """The file at `path`. environ, known, overrides: as for `proxy.config.load`; the environment is read at each `parse`."""

    def __init__(
        self, path: Path, environ: Mapping[str, str], known: Known, overrides: Mapping[str, object] | None = None
    ) -> None:
        self.path = path
        self._environ = environ
        self._known = known
        self._overrides = dict(overrides or {})
        self._offered = self._seen = b""

    def load(self) -> Config:
        """The config as it is at start. Raises ConfigError."""
        return parse(self.read(), self._environ, self._known, self.path.name, self._overrides)

    def read(self) -> str:
        """The text as it is now; with that it has been offered. Raises ConfigError."""
        try:
            content = self.path.read_bytes()
            self._offered = sha256(content).digest()
            return content.decode()
        except UnicodeDecodeError:
            raise ConfigError([f"{self.path}: is not UTF-8 text"]) from None
        except OSError as error:
            self._offered = _unreadable(error)
            raise ConfigError([f"{self.path}: {error.strerror or 'cannot be read'}"]) from None

    def settled(self) -> bool:
        """Is it another than the one that was offered, and the same as at the last look? It blocks."""
        try:
            found = sha256(self.path.read_bytes()).digest()
        except OSError as error:
            found = _unreadable(error)
        before, self._seen = self._seen, found
        return found not in (self._offered, b"") and found == before

    def parse(self, text: str, running: Config) -> tuple[Config, list[str]]:
        """The config for a gateway that runs, and the settings in which the file differs but which only a restart can change.
        These keep their values, and the rest is checked against them: without auth nobody but this machine may be served, and
        what listens is not what the file says. Raises ConfigError.
        """
        config = parse(text, self._environ, self._known, self.path.name, self._overrides)
        kept = {name: getattr(running.server, name) for name in FIXED}
        differing = [f"server.{name}" for name in FIXED if getattr(config.server, name) != kept[name]]
        if differing:
            config = self._held(text, kept, differing)
        if running.needs_store:
            differing += [name for name in FIXED_STORE if getattr(config, name) != getattr(running, name)]
            config = replace(config, data_dir=running.data_dir, store=running.store)
        return config, differing

    def _held(self, text: str, kept: Mapping[str, object], differing: Sequence[str]) -> Config:
        """The config with the values that hold instead of its own."""
        try:
            return parse(text, self._environ, self._known, self.path.name, {**self._overrides, **kept})
        except ConfigError as error:
            why = f"the file would be right with another {' and '.join(differing)}, but that takes a restart"
            raise ConfigError([*error.faults, why]) from None


def _unreadable(error: OSError) -> bytes:
    return f"errno {error.errno}".encode()
