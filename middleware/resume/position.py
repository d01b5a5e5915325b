"""What a reader of a stream asks for, out of the URL and the headers alone: after which event, and with which token.

Strategy: pure functions. A token is an HMAC of the stream's id under a secret that lives and dies with the process, as the
streams do; so it is bound to one stream, opens nothing else, and there is nothing to store or to configure.
The one rule: tokens are compared in constant time and never put into a message.

EventSource: https://html.spec.whatwg.org/multipage/server-sent-events.html#the-last-event-id-header
"""

from __future__ import annotations

import base64
import hmac
import re

from proxy.errors import Refused
from proxy.pipeline import Query

NUMBER = re.compile(r"[0-9]{1,15}", re.ASCII)


class Tokens:
    """Tokens for the streams of this process. secret: at least 32 random bytes."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, stream: str) -> str:
        digest = hmac.digest(self._secret, stream.encode("utf-8", "surrogateescape"), "sha256")
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def right(self, stream: str, token: str) -> bool:
        return hmac.compare_digest(self.sign(stream).encode(), token.encode("utf-8", "surrogateescape"))


def after(query: Query) -> int:
    """The number of the last event that the reader has; 0 for none. Raises Refused (400).

    The header goes before `?after=`: a browser that reconnects sends it along with the URL that it was given at first.
    """
    header = query.headers.get("Last-Event-ID", "")
    written, name = (header, "Last-Event-ID") if header else (query.params.get("after", ""), "after")
    if not written:
        return 0
    if not NUMBER.fullmatch(written):
        raise Refused(f"{name}: must be the id of an event, a whole number.", code="invalid_value", param=name)
    return int(written)
