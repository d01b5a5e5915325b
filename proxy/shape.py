"""The shape of config.yaml: what may be written, in which bounds. No file, no environment, no checks across.

Strategy: one frozen model per section, unknown keys forbidden; numbers carry the marks of `proxy.units`, which `setting`
turns into validators, for these models and for the constructor keywords of middleware alike. A dataclass among those is checked
as a section of its own, field by field, before it is made.
The one rule: validators speak to the operator and never repeat a value; it may be a secret in the wrong place.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import os
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from proxy import units
from proxy.origins import ANY
from proxy.origins import check as check_origin
from proxy.routing import well_formed
from proxy.units import Between, ByteSize, Seconds
from proxy.wording import did_you_mean

DURATION_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}], "description": units.DURATION_WORDS}
SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}], "description": units.SIZE_WORDS}


def _known_provider(name: str, info: ValidationInfo) -> str:
    providers = (info.context or {}).get("providers")
    if providers is not None and name not in providers:
        raise ValueError(f"there is no such provider{did_you_mean(name, providers)}")
    return name


def _known_target(name: str, info: ValidationInfo) -> str:
    provider, slash, _ = name.partition("/")
    if not slash or not well_formed(name):
        raise ValueError("must be provider/model")
    _known_provider(provider, info)
    return name


MARKS: dict[str, tuple[Any, ...]] = {
    "provider": (AfterValidator(_known_provider),),
    "target": (AfterValidator(_known_target),),
    "seconds": (BeforeValidator(units.seconds), WithJsonSchema(DURATION_SCHEMA)),
    "bytes": (BeforeValidator(units.byte_size), WithJsonSchema(SIZE_SCHEMA)),
}


def _no_truth(written: Any) -> Any:
    # Python takes True for 1.
    if isinstance(written, bool):
        raise ValueError("must be a number")
    return written


class _Bounds:
    """`units.Between` for pydantic: the check, and minimum and maximum in the JSON Schema of a plain number."""

    def __init__(self, between: Between) -> None:
        self.between = between

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        checked = core_schema.no_info_after_validator_function(self.check, handler(source))
        return core_schema.no_info_before_validator_function(_no_truth, checked)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = dict(handler(schema))
        if found.get("type") in ("integer", "number"):
            found |= {"minimum": self.between.low, "maximum": self.between.high}
        return found

    def check(self, value: Any) -> Any:
        self.between.check(value)
        return value


def setting(annotation: Any) -> Any:
    """The annotation with its marks replaced by validators, also inside unions, lists, mappings and dataclasses.

    Marks: those of `proxy.units`; "provider", the name of a row of `providers:`; "target", `provider/model` with such a name;
    anything with `check(value)`, which raises ValueError in words for the operator.
    """
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _section_of(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marks = [found for mark in annotation.__metadata__ for found in _validators(mark)]
        inner = setting(annotation.__origin__)
        return Annotated[(inner, *marks)] if marks else inner
    if origin in (Union, types.UnionType):
        return Union[tuple(setting(argument) for argument in arguments)]  # noqa: UP007 - made from a tuple
    if origin in (list, dict, tuple, collections.abc.Mapping, collections.abc.Sequence):
        return origin[tuple(argument if argument is ... else setting(argument) for argument in arguments)]
    return annotation


def _validators(mark: Any) -> tuple[Any, ...]:
    if isinstance(mark, Between):
        return (_Bounds(mark),)
    if callable(check := getattr(mark, "check", None)):
        return (AfterValidator(_checking(check)),)
    return MARKS.get(mark, ()) if isinstance(mark, str) else (mark,)


def _checking(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        check(value)
        return value

    return checked


def _section_of(made: type) -> Any:
    """The section that a dataclass's fields make up; what is checked becomes an instance, with its own defaults."""
    hints = get_type_hints(made, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(made):
        if field.init:
            optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            fields[field.name] = (setting(hints[field.name]), Field(default=None) if optional else Field())
    config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=(), title=made.__name__)
    # Named in full: the schema of config.yaml has the sections of all middleware in one table.
    name = f"{made.__module__}.{made.__qualname__}".replace(".", "_")
    section = create_model(name, __config__=config, __doc__=inspect.getdoc(made), **fields)
    return Annotated[section, AfterValidator(lambda found: made(**given(found)))]


def given(options: BaseModel) -> dict[str, Any]:
    """Only what the file gives; for the rest whoever takes it has its own defaults."""
    return {name: getattr(options, name) for name in options.model_fields_set}


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


Port = Annotated[int, _Bounds(Between(0, 65535))]
LongWait = Annotated[float, *MARKS["seconds"], _Bounds(Between(0, 86400))]
ShortWait = Annotated[float, *MARKS["seconds"], _Bounds(Between(0.001, 3600))]
# Behind the others, so that it is asked first; shorter ones would be a busy loop rather than a pause.
Pause = Annotated[float, *MARKS["seconds"], AfterValidator(_pause), BeforeValidator(_off)]
Count = Annotated[int, _Bounds(Between(0, 10**6))]
BodySize = Annotated[int, *MARKS["bytes"], _Bounds(Between(1024, 2**30))]


def _cors_origin(written: str) -> str:
    if written != ANY:
        check_origin(written)
    return written


class CorsRow(Section):
    """Which pages of other origins may call; the fields are those of `proxy.cors.Policy`. No origins: none may."""

    origins: tuple[Annotated[str, AfterValidator(_cors_origin)], ...]
    max_age: Annotated[float, *MARKS["seconds"], _Bounds(Between(0, 86400))] = 7200.0
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
    workers: Annotated[int, _Bounds(Between(1, 64)), AfterValidator(_possible)] = 1
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
    max_depth: Annotated[int, _Bounds(Between(4, 240))] = 64
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
    default_max_tokens: Annotated[int, _Bounds(Between(1, 10_000_000))] = 4096
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


Dollars = Annotated[float, _Bounds(Between(0, 1_000_000))]


class PriceRow(Section):
    """US dollars per million tokens."""

    input: Dollars
    output: Dollars


class TargetRow(Section):
    """One target of a route. weight: its share for `strategy: weighted`; prices: instead of the table's, for `cheapest`."""

    target: str
    weight: Annotated[float, BeforeValidator(_no_truth), AfterValidator(_weight)] = 1.0
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
    connections: Annotated[int, _Bounds(Between(1, 100))] = 10


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


def options_model(name: str, factory: Callable[..., object]) -> type[BaseModel]:
    """The schema of a middleware's options: the keywords of its constructor and their annotations.

    Keywords that a file cannot carry (a clock, any callable) and those that begin with `_` are no options.
    Raises TypeError or NameError where the signature cannot be read.
    """
    source = factory.__init__ if inspect.isclass(factory) else factory
    hints = get_type_hints(source, include_extras=True)
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY) or parameter.name.startswith("_"):
            continue
        elif not _is_callable(hint := hints.get(parameter.name, Any)):
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (setting(hint), Field(default))
    config = ConfigDict(
        extra=extra, frozen=True, hide_input_in_errors=True, protected_namespaces=(), arbitrary_types_allowed=True
    )
    return create_model(name, __config__=config, __doc__=inspect.getdoc(factory), **fields)


def _is_callable(hint: Any) -> bool:
    return any(kind is collections.abc.Callable for form in (hint, *get_args(hint)) for kind in (form, get_origin(form)))


__all__ = [
    "APIS", "ByteSize", "File", "ProviderRow", "RouteRow", "Seconds", "Section", "Server", "StoreRow",
    "address", "given", "options_model", "setting",
]  # fmt: skip
