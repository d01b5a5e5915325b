"""From a request's JSON to a call: checked, its gateway fields taken out, its model resolved.

Strategy: the gateway's own fields may stand at the top level, in `penstock: {…}` or in `orq: {…}`; the first place wins. They
are taken out before anything goes upstream.
The one rule: a field of the wrong type is refused with its path before any upstream is called.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.call import Call, Kind, Options
from proxy.errors import Refused
from proxy.routing import Directory

Json = dict[str, Any]

# Read by the gateway, or by middleware that may not be configured; never sent upstream. `metadata` alone also goes on.
GATEWAY_FIELDS = (
    "penstock", "orq", "name", "cache", "timeout", "retry", "fallbacks", "models", "load_balancer",
    "identity", "contact", "thread", "usage_placement", "strict_params",
)  # fmt: skip
SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
NAME_LIMIT = 128


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the operator decides where a request says nothing."""

    usage_on_finish: bool = False
    strict_params: bool = False
    max_depth: int = 64


def parse_json(body: bytes, max_depth: int) -> Json:
    """The request's JSON object. Raises Refused for anything else, and for one nested deeper than `max_depth`."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused("The body must be a JSON object.", code="invalid_json")
    # Counting brackets is cheap and can only say "deep enough to look"; most bodies are never walked.
    if body.count(b"[") + body.count(b"{") > max_depth and _deeper_than(found, max_depth):
        raise Refused(f"The body is nested deeper than {max_depth} levels.", code="too_deep")
    return found


def _deeper_than(found: object, depth: int) -> bool:
    level: list[object] = [found]
    for _ in range(depth):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def admit(body: Json, kind: Kind, headers: Mapping[str, str], directory: Directory, defaults: Defaults, request_id: str) -> Call:
    """The call. headers: the client's, whatever the case of their names. Raises Refused (400, 404)."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", "must be the name of a model")
    stream = _flag(body, "stream")
    own = _own_fields(body)
    name = _name(own, headers)
    options = _options(body, own, defaults)
    if "n" in body and body["n"] is not None and (type(body["n"]) is not int or not 1 <= body["n"] <= 128):
        raise _wrong("n", "must be a whole number from 1 to 128")
    return Call(
        id=request_id,
        nonce=_unique(),
        created=int(time.time()),
        kind=kind,
        request={field: value for field, value in body.items() if field not in GATEWAY_FIELDS},
        model=model,
        stream=stream,
        options=options,
        name=name,
        targets=directory.resolve(model),
        headers=headers,
    )


def request_id(headers: Mapping[str, str]) -> str:
    """The client's X-Request-Id if it sent a sane one, else a new one."""
    sent = headers.get("x-request-id", "")
    return sent if SANE_ID.fullmatch(sent) else f"req_{_unique()}"


def _unique() -> str:
    """16 hex digits; they tell requests apart, nothing depends on their being secret."""
    return f"{random.getrandbits(64):016x}"


Own = dict[str, tuple[Any, str]]


def _own_fields(body: Json) -> Own:
    """The gateway's fields as (value, path), from all the places they may stand in: top level before `penstock` before `orq`."""
    own: Own = {}
    for place in ("orq", "penstock"):
        found = body.get(place)
        if found is not None and not isinstance(found, dict):
            raise _wrong(place, "must be an object")
        own.update({field: (value, f"{place}.{field}") for field, value in (found or {}).items() if value is not None})
    for field in GATEWAY_FIELDS:
        if body.get(field) is not None and field not in ("orq", "penstock"):
            own[field] = (body[field], field)
    return own


def _name(own: Own, headers: Mapping[str, str]) -> str | None:
    """The tracking name: `name`, `penstock.name`, `orq.tracking.name`, `orq.name`, or the header."""
    tracking, where = own.get("tracking", ({}, ""))
    if not isinstance(tracking, dict):
        raise _wrong(where, "must be an object")
    name, path = own.get("name", (None, "name"))
    if tracking.get("name") is not None and (name is None or path == "orq.name"):
        name, path = tracking["name"], f"{where}.name"
    if name is None:
        name = headers.get("x-penstock-name")
    if name is None or name == "":
        return None
    if not isinstance(name, str) or len(name) > NAME_LIMIT:
        raise _wrong(path, f"must be a text of at most {NAME_LIMIT} characters")
    return name


def _options(body: Json, own: Own, defaults: Defaults) -> Options:
    stream_options = body.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise _wrong("stream_options", "must be an object")
    placement, path = own.get("usage_placement", (None, ""))
    if placement not in (None, "chunk", "finish"):
        raise _wrong(path, "must be 'chunk' or 'finish'")
    strict, path = own.get("strict_params", (None, ""))
    if strict is not None and not isinstance(strict, bool):
        raise _wrong(path, "must be true or false")
    return Options(
        include_usage=_flag(stream_options or {}, "include_usage", "stream_options."),
        usage_on_finish=defaults.usage_on_finish if placement is None else placement == "finish",
        strict_params=defaults.strict_params if strict is None else strict,
    )


def _flag(body: Json, name: str, path: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(path + name, "must be true or false")
    return bool(value)


def _wrong(param: str, message: str) -> Refused:
    return Refused(f"{param}: {message}.", code="invalid_value", param=param)
