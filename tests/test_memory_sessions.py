"""A client's own sessions: listed, read, deleted, under any id that can be one, and never anybody else's.

The one rule: for every endpoint there is a test that another tenant gets the answer of one who asks for what is not there.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.memory import HEADER, Memory
from middleware.memory.asked import Asked, read
from middleware.memory.retention import EVERY, Bounds, Retention
from middleware.memory.sessions import owner_of
from proxy.admission import BLANK
from proxy.call import Principal
from proxy.errors import Refused
from proxy.own_fields import OwnFields
from proxy.pipeline import Surroundings
from proxy.routing import Directory
from proxy.store import Store, Turn
from tests.support.gateway import until
from tests.support.sessions import Here, remembering, says, user
from tests.support.sessions import Store as Faulty

Json = dict[str, Any]
AUTH = '  - auth: {keys: [{name: one, key: "sk-one-0123456789abcdef"}, {name: two, key: "sk-two-0123456789abcdef"}]}'
PASS = f"{AUTH[:-1]}, pass_through: [openai]}}"
ONE, TWO = ({"Authorization": f"Bearer sk-{name}-0123456789abcdef"} for name in ("one", "two"))
ALICE, BOB = ({"X-ORQ-IDENTITY-ID": name} for name in ("alice", "bob"))


async def test_the_list_in_pages(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        assert await here.get("/v1/sessions") == (
            200, {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False},
        )  # fmt: skip
        for name in ("a", "b", "c"):
            await here.say("q", name)
        await here.say("q", "a")
        _, page = await here.get("/v1/sessions?limit=2")
        assert (page["first_id"], page["last_id"], page["has_more"]) == ("a", page["data"][1]["id"], True)
        _, rest = await here.get(f"/v1/sessions?limit=2&after={page['last_id']}")
        assert rest["has_more"] is False
        assert sorted(found["id"] for found in page["data"] + rest["data"]) == ["a", "b", "c"]
        first = page["data"][0]
        assert (first["object"], first["turns"]) == ("session", 2)
        assert first["created_at"] <= first["updated_at"]
        assert first["tokens"] > 0


async def test_a_session_in_pages(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        for number in range(1, 6):
            await here.say(f"q{number}")
        _, page = await here.get("/v1/sessions/s?limit=2")
        assert [turn["messages"][0]["content"] for turn in page["data"]] == ["q4", "q5"]
        assert (page["id"], page["turns"], page["has_more"]) == ("s", 5, True)
        assert page["data"][1]["messages"] == [user("q5"), says("a5")]
        assert page["data"][1]["model"] == "openai/m"
        seen = page["data"]
        while page["has_more"]:
            _, page = await here.get(f"/v1/sessions/s?limit=2&before={page['first_id']}")
            seen = page["data"] + seen
        assert [turn["messages"][0]["content"] for turn in seen] == ["q1", "q2", "q3", "q4", "q5"]
        assert (await here.get("/v1/sessions/s?before=1"))[1]["data"] == []
        assert len((await here.get("/v1/sessions/s?before=99"))[1]["data"]) == 5


async def test_a_deleted_session_begins_anew(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1")
        assert await here.get("/v1/sessions/s", "DELETE") == (200, {"id": "s", "object": "session.deleted", "deleted": True})
        assert (await here.get("/v1/sessions/s", "DELETE"))[0] == 404
        assert (await here.say("q2")).headers[HEADER] == "turns=0"


async def test_what_is_still_on_its_way_is_deleted_too(tmp_path: Path) -> None:
    async with remembering(tmp_path, "timeout: 10s") as here:
        store = here.faulty()
        store.go.clear()
        await here.say("q1")
        deleting = asyncio.create_task(here.get("/v1/sessions/s", "DELETE"))
        await until(lambda: here.gateway.edge.open_calls == 1)
        store.go.set()
        assert (await deleting)[0] == 200
        assert await here.turns() == []


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/sessions?limit=0", "limit"), ("/v1/sessions?limit=101", "limit"), ("/v1/sessions?limit=x", "limit"),
        ("/v1/sessions?limit=%C2%B2", "limit"), ("/v1/sessions?after=nobody", "after"), ("/v1/sessions?order=asc", "order"),
        ("/v1/sessions/s?before=0", "before"), ("/v1/sessions/s?after=1", "after"),
    ],
)  # fmt: skip
async def test_a_query_that_makes_no_sense_is_refused(tmp_path: Path, path: str, param: str) -> None:
    async with remembering(tmp_path) as here:
        status, found = await here.get(path)
        assert (status, found["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/sessions/s"])
async def test_without_the_store_there_is_an_answer_all_the_same(tmp_path: Path, path: str) -> None:
    async with remembering(tmp_path) as here:
        here.faulty().down = True
        status, found = await here.get(path)
        assert (status, found["error"]["code"]) == (503, "memory_unavailable")
        assert "database" not in str(found)


# Odd ids.

ODD = ["a/b", "a/messages", "/", "%2F", "%", "a b", " ", "?x=1#y", "ö€😀", "...", "a\\b", "'\";--", "x" * 200, "null", "+"]


async def test_any_text_names_a_session(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        for name in ODD:
            await here.say(name, name, stream=False)
        for name in ODD:
            turns = await here.turns(name)
            assert [turn[0] for turn in turns] == [user(name)], name
        _, found = await here.get("/v1/sessions?limit=100")
        assert sorted(entry["id"] for entry in found["data"]) == sorted(ODD)
        first, second = found["data"][0]["id"], found["data"][1]["id"]
        assert (await here.get(f"/v1/sessions?limit=1&after={quote(first, safe='')}"))[1]["data"][0]["id"] == second
        for name in ODD:
            assert (await here.get(f"/v1/sessions/{quote(name, safe='')}", "DELETE"))[1]["id"] == name


@pytest.mark.parametrize("path", ["/v1/sessions/", "/v1/sessions/%FF", "/v1/sessions/%00", "/v1/sessions/" + "x" * 5000])
async def test_what_can_be_no_id_is_not_found(tmp_path: Path, path: str) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1")
        for method in ("GET", "DELETE"):
            status, found = await here.get(path, method)
            assert (status, found["error"]["code"]) == (404, "session_not_found")


@given(st.text(max_size=260))
def test_an_id_is_taken_as_it_is_or_refused(name: str) -> None:
    def named() -> Asked | None:
        return read(BLANK, OwnFields({"sessionId": name}, {}), False)

    if 1 <= len(name) <= 200 and name.isprintable() and name not in (".", ".."):
        assert named() == Asked(name, True)
    else:
        with pytest.raises(Refused) as caught:
            named()
        assert caught.value.param == "sessionId"


# Tenants.


async def others(here: Here, session: str, own: Json, foreign: list[Json]) -> None:
    """Whoever asks with `foreign` headers has no part in a session that was made with `own`."""
    assert (await here.say("q1", session, headers=own)).headers[HEADER] == "turns=0"
    await until(lambda: not here.memory.health()["waiting"])
    missing = await here.get("/v1/sessions/nobody", headers=foreign[0])
    for headers in foreign:
        assert (await here.get("/v1/sessions", headers=headers))[1]["data"] == []
        assert await here.get(f"/v1/sessions/{session}", headers=headers) == missing
        assert await here.get(f"/v1/sessions/{session}", "DELETE", headers=headers) == missing
        assert (await here.get(f"/v1/sessions?after={session}", headers=headers))[0] == 400
        answer = await here.say("q2", session, headers=headers, saveToMemory=False)
        assert (answer.headers[HEADER], here.asked) == ("turns=0", [user("q2")])
    _, found = await here.get(f"/v1/sessions/{session}", headers=own)
    assert [turn["messages"][0] for turn in found["data"]] == [user("q1")]
    await here.say("q3", session, headers=foreign[0])
    assert await here.turns(session, headers=foreign[0]) == [[user("q3"), says(f"a{here.provider.count}")]]
    assert (await here.get(f"/v1/sessions/{session}", "DELETE", headers=own))[0] == 200
    assert len(await here.turns(session, headers=foreign[0])) == 1, "another's of the same name stays"


async def test_one_key_has_no_part_in_anothers_sessions(tmp_path: Path) -> None:
    async with remembering(tmp_path, outer=AUTH) as here:
        await others(here, "s", ONE, [TWO, {**ONE, **ALICE}, {**TWO, **ALICE}])
        assert (await here.get("/v1/sessions"))[0] == 401


async def test_one_identity_has_no_part_in_anothers_sessions(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        await others(here, "s", ALICE, [BOB, {}])


async def test_one_callers_provider_key_has_no_part_in_anothers_sessions(tmp_path: Path) -> None:
    one, two = ({"superAgentKey": "sk-one-0123456789abcdef", "Authorization": f"Bearer sk-own-{name}"} for name in ("x", "y"))
    async with remembering(tmp_path, outer=PASS) as here:
        await others(here, "s", one, [two, ONE])


async def test_the_identity_in_the_body_is_the_one_in_the_headers(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        await here.say("q1", identity={"id": "alice"})
        assert (await here.say("q2", headers=ALICE)).headers[HEADER] == "turns=1"
        assert len(await here.turns(headers=ALICE)) == 2
        assert await here.turns() == []


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5) | st.none()), min_size=2, max_size=2))
def test_no_two_owners_are_written_alike(pair: list[tuple[str, str | None]]) -> None:
    (one, first), (two, second) = pair
    same = one == two and (first or "") == (second or "")
    assert (owner_of(Principal(scope=one), first) == owner_of(Principal(scope=two), second)) is same


# Retention.


class Time:
    """A clock that goes on by what is slept."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: asyncio.Queue[float] = asyncio.Queue()
        self.go = asyncio.Semaphore(0)

    async def sleep(self, seconds: float) -> None:
        self.slept.put_nowait(seconds)
        await self.go.acquire()
        self.now += seconds


