"""The gateway's config for the run, with what this gateway has: what its schema does not know is left out, and said.

The one rule: whether a feature is there is asked of the schema that `penstock check` applies, never of the code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from middleware import TABLE
from proxy.config import ConfigError, parse

Json = dict[str, Any]
# Times are short, so that everything that can time out does, and is over soon.
SERVER = {"host": "127.0.0.1", "port": 0, "write_timeout": "1s", "drain_timeout": "1s"}
SECTIONS: Mapping[str, Json] = {
    "reload": {"watch": False},
    "keepalive": {"keepalive_interval": "1s"},
}
# Of the store: what the machine's load makes late is not what is looked for here.
STORE = {"timeout": "5s"}
# The onion, outermost first.
ONION: Mapping[str, Json] = {
    "chaos.inside:Inside": {},
    "resume": {"grace": "1s", "keep": "2s"},
    "metrics": {},
    "tracking": {},
    "disconnect": {"finish_within": "2s"},
    "memory": {"max_turns": 4, "max_turns_kept": 20, "timeout": "5s"},
    "retrieval": {"top_k": 2},
    "coalesce": {"max_lag_bytes": "64KiB"},
    "smooth": {},
    "bounds": {},
    "guardrails": {"rules": ["email", "api_key"], "restore": True},
    "cache": {"ttl": "5s", "max_bytes": "1MiB"},
    "limits": {"per_key": {"concurrent": 100_000}},
    "tool_guard": {"mode": "repair"},
    "continuation": {"prefill": {"second/*": "message"}},
    "fallback": {"failure_rate": 0.95, "min_requests": 50, "window": "2s", "cool_down": "500ms"},
    "retry": {"count": 1, "base": "10ms", "cap": "50ms", "budget": 1.0},
    "timeout": {"connect_timeout": "5s", "first_chunk_timeout": "1500ms", "idle_timeout": "1s", "call_timeout": "2s"},
}
OPTIONAL = (
    "resume", "disconnect", "memory", "retrieval", "coalesce", "smooth", "bounds", "guardrails", "tool_guard", "continuation",
)  # fmt: skip


def features() -> tuple[set[str], list[str]]:
    """What of all that is optional this gateway has, and what it has not."""
    wanted = {**{name: {"server": section} for name, section in SECTIONS.items()}, **{name: _layer(name) for name in OPTIONAL}}
    there = {name for name, document in wanted.items() if _accepted(document)}
    return there, [name for name in wanted if name not in there]


def _layer(name: str) -> Json:
    return {"middleware": [{name: ONION[name]}]}


def _accepted(document: Json) -> bool:
    try:
        parse(json.dumps({"providers": {"demo": {"api": "demo"}}, **document}), {}, TABLE)
    except ConfigError:
        return False
    return True


def config(provider: str, folder: Path, there: set[str], idle_ms: int = 1000) -> str:
    """The file, for a provider at this base URL. folder: of the store. idle_ms: what a reload changes."""
    row = {"api": "openai", "base_url": provider, "api_key": "sk-chaos-0123456789abcdef"}
    layers = {name: options for name, options in ONION.items() if name not in OPTIONAL or name in there}
    layers["timeout"] = {**layers["timeout"], "idle_timeout": f"{idle_ms}ms"}
    sections = [section for name, section in SECTIONS.items() if name in there]
    stored = {"data_dir": str(folder), "store": STORE} if there & {"memory", "retrieval"} else {}
    document = {
        **stored,
        "server": {key: value for section in (SERVER, *sections) for key, value in section.items()},
        "providers": {"first": row, "second": row},
        "models": {"wild": {"targets": ["first/a", "second/b"], "strategy": "fallback"}},
        "middleware": [{name: options} if options else name for name, options in layers.items()],
    }
    return json.dumps(document, indent=1)  # JSON is YAML
