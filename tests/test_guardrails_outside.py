"""Others who are asked: moderations and webhooks, held back, beside the stream and at its end; slow, down, and at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from middleware.guardrails.options import Outside
from middleware.guardrails.outside import Said, flagged, said
from tests.support.gateway import CONFIG, Answer, ask, chat, gateway, until
from tests.support.rawclient import connected
from tests.support.upstream import Asked, Line, Upstream, stream, whole
from tests.test_guardrails import END, completion, event, metrics, told, user, words

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
GUARDED = CONFIG.replace("  - tracking\n", "  - metrics\n  - tracking\n  - guardrails: {options}\n")


def moderation(text: str) -> Json:
    """One result: what is bad, and how bad."""
    bad, worse = "hate" in text, "sexual" in text
    return {
        "flagged": bad or worse,
        "categories": {"hate": bad, "sexual": worse, "sexual/minors": False},
        "category_scores": {"hate": 0.9 if bad else 0.1, "sexual": 0.6 if worse else 0.0, "sexual/minors": 0.0},
    }


class Provider:
    """Chats with `pieces`, moderates, and judges as a webhook; asked: the bodies of the questions, by path."""

    def __init__(self, pieces: list[bytes], verdict: Json | None = None) -> None:
        self.pieces, self.verdict = pieces, verdict
        self.asked: dict[str, list[Json]] = {}
        self.open = self.most = 0
        self.answers = True

    async def __call__(self, asked: Asked, line: Line) -> None:
        path = asked.path.rsplit("/", 1)[1]
        self.asked.setdefault(path, []).append(asked.json)
        if path == "completions":
            await stream(self.pieces)(asked, line)
            return
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            if not self.answers:
                await line.forever()
            elif path == "moderations":
                results = [moderation(text) for text in asked.json["input"]]
                await whole(orjson.dumps({"id": "m", "model": "omni", "results": results}))(asked, line)
            else:
                await whole(orjson.dumps(self.judged(asked.json["text"])))(asked, line)
        finally:
            self.open -= 1

    def judged(self, text: str) -> Json:
        if self.verdict is not None:
            return self.verdict
        at = text.find("secret")
        return {"action": "allow"} if at < 0 else {"action": "redact", "ranges": [[at, at + 6]]}


async def answered(provider: Provider, options: str, body: Json | None = None) -> Answer:
    async with (
        Upstream(provider) as upstream,
        gateway(upstream.url, GUARDED, options=options.format(url=upstream.url)) as running,
    ):
        answer = await ask(running.port, body or chat())
        provider.asked["metrics"] = [{"text": await metrics(running.port)}]
        return answer


def moderated(rest: str = "") -> str:
    return "{{rules: [{{kind: moderations, moderations: openai/omni, " + rest + "}}]}}"


def hooked(rest: str = "") -> str:
    return "{{rules: [{{kind: webhook, id: hook, url: '{url}/judge', " + rest + "}}]}}"


async def test_moderations_of_the_input_are_one_question_before_anything_is_asked() -> None:
    provider = Provider(words("Hi"))
    body = chat(
        messages=[{"role": "user", "content": "fine"}, {"role": "user", "content": [{"type": "text", "text": "I hate it"}]}]
    )
    answer = await answered(provider, moderated("on: input"), body)
    assert (answer.status, answer.error and answer.error["param"]) == (400, "messages[1].content[0].text")
    assert provider.asked["moderations"] == [{"model": "omni", "input": ["fine", "I hate it"]}]
    assert "completions" not in provider.asked


@pytest.mark.parametrize(
    ("fields", "outside", "caught"),
    [
        ("I hate it", Outside("o/m"), True),
        ("fine", Outside("o/m"), False),
        ("I hate it", Outside("o/m", categories=("sexual",)), False),
        ("I hate it", Outside("o/m", without=("sexual",)), True),
        ("sexual", Outside("o/m", without=("sexual",)), False),
        ("sexual", Outside("o/m", categories=("sexual",), threshold=0.5), True),
        ("sexual", Outside("o/m", threshold=0.7), False),
    ],
)
def test_categories_and_thresholds(fields: str, outside: Outside, caught: bool) -> None:
    assert flagged(moderation(fields), outside) is caught


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"action": "allow"}, Said()),
        ({"action": "block", "reason": "no"}, Said(True)),
        ({"action": "redact", "text": "x"}, Said(True, "x")),
        ({"action": "redact", "ranges": [[4, 6], [0, 2]]}, Said(True, "[REDACTED]cd[REDACTED]")),
    ],
)
def test_a_webhook_s_answers(answer: Json, found: Said) -> None:
    assert said(answer, "abcdef") == found


@pytest.mark.parametrize(
    "answer", [{"action": "maybe"}, {"action": "redact", "ranges": [[0, 9]]}, {"action": "redact", "ranges": [[2, 1]]}]
)
def test_what_is_no_answer(answer: Json) -> None:
    with pytest.raises(ValueError, match="no such"):
        said(answer, "abcdef")


@pytest.mark.parametrize("stream_it", [True, False])
async def test_held_back_nothing_leaves_before_it_was_judged(stream_it: bool) -> None:
    """With a window of twelve characters the third question catches it; two windows have gone."""
    provider = Provider(words("One two", " three", " four", " five six", " I ha", "te it"))
    answer = await answered(provider, moderated("on: output, window: 12"), chat(stream=stream_it))
    if stream_it:
        assert b"hate" not in answer.body
        assert b" ha" not in answer.body
    assert provider.asked["moderations"][-1]["input"][0].endswith("hate it")
    if stream_it and answer.status == 200:
        assert answer.chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert told(answer) == [{"id": "moderations", "action": "block", "on": "output"}]
    else:
        assert answer.status == 400


async def test_held_back_and_fine_it_is_all_there_and_ends_as_it_ended() -> None:
    provider = Provider(words("One two", " three", " four", " five six"))
    answer = await answered(provider, moderated("window: 12"))
    assert (answer.text, answer.done, told(answer)) == ("One two three four five six", True, [])
    assert 'penstock_guardrails_asked_total{result="answered",rule="moderations"}' in provider.asked["metrics"][0]["text"]


async def test_beside_the_stream_it_goes_on_and_is_cut_when_the_verdict_comes() -> None:
    sent: list[bool] = []
    lines: list[Line] = []

    async def talks(asked: Asked, line: Line) -> None:
        if asked.path.endswith("moderations"):
            await until(lambda: sent)
            await whole(orjson.dumps({"results": [moderation(text) for text in asked.json["input"]]}))(asked, line)
            return
        lines.append(line)
        await line.head()
        await line.chunk(event({"content": "I hate"}), event({"content": " it"}))
        await line.forever()

    options = moderated("on: output, mode: parallel, window: 5").format()
    async with Upstream(talks) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        with await connected(running.port) as client:
            await client.post(chat())
            await client.read_until(b"I hate")
            sent.append(True)
            text = (await client.read_until(b"[DONE]")).decode()
            await until(lines[0].closed.is_set)
    assert '"native_finish_reason":"penstock:guardrails"' in text


async def test_beside_the_stream_the_end_waits_for_the_last_verdict() -> None:
    provider = Provider(words("One ", "I hate it"))
    answer = await answered(provider, moderated("on: output, mode: parallel"))
    assert answer.text == "One I hate it"
    assert answer.chunks[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_after_the_stream_the_verdict_is_in_the_last_chunk() -> None:
    provider = Provider(words("One ", "I hate it"))
    answer = await answered(provider, moderated("on: output, mode: after"))
    assert (answer.text, answer.done) == ("One I hate it", True)
    assert answer.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert told(answer) == [{"id": "moderations", "action": "flag", "on": "output"}]
    assert [one["input"] for one in provider.asked["moderations"]] == [["One I hate it"]]


async def test_a_webhook_redacts_what_goes_in_and_what_comes_out() -> None:
    provider = Provider(words("It is", " a sec", "ret", " indeed."))
    answer = await answered(provider, hooked(), user("my secret"))
    assert provider.asked["completions"][0]["messages"][0]["content"] == "my [REDACTED]"
    assert (answer.text, answer.done) == ("It is a [REDACTED] indeed.", True)
    question = provider.asked["judge"][0]
    assert question == {"text": "my secret", "stage": "input", "id": answer.headers["X-Request-Id"], "rule": "hook"}
    assert told(answer) == [{"id": "hook", "action": "redact", "on": side} for side in ("input", "output")]


async def test_a_webhook_that_sees_the_text_before_again_redacts_it_once() -> None:
    provider = Provider(words("It is", " a secret", " and", " a secret", " indeed."))
    provider.judged = lambda text: {"action": "redact", "text": text.replace("secret", "***")}  # type: ignore[method-assign]
    answer = await answered(provider, hooked("on: output, window: 6"))
    assert (answer.text, answer.done) == ("It is a *** and a *** indeed.", True)


async def test_what_waits_for_a_verdict_is_not_sent_where_a_pattern_blocks() -> None:
    provider = Provider(words("One two three. ", "Now ", "titan ", "and "))
    options = "{{rules: [{{kind: deny, words: [titan]}}, {{kind: webhook, url: '{url}/judge', on: output}}]}}"
    answer = await answered(provider, options)
    assert answer.status == 400
    assert "judge" not in provider.asked
    assert b"One" not in answer.body


async def test_what_others_are_asked_about_is_redacted_and_has_no_originals() -> None:
    provider = Provider(words("Dear [EMAIL_1], card ", "4111 1111 1111 1111."))
    options = "{{restore: true, rules: [email, card, {{kind: webhook, url: '{url}/judge'}}]}}"
    answer = await answered(provider, options, user("I am me@x.com"))
    assert answer.text == "Dear me@x.com, card [CARD_1]."
    assert [one["text"] for one in provider.asked["judge"]] == ["I am [EMAIL_1]", "Dear [EMAIL_1], card [CARD_1]."]


@pytest.mark.parametrize("failing", ["slow", "status", "nonsense"])
@pytest.mark.parametrize("open_", [True, False])
async def test_who_does_not_answer_lets_it_through_or_not_as_configured(failing: str, open_: bool) -> None:
    provider = Provider(words("Hi"), verdict={"action": "maybe"} if failing == "nonsense" else None)
    provider.answers = failing != "slow"
    path = "nowhere/else" if failing == "status" else "judge"
    options = hooked(f"timeout: 50ms, on: input, on_failure: {'open' if open_ else 'closed'}").replace("judge", path)
    if failing == "status":
        provider.judged = lambda text: [][0]  # type: ignore[method-assign]
    answer = await answered(provider, options, user("fine"))
    assert answer.status == (200 if open_ else 400)
    if not open_:
        assert answer.error is not None
        assert answer.error["code"] == "content_filter"


async def test_only_so_many_questions_at_once() -> None:
    provider = Provider(words("Hi"))
    options = "{at_once: 2, rules: [{kind: moderations, moderations: openai/omni, on: input}]}"
    async with Upstream(provider) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        answers = await asyncio.gather(*(ask(running.port, user("fine")) for _ in range(8)))
    assert [answer.status for answer in answers] == [200] * 8
    assert provider.most <= 2


async def test_orq_s_moderations_ask_where_the_operator_s_rule_asks() -> None:
    provider = Provider(words("Hi"))
    options = "{{rules: [{{kind: moderations, moderations: openai/omni, when: asked}}]}}"
    for id, text, status in (
        ("orq_sexual_moderation", "sexual", 400),
        ("orq_sexual_moderation", "hate", 200),
        ("orq_harmful_moderation", "hate", 400),
        ("orq_harmful_moderation", "sexual", 200),
    ):
        answer = await answered(provider, options, user(text, guardrails=[{"id": id, "execute_on": "input"}]))
        assert (id, text, answer.status) == (id, text, status)
    assert (await answered(provider, options, user("hate"))).status == 200


def test_moderations_that_cannot_be_asked_are_refused_at_start(tmp_path: Path) -> None:
    """Those of a provider that does not exist are a fault of the file (test_guardrails.py)."""
    options = "{rules: [{kind: moderations, moderations: anthropic/m}]}"
    (tmp_path / "config.yaml").write_text(GUARDED.format(url="http://127.0.0.1:9", options=options))
    command = [sys.executable, "-m", "proxy", "serve", "-c", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    why = "'anthropic/m' cannot be asked, its provider is not of api: openai."
    assert (done.returncode, done.stderr) == (1, f"penstock: cannot start: guardrails: moderations: {why}\n")


async def test_a_whole_reply_is_judged_whole() -> None:
    async def answer(asked: Asked, line: Line) -> None:
        if asked.path.endswith("moderations"):
            await whole(orjson.dumps({"results": [moderation(text) for text in asked.json["input"]]}))(asked, line)
        else:
            await whole(completion("I hate it"))(asked, line)

    options = moderated("on: output").format()
    async with Upstream(answer) as upstream, gateway(upstream.url, GUARDED, options=options) as running:
        found = await ask(running.port, chat(stream=False))
    assert found.status == 400


async def test_the_end_of_a_stream_waits_for_no_answer_longer_than_its_timeout() -> None:
    provider = Provider([event({"content": "Hi"}), *END])
    provider.answers = False
    answer = await answered(provider, moderated("on: output, mode: after, timeout: 50ms, on_failure: open"))
    assert (answer.text, answer.done, told(answer)) == ("Hi", True, [])
    assert 'penstock_guardrails_asked_total{result="timeout",rule="moderations"} 1.0' in provider.asked["metrics"][0]["text"]