async def test_what_is_too_old_or_too_much_goes_by_and_by(store: Store) -> None:
    kept, time = store.conversations, Time()
    for session, created in (("old", 900.0), ("new", 1000.0)):
        for number in range(3):
            await kept.append("o", session, Turn([user("q")], 1, created + number, f"{session}{number}"))
    retention = Retention(Bounds(keep=EVERY, sessions=0, turns=2), lambda: time.now, time.sleep)
    retention.start(kept)
    assert await time.slept.get() == EVERY
    assert [(found.id, found.turns) for found in await kept.sessions("o", 9)] == [("new", 2), ("old", 2)]
    time.go.release()
    await time.slept.get()
    assert [found.id for found in await kept.sessions("o", 9)] == ["new"]
    assert retention.expired == 4
    await retention.close()


async def test_where_age_is_no_bound_old_sessions_stay(store: Store) -> None:
    kept, time = store.conversations, Time()
    for number in range(3):
        await kept.append("o", "s", Turn([user("q")], 1, float(number), f"r{number}"))
    retention = Retention(Bounds(keep=0, sessions=0, turns=2), lambda: time.now, time.sleep)
    retention.start(kept)
    await time.slept.get()
    assert [(found.id, found.turns) for found in await kept.sessions("o", 9)] == [("s", 2)]
    await retention.close()


