"""Fallback, keys and hedging over real sockets: three providers that answer as each test says, and what the client gets.

The one rule: whatever the providers do, the client gets one answer, each of its words once, or one error.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from middleware import TABLE
from middleware.fallback import Fallback
from middleware.fallback.attempts import Attempts
from middleware.fallback.keys import Keys
from proxy.app import Gateway
from proxy.call import Call, Provider, Route, Target
from proxy.config import ConfigError, parse
from proxy.errors import GatewayError, Refused, UpstreamError
from proxy.pipeline import Handler
from proxy.reply import Batch, Head, Reply, Trailer, Try
from tests.support.decoding import make_call
from tests.support.gateway import Answer, Json, ask, chat, gateway, until
from tests.support.rawclient import connected
from tests.support.upstream import Answer as Reaction
from tests.support.upstream import Asked, Line, Upstream, whole

CONFIG = """
server: {{port: 0, drain_timeout: 1s}}
providers:
  a: {{api: openai, base_url: "{a}/v1", api_key: {keys}}}
  b: {{api: openai, base_url: "{b}/v1", api_key: "sk-upstream-0123456789"}}
  c: {{api: openai, base_url: "{c}/v1", api_key: "sk-upstream-0123456789"}}
  off: {{api: openai, base_url: "{a}/v1", api_key: "${{NO_SUCH_KEY}}"}}
models:
  all: [a/m, b/m, c/m]
  two: [a/m, b/m]
  unset: [off/m, b/m]
middleware:
  - fallback: {{{options}}}
  - timeout: {{connect_timeout: 5s, first_chunk_timeout: {first}, idle_timeout: 5s, call_timeout: 10s}}
"""


def event(delta: Json, finish: str | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "created": 1, "model": "m", "choices": choices}).encode()


def says(*words: str) -> Reaction:
    """A stream of these words; a whole reply of them to whoever asks for one."""

    async def answer(asked: Asked, line: Line) -> None:
        if not asked.json.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            body = {"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            await whole(json.dumps(body).encode())(asked, line)
            return
        await line.head()
        await line.chunk(*(event({"content": word}) for word in words), event({}, "stop"), b"data: [DONE]\n\n")
        await line.end()

    return answer


def refuses(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reaction:
    body = json.dumps({"error": {"message": message, "type": None, "code": code}}).encode()
    return whole(body, status, headers={name.replace("_", "-"): value for name, value in headers.items()})


async def stalls(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(b": ping\n\n", event({"role": "assistant", "content": ""}))
    await line.forever()


async def cut_before_the_first_chunk(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(event({"role": "assistant"}))
    line.reset()


async def hangs_up(asked: Asked, line: Line) -> None:
    line.reset()


async def error_inside_a_200(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(b'data: {"error": {"message": "boom", "type": "server_error"}}\n\n')
    await line.end()


async def html(asked: Asked, line: Line) -> None:
    await whole(b"<html>busy</html>", content_type="text/html")(asked, line)


async def cut_in_the_middle(asked: Asked, line: Line) -> None:
    await line.head()
    await line.chunk(event({"content": "half "}))
    line.reset()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def no_chunks() -> AsyncIterator[Batch]:
    return
    yield


def reply(target: str = "p/m") -> Reply:
    return Reply(Head(target), no_chunks(), Trailer())


def answers(found: Reply) -> Handler:
    async def handler(call: Call) -> Reply:
        return found

    return handler


def raises(error: BaseException) -> Handler:
    async def handler(call: Call) -> Reply:
        raise error

    return handler


@dataclass
class Setup:
    gateway: Gateway
    a: Upstream
    b: Upstream
    c: Upstream
    clock: Clock

    @property
    def fallback(self) -> Fallback:
        found = self.gateway.layers[0]
        assert isinstance(found, Fallback)
        return found

    async def ask(self, model: str = "all", **fields: Any) -> Answer:
        return await ask(self.gateway.port, chat(model, **fields))

    def asked(self) -> tuple[int, int, int]:
        return len(self.a.asked), len(self.b.asked), len(self.c.asked)

    def metric(self, name: str, **labels: str) -> float:
        return sum(s.value for s in self.fallback.samples() if s.name == name and labels.items() <= dict(s.labels).items())

    def circuit(self, target: str) -> str:
        found: str = self.fallback.health()["targets"][target]["circuit"]
        return found


@asynccontextmanager
async def setup(
    a: Reaction | None = None,
    b: Reaction | None = None,
    c: Reaction | None = None,
    *,
    options: str = "",
    first: str = "5s",
    keys: str = '"sk-upstream-0123456789"',
    random: float = 0.0,
) -> AsyncIterator[Setup]:
    clock = Clock()
    # A hedge is timed by the loop, so there the clock is real.
    table = {} if "hedge" in options else {"fallback": timed(clock, random)}
    async with AsyncExitStack() as stack:
        one, two, three = [await stack.enter_async_context(Upstream(how or says("unused"))) for how in (a, b, c)]
        fields = {"options": options, "first": first, "keys": keys}
        running = gateway(config=CONFIG, table=table, a=one.url, b=two.url, c=three.url, **fields)  # type: ignore[arg-type]
        yield Setup(await stack.enter_async_context(running), one, two, three, clock)


def timed(clock: Clock, random: float) -> type[Fallback]:
    """The middleware, with a clock and dice of the test's."""

    def __init__(self: Fallback, **given: Any) -> None:
        Fallback.__init__(self, **given, _clock=clock, _random=lambda: random)

    return type("Timed", (Fallback,), {"__init__": functools.wraps(Fallback.__init__)(__init__)})


