"""The official SDK against the gateway: streams with their usage, a cancelled one, errors. `python chat.py [base url]`.

First synchronously, then several at once with asyncio.
"""

from __future__ import annotations

import asyncio
import os
import sys

from openai import APIError, APIStatusError, AsyncOpenAI, OpenAI, RateLimitError
from openai.types.chat import ChatCompletionMessageParam

BASE_URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
KEY = os.environ.get("PENSTOCK_KEY", "any")
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is a penstock?"}]


def streamed(client: OpenAI) -> None:
    for chunk in client.chat.completions.create(
        model="demo/echo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:  # the last chunk has usage and no choices
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out")


def cancelled(client: OpenAI) -> None:
    """Whoever stops reading stops paying: `with` closes the line, and the gateway closes the provider's."""
    with client.chat.completions.create(model="demo/slow", messages=MESSAGES, stream=True) as stream:
        for words, chunk in enumerate(stream, 1):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
            if words == 2:
                break
    print(f" … cancelled after {words} words")


def failing(client: OpenAI, model: str) -> None:
    """Before the first word an error is a status, with a class of the SDK's; in mid-stream it is an APIError without one."""
    try:
        for chunk in client.chat.completions.create(model=model, messages=MESSAGES, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    except RateLimitError as error:
        print(f"too many requests, try again in {error.response.headers.get('retry-after')} s")
    except APIStatusError as error:
        print(f"refused with {error.status_code}: {error.message}")
    except APIError as error:
        print(f" … broke off: {error.message}")


async def at_once(client: AsyncOpenAI, *questions: str) -> None:
    """Several streams beside one another; each is printed when it is whole."""

    async def answer(question: str) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="demo/fast", messages=[{"role": "user", "content": question}], stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    for text in await asyncio.gather(*map(answer, questions)):
        print(text)


async def asynchronously() -> None:
    async with AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0) as client:
        await at_once(client, "first question", "second question")


def main() -> None:
    # The gateway retries and falls back; a client that retried as well would multiply that.
    with OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0) as client:
        streamed(client)
        cancelled(client)
        for model in ("demo/fail-429", "demo/fail-500", "demo/fail-midstream", "demo/cut"):
            failing(client, model)
    asyncio.run(asynchronously())


if __name__ == "__main__":
    main()
