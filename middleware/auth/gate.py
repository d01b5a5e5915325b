"""The middleware: who asks is settled from the headers alone, what they may ask for from the request, both before any upstream.

Cost: one SHA-256 and one look-up per request, nothing around the reply and nothing per chunk. The keys file is looked at once per
second by a task of its own, in a thread; a request only ever sees the finished keyring.
The one rule: what refuses says which kind of key is wanted, never which was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Annotated, Any

import structlog

from middleware.auth import models
from middleware.auth.callers import CallersKey, carrying, narrowed, presented
from middleware.auth.keys import VISIBLE, Key, Keyring
from middleware.auth.keysfile import KeysFile
from proxy.call import Call, Principal, Route
from proxy.errors import Refused
from proxy.own_fields import OwnFields
from proxy.pipeline import Handler, Sample, Surroundings
from proxy.reply import Reply

POLL_SECONDS = 1.0
ProviderName = Annotated[str, "provider"]
MESSAGES = {
    "missing_api_key": "A key is needed: send it as 'Authorization: Bearer <key>', or as x-api-key, api-key or superAgentKey.",
    "invalid_api_key": "The key is not one of this gateway's.",
    "expired_api_key": "The key has expired.",
    "origin_not_allowed": "This key only works from the web pages that it was made for, by the request's Origin.",
    "invalid_provider_key": "What Authorization carries beside superAgentKey is no key that could be passed on.",
}


class Auth:
    """Admits the clients whose keys it knows.

    keys: who may ask. keys_file: a YAML or JSON file with more of the same, re-read when it changes. pass_through: the providers
    that a caller's own key (`Authorization`, beside `superAgentKey`) may go to.
    """

    def __init__(
        self,
        *,
        keys: tuple[Key, ...] = (),
        keys_file: str | None = None,
        pass_through: tuple[ProviderName, ...] = (),
        _now: Callable[[], float] = time.time,
        _sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not keys and keys_file is None:
            raise ValueError("needs keys or keys_file; to serve without a key, leave auth out")
        self._log: Any = structlog.get_logger("penstock.auth")
        self._keys = keys
        self._file = KeysFile(keys_file, _now) if keys_file is not None else None
        self._pass_through = frozenset(pass_through)
        self._now, self._sleep = _now, _sleep
        self._route: Callable[[str], Route] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._fault: str | None = None
        self._refusals: Counter[str] = Counter()
        self._ring = Keyring([*keys, *self._first_read()])

    def _first_read(self) -> tuple[Key, ...]:
        """At start there are no earlier keys to go on with: a faulty file is a fault of the configuration."""
        if self._file is None:
            return ()
        try:
            return self._file.changed() or ()
        except ValueError as error:
            raise ValueError(f"keys_file: {error}") from None

    # Who asks

    def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """Who is calling. Raises Refused (401, 403), before the request's body is read."""
        key, callers = presented(headers)
        if not key:
            raise self._refused("missing_api_key")
        entry = self._ring.find(key)
        if entry is None:
            raise self._refused("invalid_api_key")
        if entry.expires <= self._now():
            raise self._refused("expired_api_key")
        if entry.origins is not None and headers.get("origin", "") not in entry.origins:
            raise self._refused("origin_not_allowed", 403, "permission_error")
        callers = self._callers(callers)
        return narrowed(entry.principal, callers) if callers else entry.principal

    def _callers(self, key: str) -> str:
        """The caller's provider key. A key of ours is none: clients that send theirs twice must not give it away."""
        if not key or self._ring.find(key) is not None:
            return ""
        if not VISIBLE.fullmatch(key):
            raise self._refused("invalid_provider_key")
        return key

    def _refused(self, code: str, status: int = 401, type: str = "authentication_error") -> Refused:
        self._refusals[code] += 1
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return Refused(MESSAGES[code], status=status, type=type, code=code, headers=headers)

    # What for

    def admit(self, call: Call, own: OwnFields) -> Call:
        """The call, its targets carrying the caller's own key where they may. Raises Refused (403) for a model not allowed."""
        try:
            models.check(call, own, self._route)
        except Refused as error:
            self._refusals[error.code] += 1
            raise
        if not self._pass_through:
            return call
        callers = self._callers(presented(own.headers)[1])
        return carrying(call, CallersKey(callers), self._pass_through) if callers else call

    def allows(self, principal: Principal, model: str) -> bool:
        """May this principal use the model (for listings)?"""
        return models.may_use(principal, model, self._route(model) if self._route else Route(None, ()))

    async def __call__(self, call: Call, next: Handler) -> Reply:
        # Other middleware may have added targets (`fallbacks` of the request) since this one admitted the call.
        if (callers := call.extension(CallersKey)) is not None:
            call = carrying(call, callers, self._pass_through)
        return await next(call)

    # The keys file

    def attach(self, surroundings: Surroundings) -> None:
        self._route = surroundings.route

    def adopt(self, previous: Auth) -> None:
        """The keys are those of the new config; what was refused stays counted."""
        self._refusals = previous._refusals

    async def start(self) -> None:
        if self._file is not None:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching

    async def _watch(self) -> None:
        while True:
            await self._sleep(POLL_SECONDS)
            await self.refresh()

    async def refresh(self) -> None:
        """Look at the keys file now. Where it is faulty the old keys stay, and the log says so once."""
        if self._file is None:
            return
        try:
            keys = await asyncio.to_thread(self._file.changed)
            if keys is None:
                return
            self._ring = Keyring([*self._keys, *keys])
        except Exception as error:
            self._broken(str(error) if isinstance(error, ValueError) else f"cannot be used ({type(error).__name__})")
        else:
            self._fault = None
            self._log.info("keys file read", path=self._path(), keys=len(keys))

    def _broken(self, fault: str) -> None:
        if fault != self._fault:
            self._log.warning("keys file is faulty, the earlier keys stay", path=self._path(), fault=fault)
        self._fault = fault

    def _path(self) -> str:
        return str(self._file.path) if self._file is not None else ""

    # What operators see

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = {"keys": len(self._ring)}
        if self._file is not None:
            found["keys_file"] = {"path": self._path(), "fault": self._fault}
        return found

    def samples(self) -> Iterator[Sample]:
        yield Sample("penstock_auth_keys", "gauge", "Keys that are accepted.", len(self._ring))
        if self._file is not None:
            text = "1 while the keys file is faulty and older keys are in use."
            yield Sample("penstock_auth_keys_file_faulty", "gauge", text, float(self._fault is not None))
        for code in (*MESSAGES, "model_not_allowed"):
            text = "Requests that auth refused, by reason."
            yield Sample("penstock_auth_refusals_total", "counter", text, self._refusals[code], {"reason": code})
