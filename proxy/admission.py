"""From a request's JSON to a call: checked, its gateway fields taken out, its model resolved.

Strategy: the gateway's own fields may stand at the top level, in `penstock: {…}` or in `orq: {…}` (`proxy.own_fields`); each
middleware reads those that are its own. They are taken out before anything goes upstream.
The one rule: a field of the wrong type is refused with its path before any upstream is called.
"""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import orjson

from proxy.call import Call, Kind, Options, Principal, altered
from proxy.errors import Refused
from proxy.own_fields import Field, OwnFields
from proxy.routing import Directory

Json = dict[str, Any]

# Read by the gateway, or by middleware that may not be configured; never sent upstream. `metadata` alone also goes on.
GATEWAY_FIELDS = frozenset({
    "penstock", "orq", "name", "cache", "timeout", "retry", "fallbacks", "models", "load_balancer",
    "identity", "contact", "thread", "usage_placement", "strict_params", "keepalive_after", "keepalive_interval", "coalesce",
    "on_disconnect", "on_break", "resume", "background", "guardrails",
    "sessionId", "saveToMemory", "save_to_memory", "useRAG", "use_rag", "rag", "knowledge_bases",
})  # fmt: skip
GUARDRAILS = "guardrails"
SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
NAME_LIMIT = 128
ANYBODY = Principal()
# Where `admit` itself looks: with none of them in the body there is nothing to find.
READ_HERE = frozenset({
    "penstock", "orq", "name", "tracking", "identity", "contact", "usage_placement", "strict_params", "keepalive_after",
    "keepalive_interval",
})  # fmt: skip
# What a request may ask for, in ms: more often than this, comments would be a load of their own.
SHORTEST = {"keepalive_after": 100, "keepalive_interval": 1000}
LONGEST = 3_600_000
# What every call is altered from: a third of what its constructor costs (3 us).
BLANK = Call(id="", nonce="", created=0, kind="chat", request={}, model="", stream=False)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the operator decides where a request says nothing. keepalive_*: seconds, 0 is never."""

    usage_on_finish: bool = False
    strict_params: bool = False
    max_depth: int = 64
    keepalive_after: float = 0.0
    keepalive_interval: float = 0.0


@dataclass(frozen=True, slots=True)
class Readers:
    """What the middleware reads of requests. fields: never sent upstream. admits: each may add to the call, or refuse it. peer:
    some of it wants to know who is at the other end. guards: some of it reads `guardrails`."""

    fields: frozenset[str] = GATEWAY_FIELDS
    admits: tuple[Callable[[Call, OwnFields], Call], ...] = ()
    peer: bool = False
    guards: bool = False

    @classmethod
    def of(cls, layers: Sequence[object]) -> Readers:
        """Those of the layers that have `FIELDS` or `admit`, in their order."""
        fields = GATEWAY_FIELDS.union(*(getattr(layer, "FIELDS", ()) for layer in layers))
        admits = tuple(layer.admit for layer in layers if hasattr(layer, "admit"))
        peer = any(getattr(layer, "NEEDS_PEER", False) for layer in layers)
        return cls(fields, admits, peer, any(GUARDRAILS in getattr(layer, "FIELDS", ()) for layer in layers))


NO_READERS = Readers()


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


def admit(
    body: Json,
    kind: Kind,
    headers: Mapping[str, str],
    directory: Directory,
    defaults: Defaults,
    request_id: str,
    principal: Principal = ANYBODY,
    readers: Readers = NO_READERS,
) -> Call:
    """The call. headers: the client's, whatever the case of their names. Raises Refused (400, 403, 404)."""
    model = body.get("model")
    if model is None and isinstance(several := body.get("models"), list) and several:
        model = several[0]  # OpenRouter's clients may name several models and none
    if not isinstance(model, str) or not model:
        raise Refused("model: must be the name of a model.", code="invalid_value", param="model")
    if body.get("n") is not None:
        Field(body["n"], "n").integer(1, 128)
    own = OwnFields(body, headers)
    if not readers.guards:
        _unguarded(own)
    # Most requests have none of the fields that are read here; then nothing is looked for (1.2 us).
    plain = READ_HERE.isdisjoint(body)
    route = directory.route(model)
    stream = body.get("stream")
    fields = readers.fields
    call = altered(
        BLANK,
        id=request_id,
        nonce=_unique(),
        created=int(time.time()),
        kind=kind,
        request={**body} if fields.isdisjoint(body) else {name: value for name, value in body.items() if name not in fields},
        model=model,
        stream=stream is True or (stream is not None and Field(stream, "stream").flag()),
        options=_options(body, None if plain else own, defaults),
        name=_header(headers, "x-penstock-name") if plain else _name(own),
        identity=sent_identity(headers) if plain else _identity(own),
        principal=principal,
        route=route,
        targets=route.targets,
        headers=headers,
    )
    for read in readers.admits:
        call = read(call, own)
    return call


