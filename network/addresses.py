"""What kind of place an address leads to, by what it is and not by how it is spelled.

    classify_address(parse_address("::ffff:169.254.169.254")).kind     # AddressKind.LINK_LOCAL
    parse_numeric_host("0x7f.1")                                       # 127.0.0.1
    Client(guard_functions(strangers_names()))                         # for URLs whose host a stranger completes

Contract: a host that could be read as a number is a number, an IPv6 address that carries an IPv4 one is as bad as the
worse of the two, and a public address of this machine counts as private: what listens on it believes its callers to be
inside.  Those who connect ask at the time of connecting and connect to the address that was judged, without a second
look-up (rebinding).  The rules of callbacks, which an operator can widen, are in callbacks.py.

What it refuses to do: look up names.  All is pure but `own_addresses`, which asks the kernel.  An address in front of
this machine that is translated to one of its own (a cloud's public address, a router's) cannot be seen from here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from ..watchdog import Address as SocketAddress
from ..watchdog import FaashoundError, Resolver, Url

Address = IPv4Address | IPv6Address


Network = IPv4Network | IPv6Network


OWN_ADDRESSES_AGE_S = 5.0  # how long the list is believed; with a thousand interfaces it takes milliseconds to make


class AddressRefused(FaashoundError):
    """A name leads to addresses to which no connection may be made; the text is for the operator, not for strangers."""

    status = 502


class Level(IntEnum):
    """How far an address is trusted, from not at all a matter of ours to never by accident."""

    PUBLIC = 0
    PRIVATE = 1
    FORBIDDEN = 2


class AddressKind(StrEnum):
    """What an address is for; the value is the word for it in error texts."""

    PUBLIC = "public"
    OWN = "this machine's own"
    PRIVATE = "private"
    CARRIER_NAT = "private (carrier-grade NAT)"
    BENCHMARKING = "private (benchmarking)"
    SITE_LOCAL = "private (site-local)"
    DOCUMENTATION = "for documentation"
    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    METADATA = "cloud metadata"
    MULTICAST = "multicast"
    BROADCAST = "broadcast"
    UNSPECIFIED = "unspecified"
    RESERVED = "reserved"

    @property
    def level(self) -> Level:
        """How far addresses of this kind are trusted."""
        if self is AddressKind.PUBLIC:
            return Level.PUBLIC
        return Level.FORBIDDEN if self in _FORBIDDEN else Level.PRIVATE


_FORBIDDEN = frozenset(
    (
        AddressKind.LINK_LOCAL,
        AddressKind.METADATA,
        AddressKind.MULTICAST,
        AddressKind.BROADCAST,
        AddressKind.UNSPECIFIED,
        AddressKind.RESERVED,
    )
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an address is, and the range that made it so."""

    kind: AddressKind
    network: Network

    @property
    def level(self) -> Level:
        """How far the address is trusted."""
        return self.kind.level


