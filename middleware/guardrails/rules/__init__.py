"""What text is looked at for: pure, without a clock, a socket or a stream.

`detector` has what a rule is and how several are looked for at once; `personal` and `secrets` the built-in ones, `words` what an
operator writes; `engine` and `prefix` the regular expressions below them; `reading` how text is read before.
The one rule: nothing here keeps or logs what it has found.
"""

from __future__ import annotations

from collections.abc import Mapping

from middleware.guardrails.rules.detector import Detector
from middleware.guardrails.rules.personal import CARD, EMAIL, IBAN, PHONE, SSN
from middleware.guardrails.rules.secrets import API_KEY, JWT, PRIVATE_KEY

BUILT_IN: Mapping[str, tuple[Detector, ...]] = {
    "email": (EMAIL,),
    "card": (CARD,),
    "iban": (IBAN,),
    "phone": (PHONE,),
    "ssn": (SSN,),
    "private_key": (PRIVATE_KEY,),
    "api_key": (API_KEY, JWT),
    "pii": (EMAIL, CARD, IBAN, PHONE, SSN),
    "secrets": (PRIVATE_KEY, API_KEY, JWT),
}
