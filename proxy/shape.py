"""The shape of config.yaml: what may be written, in which bounds. No file, no environment, no checks across.

Strategy: one frozen model per section, unknown keys forbidden; what marks and bounds mean is in `settings`.
The one rule: validators speak to the operator and never repeat a value; it may be a secret in the wrong place.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

from proxy.origins import ANY
from proxy.origins import check as check_origin
from proxy.settings import MARKS, Bounds, no_truth
from proxy.units import Between


class Section(BaseModel):
    """What every section has in common: nothing unknown, nothing changed later, no value in an error's text."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _possible(workers: int) -> int:
    if workers > 1 and not hasattr(os, "fork"):
        raise ValueError("must be 1: this system cannot fork processes")
    return workers


def _no_brackets(host: str) -> str:
    """`[::1]`, as it stands in a URL, is the address ::1."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _address(written: str) -> str:
    host, colon, port = written.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not _no_brackets(host) or (":" in host and not bracketed):
        raise ValueError("must be host:port, such as 127.0.0.1:9090 or [::1]:9090")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError("must end with a port from 0 to 65535")
    return written


def _off(written: Any) -> Any:
    return 0 if written in ("off", False) else written


def _pause(seconds: float) -> float:
    if seconds and not 0.01 <= seconds <= 3600:
        raise ValueError("must be off, or from 0.01 to 3600")
    return seconds


Port = Annotated[int, Bounds(Between(0, 65535))]
LongWait = Annotated[float, *MARKS["seconds"], Bounds(Between(0, 86400))]
ShortWait = Annotated[float, *MARKS["seconds"], Bounds(Between(0.001, 3600))]
# Behind the others, so that it is asked first; shorter ones would be a busy loop rather than a pause.
Pause = Annotated[float, *MARKS["seconds"], AfterValidator(_pause), BeforeValidator(_off)]
Count = Annotated[int, Bounds(Between(0, 10**6))]
BodySize = Annotated[int, *MARKS["bytes"], Bounds(Between(1024, 2**30))]


def _cors_origin(written: str) -> str:
    if written != ANY:
        check_origin(written)
    return written


class CorsRow(Section):
    """Which pages of other origins may call; the fields are those of `proxy.cors.Policy`. No origins: none may."""

    origins: tuple[Annotated[str, AfterValidator(_cors_origin)], ...]
    max_age: Annotated[float, *MARKS["seconds"], Bounds(Between(0, 86400))] = 7200.0
    headers: tuple[Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")], ...] = ()
    credentials: bool = False

    @field_validator("credentials")
    @classmethod
    def _by_name(cls, credentials: bool, info: ValidationInfo) -> bool:
        if credentials and ANY in info.data.get("origins", ()):
            raise ValueError("cookies are only for origins that are named; browsers refuse them with '*'")
        return credentials


class Server(Section):
    """Where and how the gateway listens. Durations in seconds, sizes in bytes; port 0 is any free port.

    workers: processes that share the port. watch: reload the file when it changes, not only at SIGHUP. admin_listen: `host:port`
    of a second address that serves health, metrics and admin endpoints, without auth.
    allow_anonymous: somebody beyond this machine may use an address that has no auth.
    keepalive_after: without a first chunk for so long, a stream begins all the same. keepalive_interval: after so long a silence
    it says a comment. max_streams: calls that are open. max_waiting: those among them without an answer yet. 0: off.
    cors: for pages of other origins.
    """

    host: Annotated[str, Field(min_length=1), AfterValidator(_no_brackets)] = "127.0.0.1"
    port: Port = 8080
    workers: Annotated[int, Bounds(Between(1, 64)), AfterValidator(_possible)] = 1
    watch: bool = True
    max_body: BodySize = 32 * 2**20
    body_timeout: ShortWait = 30.0
    drain_delay: LongWait = 0.0
    drain_timeout: LongWait = 30.0
    write_timeout: ShortWait = 60.0
    keepalive_after: Pause = 0.0
    keepalive_interval: Pause = 15.0
    max_streams: Count = 20_000
    max_waiting: Count = 0
    max_depth: Annotated[int, Bounds(Between(4, 240))] = 64
    cors: CorsRow | None = None
    admin_listen: Annotated[str, AfterValidator(_address)] | None = None
    allow_anonymous: bool = False
    strict_params: bool = False
    usage_placement: Literal["chunk", "finish"] = "chunk"

    @property
    def admin_address(self) -> tuple[str, int] | None:
        """Host and port of `admin_listen`; None where it is off."""
        return address(self.admin_listen) if self.admin_listen is not None else None


def address(written: str) -> tuple[str, int]:
    """`[::1]:9090` -> ("::1", 9090)."""
    host, _, port = written.rpartition(":")
    return _no_brackets(host), int(port)


def _http_url(url: str) -> str:
    """An http(s) base URL without credentials, query or fragment; the slash at its end goes."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is no URL") from None
    if parts.scheme not in ("http", "https") or not host or any(character.isspace() for character in url):
        raise ValueError("must be an http:// or https:// URL")
    if "@" in parts.netloc:
        raise ValueError("must not carry credentials; put the key under api_key")
    if "?" in url or "#" in url:
        raise ValueError("must end with a path; put parameters under query")
    return url.rstrip("/")


