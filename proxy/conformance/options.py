"""The options of `penstock conformance`, apart from the kit, so that the other commands do not load it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import orjson

Json = dict[str, Any]
LISTEN = "127.0.0.1:9100"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.add_argument("--url", help="the gateway, up to and without /chat/completions")
    parser.add_argument("--self", dest="own", action="store_true", help="start our own gateway and run on it")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="for --self; default: a config of its own")
    parser.add_argument("--provider-listen", default=LISTEN, metavar="HOST:PORT", help=f"the fake provider; default {LISTEN}")
    parser.add_argument("--key", help="sent as Authorization: Bearer")
    parser.add_argument("--header", action="append", default=[], metavar="'K: V'", help="sent with every request; repeatable")
    parser.add_argument("--model", default="openai/{model}", metavar="TEMPLATE", help="how the gateway names a model")
    parser.add_argument("--body", type=_object, default={}, metavar="JSON", help="fields for every request")
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


def _object(written: str) -> Json:
    found = orjson.loads(written)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found
