"""Which callbacks take turns as one: those to the same receiver.

    destination_of("https://Hooks.example.com/x")          # "hooks.example.com:443"

Contract: pure, of a URL that was checked when its call was accepted (callbacks.py), and decides nothing about it.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ..network.addresses import parse_address, parse_numeric_host

# The authority of a URL that has been checked when it was accepted (RFC 3986 3.2): a whole parser takes seven times
# as long, for each call that asks for a callback.
_AUTHORITY = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[^][:/?#@\\]+?)\.?(?::(?P<port>[0-9]+))?(?:[/?#]|$)", re.ASCII
)


_PORTS = {"http": "80", "https": "443"}


@lru_cache(256)  # what is called back is called back often
def destination_of(url: str) -> str:
    """The flow of a callback: its receiver as `host:port`, in lower case; "" for text that is no http(s) URL.

    All callbacks to one receiver take turns as one. A receiver with many names is as many destinations: which of them
    lead to one machine only a resolver could tell.
    """
    found = _AUTHORITY.match(url.lower())
    return f"{_one_spelling(found['host'])}:{found['port'] or _PORTS[found['scheme']]}" if found else ""


def _one_spelling(host: str) -> str:
    """The host as it is, or the address that it spells: of many spellings, each would else have its own turn."""
    try:
        address = parse_address(host[1:-1]) if host.startswith("[") else parse_numeric_host(host)
    except ValueError:
        return host
    if address is None:
        return host
    return f"[{address}]" if address.version == 6 else str(address)
