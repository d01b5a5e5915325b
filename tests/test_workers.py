"""Several workers behind one port, as an operator runs them: the real command, real signals, real deaths.

Strategy: the command on a port that the system chooses, one for all tests that leave it alive; which worker a connection reaches
is the kernel's choice, so a test that needs both makes connections until both were reached.
The one rule: a test waits for what it can see (an answer, a state, an end), never for a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

import proxy.__main__ as command_line
from proxy.app import bound
from proxy.config import ConfigError, parse
from proxy.workers.listening import Ports
from tests.support.gateway import chat
from tests.support.rawclient import connected
from tests.support.upstream import Held, Upstream

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
LONG = 20.0  # seconds that no test may come near
NOWHERE = "http://127.0.0.1:9"
CONFIG = """
server: {{host: 127.0.0.1, port: {port}, workers: 2, drain_timeout: {allowed}}}
providers:
  demo: {{api: demo}}
  held: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware: [{middleware}]
"""
MIDDLEWARE = "metrics, tracking, limits: {per_name: {requests_per_minute: 5}}, cache"
CACHED = chat("demo/echo", stream=False, cache={"type": "exact_match"})
WORD = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": null}]}\n\n'
ENDING = b'data: {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


class Served:
    """`penstock serve` with two workers in a folder. process: the supervisor. port: known once it serves."""

    def __init__(
        self, folder: Path, *, port: int = 0, allowed: str = "20s", middleware: str = MIDDLEWARE, url: str = NOWHERE
    ) -> None:
        self.folder = folder
        self.log = folder / "stderr"
        # Where the workers' directory is made. A socket's path has at most about 100 characters.
        self.private = folder / "t"
        self.private.mkdir()
        config = folder / "config.yaml"
        config.write_text(CONFIG.format(port=port, allowed=allowed, middleware=middleware, url=url))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxy", "serve", "-c", str(config)], cwd=ROOT, stdout=log, stderr=log,
                env={**os.environ, "TMPDIR": str(self.private)}, start_new_session=True,
            )  # fmt: skip
        self.port = 0

    def serving(self) -> Served:
        """Wait until it serves."""
        self.port = int(self.says(r"serving http://127\.0\.0\.1:(\d+)/v1"))
        return self

    def says(self, pattern: str) -> str:
        """Wait until it says so; the first group."""
        late = time.monotonic() + LONG
        while (found := re.search(pattern, self.said)) is None:
            assert time.monotonic() < late
            assert self.process.poll() is None, self.said
            time.sleep(0.005)
        return found[found.lastindex or 0]

    @property
    def said(self) -> str:
        return self.log.read_text()

    async def ended(self) -> int:
        """The exit status."""
        return await asyncio.to_thread(self.process.wait, LONG)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LONG)

    async def ask(self, method: str, path: str, body: Json | None = None) -> tuple[int, str]:
        """One request on a connection of its own."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
            session.request(method, f"http://127.0.0.1:{self.port}{path}", json=body) as response,
        ):
            return response.status, await response.text()

    async def answered(self, method: str, path: str) -> str:
        """The first answer that comes, where a worker stands still: some of several connections reach the other one."""
        tasks = [asyncio.ensure_future(self.ask(method, path)) for _ in range(16)]
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=LONG)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        return next(iter(done)).result()[1]

    async def workers(self) -> list[Json]:
        found: list[Json] = json.loads((await self.ask("GET", "/readyz?verbose"))[1])["workers"]
        return found

    async def pids(self) -> list[int]:
        """Of both workers, once both are there."""
        return [state["pid"] for state in await self.until(lambda states: all("pid" in state for state in states))]

    async def replaced(self, number: int, pid: int) -> list[int]:
        """The workers' processes, once another one is in this one's place."""
        return [state["pid"] for state in await self.until(lambda states: states[number].get("pid", pid) != pid)]

    async def requests(self) -> float:
        """How many there were, by the metrics."""
        return summed((await self.ask("GET", "/metrics"))[1], "penstock_requests_total")

    async def until(self, condition: Callable[[list[Json]], bool], between: Callable[[], Any] | None = None) -> list[Json]:
        """Ask until the workers' states are as wanted. between: what is done each time before."""
        async with asyncio.timeout(LONG):
            while True:
                if between is not None:
                    await between()
                with contextlib.suppress(aiohttp.ClientError):
                    if condition(found := await self.workers()):
                        return found


