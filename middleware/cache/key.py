"""What makes two calls the same question: one hash over everything that can change the answer.

Strategy: the request as it would go upstream, without the few fields that cannot change the answer, as JSON with sorted keys,
behind the kind of call, the model as the client spelled it, the further models that may answer, and the scope; hashed, so that a
key shows nothing of a prompt.
The one rule: in doubt two calls differ. A missed hit costs a request, a wrong one is a wrong answer; so `1` is not `1.0`, `""` is
not null, and null is not an absent field.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import orjson

from proxy.call import Call

# Raised when the canonical form changes, so that a shared store's older entries are not found.
FORM = 1

# How the answer is delivered, and labels. `user` is not among them: some servers remember by it.
SILENT = frozenset({"stream", "stream_options", "metadata"})


def cache_key(call: Call, routing: Mapping[str, Any], scope: str | None) -> str:
    """64 hex digits. routing: what the request itself said about who may answer; scope: whose entry it is, None for all."""
    asked = {name: value for name, value in call.request.items() if name not in SILENT}
    # strict_params refuses what is otherwise dropped: an answer to the one is none to the other.
    question = [FORM, scope, call.kind, call.model, call.options.strict_params, routing, asked]
    return blake2b(orjson.dumps(question, option=orjson.OPT_SORT_KEYS), digest_size=32).hexdigest()