def _header_value(value: str) -> str:
    # RFC 9110, 5.5: a line break in a value would start another header.
    if any(character in value for character in "\r\n\0"):
        raise ValueError("must not contain line breaks")
    return value


def _key_value(key: SecretStr) -> SecretStr:
    _header_value(key.get_secret_value())
    return key


# RFC 9110, 5.6.2: a header's name is a token.
HeaderName = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]
HeaderValue = Annotated[str, AfterValidator(_header_value)]
ProviderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
KeyValue = Annotated[SecretStr, AfterValidator(_key_value)]


class ProviderRow(Section):
    """One row of `providers:`; the fields are those of `proxy.call.Provider` that an operator sets."""

    api: Literal["openai", "anthropic", "gemini", "cohere", "demo"]
    base_url: HttpUrl | None = None
    api_key: KeyValue | Annotated[list[KeyValue], Field(min_length=1)] | None = None
    key_header: HeaderName | None = None
    query: dict[str, str] = {}
    headers: dict[HeaderName, HeaderValue] = {}
    usage: Literal["stream_options", "always", "none"] = "stream_options"
    reasoning: Literal["reasoning_content", "reasoning", "reasoning_details", "thinking_parts", "none"] = "none"
    completions: list[str] = []
    default_max_tokens: Annotated[int, Bounds(Between(1, 10_000_000))] = 4096
    models: list[str] = []


APIS: tuple[str, ...] = get_args(ProviderRow.model_fields["api"].annotation)


def long_form(written: Any) -> Any:
    """`fast: openai/gpt-4o-mini` and `fast: [a/x, b/y]` are short for `fast: {targets: [...]}`."""
    if isinstance(written, str):
        return {"targets": [written]}
    return {"targets": written} if isinstance(written, list) else written


def _weight(weight: float) -> float:
    if not 0 < weight <= 1_000_000:
        raise ValueError("must be above 0 and at most 1000000")
    return weight


Dollars = Annotated[float, Bounds(Between(0, 1_000_000))]


class PriceRow(Section):
    """US dollars per million tokens."""

    input: Dollars
    output: Dollars


class TargetRow(Section):
    """One target of a route. weight: its share for `strategy: weighted`; prices: instead of the table's, for `cheapest`."""

    target: str
    weight: Annotated[float, BeforeValidator(no_truth), AfterValidator(_weight)] = 1.0
    prices: PriceRow | None = None


def _target_form(written: Any) -> Any:
    return {"target": written} if isinstance(written, str) else written


TargetForms = Annotated[TargetRow, BeforeValidator(_target_form, json_schema_input_type=TargetRow | str)]


class RouteRow(Section):
    """One route of `models:`. strategy: in which order its targets are tried."""

    targets: Annotated[list[TargetForms], Field(min_length=1)]
    strategy: Literal["fallback", "weighted", "least_latency", "cheapest"] = "fallback"


RouteForms = Annotated[RouteRow, BeforeValidator(long_form, json_schema_input_type=RouteRow | str | list[TargetForms])]


def _store_url(written: SecretStr) -> SecretStr:
    try:
        parts = urlsplit(written.get_secret_value())
        _ = parts.port
    except ValueError:
        raise ValueError("is no URL") from None
    if parts.scheme not in ("postgresql", "postgres") or not (parts.hostname or parts.query or parts.path.strip("/")):
        raise ValueError("must be a URL such as postgresql://user:password@host:5432/database; without one the store is a file")
    return written


class StoreRow(Section):
    """What outlives a request. url: of PostgreSQL; without one it is SQLite, a file under `data_dir`. timeout: of what requests
    wait for; background_timeout: of the rest, both in seconds. connections: to PostgreSQL, of each worker.
    """

    url: Annotated[SecretStr, AfterValidator(_store_url)] | None = None
    timeout: ShortWait = 0.5
    background_timeout: ShortWait = 10.0
    connections: Annotated[int, Bounds(Between(1, 100))] = 10


def _store_form(written: Any) -> Any:
    return {"url": written} if isinstance(written, str) else written


StoreForms = Annotated[StoreRow, BeforeValidator(_store_form, json_schema_input_type=StoreRow | str)]


class File(Section):
    """The whole of config.yaml. data_dir: a folder of the gateway's own, made when something is to be kept."""

    server: Server = Server()
    default_provider: str | None = None
    providers: dict[ProviderName, ProviderRow] = {}
    models: dict[str, RouteForms] = {}
    data_dir: Annotated[str, Field(min_length=1)] = "data"
    store: StoreForms = StoreRow()
    middleware: list[Any] = []
