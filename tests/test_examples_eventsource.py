"""The example's EventSource in Chromium: it comes back behind a cut by itself, and tells what cannot be had.

Strategy: a relay cuts the line of the page's first read at a known place; what a reload shows must be the same.
The one rule: however often the page comes back, the provider is asked once.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from tests.support.pages import Browser, Site, event, site
from tests.support.scissors import Scissors
from tests.support.upstream import Asked, Line, Upstream, stream, whole

Json = dict[str, Any]
BROKEN = stream([event("half of "), b'data: {"error": {"message": "the provider broke", "code": "x"}}\n\n'])
WORDS = [f"wört {number} 🌊 " for number in range(400)]


async def tells(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(*(event(word) for word in WORDS), event(finish="stop"), b"data: [DONE]\n\n")
    await line.end()


async def test_an_event_source_comes_back_behind_a_cut(here: Site, pages: Json, browser: Browser) -> None:
    async with here.before(tells, "resume") as upstream, Scissors(here.port, 1, 1, 30_000) as line:
        with site(pages["program"], here.port, GATEWAY_PUBLIC=f"http://127.0.0.1:{line.port}") as address:
            await browser.open(f"{address}/eventsource/?model=openai/m")
            await browser.press("Send")
            await browser.sees("line cut", "status")
            assert len(await browser.text()) < len("".join(WORDS)) - 1
            for _ in range(2):
                await browser.sees("complete", "status")
                assert await browser.do(["getByRole", "log"], ["textContent"]) == "".join(WORDS)
                await browser.do(["reload"])
        assert line.cuts == 0
    assert len(upstream.asked) == 1


async def test_an_event_source_shows_an_error(here: Site, browser: Browser) -> None:
    async with here.before(BROKEN, "resume"):
        await browser.open(f"{here.address}/eventsource/?model=openai/m")
        await browser.press("Send")
        await browser.sees("the provider broke", "status")


async def test_an_event_source_tells_what_cannot_be_had(here: Site, browser: Browser) -> None:
    async with here.before(whole(b"{}"), "resume"):
        unknown = f"http://127.0.0.1:{here.port}/v1/streams/str_none?token=x"
        await browser.open(f"{here.address}/eventsource/#{quote(unknown, '')}")
        await browser.sees("cannot be had any more", "status")


async def drains(asked: Asked, line: Line) -> None:
    """A gateway that ends its readers' lines, as one does that shuts down: the error has no number."""
    await line.head(Access_Control_Allow_Origin="*")
    if "last-event-id" not in asked.headers:
        await line.chunk(b"retry: 10\n\n", b"id: 1\n" + event("one "), b'data: {"error":{"message":"draining"},"choices":[]}\n\n')
    else:
        await line.chunk(b"id: 2\n" + event("two"), b"id: 3\ndata: [DONE]\n\n")
    await line.end()


async def test_an_error_without_a_number_is_about_the_line_alone(here: Site, browser: Browser) -> None:
    async with Upstream(drains) as gateway:
        await browser.open(f"{here.address}/eventsource/#{quote(f'{gateway.url}/v1/streams/str_x', '')}")
        await browser.sees("complete", "status")
        assert await browser.text() == "one two"
    assert [asked.headers.get("last-event-id") for asked in gateway.asked] == [None, "1"]
