"""The command line: exit statuses, what goes to which stream, and no tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import proxy.__main__ as command_line
from proxy import __version__
from proxy.config import Config

ROOT = Path(__file__).parent.parent
GOOD = """\
server: {port: 8123}
default_provider: demo
providers:
  demo: {api: demo}
  groq: {api: openai, base_url: "https://api.groq.com/openai/v1", api_key: "${PENSTOCK_TEST_UNSET_KEY}"}
models: {fast: [demo/demo, groq/llama]}
middleware: [tracking]
"""
BAD = "server:\n  prot: 1\nmiddleware:\n  - trackin\n"


def tracking() -> None: ...


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and a table of middleware that is not the shipped one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "known_middleware", lambda: {"tracking": tracking})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that `serve` ran with, instead of a gateway."""
    found: list[Config] = []

    def run(config: Config, file: object = None) -> int:
        found.append(config)
        return 7

    app = types.ModuleType("proxy.app")
    app.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "proxy.app", app)
    return found


def test_check_summarizes_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    assert command_line.main(["check", "-c", "c.yaml"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "listens on 127.0.0.1:8123",
        "providers enabled: demo",
        "provider 'groq' is disabled: set PENSTOCK_TEST_UNSET_KEY",
        "default provider: demo",
        "route fast: demo/demo, groq/llama",
        "middleware: tracking",
    ]
    assert err == ""


@pytest.mark.parametrize("command", ["check", "serve"])
def test_every_fault_goes_to_stderr_and_the_exit_status_is_1(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], served: list[Config]
) -> None:
    (tmp_path / "config.yaml").write_text(BAD)
    assert command_line.main([command]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["server.prot (line 2)", "middleware[0] (line 4)"]
    assert served == []


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_missing_file_is_said_plainly(command: str, capsys: pytest.CaptureFixture[str], served: list[Config]) -> None:
    assert command_line.main([command, "-c", "nowhere.yaml"]) == 1
    assert capsys.readouterr().err == "nowhere.yaml: No such file or directory\n"
    assert served == []


def test_serve_without_any_file_serves_the_demo_and_says_so(capsys: pytest.CaptureFixture[str], served: list[Config]) -> None:
    assert command_line.main(["serve"]) == 7
    assert "using the built-in demo provider only" in capsys.readouterr().err
    assert list(served[0].providers) == ["demo"]
    assert served[0].default_provider == "demo"
    assert [spec.name for spec in served[0].middleware] == ["tracking"]


def test_serve_takes_config_yaml_of_the_working_directory(tmp_path: Path, served: list[Config]) -> None:
    (tmp_path / "config.yaml").write_text(GOOD)
    assert command_line.main(["serve"]) == 7
    assert served[0].server.port == 8123


def test_host_and_port_override_the_file(tmp_path: Path, served: list[Config]) -> None:
    (tmp_path / "config.yaml").write_text(GOOD)
    command_line.main(["serve", "--host", "::1", "--port", "0"])
    assert (served[0].server.host, served[0].server.port) == ("::1", 0)


def test_overrides_are_checked_like_the_file(capsys: pytest.CaptureFixture[str], served: list[Config]) -> None:
    assert command_line.main(["serve", "--host", "0.0.0.0", "--port", "99999", "--workers", "0"]) == 1
    err = capsys.readouterr().err
    assert "server.host (command line): '0.0.0.0' is reachable beyond this machine" in err
    assert "server.port (command line): must be from 0 to 65535" in err
    assert "server.workers (command line): must be from 1 to 64" in err
    assert served == []


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["schema"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["properties"]) == {"server", "default_provider", "providers", "models", "data_dir", "store", "middleware"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"penstock {__version__}\n"


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([])
    assert caught.value.code == 2
    assert "usage: penstock" in capsys.readouterr().err


def test_the_module_runs_and_checks_the_shipped_example() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "check", "-c", "config.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "middleware: metrics, tracking, cache, fallback, retry, timeout" in done.stdout
    assert "providers enabled: demo, " in done.stdout
