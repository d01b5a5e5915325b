"""Around the head, no cost per chunk: keep calls of some users in a region.

middleware:
  - examples.middleware.region:Region: {users: ["eu-*"], prefer: azure}
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from proxy.call import Call
from proxy.errors import Refused
from proxy.pipeline import Handler
from proxy.reply import Reply


class Region:
    """users: globs of identities (`identity.id` of the request). prefer: the only provider that may serve them."""

    def __init__(self, *, users: list[str], prefer: str) -> None:
        self._users = users
        self._prefer = prefer

    async def __call__(self, call: Call, next: Handler) -> Reply:
        if not any(fnmatchcase(call.identity or "", glob) for glob in self._users):
            return await next(call)
        targets = tuple(target for target in call.targets if target.provider.name == self._prefer)
        if not targets:
            raise Refused(f"model: must be one that '{self._prefer}' serves, for this user.", status=403, param="model")
        return await next(replace(call, targets=targets))
