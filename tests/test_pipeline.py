"""The onion and its traps: order, ownership, and how often a reply ends.

Strategy: middleware of the test's own inside a real gateway, between a real client and a real provider; units where the claim is
about one object. Each of design.md's known traps of ownership and cancellation is a test here.
The one rule: what a wrapper may rely on holds however the stream ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from proxy.app import Gateway
from proxy.call import Call
from proxy.errors import Outcome, UpstreamCut, UpstreamError
from proxy.pipeline import Handler, Middleware, compose
from proxy.reply import Batch, Head, Reply, Trailer
from tests.support.decoding import make_call
from tests.support.gateway import ask, chat, gateway, until
from tests.support.rawclient import RawClient, connected
from tests.support.upstream import Asked, Line, Upstream, stream, whole

CONFIG = """
server: {{port: 0, drain_timeout: 50ms}}
providers:
  openai: {{api: openai, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
  anthropic: {{api: anthropic, base_url: "{url}/v1", api_key: "sk-upstream-0123456789"}}
middleware:
  - tracking
  - own
  - timeout: {{connect_timeout: 30s, first_chunk_timeout: 30s, idle_timeout: {idle}, call_timeout: 30s}}
"""
WORD = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": null}]}\n\n'
FINISH = b'data: {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": {"message": "no more", "type": "server_error", "code": null}}\n\n'
WHOLE = (
    b'{"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, '
    b'"message": {"role": "assistant", "content": "word"}, "finish_reason": "stop"}]}'
)

Answers = Callable[[Asked, Line], Awaitable[None]]


@asynccontextmanager
async def onion(own: Middleware, answer: Answers, idle: str = "30s") -> AsyncIterator[tuple[Gateway, Upstream]]:
    """A gateway with `own` among its middleware, before a provider that gives `answer`."""

    def made() -> Middleware:
        return own

    async with Upstream(answer) as upstream, gateway(upstream.url, CONFIG, table={"own": made}, idle=idle) as running:
        yield running, upstream


def wrapping(wrap: Callable[[AsyncIterator[Batch]], AsyncIterator[Batch]]) -> Middleware:
    """A middleware on the chunk path."""

    async def own(call: Call, next: Handler) -> Reply:
        reply = await next(call)
        return replace(reply, chunks=wrap(reply.chunks))

    return own


class Noted:
    """A wrapper as design.md wants one, that notes what it lived through."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def __call__(self, chunks: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        try:
            async with aclosing(chunks):  # type: ignore[type-var]
                async for batch in chunks:
                    self.events.append("final" if batch.final else "batch")
                    yield batch
            self.events.append("stored")
        finally:
            self.events.append("closed")


async def held(asked: Asked, line: Line) -> None:
    """One word, then silence."""
    await line.head()
    await line.chunk(WORD)
    await line.forever()


async def cut(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(WORD)
    line.hang_up()


# Composing.


def replies(target: str = "inner") -> Handler:
    async def handler(call: Call) -> Reply:
        return Reply(Head(target), _none(), Trailer())

    return handler


async def _none() -> AsyncIterator[Batch]:
    batches: list[Batch] = []
    for batch in batches:
        yield batch


async def test_the_first_middleware_is_the_outermost() -> None:
    seen: list[str] = []

    def layer(name: str) -> Middleware:
        async def own(call: Call, next: Handler) -> Reply:
            seen.append(f"{name} in")
            reply = await next(replace(call, name=f"{call.name or ''}{name}"))
            seen.append(f"{name} out")
            return replace(reply, head=replace(reply.head, target=f"{reply.head.target}{name}"))

        return own

    named: list[str | None] = []

    async def innermost(call: Call) -> Reply:
        named.append(call.name)
        return await replies("")(call)

    reply = await compose([layer("a"), layer("b"), layer("c")], innermost)(make_call())
    assert seen == ["a in", "b in", "c in", "c out", "b out", "a out"]
    assert named == ["abc"], "facts travel inward"
    assert reply.head.target == "cba", "and outward"


async def test_without_middleware_the_innermost_is_all_there_is() -> None:
    assert (await compose([], replies("alone"))(make_call())).head.target == "alone"


async def test_a_middleware_may_ask_again_after_an_error() -> None:
    """`next` is a plain function: errors before the first chunk are exceptions, and a retry is a loop."""
    asked: list[str | None] = []

    async def innermost(call: Call) -> Reply:
        asked.append(call.name)
        if len(asked) == 1:
            raise UpstreamError("once")
        return await replies()(call)

    async def again(call: Call, next: Handler) -> Reply:
        try:
            return await next(replace(call, name="first"))
        except UpstreamError:
            return await next(replace(call, name="second"))

    assert (await compose([again], innermost)(make_call())).head.target == "inner"
    assert asked == ["first", "second"]


# The trailer.


def test_the_first_outcome_counts() -> None:
    trailer, seen = Trailer(), []
    trailer.on_end(lambda ended: seen.append(ended.outcome))
    error = UpstreamCut("cut")
    trailer.end(Outcome.UPSTREAM_CUT, error)
    trailer.end(Outcome.COMPLETED)
    assert (trailer.outcome, trailer.error) == (Outcome.UPSTREAM_CUT, error)
    assert seen == [Outcome.UPSTREAM_CUT]


def test_a_callback_that_comes_after_the_end_runs_at_once_and_once() -> None:
    trailer, seen = Trailer(), []
    trailer.end(Outcome.COMPLETED)
    trailer.on_end(lambda ended: seen.append(ended.outcome))
    trailer.end(Outcome.CANCELLED)
    assert seen == [Outcome.COMPLETED]


def test_a_callback_that_fails_keeps_no_other_from_running() -> None:
    """A broken metric must not cost the log line."""
    trailer, seen = Trailer(), []

    def broken(ended: Trailer) -> None:
        raise RuntimeError("broken")

    trailer.on_end(broken)
    trailer.on_end(lambda ended: seen.append(ended.outcome))
    with suppress(RuntimeError):
        trailer.end(Outcome.COMPLETED)
    assert seen == [Outcome.COMPLETED]


async def test_a_callback_that_fails_adds_nothing_behind_the_end_of_a_stream() -> None:
    def broken(ended: Trailer) -> None:
        raise RuntimeError("broken")

    async def own(call: Call, next: Handler) -> Reply:
        reply = await next(call)
        reply.trailer.on_end(broken)
        return reply

    with capture_logs() as logs:
        async with onion(own, stream([WORD, FINISH, DONE])) as (running, _):
            answer = await ask(running.port, chat())
    assert answer.done
    assert answer.clean
    assert [line["outcome"] for line in logs if line["event"] == "request"] == ["completed"]


def test_the_sockets_are_closed_before_anybody_hears_of_the_end() -> None:
    trailer, seen = Trailer(), []
    trailer.own(lambda: seen.append("closed"))
    trailer.on_end(lambda ended: seen.append("told"))
    trailer.end(Outcome.CLIENT_GONE)
    trailer.release()
    assert seen == ["closed", "told"]


# Ownership.


async def test_a_wrapper_is_closed_when_the_client_leaves() -> None:
    noted = Noted()
    async with onion(wrapping(noted), held) as (running, upstream):
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b"word ")
            client.leave("fin")
            await until(lambda: "closed" in noted.events, 1.0)
        await asyncio.wait_for(upstream.lines[0].closed.wait(), 1.0)
        await until(lambda: running.edge.open_calls == 0)
    assert noted.events == ["batch", "closed"]


async def test_of_wrappers_in_each_other_each_is_closed() -> None:
    """`async for` over a generator does not close it when the outer one is; the inner one must not wait for the collector."""
    inner, outer = Noted(), Noted()

    async def own(call: Call, next: Handler) -> Reply:
        reply = await next(call)
        return replace(reply, chunks=outer(inner(reply.chunks)))

    async with onion(own, held) as (running, _):
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b"word ")
            client.leave("rst")
            await until(lambda: running.edge.open_calls == 0, 1.0)
            assert (inner.events, outer.events) == (["batch", "closed"], ["batch", "closed"])


async def test_a_reply_that_is_closed_before_anybody_iterated_it_releases_its_socket() -> None:
    """Also where the iterator is a generator that never started, and so runs none of its code when it is closed."""
    noted, ends = Noted(), []

    async def own(call: Call, next: Handler) -> Reply:
        given_up = await next(call)
        given_up.trailer.on_end(lambda trailer: ends.append(trailer.outcome))
        await replace(given_up, chunks=noted(given_up.chunks)).close()
        running_line = upstream.lines[0]
        await asyncio.wait_for(running_line.closed.wait(), 1.0)
        upstream.answer = stream([WORD, FINISH, DONE])
        return await next(call)

    async with onion(own, held) as (running, upstream):
        answer = await ask(running.port, chat())
    assert answer.done
    assert answer.text == "word "
    assert noted.events == []
    assert ends == [Outcome.CANCELLED]
    assert len(upstream.lines) == 2


async def test_a_reply_that_was_read_in_part_and_closed_releases_its_socket() -> None:
    async def own(call: Call, next: Handler) -> Reply:
        reply = await next(call)
        async for _ in reply.chunks:
            break
        await reply.close()
        await asyncio.wait_for(upstream.lines[0].closed.wait(), 1.0)
        raise UpstreamError("not good enough", status=503)

    async with onion(own, held) as (running, upstream):
        assert (await ask(running.port, chat())).status == 503


# The end, exactly once.


class Ends:
    """A middleware that counts the ends of its reply; inside it, `wrap` on the chunk path."""

    def __init__(self, wrap: Callable[[AsyncIterator[Batch]], AsyncIterator[Batch]]) -> None:
        self.outcomes: list[Outcome | None] = []
        self._wrap = wrap

    async def __call__(self, call: Call, next: Handler) -> Reply:
        reply = await next(call)
        reply.trailer.on_end(lambda trailer: self.outcomes.append(trailer.outcome))
        return replace(reply, chunks=self._wrap(reply.chunks))


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (stream([WORD, FINISH, DONE]), Outcome.COMPLETED),
        (whole(WHOLE), Outcome.COMPLETED),
        (cut, Outcome.UPSTREAM_CUT),
        (stream([WORD]), Outcome.UPSTREAM_CUT),
        (stream([WORD, ERROR]), Outcome.UPSTREAM_ERROR),
        (stream([WORD, b"data: {no json\n\n"]), Outcome.MALFORMED),
    ],
    ids=["completed", "completed-whole", "cut", "no-end-marker", "error", "malformed"],
)
async def test_end_callbacks_run_exactly_once(answer: Answers, outcome: Outcome, streamed: bool) -> None:
    noted = Noted()
    ends = Ends(noted)
    with capture_logs() as logs:
        async with onion(ends, answer) as (running, _):
            found = await ask(running.port, chat(stream=streamed))
            await until(lambda: ends.outcomes)
    assert ends.outcomes == [outcome]
    assert [line["outcome"] for line in logs if line["event"] == "request"] == [str(outcome)]
    clean = outcome is Outcome.COMPLETED
    assert ("stored" in noted.events) == clean, "what follows a wrapper's loop runs only on a clean end"
    assert noted.events.count("closed") == 1
    assert (found.error is None) == clean
    if streamed:
        assert found.done == clean
    else:
        assert (found.status == 200) == clean


