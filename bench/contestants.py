"""What is measured, without the peers: the provider itself, the bare relay, and the gateway in its settings.

Strategy: each contestant is a command, a port and how a request to it is worded; `penstock` is config.yaml as shipped, with only
the address and two providers' rows changed, so that what is measured is what an operator gets.
The one rule: the layers come from config.yaml, those that it shows commented out included; nothing is listed twice.
"""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench.job import KEY
from middleware import TABLE
from proxy import __version__

ROOT = Path(__file__).resolve().parent.parent
# `  # - name: {...}` in config.yaml: a layer that is shown, but off as shipped.
SHOWN = re.compile(r"^(\s*)# (- [\w.:]+(: \{.*\})?)(\s+#.*|\s*)$", re.M)
# A limit that a benchmark does not reach.
AMPLE = {"limits": {"per_key": {"requests_per_minute": 1_000_000_000, "concurrent": 1_000_000}}}
Layer = Any


@dataclass(frozen=True)
class Place:
    """Where a run happens. provider: the fake provider's port. tools: where peers are installed. scratch: for what they write."""

    provider: int
    tools: Path
    scratch: Path


@dataclass(frozen=True)
class Dialect:
    """How a gateway is asked for a provider's model: a prefix to its name, and headers."""

    prefix: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """command: empty where there is nothing to start. dialects: by the provider's wire format. cores: how many it may use."""

    name: str
    port: int
    command: Sequence[str]
    version: str
    dialects: Mapping[str, Dialect] = field(default_factory=lambda: {"openai": Dialect()})
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1


# Where layers stand that are off as shipped: before which of the shipped ones.
PLACES = {"resume": "metrics", "smooth": "cache", "coalesce": "cache"}


def with_layers(place: Place, called: str, **layers: Mapping[str, Any]) -> Contestant | None:
    """The gateway as shipped, and these layers; None where it does not have them."""
    if not set(layers) <= set(TABLE):
        return None
    onion = list(shipped()[0]["middleware"])
    for layer, options in layers.items():
        at = next(number for number, entry in enumerate(onion) if name(entry) == PLACES[layer])
        onion.insert(at, {layer: dict(options)} if options else layer)
    return penstock(place, called, onion)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def direct(place: Place) -> Contestant:
    """The provider without a gateway: what a client sees at best."""
    return Contestant("direct", place.provider, (), "")


def relay(place: Place) -> Contestant:
    port = free_port()
    return Contestant("relay", port, (sys.executable, "-m", "bench.relay", str(port), str(place.provider)), __version__)


def shipped(text: str | None = None) -> tuple[dict[str, Any], dict[str, Layer]]:
    """config.yaml, and every middleware entry in it by its name, those that are commented out included."""
    text = (ROOT / "config.yaml").read_text(encoding="utf-8") if text is None else text
    document: dict[str, Any] = YAML(typ="safe").load(text)
    onion = SHOWN.sub(r"\1\2", text[text.index("\nmiddleware:") :])
    entries = YAML(typ="safe").load(io.StringIO(onion))["middleware"]
    return document, {name(entry): {name(entry): AMPLE[name(entry)]} if name(entry) in AMPLE else entry for entry in entries}


def name(entry: Layer) -> str:
    """Of an entry of `middleware:`, which is a name or a mapping from it to its options."""
    return entry if isinstance(entry, str) else str(next(iter(entry)))


def penstock(place: Place, called: str, layers: Sequence[Layer] | None = None, workers: int = 1) -> Contestant:
    """The gateway. layers: instead of the shipped middleware."""
    document, _ = shipped()
    port = free_port()
    document["server"] |= {"host": "127.0.0.1", "port": port, **({"workers": workers} if workers > 1 else {})}
    base = f"http://127.0.0.1:{place.provider}"
    document["providers"]["openai"] |= {"base_url": f"{base}/v1", "api_key": "x"}
    document["providers"]["anthropic"] |= {"base_url": f"{base}/v1", "api_key": "x"}
    if layers is not None:
        document["middleware"] = list(layers)
    config = place.scratch / f"{called.strip('+')}-{port}.yaml"
    config.write_text(json.dumps(document))  # JSON is YAML
    dialects = {wire: Dialect(f"{wire}/") for wire in ("openai", "anthropic")}
    command = (sys.executable, "-m", "proxy", "serve", "-c", str(config))
    return Contestant(called, port, command, __version__, dialects, {"PENSTOCK_KEY": KEY}, cores=workers)
