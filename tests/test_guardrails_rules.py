"""The rules by themselves: what they find and what they leave alone, split at every offset and over any pieces."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.guardrails.channel import Channel
from middleware.guardrails.edits import Look, Vault, Watched
from middleware.guardrails.options import RuleOptions, rule
from middleware.guardrails.rules import BUILT_IN
from middleware.guardrails.rules.detector import Detector, Scanner
from middleware.guardrails.rules.engine import compiled, installed
from middleware.guardrails.rules.reading import escaped, plain, whole_escapes
from middleware.guardrails.rules.words import Allowed
from middleware.guardrails.texts import Part
from middleware.guardrails.verdict import Action
from tests.support.guardrails import ALLOWED, PEM, SECRETS

RE2 = installed()
ENGINES = pytest.mark.parametrize("re2", [RE2, None], ids=["re2", "re"])
ALL = (*BUILT_IN["pii"], *BUILT_IN["secrets"])
SCANNERS = {engine: Scanner(ALL, engine) for engine in (RE2, None)}


def found(scanner: Scanner, text: str) -> list[tuple[str, str]]:
    matches = scanner.scan(plain(text).text, 0, over=True).matches
    return [(scanner.detectors[match.which].name, text[match.start : match.end]) for match in matches]


@ENGINES
@pytest.mark.parametrize(("name", "secret"), SECRETS)
def test_every_rule_finds_what_it_is_for(re2: ModuleType | None, name: str, secret: str) -> None:
    for around in ("{}", "It is {}.", "({})", "“{}”", "a\n{}\nb", "x: {}, y", "我的是{}。", "それは{}です"):
        assert found(SCANNERS[re2], around.format(secret)) == [(name, secret)]


@ENGINES
@pytest.mark.parametrize("text", ALLOWED)
def test_what_only_looks_like_it_is_left_alone(re2: ModuleType | None, text: str) -> None:
    assert found(SCANNERS[re2], text) == []


@ENGINES
@pytest.mark.parametrize(("name", "secret"), SECRETS)
def test_every_beginning_of_a_match_is_held_back(re2: ModuleType | None, name: str, secret: str) -> None:
    """Whatever of it has come, `held` is before it, and so it is when all of it has come and it could go on."""
    for size in range(1, len(secret) + 1):
        assert SCANNERS[re2].scan(f"It is {secret[:size]}", 0, over=False).held <= 6, (size, secret[:size])


def piece(text: str) -> Part:
    return Part({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}, (0, "content", 0), text)


def look(detectors: Any = ALL, action: Action = "redact", scanner: Scanner | None = None, vault: Vault | None = None) -> Look:
    watched = [Watched(detector, detector.name, action) for detector in detectors]
    return Look("output", scanner or SCANNERS[RE2], watched, Allowed(()), vault or Vault(), lambda finding: None)


def texts(items: list[Any]) -> list[str]:
    return [item["choices"][0]["delta"]["content"] for item in items]


def passed(pieces: list[str], looking: Look, *, json: bool = False) -> tuple[list[str], Channel]:
    """What comes out, piece by piece, up to a block."""
    channel = Channel(looking, json=json)
    out: list[str] = []
    for number, text in enumerate([*pieces, ""]):
        if text:
            channel.add(piece(text), text)
        out += texts(channel.settle(over=number == len(pieces)))
        if channel.blocked:
            break
    return out, channel


def cut(text: str, ends: list[int]) -> list[str]:
    places = sorted({end for end in ends if 0 < end < len(text)})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(("name", "secret"), SECRETS)
def test_redacted_wherever_it_is_split(name: str, secret: str) -> None:
    for around in ("{}", "Write to {} today, or to nobody."):
        text, said = around.format(secret), around.format(f"[{name}_1]")
        for offset in range(1, len(text)):
            assert "".join(passed([text[:offset], text[offset:]], look())[0]) == said
        assert "".join(passed(list(text), look())[0]) == said


WORDS = st.sampled_from(
    ["Hello", " world", ", ", "12", " ", "-", "\n", "é", "的", "😀", "sk-", "eyJ", "@", "a@", "+49 ", "[EMAIL_1]"]
)
PROSE = st.lists(WORDS, max_size=8).map("".join)
TEXTS = st.lists(st.one_of(PROSE, st.sampled_from([f" {secret} " for _, secret in SECRETS])), max_size=4).map("".join)


@given(text=TEXTS, ends=st.lists(st.integers(1, 400), max_size=12))
def test_any_pieces_give_what_the_whole_text_gives(text: str, ends: list[int]) -> None:
    """The same text redacted, in whatever pieces it came; nothing is lost, and no piece has any part of a match."""
    whole = look().settled(text)
    out, _ = passed(cut(text, ends), look())
    assert "".join(out) == whole
    sent = ""
    for one in out:
        sent += one
        assert whole is not None
        assert whole.startswith(sent), "what has gone is never something that is redacted in the end"


@given(text=TEXTS, ends=st.lists(st.integers(1, 400), max_size=12))
def test_what_is_blocked_has_sent_nothing_of_the_match(text: str, ends: list[int]) -> None:
    first = SCANNERS[RE2].scan(plain(text).text, 0, over=True).matches
    out, channel = passed(cut(text, ends), look(action="block"))
    assert channel.blocked is bool(first)
    assert "".join(out) == (text if not first else text[: len("".join(out))])
    if first:
        assert len("".join(out)) <= first[0].start


@given(ends=st.lists(st.integers(1, 300), max_size=20))
def test_prose_flows_with_at_most_a_word_behind(ends: list[int]) -> None:
    text = "The quick brown fox jumps over the lazy dog, and then, in 2024, it went home to sleep for 12 hours. " * 3
    channel, sent, came = Channel(look()), "", ""
    for one in cut(text, ends):
        channel.add(piece(one), one)
        came += one
        sent += "".join(texts(channel.settle()))
        # A piece waits whole for its last word, unless more than 16 characters of it may go.
        assert len(came) - len(sent) <= 16 + len(" 2024, it")
    assert channel.settle(over=True) is not None


TOUCHING = [
    *(secret for _, secret in SECRETS),
    "555-234-5678",
    "-",
    ".",
    " ",
    "5",
    "x",
    "+4",
    "@b.io",
    "\u200b",
    "４",
    "é",
    "\\u200b",
]


@given(
    text=st.lists(st.sampled_from(TOUCHING), max_size=6).map("".join),
    ends=st.lists(st.integers(1, 200), max_size=12),
    json=st.booleans(),
)
def test_matches_beside_and_over_one_another_do_not_depend_on_the_pieces(text: str, ends: list[int], json: bool) -> None:
    text = text.replace("\n", "\\n") if json else text
    assert "".join(passed(cut(text, ends), look(), json=json)[0]) == look().settled(text, json=json)


def test_pieces_that_nothing_was_done_to_are_the_ones_that_came() -> None:
    said = ["Hello", " there", ", write", " to", " jo@example.com", " or", " call"]
    channel, parts, out = Channel(look()), [piece(text) for text in said], []
    for part in parts:
        channel.add(part, part.text)
        out += channel.settle()
    out += channel.settle(over=True)
    assert [out[0], out[1], out[-1]] == [parts[0].chunk, parts[1].chunk, parts[-1].chunk]
    assert all(any(item is part.chunk for item in out) for part in (*parts[:4], *parts[5:]))


def test_the_same_value_has_the_same_placeholder_and_the_client_s_own_are_not_given_again() -> None:
    vault = Vault({"[EMAIL_2]"})
    looking = look(vault=vault)
    said = looking.settled("a@x.com, b@x.com, a@x.com, 4111 1111 1111 1111")
    assert said == "[EMAIL_1], [EMAIL_3], [EMAIL_1], [CARD_1]"
    assert looking.settled("b@x.com") == "[EMAIL_3]"


# Spellings


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("４１１１ １１１１ １１１１ １１１１", "[CARD_1]"),
        ("٤١١١-١١١١-١١١١-١١١١", "[CARD_1]"),
        ("4111\u00a01111\u20111111\u20111111", "[CARD_1]"),
        ("jo\u200b@\u200bexample.com", "[EMAIL_1]"),
        ("jo＠example．com", "[EMAIL_1]"),
        ("👩\u200d👩\u200d👧 is a family", "👩\u200d👩\u200d👧 is a family"),
        ("\u200bé\u00ad", "\u200bé\u00ad"),
    ],
)
def test_other_spellings_of_the_same_characters(written: str, said: str) -> None:
    for pieces in ([written], list(written)):
        out, _ = passed(pieces, look())
        assert "".join(out) == said


@given(text=st.text(max_size=40))
def test_spellings_joined_are_the_text(text: str) -> None:
    read = plain(text)
    assert "".join(read.spelled if read.spelled is not None else [read.text]) == text
    assert read.spelled is None or len(read.spelled) == len(read.text)


@given(
    text=st.lists(st.sampled_from(["\\n", "\\\\", '\\"', "\\u0040", "\\ud83d", "a", "é", "\u200b", "@"]), max_size=9).map("".join)
)
def test_escapes_are_read_as_what_they_mean_and_spelled_as_they_came(text: str) -> None:
    read = escaped(text)
    assert "".join(read.spelled if read.spelled is not None else [read.text]) == text
    assert whole_escapes(text) == len(text)
    for size in range(len(text)):
        done = whole_escapes(text[:size])
        assert "".join(escaped(text[:done]).spelled or text[:done]) == text[:done]


ESCAPED = PEM.replace("\n", "\\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"to":"jo@example.com"}', '{"to":"[EMAIL_1]"}'),
        ('{"to":"jo\\u0040example.com"}', '{"to":"[EMAIL_1]"}'),
        ('{"text":"Hi\\njo@example.com\\n"}', '{"text":"Hi\\n[EMAIL_1]\\n"}'),
        ('{"text":"\\\\\\njo@example.com\\""}', '{"text":"\\\\\\n[EMAIL_1]\\""}'),
        ('{"card":4111111111111111,"ok":true}', '{"card":"[CARD_1]","ok":true}'),
        ('{"q\\"":"x","card": 4111111111111111}', '{"q\\"":"x","card": "[CARD_1]"}'),
        (f'{{"pem":"{ESCAPED}"}}', '{"pem":"[PRIVATE_KEY_1]"}'),
        ('{"path":"C:\\\\new\\/x"}', '{"path":"C:\\\\new\\/x"}'),
    ],
)
def test_arguments_stay_json_wherever_they_are_split(arguments: str, said: str) -> None:
    for offset in range(1, len(arguments)):
        out, _ = passed([arguments[:offset], arguments[offset:]], look(), json=True)
        assert "".join(out) == said
    assert "".join(passed(list(arguments), look(), json=True)[0]) == said


# One's own expressions


def own(pattern: str, **fields: Any) -> Detector:
    return rule(RuleOptions("regex", id="own", pattern=pattern, **fields), RE2).detectors[0]


PATTERNS = [
    ("ORD-[0-9]{6}", "ORD-123456"),
    (r"(?i)project\s+(titan|hyperion)\b", "Project  HYPERION"),
    (r"a(?:b|cd){2,3}e?f", "acdbf"),
    (r"\bx[^y]{1,5}y\b", "x12y"),
    (r"key=\S+", "key=abc:def"),
    (r"(?P<a>secret)-(?i:AB)+", "secret-abAB"),
    (r"é[à-ü]+", "éàü"),
]


@pytest.mark.parametrize(("pattern", "match"), PATTERNS)
def test_an_own_expression_is_held_back_from_its_first_character_on(pattern: str, match: str) -> None:
    detector = own(pattern)
    scanner = Scanner([detector], RE2)
    for text, said in ((f"so {match} it", "so [OWN_1] it"), (match, "[OWN_1]")):
        for offset in range(1, len(text)):
            looking = look([detector], scanner=scanner)
            assert "".join(passed([text[:offset], text[offset:]], looking)[0]) == said
        assert "".join(passed(list(text), look([detector], scanner=scanner))[0]) == said


@given(
    pattern=st.sampled_from([pattern for pattern, _ in PATTERNS]),
    text=st.text("ORD-12xyabcdef =secretproj titan\n", max_size=30),
    size=st.integers(1, 30),
)
def test_every_beginning_of_every_match_is_one_of_the_partial_expression(pattern: str, text: str, size: int) -> None:
    expression = compiled(pattern, RE2)
    if (span := expression.full.search(text, 0)) is not None:
        end = min(span[1], span[0] + size)
        partial = expression.partial.search(text[:end], 0)
        assert partial is not None
        assert partial[0] <= span[0]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(", "no regular expression"),
        (r"(?<=a)b", "linear"),
        (r"(a)\1", "linear"),
        (r"^a", "linear"),
        (r"a*", "empty text"),
        (r"(?:a{1000}){1000}", "too large"),
    ],
)
def test_an_expression_that_is_not_linear_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        own(pattern)


def test_without_re2_an_own_expression_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"pip install 'penstock\[guardrails\]'"):
        rule(RuleOptions("regex", pattern="a+"), None)


def test_an_expression_that_backtracks_for_ever_elsewhere_takes_linear_time() -> None:
    """`re` would need 2^40 steps for this one; each search looks at each character a bounded number of times."""
    expression = compiled("(?:a+)+b", RE2)
    assert expression.full.search("a" * 100_000, 0) is None
    assert expression.partial.search("a" * 1000, 0) == (0, 1000)


@ENGINES
def test_the_built_in_rules_look_at_hostile_text_a_bounded_number_of_times(
    re2: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the text is at most twice the candidates; what a candidate costs is bounded by its length."""
    for hostile in ("1 ", "a.", "a@b.", "DE89", "+1 2", "sk-", "-----BEGIN ", "0171 ", "4111 1111 ", "eyJa.", "12-"):
        counts = []
        for times in (500, 1000):
            calls: Counter[str] = Counter()
            counting = [_counted(detector, calls) for detector in ALL]
            scanner = Scanner(counting, re2)
            scanner.scan(hostile * times, 0, over=True)
            counts.append(sum(calls.values()))
        assert counts[1] <= 2 * counts[0] + 20