FAULTS: list[tuple[str, Reaction, str]] = [
    ("429", refuses(429), "rate_limited"),
    ("408", refuses(408), "upstream_error"),
    ("500", refuses(500), "upstream_error"),
    ("503", refuses(503), "upstream_error"),
    ("529", refuses(529), "upstream_error"),
    ("stall before the first chunk", stalls, "timeout_first_chunk"),
    ("cut before the first chunk", cut_before_the_first_chunk, "upstream_cut"),
    ("hangs up", hangs_up, "upstream_cut"),
    ("error inside a 200", error_inside_a_200, "upstream_error"),
    ("html", html, "malformed"),
    ("401 on our key", refuses(401, "bad key"), "upstream_auth"),
    ("403 on our key", refuses(403, "bad key"), "upstream_auth"),
]


class TestFallsBack:
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("strategy", ["fallback", "weighted"])
    async def test_a_first_target_that_answers_is_asked_without_what_moving_on_takes(
        self, count: int, strategy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor is a task created. A choice among several is another matter."""
        made = []

        def counted(*args: Any, **fields: Any) -> Attempts:
            made.append(Attempts(*args, **fields))
            return made[-1]

        monkeypatch.setattr("middleware.fallback.Attempts", counted)
        targets = tuple(Target(Provider(name, "openai", "http://x", "k"), "m") for name in "ab"[:count])
        tasks = asyncio.all_tasks()
        found = reply("a/m")
        call = make_call(targets=targets, route=Route("r", targets, strategy), stream=True)
        assert await Fallback()(call, answers(found)) is found
        assert len(made) == (count == 2 and strategy == "weighted")
        assert asyncio.all_tasks() == tasks

    @pytest.mark.parametrize(("fault", "reason"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
    async def test_on_an_upstreams_fault_the_next_target_answers_once(self, fault: Reaction, reason: str) -> None:
        async with setup(fault, says("one ", "two"), first="500ms" if fault is stalls else "5s") as on:
            answer = await on.ask()
            assert (answer.status, answer.text, answer.done) == (200, "one two", True)
            assert answer.headers["X-Penstock-Target"] == "b/m"
            assert answer.headers["X-Penstock-Attempts"] == "2"
            assert on.asked() == (1, 1, 0)
            assert on.metric("penstock_fallbacks_total", reason=reason) == 1
            if fault is stalls:
                await until(lambda: on.a.open == 0)

    @pytest.mark.parametrize("status", [400, 402, 404, 409, 413, 422])
    async def test_never_on_another_4xx(self, status: int) -> None:
        async with setup(refuses(status, "your fault")) as on:
            answer = await on.ask()
            assert (answer.status, on.asked()) == (status, (1, 0, 0))
            assert answer.error is not None
            assert answer.error["message"] == "your fault"

    async def test_nothing_after_the_first_chunk(self) -> None:
        """A cut in the middle ends the stream with an error: the next target would say the words again."""
        async with setup(cut_in_the_middle) as on:
            answer = await on.ask()
            assert (answer.text, answer.done, on.asked()) == ("half ", False, (1, 0, 0))
            assert answer.error is not None

    async def test_a_provider_without_its_key_is_passed_over_and_is_no_attempt(self) -> None:
        async with setup(b=says("ok")) as on:
            answer = await on.ask("unset")
            assert (answer.text, answer.headers["X-Penstock-Attempts"]) == ("ok", "1")

    async def test_a_provider_without_its_key_alone_is_a_503_that_names_the_variable(self) -> None:
        async with setup() as on:
            answer = await on.ask("off/m")
            assert answer.status == 503
            assert answer.error is not None
            assert "NO_SUCH_KEY" in answer.error["message"]

    async def test_a_whole_reply_falls_back_too(self) -> None:
        async with setup(refuses(500), says("ok")) as on:
            answer = await on.ask(stream=False)
            assert answer.json["choices"][0]["message"]["content"] == "ok"
            assert answer.headers["X-Penstock-Attempts"] == "2"

    async def test_all_targets_down_is_the_last_error_with_all_tries(self) -> None:
        async with setup(refuses(500, "first"), cut_before_the_first_chunk, refuses(429, "third", Retry_After="7")) as on:
            answer = await on.ask()
            assert (answer.status, on.asked()) == (429, (1, 1, 1))
            assert answer.error is not None
            assert answer.error["message"] == "third"
            assert answer.headers["x-should-retry"] == "false"
            assert answer.headers["X-Penstock-Attempts"] == "3"
            assert answer.headers["Retry-After"] == "7"

    async def test_an_error_that_stops_the_way_still_tells_the_tries_before_it(self) -> None:
        async with setup(refuses(500), refuses(400, "bad")) as on:
            answer = await on.ask()
            assert (answer.status, answer.headers["X-Penstock-Attempts"], on.asked()) == (400, "2", (1, 1, 0))

    CAUSES = (
        ("context_window", "m", "context_length_exceeded"),
        ("context_window", "prompt is too long: 210000 tokens > 200000 maximum", None),
        ("context_window", "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).", None),
        ("content_filter", "m", "content_filter"),
        ("content_filter", "The response was filtered due to Azure OpenAI's content management policy.", None),
        ("content_filter", "Output blocked by content filtering policy", None),
    )

    @pytest.mark.parametrize(("cause", "message", "code"), CAUSES)
    async def test_context_window_and_content_filter_only_by_choice(self, cause: str, message: str, code: str | None) -> None:
        other = "content_filter" if cause == "context_window" else "context_window"
        for options, status in ((f"on: [{cause}]", 200), (f"on: [{other}]", 400), ("", 400)):
            async with setup(refuses(400, message, code), says("ok"), options=options) as on:
                assert (await on.ask()).status == status, options

    async def test_never_past_the_deadline(self) -> None:
        class Late:
            async def __call__(self, call: Any, next: Any) -> Any:
                return await next(replace(call, deadline=asyncio.get_running_loop().time() - 1))

        async with setup(refuses(500)) as on:
            given = make_call(route=on.gateway.config.routes["all"], targets=on.gateway.config.routes["all"].targets)
            asked: list[str] = []

            async def next(call: Call) -> Reply:
                asked.append(str(call.target))
                raise UpstreamError("down")

            with pytest.raises(UpstreamError):
                await Late()(given, lambda call: on.fallback(call, next))
            assert asked == ["a/m"]

    async def test_the_tries_of_the_retry_middleware_within_are_told_in_order_and_not_twice(self) -> None:
        def tried(name: str) -> UpstreamError:
            error = UpstreamError("down", status=500)
            error.tries = (Try(name, "first", 0.1), Try(name, "again", 0.1))
            return error

        targets = tuple(Target(Provider(name, "openai", "http://x", "k"), "m") for name in "ab")
        given = make_call(targets=targets, route=Route("r", targets))

        async def one_answers(call: Call) -> Reply:
            if str(call.target) == "a/m":
                raise tried("a/m")
            return Reply(Head("b/m", tries=(Try("b/m", "first", 0.1),)), no_chunks(), Trailer())

        async def none_answers(call: Call) -> Reply:
            raise tried(str(call.target))

        found = await Fallback()(given, one_answers)
        assert [(one.target, one.reason) for one in found.head.tries] == [("a/m", "first"), ("a/m", "again"), ("b/m", "first")]
        with pytest.raises(UpstreamError) as caught:
            await Fallback()(given, none_answers)
        assert [one.target for one in caught.value.tries] == ["a/m", "a/m", "b/m", "b/m"]

    async def test_what_is_not_an_upstreams_error_passes_at_once(self) -> None:
        """A bug, or a layer further in that refuses the call, is no reason to ask somebody else, nor a failure."""
        targets = tuple(Target(Provider(name, "openai", "http://x", "k"), "m") for name in "ab")
        for error in (ValueError("bug"), Refused("no"), GatewayError("limited", status=429)):
            fallback = Fallback()
            asked: list[str] = []

            async def next(call: Call, error: Exception = error, asked: list[str] = asked) -> Reply:
                asked.append(str(call.target))
                raise error

            with pytest.raises(type(error)):
                await fallback(make_call(targets=targets), next)
            assert asked == ["a/m"]
            assert fallback.health()["targets"]["a/m"]["failed"] == 0


class TestRequest:
    @pytest.mark.parametrize(
        "fields",
        [
            {"fallbacks": ["b/x"]},
            {"fallbacks": [{"model": "b/x"}]},
            {"orq": {"fallbacks": [{"model": "b/x"}]}},
            {"penstock": {"fallbacks": ["b/x"]}},
            {"models": ["a/m", "b/x"]},
        ],
    )
    async def test_names_further_targets(self, fields: Json) -> None:
        async with setup(refuses(500), says("ok")) as on:
            answer = await on.ask("a/m", **fields)
            assert (answer.text, answer.headers["X-Penstock-Target"], on.asked()) == ("ok", "b/x", (1, 1, 0))
            assert answer.chunks[0]["model"] == "a/m", "the model as the client spelled it"
            assert not {"fallbacks", "models", "orq", "penstock"} & set(on.b.asked[0].json)

    FORMS = (
        {"type": "weight_based", "models": [{"model": "b/x", "weight": 0.2}, {"model": "c/y", "weight": 0.7}]},
        [{"type": "weight_based", "model": "b/x", "weight": 0.2}, {"type": "weight_based", "model": "c/y", "weight": 0.7}],
    )

    @pytest.mark.parametrize("balancer", FORMS)
    @pytest.mark.parametrize(("random", "target"), [(0.0, "c/y"), (0.77, "c/y"), (0.78, "b/x"), (0.999, "b/x")])
    async def test_a_load_balancer_replaces_the_model_and_its_weights_are_normalized(
        self, balancer: Any, random: float, target: str
    ) -> None:
        async with setup(b=says("ok"), c=says("ok"), random=random) as on:
            assert (await on.ask("a/m", load_balancer=balancer)).headers["X-Penstock-Target"] == target
            assert on.asked()[0] == 0

    async def test_the_models_that_were_not_drawn_are_its_fallbacks_and_then_the_named_ones(self) -> None:
        async with setup(says("last"), refuses(500), refuses(500)) as on:
            balancer = {"type": "weight_based", "models": [{"model": "b/x"}, {"model": "c/y"}]}
            answer = await on.ask("a/m", load_balancer=balancer, fallbacks=["a/m"])
            assert (answer.text, on.asked()) == ("last", (1, 1, 1))

    @pytest.mark.parametrize(
        ("fields", "status", "param"),
        [
            ({"fallbacks": ["b/x", "nobody/x"]}, 404, "fallbacks[1]"),
            ({"fallbacks": [{"model": "../x"}]}, 400, "fallbacks[0].model"),
            ({"fallbacks": [{}]}, 400, "fallbacks[0].model"),
            ({"fallbacks": [7]}, 400, "fallbacks[0]"),
            ({"fallbacks": "b/x"}, 400, "fallbacks"),
            ({"fallbacks": ["b/x"] * 6}, 400, "fallbacks"),
            ({"orq": {"fallbacks": ["nobody/x"]}}, 404, "orq.fallbacks[0]"),
            ({"models": ["nobody/x"]}, 404, "models[0]"),
            ({"models": ["a/m"] * 17}, 400, "models"),
            ({"models": ["a/m"] * 15, "fallbacks": ["b/x"]}, 400, "models"),
            ({"load_balancer": {"type": "round_robin", "models": [{"model": "b/x"}]}}, 400, "load_balancer.type"),
            ({"load_balancer": {"type": "weight_based", "models": []}}, 400, "load_balancer"),
            ({"load_balancer": {"type": "weight_based"}}, 400, "load_balancer.models"),
            ({"load_balancer": [{"type": "weight_based", "model": "nobody/x"}]}, 404, "load_balancer[0].model"),
            ({"load_balancer": {"models": [{"model": "b/x", "weight": 0}]}}, 400, "load_balancer.models[0].weight"),
            ({"load_balancer": {"models": [{"model": "b/x", "weight": 1.1}]}}, 400, "load_balancer.models[0].weight"),
            ({"load_balancer": "b/x"}, 400, "load_balancer"),
        ],
    )
    async def test_what_is_wrong_is_refused_by_its_path_before_any_upstream_is_called(
        self, fields: Json, status: int, param: str
    ) -> None:
        async with setup() as on:
            answer = await on.ask("a/m", **fields)
            assert answer.error is not None
            assert (answer.status, answer.error["param"], on.asked()) == (status, param, (0, 0, 0))


class TestKeys:
    KEYS = '["sk-first-0123456789", "sk-second-0123456789"]'

    @staticmethod
    def by_key(first: Reaction, second: Reaction) -> Reaction:
        async def answer(asked: Asked, line: Line) -> None:
            await (first if "first" in asked.headers["authorization"] else second)(asked, line)

        return answer

    @staticmethod
    def used(upstream: Upstream) -> list[str]:
        return [asked.headers["authorization"].split("-")[1] for asked in upstream.asked]

    @pytest.mark.parametrize("first", [refuses(429), refuses(401)], ids=["429", "401 on ours"])
    async def test_the_next_key_of_the_same_provider_is_tried_before_the_next_target(self, first: Reaction) -> None:
        async with setup(self.by_key(first, says("ok")), keys=self.KEYS) as on:
            answer = await on.ask()
            assert (answer.text, answer.headers["X-Penstock-Target"], answer.headers["X-Penstock-Attempts"]) == ("ok", "a/m", "2")
            assert (self.used(on.a), on.asked()) == (["first", "second"], (2, 0, 0))

    async def test_a_rate_limited_key_rests_until_its_retry_after(self) -> None:
        async with setup(self.by_key(refuses(429, Retry_After="30"), says("ok")), keys=self.KEYS) as on:
            await on.ask()
            await on.ask()
            assert self.used(on.a) == ["first", "second", "second"]
            assert on.fallback.health()["resting_keys"] == {"a": 1}
            on.clock.now += 31
            await on.ask()
            assert self.used(on.a)[3:] == ["first", "second"]

    async def test_other_errors_leave_the_key_and_go_to_the_next_target(self) -> None:
        async with setup(refuses(500), says("ok"), keys=self.KEYS) as on:
            await on.ask()
            assert (self.used(on.a), on.asked()) == (["first"], (1, 1, 0))

    async def test_when_all_keys_are_limited_the_target_is_parked_until_the_first_is_free(self) -> None:
        first, second = refuses(429, Retry_After="30"), refuses(429, Retry_After="10")
        async with setup(self.by_key(first, second), says("ok"), keys=self.KEYS) as on:
            assert (await on.ask()).headers["X-Penstock-Attempts"] == "3"
            assert on.circuit("a/m") == "open"
            await on.ask()
            assert len(on.a.asked) == 2
            on.clock.now += 11
            await on.ask()
            assert self.used(on.a)[2:] == ["second"]

    async def test_no_key_is_ever_shown(self) -> None:
        async with setup(refuses(429, "sk-first-0123456789 is limited"), refuses(500), refuses(500), keys=self.KEYS) as on:
            answer = await on.ask("a/m")
            seen = answer.body.decode() + str(on.fallback.health()) + str(list(on.fallback.samples())) + str(answer.headers)
            assert "sk-" not in seen.replace("sk-first-0123456789 is limited", "")

    def test_while_no_key_rests_the_target_is_tried_as_it_is(self) -> None:
        """Nothing is built for it; the keys after the first are."""
        keys = Keys(Clock())
        target = Target(Provider("p", "openai", "http://x", "one", further_keys=("two", "three")), "m")
        found = [keyed for _, keyed in keys.usable(target)]
        assert found[0] is target
        assert [keyed.provider.api_key for keyed in found] == ["one", "two", "three"]
        assert [keyed.provider.further_keys for keyed in found] == [("two", "three"), ("three",), ()]
        keys.rest(target.provider, 1, 60.0)
        assert [keyed.provider.further_keys for _, keyed in keys.usable(target)] == [("three",), ()]


class TestCircuit:
    OPTIONS = "min_requests: 3, cool_down: 30s, probes: 1"

    async def test_opens_on_failures_and_is_then_not_asked(self) -> None:
        async with setup(refuses(500), says("ok"), options=self.OPTIONS) as on:
            for _ in range(5):
                assert (await on.ask()).text == "ok"
            assert (on.asked(), on.circuit("a/m")) == ((3, 5, 0), "open")
            assert on.metric("penstock_circuit_state", target="a/m") == 2
            assert on.metric("penstock_fallbacks_total", reason="circuit_open") == 2
            assert on.metric("penstock_attempts_total", target="a/m", outcome="failed") == 3

    async def test_a_good_probe_closes_it(self) -> None:
        async with setup(refuses(500), says("ok"), options=self.OPTIONS) as on:
            for _ in range(3):
                await on.ask()
            on.clock.now += 31
            on.a.answer = says("back")
            assert on.circuit("a/m") == "half_open"
            assert (await on.ask()).text == "back"
            assert on.circuit("a/m") == "closed"

    async def test_when_all_are_open_a_503_says_when_to_come_back(self) -> None:
        async with setup(refuses(500), refuses(500), options=self.OPTIONS) as on:
            for _ in range(3):
                await on.ask("two")
            on.clock.now += 10
            answer = await on.ask("two")
            assert answer.error is not None
            assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "circuit_open", "20")
            assert "x-should-retry" not in answer.headers, "nothing was tried"
            assert on.asked() == (3, 3, 0)

    async def test_retry_after_of_one_429_parks_the_target(self) -> None:
        async with setup(refuses(429, Retry_After="20"), says("ok"), options=self.OPTIONS) as on:
            await on.ask()
            await on.ask()
            assert on.asked() == (1, 2, 0)
            on.clock.now += 21
            await on.ask()
            assert on.asked() == (2, 3, 0)

    async def test_a_429_without_retry_after_parks_nobody(self) -> None:
        async with setup(refuses(429), says("ok"), options=self.OPTIONS) as on:
            await on.ask()
            await on.ask()
            assert on.asked() == (2, 2, 0)

    async def test_a_clients_4xx_never_opens_it(self) -> None:
        async with setup(refuses(400), options=self.OPTIONS) as on:
            for _ in range(5):
                await on.ask("a/m")
            assert (on.circuit("a/m"), len(on.a.asked)) == ("closed", 5)

    async def test_failures_in_the_middle_of_a_stream_open_it(self) -> None:
        async with setup(cut_in_the_middle, options=self.OPTIONS) as on:
            for _ in range(3):
                assert (await on.ask("a/m")).text == "half "
            assert on.circuit("a/m") == "open"

    async def test_clients_that_leave_never_open_it(self) -> None:
        async with setup(stalls, options=self.OPTIONS) as on:
            for count in range(1, 5):
                with await connected(on.gateway.port) as client:
                    await client.post(chat("a/m"))
                    await until(lambda count=count: len(on.a.asked) == count)
                    client.leave("rst")
                await until(lambda: on.a.open == 0)
            assert (on.circuit("a/m"), on.fallback.health()["targets"]["a/m"]["failed"]) == ("closed", 0)

    async def test_a_clients_own_short_timeout_does_not_open_it_for_everybody(self) -> None:
        async with setup(stalls, options=self.OPTIONS, first="20ms") as on:
            for _ in range(3):
                await on.ask("a/m", timeout={"call_timeout": 20})
            assert on.circuit("a/m") == "closed"
            for _ in range(3):
                await on.ask("a/m")
            assert on.circuit("a/m") == "open", "the operator's limit counts"

    @pytest.mark.parametrize(("error", "outcome"), [(RuntimeError("broken"), "failed"), (asyncio.CancelledError(), "cancelled")])
    async def test_what_says_nothing_about_a_target_is_counted_and_gives_a_probes_place_back(
        self, error: BaseException, outcome: str
    ) -> None:
        clock = Clock()
        fallback = Fallback(min_requests=1, failure_rate=0.01, cool_down=1.0, probes=1, _clock=clock)
        call = make_call(targets=(Target(Provider("p", "openai", "http://x", "k"), "m"),))
        with pytest.raises(UpstreamError):
            await fallback(call, raises(UpstreamError("no", status=500)))
        clock.now += 1
        for _ in range(2):
            with pytest.raises(type(error)):
                await fallback(call, raises(error))
        assert fallback.health()["targets"]["p/m"]["circuit"] == "half_open"
        counts = {s.labels["outcome"]: s.value for s in fallback.samples() if s.name == "penstock_attempts_total"}
        assert sum(counts.values()) == 3
        assert counts[outcome] >= 2

    async def test_invented_models_fill_neither_memory_nor_metrics(self) -> None:
        provider = Provider("p", "openai", "http://x", "k")
        fallback = Fallback()
        for number in range(3000):
            target = Target(provider, f"m{number}")
            await fallback(make_call(targets=(target,)), answers(reply()))
        assert len(fallback._targets) <= 1024
        labels = {sample.labels["target"] for sample in fallback.samples() if "target" in sample.labels}
        assert len(labels) <= 51
        assert sum(s.value for s in fallback.samples() if s.name == "penstock_attempts_total") == 3000


class TestHedge:
    NOW = 'hedge: {after: 30ms, max_extra: "100%"}'

    async def test_a_late_first_chunk_is_answered_by_the_second_and_the_first_is_closed(self) -> None:
        async with setup(stalls, says("second"), options=self.NOW) as on:
            answer = await on.ask("two")
            assert (answer.text, answer.done, answer.headers["X-Penstock-Target"]) == ("second", True, "b/m")
            assert answer.headers["X-Penstock-Attempts"] == "2", "the loser is accounted"
            await until(lambda: on.a.open == 0)
            assert on.metric("penstock_hedges_total", won="second") == 1
            assert on.fallback.health()["targets"]["a/m"]["failed"] == 0, "to be slow once is no failure"

    async def test_the_first_may_still_win_and_then_the_second_is_closed(self) -> None:
        second_asked = asyncio.Event()

        async def slow(asked: Asked, line: Line) -> None:
            await second_asked.wait()
            await says("first")(asked, line)

        async def never(asked: Asked, line: Line) -> None:
            second_asked.set()
            await line.forever()

        async with setup(slow, never, options=self.NOW) as on:
            answer = await on.ask("two")
            assert (answer.text, answer.headers["X-Penstock-Target"]) == ("first", "a/m")
            await until(lambda: on.b.open == 0)
            assert on.metric("penstock_hedges_total", won="first") == 1

    async def test_an_error_never_wins(self) -> None:
        second_failed = asyncio.Event()

        async def slow(asked: Asked, line: Line) -> None:
            await second_failed.wait()
            await says("first")(asked, line)

        async def fails(asked: Asked, line: Line) -> None:
            await error_inside_a_200(asked, line)
            second_failed.set()

        async with setup(slow, fails, options=self.NOW) as on:
            answer = await on.ask("two")
            assert (answer.text, answer.headers["X-Penstock-Attempts"]) == ("first", "2")

    async def test_when_both_fail_the_client_gets_one_error_with_all_tries(self) -> None:
        second_failed = asyncio.Event()

        async def slow(asked: Asked, line: Line) -> None:
            await second_failed.wait()
            await refuses(500, "first")(asked, line)

        async def fails(asked: Asked, line: Line) -> None:
            await refuses(503, "second")(asked, line)
            second_failed.set()

        async with setup(slow, fails, options=self.NOW) as on:
            answer = await on.ask("two")
            assert (answer.status, answer.headers["X-Penstock-Attempts"], on.asked()) == (500, "2", (1, 1, 0))

    async def test_a_client_that_leaves_while_both_run_takes_both_along(self) -> None:
        async with setup(stalls, stalls, options=self.NOW) as on:
            before = asyncio.all_tasks()
            with await connected(on.gateway.port) as client:
                await client.post(chat("two"))
                await until(lambda: on.asked() == (1, 1, 0))
                client.leave("rst")
            await until(lambda: on.a.open == 0 and on.b.open == 0)
            await until(lambda: on.gateway.edge.open_calls == 0)
            lanes = [task for task in asyncio.all_tasks() - before if "lane" in repr(task.get_coro())]
            assert lanes == []
            assert on.metric("penstock_hedges_total", won="neither") == 1

    async def test_at_most_a_share_of_requests_is_hedged(self) -> None:
        async with setup(stalls, says("ok"), options='hedge: {after: 5ms, max_extra: "25%"}', first="40ms") as on:
            for _ in range(12):
                await on.ask("two")
            hedges = sum(s.value for s in on.fallback.samples() if s.name == "penstock_hedges_total")
            assert hedges == 3

    async def test_a_fast_first_is_never_hedged(self) -> None:
        async with setup(says("ok"), options='hedge: {after: 2s, max_extra: "100%"}') as on:
            assert (await on.ask("two")).text == "ok"
            assert on.asked() == (1, 0, 0)

    async def test_p95_is_the_targets_own_and_unknown_at_first(self) -> None:
        async with setup(says("ok"), says("second"), options='hedge: {after: p95, max_extra: "100%"}', first="1s") as on:
            for _ in range(25):
                await on.ask("two")
            before = on.asked()[1]
            on.a.answer = stalls
            answer = await on.ask("two")
            assert (answer.text, on.asked()[1]) == ("second", before + 1)
            assert on.metric("penstock_hedges_total", won="second") >= 1

    @pytest.mark.parametrize(
        "written", ["{after: soon}", '{max_extra: "200%"}', "{max_extra: lots}", "{befor: 1s}", "{after: 0}"]
    )
    async def test_a_wrong_option_is_a_fault_of_the_file(self, written: str) -> None:
        text = f"middleware: [{{fallback: {{hedge: {written}}}}}]"
        with pytest.raises(ConfigError) as caught:
            parse(text, {}, TABLE)
        assert "middleware[0].fallback.hedge" in str(caught.value)