def _unguarded(own: OwnFields) -> None:
    """Nobody here looks at what passes: who asks for that must not believe that it is done. Raises Refused (400)."""
    asked = own.get(GUARDRAILS)
    if asked is not None and asked.value not in ([], {}, False):
        message = f"{asked.path}: no guardrails are configured here."
        raise Refused(message, code="unsupported", param=asked.path)


def request_id(headers: Mapping[str, str]) -> str:
    """The client's X-Request-Id if it sent a sane one, else a new one."""
    sent = headers.get("x-request-id", "")
    return sent if SANE_ID.fullmatch(sent) else f"req_{_unique()}"


def _unique() -> str:
    """16 hex digits; they tell requests apart, nothing depends on their being secret."""
    return f"{random.getrandbits(64):016x}"


def _header(headers: Mapping[str, str], name: str) -> str | None:
    return readable(headers.get(name, ""))[:NAME_LIMIT] or None


def _name(own: OwnFields) -> str | None:
    """The tracking name: `name`, `penstock.name`, `orq.tracking.name`, `orq.name`, or the header."""
    found = own.get("name")
    tracking = own.get("tracking")
    inside = tracking.get("name") if tracking else None
    if inside is not None and (found is None or found.path == "orq.name"):
        found = inside
    return found.text(NAME_LIMIT) or None if found else _header(own.headers, "x-penstock-name")


def _identity(own: OwnFields) -> str | None:
    """Who the client says its user is: `identity.id`, `contact.id`, or a header."""
    for name in ("identity", "contact"):
        if (found := own.get(name)) is not None and (inside := found.get("id")) is not None:
            return inside.text(NAME_LIMIT)
    return sent_identity(own.headers)


def sent_identity(headers: Mapping[str, str]) -> str | None:
    """Who the client's user is, by its headers alone. A name that is too long keeps its beginning and what tells it apart from
    all others, since what one user said is not for another."""
    sent = headers.get("x-orq-identity-id") or headers.get("x-orq-contact-id")
    if not sent:
        return None
    name = readable(sent)
    if len(name) <= NAME_LIMIT:
        return name
    return f"{name[: NAME_LIMIT - 33]}~{sha256(name.encode()).hexdigest()[:32]}"


def readable(sent: str) -> str:
    """A header's text; bytes that are no UTF-8 are Latin-1, as HTTP once had it (RFC 9110, 5.5), and never half characters."""
    return sent if sent.isascii() else _read(sent)


def _read(sent: str) -> str:
    try:
        sent.encode()
    except UnicodeEncodeError:
        return sent.encode("utf-8", "surrogateescape").decode("latin-1")
    return sent


def _options(body: Json, own: OwnFields | None, defaults: Defaults) -> Options:
    placement, strict = (own.get("usage_placement"), own.get("strict_params")) if own is not None else (None, None)
    usage = None
    if body.get("stream_options") is not None:
        usage = Field(body["stream_options"], "stream_options").get("include_usage")
    return _shared(
        usage is not None and usage.flag(),
        placement.one_of(("chunk", "finish")) == "finish" if placement else defaults.usage_on_finish,
        strict.flag() if strict else defaults.strict_params,
        _pause(own, "keepalive_after", defaults.keepalive_after),
        _pause(own, "keepalive_interval", defaults.keepalive_interval),
    )


def _pause(own: OwnFields | None, name: str, default: float) -> float:
    """Milliseconds in the request, 0 or false for never -> seconds."""
    found = own.get(name) if own is not None else None
    if found is None:
        return default
    if found.value is False or found.value == 0:
        return 0.0
    return found.number(SHORTEST[name], LONGEST) / 1000


@functools.lru_cache
def _shared(
    include_usage: bool, usage_on_finish: bool, strict_params: bool, keepalive_after: float, keepalive_interval: float
) -> Options:
    """One object for each combination; there are few, unless clients bring durations of their own."""
    return Options(include_usage, usage_on_finish, strict_params, keepalive_after, keepalive_interval)
