"""config.yaml: every fault at once by path and line, the environment filled in safely, secrets nowhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from middleware import TABLE
from proxy import units
from proxy.config import BASE_URLS, Config, ConfigError, json_schema, load, parse
from proxy.shape import APIS
from proxy.units import Between, ByteSize, Seconds

SECRET = "sk-very-secret-1234567890"  # also checked to be absent from errors
EXAMPLE = Path(__file__).parent.parent / "config.yaml"


class Cache:
    """Keeps replies."""

    def __init__(
        self,
        *,
        ttl: Annotated[Seconds, Between(1, 259200)] = 1800.0,
        max_bytes: ByteSize = 2**28,
        mode: Literal["opt_in", "opt_out"] = "opt_in",
        count: int = 1,
        total: Seconds | None = None,
        on_codes: list[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None: ...


class Timeout:
    def __init__(
        self,
        *,
        connect_timeout: Seconds = 10.0,
        call_timeout: Seconds = 600.0,
        first_chunk_timeout: Seconds = 300.0,
        idle_timeout: Seconds = 120.0,
    ) -> None: ...


def tracking(*, header: str = "X-Penstock-Name") -> None: ...


@dataclass(frozen=True)
class Even:
    """A mark of a middleware's own."""

    def check(self, value: int) -> None:
        if value % 2:
            raise ValueError("must be even")


@dataclass(frozen=True)
class Door:
    """An option of nested shape."""

    name: str
    code: str = field(repr=False)
    size: Annotated[int, Even()] = 2
    open_for: Seconds = 1.0
    limits: dict[str, Any] = field(default_factory=dict)


class Guard:
    def __init__(self, *, doors: tuple[Door, ...] = (), via: tuple[Annotated[str, "provider"], ...] = ()) -> None:
        if len({door.name for door in doors}) < len(doors):
            raise ValueError("two doors have one name")
        if any(door.code == "boom" for door in doors):
            raise RuntimeError(doors[0].code)
        self.doors, self.via = doors, via

    def authenticate(self, headers: Any) -> None: ...


def made_guard(*, code: str = "") -> Guard:
    """A factory does not show what it makes; what it made does."""
    return Guard()


KNOWN: dict[str, Any] = {"tracking": tracking, "timeout": Timeout, "cache": Cache, "guard": Guard, "made_guard": made_guard}


def parsed(text: str, environ: dict[str, str] | None = None, **overrides: object) -> Config:
    return parse(text, environ or {}, KNOWN, overrides=overrides)


