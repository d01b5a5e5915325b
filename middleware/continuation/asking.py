"""How a target is asked to go on: the call with the text so far, as assistant prefill or with an instruction behind it.

Strategy: one target after the other, each in the form that it takes, until one has its first chunk in hand; the next target
first, the one that broke only where there is no other. To begin anew is the client's own call again, without the one that broke.
The one rule: everything else of the request stays, but a bound on the output shrinks by what was said.

Prefill: https://docs.claude.com/en/docs/build-with-claude/prompt-engineering/prefill-claudes-response ·
https://docs.mistral.ai/capabilities/completion/#other-useful-features (`prefix`) ·
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html (`continue_final_message`)
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from proxy.call import Call, Target, altered
from proxy.errors import GatewayError
from proxy.pipeline import Handler
from proxy.prompt import as_chat, takes_text
from proxy.reply import Reply

Json = dict[str, Any]
Style = Literal["message", "prefix", "final"]
Form = Literal["message", "prefix", "final", "instruction", "prompt"]

INSTRUCTION = (
    "Your previous message was cut off by a technical fault before it was complete. Continue it exactly where it stops, as if"
    " there had been no break: begin with the very next word, do not repeat anything, and do not mention the interruption."
)
OUTPUT_BOUNDS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class Added:
    """Of a reply that goes on: the estimated tokens that its prompt had beside the client's own."""

    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Asking:
    """prefill: by globs of `provider/model`, how that model takes text to go on from; the first that fits counts.

    message: as a last message of the assistant. prefix: the same, marked `prefix` (Mistral, DeepSeek). final: the same, with
    `continue_final_message` (vLLM, SGLang). instruction: what all others are told.
    """

    prefill: Mapping[str, Style] = field(default_factory=dict)
    instruction: str = INSTRUCTION

    async def anew(self, call: Call, next: Handler, broken: Sequence[str]) -> Reply:
        """The same question again. broken: the targets that broke, the last one last. Raises GatewayError."""
        return await next(altered(call, target=None, targets=tuple(candidates(call, broken))))

    async def on(self, call: Call, next: Handler, broken: Sequence[str], text: str) -> Reply:
        """The reply that goes on from `text`. Raises GatewayError: the last one's."""
        failed: GatewayError | None = None
        for target in candidates(call, broken):
            for form in self._forms(call, target):
                if failed is not None and _too_late(call):
                    raise failed
                try:
                    reply = await next(altered(self.extended(call, form, text), target=None, targets=(target,)))
                except GatewayError as error:
                    failed = error
                    if error.status != 400:
                        break
                else:
                    added = Added(estimated_tokens(text) + (estimated_tokens(self.instruction) if form == "instruction" else 0))
                    return reply.with_head(extensions={**reply.head.extensions, Added: added})
        assert failed is not None, "a call that had a reply has a target"
        raise failed

    def _forms(self, call: Call, target: Target) -> tuple[Form, ...]:
        """How this target is asked, and how where it refuses that: prefill is not taken with extended thinking, for one."""
        if call.kind == "completions" and takes_text(target):
            return ("prompt",)
        style = next((style for glob, style in self.prefill.items() if fnmatchcase(target.name, glob)), None)
        return ("instruction",) if style is None else (style, "instruction")

    def extended(self, call: Call, form: Form, text: str) -> Call:
        """The call with what was said in it. What ends in blanks is sent without them: providers refuse them, and the blanks that
        come again are an overlap."""
        said = text.rstrip()
        if form == "prompt":
            prompt = call.request["prompt"]
            prompt = prompt[0] if isinstance(prompt, list) else prompt
            return altered(call, request=_shortened({**call.request, "prompt": prompt + said}, text))
        if call.kind == "completions":
            call = as_chat(call)
        request = _shortened(call.request, text)
        if said:
            request["messages"] = _with_answer(request["messages"], said, {"prefix": True} if form == "prefix" else {})
        if form == "instruction" and said:
            request["messages"].append({"role": "user", "content": self.instruction})
        elif form == "final":
            request |= {"continue_final_message": True, "add_generation_prompt": False}
        return altered(call, request=request)


def candidates(call: Call, broken: Sequence[str]) -> list[Target]:
    """Whom to ask, best first: those behind the one that broke, those before it, those that broke earlier."""
    targets = list(call.targets) or ([call.target] if call.target else [])
    last = next((place for place, target in enumerate(targets) if target.name == broken[-1]), -1)
    others = [target for target in targets[last + 1 :] + targets[: max(last, 0)] if target.name != broken[-1]]
    return sorted(others, key=lambda target: target.name in broken) or targets


def estimated_tokens(text: str) -> int:
    """About what a tokenizer counts: four bytes each."""
    return (len(text.encode()) + 3) // 4


def _with_answer(messages: Collection[Json], said: str, mark: Json) -> list[Json]:
    """The messages with the answer so far; it goes on from a prefill of the client's own."""
    *before, last = messages
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return [*before, {**last, "content": last["content"] + said, **mark}]
    return [*messages, {"role": "assistant", "content": said, **mark}]


def _shortened(request: Json, text: str) -> Json:
    """A new request, its bounds on the output less what was said, by estimate."""
    spent = estimated_tokens(text)
    shorter = {name: max(1, most - spent) for name in OUTPUT_BOUNDS if isinstance(most := request.get(name), int)}
    return {**request, **shorter}


def _too_late(call: Call) -> bool:
    return call.deadline is not None and asyncio.get_running_loop().time() >= call.deadline