def summed(page: str, name: str, **labels: str) -> float:
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Served]:
    running = Served(folder, **settings)
    try:
        yield running.serving()
    finally:
        running.kill()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all tests that leave it alive, with both workers in their places."""
    with served(tmp_path_factory.mktemp("w")) as running:
        yield running
        running.process.terminate()
        assert running.process.wait(LONG) == 0


@asynccontextmanager
async def streaming(folder: Path, allowed: str = "20s") -> AsyncIterator[tuple[Served, Held, list[Any]]]:
    """A gateway with open streams, at least one in each worker; they end when the provider goes on."""
    held = Held(WORD, ENDING)
    async with Upstream(held) as upstream, contextlib.AsyncExitStack() as stack:
        running = stack.enter_context(served(folder, allowed=allowed, url=upstream.url, middleware="tracking"))
        clients: list[Any] = []

        async def one_more() -> None:
            clients.append(stack.enter_context(await connected(running.port)))
            await clients[-1].post(chat("held/m"))
            await clients[-1].read_until(b"word ")

        await running.until(lambda states: all(state["open_calls"] for state in states), one_more)
        yield running, held, clients


async def finished(clients: list[Any]) -> None:
    """All streams have come to a good end."""
    for client in clients:
        assert b"error" not in await client.read_until(b"[DONE]")


def outcomes(said: str) -> set[str]:
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {line["outcome"] for line in lines if line.get("event") == "request"}


# One gateway in two processes


async def test_both_serve_and_any_answers_for_all(shared: Served) -> None:
    first, second = await shared.pids()
    assert first != second
    assert "penstock: 2 workers, each with an equal part of the limits" in shared.said
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        assert (await shared.ask("POST", "/v1/chat/completions", CACHED))[0] == 200

    await shared.until(lambda states: all(state["middleware"]["cache"]["entries"] == 1 for state in states), ask)
    for _ in range(8):  # whoever answers
        page = (await shared.ask("GET", "/metrics"))[1]
        assert summed(page, "penstock_requests_total") == asked
        assert summed(page, "penstock_request_duration_seconds_count") == asked
        assert summed(page, "penstock_cache_entries") == 2
        assert summed(page, "penstock_build_info") == 1
        assert [summed(page, "penstock_worker_up", worker=number) for number in "01"] == [1, 1]
        assert all(summed(page, "process_resident_memory_bytes", worker=number) > 1e6 for number in "01")
    assert json.loads((await shared.ask("DELETE", "/admin/cache"))[1]) == {"deleted": 2}
    assert [state["middleware"]["cache"]["entries"] for state in await shared.workers()] == [0, 0]


async def test_a_refusal_is_one_workers_and_everybodys(shared: Served) -> None:
    status, body = await shared.ask("DELETE", "/admin/cache?nmae=x")
    assert status == 400
    assert json.loads(body)["error"]["param"] == "nmae"


async def test_limits_are_divided(shared: Served) -> None:
    """Five a minute are three for one worker and two for the other."""
    asked = [shared.ask("POST", "/v1/chat/completions", chat("demo/echo", stream=False, name="n")) for _ in range(40)]
    statuses = [status for status, _ in await asyncio.gather(*asked)]
    assert statuses.count(200) == 5
    assert statuses.count(429) == 35


# Deaths


async def test_a_killed_worker_has_a_successor_and_its_counts_stay(shared: Served) -> None:
    for _ in range(8):
        await shared.ask("POST", "/v1/chat/completions", CACHED)
    before = await shared.requests()
    first, second = await shared.pids()
    os.kill(first, signal.SIGKILL)
    assert (await shared.replaced(0, first))[1] == second
    assert await shared.requests() == before
    await shared.ask("POST", "/v1/chat/completions", CACHED)
    assert await shared.requests() == before + 1
    assert f"worker 0 (pid {first}) ended (signal 9); the next one starts now" in shared.said


async def test_a_worker_that_does_not_answer_is_reported_and_not_waited_for(shared: Served) -> None:
    before = await shared.requests()
    _, second = await shared.pids()
    os.kill(second, signal.SIGSTOP)
    page, cleared, state = await asyncio.gather(
        shared.answered("GET", "/metrics"), shared.answered("DELETE", "/admin/cache"), shared.answered("GET", "/readyz?verbose")
    )
    os.kill(second, signal.SIGCONT)
    assert summed(page, "penstock_requests_total") == before, "its counts are known from its last page"
    assert [summed(page, "penstock_worker_up", worker=number) for number in "01"] == [1, 0]
    assert json.loads(cleared)["workers_not_reached"] == [1]
    assert json.loads(state)["workers"][1] == {"worker": 1, "error": "does not answer"}


async def test_connections_that_wait_for_a_killed_worker_are_taken_by_its_successor(shared: Served) -> None:
    _, second = await shared.pids()
    os.kill(second, signal.SIGSTOP)
    asked = [asyncio.ensure_future(shared.ask("GET", "/healthz")) for _ in range(24)]
    _, waiting = await asyncio.wait(asked, timeout=0.3)
    assert waiting, "the kernel gave none of 24 connections to the worker that stands still"
    os.kill(second, signal.SIGKILL)
    async with asyncio.timeout(LONG):
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}


async def test_a_worker_that_is_told_to_end_drains_while_the_other_takes_what_comes(tmp_path: Path) -> None:
    async with streaming(tmp_path) as (running, held, clients):
        first, second = await running.pids()
        os.kill(first, signal.SIGTERM)
        states = await running.until(lambda states: states[0].get("status") == "draining")
        assert states[1]["status"] == "ok"
        for _ in range(16):
            assert (await running.ask("GET", "/readyz"))[0] == 200
        held.go.set()
        await finished(clients)
        assert (await running.replaced(0, first))[1] == second


async def test_workers_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    async with streaming(tmp_path) as (running, held, clients):
        pids = await running.pids()
        running.process.kill()
        held.go.set()
        await finished(clients)
        async with asyncio.timeout(LONG):
            while any(map(alive, pids)) or list(running.private.iterdir()):  # noqa: ASYNC110 - other processes' doing
                await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """It runs; whoever has ended and was not yet waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The end


