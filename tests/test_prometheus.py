"""A real Prometheus scrapes the running gateway under load, and its answers to PromQL are the numbers that the load produced.

Debian's package `prometheus` has both programs that this needs; where they are not on PATH the tests are skipped.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.app import Gateway
from tests.support.gateway import CONFIG, RawClient, ask, chat, gateway, raw_request, until
from tests.support.upstream import Asked, Line, Upstream, stream, whole

SERVER, TOOL = shutil.which("prometheus"), shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    SERVER is None or TOOL is None, reason="needs prometheus and promtool on PATH (Debian: apt-get install prometheus)"
)

SCRAPES = """
global: {{scrape_interval: 1s, scrape_timeout: 900ms}}
scrape_configs:
  - job_name: penstock
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
METRICS = '  - metrics: {{max_names: 3, prices: {{"openai/m": {{input: 10, output: 100}}}}}}\n'
METRICS_CONFIG = CONFIG.replace("middleware:\n", "models:\n  fast: [openai/m]\nmiddleware:\n" + METRICS).replace(
    "idle_timeout: 5s", "idle_timeout: 60s"
)
ROUNDS = 10
SAID = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}\n\n'
LAST = (
    b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],'
    b' "usage": {"prompt_tokens": 100, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 10}}}\n\n'
)


async def answer(asked: Asked, line: Line) -> None:
    model = asked.json["model"]
    if model == "broken":
        return await whole(b'{"error": {"message": "oops"}}', 500)(asked, line)
    if model == "endless":
        await line.head()
        await line.chunk(SAID)
        return await line.forever()
    return await stream([SAID, LAST, b"data: [DONE]\n\n"])(asked, line)


class Prometheus:
    """A running server that scrapes one gateway every second."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/query"
        self._session = session

    async def query(self, promql: str) -> dict[str, float]:
        """The values of an instant vector by their labels, as `a=1,b=2` in the labels' order."""
        async with self._session.get(self._url, params={"query": promql}) as response:
            found: Any = await response.json()
        assert found["status"] == "success", found
        return {
            ",".join(f"{name}={value}" for name, value in sorted(one["metric"].items())): float(one["value"][1])
            for one in found["data"]["result"]
        }

    async def settled(self, promql: str, wanted: dict[str, float]) -> None:
        """Wait for a scrape to bring these values; fails with what there is instead after ten seconds."""
        found: dict[str, float] = {}
        for _ in range(200):
            try:
                found = await self.query(promql)
            except (aiohttp.ClientError, ValueError):
                found = {}
            if found == pytest.approx(wanted):
                return
            await asyncio.sleep(0.05)
        assert found == pytest.approx(wanted), promql


@asynccontextmanager
async def prometheus(running: Gateway, folder: Path) -> AsyncIterator[Prometheus]:
    assert SERVER is not None
    (folder / "prometheus.yml").write_text(SCRAPES.format(port=running.port), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        SERVER,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession() as session:
            yield Prometheus(port, session)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def load(port: int) -> None:
    """82 requests: 20 streams of each of three names, then 5 of a fourth, 10 errors of the provider's, 7 refusals."""
    names = [f"bot-{number % 3}" for number in range(60)]
    await asyncio.gather(*(ask(port, chat("fast", name=name)) for name in names))
    await asyncio.gather(
        *(ask(port, chat("fast", name="one-too-many")) for _ in range(5)),
        *(ask(port, chat("openai/broken", stream=False)) for _ in range(10)),
        *(ask(port, b"no JSON") for _ in range(7)),
    )


async def test_promql_returns_the_numbers_that_the_load_produced(tmp_path: Path) -> None:
    """A new server first looks for its targets after five seconds; after that it scrapes every second, all through the load."""
    async with (
        Upstream(answer) as upstream,
        gateway(upstream.url, METRICS_CONFIG) as running,
        prometheus(running, tmp_path) as server,
    ):
        await server.settled("count(up == 1)", {"": 1})
        async with RawClient(running.port) as held:
            await held.send(raw_request(chat("openai/endless")))
            await held.first_byte()
            for _ in range(ROUNDS):
                await load(running.port)
            await server.settled("sum(penstock_open_streams)", {"": 1})
            await server.settled("sum(penstock_requests_total)", {"": 82 * ROUNDS})
        await until(lambda: running.edge.open_calls == 0)
        await server.settled("sum(penstock_open_streams)", {"": 0})
        for promql, wanted in EXPECTED.items():
            await server.settled(promql, wanted)


EXPECTED: dict[str, dict[str, float]] = {
    "sum(penstock_requests_total)": {"": 82 * ROUNDS + 1},
    "sum by (outcome) (penstock_requests_total)": {
        "outcome=completed": 65 * ROUNDS,
        "outcome=upstream_error": 10 * ROUNDS,
        "outcome=refused": 7 * ROUNDS,
        "outcome=client_gone": 1,
    },
    "sum by (status) (penstock_requests_total)": {
        "status=200": 65 * ROUNDS + 1,
        "status=400": 7 * ROUNDS,
        "status=500": 10 * ROUNDS,
    },
    'sum by (name) (penstock_requests_total{route="fast"})': {
        "name=bot-0": 20 * ROUNDS,
        "name=bot-1": 20 * ROUNDS,
        "name=bot-2": 20 * ROUNDS,
        "name=other": 5 * ROUNDS,
    },
    "sum by (target) (penstock_requests_total)": {
        "target=openai/m": 65 * ROUNDS,
        "target=openai/other": 10 * ROUNDS,
        "target=openai/endless": 1,
        "target=other": 7 * ROUNDS,
    },
    "sum by (type) (penstock_tokens_total)": {
        "type=input": 6500 * ROUNDS,
        "type=output": 3250 * ROUNDS,
        "type=cached": 650 * ROUNDS,
    },
    "sum(penstock_cost_usd_total)": {"": ROUNDS * 65 * (100 * 10 + 50 * 100) / 1e6},
    "sum by (gen_ai_request_model) (gen_ai_client_operation_duration_seconds_count)": {
        "gen_ai_request_model=m": 65 * ROUNDS,
        "gen_ai_request_model=other": 10 * ROUNDS,
        "gen_ai_request_model=endless": 1,
    },
    'sum by (error_type) (gen_ai_client_operation_duration_seconds_count{error_type!=""})': {
        "error_type=upstream_error": 10 * ROUNDS,
        "error_type=client_gone": 1,
    },
    'sum(gen_ai_client_operation_time_to_first_chunk_seconds_bucket{le="120.0"})': {"": 65 * ROUNDS + 1},
    "sum(gen_ai_client_token_usage_sum)": {"": 65 * ROUNDS * 150},
    "sum(penstock_longest_gap_seconds_count)": {"": 65 * ROUNDS + 1},
    'histogram_quantile(0.99, sum by (le) (penstock_request_duration_seconds_bucket{route="fast"})) < bool 10': {"": 1},
    "count(penstock_build_info)": {"": 1},
    "count(process_resident_memory_bytes > 1e6)": {"": 1},
}


async def test_promtool_finds_nothing_to_say_about_the_page(tmp_path: Path) -> None:
    assert TOOL is not None
    async with Upstream(answer) as upstream, gateway(upstream.url, METRICS_CONFIG) as running:
        await load(running.port)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{running.port}/metrics") as response,
        ):
            page = await response.read()
    assert page.count(b"\n") > 100
    process = await asyncio.create_subprocess_exec(
        TOOL, "check", "metrics", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate(page)
    assert (said.decode(), process.returncode) == ("", 0)
