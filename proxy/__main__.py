"""The command line: serve, check, schema, conformance.

Strategy: argparse, one function per command, each returning the exit status. Results go to stdout, what is wrong to stderr.
The one rule: an operator's mistake is never a traceback; it is a line per fault and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proxy import __version__
from proxy.config import Config, ConfigError, json_schema, parse
from proxy.configfile import ConfigFile
from proxy.conformance.options import add_options
from proxy.wording import PER_WORKER

# What the built-in config switches on of the middleware that is there; any of it may have been deleted.
USUAL_MIDDLEWARE = ("tracking", "timeout")
DEFAULT_FILE = Path("config.yaml")
# Served where there is no file at all. The default provider is the demo because nothing else could answer.
EMBEDDED = """\
default_provider: demo
providers:
  demo: {api: demo, models: [echo, fast, slow, reason, tool, json]}
models: {demo: demo/echo}
middleware: [%s]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 well, 1 faults, 2 wrong usage)."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except ConfigError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `penstock schema | head`: the reader has had enough. Without this, Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def serve(arguments: argparse.Namespace) -> int:
    """Run the gateway until it is told to stop."""
    file = _file(arguments)
    config = _built_in(arguments) if file is None else file.load()
    from proxy.app import run  # here, so that `check` and `schema` do not load the server

    return run(config, file)


def check(arguments: argparse.Namespace) -> int:
    """Say what is wrong with the file, or what is in it."""
    file = _file(arguments)
    for line in summary(_built_in(arguments) if file is None else file.load()):
        print(line)
    return 0


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of config.yaml."""
    print(json.dumps(json_schema(known_middleware()), indent=2))
    return 0


def conformance(arguments: argparse.Namespace) -> int:
    """Test a gateway, ours or any other, against a provider that misbehaves."""
    from proxy.conformance.command import conformance as run  # here, so that serving does not load the kit

    return run(arguments)


def summary(config: Config) -> list[str]:
    """What is in a config, a line per kind of thing."""
    enabled = [name for name, provider in config.providers.items() if provider.missing is None]
    return [
        f"listens on {config.server.host}:{config.server.port}",
        *([f"workers: {config.server.workers}, {PER_WORKER}"] if config.server.workers > 1 else []),
        f"providers enabled: {_listed(enabled)}",
        *config.warnings,
        f"default provider: {config.default_provider or 'none'}",
        *(f"route {name}: {_listed([str(target) for target in route.targets])}" for name, route in config.routes.items()),
        f"middleware: {_listed([spec.name for spec in config.middleware])}",
        *([f"store: {_store(config)}"] if config.needs_store else []),
    ]


def _store(config: Config) -> str:
    """Where it lies, without who may open it."""
    if config.store.url is None:
        return f"SQLite in {config.data_dir}"
    parts = urlsplit(config.store.url.get_secret_value())
    return f"PostgreSQL at {parts.netloc.rpartition('@')[2] or 'the usual socket'}{parts.path}"


def known_middleware() -> Mapping[str, Callable[..., Any]]:
    """The table of middleware that config.yaml may name without a module."""
    from middleware import TABLE

    return TABLE


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _overrides(arguments: argparse.Namespace) -> dict[str, object]:
    """The command line's settings, over those of the file."""
    given = {name: getattr(arguments, name, None) for name in ("host", "port", "workers")}
    return {name: value for name, value in given.items() if value is not None}


def _file(arguments: argparse.Namespace) -> ConfigFile | None:
    """The file that was named, else ./config.yaml; None where there is neither."""
    path: Path | None = arguments.config
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    return None if path is None else ConfigFile(path, os.environ, known_middleware(), _overrides(arguments))


def _built_in(arguments: argparse.Namespace) -> Config:
    """The embedded config."""
    print("penstock: no config.yaml here and none named with -c; using the built-in demo provider only", file=sys.stderr)
    known = known_middleware()
    text = EMBEDDED % ", ".join(name for name in USUAL_MIDDLEWARE if name in known)
    return parse(text, os.environ, known, "built-in config", _overrides(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="penstock", description="A streaming-first AI gateway.")
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, text in (
        (serve, "run the gateway"),
        (check, "say what is wrong with a config file"),
        (schema, "print its JSON Schema"),
        (conformance, "test an OpenAI-compatible gateway for what it does with a provider that misbehaves"),
    ):
        found = commands.add_parser(command.__name__, help=text, description=command.__doc__)
        found.set_defaults(command=command)
        if command is conformance:
            add_options(found)
        elif command is not schema:
            found.add_argument("-c", "--config", type=Path, metavar="FILE", help="default: ./config.yaml, else a built-in demo")
        if command is serve:
            # Text, not numbers: the config's own checks judge them, with the same words as for the file.
            found.add_argument("--host", help="listen here instead of server.host")
            found.add_argument("--port", help="listen on this port instead of server.port")
            found.add_argument("--workers", help="processes, instead of server.workers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
