"""Extraction in a process of its own: the same result, within bounds, and nothing is left behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from asyncio.subprocess import Process
from typing import Any

import pytest

from middleware.retrieval.text import ExtractionError, Limits, extract
from middleware.retrieval.text import apart as module
from middleware.retrieval.text.apart import extract_apart, passages_apart
from middleware.retrieval.text.passages import passages
from tests.support.documents import bomb, pdf, word


def full(made: Any) -> None:
    made.add_heading("Title é", 1)
    made.add_paragraph("Text. " * 200)


WORD = word(full)
FILES = {
    "x.pdf": pdf(["Page one.", "Page two."]),
    "x.docx": WORD,
    "x.html": b"<h1>A</h1><p>x<table><tr><td>1<td>2</table>",
    "x.md": "# Ä\n\nText.\n\n```\ncode\n```\n".encode(),
    "x.csv": b"a,b\n1,2\n",
}


class Started(list[Process]):
    """The processes that were started. one: set when there is one. environment: of the last one."""

    def __init__(self) -> None:
        self.one = asyncio.Event()
        self.environment: dict[str, str] = {}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    processes = Started()
    start = asyncio.create_subprocess_exec

    async def starting(*words: str, env: dict[str, str], **options: Any) -> Process:
        processes.environment = env
        processes.append(await start(*words, env=env, **options))
        processes.one.set()
        return processes[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", starting)
    return processes


async def refusal(content: bytes, name: str, **limits: Any) -> str:
    with pytest.raises(ExtractionError) as caught:
        await extract_apart(content, name, "", Limits(**limits))
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
async def test_what_comes_from_apart_is_what_comes_from_here(name: str) -> None:
    assert await extract_apart(FILES[name], name) == extract(FILES[name], name)


async def test_passages_are_cut_there_too() -> None:
    found = await passages_apart(WORD, "x.docx", size=40, overlap=8)
    assert found == passages(extract(WORD), 40, 8)
    assert len(found) > 5


async def test_an_error_is_the_same_sentence() -> None:
    assert await refusal(b"%PDF-1.4 broken", "x.pdf") == "The PDF is broken or incomplete."
    assert await refusal(b"12345", "x.txt", bytes=4) == "The file has 5 bytes; the most that is taken is 4."


async def test_a_file_that_takes_too_long_is_refused_and_its_process_is_gone(started: Started) -> None:
    assert await refusal(b"x", "x.txt", seconds=0.0) == "The file takes longer than 0 seconds to read."
    assert started[0].returncode is not None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound the memory of a process")
async def test_a_file_that_takes_too_much_memory_is_refused() -> None:
    told = "The file takes more memory to read than is given to one file."
    assert await refusal(b"[" + b"[1],[1]," * 1_500_000 + b"1]", "x.json", memory=200 * 2**20) == told
    assert await refusal(pdf(["x"], bomb(70_000_000)), "x.pdf", memory=150 * 2**20) == told


async def test_a_cancelled_call_leaves_no_process(started: Started) -> None:
    task = asyncio.create_task(extract_apart(b"[" + b"[1],[1]," * 3_000_000 + b"1]", "x.json"))
    await started.one.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert started[0].returncode == -9


async def test_a_reader_that_dies_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODULE", "no.such.module")
    assert await refusal(b"x" * 1_000_000, "x.txt") == "The file cannot be read: it stopped its reader (1)."


async def test_no_secret_of_the_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch, started: Started) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    await extract_apart(b"x", "x.txt")
    assert "PYTHONPATH" in started.environment
    assert "sk-secret" not in started.environment.values()


def test_the_libraries_that_read_formats_are_not_imported_here() -> None:
    script = (
        "import asyncio, sys\n"
        "from middleware.retrieval.text.apart import passages_apart\n"
        "asyncio.run(passages_apart(b'<p>x', 'x.html'))\n"
        "print({'bs4', 'lxml', 'pypdf', 'docx', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"