async def test_streams_of_all_workers_finish_when_the_whole_group_is_told(tmp_path: Path) -> None:
    """As Ctrl-C and systemd do; for the workers it is the same whether they are told once or twice."""
    async with streaming(tmp_path) as (running, held, clients):
        os.killpg(running.process.pid, signal.SIGINT)
        await asyncio.to_thread(running.says, "draining 2 workers")
        for pid in await asyncio.to_thread(children, running.process.pid):
            os.kill(pid, signal.SIGTERM)
        held.go.set()
        await finished(clients)
        assert await running.ended() == 0
    assert outcomes(running.said) == {"completed"}
    assert "Traceback" not in running.said
    assert list(running.private.iterdir()) == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_streams_beyond_drain_timeout_end_as_draining(tmp_path: Path) -> None:
    async with streaming(tmp_path, allowed="100ms") as (running, _, clients):
        running.process.terminate()
        bodies = [await client.read_to_end() for client in clients]
        assert all(b'"code":"draining"' in body and b"[DONE]" not in body for body in bodies)
        assert await running.ended() == 0
    assert outcomes(running.said) == {"draining"}


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    async with streaming(tmp_path) as (running, _, _):
        running.process.terminate()
        await asyncio.to_thread(running.says, "draining 2 workers")
        running.process.terminate()
        assert await running.ended() == 0
    assert "Traceback" not in running.said


# What cannot be served


async def test_a_port_in_use_is_a_clear_message_and_exit_status_1(shared: Served, tmp_path: Path) -> None:
    """Also where the one that uses it shares it among workers of its own."""
    refused = Served(tmp_path, port=shared.port)
    assert await refused.ended() == 1
    assert refused.said == f"penstock: cannot listen on 127.0.0.1:{shared.port}: Address already in use\n"


