"""What all decoders of JSON over SSE share: framing, parsing, faults, and the difference between an end and a cut.

A format subclasses `SseDecoder` and says what its events mean; it raises the errors of `proxy.errors` where they mean trouble.
The one rule: `feed` never raises. What was decoded before a fault is returned, and the fault is kept in `fault`, so that the
same bytes give the same chunks whether the fault came in the same read or in a later one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

from proxy.call import Call, Target
from proxy.chunks import ChunkStream
from proxy.errors import GatewayError, Malformed, UpstreamCut
from proxy.faults import in_band_error, parse_error_body
from proxy.reply import Item
from proxy.sse import Framer

Json = dict[str, Any]

CUT = "The provider's stream ended before its reply was complete."


class SseDecoder:
    """Bytes of one streamed reply in, normalized chunks out.

    fault: why the stream is broken, once it is. ended: the format's own end was seen; what follows is not read.
    ends_at_eof: a clean HTTP end after a finish reason on every choice is this format's own end, or one of them.
    """

    ends_at_eof: ClassVar[bool] = False

    def __init__(self, call: Call, target: Target) -> None:
        self.stream = ChunkStream(call)
        self.framer = Framer()
        self.fault: GatewayError | None = None
        self.ended = False
        wanted = call.request.get("n")
        self._wanted = wanted if isinstance(wanted, int) else 1

    def event(self, event: Json) -> None:
        """One event of the format: a JSON object. Call `self.end()` at the format's own end marker."""
        raise NotImplementedError

    def single(self, data: bytes) -> bytes | None:
        """The event for a read that is just one, where a format has a short way to it; for any other None, and nothing done."""
        return None

    def feed(self, data: bytes) -> list[Item]:
        """The chunks that `data` completes. After a fault or the end: none."""
        if self.over():
            return []
        for payload in self.framer.feed(data):
            self._payload(payload)
            if self.over():
                return self.stream.take()
        return self.taken()

    def close(self) -> list[Item]:
        """The HTTP body ended cleanly: the last chunks, or a fault if the format's own end is missing."""
        for payload in self.framer.close():
            if self.over():
                break
            self._payload(payload)
            if self.fault is not None and not _is_json(payload):
                # Its blank line never came: it is not wrong, it is not all there.
                self.fault = UpstreamCut(CUT)
        if self.fault is None and not self.ended:
            if self.ends_at_eof and self.stream.finished:
                self.end()
            else:
                self.fault = UpstreamCut(CUT)
        return self.stream.take()

    def settle(self) -> list[Item]:
        """The upstream stays silent after `finished`: that is its end."""
        if self.fault is None and not self.ended:
            self.end()
        return self.stream.take()

    @property
    def finished(self) -> bool:
        """Every choice that was asked for has its finish reason, though the end marker may be missing yet."""
        return self.stream.finished and len(self.stream.choices) >= self._wanted

    def taken(self) -> list[Item]:
        """What one read gave, when all its events have been seen; an event that grew too large is the fault from here on."""
        if self.framer.overflow:
            self.fault = Malformed("The provider sent an event larger than the gateway accepts.")
        return self.stream.take()

    def over(self) -> bool:
        """Ended or broken: nothing more will be decoded."""
        return self.ended or self.fault is not None

    def end(self) -> None:
        self.ended = True
        self.stream.end()

    def guarded(self, event: Json) -> None:
        """`event`, with whatever it raises kept as the fault; a shape that the format does not have is malformed."""
        try:
            self.event(event)
        except GatewayError as fault:
            self.fault = fault
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as fault:
            self.fault = Malformed(f"The provider sent an event of an unexpected shape ({type(fault).__name__}).")

    def _payload(self, payload: bytes) -> None:
        try:
            event = self._odd(payload) if type(payload) is not bytes else parse_event(payload)
        except GatewayError as fault:
            self.fault = fault
        else:
            self.guarded(event)

    def _odd(self, payload: bytes) -> Json:
        """An event named `error`, or bare JSON in the stream: both are errors, whatever they say."""
        raise in_band_error(parse_error_body(bytes(payload)))  # orjson takes no subclass of bytes


def parse_event(payload: bytes) -> Json:
    """The JSON object of one event; anything else is malformed."""
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise Malformed("The provider sent an event that is not JSON.") from None
    if not isinstance(event, dict):
        raise Malformed("The provider sent an event that is not a JSON object.")
    return event


def _is_json(payload: bytes) -> bool:
    try:
        orjson.loads(bytes(payload))
    except orjson.JSONDecodeError:
        return False
    return True
