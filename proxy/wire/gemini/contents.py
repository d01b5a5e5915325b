"""OpenAI's messages as Gemini's contents: two roles, user and model, each content a list of parts.

Strategy: messages become parts one by one and consecutive ones of one role join one content; system messages leave the row
for systemInstruction. Results of tools stand in a user content of their own, all results of parallel calls together.
The one rule: thought signatures go back onto the part they came with. A `reasoning_details` entry of format
"google-gemini-v1" with an id belongs to that tool call, one without to the text (an own empty text part, if there is none).

Gemini 3 refuses a function call of the current turn without signature. Where the history has none (another provider made
it), the first call of each step gets the value that Google documents for that:
https://ai.google.dev/gemini-api/docs/thought-signatures
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from proxy.call import Call, Target
from proxy.translation import arguments_of, data_url, invalid, messages_of, text_of, unsupported
from proxy.wire.gemini.thinking import generation

Json = dict[str, Any]

REASONING_FORMAT = "google-gemini-v1"
NO_SIGNATURE = "skip_thought_signature_validator"

# Ids that `ChunkStream.open_tool` made because Gemini gave none: they are not sent back. All others are, on both sides.
MINTED_ID = re.compile(r"call_\w+_\d+_\d+")

# Where a content part keeps what goes inline: its object's name and the field in it.
INLINE_PARTS = {
    "image_url": ("image_url", "url"),
    "video_url": ("video_url", "url"),
    "video": ("video", "url"),
    "file": ("file", "file_data"),
}


class Contents:
    """turns: Gemini's `contents`. system: the parts of `systemInstruction`. Raises Refused with the path of the fault."""

    def __init__(self, call: Call, target: Target) -> None:
        self.turns: list[Json] = []
        self.system: list[Json] = []
        self._target = target
        self._names: dict[str, str] = {}
        self._last = ""
        messages = messages_of(call)
        asked = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        self._signed_from = asked if generation(target.model) >= (3, 0) else len(messages)
        for number, message in enumerate(messages):
            self._add(number, message)
        if not self.turns and self.system:
            # Gemini wants at least one content: a lone instruction is what the user says.
            self.turns, self.system = [{"role": "user", "parts": self.system}], []

    def _add(self, number: int, message: Json) -> None:
        path = f"messages[{number}]"
        role = message["role"]
        if role in ("system", "developer"):
            text = text_of(message.get("content"), f"{path}.content")
            self.system += [{"text": text}] if text else []
        elif role == "user":
            self._join("user", "user", self._parts(message.get("content"), f"{path}.content"))
        elif role == "assistant":
            self._join("model", "model", self._assistant(message, path, needs_signature=number > self._signed_from))
        elif role in ("tool", "function"):
            self._join("user", "tool", [self._result(message, path)])
        else:
            unsupported(self._target, f"{path}.role", f"The role '{role}'")

    def _join(self, role: str, kind: str, parts: list[Json]) -> None:
        if not parts:
            return
        if kind == self._last:
            self.turns[-1]["parts"] += parts
        else:
            self.turns.append({"role": role, "parts": parts})
        self._last = kind

    def _parts(self, content: object, path: str) -> list[Json]:
        if content is None:
            return []
        if isinstance(content, str):
            return [{"text": content}]
        if not isinstance(content, list):
            invalid(path, "must be a string or a list of content parts")
        return [self._part(part, f"{path}[{number}]") for number, part in enumerate(content)]

    def _part(self, part: object, path: str) -> Json:
        if not isinstance(part, dict):
            invalid(path, "must be an object")
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text", "refusal"):
            return {"text": text_of([part], path)}
        if kind == "input_audio":
            return _audio(part.get("input_audio"), f"{path}.input_audio")
        if kind not in INLINE_PARTS:
            unsupported(self._target, path, f"A content part of type '{kind}'")
        outer, inner = INLINE_PARTS[kind]
        return self._inline(part.get(outer), inner, f"{path}.{outer}")

    def _inline(self, value: object, name: str, path: str) -> Json:
        """inlineData of a `data:` URL; the gateway fetches no URL, and this wire takes none."""
        url = value.get(name) if isinstance(value, dict) else value
        if isinstance(value, dict):
            path = f"{path}.{name}"
        if not isinstance(url, str):
            invalid(path, "must be a data: URL")
        found = data_url(url)
        if found is None:
            unsupported(self._target, path, "A URL (inline images, files and videos only: data: URLs in base64)")
        return {"inlineData": {"mimeType": found[0], "data": found[1]}}

    def _assistant(self, message: Json, path: str, *, needs_signature: bool) -> list[Json]:
        if message.get("audio"):
            unsupported(self._target, f"{path}.audio", "An earlier audio reply")
        by_call, loose = _signatures(message)
        parts = [part for part in self._parts(message.get("content"), f"{path}.content") if part.get("text") != ""]
        if isinstance(message.get("refusal"), str) and message["refusal"]:
            parts.append({"text": message["refusal"]})
        images = message.get("images") or []
        parts += self._parts(images, f"{path}.images")
        _sign_text(parts, loose)
        calls = self._calls(message, path)
        for id, part in calls:
            if id in by_call:
                part["thoughtSignature"] = by_call[id]
        if calls and needs_signature and not any("thoughtSignature" in part for _, part in calls):
            calls[0][1]["thoughtSignature"] = NO_SIGNATURE
        return parts + [part for _, part in calls]

    def _calls(self, message: Json, path: str) -> list[tuple[str, Json]]:
        """(id, functionCall part) of the message's tool calls, or of its legacy function_call."""
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            invalid(f"{path}.tool_calls", "must be a list")
        found = [self._call(call, f"{path}.tool_calls[{number}]") for number, call in enumerate(calls)]
        if message.get("function_call"):
            found.append(self._call({"function": message["function_call"]}, path))
        return found

    def _call(self, call: object, path: str) -> tuple[str, Json]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            unsupported(self._target, path, "A tool call that is not of a function")
        id = str(call.get("id") or "")
        self._names[id] = function["name"]
        made: Json = {"name": function["name"], "args": arguments_of(call, path)}
        return id, {"functionCall": _with_id(made, id)}

    def _result(self, message: Json, path: str) -> Json:
        """A functionResponse; `tool` messages name the call they answer, the legacy `function` ones the function."""
        id = str(message.get("tool_call_id") or "")
        name = message.get("name") if message["role"] == "function" else self._names.get(id)
        if not isinstance(name, str):
            invalid(f"{path}.tool_call_id", "no earlier assistant message has this tool call")
        text = text_of(message.get("content"), f"{path}.content")
        return {"functionResponse": _with_id({"name": name, "response": _response(text)}, id)}


