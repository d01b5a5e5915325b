"""Streams: chunks that are nearly right already.

Strategy: three ways, from fast to thorough. A chunk that is byte for byte like an earlier one but for its text is not even parsed
(`template`); one that carries just text is recognized by a few look-ups and only gets the stream's own id, created and model
(`_plain`); every other goes the long way, part by part, through the quirks.
The one rule: all ways give the same chunk, and no field that a vendor sends is lost: what stands beside an empty delta
(Azure's filter results, citations, fingerprints) waits for the next chunk that leaves.

Format: https://platform.openai.com/docs/api-reference/chat-streaming
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import orjson

from proxy.call import Call, Target
from proxy.chunks import ToolCall
from proxy.decoder import SseDecoder
from proxy.errors import Malformed, UpstreamCut
from proxy.faults import error_words, in_band_error
from proxy.reply import Item
from proxy.wire.openai import quirks
from proxy.wire.openai.template import Template

Json = dict[str, Any]

TOP_FIELDS = frozenset({"id", "object", "created", "model", "choices", "usage", "obfuscation", "p"})
CHOICE_FIELDS = frozenset({"index", "delta", "message", "text", "finish_reason", "native_finish_reason", "usage", "logprobs"})
DELTA_FIELDS = frozenset({"role", "content", "reasoning_content", "reasoning", "tool_calls", "index"})
# What the long way has to see: citations become annotations, x_groq may hold usage.
LONG_WAY = frozenset({"citations", "search_results", "x_groq"})
TOOL_FIELDS = frozenset({"index", "id", "type", "function", "custom"})
EMPTY: tuple[object, ...] = (None, "", [], {})
# What `_usual` knows.
USUAL_FIELDS = frozenset(
    {"id", "object", "created", "model", "choices", "usage", "obfuscation", "service_tier", "system_fingerprint"}
)
USUAL_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs"})
USUAL_DELTA = frozenset({"role", "content", "refusal"})
USUAL_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter"})


def _third_event(data: bytes) -> int:
    """Where the third event of a read ends, if more follows; 0 where it is not so."""
    at = -2
    for _ in range(3):
        at = data.find(b"\n\n", at + 2)
        if at < 0:
            return 0
    return at + 2 if at + 2 < len(data) else 0


class Decoder(SseDecoder):
    """`chat.completion.chunk` and `text_completion` streams; end: `[DONE]`, or a clean HTTP end after the finish reasons."""

    ends_at_eof = True

    def __init__(self, call: Call, target: Target) -> None:
        super().__init__(call, target)
        self._open: set[int] = set()
        self._native_ids: dict[ToolCall, str] = {}
        self._unnamed: dict[tuple[int, object], tuple[str, str]] = {}
        self._seen: Json = {}
        self._waiting = False
        self._template = Template()

    def single(self, data: bytes) -> bytes | None:
        """As in SseDecoder."""
        template, stream = self._template, self.stream
        if self._waiting or not self.framer.between or self.ended or self.fault is not None or stream.finishing:
            return None
        if (event := template.single(data)) is not None:
            stream.sent += 1
        return event

    def feed(self, data: bytes) -> list[Item]:
        """As in SseDecoder. Where a read holds many events, the first ones teach the template and the rest is spliced at once."""
        if self.ended or self.fault is not None:
            return []
        template, cut = self._template, 0
        if template.least == 0 and template.teachable and (cut := _third_event(data)):
            self._events(data[:cut])
            if self.over():
                return self.taken()
            data = data[cut:]
        if template.least and not self._waiting and self.framer.between:
            if not cut and (event := template.single(data)) is not None:
                # Nothing else waits to be taken: it goes straight on.
                self.stream.sent += 1
                return [event]
            if (found := template.run(data)) is not None:
                run, count, data = found
                self.stream.put_run(run, count)
        if data and not self.over():
            self._events(data)
        return self.taken()

    def _events(self, data: bytes) -> None:
        """Event by event; the loop is written out here because it runs once per token."""
        template, put_event = self._template, self.stream.put_event
        for payload in self.framer.feed(data):
            known = template.least and not self._waiting and type(payload) is bytes
            if known and (event := template.fill(payload)) is not None:
                put_event(event)
                continue
            if payload == b"[DONE]":
                self._done()
                return
            try:
                chunk = orjson.loads(payload)
            except orjson.JSONDecodeError:
                self._payload(payload)
            else:
                if type(payload) is bytes and type(chunk) is dict:
                    if self._plain(chunk):
                        self.stream.stamp(chunk)
                        template.learn(payload, chunk)
                        continue
                    self.guarded(chunk)
                    self._waiting = self.stream.waiting
                    if not template.least and self._open and not self._waiting and self._plain(chunk):
                        # The first text, in the form that all others will have: only its own copy had the role.
                        self.stream.mark(chunk)
                        template.learn(payload, chunk)
                else:
                    self._payload(payload)
            if self.over():
                return

    def _usual(self, chunk: Json) -> bool:
        """The first, the last and the usage chunk of a text stream as OpenAI itself sends them, in half the time of the long way,
        which gives the same. False, and nothing done, for any other.
        """
        get, stream = chunk.get, self.stream
        choices, usage, tier, fingerprint = get("choices"), get("usage"), get("service_tier"), get("system_fingerprint")
        if type(choices) is not list or not USUAL_FIELDS.issuperset(chunk) or get("object") == "error":
            return False
        if (tier is not None and type(tier) is not str) or (fingerprint is not None and type(fingerprint) is not str):
            return False
        if len(choices) == 1:
            choice = choices[0]
            if usage or type(choice) is not dict or not USUAL_CHOICE.issuperset(choice) or choice.get("logprobs"):
                return False
            index, delta, native = choice.get("index"), choice.get("delta"), choice.get("finish_reason")
            if type(index) is not int or type(delta) is not dict or not USUAL_DELTA.issuperset(delta) or delta.get("refusal"):
                return False
            content = delta.get("content")
            if type(content) not in (str, NoneType) or (native is not None and native not in USUAL_REASONS):
                return False
            self._note(chunk, tier, fingerprint)
            stream.choice(index)
            if content:
                stream.put({"content": content}, index)
                self._open.add(index)
            if native:
                stream.finish(native, native, index)
            return True
        if choices or type(usage) is not dict or not usage:
            return False
        stream.usage = quirks.usage(usage)
        self._note(chunk, tier, fingerprint)
        return True

    def _note(self, chunk: Json, tier: str | None, fingerprint: str | None) -> None:
        stream = self.stream
        if not stream.id or not stream.created:
            stream.identify(chunk.get("id"), chunk.get("created"))
        if tier:
            stream.extras["service_tier"] = tier
        if fingerprint:
            stream.extras["system_fingerprint"] = fingerprint

    def _plain(self, chunk: Json) -> bool:
        """Is it a text delta of a choice that has begun, with nothing else to see to? Then it may go on as it is."""
        if not self._open:
            return False
        choices = chunk.get("choices")
        if type(choices) is not list or len(choices) != 1 or self._waiting or not LONG_WAY.isdisjoint(chunk):
            return False
        choice = choices[0]
        if type(choice) is not dict or type(index := choice.get("index")) is not int or index not in self._open:
            return False
        delta = choice.get("delta")
        if "message" in choice or choice.get("usage") is not None:
            return False
        if type(delta) is not dict or len(delta) != 1 or chunk.get("usage") is not None or "error" in chunk:
            return False
        text = delta.get("content")
        if type(text) is not str or not text or choice.get("finish_reason") is not None:
            return False
        chunk.pop("usage", None)
        choice["finish_reason"] = None
        return True

    def _payload(self, payload: bytes) -> None:
        if payload.strip() == b"[DONE]":
            self._done()
        else:
            super()._payload(payload)

    def _done(self) -> None:
        if self.stream.empty:
            self.fault = UpstreamCut("The provider ended its stream without a reply.")
        else:
            self.end()

    def end(self) -> None:
        for (index, key), (id, text) in self._unnamed.items():
            self.stream.open_tool(key, id, "", text, index)
        for index, choice in self.stream.choices.items():
            # No arguments at all are an empty object, or the client's parser fails; unless the provider was cut off before them.
            for tool in choice.tools if choice.finish_reason != "length" else ():
                if tool.kind == "function":
                    self.stream.tool_text(tool, "" if tool.arguments else "{}", index)
        super().end()

    def event(self, chunk: Json) -> None:
        """Any chunk, part by part."""
        if self._usual(chunk):
            return
        choices = chunk.get("choices")
        if chunk.get("error") or chunk.get("object") == "error" or chunk.get("type") == "error":
            raise in_band_error(error_words(chunk))
        if found := quirks.usage_of(chunk):
            self.stream.usage = quirks.usage(found)
        if choices is None:
            if "choices" not in chunk and not self._harmless(chunk):
                raise Malformed("The provider sent an event without choices.")
            choices = []
        self.stream.identify(chunk.get("id"), chunk.get("created"))
        annotations = self._beside_choices(chunk)
        for position, choice in enumerate(choices):
            index = choice.get("index")
            if index is not None and type(index) is not int:
                raise TypeError("index")
            self._choice(choice, position if index is None else index, annotations)
            annotations = []

    def _harmless(self, chunk: Json) -> bool:
        """Pings of gateways, and figures that some servers send on their own (usage, timings)."""
        return not chunk or chunk.get("type") == "ping" or "usage" in chunk or chunk.get("object") == "chat.completion.chunk"

    def _beside_choices(self, chunk: Json) -> list[Json]:
        """Keep the top-level fields for the next chunk (a list only where it changed); citations also become annotations."""
        annotations: list[Json] = []
        if chunk.keys() <= TOP_FIELDS:
            return annotations
        for name, value in chunk.items():
            if name in TOP_FIELDS or value is None or (isinstance(value, list | dict) and self._seen.get(name) == value):
                continue
            if name == "x_groq":
                value = {key: inner for key, inner in value.items() if key != "usage"}
            elif isinstance(value, list):
                self._seen[name] = value
                if name == "citations":
                    annotations = quirks.annotations_of(chunk)
            if value not in EMPTY:
                self.stream.extras[name] = value
        return annotations

    def _choice(self, choice: Json, index: int, annotations: list[Json]) -> None:
        delta = choice.get("delta")
        if delta is None:
            delta = {"content": choice["text"]} if "text" in choice else choice.get("message") or {}
        found = self._delta(delta)
        if annotations:
            found["annotations"] = [*found.get("annotations", []), *annotations]
        state = self.stream.choice(index)
        extras: Json = {}
        if not choice.keys() <= CHOICE_FIELDS:
            extras = {name: value for name, value in choice.items() if name not in CHOICE_FIELDS and value not in EMPTY}
        logprobs = choice.get("logprobs")
        if logprobs and any(logprobs.values()):
            extras["logprobs"] = logprobs
        if extras:
            if state.started and state.extras.keys() & extras.keys():
                self.stream.put({}, index)
            state.extras.update(extras)
        if found:
            self.stream.put(found, index)
            self._open.add(index)
        for call in delta.get("tool_calls") or ():
            self._tool_call(call, index)
        if native := choice.get("finish_reason"):
            self.stream.finish(quirks.finish_reason(native), choice.get("native_finish_reason") or native, index)

    def _delta(self, delta: Json) -> Json:
        """A delta's text, reasoning and further fields, without the empty ones."""
        content = delta.get("content")
        text, thinking, other = (content, "", None) if type(content) is str else quirks.split_content(content)
        found: Json = {}
        if text:
            found["content"] = text
        if reasoning := quirks.reasoning_of(delta) or thinking:
            found["reasoning_content"] = reasoning
        if not delta.keys() <= DELTA_FIELDS:
            found.update({name: value for name, value in delta.items() if name not in DELTA_FIELDS and value not in EMPTY})
        if other:
            found["provider_blocks"] = other
        if "function_call" in found:
            found["function_call"] = {name: value or "" for name, value in found["function_call"].items()}
        return found

    def _tool_call(self, call: Json, index: int) -> None:
        kind = "custom" if call.get("custom") else "function"
        function = call.get(kind) or {}
        id, name, key = str(call.get("id") or ""), function.get("name") or "", call.get("index")
        text = quirks.arguments_text(function.get("input" if kind == "custom" else "arguments"))
        choice = self.stream.choice(index)
        self._open.add(index)
        tool = quirks.same_call(choice, self._native_ids, key, id, name, text)
        if tool is not None:
            self._native_ids.setdefault(tool, id)
            self.stream.tool_text(tool, quirks.new_text(tool, id, name, text), index)
            return
        if waiting := self._unnamed.pop((index, key), None):
            id, text = id or waiting[0], waiting[1] + text
        if not name:
            self._unnamed[index, key] = (id, text)
            return
        extras = {field: value for field, value in call.items() if field not in TOOL_FIELDS and value not in EMPTY}
        tool = self.stream.open_tool(key, id, name, text, index, extras, kind)
        if id:
            self._native_ids[tool] = id
