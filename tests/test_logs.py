"""Log lines: gathered for a moment, written whole, errors at once, and JSON whatever stands in them."""

from __future__ import annotations

import asyncio
import atexit
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from proxy import logs
from tests.support.gateway import until


class File(io.BytesIO):
    """Counts writes, and remembers what was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.flushed = b""

    def write(self, data: Any) -> int:
        self.writes += 1
        return super().write(data)

    def flush(self) -> None:
        super().flush()
        self.flushed = self.getvalue()


@pytest.fixture
def file() -> File:
    return File()


@pytest.fixture
def lines(file: File) -> Iterator[logs.Lines]:
    made = logs.Lines(file)
    yield made
    atexit.unregister(made.flush)


async def test_lines_of_one_moment_leave_in_one_write(lines: logs.Lines, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    later: list[tuple[float, Any]] = []
    monkeypatch.setattr(loop, "call_later", lambda seconds, callback: later.append((seconds, callback)))
    lines.info(b"a")
    lines.info(b"b")
    assert file.writes == 0
    ((seconds, flush),) = later
    assert 0 < seconds <= 1
    flush()
    assert (file.flushed, file.writes) == (b"a\nb\n", 1)
    lines.info(b"c")
    assert len(later) == 2, "the next moment has its own write"


async def test_lines_are_written_without_anybody_asking(lines: logs.Lines, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.0)
    lines.info(b"a")
    await until(lambda: file.flushed)
    assert file.flushed == b"a\n"


@pytest.mark.parametrize("level", ["error", "warning", "critical", "exception"])
async def test_an_error_is_written_at_once_behind_what_waited(lines: logs.Lines, file: File, level: str) -> None:
    lines.info(b"a")
    getattr(lines, level)(b"b")
    assert (file.flushed, file.writes) == (b"a\nb\n", 1)


def test_without_an_event_loop_nothing_waits(lines: logs.Lines, file: File) -> None:
    lines.info(b"a")
    lines.info(b"b")
    assert file.flushed == b"a\nb\n"


async def test_what_waits_is_written_when_the_process_ends(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    lines = logs.Lines(file)
    lines.info(b"a")
    assert file.writes == 0
    for callback in registered:
        callback()
    assert file.flushed == b"a\n"
    lines.flush()
    assert file.writes == 1, "nothing is written twice"


class Stderr:
    """Stands in for sys.stderr."""

    def __init__(self, tty: bool) -> None:
        self.buffer = File()
        self.tty = tty
        self.text = ""

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """configure() against a stand-in for stderr; everything is put back afterwards."""
    before = structlog.get_config()
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def configure(*, tty: bool) -> Stderr:
        stderr = Stderr(tty)
        monkeypatch.setattr(sys, "stderr", stderr)
        structlog.reset_defaults()
        logs.configure()
        return stderr

    yield configure
    structlog.reset_defaults()
    structlog.configure(**before)


def test_a_machine_gets_one_json_object_per_line(configured: Any) -> None:
    stderr = configured(tty=False)
    structlog.get_logger("x").info("request", name='q"\n\\é\u2028', odd={1, 2}.__class__, count=3, nothing=None)
    (line,) = stderr.buffer.flushed.splitlines()
    found = json.loads(line)
    assert (found["event"], found["level"], found["name"], found["count"]) == ("request", "info", 'q"\n\\é\u2028', 3)
    assert found["time"].endswith("+00:00")


@pytest.mark.parametrize("name", ["bot", "\ud800"])
def test_a_whole_line_is_the_one_that_info_writes(configured: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, but for a text that is no Unicode, where only the spaces differ."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_042_999)
    stderr = configured(tty=False)
    log = structlog.get_logger("x").bind()
    log.info("request", name=name, count=[1, {"a": None}])
    log.whole({"name": name, "count": [1, {"a": None}], "event": "request"})
    one, other = (line.replace(b" ", b"") for line in stderr.buffer.flushed.splitlines())
    assert one == other
    assert list(json.loads(one)) == ["time", "level", "name", "count", "event"]
    assert json.loads(one)["time"] == "2023-11-14T22:13:20.000042+00:00"


def test_each_line_has_the_time_at_which_it_was_logged(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that is kept for a second is not kept for longer, and comes back when the clock is set back."""
    times = [999_999_000, 1_000_000_000, 61_500_000_000, 1_000_000_000]
    now = iter(times)
    monkeypatch.setattr(time, "time_ns", lambda: next(now))
    stderr: Stderr = configured(tty=False)
    for _ in times:
        structlog.get_logger("x").info("request")
    found = [json.loads(line)["time"][10:] for line in stderr.buffer.flushed.splitlines()]
    assert found == ["T00:00:00.999999+00:00", "T00:00:01.000000+00:00", "T00:01:01.500000+00:00", "T00:00:01.000000+00:00"]


def test_an_exception_is_one_line_too(configured: Any) -> None:
    stderr = configured(tty=False)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("x").exception("relay failed")
    (line,) = stderr.buffer.flushed.splitlines()
    assert json.loads(line)["level"] in ("error", "exception")
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_text_that_is_no_unicode_costs_no_line(configured: Any) -> None:
    """A lone surrogate can come out of a client's header or JSON; the log may not fail the request."""
    stderr = configured(tty=False)
    structlog.get_logger("x").info("request", name="\ud800")
    assert json.loads(stderr.buffer.flushed)["event"] == "request"


def test_details_below_info_are_not_logged(configured: Any) -> None:
    stderr = configured(tty=False)
    structlog.get_logger("x").debug("detail")
    assert stderr.buffer.flushed == b""


def test_a_person_gets_text(configured: Any) -> None:
    stderr = configured(tty=True)
    structlog.get_logger("x").info("request", model="m")
    assert "request" in stderr.text
    with pytest.raises(ValueError, match=r"Expecting value|Extra data"):
        json.loads(stderr.text)
