"""A line that is cut: a TCP relay that lets a random number of bytes of an answer through and then ends it, by FIN or by RST."""

from __future__ import annotations

import asyncio
import random
import socket
import struct


class Scissors:
    """`async with Scissors(port, cuts, seed) as line`: forwards `line.port` to `port`, and cuts `cuts` answers."""

    def __init__(self, port: int, cuts: int, seed: int, most: int = 3000) -> None:
        self._to = port
        self._random = random.Random(seed)
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = cuts

    async def __aenter__(self) -> Scissors:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        asked = await reader.read(2**16)
        ahead, behind = await asyncio.open_connection("127.0.0.1", self._to)
        behind.write(asked)
        there = asyncio.ensure_future(self._forward(reader, behind))
        try:
            await self._back(ahead, writer, whole_head=asked.startswith(b"POST"))
        except ConnectionError:
            pass
        finally:
            there.cancel()
            behind.close()
            writer.close()
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    async def _back(self, ahead: asyncio.StreamReader, writer: asyncio.StreamWriter, *, whole_head: bool) -> None:
        if whole_head:
            writer.write(await ahead.readuntil(b"\r\n\r\n"))
        left = self._random.randrange(self._most) if self.cuts else None
        while data := await ahead.read(2**16):
            if left is not None and len(data) >= left:
                writer.write(data[:left])
                self._cut(writer)
                return
            writer.write(data)
            left = None if left is None else left - len(data)

    def _cut(self, writer: asyncio.StreamWriter) -> None:
        self.cuts -= 1
        if self._random.random() < 0.3:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
