"""The gateways that ours is compared with: where they are found, how they are installed, how they are started.

Strategy: a peer is looked for on PATH and under a tools directory, which `--install` fills from the public registries. It is
started with what its own documentation gives for speed: one process or worker, no access log, kept-alive connections.
The one rule: one that is not there is left out and named, never replaced by a figure from elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.contestants import Contestant, Dialect, Place, free_port
from bench.job import KEY

NGINX = """
%(user)s
worker_processes 1;
daemon off;
pid %(scratch)s/nginx.pid;
error_log %(scratch)s/nginx.error warn;
worker_rlimit_nofile 20000;
events { worker_connections 19000; }
http {
  access_log off;
  client_body_temp_path %(scratch)s/nginx-body;
  client_body_buffer_size 256k;
  client_max_body_size 32m;
  keepalive_requests 100000000;
  types {}
  default_type text/event-stream;
  upstream provider { server 127.0.0.1:%(provider)d; keepalive 4096; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:%(port)d backlog=4096;
    location / {
      proxy_pass http://provider;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }
    location = /hit.txt { root %(scratch)s; }
  }
}
"""
LITELLM = """
model_list:
  - {model_name: "anthropic/*", litellm_params: {model: "anthropic/*", api_base: "http://127.0.0.1:%(port)d", api_key: x}}
  - {model_name: "*", litellm_params: {model: "openai/*", api_base: "http://127.0.0.1:%(port)d/v1", api_key: x}}
litellm_settings: {telemetry: false, set_verbose: false}
"""
# Left to itself, npm takes a later @hono/node-server, with which every stream fails on Node 20 ("immutable" headers).
PORTKEY = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": "1.15.2"},
    "overrides": {"@hono/node-server": "1.13.5"},
}


def nginx(place: Place) -> Contestant | None:
    """A plain reverse proxy, which parses nothing: the floor."""
    if not (program := _found("nginx", place, "nginx/sbin/nginx", "/usr/sbin/nginx")):
        return None
    port, config = free_port(), place.scratch / f"nginx-{free_port()}.conf"
    user = "user root;" if os.geteuid() == 0 else ""  # else its worker could not read the scratch directory
    config.write_text(NGINX % {"user": user, "scratch": place.scratch, "provider": place.provider, "port": port})
    version = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr.strip().rpartition("/")[2]
    return Contestant("nginx", port, (program, "-c", str(config), "-e", str(place.scratch / "nginx.start")), version)


def smg(place: Place) -> Contestant | None:
    """The SGLang Model Gateway (Rust)."""
    if not (program := _found("smg", place, "smg/bin/smg")):
        return None
    port = free_port()
    options = (
        f"launch --host 127.0.0.1 --port {port} --worker-urls http://127.0.0.1:{place.provider} --backend openai "
        f"--policy round_robin --disable-circuit-breaker --log-level error --prometheus-port {free_port()}"
    )
    return Contestant("smg", port, (program, *options.split()), _installed(program, "sglang-router"))


def portkey(place: Place) -> Contestant | None:
    """Portkey's gateway (Node)."""
    package = place.tools / "portkey/node_modules/@portkey-ai/gateway"
    node = shutil.which("node")
    if not node or not package.exists():
        return None
    port = free_port()
    host = f"http://127.0.0.1:{place.provider}/v1"
    dialects = {
        name: Dialect(headers={"x-portkey-provider": name, "x-portkey-custom-host": host}) for name in ("openai", "anthropic")
    }
    version = json.loads((package / "package.json").read_text())["version"]
    runtime = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    command = (node, str(package / "build/start-server.js"), "--headless", f"--port={port}")
    return Contestant("portkey", port, command, f"{version}, Node {runtime}", dialects)


def litellm(place: Place) -> Contestant | None:
    """LiteLLM's proxy (Python)."""
    if not (program := _found("litellm", place, "litellm/bin/litellm")):
        return None
    port, config = free_port(), place.scratch / "litellm.yaml"
    config.write_text(LITELLM % {"port": place.provider})
    command = (program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    dialects = {"openai": Dialect(), "anthropic": Dialect("anthropic/")}
    # It does not start without a key of its own, so it alone checks one.
    environment = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return Contestant("litellm", port, command, _installed(program, "litellm"), dialects, environment)


PEERS: Mapping[str, Callable[[Place], Contestant | None]] = {"nginx": nginx, "smg": smg, "portkey": portkey, "litellm": litellm}


def install(tools: Path, names: list[str]) -> None:
    """Fetch the peers from their registries into `tools`, each into a folder of its own."""
    tools.mkdir(parents=True, exist_ok=True)
    for name, package in (("smg", "sglang-router"), ("litellm", "litellm[proxy]")):
        if name in names:
            subprocess.run([sys.executable, "-m", "venv", str(tools / name)], check=True)
            subprocess.run([str(tools / name / "bin/pip"), "install", "--quiet", package], check=True)
    if "portkey" in names:
        if npm := shutil.which("npm"):
            (tools / "portkey").mkdir(exist_ok=True)
            (tools / "portkey/package.json").write_text(json.dumps(PORTKEY))
            subprocess.run([npm, "install", "--no-audit", "--no-fund"], cwd=tools / "portkey", check=True)
        else:
            print("portkey: needs Node and npm on PATH")
    if "nginx" in names and not _found("nginx", Place(0, tools, tools), "nginx/sbin/nginx", "/usr/sbin/nginx"):
        print("nginx: install it with the system's package manager, e.g. apt-get install nginx-light")


def _found(name: str, place: Place, inside: str, *further: str) -> str | None:
    candidates = [str(place.tools / inside), shutil.which(name), *further]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def _installed(program: str, package: str) -> str:
    """The version of a package in the environment that a program belongs to."""
    python = Path(program).resolve().parent / "python"
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False).stdout.strip() or "unknown"
