"""Who may ask, and for what: keys from config.yaml and from a keys file, checked before a request's body is read.

`keys` is what a key is and how one is recognized, `keysfile` the file that is re-read, `models` what a key may ask for,
`allowance` how much of it, `callers` the provider key that a caller may bring along, `gate` the middleware itself.
The one rule: a key is hashed where it arrives and goes nowhere else: into no log, metric, error, repr or scope.
"""

from __future__ import annotations

from middleware.auth.gate import Auth
from middleware.auth.keys import Key

__all__ = ["Auth", "Key"]
