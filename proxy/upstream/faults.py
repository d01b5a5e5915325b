"""What can go wrong at a socket, in the gateway's own errors: here foreign exceptions are mapped, once.

The one rule: the words name neither host nor key; they are the same whichever system call failed.
"""

from __future__ import annotations

import ssl

from proxy.errors import GatewayError, Malformed, UpstreamCut, UpstreamUnreachable


class Unanswered(UpstreamCut):
    """The connection broke before a byte of the answer came: on a kept one, reason to ask again on a new one."""


def unresolved() -> GatewayError:
    return UpstreamUnreachable("The provider's host name could not be resolved.", code="upstream_dns")


def invalid_url() -> GatewayError:
    return UpstreamUnreachable("The provider's base_url does not make a valid URL.")


def unconnected(error: Exception) -> GatewayError:
    """What an exception of connecting means, behind the name's resolution."""
    if isinstance(error, ssl.SSLError):
        return UpstreamUnreachable("The provider's TLS certificate or handshake failed.", code="upstream_tls")
    return UpstreamUnreachable("The provider could not be connected to.")


def unanswered(begun: bool) -> GatewayError:
    """begun: whether a byte of the answer had come."""
    return (UpstreamCut if begun else Unanswered)("The provider closed the connection before it answered.")


def not_http() -> GatewayError:
    return Malformed("The provider's answer is not HTTP as it should be.")


def broken() -> GatewayError:
    return UpstreamCut("The provider's connection broke before its reply was complete.")


def undecodable() -> GatewayError:
    return Malformed("The provider's reply could not be decompressed.")


def unknown_coding(coding: str) -> GatewayError:
    return Malformed(f"The provider's reply is compressed as '{coding[:40]}', which was not asked for and is not known here.")
