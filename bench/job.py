"""A load generator's job: what to ask, how often, and of whom. It travels as JSON to a process of its own.

The one rule: requests are made in advance as far as they are alike, because the load generator must cost less than a gateway.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import said
from bench.checking import Wanted

Json = dict[str, Any]
KEY = "sk-bench-3f1c9a7e5b2d8046f0a1b2c3d4e5f607"  # what every request carries, for gateways that look at it
PARAGRAPH = "The quick brown fox \u2013 \u201cjumps\u201d \u2013 over the lazy dog.\nCaf\u00e9 prices rose by 3 %.\n\n"


@dataclass(frozen=True)
class Job:
    """What to do. seconds, requests: no new request after so much (0: no bound). whole: not streamed. same: all requests are
    alike. share: so many in a row are alike. distinct: after so many questions the first ones again. prompt: bytes of the prompt.
    extra: further fields of the body. get: ask for a file. levels: hold so many streams open, one level after the other, then
    watch for `seconds`. together: all clients' streams open at once, one each. merged: chunks may be merged on the way. watch,
    provider: process ids.
    """

    port: int
    model: str
    clients: int = 1
    seconds: float = 0.0
    requests: int = 0
    whole: bool = False
    same: bool = False
    share: int = 1
    distinct: int = 0
    prompt: int = 0
    extra: Json = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = "/v1/chat/completions"
    get: bool = False
    levels: tuple[int, ...] = ()
    together: bool = False
    merged: bool = False
    watch: int = 0
    provider: int = 0

    @property
    def wanted(self) -> Wanted:
        count, delay = said.shape(self.model)
        return Wanted(count, delay > 0 and not self.whole, self.whole, self.merged)

    def written(self) -> Iterator[bytes]:
        """The requests, ready to be sent, each a question of its own unless they are to be the same."""
        heads = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        host = f"HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        if self.get:
            while True:
                yield f"GET {self.path} {host}{heads}\r\n".encode()
        prompt = PARAGRAPH * (self.prompt // len(PARAGRAPH.encode()))
        fields = {"model": self.model, "messages": [{"role": "user", "content": f"Question @@@@@@@@: {prompt}"}], **self.extra}
        body = json.dumps(fields if self.whole else {**fields, "stream": True}, ensure_ascii=False).encode()
        head = f"POST {self.path} {host}Content-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n{heads}"
        before, after = (f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body).split(b"@@@@@@@@")
        number = 0
        while True:
            yield b"%b%08d%b" % (before, self._question(number), after)
            number += 1

    def _question(self, number: int) -> int:
        """Which question the request of this number asks."""
        question = 0 if self.same else number // self.share
        return question % self.distinct if self.distinct else question


def read(text: str) -> Job:
    fields = json.loads(text)
    return Job(**{**fields, "levels": tuple(fields.get("levels", ()))})


def write(job: Job) -> str:
    return json.dumps(asdict(job))
