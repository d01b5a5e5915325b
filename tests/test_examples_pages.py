"""The examples' pages in Chromium, built by Vite and served as `npm start` serves them, before a real gateway.

Strategy: a scripted provider holds its answer back at each step until the page has shown the one before; so that partial text is
seen because it is there, and not because a test was quick.
The one rule: what a page shows and what the provider's socket saw are asserted together; either alone can be had by cheating.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import until
from tests.support.pages import ROOT, Browser, Site, event
from tests.support.upstream import Answer, Asked, Line, stream, whole

Json = dict[str, Any]
PAGES = ["react-chat", "fetch-sse", "ai-sdk-chat"]


USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
REST = event("it all") + event(finish="stop") + event(choices=[], usage=USAGE) + b"data: [DONE]\n\n"
WHOLE = stream([event("half of ") + REST])
BROKEN = stream([event("half of "), b'data: {"error": {"message": "the provider broke", "code": "x"}}\n\n'])


class Steps:
    """Half of the answer when `begin` is set, the rest when `go` is."""

    def __init__(self) -> None:
        self.begin, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, asked: Asked, line: Line) -> None:
        await self.begin.wait()
        await line.head()
        await line.chunk(event("half of "))
        await self.go.wait()
        await line.chunk(REST)
        await line.end()


async def cut(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(event("half of "))
    line.hang_up()


@pytest.mark.parametrize("page", PAGES)
async def test_text_appears_while_it_streams(page: str, here: Site, browser: Browser) -> None:
    steps = Steps()
    async with here.before(steps) as upstream:
        await browser.open(f"{here.address}/{page}/?model=openai/m")
        await browser.ask("Hi")
        await until(lambda: upstream.asked, 5)
        if page != "fetch-sse":
            await browser.do(["getByRole", "status"], ["waitFor"])
        steps.begin.set()
        await browser.sees("half of")
        assert "it all" not in await browser.text()
        if page != "fetch-sse":
            await browser.misses("status")
            assert await browser.do(["getByRole", "log"], ["getAttribute", "aria-busy"]) == "true"
        steps.go.set()
        await browser.sees("half of it all")
        if page == "fetch-sse":
            await browser.sees("complete, 2 tokens", "status")
        else:
            await browser.do(["locator", "[role=log][aria-busy=false]"], ["waitFor"])
        if page == "ai-sdk-chat":
            await browser.sees("2 tokens")
    (asked,) = upstream.asked
    assert [(message["role"], message["content"]) for message in asked.json["messages"]] == [("user", "Hi")]


@pytest.mark.parametrize("page", PAGES)
async def test_stop_stops_the_provider(page: str, here: Site, browser: Browser) -> None:
    steps = Steps()
    steps.begin.set()
    async with here.before(steps) as upstream:
        await browser.open(f"{here.address}/{page}/?model=openai/m")
        await browser.ask("Hi")
        await browser.sees("half of")
        await browser.press("Stop")
        async with asyncio.timeout(10):
            await upstream.lines[0].closed.wait()
        assert "half of" in await browser.text()
        assert "it all" not in await browser.text()
        assert await browser.do(["getByRole", "alert"], ["count"]) == 0
        if page == "react-chat":
            await browser.sees("stopped")


async def test_stop_before_the_first_word_stops_too(here: Site, browser: Browser) -> None:
    async with here.before(Steps()) as upstream:
        await browser.open(f"{here.address}/react-chat/?model=openai/m")
        await browser.ask("Hi")
        await browser.sees("typing", "status")
        await until(lambda: upstream.asked, 5)
        await browser.press("Stop")
        async with asyncio.timeout(10):
            await upstream.lines[0].closed.wait()
        await browser.misses("status")
        assert await browser.do(["evaluate", "document.activeElement.id"]) == "message", "the focus is where one goes on"


REFUSED = whole(b'{"error": {"message": "the provider refuses", "code": "x"}}', 422)


@pytest.mark.parametrize("page", ["react-chat", "ai-sdk-chat"])
@pytest.mark.parametrize(
    ("answer", "said", "kept"),
    [(REFUSED, "the provider refuses", False), (BROKEN, "the provider broke", True), (cut, "", True)],
    ids=["refused", "broken", "cut"],
)
async def test_an_error_is_shown_and_can_be_tried_again(
    page: str, answer: Answer, said: str, kept: bool, here: Site, browser: Browser
) -> None:
    async with here.before(answer) as upstream:
        await browser.open(f"{here.address}/{page}/?model=openai/m")
        await browser.ask("Hi")
        await browser.sees(said, "alert")
        assert ("half of" in await browser.text()) is kept
        upstream.answer = WHOLE
        await browser.press("Try again")
        await browser.sees("half of it all")
        await browser.misses("alert")
        assert (await browser.text()).count("half of") == 1
    assert [asked.json["messages"][-1]["role"] for asked in upstream.asked] == ["user", "user"]


@pytest.mark.parametrize(("model", "said"), [("fail-midstream", "fail in mid-stream"), ("fail-500", "answer with 500")])
async def test_the_fetch_page_shows_an_error(model: str, said: str, here: Site, browser: Browser) -> None:
    async with here.before(WHOLE):
        await browser.open(f"{here.address}/fetch-sse/?model=demo/{model}")
        await browser.ask("Hi")
        await browser.sees(f"failed: The demo was told to {said}.", "status")


async def test_a_gateway_that_is_not_there_is_told(here: Site, browser: Browser) -> None:
    await browser.open(f"{here.address}/react-chat/")
    await browser.ask("Hi")
    await browser.sees("The gateway could not be reached.", "alert")


COUNT = """
window.renders = window.frames_drawn = 0;
new MutationObserver(() => renders++).observe(document.body, { subtree: true, characterData: true });
(function frame() { frames_drawn++; requestAnimationFrame(frame); })();
"""


@pytest.mark.parametrize("page", ["react-chat", "fetch-sse"])
async def test_a_page_asks_the_gateway_itself_where_cors_lets_it(page: str, here: Site, browser: Browser) -> None:
    """From another origin with a key for its pages: a preflight, the stream, and an error that the page can read."""
    steps, key = Steps(), "sk-page-0123456789abcdef"
    async with here.before(steps, f"auth: {{keys: [{{name: page, key: {key}, origins: ['{here.address}']}}]}}") as upstream:
        await browser.open(f"{here.address}/{page}/?model=openai/m&url={here.url}&key={key}")
        await browser.ask("Hi")
        steps.begin.set()
        await browser.sees("half of")
        await browser.press("Stop")
        async with asyncio.timeout(10):
            await upstream.lines[0].closed.wait()
        await browser.open(f"{here.address}/{page}/?model=openai/m&url={here.url}&key=wrong")
        await browser.ask("Hi")
        await browser.sees("key", "alert" if page == "react-chat" else "status")
        assert len(upstream.asked) == 1


async def drips(asked: Asked, line: Line) -> None:
    """Many more chunks than a screen has frames, each in a packet of its own."""
    await line.head()
    for number in range(300):
        await line.chunk(event(f"{number} "))
        await asyncio.sleep(0.001)
    await line.chunk(REST)
    await line.end()


async def test_text_is_rendered_by_frames_and_not_by_tokens(here: Site, browser: Browser) -> None:
    async with here.before(drips):
        await browser.open(f"{here.address}/react-chat/?model=openai/m")
        await browser.do(["evaluate", COUNT])
        await browser.ask("Hi")
        await browser.sees("298 299 it all")
        renders, frames = await browser.do(["evaluate", "[renders, frames_drawn]"])
        assert renders <= frames + 1, "the last one waits for no frame"


async def test_a_conversation_takes_its_replies_along(here: Site, browser: Browser) -> None:
    async with here.before(WHOLE) as upstream:
        await browser.open(f"{here.address}/react-chat/?model=openai/m")
        for question in ("first", "second"):
            await browser.ask(question)
            await browser.do(["getByRole", "button", {"name": "Send"}], ["waitFor"])
    roles = [(message["role"], message["content"]) for message in upstream.asked[1].json["messages"]]
    assert roles == [("user", "first"), ("assistant", "half of it all"), ("user", "second")]


TURNS = {
    "What is a penstock?": "A pipe or a gate that leads water from a reservoir down to a turbine. It keeps the pressure, "
    "and when something goes wrong below it is closed at once.",
    "And in front of language models?": "The same idea: every stream runs through one gate. Each token passes as soon as it is "
    "there, a stream that breaks never looks whole, and when you press Stop",
}


async def test_the_picture_of_the_readme(here: Site, browser: Browser, tmp_path: Path) -> None:
    """While a reply streams. PENSTOCK_PICTURES=docs/pictures renews the picture that is committed."""
    folder = Path(os.environ.get("PENSTOCK_PICTURES") or tmp_path)

    async def tells(asked: Asked, line: Line) -> None:
        question = asked.json["messages"][-1]["content"]
        await line.head()
        await line.chunk(*(event(word) for word in re.findall(r"\s*\S+", TURNS[question])))
        if question != list(TURNS)[-1]:
            await line.chunk(event(finish="stop"), b"data: [DONE]\n\n")
            return await line.end()
        await line.forever()

    async with here.before(tells):
        await browser.open(f"{here.address}/react-chat/?model=fast", scale=2)
        for question, reply in TURNS.items():
            await browser.ask(question)
            await browser.sees(reply)
            if question != list(TURNS)[-1]:
                await browser.do(["getByRole", "button", {"name": "Send"}], ["waitFor"])
        await browser.do(["screenshot", {"path": str(folder / "react-chat.png"), "caret": "hide"}])
    assert 20_000 < (folder / "react-chat.png").stat().st_size < 150_000


def test_the_types_hold(packages: Json) -> None:
    command = [packages["program"], str(ROOT / "examples" / "node_modules" / "typescript" / "bin" / "tsc"), "--noEmit"]
    done = subprocess.run(command, cwd=ROOT / "examples", env=packages["env"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
