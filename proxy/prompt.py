"""Text completions, for upstreams that only chat: the prompt becomes a user's message, and the reply's text is the completion.

The one rule: what a chat cannot do (several prompts at once, tokens, `suffix`, `echo`, `best_of`) is refused by name.

API: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from proxy.call import Call, Target
from proxy.errors import Refused

Json = dict[str, Any]


def takes_text(target: Target) -> bool:
    """The target completes text natively: its row says so by a glob."""
    return any(fnmatchcase(target.model, glob) for glob in target.provider.completions)


def as_chat(call: Call) -> Call:
    """The same question as a chat call."""
    request = dict(call.request)
    prompt = request.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise _refusal("prompt", "a model that only chats takes one prompt, as text")
    if request.pop("suffix", None):
        raise _refusal("suffix", "a model that only chats cannot complete up to a suffix")
    if request.pop("echo", None):
        raise _refusal("echo", "a model that only chats does not repeat the prompt")
    if (request.pop("best_of", None) or 1) != 1:
        raise _refusal("best_of", "a model that only chats gives one answer")
    if request.pop("logprobs", None) is not None:
        raise _refusal("logprobs", "a model that only chats has no text completion log probabilities")
    request["messages"] = [{"role": "user", "content": prompt}]
    return replace(call, kind="chat", request=request)


def _refusal(param: str, why: str) -> Refused:
    return Refused(f"{param}: {why}.", code="unsupported_by_target", param=param)
