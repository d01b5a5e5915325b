"""What opens doors: private keys, and the API keys of known vendors, by the marks that their makers gave them.

Strategy: a key is known by its prefix and a first stretch of characters; it goes on as long as such characters do, so no length
that a vendor may change is written here. A PEM block goes from its first line to its last.
The one rule: a mark must be one that no other text has; bare hex and base64 are none.

Prefixes as the vendors document them for secret scanning (GitHub, GitLab, Slack, Stripe, npm, Hugging Face, AWS's "AKIA/ASIA").
"""

from __future__ import annotations

import re

from middleware.guardrails.rules.detector import Detector, joins

MOST_KEY, MOST_PEM = 8192, 16_384
KEY = re.compile(r"[A-Za-z0-9_\-]*")
TOKEN = re.compile(r"[A-Za-z0-9_\-.=]*")
# Base64, the headers of encrypted keys, and line breaks, escaped ones too.
INSIDE = re.compile(r"[A-Za-z0-9+/=\s:,.\\-]*?-----END (?:[A-Z0-9]+ ){0,4}(?:PRIVATE KEY|PRIVATE KEY BLOCK)-----")
OPEN = re.compile(r"[A-Za-z0-9+/=\s:,.\\-]*")


def key_end(text: str, end: int) -> int:
    return _end(KEY, text, end)


def token_end(text: str, end: int) -> int:
    return _end(TOKEN, text, end)


def _end(pattern: re.Pattern[str], text: str, end: int) -> int:
    found = pattern.match(text, end)
    return end if found is None else found.end()


def pem_end(text: str, end: int) -> int:
    """Behind the last line; without one, as far as what can stand in a key goes."""
    found = INSIDE.match(text, end, end + MOST_PEM)
    return _end(OPEN, text, end) if found is None else found.end()


def key(text: str, start: int, end: int) -> int:
    """A key that begins a word. A full stop or a dash behind it belongs to the sentence."""
    before = text[start - 1 : start] if start else ""
    if joins(before) or (before and before in "_-"):
        return 0
    while text[end - 1] in ".-_=":
        end -= 1
    return end


def pem(text: str, start: int, end: int) -> int:
    return end


PRIVATE_KEY = Detector(
    "PRIVATE_KEY", r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----", pem, pem_end, most=MOST_PEM
)
API_KEYS = (
    r"sk-(?:proj-|svcacct-|admin-|ant-[a-z0-9]{3,8}-|or-v1-)?[A-Za-z0-9]{16}"  # OpenAI, Anthropic, OpenRouter
    r"|(?:AKIA|ASIA)[A-Z2-7]{16}"  # AWS: an access key id
    r"|gh[pousr]_[A-Za-z0-9]{20}|github_pat_[A-Za-z0-9_]{20}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10}|xapp-[0-9]-[A-Z0-9]{6}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16}"  # Stripe
    r"|glpat-[A-Za-z0-9_-]{20}"
    r"|hf_[A-Za-z]{20}"
    r"|npm_[A-Za-z0-9]{20}"
)
API_KEY = Detector("API_KEY", API_KEYS, key, key_end, most=MOST_KEY)
JWT = Detector("JWT", r"eyJ[A-Za-z0-9_-]{8,300}\.eyJ[A-Za-z0-9_-]{8}", key, token_end, most=MOST_KEY)
