"""Errors that providers report, in the many shapes they have, as one `UpstreamError`.

Strategy: first find the words (`parse_error_body`: message, type, code, status from whatever JSON or text came), then decide
the status: an HTTP status is passed on as it is; an error inside a 200 takes its own 4xx/5xx code, else one by its type.
The one rule: what a provider says about *our* key never reaches the client (`presentable`), nor does the key or the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import orjson

from proxy.call import Provider
from proxy.errors import GatewayError, UpstreamError

Json = dict[str, Any]
MESSAGE_LIMIT = 2000


@dataclass(frozen=True, slots=True)
class ErrorWords:
    """What a provider's error says: message, its own type and code, and an HTTP status if it names one."""

    message: str = ""
    type: str | None = None
    code: str | None = None
    param: str | None = None
    status: int | None = None


def parse_error_body(body: bytes) -> ErrorWords:
    """Words out of an error body: JSON in any of the known shapes, or plain text; HTML says nothing."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body.decode("utf-8", "replace").strip()
        return ErrorWords() if text.startswith("<") else ErrorWords(text[:MESSAGE_LIMIT])
    return error_words(found)


def error_words(found: object) -> ErrorWords:
    """Words out of parsed JSON. Shapes: {"error": {...}}, {"error": "text"}, {"message"}, {"detail"}, [{"error": …}] (Gemini)."""
    if isinstance(found, list):
        return error_words(found[0]) if found else ErrorWords()
    if isinstance(found, str):
        return ErrorWords(found[:MESSAGE_LIMIT])
    if not isinstance(found, dict):
        return ErrorWords()
    inner = found.get("error")
    if isinstance(inner, dict):
        return _words(inner, found)
    if isinstance(inner, str):
        return _words({**found, "message": found.get("message") or inner}, found)
    return _words(found, found)


def _words(error: Json, outer: Json) -> ErrorWords:
    message = error.get("message") or error.get("detail") or error.get("msg") or error.get("title") or outer.get("message")
    if not isinstance(message, str):
        message = orjson.dumps(message).decode() if message else ""
    statuses = (error.get("code"), error.get("status"), error.get("status_code"), outer.get("raw_status_code"), outer.get("code"))
    status = next((code for code in map(_status, statuses) if code), None)
    code = error.get("code")
    if code is None or _status(code):
        code = error.get("status") if isinstance(error.get("status"), str) and not _status(error.get("status")) else None
    kind = error.get("type")
    param = error.get("param")
    return ErrorWords(
        message=message[:MESSAGE_LIMIT],
        type=kind if isinstance(kind, str) and kind else None,
        code=str(code) if code is not None else None,
        param=param if isinstance(param, str) else None,
        status=status,
    )


def _status(code: object) -> int | None:
    if isinstance(code, str) and code.isdecimal():
        code = int(code)
    return code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code <= 599 else None


def http_error(status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
    """The error that an HTTP status of 400 or more (or a redirect) stands for."""
    words = parse_error_body(body)
    return _error(status if 400 <= status <= 599 else 502, words, headers)


def in_band_error(words: ErrorWords) -> UpstreamError:
    """The error that came inside a 200: its own code, else 429, 503 or 502 by its type."""
    if words.status:
        return _error(words.status, words, {})
    said = f"{words.type} {words.code}".lower()
    for status, pattern in IN_BAND_STATUSES:
        if re.search(pattern, said):
            return _error(status, words, {})
    return _error(502, words, {})


IN_BAND_STATUSES = (
    (429, r"rate.?limit|quota|too.?many|resource_exhausted|throttl"),
    (503, r"overload|unavailable|capacity|insufficient_system"),
    (504, r"deadline|timeout|timed.?out"),
)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
    529: "overloaded_error",
}


def _error(status: int, words: ErrorWords, headers: Mapping[str, str]) -> UpstreamError:
    passed = {name: headers[name] for name in ("retry-after", "retry-after-ms") if name in headers}
    error = UpstreamError(
        words.message or f"The provider answered with status {status}.",
        status=status,
        type=words.type or TYPES.get(status, "upstream_error"),
        code=words.code or "upstream_error",
        param=words.param,
        headers=passed,
    )
    error.native_status = status
    return error


def presentable(error: GatewayError, provider: Provider) -> GatewayError:
    """The error as a client may see it: 401 and 403 are about the gateway's own key, so the client gets 502 `upstream_auth` and
    none of the provider's words; everywhere else the provider's key and host are taken out of the words."""
    if isinstance(error, UpstreamError) and error.status in (401, 403) and not provider.callers_key:
        message = f"The provider '{provider.name}' refused the gateway's credentials."
        hidden = UpstreamError(message, status=502, type="upstream_error", code="upstream_auth")
        hidden.native_status = error.status
        return hidden
    secrets = _secrets(provider)
    error.message = _without(secrets, error.message)
    error.type, error.code = _without(secrets, error.type), _without(secrets, error.code)
    error.param = error.param and _without(secrets, error.param)
    return error


@lru_cache(maxsize=256)
def _secrets(provider: Provider) -> tuple[tuple[re.Pattern[str], str], ...]:
    """(what must not be said, what is said instead): the key (a placeholder like "none" is none), the host in all spellings."""
    found = [(provider.api_key, "***")] if provider.api_key and len(provider.api_key) >= 8 else []
    url = urlsplit(provider.base_url)
    if url.hostname:
        found += [(f"{url.scheme}://{url.netloc}", provider.name), (url.netloc, provider.name), (url.hostname, provider.name)]
    return tuple(
        (re.compile(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", re.IGNORECASE), stand_in)
        for secret, stand_in in found
    )


def _without(secrets: tuple[tuple[re.Pattern[str], str], ...], text: str) -> str:
    for secret, stand_in in secrets:
        text = secret.sub(stand_in, text)
    return text
