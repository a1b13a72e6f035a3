"""Which names a server answers to: the field Host tells a page's rebound name from ours (DNS rebinding).

    names = parse_hosts("faas.internal")
    check_own_name(request.host, names, "gateway")                # UnknownHost

A page may have its own name resolve to our address.  Then it is of the same origin as we are, and only the name in Host
tells it from our user.  So a server that only this machine can reach, and asks for no password, answers to
`localhost`, to addresses, and to names that its operator lists.  Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from socket import socket

from ..watchdog import FaashoundError
from .addresses import parse_host_name, parse_numeric_host

SHOWN_CHARS = 100  # of a name in an error's text
MAX_HOST_BYTES = 255 + len(".:65535")  # of a Host field that may be a name (RFC 1035 2.3.4); what is longer is not kept


class UnknownHost(FaashoundError):
    """The request is for a host name that is none of ours (RFC 9110 15.5.20)."""

    status = 421


def parse_hosts(text: str) -> frozenset[str]:
    """Return the names of the setting allowed_hosts; ValueError says what is allowed."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        if any(parse_numeric_host(word) for word in words):
            raise ValueError("an address needs no entry")
        return frozenset(map(parse_host_name, words))
    except ValueError as error:
        raise ValueError(f'{error}; allowed: host names without port, separated by commas ("faas.internal")') from None


@lru_cache(maxsize=256)
def host_name(host: bytes) -> str | None:
    """Return the name in a Host field, None if it is an address, or none at all as in HTTP/1.0: no page can do that.

    0.0.0.0 and IPv4 in IPv6 are names here: they lead to this machine from every page as well, and browsers do not say
    whose page it is that asks: they send Sec-Fetch-Site to what they call trustworthy, 127.0.0.0/8 and ::1
    (https://www.w3.org/TR/secure-contexts).
    """
    text = host.decode("latin-1").lower()
    name = re.sub(r":[0-9]*$", "", text).removesuffix(".")
    try:
        address = ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name or None
    is_mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    return name if address.is_unspecified or is_mapped else None


def is_own_name(host: bytes, names: Collection[str]) -> bool:
    """Tell whether a Host field names this machine to itself, an address, or one of `names`, in lower case."""
    if len(host) > MAX_HOST_BYTES:
        return False
    name = host_name(host)
    return name is None or name == "localhost" or name.endswith(".localhost") or name in names


def check_own_name(host: bytes, names: Collection[str], program: str) -> None:
    """Raise UnknownHost, which says what is allowed, for a Host field that is no own name of this `program`."""
    if not is_own_name(host, names):
        name = (host_name(host[:MAX_HOST_BYTES]) or "")[:SHOWN_CHARS]
        raise UnknownHost(f"{name!r} is no name of this {program}; allowed: localhost, addresses, and allowed_hosts")


def are_on_loopback(sockets: Iterable[socket]) -> bool:
    """Tell whether only this machine reaches `sockets`, as far as they are of TCP."""
    names = [sock.getsockname() for sock in sockets]
    return all(ip_address(name[0].partition("%")[0]).is_loopback for name in names if isinstance(name, tuple))
