"""All texts of one streamed reply: each in a channel of its own, so that none waits for another.

Strategy: batch in, items out. An encoded text event is recognised by what stands around its text and is not parsed; other chunks
are taken apart into parts with one text each. A channel (content, reasoning, refusal, each tool call, of each choice) holds back
what may become a match. Texts that nobody may hold (`flag`, `parallel`, `after`) are looked at as they pass.
The one rule: with the final batch everything that waits goes out before the finish chunks, or the reply is blocked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from middleware.guardrails.beside import looked
from middleware.guardrails.channel import CONTEXT, Channel, Encoded
from middleware.guardrails.edits import Look
from middleware.guardrails.rules.reading import plain
from middleware.guardrails.texts import Key, Part, parts
from middleware.guardrails.verdict import UNSAID, worded
from proxy.errors import GatewayError
from proxy.reply import Batch, Chunk, Item, Run, single_events
from proxy.text_events import TextEvents

Json = dict[str, Any]
# Told of text that goes out, by where it stands.
Told = Callable[[Key, str], None]
# What goes back to the provider as it came: no originals are put back in it.
SIGNED = frozenset({"reasoning_content", "reasoning", "reasoning_details"})


class Screen:
    """hold: rules that hold text back, None where there are none. watch: those that only look. told: hears what goes out."""

    def __init__(self, hold: Look | None, watch: Look | None, told: Told | None = None) -> None:
        self._hold, self._watch, self._told = hold, watch, told
        self._events = TextEvents()
        # By what stands before the text: where the events of a stream belong.
        self._keys: dict[bytes, Key] = {}
        self._channels: dict[Key, Channel] = {}
        self._touched: dict[Key, Channel] = {}
        self._watched: dict[Key, Watching] = {}
        self._roles: dict[int, str] = {}
        self._out: list[Item] = []
        self.blocked = False

    def see(self, batch: Batch) -> list[Item]:
        """What may go out now. Sets `blocked` where nothing more may."""
        # Numbered events, whose numbers would not fit any more, are taken as chunks.
        for item in batch.items if batch.number is None else batch.chunks:
            if isinstance(item, Run):
                for event in single_events(item):
                    self._event(event)
            elif isinstance(item, bytes):
                self._event(item)
            else:
                self._chunk(item)
            if self.blocked:
                break
        if not self.blocked:
            self._settle(over=batch.final)
        out, self._out = self._out, []
        return out

    def fault(self, error: Exception) -> Exception:
        """The error that the reply ends in; a provider may say in it what no text of its may have. Originals are not put back."""
        if self._hold is None or not isinstance(error, GatewayError):
            return error
        settled = self._hold.onward().settled(error.message)
        return error if settled == error.message else worded(error, settled or UNSAID)

    def _event(self, event: bytes) -> None:
        events = self._events
        text = events.text(event)
        if text is None:
            self._chunk(orjson.loads(event[event.index(b"data: ") + 6 : -2]))
            return
        key = self._keys.get(events.head)
        if key is None:
            if len(self._keys) > 64:
                self._keys.clear()
            chunk = orjson.loads(event[event.index(b"data: ") + 6 : -2])
            seen = self._looked(chunk)
            if self.blocked:
                return
            if seen is not chunk:
                self._parts(seen)
                return
            key = self._keys[events.head] = (chunk["choices"][0]["index"], "content", 0)
        said: str = orjson.loads(b'"%b"' % text) if b"\\" in text else text.decode()
        self._text(key, Encoded(event, events.head, events.tail), said)

    def _chunk(self, chunk: Chunk) -> None:
        chunk = self._looked(chunk)
        if not self.blocked:
            self._parts(chunk)

    def _parts(self, chunk: Chunk) -> None:
        for part in parts(chunk):
            part = self._without_role(part)
            if part.key is not None:
                self._text(part.key, part, part.text)
            elif not _empty(part.chunk):
                self._settle(over=_finishes(part.chunk))
                if self.blocked:
                    return
                self._put(part.chunk)

    def _text(self, key: Key, source: Part | Encoded, text: str) -> None:
        if self._watch is not None and self._watching(key).sees(text):
            self.blocked = True
            return
        if self._hold is None:
            if self._told is not None:
                self._told(key, text)
            self._put(source.event if isinstance(source, Encoded) else source.chunk)
            return
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = self._opened(key, self._hold)
        channel.add(source, text)
        self._touched[key] = channel

    def _opened(self, key: Key, look: Look) -> Channel:
        told = self._told
        hears = None if told is None else lambda text: told(key, text)
        return Channel(look.onward() if key[1] in SIGNED else look, json=_json(key), told=hears)

    def _watching(self, key: Key) -> Watching:
        assert self._watch is not None
        found = self._watched.get(key)
        if found is None:
            found = self._watched[key] = Watching(self._watch)
        return found

    def _settle(self, *, over: bool = False) -> None:
        """Let go of what may go, of the channels with news; of all at the end."""
        touched = self._channels if over else self._touched
        for channel in touched.values():
            for item in channel.settle(over=over):
                self._put(item)
            if channel.blocked:
                self.blocked = True
                return
        self._touched.clear()
        if over:
            for watching in self._watched.values():
                self.blocked = self.blocked or watching.ends()

    def _put(self, item: Item) -> None:
        self._out.append(self._with_role(item) if self._roles else item)

    def _without_role(self, part: Part) -> Part:
        """The role goes with whichever delta of its choice goes first."""
        choices = part.chunk["choices"]
        if not choices or (role := choices[0]["delta"].get("role")) is None or not self._holds(part):
            return part
        choice = choices[0]
        self._roles[choice["index"]] = role
        delta = {name: value for name, value in choice["delta"].items() if name != "role"}
        return part._replace(chunk={**part.chunk, "choices": [{**choice, "delta": delta}]})

    def _holds(self, part: Part) -> bool:
        return self._hold is not None and len(part.chunk["choices"]) == 1

    def _with_role(self, item: Item) -> Item:
        chunk: Chunk = orjson.loads(item[item.index(b"data: ") + 6 : -2]) if isinstance(item, bytes) else item
        if not chunk["choices"] or (role := self._roles.pop(chunk["choices"][0]["index"], None)) is None:
            return item
        choice = chunk["choices"][0]
        return {**chunk, "choices": [{**choice, "delta": {"role": role, **choice["delta"]}}]}

    def _looked(self, chunk: Chunk) -> Chunk:
        """A chunk, what stands beside its growing texts looked at: each of those texts is whole."""
        return looked(chunk, self._alone, held=self._hold is not None)

    def _alone(self, text: str) -> str:
        if self._watch is not None and (watching := Watching(self._watch)) and (watching.sees(text) or watching.ends()):
            self.blocked = True
        if self._hold is None or self.blocked:
            return text
        settled = self._hold.onward().settled(text)
        self.blocked = settled is None
        return text if settled is None else settled


class Watching:
    """A text that passes while it is looked at."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._text = ""
        self._seen = 0

    def sees(self, text: str) -> bool:
        """Is the reply to end here?"""
        self._text += plain(text).text
        return self._judged(over=False)

    def ends(self) -> bool:
        return self._judged(over=True)

    def _judged(self, *, over: bool) -> bool:
        judged = self._look.judge(self._text, self._seen, over=over)
        cut = max(0, judged.held - CONTEXT)
        self._text, self._seen = self._text[cut:], judged.held - cut
        return judged.blocked is not None


BARE = frozenset({"index", "delta", "finish_reason"})


def _empty(chunk: Chunk) -> bool:
    """Is it left with a choice of which nothing is said?"""
    choices = chunk["choices"]
    return len(choices) == 1 and not choices[0]["delta"] and not choices[0].get("finish_reason") and choices[0].keys() <= BARE


def _finishes(chunk: Chunk) -> bool:
    return any(choice.get("finish_reason") for choice in chunk["choices"])


def _json(key: Key) -> bool:
    """Arguments of a function are JSON; the input of a custom tool is not."""
    return key[1] in ("tool_calls.function", "function_call.arguments")
