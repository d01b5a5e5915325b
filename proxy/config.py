"""config.yaml: read at start, checked whole, and refused with every fault by its path and line.

Strategy: `yamlfile` gives values with lines, `reading` checks them, part by part and across parts, and only a file
without any fault becomes a frozen `Config`. The table of known middleware comes from the caller: this floor imports none.
The one rule: no fault, repr or warning shows a value that may be a secret; paths, names and variables only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from proxy import yamlfile
from proxy.call import Provider, Route, Target
from proxy.reading import BASE_URLS, NO_URL, Factory, Known, Layer, Reading
from proxy.schema import json_schema
from proxy.shape import File, ProviderRow, RouteRow, Server, StoreRow

Overrides = Mapping[str, object] | None


class ConfigError(Exception):
    """The file cannot be used. faults: one line each, in the order of the file."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True, slots=True)
class MiddlewareSpec:
    """One entry of `middleware:`, checked but not yet built: `factory(**options)` builds it.

    name: as written. options: only those that the file gives, of the types that the constructor declares.
    """

    name: str
    factory: Factory
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Config:
    """A file without faults. warnings: what the operator should read at start (disabled providers)."""

    server: Server = field(default_factory=Server)
    default_provider: str | None = None
    providers: Mapping[str, Provider] = field(default_factory=dict)
    routes: Mapping[str, Route] = field(default_factory=dict)
    middleware: Sequence[MiddlewareSpec] = ()
    warnings: Sequence[str] = ()
    data_dir: Path = Path("data")
    store: StoreRow = field(default_factory=StoreRow)

    @property
    def needs_store(self) -> bool:
        """Does some middleware keep what outlives a request?"""
        return any(getattr(spec.factory, "NEEDS_STORE", False) for spec in self.middleware)

    @property
    def usage_on_finish(self) -> bool:
        return self.server.usage_placement == "finish"


def load(path: Path, environ: Mapping[str, str], known: Known, overrides: Overrides = None) -> Config:
    """Read the file. overrides: `server.*` settings from the command line. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: is not UTF-8 text"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or 'cannot be read'}"]) from None
    return parse(text, environ, known, name=path.name, overrides=overrides)


def parse(
    text: str,
    environ: Mapping[str, str],
    known: Known = MappingProxyType({}),
    name: str = "config.yaml",
    overrides: Overrides = None,
) -> Config:
    """The same from text. Raises ConfigError with every fault, ordered by line."""
    document = yamlfile.read(text, environ, name)
    if document.value is not None or not document.faults:
        for setting, value in (overrides or {}).items():
            document.override(("server", setting), value)
    if document.value is None:
        document.value = {}
    if not isinstance(document.value, dict):
        document.fault((), "must be a mapping with sections such as server, providers, models, middleware")
    if not isinstance(document.value, dict) or (document.faults and not document.value):
        raise ConfigError([str(fault) for fault in document.faults])
    reading = Reading(document, known)
    file, layers = reading.check()
    if document.faults or file is None:
        raise ConfigError([str(fault) for fault in sorted(set(document.faults))])
    return _built(file, layers, reading.disabled)


def _built(file: File, layers: Sequence[Layer], disabled: Mapping[str, Sequence[str]]) -> Config:
    providers = {name: _provider(name, row, disabled.get(name)) for name, row in file.providers.items()}
    routes = {name: _route(name, row, providers) for name, row in file.models.items()}
    middleware = tuple(MiddlewareSpec(*layer) for layer in layers)
    warnings = tuple(
        f"provider '{name}' is disabled: set {' and '.join(dict.fromkeys(variables))}" for name, variables in disabled.items()
    )
    data_dir = Path(file.data_dir).expanduser()
    return Config(file.server, file.default_provider, providers, routes, middleware, warnings, data_dir, file.store)


def _provider(name: str, row: ProviderRow, missing: Sequence[str] | None) -> Provider:
    keys = [] if missing else _keys(row)
    return Provider(
        name=name,
        api=row.api,
        base_url="" if row.base_url == NO_URL else row.base_url or BASE_URLS[row.api],
        api_key=keys[0] if keys else None,
        further_keys=tuple(keys[1:]),
        key_header=row.key_header,
        missing=missing[0] if missing else None,
        query=tuple(row.query.items()),
        headers=tuple(row.headers.items()),
        usage=row.usage,
        reasoning=row.reasoning,
        completions=tuple(row.completions),
        default_max_tokens=row.default_max_tokens,
        models=tuple(row.models),
    )


def _keys(row: ProviderRow) -> list[str]:
    """The provider's keys, in order; an empty one (`${SPARE_KEY:-}`) is none."""
    written = row.api_key if isinstance(row.api_key, list) else [row.api_key] if row.api_key else []
    return list(dict.fromkeys(key.get_secret_value() for key in written if key.get_secret_value()))


def _route(name: str, row: RouteRow, providers: Mapping[str, Provider]) -> Route:
    targets = tuple(_target(entry.target, providers) for entry in row.targets)
    weights = tuple(entry.weight for entry in row.targets) if row.strategy == "weighted" else ()
    if not any(entry.prices for entry in row.targets):
        return Route(name, targets, row.strategy, weights)
    prices = tuple((entry.prices.input, entry.prices.output) if entry.prices else None for entry in row.targets)
    return Route(name, targets, row.strategy, weights, prices)


def _target(written: str, providers: Mapping[str, Provider]) -> Target:
    name, _, model = written.partition("/")
    return Target(providers[name], model)


__all__ = ["BASE_URLS", "Config", "ConfigError", "MiddlewareSpec", "json_schema", "load", "parse"]
