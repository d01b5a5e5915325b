"""A chat stream that survives a broken line: `for chunk in stream(url, body): ...`. The standard library alone, Python 3.9+.

Each event has a number; a line that breaks before `[DONE]` is followed up by GET /v1/streams/{id} behind the last number seen.
"""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
BROKEN = (OSError, http.client.HTTPException)


class StreamFailed(Exception):
    """The stream cannot be had to its end: the gateway said why, or could not be reached any more."""


def stream(base_url: str, body: Json, key: str = "", attempts: int = 8, pause: float = 0.2, timeout: int = 60) -> Iterator[Json]:
    """The chunks of one completion, each once. base_url: `http://host:port/v1`. attempts: in a row, without a further event.

    pause: seconds before the second attempt, doubled for each further one. timeout: of the silence after which a line counts as
    broken. Raises StreamFailed.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    asked = json.dumps({**body, "stream": True, "resume": True}).encode()
    request = urllib.request.Request(f"{base_url}/chat/completions", asked, headers)
    last, failures, url = 0, 0, ""
    while True:
        before = last
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                if response.status == 204:
                    return
                if not url and "X-Stream-Id" not in response.headers:
                    raise StreamFailed("the gateway has no middleware resume")
                url = url or f"{base_url}/streams/{response.headers['X-Stream-Id']}"
                for number, data in events(response):
                    if data == "[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk and number:  # without a number it is about this line, not the stream
                        raise StreamFailed(chunk["error"]["message"])
                    if number > last:
                        last = number
                        yield chunk
        except urllib.error.HTTPError as error:
            if error.code < 500 or not url:
                raise StreamFailed(f"{error.code}: {error.read().decode(errors='replace')}") from None
        except BROKEN as error:
            if not url:
                raise StreamFailed(f"no answer: {error!r}") from None
        failures = 1 if last > before else failures + 1
        if failures >= attempts:
            raise StreamFailed(f"the line broke {failures} times in a row behind event {last}")
        time.sleep(pause * 2 ** (failures - 1) * random.random())
        request = urllib.request.Request(url, headers={**headers, "Last-Event-ID": str(last)})


def events(lines: Iterator[bytes]) -> Iterator[tuple[int, str]]:
    """(number, data) of each complete server-sent event; what the line broke off in the middle of is left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if line == b"\n" and "data" in fields:
            yield int(fields.get("id", 0)), fields["data"]
        name, _, value = line.decode(errors="replace").rstrip("\n").partition(": ")
        fields = {**fields, name: value} if name else {}


if __name__ == "__main__":
    question = {"model": "demo/slow", "messages": [{"role": "user", "content": "Tell me something long, please."}]}
    for found in stream("http://127.0.0.1:8080/v1", question):
        print("".join(choice["delta"].get("content") or "" for choice in found["choices"]), end="", flush=True)
