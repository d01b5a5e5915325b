"""The store of this process: opened when a config first has middleware that wants one, and open until the end.

Strategy: which home it is, is decided here, and here alone; what middleware gets is behind a guard. A file that cannot be
used is a fault of the config. A server that does not answer is not: the gateway starts, says so, and goes on asking for it.
The one rule: a gateway whose middleware keeps nothing makes no file, opens no connection and loads no module for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import structlog

from proxy.config import Config, ConfigError
from proxy.pipeline import Sample
from proxy.store import Store, UnusableStore

if TYPE_CHECKING:
    from proxy.store.guarded import Guards
    from proxy.store.postgres import PostgresHome
    from proxy.store.sqlite import SqliteHome

log: Any = structlog.get_logger("penstock.store")


class Storage:
    """Nothing is in it until `opened` is asked for something."""

    def __init__(self) -> None:
        self._home: SqliteHome | PostgresHome | None = None
        self._guards: Guards | None = None
        self._store: Store | None = None
        self._settings: Any = None

    async def opened(self, config: Config) -> Store | None:
        """The store that this config's middleware keeps things in; None where none does. Raises ConfigError."""
        if not config.needs_store:
            return None
        settings = (config.data_dir, config.store)
        if self._store is None:
            try:
                self._store = await self._open(config)
            except UnusableStore as error:
                raise ConfigError([f"store: {error}"]) from None
            self._settings = settings
        elif settings != self._settings:
            raise ConfigError(["store: another one is open since an earlier config, so this one takes a restart"])
        return self._store

    async def _open(self, config: Config) -> Store:
        # Imported here, so that who keeps nothing does not load them.
        from proxy.store.guard import Guard
        from proxy.store.guarded import Guards, guarded

        row = config.store
        self._home = await _home(config)
        if self._home.lacks is not None:
            log.warning("the store cannot do everything", kind=self._home.store.kind, lacks=self._home.lacks)
        conversations, library, search = (Guard(part, self._circuit) for part in ("conversations", "library", "search"))
        self._guards = Guards(conversations, library, search, row.timeout, row.background_timeout)
        return guarded(self._home.store, self._guards)

    def _circuit(self, part: str, why: str | None) -> None:
        if why is not None:
            log.warning("the store is not asked for a moment", part=part, why=why)
        else:
            log.info("the store answers again", part=part)

    def health(self) -> dict[str, Any]:
        """For /readyz?verbose."""
        if self._home is None or self._guards is None:
            return {}
        open_parts = [guard.name for guard in self._guards.all if guard.circuit.open]
        state = "unavailable" if self._home.trouble else "failing" if open_parts else "ok"
        told = {"trouble": self._home.trouble, "lacks": self._home.lacks, "not_asked": open_parts}
        return {"store": {"kind": self._home.store.kind, "state": state} | {key: found for key, found in told.items() if found}}

    def samples(self) -> Iterator[Sample]:
        for guard in self._guards.all if self._guards is not None else ():
            for (method, outcome), count in guard.calls.items():
                labels = {"method": method, "outcome": outcome}
                yield Sample("penstock_store_calls_total", "counter", "Calls to the store, by how they ended.", count, labels)
            for method, seconds in guard.seconds.items():
                text = "Seconds that calls to the store took."
                yield Sample("penstock_store_seconds_total", "counter", text, seconds, {"method": method})
            text = "1 while this part of the store is not asked, because it failed again and again."
            yield Sample("penstock_store_circuit_state", "gauge", text, guard.circuit.open, {"part": guard.name})

    async def close(self) -> None:
        if self._home is not None:
            await self._home.close()
        for guard in self._guards.all if self._guards is not None else ():
            await guard.close()


async def _home(config: Config) -> SqliteHome | PostgresHome:
    """The one that the config names, open. Raises UnusableStore."""
    row = config.store
    if row.url is None:
        from proxy.store import sqlite

        return await sqlite.opened(config.data_dir)
    from proxy.store import postgres

    return await postgres.opened(row.url.get_secret_value(), row.connections, row.background_timeout, _reached)


def _reached(trouble: str | None) -> None:
    if trouble is not None:
        log.warning("the store cannot be reached, and is tried again", kind="postgres", why=trouble)
    else:
        log.info("the store is there", kind="postgres")
