"""The keys that a request carries: the client's own for the gateway, and perhaps one of the caller's for a provider.

Strategy: `superAgentKey` is the client's key, and then `Authorization` may carry a provider's; otherwise the client's key is the
first of `Authorization: Bearer`, `x-api-key` and `api-key`.
The one rule: a caller's key is put on the targets of the providers that the operator named, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from middleware.auth.keys import digest
from proxy.call import Call, Principal, Target

Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CallersKey:
    """The caller's own provider key, in `call.extensions`."""

    key: str = field(repr=False)


def presented(headers: Headers) -> tuple[str, str]:
    """(the client's key, the caller's provider key), each "" where there is none. headers: whatever the case of their names."""
    bearer = _bearer(headers.get("authorization", ""))
    if own := headers.get("superagentkey", "").strip():
        return own, bearer
    return bearer or headers.get("x-api-key", "").strip() or headers.get("api-key", "").strip(), ""


def _bearer(value: str) -> str:
    """RFC 9110, 11.1: the scheme's case does not count."""
    scheme, _, key = value.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def narrowed(principal: Principal, key: str) -> Principal:
    """The principal with a scope that the caller's key is part of."""
    return replace(principal, scope=sha256(principal.scope.encode() + b"\0" + digest(key)).hexdigest()[:32])


def carrying(call: Call, key: CallersKey, providers: Collection[str]) -> Call:
    """The call with the caller's key on every target of these providers; once more changes nothing."""
    targets = tuple(_keyed(target, key.key, providers) for target in call.targets)
    route = replace(call.route, targets=tuple(_keyed(target, key.key, providers) for target in call.route.targets))
    return replace(call, targets=targets, route=route, extensions={**call.extensions, CallersKey: key})


def _keyed(target: Target, key: str, providers: Collection[str]) -> Target:
    provider = target.provider
    if provider.name not in providers or provider.callers_key or not provider.base_url:
        return target  # without a base_url (its variable is unset) no key helps
    return replace(target, provider=replace(provider, api_key=key, callers_key=True, missing=None, further_keys=()))
