"""addresses.py: what kind of place an address leads to, in every spelling, and what guards let through."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faashound.network.addresses import (
    AddressKind,
    AddressRefused,
    Level,
    classify_address,
    guard_functions,
    own_addresses,
    parse_address,
)
from faashound.watchdog import Address, parse_url

KINDS = {
    "public": ["8.8.8.8", "1.1.1.1", "100.128.0.1", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1", "64:ff9b::7f00:1", "::ffff:127.0.0.1", "2a00::5efe:7f00:1"]
    + ["2a00::200:5efe:7f00:1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd12:3456::1"],
    "private (carrier-grade NAT)": ["100.64.0.1", "100.127.255.255"],
    "private (site-local)": ["fec0::1"],
    "link-local": ["169.254.0.1", "169.254.169.254", "fe80::1", "fe80::1%eth0", "febf::1", "64:ff9b::a9fe:a9fe"],
    "cloud metadata": ["100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254", "fd00:42::42"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "broadcast": ["255.255.255.255"],
    "reserved": ["240.0.0.1", "192.0.0.192", "::7f00:1", "2002:7f00:1::", "2001:0:1::1", "64:ff9b:1::1", "5f00::1"],
}


@pytest.mark.parametrize(
    ("text", "kind"), [pytest.param(text, kind, id=text) for kind, texts in KINDS.items() for text in texts]
)
def test_address_is_classified_by_its_range(text: str, kind: str) -> None:
    assert classify_address(ipaddress.ip_address(text)).kind == kind


@pytest.mark.parametrize("inner", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "0.0.0.0", "8.8.8.8"])
def test_ipv4_mapped_address_is_judged_as_the_ipv4_address(inner: str) -> None:
    mapped = ipaddress.ip_address(f"::ffff:{inner}")
    assert parse_address(str(mapped)) == ipaddress.ip_address(inner)
    assert classify_address(mapped) == classify_address(ipaddress.ip_address(inner))


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@settings(max_examples=500)
@given(addresses)
def test_address_called_public_is_globally_reachable_by_the_standard_library(address: ipaddress.IPv4Address) -> None:
    if classify_address(address).level is Level.PUBLIC:
        assert address.is_global
        assert not address.is_multicast


@settings(max_examples=500)
@given(addresses)
def test_address_of_no_ordinary_kind_is_forbidden(drawn: ipaddress.IPv4Address) -> None:
    address = parse_address(str(drawn))
    odd = address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved
    if odd and not address.is_loopback and address not in ipaddress.ip_network("64:ff9b::/96"):
        assert classify_address(address).level is Level.FORBIDDEN


OWN = frozenset(map(ipaddress.ip_address, ("8.8.8.8", "2606:4700::1111", "10.0.0.1")))


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2a00::5efe:808:808", "2606:4700::1111"]
)
def test_public_address_of_this_machine_counts_as_private_in_every_spelling(text: str) -> None:
    verdict = classify_address(ipaddress.ip_address(text), OWN)
    assert (verdict.kind, verdict.level) == (AddressKind.OWN, Level.PRIVATE)


@pytest.mark.parametrize("text", ["8.8.4.4", "2606:4700::1112"])
def test_neighbour_of_this_machine_stays_public(text: str) -> None:
    assert classify_address(ipaddress.ip_address(text), OWN).kind is AddressKind.PUBLIC


def test_private_address_of_this_machine_stays_private() -> None:
    assert classify_address(ipaddress.ip_address("10.0.0.1"), OWN).kind is AddressKind.PRIVATE


def test_own_addresses_are_those_of_the_interfaces() -> None:
    found = own_addresses()
    assert ipaddress.ip_address("127.0.0.1") in found
    assert all(isinstance(address, ipaddress.IPv4Address | ipaddress.IPv6Address) for address in found)


# --- Functions whose host a stranger completes -----------------------------------------------------------------


def resolve_function(*found: str) -> list[str]:
    async def lookup(_: object) -> Sequence[Address]:
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in found]

    async def run() -> list[str]:
        return [address for _, address in await guard_functions(lookup)(parse_url("http://cat:8080/"))]

    return asyncio.run(run())


NEVER_A_FUNCTION = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.0.0.0", "169.254.169.254", "fe80::1"]
NEVER_A_FUNCTION += ["100.100.100.200", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "224.0.0.1", "240.0.0.1"]


@pytest.mark.parametrize("address", NEVER_A_FUNCTION)
def test_guard_of_functions_refuses_what_no_function_can_be(address: str) -> None:
    with pytest.raises(AddressRefused, match="connection to cat:8080 refused"):
        resolve_function(address)


def test_guard_of_functions_lets_private_and_public_addresses_through_in_their_order() -> None:
    found = resolve_function("10.0.0.1", "127.0.0.1", "fd12::1", "169.254.169.254", "8.8.8.8")
    assert found == ["10.0.0.1", "fd12::1", "8.8.8.8"]


def test_guard_of_functions_refuses_a_name_without_addresses() -> None:
    with pytest.raises(AddressRefused, match="cat has no address"):
        resolve_function()