# The longest range that matches decides (IANA special-purpose registries, RFC 6890).
_RANGES_AS_WRITTEN = (
    ("0.0.0.0/0", AddressKind.PUBLIC),
    ("0.0.0.0/8", AddressKind.UNSPECIFIED),  # Linux connects 0.0.0.0 to itself
    ("10.0.0.0/8", AddressKind.PRIVATE),
    ("100.64.0.0/10", AddressKind.CARRIER_NAT),
    ("100.100.100.200/32", AddressKind.METADATA),  # Alibaba
    ("127.0.0.0/8", AddressKind.LOOPBACK),
    ("168.63.129.16/32", AddressKind.METADATA),  # Azure's, in a public range
    ("169.254.0.0/16", AddressKind.LINK_LOCAL),  # with 169.254.169.254, most clouds' metadata
    ("172.16.0.0/12", AddressKind.PRIVATE),
    ("192.0.0.0/24", AddressKind.RESERVED),  # with 192.0.0.192, Oracle's metadata
    ("192.0.2.0/24", AddressKind.DOCUMENTATION),
    ("192.88.99.0/24", AddressKind.RESERVED),
    ("192.168.0.0/16", AddressKind.PRIVATE),
    ("198.18.0.0/15", AddressKind.BENCHMARKING),
    ("198.51.100.0/24", AddressKind.DOCUMENTATION),
    ("203.0.113.0/24", AddressKind.DOCUMENTATION),
    ("224.0.0.0/4", AddressKind.MULTICAST),
    ("240.0.0.0/4", AddressKind.RESERVED),
    ("255.255.255.255/32", AddressKind.BROADCAST),
    ("::/3", AddressKind.RESERVED),
    ("::/128", AddressKind.UNSPECIFIED),
    ("::1/128", AddressKind.LOOPBACK),
    ("64:ff9b::/96", AddressKind.PUBLIC),  # NAT64, RFC 6052: the IPv4 address inside decides
    ("2000::/3", AddressKind.PUBLIC),
    ("2001::/23", AddressKind.RESERVED),  # with Teredo, a tunnel to the IPv4 address inside
    ("2001:db8::/32", AddressKind.DOCUMENTATION),
    ("2002::/16", AddressKind.RESERVED),  # 6to4, likewise; deprecated by RFC 7526
    ("3fff::/20", AddressKind.DOCUMENTATION),
    ("4000::/2", AddressKind.RESERVED),
    ("8000::/1", AddressKind.RESERVED),
    ("fc00::/7", AddressKind.PRIVATE),
    ("fd00:42::42/128", AddressKind.METADATA),  # Scaleway
    ("fd00:ec2::254/128", AddressKind.METADATA),  # Amazon
    ("fd20:ce::254/128", AddressKind.METADATA),  # Google
    ("fe80::/10", AddressKind.LINK_LOCAL),
    ("fec0::/10", AddressKind.SITE_LOCAL),
    ("ff00::/8", AddressKind.MULTICAST),
)


_RANGES = sorted(
    (Verdict(kind, ip_network(text)) for text, kind in _RANGES_AS_WRITTEN),
    key=lambda verdict: -verdict.network.prefixlen,
)


_NAT64 = IPv6Network("64:ff9b::/96")


_ISATAP_MARKS = (0x0000_5EFE, 0x0200_5EFE)  # RFC 5214: the upper half of the interface identifier


def classify_address(address: Address, own: Collection[Address] = ()) -> Verdict:
    """Return what kind of place `address` leads to for a machine whose addresses are `own`.

    For IPv4 inside IPv6 it is the worse of the two verdicts.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return classify_address(address.ipv4_mapped, own)
    verdict = next(verdict for verdict in _RANGES if address in verdict.network)
    if address in own and verdict.kind is AddressKind.PUBLIC:
        return Verdict(AddressKind.OWN, ip_network(address))
    carried = _carried_ipv4(address)
    return max(verdict, classify_address(carried, own), key=lambda each: each.level) if carried else verdict


def _carried_ipv4(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv6Address) and (address in _NAT64 or int(address) >> 32 & 0xFFFF_FFFF in _ISATAP_MARKS):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


# ---------------------------------------------------------------------------------------------------------------
# Spellings (WHATWG URL 3.5, and the C library's inet_aton, both take 2130706433, 0177.0.0.1, 0x7f.1 and 127.1).
# ---------------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")


def parse_address(text: str) -> Address:
    """Return the address that a resolver wrote as `text`, an IPv4-mapped one as the IPv4 address that it is."""
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_literal(host: str) -> Address | None:
    """Return the address that the host of a parsed URL is, None for a name."""
    try:
        return parse_address(host)
    except ValueError:
        return None


def parse_numeric_host(text: str) -> IPv4Address | None:
    """Return the IPv4 address that `text` spells in whatever way, None for a name; ValueError for a bad number."""
    parts = text.lower().removesuffix(".").split(".")
    if not _NUMBER.fullmatch(parts[-1]):
        return None
    if len(parts) > 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        raise ValueError("the host is neither a name nor an address")
    *leading, last = (_parse_number(part) for part in parts)
    if any(byte > 255 for byte in leading) or last >= 256 ** (5 - len(parts)):
        raise ValueError("the host is no IPv4 address: a part is too large")
    return IPv4Address(sum(byte << 24 - 8 * place for place, byte in enumerate(leading)) + last)


def _parse_number(part: str) -> int:
    if part.startswith("0x"):
        return int(part[2:] or "0", 16)
    return int(part, 8) if part.startswith("0") else int(part)


def parse_host_name(text: str) -> str:
    """Return the host name `text` in lower case without trailing dot; ValueError for what is none (RFC 1123)."""
    name = text.lower().removesuffix(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError("the host is no name of dot-separated labels (RFC 1123)")
    return name


@lru_cache(maxsize=256)

# ---------------------------------------------------------------------------------------------------------------
# This machine's own addresses.
# ---------------------------------------------------------------------------------------------------------------


class _OwnAddresses:
    """The addresses of this machine's interfaces, read anew when they are OWN_ADDRESSES_AGE_S old."""

    def __init__(self) -> None:
        self._read_at_s = float("-inf")
        self._addresses: frozenset[Address] = frozenset()

    def __call__(self) -> frozenset[Address]:
        now_s = time.monotonic()
        if now_s - self._read_at_s >= OWN_ADDRESSES_AGE_S:
            self._addresses = frozenset(_read_interface_addresses())
            self._read_at_s = now_s
        return self._addresses


