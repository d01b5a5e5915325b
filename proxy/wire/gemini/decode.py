"""Gemini's events as normalized chunks. Each event is a GenerateContentResponse with some parts of each candidate.

Strategy: every part is told by the one field it has; what a candidate says beside its parts rides along as extra
fields of its choice. A finishReason may come on several events, and more after it, so it only counts at the HTTP end, which
is this format's own end: there is no end marker.
The one rule: a part that is not understood is passed on as it is, in `provider_blocks`, and a thought signature is never lost.

https://ai.google.dev/api/generate-content#v1beta.GenerateContentResponse, https://ai.google.dev/api/caching#Part
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import orjson

from proxy.call import Call, Target
from proxy.chunks import ToolCall
from proxy.decoder import SseDecoder
from proxy.errors import UpstreamCut, UpstreamError
from proxy.faults import error_words, in_band_error
from proxy.sse import BareText
from proxy.wire.gemini.contents import REASONING_FORMAT
from proxy.wire.gemini.findings import citations, extras_of, usage_of
from proxy.wire.gemini.partial_args import PartialArguments

Json = dict[str, Any]

FINISH_REASONS = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "LANGUAGE": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "MODEL_ARMOR": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
}
FAILURES = frozenset(
    {
        "OTHER", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "MISSING_THOUGHT_SIGNATURE",
        "MALFORMED_RESPONSE", "IMAGE_OTHER", "NO_IMAGE",
    }
)  # fmt: skip

# With `enum-encoding=int` in a row's query the names come as numbers of the API's protocol buffers.
NUMBERED = (
    "FINISH_REASON_UNSPECIFIED", "STOP", "MAX_TOKENS", "SAFETY", "RECITATION", "OTHER", "LANGUAGE", "BLOCKLIST",
    "PROHIBITED_CONTENT", "SPII", "MALFORMED_FUNCTION_CALL", "IMAGE_SAFETY", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS",
)  # fmt: skip
UNSPECIFIED = (None, "", 0, "FINISH_REASON_UNSPECIFIED", "BLOCK_REASON_UNSPECIFIED", "BLOCKED_REASON_UNSPECIFIED")


class Candidate:
    """What has to be remembered of one candidate.

    open: the function call whose arguments are still coming. details: the number of reasoning details begun so far.
    """

    __slots__ = ("cited", "details", "open", "text", "thinking")

    def __init__(self) -> None:
        self.open: tuple[ToolCall, PartialArguments] | None = None
        self.details = 0
        self.thinking = False
        self.text: list[str] = []
        self.cited: set[tuple[object, ...]] = set()


class Decoder(SseDecoder):
    """Gemini's SSE (`alt=sse`) in, chunks out; the JSON array that the API answers without `alt=sse` is understood too."""

    ends_at_eof: ClassVar[bool] = True

    def __init__(self, call: Call, target: Target) -> None:
        super().__init__(call, target)
        self._candidates: dict[int, Candidate] = {}

    def event(self, event: Json) -> None:
        if "error" in event:
            raise in_band_error(error_words(event))
        self.stream.identify(event.get("responseId"))
        usage = usage_of(event.get("usageMetadata"))
        if usage is not None:
            self.stream.usage = usage
        for candidate in event.get("candidates") or ():
            self._candidate(candidate)
        feedback = event.get("promptFeedback")
        if feedback and feedback.get("blockReason") not in UNSPECIFIED:
            self._blocked(feedback)

    def end(self) -> None:
        for index, choice in self.stream.choices.items():
            if choice.finish_reason in (None, "stop"):
                # What was cut off by a limit stays cut off; what came to its end is whole.
                self._close_call(index)
            if choice.tools and choice.finish_reason == "stop":
                choice.finish_reason = "tool_calls"
        super().end()

    def _candidate(self, candidate: Json) -> None:
        index = candidate.get("index") or 0
        reason = candidate.get("finishReason")
        if type(reason) is int:
            reason = NUMBERED[reason] if reason < len(NUMBERED) else f"FINISH_REASON_{reason}"
        if reason in FAILURES:
            raise _failure(reason, candidate.get("finishMessage"))
        state = self._candidates.get(index)
        if state is None:
            state = self._candidates[index] = Candidate()
        if len(candidate) > 1:
            self._keep_extras(candidate, index)
        content = candidate.get("content")
        if content:
            for part in content.get("parts") or ():
                self._part(part, state, index)
        grounding = candidate.get("groundingMetadata")
        if grounding:
            found = citations(grounding, "".join(state.text), state.cited)
            if found:
                self.stream.put({"annotations": found}, index)
        if reason not in UNSPECIFIED:
            self.stream.finish(FINISH_REASONS.get(reason, "stop"), reason, index)

    def _keep_extras(self, candidate: Json, index: int) -> None:
        """Extra fields ride on the choice's next chunk; log probabilities that wait already are added to."""
        extras = extras_of(candidate)
        if extras:
            waiting = self.stream.choice(index).extras
            if "logprobs" in extras and "logprobs" in waiting:
                waiting["logprobs"]["content"] += extras.pop("logprobs")["content"]
            waiting.update(extras)

    def _blocked(self, feedback: Json) -> None:
        """The prompt was refused: there are no candidates, so choice 0 stands for the answer."""
        self.stream.extras["promptFeedback"] = feedback
        for index in list(self.stream.choices) or [0]:
            self.stream.finish("content_filter", str(feedback["blockReason"]), index)

    def _part(self, part: Json, state: Candidate, index: int) -> None:
        signature = part.get("thoughtSignature")
        text = part.get("text")
        if text is not None:
            self._text(text, part.get("thought") is True, signature, state, index)
            return
        tool: ToolCall | None = None
        call = part.get("functionCall")
        if call is not None:
            tool = self._function_call(call, state, index)
        elif "inlineData" in part and not part.get("thought") and _is_image(part["inlineData"]):
            self.stream.put({"images": [_image(part["inlineData"])]}, index)
        elif part.keys() - {"thought", "thoughtSignature"}:
            self.stream.put({"provider_blocks": [part]}, index)
        if signature:
            detail = self._signature(signature, state, tool)
            self.stream.put({"reasoning_details": [detail]}, index)

    def _text(self, text: object, thought: bool, signature: str | None, state: Candidate, index: int) -> None:
        """Text, thought or said; a signature rides in the same delta. Empty text alone is nothing."""
        if not isinstance(text, str):
            raise TypeError("text")
        delta: Json = {}
        details: list[Json] = []
        if text and thought:
            if not state.thinking:
                state.thinking = True
                state.details += 1
            delta["reasoning_content"] = text
            place = state.details - 1
            details.append({"type": "reasoning.text", "text": text, "format": REASONING_FORMAT, "index": place})
        elif text:
            state.thinking = False
            state.text.append(text)
            delta["content"] = text
        if signature:
            details.append(self._signature(signature, state, None))
        if details:
            delta["reasoning_details"] = details
        if delta:
            self.stream.put(delta, index)

    def _signature(self, signature: str, state: Candidate, tool: ToolCall | None) -> Json:
        state.thinking = False
        state.details += 1
        detail: Json = {"type": "reasoning.encrypted", "data": signature, "format": REASONING_FORMAT, "index": state.details - 1}
        if tool is not None:
            detail["id"] = tool.id
        return detail

    def _function_call(self, call: Json, state: Candidate, index: int) -> ToolCall | None:
        """A whole call, or a piece of one whose arguments are streamed: the name comes with the first piece only."""
        name = call.get("name")
        more = call.get("willContinue") is True
        if not name and state.open is None:
            if call.get("args") or call.get("partialArgs"):
                raise KeyError("name")
            return None
        state.thinking = False
        if name:
            self._close_call(index)
            if not more and "partialArgs" not in call:
                text = orjson.dumps(call.get("args") or {}).decode()
                return self.stream.open_tool(None, call.get("id"), name, text, index)
            tool = self.stream.open_tool(None, call.get("id"), name, "", index)
            state.open = (tool, PartialArguments())
        assert state.open is not None
        tool, arguments = state.open
        text = "".join([arguments.put((name,), value) for name, value in (call.get("args") or {}).items()])
        text += "".join([arguments.add(piece) for piece in call.get("partialArgs") or ()])
        self.stream.tool_text(tool, text, index)
        if not more:
            self._close_call(index)
        return tool

    def _close_call(self, index: int) -> None:
        state = self._candidates.get(index)
        if state is not None and state.open is not None:
            tool, arguments = state.open
            state.open = None
            self.stream.tool_text(tool, arguments.close(), index)

    def _payload(self, payload: bytes) -> None:
        """A JSON array of responses (no `alt=sse`) is understood; other bare text is an error that some servers write."""
        if type(payload) is not BareText or payload[:1] != b"[":
            super()._payload(payload)
            return
        try:
            events = orjson.loads(bytes(payload))  # orjson takes no subclass of bytes
        except orjson.JSONDecodeError:
            self.fault = UpstreamCut("The provider's reply ended before it was complete.")
            return
        for event in events:
            if not self.over():
                self.guarded(event)


def _failure(reason: str, message: object) -> UpstreamError:
    words = message if isinstance(message, str) and message else f"The provider could not answer: {reason}."
    return UpstreamError(words, code=reason.lower())


def _is_image(blob: object) -> bool:
    return isinstance(blob, Mapping) and str(blob.get("mimeType", "")).startswith("image/") and "data" in blob


def _image(blob: Json) -> Json:
    """OpenRouter's shape of an image in a reply (https://openrouter.ai/docs/features/multimodal/image-generation)."""
    return {"type": "image_url", "image_url": {"url": f"data:{blob['mimeType']};base64,{blob['data']}"}}
