"""Reloading config.yaml: read, checked whole, swapped whole; a file with any fault changes nothing, and the log says every fault.

Strategy: one task waits for a signal or looks at the file once per second (`configfile` says what is worth a try), so reloads
never overtake one another; the file is read and checked in a thread, and the swap takes one turn of the loop.
The one rule: whatever goes wrong in a reload, the gateway serves on by the config that it has.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from proxy.config import Config, ConfigError
from proxy.configfile import ConfigFile
from proxy.pipeline import Sample

log: Any = structlog.get_logger("penstock")

POLL_SECONDS = 1.0


class Record:
    """What became of reloads. number: of the config that is served, counted from 1. now: Unix seconds."""

    def __init__(self, worker: int = 0, number: int = 1, now: Callable[[], float] = time.time) -> None:
        self.number = number
        self._now = now
        self._loaded = now()
        self._refused: dict[str, Any] | None = None
        self._counts = Counter(success=0, refused=0)
        # All workers follow the same reloads: one counts them.
        self._counting = worker == 0

    def loaded(self, number: int | None = None) -> None:
        """Another config is served. number: its own, where another process counts."""
        self.number = self.number + 1 if number is None else number
        self._loaded = self._now()
        self._counts["success"] += 1

    def refused(self, faults: Sequence[str]) -> None:
        """A file was not taken; it stays known until the next one, whatever becomes of that."""
        self._refused = {"at": _moment(self._now()), "faults": list(faults)}
        self._counts["refused"] += 1

    def health(self) -> dict[str, Any]:
        """For /readyz?verbose."""
        return {"config": {"generation": self.number, "loaded": _moment(self._loaded), "last_refused": self._refused}}

    def samples(self) -> Iterator[Sample]:
        text = "Unix time at which the config that is served was loaded."
        yield Sample("penstock_config_last_reload_success_timestamp_seconds", "gauge", text, self._loaded)
        for result, count in self._counts.items():
            if self._counting:
                text = "Reloads of config.yaml after the start, by result."
                yield Sample("penstock_config_reloads_total", "counter", text, count, {"result": result})


class Reloadable(Protocol):
    """What the gateway is here."""

    config: Config
    record: Record

    async def reload(self, config: Config) -> list[str]: ...


class Reloader:
    """Keeps a gateway to its file."""

    def __init__(self, gateway: Reloadable, file: ConfigFile) -> None:
        self._gateway = gateway
        self._file = file

    async def run(self, bell: asyncio.Event) -> None:
        """For ever. bell: set it for a reload now."""
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await bell.wait()
            except TimeoutError:
                await self.look()
            else:
                bell.clear()
                await self.reload()

    async def look(self) -> None:
        """Reload if the file has another content by now."""
        if self._gateway.config.server.watch and await asyncio.to_thread(self._file.settled):
            await self.reload()

    async def reload(self) -> bool:
        """Reload now. Was the file taken? If not, everything is as before."""
        try:
            text = await asyncio.to_thread(self._file.read)
        except ConfigError as error:
            self._refused(error.faults)
            return False
        return await self.follow(text)

    async def follow(self, text: str, number: int | None = None) -> bool:
        """The same with a file's text. number: see `Record.loaded`."""
        gateway = self._gateway
        try:
            config, kept = await asyncio.to_thread(self._file.parse, text, gateway.config)
            fresh = [warning for warning in config.warnings if warning not in gateway.config.warnings]
            changed = await gateway.reload(config)
        except ConfigError as error:
            self._refused(error.faults)
            return False
        except Exception as error:  # whatever a middleware raises at its start; its words may hold a secret
            log.exception("a middleware failed in a reload")
            self._refused([f"a middleware failed to start ({type(error).__name__})"])
            return False
        gateway.record.loaded(number)
        log.info("config reloaded", generation=gateway.record.number, changes=changed)
        for warning in fresh:
            log.warning("config reloaded", warning=warning)
        if kept:
            log.warning("config reloaded, but some settings stay as they were until a restart", settings=kept)
        return True

    def _refused(self, faults: Sequence[str]) -> None:
        self._gateway.record.refused(faults)
        log.error("config not reloaded, the earlier one is still served", path=str(self._file.path), faults=list(faults))


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
