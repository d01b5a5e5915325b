"""What says who somebody is: e-mail addresses, payment cards, IBANs, telephone numbers, US social security numbers.

Strategy: an expression for the look of it, then arithmetic (Luhn, mod 97) and the ranges that are given out. In doubt it is none:
a redacted order number is a fault, too.
The one rule: a candidate is judged by its groups. What stands in one run of digits is never cut out of its middle.

Ranges: ISO/IEC 7812 and the card schemes' own; the IBAN registry (SWIFT, release 99); SSA's "Invalid SSNs" (ssa.gov/employer).
"""

from __future__ import annotations

import re

from middleware.guardrails.rules.detector import Detector, alone, joins

# First digits (as numbers of so many digits) and lengths of the cards that are given out.
CARDS: tuple[tuple[int, int, int, frozenset[int]], ...] = (
    (1, 4, 4, frozenset({13, 16, 19})),  # Visa
    (2, 51, 55, frozenset({16})),  # Mastercard
    (4, 2221, 2720, frozenset({16})),
    (2, 34, 34, frozenset({15})),  # American Express
    (2, 37, 37, frozenset({15})),
    (4, 6011, 6011, frozenset(range(16, 20))),  # Discover
    (3, 644, 649, frozenset(range(16, 20))),
    (2, 65, 65, frozenset(range(16, 20))),
    (3, 300, 305, frozenset({14})),  # Diners
    (2, 36, 36, frozenset({14})),
    (2, 38, 39, frozenset({14, 16})),
    (4, 3528, 3589, frozenset(range(16, 20))),  # JCB
    (2, 62, 62, frozenset(range(16, 20))),  # UnionPay
    (4, 5018, 5018, frozenset(range(13, 20))),  # Maestro
    (4, 5020, 5020, frozenset(range(13, 20))),
    (4, 5038, 5038, frozenset(range(13, 20))),
    (4, 5893, 5893, frozenset(range(13, 20))),
    (4, 6304, 6304, frozenset(range(13, 20))),
    (4, 6759, 6763, frozenset(range(13, 20))),
)
# Characters of an IBAN by country.
IBANS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HN": 28, "HR": 21, "HU": 28,
    "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28,
    "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24,
    "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26,
    "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip
DIGITS = re.compile(r"[^0-9]")


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(digits: str) -> bool:
    known = any(len(digits) in lengths and low <= int(digits[:size]) <= high for size, low, high, lengths in CARDS)
    return known and luhn(digits) and len(set(digits)) > 1


def card(text: str, start: int, end: int) -> int:
    """The longest card that ends with a group; groups that follow (an expiry date) are none of it."""
    before = text[start - 1 : start] if start else ""
    if joins(before) or (before and before in "_."):
        return 0
    while end - start >= 13:
        if not (joins(text[end : end + 1]) or text[end : end + 1] == "_") and is_card(DIGITS.sub("", text[start:end])):
            return end
        end -= 1
        while end > start and text[end - 1 : end + 1].isdigit():
            end -= 1
        while end > start and not text[end - 1].isdigit():
            end -= 1
    return 0


def iban(text: str, start: int, end: int) -> int:
    """The end of the IBAN, whose country says how long it is."""
    if start and joins(text[start - 1]):
        return 0
    length, at = IBANS.get(text[start : start + 2].upper(), 0), start
    taken: list[str] = []
    while at < end and len(taken) < length:
        if text[at] != " ":
            taken.append(text[at].upper())
        at += 1
    if not length or len(taken) < length or joins(text[at : at + 1]):
        return 0
    number = "".join(taken[4:] + taken[:4])
    return at if int("".join(str(int(character, 36)) for character in number)) % 97 == 1 else 0


def email(text: str, start: int, end: int) -> int:
    """An address whose local part no letter of any script touches; `git@host:` is where a repository is."""
    before = text[start - 1 : start] if start else ""
    if joins(before) or joins(text[end : end + 1]) or (text.startswith("git@", start) and text[end : end + 1] == ":"):
        return 0
    return end if ".." not in text[start:end] else 0


def phone(text: str, start: int, end: int) -> int:
    """Enough digits, brackets that close, and nothing beside it that would make it part of something longer."""
    before, behind = text[start - 1 : start] if start else "", text[end : end + 2]
    if joins(before) or (before and before in "_+-./") or joins(behind[:1]) or behind[:1] == "_":
        return 0
    if behind[:1] in ("-", "/", ".") and behind[1:].isdigit():
        return 0
    if start > 1 and text[start] != "+" and before == " " and text[start - 2].isdigit():
        return 0  # the groups of a longer number
    found = text[start:end]
    digits = len(DIGITS.sub("", found))
    return end if 8 <= digits <= 15 and found.count("(") == found.count(")") else 0


def ssn(text: str, start: int, end: int) -> int:
    """Area 000, 666 and 900 up, group 00 and serial 0000 are never given out."""
    area, group, serial = text[start : start + 3], text[start + 4 : start + 6], text[start + 7 : end]
    if area in ("000", "666") or area >= "900" or group == "00" or serial == "0000" or text[start + 3] != text[start + 6]:
        return 0
    before, behind = text[start - 1 : start] if start else "", text[end : end + 2]
    joined = (before and before in "-.") or (behind[:1] in ("-", ".") and joins(behind[1:]))
    return 0 if joined else alone(text, start, end)


EMAIL = Detector("EMAIL", r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}", email, most=320)
CARD = Detector("CARD", r"[2-6](?:[ -]?[0-9]){12,18}", card, most=40)
IBAN = Detector("IBAN", r"[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,29}|[a-z]{2}[0-9]{2}[a-z0-9]{11,29}", iban, most=66)
# International with its plus; national ones only in the groups of the United States, Britain, France and Germany.
PHONE = Detector(
    "PHONE",
    r"\+[1-9](?:[ ().-]{0,2}[0-9]){7,14}"
    r"|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-][0-9]{4}|[2-9][0-9]{2}([ .-])[2-9][0-9]{2}[ .-][0-9]{4}"
    r"|0[1-9](?:[ .][0-9]{2}){4}"
    r"|0[127][0-9]{2,3} [0-9]{3,4} ?[0-9]{3,4}"
    r"|0[1-9][0-9]{1,4}[ /-]{1,3}[0-9]{3,9}(?:[ -][0-9]{1,5}){0,2}",
    phone,
    most=48,
    ahead=2,
)
SSN = Detector("SSN", r"[0-8][0-9]{2}[ -][0-9]{2}[ -][0-9]{4}", ssn, most=11, ahead=2)
