"""Reloading config.yaml while the gateway serves: what changes, what lives on, what a faulty file does.

Strategy: mostly a gateway in this process whose file a test rewrites and whose reloads it triggers itself; then the real command,
alone and with two workers, told by SIGHUP as an operator does.
The one rule: a test waits for what it can see (an answer, a state, a log line), never for a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from middleware import TABLE
from proxy.app import Gateway
from proxy.call import Call
from proxy.configfile import ConfigFile
from proxy.pipeline import Handler
from proxy.reload import Reloader
from proxy.reply import Reply
from tests.support.gateway import ask, chat, gateway, until
from tests.support.rawclient import connected, request_bytes
from tests.support.upstream import Asked, Held, Line, Upstream, stream
from tests.test_workers import Served

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
WORD = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": null}]}\n\n'
ENDING = (
    b'data: {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], '
    b'"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}\n\ndata: [DONE]\n\n'
)
SECRET = "sk-upstream-0123456789"
CONFIG = """
server: {server}
providers:
  up: {{api: openai, base_url: "{url}/v1", api_key: "{key}"}}
  demo: {{api: demo, models: [echo]}}
middleware: [{middleware}]
"""


class Opened:
    """Counts its starts and ends. label: an option, so that a test can change it. broken: its start fails."""

    made: ClassVar[list[Opened]] = []

    def __init__(self, *, label: str = "a", broken: bool = False) -> None:
        self.label = label
        self.broken = broken
        self.starts = self.closes = self.attached = self.calls = 0
        self.adopted: list[str] = []

    def attach(self, surroundings: object) -> None:
        self.attached += 1

    def adopt(self, previous: Opened) -> None:
        self.adopted.append(previous.label)

    async def start(self) -> None:
        self.made.append(self)
        self.starts += 1
        if self.broken:
            raise RuntimeError(SECRET)

    async def close(self) -> None:
        self.closes += 1

    async def __call__(self, call: Call, next: Handler) -> Reply:
        self.calls += 1
        return (await next(call)).with_head(headers={"X-Label": self.label})


@dataclass
class Scene:
    """A gateway and its file. write: puts another text there; `reload` then triggers."""

    path: Path
    file: ConfigFile
    gateway: Gateway
    reloader: Reloader
    given: dict[str, str]
    environ: dict[str, str] = field(default_factory=dict)

    def write(self, **fields: str) -> None:
        self.given |= fields
        self.path.write_text(CONFIG.format(**self.given))

    async def reload(self, **fields: str) -> bool:
        self.write(**fields)
        return await self.reloader.reload()

    async def get(self, path: str) -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.gateway.port}{path}") as response,
        ):
            return await response.text()

    async def verbose(self) -> Json:
        found: Json = json.loads(await self.get("/readyz?verbose"))
        return found

    async def sample(self, metric: str, **labels: str) -> float:
        return read(await self.get("/metrics"), metric, **labels)


@asynccontextmanager
async def line_to(at: Scene) -> AsyncIterator[Any]:
    """A connection of a client that reads only when told to."""
    with await connected(at.gateway.port) as client:
        yield client


def read(page: str, metric: str, **labels: str) -> float:
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples if sample.name == metric]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@asynccontextmanager
async def scene(
    folder: Path, url: str = "http://127.0.0.1:9", middleware: str = "", server: str = "{port: 0}", overrides: Json | None = None
) -> AsyncIterator[Scene]:
    path, environ = folder / "config.yaml", {"KEY": SECRET}
    given = {"url": url, "middleware": middleware, "server": server, "key": SECRET}
    path.write_text(CONFIG.format(**given))
    file = ConfigFile(path, environ, {**TABLE, "opened": Opened}, overrides)
    async with Gateway(file.load(), settle=0.2) as running:
        yield Scene(path, file, running, Reloader(running, file), given, environ)


@pytest.fixture(autouse=True)
def _no_opened() -> Iterator[None]:
    Opened.made.clear()
    yield
    Opened.made.clear()


# Requests


async def test_a_running_stream_keeps_the_old_config_and_the_next_request_has_the_new_one(tmp_path: Path) -> None:
    held = Held(WORD, WORD + ENDING)
    async with (
        Upstream(held) as old,
        Upstream(stream([WORD, ENDING])) as new,
        scene(tmp_path, old.url, "opened: {label: old}") as at,
        line_to(at) as client,
    ):
        await client.post(chat("up/m"))
        await client.read_until(b"word ")
        assert await at.reload(url=new.url, middleware="opened: {label: new}")
        answer = await ask(at.gateway.port, chat("up/m"))
        assert answer.done
        assert answer.headers["X-Label"] == "new"
        held.go.set()
        body = await client.read_until(b"[DONE]")
    assert body.count(b"word ") == 2
    assert b"X-Label: old" in body
    assert (len(old.asked), len(new.asked)) == (1, 1)


async def test_a_request_whose_body_is_still_coming_keeps_the_config_that_it_was_let_in_by(tmp_path: Path) -> None:
    async with (
        Upstream(stream([WORD, ENDING])) as up,
        scene(tmp_path, up.url, "opened: {label: old}") as at,
        line_to(at) as client,
    ):
        request = request_bytes(chat("up/m"))
        await client.send(request[:-10])
        await until(lambda: at.gateway.edge.open_calls == 1)
        assert await at.reload(middleware="opened: {label: new}")
        await client.send(request[-10:])
        assert b"X-Label: old" in await client.read_until(b"[DONE]")


async def test_a_kept_alive_connection_goes_on_under_the_new_config(tmp_path: Path) -> None:
    async with Upstream(stream([WORD, ENDING])) as up, scene(tmp_path, up.url) as at, line_to(at) as client:
        await client.post(chat("up/m"))
        await client.read_until(b"0\r\n\r\n")
        assert await at.reload(middleware="opened")
        await client.post(chat("up/m"))
        assert b"X-Label: a" in await client.read_until(b"0\r\n\r\n", count=2)
        assert len(up.lines) == 1, "the connection to the provider lives on too"


async def test_a_removed_middleware_is_gone_and_an_added_one_works(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="metrics") as at:
        assert "penstock_build_info" in await at.get("/metrics")
        assert await at.reload(middleware="opened")
        assert json.loads(await at.get("/metrics"))["error"]["code"] == "unknown_path"
        assert (await ask(at.gateway.port, chat("demo/fast"))).headers["X-Label"] == "a"


async def test_auth_that_is_added_holds_for_the_next_request(tmp_path: Path) -> None:
    key = "pk-0123456789abcdef"
    async with scene(tmp_path) as at:
        assert (await ask(at.gateway.port, chat("demo/fast"))).status == 200
        assert await at.reload(middleware=f"auth: {{keys: [{{name: web, key: {key}}}]}}")
        assert (await ask(at.gateway.port, chat("demo/fast"))).status == 401
        assert (await ask(at.gateway.port, chat("demo/fast"), headers={"Authorization": f"Bearer {key}"})).status == 200
        assert await at.reload(middleware="auth: {keys: [{name: web, key: pk-another-9876543210}]}")
        assert (await ask(at.gateway.port, chat("demo/fast"), headers={"Authorization": f"Bearer {key}"})).status == 401


async def test_variables_are_read_again(tmp_path: Path) -> None:
    async with Upstream(stream([WORD, ENDING])) as up, scene(tmp_path, up.url) as at:
        at.environ["KEY"] = "sk-rotated-0123456789"
        assert await at.reload(key="${KEY}")
        await ask(at.gateway.port, chat("up/m"))
    assert up.asked[0].headers["authorization"] == "Bearer sk-rotated-0123456789"


# Faulty files


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (
            "server: {port: 0, max_body: lots}\nmiddleware:\n  - cache: {ttl: 0}\n",
            ["server.max_body (line 1): must be a size", "middleware[0].cache.ttl (line 3): must be from 1 to 259200"],
        ),
        ("server: [", ["line 1"]),
        ("models: {m: nowhere/x}", ["models.m (line 1): there is no provider 'nowhere'"]),
    ],
)
async def test_a_faulty_file_changes_nothing_and_the_log_says_path_and_line(tmp_path: Path, text: str, faults: list[str]) -> None:
    async with scene(tmp_path, middleware="opened, metrics") as at:
        before = at.gateway.edge.generation
        at.path.write_text(text)
        with capture_logs() as logs:
            assert not await at.reloader.reload()
        assert at.gateway.edge.generation is before
        assert (await ask(at.gateway.port, chat("demo/fast"))).done
        [line] = logs
        assert line["log_level"] == "error"
        assert len(line["faults"]) == len(faults)
        assert all(fault in said for fault, said in zip(faults, line["faults"], strict=True))
        config = (await at.verbose())["config"]
        assert config["generation"] == 1
        assert config["last_refused"]["faults"] == line["faults"]
        assert await at.sample("penstock_config_reloads_total", result="refused") == 1


async def test_a_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        at.path.unlink()
        with capture_logs() as logs:
            assert not await at.reloader.reload()
        assert "No such file" in logs[0]["faults"][0]
        assert (await ask(at.gateway.port, chat("demo/fast"))).done


async def test_a_middleware_that_fails_to_start_changes_nothing_and_the_others_are_closed(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="opened") as at:
        first = Opened.made[0]
        with capture_logs() as logs:
            assert not await at.reload(middleware="opened, opened: {label: b}, opened: {label: c, broken: true}")
        assert [line["log_level"] for line in logs] == ["error", "error"]
        assert [(one.label, one.starts, one.closes) for one in Opened.made] == [("a", 1, 0), ("b", 1, 1), ("c", 1, 0)]
        assert first.attached == 1
        assert at.gateway.layers == [first]
        assert SECRET not in json.dumps((await at.verbose())["config"])


async def test_no_host_that_waits_for_a_restart_takes_auth_away_from_the_one_that_is_served(tmp_path: Path) -> None:
    """The file is right for its own host, and would open the one on which the gateway listens until then."""
    middleware = "auth: {keys: [{name: web, key: pk-0123456789abcdef}]}"
    async with scene(tmp_path, middleware=middleware, server="{host: 0.0.0.0, port: 0}") as at:
        with capture_logs() as logs:
            assert not await at.reload(middleware="", server="{host: 127.0.0.1, port: 0}")
        assert "reachable beyond this machine" in logs[0]["faults"][0]
        assert "server.host" in logs[0]["faults"][1]
        assert (await ask(at.gateway.port, chat("demo/fast"))).status == 401


async def test_what_takes_a_restart_keeps_its_value_and_is_named(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        port = at.gateway.port
        with capture_logs() as logs:
            assert await at.reload(server="{port: 9, workers: 2, admin_listen: '127.0.0.1:0', drain_timeout: 7s}")
        assert logs[0]["changes"] == ["server ~drain_timeout"]
        assert logs[1]["settings"] == ["server.port", "server.admin_listen", "server.workers"]
        server = at.gateway.config.server
        assert (server.port, server.admin_listen, server.workers, server.drain_timeout) == (0, None, 1, 7.0)
        assert (await ask(port, chat("demo/fast"))).done


async def test_the_command_line_stays_above_the_file(tmp_path: Path) -> None:
    async with scene(tmp_path, overrides={"port": "0"}, server="{port: 7}") as at:
        with capture_logs() as logs:
            assert await at.reload(server="{port: 8}")
        assert [line["event"] for line in logs] == ["config reloaded"]


# The log


async def test_the_log_says_what_changed_by_name_and_no_secret(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="metrics, opened, cache") as at:
        text = f"""
            default_provider: demo
            providers:
              up: {{api: openai, base_url: "http://127.0.0.1:9/v1", api_key: "sk-another-9876543210"}}
              more: {{api: openai, base_url: "http://127.0.0.1:9/v1", api_key: "{SECRET}"}}
              off: {{api: openai, base_url: "http://127.0.0.1:9/v1", api_key: "${{UNSET}}"}}
              demo: {{api: demo}}
            server: {{port: 0, max_depth: 32}}
            models: {{fast: demo/echo}}
            middleware: [cache: {{ttl: 5s}}, metrics, retry]
        """
        at.path.write_text(text)
        with capture_logs() as logs:
            assert await at.reloader.reload()
    assert logs[0]["generation"] == 2
    assert logs[0]["changes"] == [
        "server ~max_depth", "default_provider", "providers +more +off ~up ~demo", "models +fast",
        "middleware +retry -opened ~cache", "middleware order: cache, metrics, retry",
    ]  # fmt: skip
    assert logs[1]["warning"] == "provider 'off' is disabled: set UNSET"
    assert "sk-" not in json.dumps(logs)


# What lives on


async def test_the_cache_keeps_its_entries_with_other_options_and_also_what_an_old_stream_stores(tmp_path: Path) -> None:
    held = Held(WORD, WORD + ENDING)
    cached = chat("up/m", cache={"type": "exact_match"})
    async with Upstream(held) as up, scene(tmp_path, up.url, "metrics, cache") as at, line_to(at) as client:
        await client.post(cached)
        await client.read_until(b"word ")
        assert await at.reload(middleware="metrics, cache: {ttl: 10m, max_bytes: 1MiB}")
        held.go.set()
        await client.read_until(b"[DONE]")
        assert (await ask(at.gateway.port, cached)).headers["X-Cache"] == "hit"
        assert await at.reload(middleware="metrics, cache: {max_bytes: 2MiB}")
        answer = await ask(at.gateway.port, cached)
        assert answer.headers["X-Cache"] == "hit"
        assert answer.text == "word word "
        assert len(up.asked) == 1
        assert await at.sample("penstock_cache_hits_total") == 2


async def test_a_smaller_cache_lets_go_of_what_was_used_least_recently(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="cache: {max_bytes: 1MiB}") as at:
        bodies = [chat("demo/fast", cache={"type": "exact_match"}, seed=number) for number in range(8)]
        for body in bodies:
            await ask(at.gateway.port, body)
        held = (await at.verbose())["middleware"]["cache"]
        assert held["entries"] == 8
        await ask(at.gateway.port, bodies[0])
        assert await at.reload(middleware=f"cache: {{max_bytes: {held['bytes'] // 2}}}")
        now = (await at.verbose())["middleware"]["cache"]
        assert 0 < now["entries"] <= 4
        assert now["bytes"] <= held["bytes"] // 2
        assert (await ask(at.gateway.port, bodies[0])).headers["X-Cache"] == "hit"
        assert (await ask(at.gateway.port, bodies[1])).headers["X-Cache"] == "miss"


async def test_counters_do_not_go_back_and_an_old_stream_is_still_counted(tmp_path: Path) -> None:
    held = Held(WORD, WORD + ENDING)
    async with Upstream(held) as up, scene(tmp_path, up.url, "metrics") as at, line_to(at) as client:
        await ask(at.gateway.port, chat("demo/fast"))
        await client.post(chat("up/m"))
        await client.read_until(b"word ")
        prices = "metrics: {prices: {up/m: {input: 1, output: 1}}, max_names: 7}"
        assert await at.reload(middleware=prices)
        assert await at.sample("penstock_requests_total") == 1
        assert await at.sample("penstock_open_streams") == 1
        held.go.set()
        await client.read_until(b"[DONE]")
        assert await at.sample("penstock_open_streams") == 0
        assert await at.sample("penstock_requests_total") == 2
        assert await at.sample("penstock_unpriced_requests_total", reason="no_price", target="up/m") == 1, "its config had none"
        await ask(at.gateway.port, chat("up/m"))
        assert await at.sample("penstock_cost_usd_total") == pytest.approx(5e-6)


async def test_a_label_that_was_let_in_is_not_let_in_once_more(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="metrics: {max_names: 2}") as at:
        for name in ("a", "b", "c"):
            await ask(at.gateway.port, chat("demo/fast", name=name))
        assert await at.reload(middleware="metrics: {max_names: 2, max_sets: 90}")
        for name in ("c", "d", "a"):
            await ask(at.gateway.port, chat("demo/fast", name=name))
        assert await at.sample("penstock_requests_total", name="a") == 2
        assert await at.sample("penstock_requests_total", name="other") == 3


async def test_limits_are_not_reset_and_a_held_slot_stays_held(tmp_path: Path) -> None:
    held = Held(WORD, WORD + ENDING)
    async with Upstream(held) as up, scene(tmp_path, up.url, "limits: {per_key: {concurrent: 1}}") as at:
        async with line_to(at) as client:
            await client.post(chat("up/m"))
            await client.read_until(b"word ")
            assert await at.reload(middleware="limits: {per_key: {concurrent: 1, requests_per_minute: 2}}")
            assert (await ask(at.gateway.port, chat("demo/fast"))).status == 429
            held.go.set()
            await client.read_until(b"[DONE]")
        for _ in range(2):
            assert (await ask(at.gateway.port, chat("demo/fast"))).status == 200
        assert await at.reload(middleware="limits: {per_key: {concurrent: 9, requests_per_minute: 2}}")
        answer = await ask(at.gateway.port, chat("demo/fast"))
        assert (answer.status, answer.headers["x-ratelimit-limit-requests"]) == (429, "2")


FRAGILE = "fallback: {{min_requests: 2, cool_down: {seconds}}}"


async def refusing(asked: Asked, line: Line) -> None:
    await line.head(500, "application/json")
    await line.chunk(b'{"error": {"message": "no"}}')
    await line.end()


async def test_a_circuit_stays_open_over_a_reload_of_its_options(tmp_path: Path) -> None:
    async with Upstream(refusing) as up, scene(tmp_path, up.url, FRAGILE.format(seconds="1h")) as at:
        for _ in range(2):
            await ask(at.gateway.port, chat("up/m"))
        assert await at.reload(middleware=FRAGILE.format(seconds="30m") + ", metrics")
        assert (await ask(at.gateway.port, chat("up/m"))).json["error"]["code"] == "circuit_open"
        assert await at.sample("penstock_circuit_state", target="up/m") == 2
        assert await at.sample("penstock_attempts_total", target="up/m") == 2
    assert len(up.asked) == 2


async def test_a_circuit_is_judged_by_the_new_policy_with_what_it_had_counted(tmp_path: Path) -> None:
    patient = "fallback: {min_requests: 10}"
    async with Upstream(refusing) as up, scene(tmp_path, up.url, patient) as at:
        for _ in range(2):
            await ask(at.gateway.port, chat("up/m"))
        assert await at.reload(middleware=FRAGILE.format(seconds="1h"))
        assert (await ask(at.gateway.port, chat("up/m"))).status == 500
        assert (await ask(at.gateway.port, chat("up/m"))).json["error"]["code"] == "circuit_open"


async def test_a_provider_whose_row_was_changed_is_asked_again_at_once(tmp_path: Path) -> None:
    """Its key or its URL may have been what was wrong."""
    async with Upstream(refusing) as up, scene(tmp_path, up.url, FRAGILE.format(seconds="1h")) as at:
        for _ in range(2):
            await ask(at.gateway.port, chat("up/m"))
        assert (await ask(at.gateway.port, chat("up/m"))).json["error"]["code"] == "circuit_open"
        up.answer = stream([WORD, ENDING])
        assert await at.reload(key="sk-the-right-one-012345")
        assert (await ask(at.gateway.port, chat("up/m"))).done


async def test_what_was_spent_of_a_retry_budget_stays_spent(tmp_path: Path) -> None:
    spare = "metrics, retry: {{base: 0s, budget: 0, floor: {floor}, count: {count}}}"
    async with Upstream(refusing) as up, scene(tmp_path, up.url, spare.format(count=2, floor=2)) as at:
        await ask(at.gateway.port, chat("up/m"))
        assert len(up.asked) == 3
        assert await at.reload(middleware=spare.format(count=5, floor=2))
        await ask(at.gateway.port, chat("up/m"))
        assert len(up.asked) == 4
        assert await at.sample("penstock_retries_total") == 2
        assert await at.sample("penstock_retry_budget_exhausted_total") == 1
        assert await at.reload(middleware=spare.format(count=5, floor=3))
        await ask(at.gateway.port, chat("up/m"))
        assert len(up.asked) == 6, "one more is in the new budget"


async def test_what_auth_refused_stays_counted(tmp_path: Path) -> None:
    keys = "metrics, auth: {{keys: [{{name: web, key: {key}, admin: true}}]}}"
    async with scene(tmp_path, middleware=keys.format(key="pk-0123456789abcdef")) as at:
        await ask(at.gateway.port, chat("demo/fast"))
        assert await at.reload(middleware=keys.format(key="pk-another-9876543210"))
        async with (
            aiohttp.ClientSession(headers={"x-api-key": "pk-another-9876543210"}) as session,
            session.get(f"http://127.0.0.1:{at.gateway.port}/metrics") as response,
        ):
            page = await response.text()
        assert read(page, "penstock_auth_refusals_total", reason="missing_api_key") == 1


# Middleware objects


async def test_an_unchanged_entry_goes_on_as_the_same_object_and_is_told_its_surroundings(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="opened, opened: {label: b}") as at:
        first, second = Opened.made
        assert await at.reload(middleware="metrics, opened, opened: {label: c}")
        third = Opened.made[2]
        assert at.gateway.layers[1:] == [first, third]
        assert (first.starts, first.attached, first.closes, first.adopted) == (1, 2, 0, [])
        assert (third.starts, third.attached, third.adopted) == (1, 1, ["b"])
        await until(lambda: second.closes == 1)
    assert [one.closes for one in Opened.made] == [1, 1, 1]


async def test_an_old_layer_is_closed_once_and_only_after_its_last_call(tmp_path: Path) -> None:
    held = Held(WORD, WORD + ENDING)
    async with Upstream(held) as up, scene(tmp_path, up.url, "opened") as at, line_to(at) as client:
        await client.post(chat("up/m"))
        await client.read_until(b"word ")
        first = Opened.made[0]
        # The first goes on in a second generation, and is not in the third: calls of both of them keep it.
        assert await at.reload(key="sk-upstream-9876543210")
        async with line_to(at) as other:
            await other.post(chat("up/m"))
            await other.read_until(b"word ")
            assert await at.reload(middleware="opened: {label: b}")
            assert await at.reload(middleware="opened: {label: c}")
            await until(lambda: Opened.made[1].closes == 1)
            assert first.closes == 0
            client.leave("rst")
            await until(lambda: at.gateway.edge.open_calls == 1)
            assert (await ask(at.gateway.port, chat("demo/fast"))).headers["X-Label"] == "c"
            assert first.closes == 0
            held.go.set()
            await other.read_until(b"[DONE]")
        await until(lambda: first.closes == 1)
    assert [one.closes for one in Opened.made] == [1, 1, 1]


async def test_the_end_of_the_gateway_closes_what_calls_of_old_generations_hold(tmp_path: Path) -> None:
    async with Upstream(Held(WORD, WORD + ENDING)) as up:
        async with scene(tmp_path, up.url, "opened") as at, line_to(at) as client:
            await client.post(chat("up/m"))
            await client.read_until(b"word ")
            assert await at.reload(middleware="opened: {label: b}")
        assert [one.closes for one in Opened.made] == [1, 1]


async def test_reloads_leave_nothing_behind(tmp_path: Path) -> None:
    """200 of them, with a call in each: as many tasks, sockets and objects as after the first 40."""

    def files() -> int:
        return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    middleware = (
        "metrics, tracking, cache: {{ttl: {ttl}s}}, limits: {{max_tools: {ttl}}}, fallback: {{probes: {probes}}}, "
        "retry: {{floor: {ttl}}}, opened: {{label: x{ttl}}}"
    )
    async with Upstream(stream([WORD, ENDING])) as up, scene(tmp_path, up.url, "metrics") as at:

        async def some(numbers: range) -> tuple[int, int, int]:
            with capture_logs() as logs:
                for number in numbers:
                    assert await at.reload(middleware=middleware.format(ttl=100 + number % 7, probes=1 + number % 7))
                    assert (await ask(at.gateway.port, chat("up/m"))).done
                await at.get("/metrics")  # what waited to be counted is
                await until(lambda: sum(not one.closes for one in Opened.made) == 1)
                Opened.made[:] = Opened.made[-1:]
                for kept in (logs, up.asked, up.lines):
                    kept.clear()
                return len(asyncio.all_tasks()), files(), objects()

        tasks, open_files, found = await some(range(40))
        later = await some(range(40, 240))
        assert later[0] <= tasks
        assert later[1] <= open_files
        assert later[2] - found < 200, "less than an object per reload"
        assert at.gateway.record.number == 241


# The watch


async def test_a_changed_file_is_loaded_once_two_looks_have_found_the_same(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        at.write(middleware="opened")
        await at.reloader.look()
        assert at.gateway.record.number == 1
        at.write(middleware="opened, metrics")  # still being written
        await at.reloader.look()
        assert at.gateway.record.number == 1
        await at.reloader.look()
        assert len(at.gateway.layers) == 2
        for _ in range(3):
            await at.reloader.look()
        assert at.gateway.record.number == 2


async def test_a_file_that_is_empty_for_a_moment_is_not_loaded(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="opened") as at:
        text = at.path.read_text()
        at.path.write_text("")
        await at.reloader.look()
        at.path.write_text(text)
        for _ in range(3):
            await at.reloader.look()
        assert at.gateway.record.number == 1


async def test_a_faulty_file_is_reported_once_until_it_changes(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        with capture_logs() as logs:
            at.path.write_text("server: [")
            for _ in range(5):
                await at.reloader.look()
            at.path.unlink()
            for _ in range(5):
                await at.reloader.look()
            at.write(middleware="opened")
            for _ in range(5):
                await at.reloader.look()
        assert [line["event"].partition(",")[0] for line in logs] == [
            "config not reloaded",
            "config not reloaded",
            "config reloaded",
        ]


async def test_a_swapped_symlink_and_a_rename_are_seen_and_a_touched_file_is_no_change(tmp_path: Path) -> None:
    """As Kubernetes swaps a ConfigMap, and as editors write; with a timestamp and a size that say nothing."""
    async with scene(tmp_path) as at:
        first, second = tmp_path / "..first", tmp_path / "..second"
        text = at.path.read_text()
        first.write_text(text)
        second.write_text(text.replace("[echo]", "[fast]"))
        os.utime(first, (1, 1))
        os.utime(second, (1, 1))
        at.path.unlink()
        at.path.symlink_to(first)
        for _ in range(3):
            await at.reloader.look()
        assert at.gateway.record.number == 1, "the same content"
        link = tmp_path / "link"
        link.symlink_to(second)
        link.rename(at.path)
        for _ in range(2):
            await at.reloader.look()
        assert at.gateway.record.number == 2
        assert "demo/fast" in await at.get("/v1/models")
        os.utime(second, (9, 9))
        for _ in range(3):
            await at.reloader.look()
        assert at.gateway.record.number == 2


async def test_the_watch_can_be_switched_off_and_on(tmp_path: Path) -> None:
    async with scene(tmp_path, server="{port: 0, watch: false}") as at:
        at.write(middleware="opened", server="{port: 0, watch: true}")
        for _ in range(3):
            await at.reloader.look()
        assert at.gateway.record.number == 1
        assert await at.reloader.reload()
        at.write(middleware="")
        for _ in range(3):
            await at.reloader.look()
        assert at.gateway.record.number == 3


# What operators see


async def test_readyz_and_metrics_show_the_generation_and_the_last_refusal(tmp_path: Path) -> None:
    async with scene(tmp_path, middleware="metrics") as at:
        assert (await at.verbose())["config"].keys() == {"generation", "loaded", "last_refused"}
        began = await at.sample("penstock_config_last_reload_success_timestamp_seconds")
        at.path.write_text("models: {m: nowhere/x}")
        await at.reloader.reload()
        assert await at.reload(key="sk-upstream-9876543210")
        config = (await at.verbose())["config"]
        assert config["generation"] == 2
        assert "models.m (line 1)" in config["last_refused"]["faults"][0]
        assert await at.sample("penstock_config_reloads_total", result="success") == 1
        assert await at.sample("penstock_config_reloads_total", result="refused") == 1
        assert await at.sample("penstock_config_last_reload_success_timestamp_seconds") > began


async def test_the_admin_address_serves_what_a_reload_added(tmp_path: Path) -> None:
    async with scene(tmp_path, server="{port: 0, admin_listen: '127.0.0.1:0'}") as at:
        assert await at.reload(middleware="metrics")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{at.gateway.admin_port}/metrics") as response,
        ):
            assert "penstock_build_info" in await response.text()


async def test_a_gateway_without_a_file_has_one_config() -> None:
    async with gateway() as running:
        assert running.record.health()["config"]["generation"] == 1


# Real processes


async def test_sighup_reloads_the_real_command_and_drain_still_works(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = "server: {{port: 0}}\nproviders: {{demo: {{api: demo, models: [{model}]}}}}\nmiddleware: [tracking]\n"
    path.write_text(text.format(model="echo"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "serve", "-c", str(path), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None

        async def line_with(word: bytes) -> bytes:
            assert process.stderr is not None
            async with asyncio.timeout(20):
                while word not in (line := await process.stderr.readline()):
                    assert line, "it has ended"
            return line

        port = int((await line_with(b"serving")).rpartition(b":")[2].partition(b"/")[0])
        path.write_text(text.format(model="fast"))
        process.send_signal(signal.SIGHUP)
        assert json.loads(await line_with(b"config reloaded"))["changes"] == ["providers ~demo"]
        path.write_text("server: {port: 0}\nmiddleware: [nothing]\n")
        process.send_signal(signal.SIGHUP)
        assert "middleware[0] (line 2)" in json.loads(await line_with(b"config not reloaded"))["faults"][0]
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/v1/models") as response:
            assert [entry["id"] for entry in (await response.json())["data"]] == ["demo/fast"]
        path.write_text(text.format(model="slow"))
        assert json.loads(await line_with(b"config reloaded"))["generation"] == 3, "by the watch, without a signal"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def test_with_workers_all_follow_and_a_worker_that_is_restarted_has_the_new_config(tmp_path: Path) -> None:
    served = Served(tmp_path).serving()
    path = tmp_path / "config.yaml"
    try:
        pids = await served.pids()
        right = path.read_text().replace("demo: {api: demo}", "demo: {api: demo, models: [fast]}")
        path.write_text(right)
        served.process.send_signal(signal.SIGHUP)
        states = await served.until(lambda found: all(one.get("config", {}).get("generation") == 2 for one in found))
        assert [state["pid"] for state in states] == pids
        for _ in range(8):
            assert "demo/fast" in (await served.ask("GET", "/v1/models"))[1]
        path.write_text("server: {port: 0}\nmiddleware: [nothing]\n")
        served.process.send_signal(signal.SIGHUP)
        served.says(r"middleware\[0\] \(line 2\)")
        states = await served.until(lambda found: all(one.get("config", {}).get("last_refused") for one in found))
        assert [state["config"]["generation"] for state in states] == [2, 2]
        page = (await served.ask("GET", "/metrics"))[1]
        assert read(page, "penstock_config_reloads_total", result="success") == 1
        assert read(page, "penstock_config_reloads_total", result="refused") == 1
        os.killpg(served.process.pid, signal.SIGHUP)  # as a terminal does: the workers have read that notice
        await served.until(lambda found: len(re.findall("not reloaded", served.said)) == 2)
        async with asyncio.timeout(20):
            while read(page, "penstock_config_reloads_total", result="refused") == 1:
                page = (await served.ask("GET", "/metrics"))[1]
        assert read(page, "penstock_config_reloads_total", result="refused") == 2
        os.kill(pids[1], signal.SIGKILL)
        await served.replaced(1, pids[1])
        states = await served.until(lambda found: all("config" in one for one in found))
        assert [state["config"]["generation"] for state in states] == [2, 2]
        for _ in range(8):
            assert "demo/fast" in (await served.ask("GET", "/v1/models"))[1]
        served.process.send_signal(signal.SIGTERM)
        assert await served.ended() == 0
    finally:
        served.kill()
    assert list(served.private.iterdir()) == [], "the notice, which may hold keys, goes with the directory"
