"""The options of `penstock conformance`, apart from the kit, so that the other commands do not load it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

Json = dict[str, Any]
LISTEN = "127.0.0.1:9100"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.add_argument("--url", type=base_url, help="the gateway, up to and without /chat/completions")
    parser.add_argument("--self", dest="own", action="store_true", help="start our own gateway and run on it")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="for --self; default: a config of its own")
    parser.add_argument(
        "--provider-listen", type=address, default=LISTEN, metavar="HOST:PORT", help=f"the fake provider; default {LISTEN}"
    )
    parser.add_argument("--key", help="sent as Authorization: Bearer")
    parser.add_argument(
        "--header", type=header, action="append", default=[], metavar="'K: V'", help="sent with every request; repeatable"
    )
    parser.add_argument("--model", default="openai/{model}", metavar="TEMPLATE", help="how the gateway names a model")
    parser.add_argument("--body", type=json_object, default={}, metavar="JSON", help="fields for every request")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="only these cases; repeatable")
    parser.add_argument("--skip", action="append", default=[], metavar="GLOB", help="not these cases; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for one answer; default 60")
    parser.add_argument(
        "--stall-limit", type=float, default=15.0, metavar="SECONDS", help="to wait for the gateway's own timeouts"
    )
    parser.add_argument("--cancel-limit", type=float, default=5.0, metavar="SECONDS", help="for the gateway to hang up")
    parser.add_argument("--wait", type=float, default=10.0, metavar="SECONDS", help="for the gateway to be there; default 10")
    parser.add_argument("--at-once", type=int, default=64, metavar="N", help="requests side by side; default 64")
    parser.add_argument("--list", action="store_true", help="list the cases")


def base_url(written: str) -> str:
    """An http(s) URL with a host. Raises ValueError."""
    parts = urlsplit(written)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError
    return written


def address(written: str) -> str:
    """`HOST:PORT`, as it was written. Raises ValueError."""
    host, _, port = written.rpartition(":")
    if not host or not 0 <= int(port) < 2**16:
        raise ValueError
    return written


def header(written: str) -> tuple[str, str]:
    """`K: V`. Raises ValueError."""
    name, colon, value = written.partition(":")
    if not colon or not name.strip() or "\n" in written:
        raise ValueError
    return name.strip(), value.strip()


def json_object(written: str) -> Json:
    """Raises ValueError for anything else."""
    found = orjson.loads(written)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found
