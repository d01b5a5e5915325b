"""The bare relay: aiohttp, uvloop and orjson with no features; one decode and one encode per chunk.

    python -m bench.relay PORT PROVIDER_PORT

What it costs is what this stack costs before it does anything, so a gateway on it is compared with that.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import orjson
import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

PATH = "/v1/chat/completions"
PROVIDER = web.AppKey("provider", str)
SESSION = web.AppKey("session", ClientSession)
JSON = {"Content-Type": "application/json"}


async def relay(request: web.Request) -> web.StreamResponse:
    asked = orjson.loads(await request.read())
    async with request.app[SESSION].post(request.app[PROVIDER], data=orjson.dumps(asked), headers=JSON) as upstream:
        if not asked.get("stream"):
            return web.Response(body=orjson.dumps(orjson.loads(await upstream.read())), content_type="application/json")
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        rest = b""
        async for data in upstream.content.iter_any():
            *events, rest = (rest + data).split(b"\n\n")
            if events:
                await reply.write(b"".join(renamed(event, asked["model"]) for event in events))
        await reply.write_eof()
        return reply


def renamed(event: bytes, model: str) -> bytes:
    """The event with the model's name as the client gave it."""
    if event == b"data: [DONE]":
        return b"data: [DONE]\n\n"
    chunk = orjson.loads(event[6:])
    chunk["model"] = model
    return b"data: %b\n\n" % orjson.dumps(chunk)


async def application(provider_port: int) -> web.Application:
    app = web.Application(client_max_size=2**25)
    app[PROVIDER] = f"http://127.0.0.1:{provider_port}{PATH}"

    async def session(app: web.Application) -> AsyncIterator[None]:
        connector, timeout = TCPConnector(limit=0), ClientTimeout(None)
        async with ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as app[SESSION]:
            yield

    app.cleanup_ctx.append(session)
    app.router.add_post(PATH, relay)
    return app


if __name__ == "__main__":
    web.run_app(
        application(int(sys.argv[2])),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop=uvloop.new_event_loop(),
        access_log=None,
        backlog=4096,
        handler_cancellation=True,
        print=None,
    )
