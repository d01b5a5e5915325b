"""Who else is asked about a text: a moderations endpoint in OpenAI's form, or a webhook.

    POST {base_url}/moderations   {model, input: [texts]}      -> {results: [{flagged, categories, category_scores}]}
    POST {url}                    {text, stage, id, rule}      -> {action: allow | block | redact, text?, ranges?, reason?}

Strategy: one question per text or list of texts, over the gateway's own connections, so many at a time as `at_once` allows. An
answer becomes a `Said`; what is no answer (a status, a timeout, another shape) is one as `on_failure` has it.
The one rule: the question has a timeout, and nothing of it or of the answer is logged.

API: https://platform.openai.com/docs/api-reference/moderations
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from middleware.guardrails.options import Outside, Rule
from middleware.guardrails.verdict import Side
from proxy.call import Limits, Provider, Route, Target
from proxy.errors import Refused
from proxy.translation import endpoint, headers
from proxy.transport import Transport, UpstreamRequest

Json = dict[str, Any]
LONGEST_ANSWER = 2**20


class Said(NamedTuple):
    """caught: the rule found something. text: what is to stand there instead, where the answer says so."""

    caught: bool = False
    text: str | None = None


class Figures:
    """Of the questions to one rule: how many by result, and seconds in all."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.seconds = 0.0


class Asker:
    """Asks about texts. at_once: questions that may be open. clock: seconds."""

    def __init__(self, at_once: int) -> None:
        self._room = asyncio.Semaphore(at_once)
        self._transport: Transport | None = None
        self._route: Callable[[str], Route] | None = None
        self.figures: dict[str, Figures] = {}

    def attach(self, transport: Transport | None, route: Callable[[str], Route], rules: Sequence[Rule]) -> None:
        """Raises Refused where a moderations target leads nowhere."""
        self._transport, self._route = transport, route
        for rule in rules:
            if rule.outside is not None and rule.outside.target is not None:
                self._target(rule.outside.target)

    async def ask(self, rule: Rule, texts: Sequence[str], side: Side, id: str) -> list[Said]:
        """One answer per text."""
        clock, figures = asyncio.get_running_loop().time, self.figures.setdefault(rule.id, Figures())
        assert rule.outside is not None
        began = clock()
        try:
            async with asyncio.timeout(rule.outside.timeout):
                async with self._room:
                    found = await self._asked(rule, rule.outside, texts, side, id)
            result = "answered"
        except TimeoutError:
            result, found = "timeout", [Said(not rule.outside.open)] * len(texts)
        except Exception:
            # No connection, a status, or whatever shape an answer has that is none.
            result, found = "failed", [Said(not rule.outside.open)] * len(texts)
        figures.count[result] += 1
        figures.seconds += clock() - began
        return found

    async def _asked(self, rule: Rule, outside: Outside, texts: Sequence[str], side: Side, id: str) -> list[Said]:
        if outside.target is not None:
            target = self._target(outside.target)
            url, fields = endpoint(target.provider, target.model, "/moderations"), headers(target.provider)
            answer = await self._post(url, fields, {"model": target.model, "input": list(texts)}, outside.timeout)
            return [Said(flagged(result, outside)) for _, result in zip(texts, answer["results"], strict=True)]
        fields = {"Content-Type": "application/json", **(outside.headers or {})}
        answers = [
            await self._post(outside.url, fields, {"text": text, "stage": side, "id": id, "rule": rule.id}, outside.timeout)
            for text in texts
        ]
        return [said(answer, text) for answer, text in zip(answers, texts, strict=True)]

    def _target(self, name: str) -> Target:
        assert self._route is not None
        try:
            target = self._route(name).targets[0]
        except Refused as error:
            raise Refused(f"guardrails: moderations: {error.message}") from None
        provider: Provider = target.provider
        if provider.missing or provider.api != "openai":
            why = f"its variable {provider.missing} is not set" if provider.missing else "its provider is not of api: openai"
            raise Refused(f"guardrails: moderations: '{name}' cannot be asked, {why}.")
        return target

    async def _post(self, url: str, fields: Mapping[str, str], body: Json, seconds: float) -> Json:
        assert self._transport is not None
        response = await self._transport.send(UpstreamRequest(url, fields, orjson.dumps(body)), Limits(connect=seconds))
        try:
            parts, size = [], 0
            while data := await response.read():
                parts.append(data)
                size += len(data)
                if size > LONGEST_ANSWER:
                    raise ValueError("too long")
            found: Json = orjson.loads(b"".join(parts))
            if response.status != 200 or not isinstance(found, dict):
                raise ValueError("no answer")
        except BaseException:
            response.close()
            raise
        response.done()
        return found


def flagged(result: Json, outside: Outside) -> bool:
    """Does one result of a moderation say that the rule has caught something?"""
    if outside.threshold is None and not outside.categories and not outside.without:
        return bool(result["flagged"])
    scores: Json = result.get("category_scores") or {}
    marks: Json = result.get("categories") or {}
    names = [name for name in {*scores, *marks} if _meant(name, outside)]
    if outside.threshold is None:
        return any(marks.get(name) for name in names)
    return any(isinstance(scores.get(name), int | float) and scores[name] >= outside.threshold for name in names)


def _meant(name: str, outside: Outside) -> bool:
    """A category stands for those below it: `sexual` for `sexual/minors`."""
    top = name.partition("/")[0]
    if name in outside.without or top in outside.without:
        return False
    return not outside.categories or name in outside.categories or top in outside.categories


def said(answer: Json, text: str) -> Said:
    """A webhook's answer. Raises ValueError for one that is none."""
    action = answer["action"]
    if action == "allow":
        return Said()
    if action == "block":
        return Said(True)
    if action != "redact":
        raise ValueError("no such action")
    if isinstance(answer.get("text"), str):
        return Said(True, answer["text"])
    parts, at = [], 0
    for start, end in sorted((int(start), int(end)) for start, end in answer["ranges"]):
        if not at <= start <= end <= len(text):
            raise ValueError("no such range")
        parts += [text[at:start], "[REDACTED]"]
        at = end
    return Said(True, "".join([*parts, text[at:]]))
