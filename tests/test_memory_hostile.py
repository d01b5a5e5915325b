"""What a hostile client says: characters that no database and no encoder takes, names that are too long or like another's.

The one rule: it is answered as anybody is; what was said is remembered, and by nobody else.
"""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from middleware.memory.sessions import LONGEST, owner_of
from proxy.call import Principal
from tests.support.rawclient import connected
from tests.support.sessions import CONFIG, Here, event, remembering, says, stream_of, user

NUL = "a\0b"


async def goes_on(here: Here) -> None:
    """A conversation with NUL in what both sides say goes on with all of it."""
    here.provider.next = stream_of({"content": NUL})
    assert (await here.say(NUL)).done
    assert (await here.say("q2")).done
    assert here.asked == [user(NUL), says(NUL), user("q2")]
    assert (await here.turns())[0] == [user(NUL), says(NUL)]
    assert here.memory.health() == {"waiting": 0, "failed": 0, "unavailable": 0}


async def test_nul_is_a_character_like_others(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        await goes_on(here)


async def test_in_postgres_as_well(tmp_path: Path, database: str) -> None:
    config = CONFIG.replace("store: {{timeout: 10s}}", f"store: {{{{url: '{database}', timeout: 10s}}}}")
    async with remembering(tmp_path, config=config) as here:
        await goes_on(here)


async def test_half_a_character_is_refused_from_the_client_and_a_fault_of_the_provider(tmp_path: Path) -> None:
    async with remembering(tmp_path) as here:
        body = b'{"model": "openai/m", "stream": true, "sessionId": "s", "messages": [{"role": "user", "content": "\\ud83d"}]}'
        assert b" 400 " in await raw(here, body, b"")
        here.provider.next = [event({"content": "x"}), b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n']
        assert not (await here.say("q1")).done
        assert await here.turns() == []
        assert here.memory.health() == {"waiting": 0, "failed": 0, "unavailable": 0}


async def raw(here: Here, body: bytes, headers: bytes) -> bytes:
    """The whole answer to a request with these header lines, byte by byte as they stand."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with await connected(here.gateway.port) as client:
        await client.send(head + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        found: bytes = await client.read_to_end()
        return found


@pytest.mark.parametrize("identity", [b"\xff\xfe", b"jos\xe9", b"\xed\xa0\x80"])
async def test_an_identity_in_any_bytes_has_its_own_sessions(tmp_path: Path, identity: bytes) -> None:
    body = orjson.dumps({"model": "openai/m", "sessionId": "s", "messages": [user("q1")]})
    async with remembering(tmp_path) as here:
        for turns in (b"turns=0", b"turns=1"):
            found = await raw(here, body, b"X-ORQ-IDENTITY-ID: %b\r\n" % identity)
            assert b" 200 " in found
            assert turns in found
        assert b"turns=0" in await raw(here, body, b"X-ORQ-IDENTITY-ID: %b\r\n" % (identity + b"x"))
        assert await here.turns() == []


async def test_two_long_identities_that_begin_alike_are_two(tmp_path: Path) -> None:
    one, two = ({"X-ORQ-IDENTITY-ID": "u" * 300 + end} for end in ("1", "2"))
    async with remembering(tmp_path) as here:
        await here.say("q1", headers=one)
        assert len(await here.turns(headers=one)) == 1
        assert await here.turns(headers=two) == []


def test_an_owner_is_never_longer_than_the_store_takes() -> None:
    who = Principal(scope="0" * 32)
    owners = {
        owner_of(who, identity) for identity in ("\x01" * 128, "\x01" * 127 + "\x02", "\\" * 128, "😀" * 128, "a" * 128, "a")
    }
    assert len(owners) == 6
    assert max(map(len, owners)) <= LONGEST
