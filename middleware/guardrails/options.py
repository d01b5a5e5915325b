"""config.yaml's part: rules as an operator writes them, and as they are used.

    rules: [email, card, {kind: deny, words: [acme], action: block}, {kind: regex, id: order, pattern: 'ORD-[0-9]{6}'}]

Strategy: one dataclass for all kinds, because the file's schema checks field by field; what belongs to which kind is checked
here.
The one rule: what cannot be kept is refused at start: holding text back that is only flagged, redacting what has been sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Literal

from middleware.guardrails.rules import BUILT_IN
from middleware.guardrails.rules.detector import Detector, Scanner
from middleware.guardrails.rules.engine import INSTALL
from middleware.guardrails.rules.words import denied, own
from middleware.guardrails.verdict import Action
from proxy.units import Between, Seconds

Kind = Literal[
    "email", "card", "iban", "phone", "ssn", "private_key", "api_key", "pii", "secrets", "deny", "allow", "length", "regex",
    "moderations", "webhook",
]  # fmt: skip
Mode = Literal["hold_back", "parallel", "after"]
PATTERNS = frozenset({*BUILT_IN, "deny", "regex"})
OUTSIDE = frozenset({"moderations", "webhook"})
# Which options belong to which kinds; the others every kind has.
OWN_OPTIONS: Mapping[str, frozenset[str]] = {
    "words": frozenset({"deny", "allow"}),
    "pattern": frozenset({"regex"}),
    "placeholder": frozenset({"regex", "deny"}),
    "max_length": frozenset({"regex"}),
    "max_characters": frozenset({"length"}),
    "max_tokens": frozenset({"length"}),
    "moderations": frozenset({"moderations"}),
    "categories": frozenset({"moderations"}),
    "threshold": frozenset({"moderations"}),
    "url": frozenset({"webhook"}),
    "headers": frozenset({"webhook"}),
    "timeout": OUTSIDE,
    "on_failure": OUTSIDE,
    "window": OUTSIDE,
}
REQUIRED = {"deny": "words", "allow": "words", "regex": "pattern", "moderations": "moderations", "webhook": "url"}
URL = re.compile(r"https?://[^\s@?#/]+(?:/[^\s#]*)?")
ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """One rule as it is written.

    kind: what it looks for, or who is asked. id: its name for clients, logs and metrics; the kind where none is given. action:
    what becomes of what it finds. on: which side. mode: of output: held back until it is decided, looked at beside the stream, or
    told at its end. when: always, or only for requests that ask for it. words, pattern, …: of some kinds; docs/guardrails.md.
    """

    kind: Kind
    id: str | None = None
    action: Action | None = None
    on: Literal["input", "output", "both"] = "both"
    mode: Mode | None = None
    when: Literal["always", "asked"] = "always"
    words: Sequence[str] | None = None
    pattern: str | None = None
    placeholder: str | None = None
    max_length: Annotated[int, Between(1, 4096)] | None = None
    max_characters: Annotated[int, Between(1, 10**9)] | None = None
    max_tokens: Annotated[int, Between(1, 10**9)] | None = None
    moderations: Annotated[str, "target"] | None = None
    categories: Sequence[str] | None = None
    threshold: Annotated[float, Between(0, 1)] | None = None
    url: str | None = None
    headers: Mapping[str, str] | None = None
    timeout: Annotated[Seconds, Between(0.01, 60)] | None = None
    on_failure: Literal["open", "closed"] | None = None
    window: Annotated[int, Between(1, 100_000)] | None = None


@dataclass(frozen=True, slots=True)
class Outside:
    """Somebody who is asked. target: `provider/model` of moderations, else url. open: when nobody answers, the text passes.

    window: characters of output after which it is asked again. threshold: of a category's score; None: what the answer flags.
    """

    target: str | None = None
    categories: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    threshold: float | None = None
    url: str = ""
    headers: Mapping[str, str] | None = None
    timeout: float = 5.0
    open: bool = False
    window: int = 400


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as it is used. detectors: what it looks for; outside: who is asked instead. longest: (characters, tokens) of
    input."""

    id: str
    action: Action
    input: bool
    output: bool
    mode: Mode = "hold_back"
    always: bool = True
    detectors: tuple[Detector, ...] = ()
    outside: Outside | None = None
    longest: tuple[int | None, int | None] | None = None

    @property
    def holds(self) -> bool:
        """Is output held back for it?"""
        return self.mode == "hold_back" and self.action != "flag"

    def sided(self, on: str) -> Rule:
        """The same for the sides that a request names."""
        return replace(self, input=on != "output", output=on != "input" and self.longest is None)


