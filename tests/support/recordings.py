"""Exchanges with providers, for tests that serve them: the recorded ones (outside of the repo) and the repo's own.

Strategy: one `Exchange` per file, whichever form the file has: the recorder's JSON (`response.status`, `.headers`, `.body_text`),
or the bare body of a reply that is no error (`*.sse`, `*.json` under tests/fixtures/<wire>).
The one rule: recorded content is read where it lies, and never copied into the repo. PENSTOCK_WIRE names another folder.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
RECORDINGS = Path(os.environ.get("PENSTOCK_WIRE") or ROOT.parent / "shared" / "wire")
ABSENT = "no recorded traffic: ../shared/wire is absent and PENSTOCK_WIRE names no folder"

# The recorder's name of an API -> the wire format that the gateway speaks to it.
WIRE_OF = {
    "openai.chat": "openai",
    "openai.completions": "openai",
    "openai.embeddings": "openai",
    "mistral.chat": "openai",
    "anthropic.messages": "anthropic",
    "gemini.generateContent": "gemini",
    "gemini.streamGenerateContent": "gemini",
    "cohere.chat.v2": "cohere",
}
BARE_API = {
    "openai": "openai.chat",
    "anthropic": "anthropic.messages",
    "gemini": "gemini.streamGenerateContent",
    "cohere": "cohere.chat.v2",
}


@dataclass(frozen=True)
class Exchange:
    """One reply of a provider. name: `folder/stem`, as pytest shows it. streaming: its body is a stream (errors never are)."""

    name: str
    api: str
    streaming: bool
    status: int
    headers: Mapping[str, str]
    body: bytes
    features: frozenset[str]

    @property
    def wire(self) -> str:
        return WIRE_OF[self.api]

    @property
    def kind(self) -> str:
        return {"openai.completions": "completions", "openai.embeddings": "embeddings"}.get(self.api, "chat")

    @property
    def is_error(self) -> bool:
        return self.status >= 400

    @property
    def content_type(self) -> str:
        return {name.lower(): value for name, value in self.headers.items()}.get("content-type", "application/json")


def recorded() -> list[Exchange]:
    """All recordings whose wire format the gateway speaks; none where the folder is absent."""
    return _folder(RECORDINGS, "")


def own() -> list[Exchange]:
    """The repo's own, hand-made after the providers' documents."""
    return _folder(FIXTURES, "own-")


def _folder(folder: Path, prefix: str) -> list[Exchange]:
    paths = sorted(path for path in folder.glob("*/*") if path.suffix in (".json", ".sse"))
    found = (_read(path, f"{prefix}{path.parent.name}/{path.stem}") for path in paths)
    return [exchange for exchange in found if exchange is not None]


def _read(path: Path, name: str) -> Exchange | None:
    if path.suffix == ".sse":
        return _bare(path, name + "-sse", streaming=True)
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None
    if not isinstance(found, dict) or "response" not in found:
        return _bare(path, name, streaming=False) if isinstance(found, dict) and _replies(found) else None
    if found["api"] not in WIRE_OF:
        return None
    response = found["response"]
    body = base64.b64decode(response["body_base64"]) if "body_base64" in response else response["body_text"].encode()
    features = frozenset(found["features"])
    return Exchange(name, found["api"], found["streaming"], response["status"], response["headers"], body, features)


def _bare(path: Path, name: str, *, streaming: bool) -> Exchange | None:
    api = BARE_API.get(path.parent.name)
    kind = "text/event-stream" if streaming else "application/json"
    return Exchange(name, api, streaming, 200, {"content-type": kind}, path.read_bytes(), frozenset()) if api else None


def _replies(body: Json) -> bool:
    """Is this the body of a reply (not an error, not a table of cases)?"""
    return (
        bool({"choices", "candidates"} & set(body)) or body.get("type") == "message" or {"message", "finish_reason"} <= set(body)
    )
