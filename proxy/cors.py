"""Which pages of other origins may call the gateway and read its answers, and how browsers are told (CORS).

Strategy: what an answer says depends on the request's Origin alone, so it is one text that the delivery puts into the head,
whatever the answer is: a reply, a stream, any refusal. A preflight is answered from its head, before auth, since it has no key.
The one rule: an origin is allowed by the operator's list, never because it asked; what is not allowed is told nothing.

Protocol: https://fetch.spec.whatwg.org/#http-cors-protocol
Private networks: https://wicg.github.io/private-network-access/
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from proxy.delivery import Response
from proxy.errors import Refused
from proxy.origins import ANY, Origins

# What clients of such gateways send; a browser may send these after one preflight. Lower case, as browsers ask.
SENT = (
    "authorization", "content-type", "accept", "x-api-key", "api-key", "superagentkey", "last-event-id", "cache-control",
    "idempotency-key", "x-request-id", "user-agent",
)  # fmt: skip
# And these by how they begin: the official SDKs, other gateways' clients, our own.
SENT_PREFIXES = ("x-penstock-", "x-orq-", "x-stainless-", "openai-", "anthropic-")
# What a page that sends cookies may read; to all others everything is shown (`*`), also what one's own middleware adds.
SHOWN = (
    "X-Request-Id", "X-Cache", "Age", "X-Stream-Id", "X-Penstock-Target", "X-Penstock-Attempts", "X-Penstock-Dropped",
    "Server-Timing", "Retry-After", "x-should-retry", "Allow", "WWW-Authenticate",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens", "concurrent")),
)  # fmt: skip
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,64}", re.ASCII)
MOST_HEADERS = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows. origins: see `Origins`. max_age: how long browsers keep a preflight's answer, in seconds.
    headers: of requests, beside those that clients are known to send; `*` allows all. credentials: cookies, for what stands
    before the gateway; never with `*`.
    """

    origins: tuple[str, ...] = ()
    max_age: float = 7200.0
    headers: tuple[str, ...] = ()
    credentials: bool = False


class Cors:
    """A policy as it is applied. One per config."""

    __slots__ = ("_cookies", "_everybody", "_extra", "_max_age", "_origins", "_shown")

    def __init__(self, policy: Policy) -> None:
        self._origins = Origins(policy.origins)
        self._extra = frozenset(name.lower() for name in policy.headers)
        self._max_age = str(int(policy.max_age))
        self._cookies = policy.credentials
        cookies = "Access-Control-Allow-Credentials: true\r\n" if policy.credentials else ""
        self._shown = f"{cookies}Access-Control-Expose-Headers: {', '.join(SHOWN) if policy.credentials else '*'}\r\n"
        self._everybody = f"Access-Control-Allow-Origin: *\r\n{self._shown}" if self._origins.everybody else ""

    def lines(self, origin: str) -> str:
        """Header lines for an answer to a request from this origin, "" for one without. With `*` an answer is the same for all;
        else caches must keep those of different origins apart, also those without."""
        if self._everybody:
            return self._everybody
        if origin in self._origins:
            return f"Vary: Origin\r\nAccess-Control-Allow-Origin: {origin}\r\n{self._shown}"
        return "Vary: Origin\r\n"

    def allows(self, origin: str) -> bool:
        return bool(self._everybody) or origin in self._origins

    def check(self, origin: str) -> None:
        """Raises Refused (403) for a page that may not call at all."""
        if origin and not self.allows(origin):
            message = "Pages of this origin may not call this gateway; server.cors.origins says which may."
            raise Refused(message, status=403, code="origin_not_allowed", type="permission_error")

    def preflight(self, headers: Mapping[str, str], methods: Iterable[str]) -> Response:
        """The answer to a browser that asks before it calls. methods: those of the path. Raises Refused (403)."""
        origin = headers.get("origin", "")
        self.check(origin)
        asked = _names(headers.get("access-control-request-headers", ""))
        found = {
            "Server": "penstock",
            "Access-Control-Allow-Methods": ", ".join(methods),
            # All the usual ones, too: browsers remember them, and need not ask again for the next request.
            "Access-Control-Allow-Headers": ", ".join((*SENT, *(name for name in asked if self._takes(name)))),
            "Access-Control-Max-Age": self._max_age,
        }
        # Into a private network only for origins that the operator has named: `*` was hardly meant to reach there.
        if headers.get("access-control-request-private-network") == "true" and origin in self._origins:
            found["Access-Control-Allow-Private-Network"] = "true"
        return Response(204, b"", found)

    def _takes(self, name: str) -> bool:
        if name in SENT:
            return False  # is said anyway
        return name.startswith(SENT_PREFIXES) or name in self._extra or ANY in self._extra


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    """A browser's question, and not anybody's OPTIONS: https://fetch.spec.whatwg.org/#cors-preflight-request"""
    return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _names(asked: str) -> list[str]:
    """Header names out of a list of them, without what is none."""
    names = (name.strip().lower() for name in asked.split(",", MOST_HEADERS)[:MOST_HEADERS])
    return [name for name in names if TOKEN.fullmatch(name)]