def rule(options: RuleOptions, re2: ModuleType | None) -> Rule:
    """Raises ValueError in words for the operator."""
    name = options.id or options.kind
    try:
        return _rule(name, options, re2)
    except ValueError as error:
        raise ValueError(f"rule '{name}': {error}") from None


def _rule(name: str, options: RuleOptions, re2: ModuleType | None) -> Rule:
    kind = options.kind
    _belongs(kind, options)
    if not ID.fullmatch(name):
        raise ValueError("id: letters, digits and _ . : - only")
    action: Action = options.action or ("redact" if kind in PATTERNS and kind != "deny" else "block")
    mode = options.mode or "hold_back"
    if action == "redact" and kind in ("length", "moderations"):
        raise ValueError("has nothing to redact; block or flag")
    if action == "redact" and mode != "hold_back" and options.on != "input":
        raise ValueError("redacts only with mode: hold_back; what was sent cannot be taken back")
    if kind == "length" and options.on == "output":
        raise ValueError("is of the input; max_output_tokens_hard of bounds is of the output")
    made = Rule(name, action, options.on != "output", options.on != "input" and kind != "length", mode, options.when == "always")
    if kind in PATTERNS:
        return replace(made, detectors=_detectors(name, options, re2))
    if kind == "length":
        if options.max_characters is None and options.max_tokens is None:
            raise ValueError("needs max_characters or max_tokens")
        return replace(made, longest=(options.max_characters, options.max_tokens))
    return replace(made, outside=_outside(options))


def _belongs(kind: str, options: RuleOptions) -> None:
    for option, kinds in OWN_OPTIONS.items():
        if getattr(options, option) is not None and kind not in kinds:
            raise ValueError(f"{option}: belongs to {', '.join(sorted(kinds))}")
    if (required := REQUIRED.get(kind)) and not getattr(options, required):
        raise ValueError(f"needs {required}")


def _detectors(name: str, options: RuleOptions, re2: ModuleType | None) -> tuple[Detector, ...]:
    if options.kind in BUILT_IN:
        return BUILT_IN[options.kind]
    label = re.sub(r"[^A-Z0-9]+", "_", (options.placeholder or name).upper()).strip("_")[:40]
    if not label or not label[0].isalpha():
        raise ValueError("placeholder: must begin with a letter")
    if options.kind == "deny":
        return (denied(label, options.words or ()),)
    if re2 is None:
        raise ValueError(f"an expression of one's own {INSTALL}")
    found = own(label, options.pattern or "", options.max_length or 256)
    try:
        Scanner([found], re2)
    except ValueError as error:
        raise ValueError(f"pattern: {error}") from None
    return (found,)


def _outside(options: RuleOptions) -> Outside:
    if options.url is not None and not URL.fullmatch(options.url):
        raise ValueError("url: must be an http:// or https:// URL without credentials")
    return Outside(
        target=options.moderations,
        categories=tuple(options.categories or ()),
        threshold=options.threshold,
        url=options.url or "",
        headers=options.headers,
        timeout=options.timeout or 5.0,
        open=options.on_failure == "open",
        window=options.window or 400,
    )