async def test_the_end_of_a_stream_whose_client_left_comes_once() -> None:
    noted = Noted()
    ends = Ends(noted)
    async with onion(ends, held) as (running, _):
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b"word ")
            client.leave("rst")
            await until(lambda: running.edge.open_calls == 0, 1.0)
    assert ends.outcomes == [Outcome.CLIENT_GONE]
    assert noted.events == ["batch", "closed"]


async def test_the_end_of_a_stream_that_was_drained_comes_once() -> None:
    noted = Noted()
    ends = Ends(noted)
    async with onion(ends, held) as (running, _):
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b"word ")
            await running.drain()
    assert ends.outcomes == [Outcome.DRAINING]
    assert noted.events == ["batch", "closed"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_exception_in_a_wrapper_is_a_gateway_error(streamed: bool) -> None:
    async def broken(chunks: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        async for batch in chunks:
            if not batch.final:
                yield batch
            raise RuntimeError("a secret of the wrapper's")

    ends = Ends(broken)
    with capture_logs() as logs:
        async with onion(ends, held) as (running, upstream):
            answer = await asyncio.wait_for(ask(running.port, chat(stream=streamed)), 5) if streamed else None
            if answer is None:
                upstream.answer = stream([WORD, FINISH, DONE])
                answer = await asyncio.wait_for(ask(running.port, chat(stream=False)), 5)
            else:
                await asyncio.wait_for(upstream.lines[0].closed.wait(), 1.0)
            await until(lambda: ends.outcomes)
    assert answer.error is not None
    assert answer.error["code"] == "gateway_error"
    assert "secret" not in str(answer.error)
    assert not answer.done
    if streamed:
        assert answer.text == "word "
        assert answer.clean
    else:
        assert answer.status == 500
    assert ends.outcomes == [Outcome.GATEWAY_ERROR]
    assert [line["outcome"] for line in logs if line["event"] == "request"] == ["gateway_error"]


async def test_an_exception_around_the_head_is_a_500_and_closes_nothing_it_did_not_open() -> None:
    async def broken(call: Call, next: Handler) -> Reply:
        raise RuntimeError("a secret of the middleware's")

    with capture_logs() as logs:
        async with onion(broken, held) as (running, upstream):
            answer = await ask(running.port, chat())
    assert answer.status == 500
    assert answer.json["error"]["code"] == "gateway_error"
    assert "secret" not in answer.body.decode()
    assert upstream.asked == []
    assert [line["outcome"] for line in logs if line["event"] == "request"] == ["gateway_error"]


# The final batch.


async def test_the_end_is_held_until_the_iterator_has_run_to_its_end() -> None:
    """Finish chunk and `[DONE]` wait for the code behind a wrapper's loop, even where that code takes its time."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def storing(chunks: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        async for batch in chunks:
            yield batch
        reached.set()
        await go.wait()

    async with onion(wrapping(storing), stream([WORD, WORD, FINISH, DONE])) as (running, _):
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b"word ", 2)
            await asyncio.wait_for(reached.wait(), 2)
            before = await readable(client)
            assert b'"stop"' not in before
            assert b"[DONE]" not in before
            go.set()
            assert b'"stop"' in await client.read_until(b"[DONE]")


async def readable(client: RawClient) -> bytes:
    """All that has arrived so far: loop turns go by until the socket has nothing more."""
    for _ in range(20):
        try:
            client.received += client.sock.recv(65536)
        except BlockingIOError:
            await asyncio.sleep(0)
    return client.received


async def test_what_follows_a_wrappers_loop_runs_when_the_client_left_at_the_finish() -> None:
    """The client is torn away between the final batch and the end of the iterator."""
    noted = Noted()

    async def tearing(chunks: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        async for batch in noted(chunks):
            if batch.final:
                client.leave("rst")
            yield batch

    ends = Ends(tearing)
    async with onion(ends, stream([WORD, FINISH, DONE])) as (running, _):
        with await connected(running.port) as client:
            await client.post(chat())
            await until(lambda: ends.outcomes)
    assert noted.events == ["batch", "final", "stored", "closed"]
    assert ends.outcomes in ([Outcome.COMPLETED], [Outcome.CLIENT_GONE])


@pytest.mark.parametrize("way", ["fin", "rst", "half_close"])
async def test_a_client_that_leaves_on_the_finish_reason_had_a_completed_stream(way: str) -> None:
    """As many clients do; each time, for the outcome must not be a matter of luck."""
    noted = Noted()
    ends = Ends(noted)
    async with onion(ends, stream([WORD, FINISH, DONE])) as (running, _):
        for _ in range(20):
            with await connected(running.port) as client:
                await client.post(chat())
                await client.read_until(b'"stop"')
                client.leave(way)
        await until(lambda: running.edge.open_calls == 0)
    assert ends.outcomes == [Outcome.COMPLETED] * 20
    assert noted.events.count("stored") == 20


# The idle limit.


async def test_a_slow_consumer_does_not_trip_the_idle_timeout() -> None:
    """The limit runs only while a read is pending."""
    idle = 0.3

    async def slow(chunks: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        async for batch in chunks:
            await asyncio.sleep(2.5 * idle)  # what is tested is time going by
            yield batch

    async with onion(wrapping(slow), stream([WORD, WORD, FINISH, DONE]), idle="300ms") as (running, _):
        answer = await ask(running.port, chat())
    assert answer.error is None
    assert answer.text == "word word "
    assert answer.done


PINGS = {
    "openai": (WORD, b": ping\n\n"),
    "anthropic": (
        b'event: message_start\ndata: {"type": "message_start", "message": {"id": "m", "role": "assistant", "usage": {}}}\n\n'
        b'event: content_block_start\ndata: {"type": "content_block_start", "index": 0, '
        b'"content_block": {"type": "text", "text": ""}}\n\n'
        b'event: content_block_delta\ndata: {"type": "content_block_delta", "index": 0, '
        b'"delta": {"type": "text_delta", "text": "word "}}\n\n',
        b'event: ping\ndata: {"type": "ping"}\n\n',
    ),
}


@pytest.mark.parametrize("api", PINGS)
async def test_pings_do_not_keep_a_stream_alive(api: str) -> None:
    content, ping = PINGS[api]
    pinged = 0

    async def pinging(asked: Asked, line: Line) -> None:
        nonlocal pinged
        await line.head()
        await line.chunk(content)
        while not line.closed.is_set():
            await line.chunk(ping)
            pinged += 1
            await asyncio.sleep(0.02)

    with capture_logs() as logs:
        async with onion(wrapping(Noted()), pinging, idle="300ms") as (running, upstream):
            answer = await asyncio.wait_for(ask(running.port, chat(f"{api}/m")), 5)
            await asyncio.wait_for(upstream.lines[0].closed.wait(), 1.0)
    assert pinged > 3
    assert answer.text == "word "
    assert answer.error is not None
    assert answer.error["code"] == "timeout_idle"
    assert not answer.done
    assert [line["outcome"] for line in logs if line["event"] == "request"] == ["timeout_idle"]


async def test_content_keeps_a_stream_alive_beyond_the_idle_limit() -> None:
    async def steady(asked: Asked, line: Line) -> None:
        await line.head()
        for _ in range(10):
            await line.chunk(WORD)
            await asyncio.sleep(0.08)
        await line.chunk(FINISH, DONE)
        await line.end()

    async with onion(wrapping(Noted()), steady, idle="400ms") as (running, _):
        answer = await ask(running.port, chat())
    assert answer.error is None
    assert answer.text == "word " * 10
    assert answer.done
