"""The store of this process: opened when a config first has middleware that wants one, and open until the end.

The one rule: a gateway whose middleware keeps nothing makes no file, opens no connection and loads no module for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from proxy.config import Config, ConfigError
from proxy.pipeline import Sample
from proxy.store import Store, UnusableStore

if TYPE_CHECKING:
    from proxy.store.sqlite import SqliteHome


class Storage:
    """Nothing is in it until `opened` is asked for something."""

    def __init__(self) -> None:
        self._home: SqliteHome | None = None

    async def opened(self, config: Config) -> Store | None:
        """The store that this config's middleware keeps things in; None where none does. Raises ConfigError."""
        if not config.needs_store:
            return None
        if self._home is None:
            from proxy.store.sqlite import opened  # here, so that who keeps nothing does not load it

            try:
                self._home = await opened(config.data_dir)
            except UnusableStore as error:
                raise ConfigError([f"store: {error}"]) from None
        return self._home.store

    def health(self) -> dict[str, Any]:
        """For /readyz?verbose."""
        return {} if self._home is None else {"store": {"kind": self._home.store.kind}}

    def samples(self) -> Iterator[Sample]:
        yield from ()

    async def close(self) -> None:
        if self._home is not None:
            await self._home.close()