def _with_id(made: Json, id: str) -> Json:
    return made if not id or MINTED_ID.fullmatch(id) else {**made, "id": id}


def _response(text: str) -> Json:
    """functionResponse.response has to be an object."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    return found if isinstance(found, dict) else {"result": text}


def _audio(audio: object, path: str) -> Json:
    if not isinstance(audio, dict) or not isinstance(audio.get("data"), str) or not isinstance(audio.get("format"), str):
        invalid(path, "must have data (base64) and format")
    return {"inlineData": {"mimeType": f"audio/{audio['format']}", "data": audio["data"]}}


def _signatures(message: Json) -> tuple[dict[str, str], list[str]]:
    """Gemini's own signatures in an assistant message: by tool call id, and those without one, in order."""
    by_call: dict[str, str] = {}
    loose: list[str] = []
    details = message.get("reasoning_details")
    for entry in details if isinstance(details, list) else []:
        if not isinstance(entry, dict) or entry.get("format") != REASONING_FORMAT or not isinstance(entry.get("data"), str):
            continue
        if entry.get("id"):
            by_call[str(entry["id"])] = entry["data"]
        else:
            loose.append(entry["data"])
    return by_call, loose


def _sign_text(parts: list[Json], signatures: list[str]) -> None:
    """The last signature belongs to the end of the text; two are never put on one part."""
    texts = [part for part in parts if "text" in part]
    if signatures and texts:
        texts[-1]["thoughtSignature"] = signatures[-1]
        signatures = signatures[:-1]
    parts[:0] = [{"text": "", "thoughtSignature": signature} for signature in signatures]