class FailsToStart:
    async def start(self) -> None:
        raise RuntimeError("not today")

    async def __call__(self, call: Any, next: Any) -> Any: ...


async def test_a_worker_that_cannot_start_ends_it_all(tmp_path: Path) -> None:
    refused = Served(tmp_path, middleware="'tests.test_workers:FailsToStart'")
    assert await refused.ended() == 1
    assert "could not start (exit status 1)" in refused.said
    assert "not today" in refused.said
    assert list(refused.private.iterdir()) == []


SUPERVISED = """
import os, sys, time
import proxy.__main__, proxy.app
print([name for name in sys.modules if name.startswith("proxy.workers")])
from proxy.config import parse
from proxy.app import bound
from proxy.workers.listening import Ports
from proxy.workers.restarts import Restarts
from proxy.workers.supervisor import Supervisor

def work(config, place):
    os.write(place.beats, bytes([place.number]))
    {}

config = parse("server: {{port: 0, workers: 2}}", {{}})
sys.exit(Supervisor(config, Ports(lambda: bound(config), 2), lambda: Restarts((0, 0.01)), work, silent=0.3).run())
"""


def supervised(work: str) -> subprocess.CompletedProcess[str]:
    """A supervisor of workers that do only this."""
    return subprocess.run(
        [sys.executable, "-c", SUPERVISED.format(work)], cwd=ROOT, capture_output=True, text=True, timeout=LONG, check=False
    )


def test_a_worker_that_ends_again_and_again_is_given_up() -> None:
    done = supervised("time.sleep(0.2 * place.number); return 3")
    assert done.returncode == 1
    assert "worker 0 ended 3 times within 60 s (at last: exit status 3); giving up" in done.stderr
    assert "the next one starts in 0.01 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_stands_still_is_replaced() -> None:
    done = supervised("time.sleep(30)")
    assert done.stdout == "[]\n", "what one process does not need is not loaded before several are wanted"
    assert done.returncode == 1
    assert "has stood still for 0.3 s" in done.stderr
    assert "ended (signal 9); the next one starts now" in done.stderr


# Listening


@pytest.mark.parametrize("spreads", [True, False])
def test_every_worker_has_sockets_for_the_same_port(spreads: bool) -> None:
    config = parse("server: {port: 0, workers: 3, admin_listen: '127.0.0.1:0'}", {})
    ports = Ports(lambda: bound(config), 3, spreads=spreads)
    try:
        found = [ports.of(worker) for worker in range(3)]
        assert {sock.getsockname()[1] for main, _ in found for sock in main} == {ports.port}
        assert len({sock.getsockname() for _, admin in found for sock in admin}) == 1
        assert len({sock.fileno() for main, _ in found for sock in main}) == (3 if spreads else 1)
        for main, admin in found:
            main[0].listen()
            admin[0].listen()
        assert all(ports.of(worker)[0][0] is found[worker][0][0] for worker in range(3)), "a successor has the same queue"
        ports.close(1)
        with socket.create_connection(("127.0.0.1", ports.port), 5):
            pass
    finally:
        ports.close_all()


# config.yaml


class Alone:
    NEEDS_ONE_WORKER = "its streams are known to one process only"

    async def __call__(self, call: Any, next: Any) -> Any: ...


def test_what_needs_one_worker_is_refused_with_its_line_and_the_way_out() -> None:
    text = "server: {port: 0, workers: 2, prot: 1}\nmiddleware:\n  - alone\n"
    with pytest.raises(ConfigError) as caught:
        parse(text, {}, {"alone": Alone})
    reason = "its streams are known to one process only; set server.workers: 1, or leave it out"
    assert caught.value.faults[1] == f"middleware[0] (line 3): {reason}"


def test_with_one_worker_it_is_welcome() -> None:
    assert [spec.name for spec in parse("middleware: [alone]", {}, {"alone": Alone}).middleware] == ["alone"]


def test_check_says_how_many_workers_and_what_is_each_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("server: {workers: 2}\nproviders: {demo: {api: demo}}\n")
    assert command_line.main(["check", "-c", str(tmp_path / "config.yaml")]) == 0
    assert "workers: 2, each with an equal part of the limits" in capsys.readouterr().out