def faults(text: str, environ: dict[str, str] | None = None, **overrides: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parsed(text, environ, **overrides)
    return caught.value.faults


def one(text: str, environ: dict[str, str] | None = None) -> str:
    (fault,) = faults(text, environ)
    return fault


# Faults


def test_every_fault_comes_out_at_once_in_the_order_of_the_file() -> None:
    text = """\
server:
  port: 70000
  max_bodi: 1MiB
  workers: 400
  drain_timeout: soon
default_provider: opnai
providers:
  openai: {api: openai, api_key: k}
  claude: {api: antropic, usage: sometimes}
  bad name: {api: demo}
  gemini: {api: gemini}
models:
  fast: {targets: [opnai/x, nothing], strategy: random}
  openai/gpt: openai/gpt-4o
  none: {}
  empty: []
middleware:
  - tracking
  - cahce
  - cache: {ttl: 0, mode: opt_up, tll: 3}
  - cache:
      max_bytes: many
      on_codes: [429, x]
  - {tracking: {}, cache: {}}
  - tracking: 5
extra: 1
"""
    assert faults(text) == [
        "server.port (line 2): must be from 0 to 65535",
        "server.max_bodi (line 3): unknown key; did you mean 'max_body'?",
        "server.workers (line 4): must be from 1 to 64",
        "server.drain_timeout (line 5): must be a duration such as 500ms, 30s, 5m, 1h or a plain number of seconds",
        "default_provider (line 6): there is no provider 'opnai'; did you mean 'openai'?",
        "providers.openai.base_url (line 8): is required for api: openai",
        "providers.claude.api (line 9): must be 'openai', 'anthropic', 'gemini', 'cohere' or 'demo'",
        "providers.claude.usage (line 9): must be 'stream_options', 'always' or 'none'",
        'providers["bad name"] (line 10): has a character that is not allowed in a name',
        "providers.gemini.api_key (line 11): is required for https://generativelanguage.googleapis.com/v1beta",
        "models.fast.strategy (line 13): must be 'fallback', 'weighted', 'least_latency' or 'cheapest'",
        "models.fast.targets[0] (line 13): there is no provider 'opnai'; did you mean 'openai'?",
        "models.fast.targets[1] (line 13): must be provider/model",
        "models[\"openai/gpt\"] (line 14): is taken: 'openai/…' names a model of the provider 'openai'",
        "models.none.targets (line 15): is required",
        "models.empty (line 16): must not be empty",
        "middleware[1] (line 19): there is no middleware 'cahce'; did you mean 'cache'?; one's own is written module:Name",
        "middleware[2].cache.mode (line 20): must be 'opt_in' or 'opt_out'",
        "middleware[2].cache.tll (line 20): unknown key; did you mean 'ttl'?",
        "middleware[2].cache.ttl (line 20): must be from 1 to 259200",
        "middleware[3].cache.max_bytes (line 22): must be a size such as 64KiB, 32MiB, 10MB or a plain number of bytes",
        "middleware[3].cache.on_codes[1] (line 23): must be a whole number",
        "middleware[4] (line 24): must be a name, or one name with its options: {name: {option: value}}",
        "middleware[5].tracking (line 25): must be a mapping of options",
        "extra (line 26): unknown key; known: server, default_provider, providers, models, data_dir, store, middleware",
    ]


@pytest.mark.parametrize(("written", "seconds"), [("off", 0), ("0", 0), ("false", 0), ("250ms", 0.25), ("1h", 3600)])
def test_a_pause_may_be_off(written: str, seconds: float) -> None:
    server = parsed(f"server: {{keepalive_after: {written}, keepalive_interval: {written}}}").server
    assert (server.keepalive_after, server.keepalive_interval) == (seconds, seconds)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("server: {keepalive_after: 5ms}", "server.keepalive_after (line 1): must be off, or from 0.01 to 3600"),
        ("server: {keepalive_interval: 2h}", "server.keepalive_interval (line 1): must be off, or from 0.01 to 3600"),
        ("server: {max_streams: -1}", "server.max_streams (line 1): must be from 0 to 1000000"),
        ("server: {max_waiting: true}", "server.max_waiting (line 1): must be a number"),
        ("server: [1]", "server (line 1): must be a mapping"),
        ("[1]", "config.yaml (line 1): must be a mapping with sections such as server, providers, models, middleware"),
        ("server: {}\nmiddleware: tracking", "middleware (line 2): must be a list"),
        ("server:\n  port: 1\n  port: 2", "server.port (line 3): stands here a second time"),
        ("server: {admin_listen: 9090}", "server.admin_listen (line 1): must be text"),
        ("server: {admin_listen: '127.0.0.1:'}", "server.admin_listen (line 1): must end with a port"),
        ("server: {admin_listen: '127.0.0.1:70000'}", "server.admin_listen (line 1): must end with a port"),
        ("server: {admin_listen: '::1:90'}", "server.admin_listen (line 1): must be host:port"),
        ("server: {admin_listen: ':90'}", "server.admin_listen (line 1): must be host:port"),
        ("server: {admin_listen: '0.0.0.0:90'}", "server.admin_listen (line 1): '0.0.0.0:90' is reachable beyond this machine"),
        ("server: {port: 1.5}", "server.port (line 1): must be a whole number"),
        ("server: {strict_params: perhaps}", "server.strict_params (line 1): must be true or false"),
        ("server: {port: true}", "server.port (line 1): must be a number"),
        ("server: {host: 127}", "server.host (line 1): must be text; put it in quotes"),
        ("server: {host: ''}", "server.host (line 1): must not be empty"),
        ("server: {port: !port 1}", "server.port (line 1): the tag !port is not supported"),
        ("server: &a {port: 1, host: *a}", "server.host (line 1): contains itself"),
        ("server:\n  admin_listen: x", "server.admin_listen (line 2): must be host:port"),
        ("a: b: c", "config.yaml (line 1): is no valid YAML: mapping values are not allowed here"),
        ("a: 1\n\x07", "config.yaml (line 1): is no YAML"),
        ("middleware: ['os.path:nothing']", "middleware[0] (line 1): the module 'os.path' has no 'nothing' that can be called"),
        ("middleware: ['no_such_module_x:A']", "middleware[0] (line 1): the module 'no_such_module_x' cannot be imported"),
        ("middleware: ['a b:C']", "middleware[0] (line 1): must be a known name or module:Name"),
        ("providers: {p: {api: openai, base_url: 'ftp://x'}}", "providers.p.base_url (line 1): must be an http"),
        ("providers: {p: {api: openai, base_url: 'http://u:p@x'}}", "providers.p.base_url (line 1): must not carry credentials"),
        ("providers: {p: {api: openai, base_url: 'http://x?a=b'}}", "providers.p.base_url (line 1): must end with a path"),
        ("providers: {p: {api: openai, base_url: 'http://x:y/'}}", "providers.p.base_url (line 1): is no URL"),
        ("providers: {p: {api: demo, base_url: 'http://x'}}", "providers.p.base_url (line 1): api: demo answers inside"),
        ("providers: {p: {api: demo, headers: {a: \"x\\ny\"}}}", "providers.p.headers.a (line 1): must not contain line breaks"),
        ("providers: {p: {api: demo, models: ['a b']}}", "providers.p.models[0] (line 1): is no possible model name"),
        ("models: {'a b': p/x}\nproviders: {p: {api: demo}}", 'models["a b"] (line 1): is no possible model name'),
        ("middleware: [{cache: {clock: 1}}]", "middleware[0].cache.clock (line 1): unknown key"),
        ("middleware: [{cache: {total: x}}]", "middleware[0].cache.total (line 1): must be a duration"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_path_line_and_words(text: str, fault: str) -> None:
    assert one(text).startswith(fault.removesuffix("; did you mean"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gateway.example", "127.1"])
@pytest.mark.parametrize("allow", ["", ", allow_anonymous: false", ", allow_anonymous: 'no'", ", allow_anonymous: 0"])
def test_a_host_beyond_loopback_is_refused_unless_anonymous_clients_are_allowed(host: str, allow: str) -> None:
    assert one(f"server: {{host: '{host}'{allow}}}").startswith(
        f"server.host (line 1): '{host}' is reachable beyond this machine"
    )
    assert parsed(f"server: {{host: '{host}', allow_anonymous: true}}").server.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_a_loopback_host_needs_no_permission(host: str) -> None:
    assert parsed(f"server: {{host: '{host}'}}").server.host == host.strip("[]")


@pytest.mark.parametrize("middleware", ["guard", "made_guard"])
def test_a_host_beyond_loopback_is_fine_with_auth(middleware: str) -> None:
    assert parsed(f"server: {{host: 0.0.0.0}}\nmiddleware: [{middleware}]").server.host == "0.0.0.0"


def test_a_faulty_auth_has_one_fault_and_none_about_the_host() -> None:
    text = "server: {host: 0.0.0.0}\nmiddleware: [{guard: {doors: 5}}]"
    assert one(text) == "middleware[0].guard.doors (line 2): must be a list"


def test_the_admin_address_never_has_auth_so_beyond_loopback_it_needs_permission() -> None:
    text = "server: {{admin_listen: '[::]:9090', allow_anonymous: {allow}}}\nmiddleware: [guard]"
    assert "admin address has no auth" in one(text.format(allow="false"))
    assert parsed(text.format(allow="true")).server.admin_address == ("::", 9090)
    assert parsed("server: {admin_listen: 'localhost:0'}").server.admin_address == ("localhost", 0)
    assert parsed("").server.admin_address is None


def test_overrides_go_through_the_same_checks_as_the_file() -> None:
    assert faults("server: {port: 1}", port="x", host="0.0.0.0") == [
        "server.host (command line): '0.0.0.0' is reachable beyond this machine and there is no auth; "
        "set allow_anonymous: true if that is meant",
        "server.port (command line): must be a whole number",
    ]
    assert parsed("", port="9").server.port == 9
    assert parsed("server:", port="9").server.port == 9
    assert faults("server: 5", port="9") == ["server (line 1): must be a mapping"]


def test_a_missing_file_is_one_clear_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "none.yaml", {}, KNOWN)
    assert caught.value.faults == [f"{tmp_path / 'none.yaml'}: No such file or directory"]


def test_a_file_that_is_not_utf8_is_one_clear_fault(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml", {}, KNOWN)
    assert caught.value.faults == [f"{tmp_path / 'c.yaml'}: is not UTF-8 text"]


# The environment

ROW = "providers: {p: {api: openai, base_url: http://x, %s}}"


def test_an_unquoted_variable_is_typed_by_yaml_and_a_quoted_one_stays_text() -> None:
    assert parsed("server:\n  port: ${P}", {"P": "9090"}).server.port == 9090
    assert one("server:\n  host: ${H}", {"H": "5"}) == "server.host (line 2): must be text; put it in quotes"
    assert one('server:\n  host: "${H}"', {"H": "5"}).startswith("server.host (line 2): '5' is reachable")


def test_defaults_stand_in_for_unset_and_for_empty_variables() -> None:
    text = "server:\n  port: ${P:-81}"
    assert [parsed(text, environ).server.port for environ in ({}, {"P": ""}, {"P": "82"})] == [81, 81, 82]


def test_an_unset_variable_is_a_fault_with_its_name_and_no_second_one() -> None:
    assert one("server:\n  port: ${PORT}") == "server.port (line 2): environment variable PORT is not set"
    assert one("middleware:\n  - cache: {ttl: '${TTL}'}").endswith("(line 2): environment variable TTL is not set")
    assert one("middleware:\n  - ${NAME}") == "middleware[0] (line 2): environment variable NAME is not set"
    assert one(ROW % "headers: {a: '${H}'}").startswith("providers.p.headers.a (line 1): environment variable H")
    assert one("server: ${S}") == "server (line 1): environment variable S is not set"


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_value_cannot_change_the_document_and_is_not_filled_in_again(quote: str) -> None:
    text = f"providers:\n  p:\n    api: openai\n    base_url: http://x\n    api_key: {quote}${{K}}{quote}\n"
    secret = "a: b #c, {d} ${X} $${Y}"
    assert parsed(text, {"K": secret}).providers["p"].api_key == secret


def test_a_doubled_dollar_is_an_escape_and_anchored_nodes_are_unescaped_once() -> None:
    row = "&row {api: openai, base_url: http://x, api_key: '$${K}$$$${L}'}"
    text = f"providers:\n  a: {row}\n  b: *row\n  c: {{<<: *row, usage: none}}"
    providers = parsed(text).providers
    assert {provider.api_key for provider in providers.values()} == {"${K}$$${L}"}
    assert [provider.usage for provider in providers.values()] == ["stream_options", "stream_options", "none"]


@pytest.mark.parametrize("text", ["${", "${1X}", "${A-b}", "a ${} b", "${A"])
def test_a_broken_variable_is_a_fault(text: str) -> None:
    assert "'${' must be followed by NAME}" in one(ROW % f"api_key: '{text}'")


def test_an_unquoted_variable_inside_braces_gets_a_hint() -> None:
    assert one("middleware:\n  - cache: {ttl: ${TTL:-60}}").endswith('inside { } a variable must be quoted: "${NAME}"')
    assert parsed("middleware:\n  - cache: {ttl: '${TTL:-60}'}").middleware[0].options == {"ttl": 60.0}


def test_a_key_of_digits_stays_the_text_that_it_is() -> None:
    row = "api: openai\n    base_url: http://x\n    api_key: ${K}\n    query: {api-version: 2024-10-21, n: 010}"
    text = f"providers:\n  p:\n    {row}"
    provider = parsed(text, {"K": "00123"}).providers["p"]
    assert provider.api_key == "00123"
    assert provider.query == (("api-version", "2024-10-21"), ("n", "010"))


def test_a_row_without_its_key_or_url_is_disabled_and_the_rest_works() -> None:
    text = """\
providers:
  groq:
    api: openai
    base_url: https://api.groq.com/openai/v1
    api_key: ${GROQ_API_KEY}
  azure:
    api: openai
    base_url: https://${RESOURCE}.openai.azure.com/
    api_key: ${AZURE_KEY}
  open: {api: openai, base_url: "http://127.0.0.1/v1/", api_key: ""}
"""
    config = parsed(text, {"GROQ_API_KEY": ""})
    assert {name: row.missing for name, row in config.providers.items()} == {
        "groq": "GROQ_API_KEY",
        "azure": "RESOURCE",
        "open": None,
    }
    assert list(config.warnings) == [
        "provider 'groq' is disabled: set GROQ_API_KEY",
        "provider 'azure' is disabled: set RESOURCE and AZURE_KEY",
    ]
    assert config.providers["open"].api_key is None
    assert config.providers["open"].base_url == "http://127.0.0.1/v1"
    assert config.providers["groq"].api_key is None


def test_a_disabled_row_is_still_checked() -> None:
    assert one("providers: {p: {api: openai, base_url: '${U}', usage: x}}").startswith("providers.p.usage")


# Secrets


def test_secrets_are_in_no_repr() -> None:
    text = ROW % "api_key: '${K}', headers: {x: '${K}'}" + "\nmiddleware: [{tracking: {header: '${K}'}}]"
    config = parsed(text, {"K": SECRET})
    assert config.providers["p"].api_key == SECRET
    assert SECRET not in repr(config)


@pytest.mark.parametrize(
    "text",
    [
        "server: {port: '${K}', host: ['${K}'], max_body: '${K}', usage_placement: '${K}', strict_params: '${K}'}",
        ROW
        % "api_key: ['${K}'], headers: ['${K}'], query: '${K}', usage: '${K}', key_header: '${K} ', default_max_tokens: '${K}'",
        "providers: {p: {api: openai, base_url: 'http://me:${K}@x'}}",
        "providers: {p: {api: openai, base_url: '${K}'}}",
        "middleware: [{cache: {ttl: '${K}', mode: '${K}', count: '${K}', on_codes: ['${K}']}}]",
        f"a: {SECRET}: b",
        f"a: 1\nserver: {SECRET}\nserver: '{SECRET}'",
    ],
)
def test_secrets_are_in_no_fault(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text, {"K": SECRET})
    assert caught.value.faults
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


# What comes out


def test_routes_take_a_bare_target_a_list_and_the_long_form() -> None:
    text = "providers: {d: {api: demo}}\nmodels: {a: d/x, b: [d/x, d/y/z], c: {targets: [d/x], strategy: fallback}}"
    routes = parsed(text).routes
    assert {name: [str(target) for target in route.targets] for name, route in routes.items()} == {
        "a": ["d/x"],
        "b": ["d/x", "d/y/z"],
        "c": ["d/x"],
    }


NESTED = """\
providers: {demo: {api: demo}}
middleware:
  - guard:
      via: [demo, dmeo]
      doors:
        - {name: a, code: "${CODE}", size: 3}
        - name: b
          code: [x]
          size: many
        - {name: c, code: x, siez: 2}
        - {code: x}
        - x
"""


def test_every_fault_of_a_nested_option_has_its_path_and_line() -> None:
    assert faults(NESTED) == [
        "middleware[0].guard.via[1] (line 4): there is no such provider; did you mean 'demo'?",
        "middleware[0].guard.doors[0].code (line 6): environment variable CODE is not set",
        "middleware[0].guard.doors[0].size (line 6): must be even",
        "middleware[0].guard.doors[1].code (line 8): must be text; put it in quotes",
        "middleware[0].guard.doors[1].size (line 9): must be a whole number",
        "middleware[0].guard.doors[2].siez (line 10): unknown key; did you mean 'size'?",
        "middleware[0].guard.doors[3].name (line 11): is required",
        "middleware[0].guard.doors[4] (line 12): must be a mapping",
    ]


def test_a_nested_option_arrives_as_its_dataclass_with_its_own_defaults() -> None:
    text = "middleware: [{guard: {doors: [{name: a, code: '${CODE}', open_for: 2m}, {name: b, code: x}]}}]"
    spec = parsed(text, {"CODE": SECRET}).middleware[0]
    assert spec.options == {"doors": (Door("a", SECRET, 2, 120.0), Door("b", "x"))}
    assert SECRET not in repr(spec)


def test_what_a_constructor_refuses_is_a_fault_of_its_entry() -> None:
    text = "middleware:\n  - guard: {doors: [{name: a, code: x}, {name: a, code: y}]}"
    assert one(text) == "middleware[0].guard (line 2): two doors have one name"
    text = f"middleware: [{{guard: {{doors: [{{name: {SECRET}, code: boom}}]}}}}]"
    assert one(text) == "middleware[0].guard (line 1): cannot be built from these options (RuntimeError)"


def test_the_schema_knows_nested_options() -> None:
    schema = json_schema(KNOWN)
    assert valid(as_written("middleware: [{guard: {doors: [{name: a, code: x}]}}]"), schema, schema)
    assert not valid(as_written("middleware: [{guard: {doors: [{name: a, coed: x}]}}]"), schema, schema)
    assert not valid(as_written("middleware: [{guard: {doors: [{name: a}]}}]"), schema, schema)


def test_middleware_gets_only_the_options_that_stand_in_the_file() -> None:
    text = "middleware: [tracking, {cache: {ttl: 30m, max_bytes: 1KiB, total: null}}, timeout: , 'tests.test_config:tracking']"
    specs = parsed(text).middleware
    assert [(spec.name, dict(spec.options)) for spec in specs] == [
        ("tracking", {}),
        ("cache", {"ttl": 1800.0, "max_bytes": 1024, "total": None}),
        ("timeout", {}),
        ("tests.test_config:tracking", {}),
    ]
    assert isinstance(specs[1].factory(**specs[1].options), Cache)


def test_vendors_have_their_own_base_url() -> None:
    text = "providers: {a: {api: anthropic, api_key: k}, d: {api: demo}}"
    assert {name: row.base_url for name, row in parsed(text).providers.items()} == {"a": BASE_URLS["anthropic"], "d": "demo:"}


def test_every_api_is_a_wire_format() -> None:
    from proxy.wire import WIRES

    assert set(APIS) == set(WIRES)


def test_the_config_cannot_be_changed() -> None:
    config = parsed("")
    with pytest.raises(AttributeError):
        config.default_provider = "x"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.server.port = 1


# Units


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30s", 30), ("500ms", 0.5), ("5m", 300), ("1h", 3600), ("1.5", 1.5), (0, 0), (2.5, 2.5), ("1 d", 86400)],
)
def test_durations(written: object, seconds: float) -> None:
    assert units.seconds(written) == seconds


@pytest.mark.parametrize(
    ("written", "size"), [("32MiB", 2**25), ("10MB", 10**7), ("1KiB", 1024), ("7", 7), (8, 8), ("0.5KiB", 512)]
)
def test_sizes(written: object, size: int) -> None:
    assert units.byte_size(written) == size


@pytest.mark.parametrize(
    "written", ["", "s", "-1", "-1s", "1x", "1e3", "nan", True, None, float("inf"), float("nan"), -1, [], "1" * 16, "٣s"]
)
def test_no_quantity(written: object) -> None:
    for read in (units.seconds, units.byte_size):
        with pytest.raises(ValueError, match=r"^must be a "):
            read(written)


def test_a_fraction_of_a_byte_is_no_size() -> None:
    with pytest.raises(ValueError, match="must be a size"):
        units.byte_size("1.5")


@given(st.text())
def test_any_text_is_a_quantity_or_a_fault(text: str) -> None:
    words, found = units.DURATION_WORDS, 0.0
    try:
        found = units.seconds(text)
    except ValueError as error:
        words = str(error)
    assert words == units.DURATION_WORDS
    assert found >= 0


@settings(deadline=None)
@given(st.text(alphabet="ab:{}[]$-#&*!|>'\" \n0123", max_size=60))
def test_any_file_is_a_config_or_faults(text: str) -> None:
    found = ["config.yaml (line 1): sound"]
    try:
        parsed(text, {"a": "1"})
    except ConfigError as error:
        found = error.faults
    assert found
    assert all(re.fullmatch(r"(?s).+ \((line [1-9]\d*)\): .+", fault) for fault in found)


def test_a_file_nested_without_end_is_a_fault() -> None:
    assert one("[" * 20000) == "config.yaml (line 1): is nested too deeply"


# The example and its schema


def test_the_example_loads_without_any_variable_set() -> None:
    config = load(EXAMPLE, {}, TABLE)
    enabled = [name for name, row in config.providers.items() if row.missing is None]
    assert enabled == ["demo", "ollama", "vllm"]
    assert len(config.warnings) == len(config.providers) - len(enabled)
    assert [spec.name for spec in config.middleware] == ["metrics", "tracking", "cache", "fallback", "retry", "timeout"]
    assert config.middleware[-1].options["call_timeout"] == 600.0


def test_the_example_loads_with_every_variable_set() -> None:
    names = re.findall(r"\$\{([A-Z_]+)\}", EXAMPLE.read_text())
    config = load(EXAMPLE, dict.fromkeys(names, "value"), TABLE)
    assert config.warnings == ()
    assert config.providers["azure"].base_url == "https://value.openai.azure.com/openai/deployments/{model}"
    assert config.providers["azure"].query == (("api-version", "2024-10-21"),)


def valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON Schema (2020-12) that the export uses."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema and not any(valid(value, option, root) for option in schema["anyOf"]):
        return False
    kinds: dict[str, Any] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if types and not any(isinstance(value, kinds[kind]) for kind in types):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, list):
        return all(valid(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, dict):
        return valid_object(value, schema, root)
    return "const" not in schema or value == schema["const"]


def valid_object(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> bool:
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", [])) <= value.keys() or len(value) > schema.get("maxProperties", 99):
        return False
    patterns = schema.get("patternProperties", {})
    for name, item in value.items():
        found = properties.get(name) or next((patterns[pattern] for pattern in patterns if re.search(pattern, name)), rest)
        if found is False or (found is not True and not valid(item, found, root)):
            return False
    return True


def as_written(path_or_text: str) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(path_or_text)


def test_the_schema_accepts_the_example_as_written() -> None:
    schema = json_schema(TABLE)
    assert valid(as_written(EXAMPLE.read_text()), schema, schema)


@pytest.mark.parametrize(
    "text",
    [
        "server: {prot: 1}",
        "server: {port: 99999}",
        "providers: {p: {api: x}}",
        "providers: {p: {}}",
        "models: {a: {strategy: fallback}}",
        "middleware: [cahce]",
        "middleware: [{cache: {tll: 1}}]",
        "middleware: [{cache: {mode: x}}]",
        "middleware: [{cache: {clock: 1}}]",
        "extra: 1",
    ],
)
def test_the_schema_refuses_what_the_config_refuses(text: str) -> None:
    schema = json_schema(KNOWN)
    assert not valid(as_written(text), schema, schema)
    assert faults(text)


@pytest.mark.parametrize(
    "text", ["server: {port: '${P}'}", "models: {a: p/x, b: [p/x]}", "middleware: [{cache: {ttl: 3s}}, cache, {'a:B': {c: 1}}]"]
)
def test_the_schema_accepts_short_forms_and_variables(text: str) -> None:
    schema = json_schema(KNOWN)
    assert valid(as_written(text), schema, schema)


ROUTED = "providers: {a: {api: demo}, b: {api: demo}}\n"


def test_a_route_has_a_strategy_weights_and_prices() -> None:
    written = "models: {r: {strategy: weighted, targets: [a/x, {target: b/y, weight: 3, prices: {input: 1, output: 2.5}}]}}"
    route = parse(ROUTED + written, {}).routes["r"]
    assert ([str(target) for target in route.targets], route.strategy, route.weights) == (["a/x", "b/y"], "weighted", (1.0, 3.0))
    assert route.prices == (None, (1.0, 2.5))


@pytest.mark.parametrize(
    ("targets", "fault"),
    [
        ("[{target: c/x}]", "models.r.targets[0].target (line 2): there is no provider 'c'"),
        ("[{target: a/x, weight: 0}]", "models.r.targets[0].weight (line 2): must be above 0"),
        ("[{target: a/x, wait: 1}]", "models.r.targets[0].wait (line 2): unknown key"),
        ("[{target: a/x, prices: {input: 1}}]", "models.r.targets[0].prices.output (line 2): is required"),
        ("[{target: a/x, prices: {input: -1, output: 1}}]", "models.r.targets[0].prices.input (line 2): must be from 0"),
        ("[{weight: 1}]", "models.r.targets[0].target (line 2): is required"),
    ],
)
def test_a_fault_in_a_target_has_its_path(targets: str, fault: str) -> None:
    assert faults(f"{ROUTED}models: {{r: {{targets: {targets}}}}}")[0].startswith(fault)


def test_a_provider_may_have_several_keys_and_empty_ones_are_none() -> None:
    text = "providers: {p: {api: openai, base_url: 'http://x', api_key: ['${A}', '${SPARE:-}', 12345678]}}"
    provider = parse(text, {"A": "first-key"}).providers["p"]
    assert (provider.api_key, provider.further_keys) == ("first-key", ("12345678",))


def test_an_unset_variable_in_a_list_of_keys_disables_the_provider_as_any_other_does() -> None:
    text = "providers: {p: {api: openai, base_url: 'http://x', api_key: [one, '${B}']}}"
    config = parse(text, {})
    assert (config.providers["p"].missing, config.providers["p"].api_key, config.providers["p"].further_keys) == ("B", None, ())
    assert config.warnings == ("provider 'p' is disabled: set B",)
