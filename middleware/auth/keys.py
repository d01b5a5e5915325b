"""Keys: how an operator writes them, and how a presented one is recognized.

Strategy: `Key` is an entry as it is written, with the form of each setting marked on its annotation, so that config.yaml and the
keys file are held to the same. A `Keyring` keeps no key, only SHA-256 digests, and looks a presented key up by its digest.
The one rule: nothing here says or shows a key, and no words about a fault repeat what stands there.

Why this is constant time enough: what is compared is a digest. Whoever times the look-up learns something about the SHA-256 of
what they sent, which they know, and cannot steer towards a stored digest byte by byte without inverting SHA-256; the table's
own hash of it is keyed per process. The last comparison is `hmac.compare_digest`, and a miss makes it as well. A plain hash
(no salt, no stretching) is enough for random keys; hence the least length.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated, Any

from middleware.auth.allowance import Allowance
from proxy import origins
from proxy.call import Principal
from proxy.origins import Origins

SHORTEST_KEY = 16
HASHED = "sha256:"
VISIBLE = re.compile(r"[!-~]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Form:
    """A mark beside an annotation. check: raises ValueError, in words for the operator, for a value of another form."""

    check: Callable[[Any], object]


def _name_form(name: str) -> None:
    if not re.fullmatch(r"[\w.:@+-]{1,64}", name, re.ASCII):
        raise ValueError("must be 1 to 64 letters, digits or _ . : @ + - (it is shown in logs and metrics)")


def _key_form(key: str) -> None:
    if key.startswith(HASHED):
        if not re.fullmatch(r"[0-9A-Fa-f]{64}", key.removeprefix(HASHED)):
            raise ValueError("must be sha256: and 64 hexadecimal digits")
    elif len(key) < SHORTEST_KEY:
        raise ValueError(f"must have at least {SHORTEST_KEY} characters")
    elif not VISIBLE.fullmatch(key):
        raise ValueError("must be visible ASCII characters without blanks, or no header can carry it")


def _models_form(globs: tuple[str, ...]) -> None:
    if not globs or not all(globs):
        raise ValueError("must be names or globs such as openai/*; leave it out to allow every model")


def _origins_form(written: tuple[str, ...]) -> None:
    if not written:
        raise ValueError("must be origins such as https://app.example; leave it out for a key that works from anywhere")
    for origin in written:
        origins.check(origin)


def instant(written: str) -> float:
    """An ISO 8601 date (its first moment) or date-time, UTC where it names no zone -> Unix seconds. Raises ValueError."""
    try:
        found = datetime.fromisoformat(written)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError("must be a date or date-time such as 2027-01-31 or 2027-01-31T12:00:00Z") from None


@dataclass(frozen=True, slots=True)
class Key:
    """One key as it is written.

    name: for logs and metrics, unique. key: the key itself, or `sha256:` and its digest in hex. models: globs over the names
    that it may ask for; empty allows all. admin: may use the admin endpoints. expires: when it stops to work; empty is never.
    origins: the web pages that it works from, and nowhere else; empty is anywhere. limits: what the limits middleware grants it.
    metadata: the operator's.
    """

    name: Annotated[str, Form(_name_form)]
    key: Annotated[str, Form(_key_form)] = field(repr=False)
    models: Annotated[tuple[str, ...], Form(_models_form)] = ()
    admin: bool = False
    expires: Annotated[str, Form(instant)] = ""
    origins: Annotated[tuple[str, ...], Form(_origins_form)] = ()
    limits: Allowance = field(default_factory=Allowance)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as it is looked up. digest: SHA-256 of the key. expires: Unix seconds. origins: None is from anywhere."""

    digest: bytes = field(repr=False)
    principal: Principal
    expires: float = math.inf
    origins: Origins | None = None


# What a key that is not there is compared with; no key has this digest.
NOBODY = Entry(bytes(32), Principal())


class Keyring:
    """The keys that are accepted. Raises ValueError where a name or a key stands there twice."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._entries: dict[bytes, Entry] = {}
        names: set[str] = set()
        for key in keys:
            entry = _entry(key)
            if key.name in names:
                raise ValueError(f"there are two keys with the name '{key.name}'")
            if (other := self._entries.get(entry.digest)) is not None:
                raise ValueError(f"'{other.principal.name}' and '{key.name}' are the same key")
            names.add(key.name)
            self._entries[entry.digest] = entry

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, presented: str) -> Entry | None:
        """The entry of a presented key, expired or not. A short one is never a match, even where its digest is configured."""
        found = digest(presented)
        entry = self._entries.get(found, NOBODY)
        return entry if hmac.compare_digest(entry.digest, found) and len(presented) >= SHORTEST_KEY else None


def digest(key: str) -> bytes:
    """SHA-256 of a key, whatever bytes a client sent."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _entry(key: Key) -> Entry:
    found = bytes.fromhex(key.key.removeprefix(HASHED)) if key.key.startswith(HASHED) else digest(key.key)
    # The name is in it so that a key that is given to somebody else under a new name does not come with the old one's cache.
    scope = sha256(key.name.encode() + b"\0" + found).hexdigest()[:32]
    said = {"models": key.models, "limits": key.limits.said(), "metadata": key.metadata}
    principal = Principal(key.name, key.admin, scope, {name: value for name, value in said.items() if value})
    expires = instant(key.expires) if key.expires else math.inf
    return Entry(found, principal, expires, Origins(key.origins) if key.origins else None)