def _read_interface_addresses() -> Iterable[Address]:
    import psutil  # only here: it takes ten milliseconds to load, and only judging a stranger's address needs it

    for interface in psutil.net_if_addrs().values():
        for entry in interface:
            address = parse_literal(entry.address.partition("%")[0])  # fe80::1%eth0; a hardware address is none
            if address is not None:
                yield address


own_addresses: Callable[[], Collection[Address]] = _OwnAddresses()


# ---------------------------------------------------------------------------------------------------------------
# Guards: resolvers that leave only addresses to which one may connect.
# ---------------------------------------------------------------------------------------------------------------

Refusal = Callable[[Url, Address], str | None]  # why one may not connect there; None if one may


def guard(lookup: Resolver, refusal: Refusal, refused: Callable[[Url, str], FaashoundError]) -> Resolver:
    """Return a resolver that finds what `lookup` finds, without the addresses to which `refusal` objects, in order.

    One refused address does not spoil the others: a connection goes to a checked address only, so a name that also
    has a private address (split DNS) works and gains nothing.  When none is left it raises what `refused` makes of
    the first objection; and whatever `lookup` raises.
    """

    async def resolve(url: Url) -> Sequence[SocketAddress]:
        objections: list[str] = []
        allowed: list[SocketAddress] = []
        for address in await lookup(url):
            objection = refusal(url, parse_address(address[1]))
            if objection is None:
                allowed.append(address)
            else:
                objections.append(objection)
        if not allowed:
            raise refused(url, objections[0] if objections else f"{url.host} has no address")
        return allowed

    return resolve


def guard_functions(lookup: Resolver) -> Resolver:
    """Return `lookup` for functions whose host a stranger's word completes (`function_url=http://{name}:8080`).

    Private addresses pass, since a name within a container network has no other; loopback and what is forbidden do
    not, whatever the name is and whichever server answers for it.  A host that the operator wrote out needs no guard.
    Raises AddressRefused when nothing is left.
    """
    return guard(lookup, _function_refusal, _function_refused)


def _function_refusal(url: Url, address: Address) -> str | None:
    verdict = classify_address(address)
    if verdict.kind is AddressKind.LOOPBACK or verdict.level is Level.FORBIDDEN:
        return f"{address} is {verdict.kind}"
    return None


def _function_refused(url: Url, reason: str) -> AddressRefused:
    return AddressRefused(f"connection to {url.authority} refused: {reason}, where no function of function_url can be")
