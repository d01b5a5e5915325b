"""Penstock's mechanism: what a call and a reply are, the wire formats, the sockets, the relay.

Policy (whatever an operator may want to delete from config.yaml) lives in the `middleware` package beside this one.
docs/architecture.md shows the floors; imports point down only.
"""

__version__ = "0.1.0"
