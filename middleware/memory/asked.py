"""What a request says about memory, read once, before anything is asked.

    sessionId: "user-7" · session_id: "user-7" · orq.thread.id: "user-7", where the operator lets threads be sessions
    saveToMemory: false · save_to_memory: false

The one rule: a session that cannot be served is a 400 here; two spellings that say different things are, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.call import Call
from proxy.own_fields import Field, OwnFields

SESSION, SAVE = ("sessionId", "session_id"), ("saveToMemory", "save_to_memory")
# Most requests of a gateway have none of these; then nothing more is looked for.
NAMES = frozenset({*SESSION, *SAVE, "thread"})
# Characters, as the store takes them.
LONGEST = 200


@dataclass(frozen=True, slots=True)
class Asked:
    """session: its id. save: the exchange is to be remembered."""

    session: str
    save: bool


def read(call: Call, own: OwnFields, threads: bool) -> Asked | None:
    """None where no session is named. Raises Refused (400) with the path."""
    if not own.any(NAMES):
        return None
    save = _one(own, SAVE)
    wanted = save is None or save.flag()
    session = _one(own, SESSION)
    if session is not None:
        if call.kind != "chat":
            session.refuse("only chat completions have a memory")
        return Asked(_name(session), wanted)
    thread = own.get("thread") if threads and call.kind == "chat" else None
    named = thread.get("id") if thread is not None else None
    return None if named is None else Asked(_name(named), wanted)


def _one(own: OwnFields, names: tuple[str, str]) -> Field | None:
    """The field under one of its two spellings."""
    first, second = own.get(names[0]), own.get(names[1])
    if first is not None and second is not None and first.value != second.value:
        second.refuse(f"says something else than {first.path}")
    return first or second


def _name(field: Field) -> str:
    value = field.value
    if not isinstance(value, str) or not 1 <= len(value) <= LONGEST or not value.isprintable():
        field.refuse(f"must be a text of 1 to {LONGEST} printable characters")
    if value in (".", ".."):
        field.refuse("must not be . or .., which no URL can name")
    return value