def _counted(detector: Detector, calls: Counter[str]) -> Detector:
    def fit(text: str, start: int, end: int) -> int:
        calls[detector.name] += 1
        return detector.fit(text, start, end)

    return Detector(detector.name, detector.source, fit, detector.extend, detector.most)


# Words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the Project Titan is", "the [DENIED_1] is"),
        ("the project\n titan is", "the [DENIED_1] is"),
        ("Ärger!", "[DENIED_1]!"),
        ("projects titanic, Ärgernis, verÄrger", "projects titanic, Ärgernis, verÄrger"),
        ("c++ and .NET", "[DENIED_1] and .NET"),
        ("这是机密文件。", "这是[DENIED_1]文件。"),
    ],
)
def test_denied_words_are_words(text: str, said: str) -> None:
    detector = rule(
        RuleOptions("deny", id="denied", words=["project titan", "Ärger", "c++", "机密"], action="redact"), RE2
    ).detectors[0]
    scanner = Scanner([detector], RE2)
    for offset in range(1, len(text)):
        looking = look([detector], scanner=scanner)
        assert "".join(passed([text[:offset], text[offset:]], looking)[0]) == said


def test_allowed_values_are_let_through() -> None:
    allowed = Allowed(["*@Example.com", "4111 1111 1111 1111"])
    watched = [Watched(detector, detector.name, "block") for detector in ALL]
    looking = Look("input", SCANNERS[RE2], watched, allowed, Vault(), lambda finding: None)
    for text in ("mail JO@example.com", "4111 1111 1111 1111"):
        assert looking.settled(text) == text
    assert looking.settled("jo@example.com.evil.org") is None
