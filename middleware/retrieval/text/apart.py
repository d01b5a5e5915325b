"""Extraction in a process of its own: a file that hangs, grows or crashes its reader does it there, and the gateway goes on.

Strategy: a fresh interpreter gets one question on its input (a line of JSON, then the file) and gives one answer in JSON. It has
no environment to speak of, so no keys; its memory and its time are bounded by the system as well as from here. It is killed when
the time is over, or when whoever waits for it is cancelled. The libraries that read formats are only ever imported there.
The one rule: no process outlives the call that started it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import asdict
from typing import Any

import orjson

from middleware.retrieval.text.document import Block, Document, ExtractionError, Limits
from middleware.retrieval.text.passages import OVERLAP, SIZE
from proxy.store import Passage

MODULE = "middleware.retrieval.text"
# What an interpreter needs to be found and to start; nothing that may hold a secret.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "TMPDIR")

Json = dict[str, Any]


async def extract_apart(content: bytes, name: str = "", media_type: str = "", limits: Limits = Limits()) -> Document:  # noqa: B008
    """What a file says. Raises ExtractionError, also for a file that takes too long or too much memory."""
    answer = await _ask(content, limits, {"name": name, "media_type": media_type})
    return Document(answer["kind"], tuple(_block(block) for block in answer["blocks"]))


async def passages_apart(
    content: bytes,
    name: str = "",
    media_type: str = "",
    limits: Limits = Limits(),  # noqa: B008 - frozen
    *,
    size: int = SIZE,
    overlap: int = OVERLAP,
) -> list[Passage]:
    """The passages of a file, cut there too: of a large one, that is seconds of work. size, overlap: in estimated tokens."""
    answer = await _ask(content, limits, {"name": name, "media_type": media_type, "size": size, "overlap": overlap})
    return [Passage(number, text, heading, page) for number, (text, heading, page) in enumerate(answer["passages"])]


def _block(value: list[Any]) -> Block:
    text, heading, page, shape = value
    return Block(text, tuple(heading), page, shape)


async def _ask(content: bytes, limits: Limits, question: Json) -> Json:
    if len(content) > limits.bytes:  # what is refused anyway is not sent
        raise ExtractionError(f"The file has {len(content):,} bytes; the most that is taken is {limits.bytes:,}.")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", MODULE, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=_environment(), start_new_session=True
    )  # fmt: skip
    try:
        said = orjson.dumps({**question, "limits": asdict(limits)}) + b"\n"
        async with asyncio.timeout(limits.seconds):
            output, _ = await process.communicate(said + content)
    except TimeoutError:
        raise ExtractionError(f"The file takes longer than {limits.seconds:g} seconds to read.") from None
    finally:
        await _end(process)
    return _answer(output, process.returncode)


async def _end(process: Process) -> None:
    """Whatever happened, it is gone when this returns."""
    if process.returncode is None:
        process.kill()
        await asyncio.shield(process.communicate())


def _answer(output: bytes, code: int | None) -> Json:
    try:
        answer: Json = orjson.loads(output)
    except orjson.JSONDecodeError:
        raise ExtractionError(f"The file cannot be read: it stopped its reader ({code}).") from None
    if "error" in answer:
        raise ExtractionError(answer["error"])
    return answer


def _environment() -> dict[str, str]:
    """Modules are found where this process finds them, however it was started."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "PYTHONUTF8": "1"}
