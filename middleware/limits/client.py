"""Which client a request is from: the address of its connection, or what a proxy says that is known to tell the truth.

Strategy: `X-Forwarded-For` is read from its end, as long as whoever added an entry is one of the operator's own proxies; what
stands before that are the client's own words. An IPv6 client is its /64, since it may use every address in that.
The one rule: nothing that a client wrote ever decides as whom it is counted.

Header: https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/X-Forwarded-For#selecting_an_ip_address
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

MOST_HOPS = 16
# Some proxies write the port, too.
WITH_PORT = re.compile(r"\[(?P<six>[^\]]*)\](?::\d+)?|(?P<four>[\d.]+):\d+", re.ASCII)
Address = IPv4Address | IPv6Address


class Proxies:
    """The operator's own proxies: addresses and networks (`10.0.0.0/8`). Raises ValueError for what is neither."""

    def __init__(self, written: Iterable[str]) -> None:
        try:
            self._networks = tuple(ip_network(entry) for entry in written)
        except ValueError:
            raise ValueError("trusted_proxies: must be addresses or networks, such as 127.0.0.1 or 10.0.0.0/8") from None

    def client(self, peer: str, headers: Mapping[str, str]) -> str:
        """Under which name the client is counted. peer: the other end of its connection, "" where that is not known."""
        found = address(peer)
        hops = forwarded(headers) if self._networks else []
        while hops and found is not None and self._trusts(found) and (before := address(hops.pop())) is not None:
            found = before
        return "" if found is None else str(IPv6Network((found, 64), False) if found.version == 6 else found)

    def _trusts(self, found: Address) -> bool:
        return any(found in network for network in self._networks)


@lru_cache(maxsize=4096)
def address(written: str) -> Address | None:
    """An address, perhaps with a port; None for anything else. One of IPv4 within IPv6 is the former."""
    written = written.strip()
    if match := WITH_PORT.fullmatch(written):
        written = match["six"] or match["four"] or ""
    try:
        found = ip_address(written)
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def forwarded(headers: Mapping[str, str]) -> list[str]:
    """The entries of all `X-Forwarded-For` of a request, the nearest last."""
    every = getattr(headers, "getall", None)
    lines = every("x-forwarded-for", []) if every is not None else [headers.get("x-forwarded-for", "")]
    return ",".join(lines).rsplit(",", MOST_HOPS)