async def test_sessions_beyond_the_last_used_ones_go(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        for name in ("a", "b", "c"):
            await here.say("q", name)
        await here.get("/v1/sessions")
    async with remembering(tmp_path, "max_sessions: 1") as here:
        await until(lambda: here.counts.get("expired_turns_total") == 2)
        assert len((await here.get("/v1/sessions"))[1]["data"]) == 1


async def test_a_store_that_is_down_is_swept_the_next_time(store: Store, lines: list[Json]) -> None:
    kept, time = Faulty(store.conversations), Time()
    kept.down = True
    await store.conversations.append("o", "s", Turn([user("q")], 1, 1.0, "r"))
    retention = Retention(Bounds(keep=1, sessions=0, turns=0), lambda: time.now, time.sleep)
    retention.start(kept)
    await time.slept.get()
    assert [line["event"] for line in lines] == ["old turns could not be deleted"]
    kept.down = False
    time.go.release()
    await time.slept.get()
    assert retention.expired == 1
    await retention.close()


@pytest.mark.parametrize(("worker", "sweeps"), [(0, True), (1, False)])
async def test_only_the_first_worker_sweeps(store: Store, worker: int, sweeps: bool) -> None:
    time = Time()
    memory = Memory(_now=lambda: time.now, _sleep=time.sleep)
    memory.attach(Surroundings((), Directory({}, {}, None, 0).route, workers=2, worker=worker, store=store))
    await memory.start()
    if sweeps:
        await time.slept.get()
    else:
        await asyncio.sleep(0)
        assert time.slept.empty()
        assert memory._retention._task is None
    await memory.close()


async def test_where_everything_is_kept_nobody_sweeps(tmp_path: Path) -> None:
    async with remembering(tmp_path, "keep: 0, max_sessions: 0, max_turns_kept: 0") as here:
        assert here.memory._retention._task is None
