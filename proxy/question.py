"""What makes two calls the same question, whose answer they may share: one hash over everything that can change the answer.

Strategy: the request as it would go upstream, without the few fields that cannot change the answer, as JSON with sorted keys,
behind the kind of call, the model as the client spelled it, the further models that may answer, and the scope; hashed, so that a
key shows nothing of a prompt.
The one rule: in doubt two calls differ. A missed hit costs a request, a wrong one is a wrong answer; so `1` is not `1.0`, `""` is
not null, and null is not an absent field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from proxy.call import Call
from proxy.own_fields import OwnFields

# Raised when the canonical form changes, so that a shared store's older entries are not found.
FORM = 1

# How the answer is delivered, and labels. `user` is not among them: some servers remember by it.
SILENT = frozenset({"stream", "stream_options", "metadata"})
# Fields that change who answers, and by which rules an answer passes. They are read elsewhere; here they only tell questions
# apart.
ROUTING = ("fallbacks", "models", "load_balancer", "guardrails", "plugins")


@dataclass(frozen=True, slots=True)
class Cacheable:
    """Left on a call that may be answered by what another call was answered. read: also by an answer that is there already.

    routing: the request's own words about who may answer, part of the question.
    """

    read: bool
    routing: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Keyed:
    """Left on a call whose key is known already: for a prompt of 100 KB it takes 150 us to make. It holds for the call as it was,
    and for the same routing and scope."""

    call: Call
    routing: Mapping[str, Any]
    scope: str | None
    key: str

    def holds(self, call: Call, routing: Mapping[str, Any], scope: str | None) -> bool:
        was = self.call
        same = was.request is call.request and was.model is call.model and was.kind is call.kind and was.options is call.options
        return same and self.scope == scope and self.routing == routing


def routing_of(own: OwnFields) -> Mapping[str, Any]:
    """What a request itself says about who may answer."""
    return {name: found.value for name in ROUTING if (found := own.get(name)) is not None}


def directives(header: str) -> set[str]:
    """The names in a Cache-Control header, in lower case (RFC 9111, 5.2)."""
    return {part.partition("=")[0].strip().lower() for part in header.split(",")} if header else set()


def scope_of(call: Call, shared: bool) -> str | None:
    """Whose answer it is; None: everybody's. What a caller's own provider key paid for is that caller's alone, also where
    answers are shared."""
    if shared and not any(target.provider.callers_key for target in call.targets):
        return None
    return call.principal.scope


def question_key(call: Call, routing: Mapping[str, Any], scope: str | None) -> str:
    """64 hex digits. routing: what the request itself said about who may answer; scope: whose answer it is, None for all."""
    known = call.extension(Keyed)
    if known is not None and known.holds(call, routing, scope):
        return known.key
    asked = {name: value for name, value in call.request.items() if name not in SILENT}
    # strict_params refuses what is otherwise dropped: an answer to the one is none to the other.
    question = [FORM, scope, call.kind, call.model, call.options.strict_params, routing, asked]
    return blake2b(orjson.dumps(question, option=orjson.OPT_SORT_KEYS), digest_size=32).hexdigest()
