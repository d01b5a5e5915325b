"""Everything that can end a call early, as exceptions that already know what the client will be told.

Strategy: an error is built where the fault is seen, with its HTTP status, its words in the OpenAI envelope and the outcome
that metrics and logs will name. Before the first chunk it becomes an HTTP response, after it an error chunk.
The one rule: a message never carries a key, a provider's URL, or a traceback.

Envelope: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

Json = dict[str, Any]


class Outcome(StrEnum):
    """The one way a call ended; named by the relay, read by metrics and logs."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    FILTERED = "filtered"
    CONTINUED = "continued"
    CLIENT_GONE = "client_gone"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_CUT = "upstream_cut"
    MALFORMED = "malformed"
    TIMEOUT_CONNECT = "timeout_connect"
    TIMEOUT_CALL = "timeout_call"
    TIMEOUT_FIRST_CHUNK = "timeout_first_chunk"
    TIMEOUT_IDLE = "timeout_idle"
    TIMEOUT_TOTAL = "timeout_total"
    REFUSED = "refused"
    LIMITED = "limited"
    BLOCKED = "blocked"
    CANCELLED = "cancelled"
    DRAINING = "draining"
    GATEWAY_ERROR = "gateway_error"


# The client got a whole answer, from one provider or over a seam from several.
SUCCESSES = frozenset({Outcome.COMPLETED, Outcome.CONTINUED})

# The status that logs and metrics give an end that has no error of its own; 499 is nginx's word for a client that left.
STATUSES = {
    Outcome.COMPLETED: 200,
    Outcome.TRUNCATED: 200,
    Outcome.FILTERED: 200,
    Outcome.CONTINUED: 200,
    Outcome.CLIENT_GONE: 499,
    Outcome.DRAINING: 503,
    Outcome.TIMEOUT_TOTAL: 504,
}


def why_cancelled(error: BaseException) -> Outcome:
    """Whoever cancels a call may say why, with an outcome as the cancellation's message; without one its client has left."""
    return next((found for found in error.args if isinstance(found, Outcome)), Outcome.CLIENT_GONE)


class GatewayError(Exception):
    """A call that ends without its reply.

    status: the HTTP status for the client, as long as nothing was sent.
    type, code, param: the fields of the OpenAI error envelope beside `message`.
    headers: response headers that belong to the error (`Retry-After`, `Allow`).
    tries: the attempts (`proxy.reply.Try`) that ended in it, where there was more than none.
    """

    status = 500
    type = "gateway_error"
    code = "gateway_error"
    outcome = Outcome.GATEWAY_ERROR

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.type = type or self.type
        self.code = code or self.code
        self.param = param
        self.headers: Mapping[str, str] = headers or {}
        self.tries: tuple[Any, ...] = ()

    def again(self) -> GatewayError:
        """The same error as an object of its own: raised for many, a single one would collect all their tracebacks."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin

    def envelope(self) -> Json:
        """`{"message", "type", "param", "code"}`, what stands under `error` in a body or a chunk."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class Refused(GatewayError):
    """The request never reached an upstream: it is malformed, unknown, too large or not allowed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    outcome = Outcome.REFUSED


class Unconfigured(GatewayError):
    """A provider that is in the config without its key: 503 that names the variable to set."""

    status = 503
    type = "service_unavailable"
    code = "provider_not_configured"
    outcome = Outcome.REFUSED


class Overloaded(GatewayError):
    """The gateway has as much to do as it may have."""

    status = 503
    type = "service_unavailable"
    code = "overloaded"
    outcome = Outcome.REFUSED


class Draining(GatewayError):
    """The gateway is shutting down."""

    status = 503
    type = "service_unavailable"
    code = "draining"
    outcome = Outcome.DRAINING


class UpstreamError(GatewayError):
    """The provider answered, and its answer is an error (an HTTP status, or an error inside a 200).

    native_status: the provider's own HTTP status where it differs from what the client gets.
    """

    status = 502
    type = "upstream_error"
    code = "upstream_error"
    outcome = Outcome.UPSTREAM_ERROR

    native_status: int | None = None


class UpstreamUnreachable(UpstreamError):
    """No connection: refused, no such host, TLS failure."""

    code = "upstream_unreachable"


class UpstreamCut(GatewayError):
    """The provider's bytes stopped before the format's own end."""

    status = 502
    type = "upstream_error"
    code = "upstream_cut"
    outcome = Outcome.UPSTREAM_CUT


class Malformed(GatewayError):
    """The provider broke its own format: no JSON where JSON belongs, HTML, an event without end."""

    status = 502
    type = "upstream_error"
    code = "upstream_malformed"
    outcome = Outcome.MALFORMED


class UpstreamTimeout(GatewayError):
    """A limit on the upstream's silence ran out; `code` and outcome say which.

    which: connect | call | first_chunk | idle | total. seconds: the limit that ran out.
    """

    status = 504
    type = "timeout_error"

    def __init__(self, which: str, seconds: float) -> None:
        super().__init__(TIMEOUT_MESSAGES[which].format(seconds=f"{seconds:g}"), code=f"timeout_{which}")
        self.which = which
        self.outcome = Outcome(f"timeout_{which}")


TIMEOUT_MESSAGES = {
    "connect": "The provider could not be connected to within {seconds} s.",
    "call": "The provider's reply took longer than the {seconds} s of call_timeout.",
    "first_chunk": "The provider sent no first chunk within {seconds} s.",
    "idle": "The provider went silent for {seconds} s in the middle of the stream.",
    "total": "The request took longer than its {seconds} s in total.",
}
