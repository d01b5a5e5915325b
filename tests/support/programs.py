"""Other programs that a test runs to their end."""

from __future__ import annotations

import asyncio
from typing import Any


async def output(*command: str, **options: Any) -> str:
    """What it prints. It has 30 s, and must not fail."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, **options)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode == 0, out.decode() + err.decode()
    return out.decode()
