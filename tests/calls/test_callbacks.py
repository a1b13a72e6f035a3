"""callbacks.py: where a callback may go: addresses in every spelling, and what the operator may open."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faashound.calls.callbacks import (
    CallbackPolicy,
    CallbackRefused,
    build_policy,
    parse_callback_allow,
    parse_callback_url,
)
from faashound.watchdog import Client, Resolver, Url, resolve_any

GATEWAY_URL = "http://127.0.0.1:8080"


def policy(allow: str = "", gateway_url: str = GATEWAY_URL) -> CallbackPolicy:
    return build_policy([gateway_url], parse_callback_allow(allow))


def resolve(rules: CallbackPolicy, url: str, *addresses: str) -> list[str]:
    """Return what `rules` let a callback to `url` connect to when its host resolves to `addresses`."""

    async def lookup(url: Url) -> list[tuple[socket.AddressFamily, str]]:
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in addresses]

    found = asyncio.run(resolve_with(rules.guard(lookup), rules.check_url(url)))
    assert all(family is (socket.AF_INET6 if ":" in address else socket.AF_INET) for family, address in found)
    return [address for _, address in found]


async def resolve_with(resolver: Resolver, url: Url) -> Sequence[tuple[socket.AddressFamily, str]]:
    return await resolver(url)


def spell(url: Url | None) -> str:
    assert url is not None
    return f"{url.scheme}://{url.authority}{url.target}"


# --- URLs ------------------------------------------------------------------------------------------------------

URLS = {
    "plain": ("http://example.com/a/b?c=d", "http://example.com/a/b?c=d"),
    "no path": ("https://example.com", "https://example.com/"),
    "query without path": ("http://example.com?x=1", "http://example.com/?x=1"),
    "fragment is dropped": ("http://example.com/a#b", "http://example.com/a"),
    "case of scheme and host": ("HTTP://EXAMPLE.com/Path", "http://example.com/Path"),
    "trailing dot": ("http://example.com./", "http://example.com/"),
    "default port": ("https://example.com:443/", "https://example.com/"),
    "other port": ("https://example.com:80/", "https://example.com:80/"),
    "empty port": ("http://example.com:/", "http://example.com/"),
    "underscore": ("http://my_service:9000/", "http://my_service:9000/"),
    "punycode": ("http://xn--mnchen-3ya.de/", "http://xn--mnchen-3ya.de/"),
    "ipv6": ("http://[2606:4700:0:0::1111]:8080/", "http://[2606:4700::1111]:8080/"),
    "at sign in the path": ("http://example.com/@user", "http://example.com/@user"),
    "digits first": ("http://1password.com/", "http://1password.com/"),
}


@pytest.mark.parametrize(("text", "canonical"), URLS.values(), ids=URLS)
def test_parser_gives_each_url_its_one_spelling(text: str, canonical: str) -> None:
    assert spell(parse_callback_url(text)) == canonical
    assert parse_callback_url(canonical) == parse_callback_url(text)


NO_URLS = {
    "empty": "",
    "relative": "/path",
    "no scheme": "example.com/path",
    "ftp": "ftp://example.com/",
    "file": "file:///etc/passwd",
    "no host": "http:///path",
    "no slashes": "http:example.com",
    "user": "http://user@example.com/",
    "user and password": "http://user:secret@example.com/",
    "backslash before host": "http:\\\\example.com/",
    "backslash and at sign": "http://example.com\\@127.0.0.1/",
    "space": "http://example.com/a b",
    "leading space": " http://example.com/",
    "newline at the end": "http://example.com/\n",
    "newline": "http://example.com/\r\nHost: evil",
    "tab in host": "http://exa\tmple.com/",
    "NUL": "http://example.com/\0",
    "percent in host": "http://%31%32%37.0.0.1/",
    "not ASCII": "http://m\u00fcnchen.de/",
    "circled digits": "http://\u2460\u2461\u2466.0.0.1/",
    "fullwidth digits": "http://\uff11\uff12\uff17.0.0.1/",
    "ideographic full stop": "http://127\u30020\u30020\u30021/",
    "kelvin sign for k": "http://\u212aelvin.com/",
    "port 0": "http://example.com:0/",
    "port too large": "http://example.com:65536/",
    "port negative": "http://example.com:-1/",
    "port in Arabic digits": "http://example.com:\u0668\u0660/",
    "two ports": "http://example.com:80:80/",
    "empty label": "http://a..b/",
    "only a dot": "http://./",
    "label of 64 characters": f"http://{'a' * 64}.com/",
    "host of 254 characters": f"http://{'a.' * 126}aa/",
    "five parts": "http://1.2.3.4.5/",
    "last part too large": "http://1.2.3.256/",
    "inner part too large": "http://1.256.3.4/",
    "number too large": "http://4294967296/",
    "no octal": "http://0189.0.0.1/",
    "numeric top-level label": "http://example.1/",
    "two trailing dots": "http://127.0.0.1../",
    "unmatched bracket": "http://[::1/",
    "zone": "http://[fe80::1%25eth0]/",
    "brackets around IPv4": "http://[127.0.0.1]/",
    "IPvFuture": "http://[v1.a]/",
    "too long": f"http://example.com/{'a' * 2048}",
}


@pytest.mark.parametrize("text", NO_URLS.values(), ids=NO_URLS)
def test_parser_refuses_what_is_no_plain_http_url(text: str) -> None:
    with pytest.raises(CallbackRefused) as caught:
        parse_callback_url(text)
    assert caught.value.status == 400


def test_refusal_does_not_repeat_credentials_of_the_url() -> None:
    with pytest.raises(CallbackRefused, match=r"example\.com") as caught:
        parse_callback_url("http://user:hunter2@example.com/?token=hunter2")
    assert "hunter2" not in str(caught.value)


@given(st.text())
def test_parser_raises_nothing_but_refusals(text: str) -> None:
    for url in (text, f"http://{text}", f"http://example.com{text}", f"http://[{text}]/"):
        with contextlib.suppress(CallbackRefused):
            parse_callback_url(url)


@settings(max_examples=300)
@given(st.text("0123456789abcdefx.", min_size=1, max_size=20))
def test_parser_and_c_library_agree_on_what_is_a_number(host: str) -> None:
    try:
        expected = socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return
    with contextlib.suppress(CallbackRefused):  # stricter is safe; to take it for a name or another address is not
        assert parse_callback_url(f"http://{host}/").host == expected


ipv4_addresses = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)


def spellings(address: ipaddress.IPv4Address) -> st.SearchStrategy[str]:
    """Draw one of the ways in which the C library lets `address` be written."""
    number = st.sampled_from(["{:d}", "0{:o}", "00{:o}", "0x{:x}", "0X{:X}", "0x00{:x}"])

    def write(forms: list[str], parts_count: int) -> str:
        first, rest = list(address.packed[: parts_count - 1]), address.packed[parts_count - 1 :]
        values = [*first, int.from_bytes(rest)]
        return ".".join(form.format(value) for form, value in zip(forms, values, strict=False))

    return st.builds(write, st.lists(number, min_size=4, max_size=4), st.integers(1, 4))


@settings(max_examples=300)
@given(ipv4_addresses.flatmap(lambda address: st.tuples(st.just(address), spellings(address))), st.booleans())
def test_every_spelling_of_an_address_is_that_address(
    drawn: tuple[ipaddress.IPv4Address, str], trailing_dot: bool
) -> None:
    address, spelling = drawn
    assert socket.inet_aton(spelling) == address.packed
    assert parse_callback_url(f"http://{spelling}{'.' * trailing_dot}/").host == str(address)


# --- The policy ------------------------------------------------------------------------------------------------

REFUSED_BY_DEFAULT = {
    "decimal": "http://2130706433/",
    "octal": "http://0177.0.0.1/",
    "hexadecimal": "http://0x7f000001/",
    "short": "http://127.1/",
    "trailing dot": "http://127.0.0.1./",
    "zero": "http://0/",
    "mapped": "http://[::ffff:127.0.0.1]/",
    "mapped in hexadecimal": "http://[::ffff:7f00:1]/",
    "compatible": "http://[::127.0.0.1]/",
    "NAT64": "http://[64:ff9b::127.0.0.1]/",
    "6to4": "http://[2002:7f00:1::]/",
    "IPv6 loopback": "http://[0:0:0:0:0:0:0:1]/",
    "IPv6 unspecified": "http://[::]/",
    "localhost": "http://localhost/",
    "localhost with a dot": "http://LOCALHOST./",
    "below localhost": "http://a.localhost/",
    "private": "http://192.168.1.1/",
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "metadata in decimal": "http://2852039166/",
    "metadata mapped": "http://[::ffff:a9fe:a9fe]/",
    "metadata IPv6": "http://[fd00:ec2::254]/",
    "the gateway's address at another port": "http://127.0.0.1:8081/",
    "the gateway over another scheme's port": "https://127.0.0.1/function/a",
}


@pytest.mark.parametrize("url", REFUSED_BY_DEFAULT.values(), ids=REFUSED_BY_DEFAULT)
def test_policy_refuses_inner_addresses_at_submission(url: str) -> None:
    with pytest.raises(CallbackRefused, match="callback_allow"):
        policy().check_url(url)


def test_refusal_names_address_reason_and_setting() -> None:
    with pytest.raises(CallbackRefused) as caught:
        policy().check_url("http://2130706433:9/x")
    assert str(caught.value) == ("callback to 127.0.0.1:9 refused: 127.0.0.1 is loopback; callback_allow can permit it")


@pytest.mark.parametrize("url", ["http://example.com/", "https://8.8.8.8:8443/x", "http://[2606:4700::1111]/"])
def test_policy_passes_public_addresses(url: str) -> None:
    assert policy().check_url(url) == parse_callback_url(url)


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "localhost", "[::ffff:127.0.0.1]"])
def test_policy_passes_the_gateway_in_each_of_its_names(host: str) -> None:
    assert policy().check_url(f"http://{host}:8080/function/notify").port == 8080


@pytest.mark.parametrize(
    ("gateway_url", "url", "found"),
    [
        ("http://127.0.0.1:8080", "http://localhost:8080/function/a", "::1"),
        ("http://127.0.0.1:8080", "http://[::1]:8080/function/a", "::1"),
        ("http://[::1]:8080", "http://127.0.0.1:8080/function/a", "127.0.0.1"),
        ("http://127.0.0.1:8080", "http://127.0.0.2:8080/function/a", "127.0.0.2"),
    ],
)
def test_address_of_loopback_is_the_gateways_only_if_it_listens_there(gateway_url: str, url: str, found: str) -> None:
    with pytest.raises(CallbackRefused, match="is loopback; callback_allow can permit it"):
        resolve(policy(gateway_url=gateway_url), url, found)


def test_policy_leaves_the_gateways_own_address_of_localhost() -> None:
    assert resolve(policy(), "http://localhost:8080/function/a", "::1", "127.0.0.1") == ["127.0.0.1"]


@pytest.mark.parametrize("area", ["function", "async-function"])
def test_policy_passes_functions_of_the_gateway(area: str) -> None:
    for path in (f"/{area}/notify", f"/{area}/notify.prod/a/b?c=/../d", f"/{area}/notify/..a/b.."):
        assert policy().check_url(f"http://127.0.0.1:8080{path}").target == path
    assert policy(gateway_url="http://gw/under/it/").check_url(f"http://gw/under/it/{area}/notify")


ELSEWHERE_AT_THE_GATEWAY = {
    "retry of a dead letter": "/system/calls/0192/retry",
    "root": "/",
    "no path": "",
    "health": "/healthz",
    "function without a name's slash": "/function",
    "another case": "/FUNCTION/a",
    "two slashes": "//system/calls",
    "dots": "/function/../system/calls",
    "dots at the end": "/function/a/..",
    "encoded dots": "/function/%2e%2E/system/calls",
    "dots that are encoded twice": "/function/%252e%252e/system/calls",
    "dots that are encoded three times": "/function/%25252e%25252e/system/calls",
    "dots with a parameter": "/function/a/..;x/..;/system/calls",
    "encoded slash": "/function/..%2fsystem/calls",
    "backslash": "/function/..%5csystem/calls",
}


@pytest.mark.parametrize("path", ELSEWHERE_AT_THE_GATEWAY.values(), ids=ELSEWHERE_AT_THE_GATEWAY)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.9", "8.8.8.8"])
@pytest.mark.parametrize("allow", ["", "*, 127.0.0.0/8, 8.8.8.8"])
def test_policy_lets_callbacks_reach_nothing_but_functions_at_the_gateway(path: str, host: str, allow: str) -> None:
    rules = replace(policy(allow), own=lambda: (ipaddress.ip_address("8.8.8.8"),))
    with pytest.raises(CallbackRefused, match="it is the gateway; allowed there: /function/ and /async-function/"):
        rules.check_url(f"http://{host}:8080{path}")


@pytest.mark.parametrize(
    ("gateway_url", "gateway_address", "found"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1", "127.0.0.1"),
        ("http://127.0.0.1:8080", "127.0.0.1", "127.0.0.2"),
        ("http://127.0.0.1:8080", "127.0.0.1", "::1"),
        ("http://gateway:8080", "10.1.2.3", "10.1.2.3"),
        ("http://gateway:8080", "10.1.2.3", "::ffff:10.1.2.3"),
    ],
)
def test_policy_refuses_the_gateway_under_another_name_whatever_is_allowed(
    gateway_url: str, gateway_address: str, found: str
) -> None:
    names = {"evil.example": found, parse_callback_url(gateway_url).host: gateway_address}

    async def lookup(url: Url) -> list[tuple[socket.AddressFamily, str]]:
        return [(socket.AF_INET, names[url.host])]

    rules = policy("*, 127.0.0.0/8, ::1, 10.0.0.0/8", gateway_url)
    url = rules.check_url("http://evil.example:8080/system/calls")
    with pytest.raises(CallbackRefused, match="is the gateway; allowed: its own name"):
        asyncio.run(resolve_with(rules.guard(lookup), url))


def test_policy_passes_functions_of_the_gateway_under_a_name_that_is_allowed_in_full() -> None:
    rules = policy("web", "http://127.0.0.1:8080")
    names = {"web": "127.0.0.1", "127.0.0.1": "127.0.0.1"}

    async def lookup(url: Url) -> list[tuple[socket.AddressFamily, str]]:
        return [(socket.AF_INET, names[url.host])]

    url = rules.check_url("http://web:8080/function/notify")
    assert asyncio.run(resolve_with(rules.guard(lookup), url)) == [(socket.AF_INET, "127.0.0.1")]
    with pytest.raises(CallbackRefused, match="is the gateway; allowed"):
        asyncio.run(resolve_with(rules.guard(lookup), rules.check_url("http://web:8080/system/calls")))


def test_policy_passes_the_gateway_by_name_whatever_private_address_it_has() -> None:
    rules = policy(gateway_url="http://gateway:8080")
    assert resolve(rules, "http://gateway:8080/function/notify", "10.1.2.3") == ["10.1.2.3"]
    with pytest.raises(CallbackRefused, match=r"10\.1\.2\.3 is private"):
        resolve(rules, "http://gateway:8081/", "10.1.2.3")
    with pytest.raises(CallbackRefused, match="link-local"):
        resolve(rules, "http://gateway:8080/function/notify", "169.254.169.254")


ALLOWED = {
    "address": ("10.0.0.5", "http://10.0.0.5:99/", "10.0.0.5"),
    "address and port": ("127.0.0.1:9000", "http://127.1:9000/", "127.0.0.1"),
    "address, of a name": ("10.0.0.5", "http://inner/", "10.0.0.5"),
    "address in another spelling": ("0x0a000005", "http://10.0.0.5/", "10.0.0.5"),
    "IPv6 address": ("::1", "http://[::1]:99/", "::1"),
    "IPv6 address and port": ("[::1]:9000", "http://[::1]:9000/", "::1"),
    "network": ("10.0.0.0/8", "http://inner/", "10.200.0.1"),
    "IPv6 network": ("fd00::/8", "http://inner/", "fd00::7"),
    "mapped": ("10.0.0.0/8", "http://inner/", "::ffff:10.0.0.1"),
    "host": ("inner", "http://inner:99/", "10.0.0.1"),
    "host in capitals": ("Inner.", "http://INNER/", "10.0.0.1"),
    "host and port": ("hooks.internal:8443", "https://hooks.internal:8443/", "10.0.0.1"),
    "wildcard": ("*.example.com", "http://a.b.example.com/", "10.0.0.1"),
    "wildcard and port": ("*.example.com:81", "http://a.example.com:81/", "10.0.0.1"),
    "anything": ("*", "http://inner/", "192.168.0.1"),
    "localhost": ("localhost", "http://localhost:99/", "127.0.0.1"),
    "localhost by network": ("127.0.0.0/8", "http://localhost:99/", "127.0.0.1"),
    "second of two": ("a.example, inner", "http://inner/", "10.0.0.1"),
    "wide network opens private": ("0.0.0.0/0", "http://inner/", "10.0.0.1"),
    "link-local network": ("169.254.0.0/16", "http://inner/", "169.254.169.254"),
    "metadata address": ("169.254.169.254", "http://169.254.169.254/", "169.254.169.254"),
    "metadata inside a private network": ("fd00:ec2::254", "http://inner/", "fd00:ec2::254"),
}


@pytest.mark.parametrize(("allow", "url", "address"), ALLOWED.values(), ids=ALLOWED)
def test_callback_allow_opens(allow: str, url: str, address: str) -> None:
    assert resolve(policy(allow), url, address) == [address]


NOT_ALLOWED = {
    "another port": ("inner:8443", "http://inner/", "10.0.0.1"),
    "another port of the address": ("127.0.0.1:9000", "http://127.0.0.1:9001/", "127.0.0.1"),
    "the wildcard's own domain": ("*.example.com", "http://example.com/", "10.0.0.1"),
    "a domain that ends alike": ("*.example.com", "http://badexample.com/", "10.0.0.1"),
    "a name that begins alike": ("inner", "http://inner.evil.com/", "10.0.0.1"),
    "another network": ("10.0.0.0/8", "http://inner/", "192.168.0.1"),
    "host pattern for link-local": ("*", "http://inner/", "169.254.169.254"),
    "host pattern for metadata": ("inner", "http://inner/", "100.100.100.200"),
    "wide network for metadata": ("0.0.0.0/0", "http://inner/", "169.254.169.254"),
    "private network for the metadata in it": ("fd00::/8", "http://inner/", "fd00:ec2::254"),
    "wide network for multicast": ("0.0.0.0/0", "http://inner/", "224.0.0.1"),
    "IPv6 network for NAT64 of loopback": ("64:ff9b::/96", "http://inner/", "64:ff9b::a9fe:a9fe"),
}


@pytest.mark.parametrize(("allow", "url", "address"), NOT_ALLOWED.values(), ids=NOT_ALLOWED)
def test_callback_allow_does_not_open(allow: str, url: str, address: str) -> None:
    with pytest.raises(CallbackRefused, match="callback_allow"):
        resolve(policy(allow), url, address)


def test_policy_connects_only_to_the_allowed_ones_of_a_names_addresses() -> None:
    assert resolve(policy(), "http://example.com/", "10.0.0.1", "8.8.8.8", "::1", "1.1.1.1") == ["8.8.8.8", "1.1.1.1"]


def test_policy_refuses_a_name_that_is_rebound_after_submission() -> None:
    rules = policy()
    rules.check_url("http://rebind.example/")
    with pytest.raises(CallbackRefused, match=r"127\.0\.0\.1 is loopback"):
        resolve(rules, "http://rebind.example/", "127.0.0.1")


def test_policy_refuses_a_public_address_of_this_machine_until_it_is_allowed() -> None:
    own = (ipaddress.ip_address("8.8.8.8"),)
    with pytest.raises(CallbackRefused, match=r"8\.8\.8\.8 is this machine's own; callback_allow can permit it"):
        resolve(replace(policy(), own=lambda: own), "http://example.com/", "8.8.8.8")
    with pytest.raises(CallbackRefused, match="this machine's own"):
        replace(policy(), own=lambda: own).check_url("http://[::ffff:808:808]/")
    allowed = replace(policy("8.8.8.8"), own=lambda: own)
    assert resolve(allowed, "http://example.com/", "8.8.8.8") == ["8.8.8.8"]


def test_policy_refuses_a_name_without_addresses() -> None:
    with pytest.raises(CallbackRefused, match="has no address"):
        resolve(policy(), "http://example.com/")


@pytest.mark.parametrize(
    ("url", "written_out"),
    [
        ("http://gateway:9/", True),
        ("http://hooks.internal/", True),
        ("http://a.example.com/", False),
        ("http://other/", False),
    ],
)
def test_policy_knows_the_names_that_the_operator_wrote(url: str, written_out: bool) -> None:
    rules = policy("hooks.internal, *.example.com, 10.0.0.0/8", "http://gateway:8080")
    assert rules.is_written_out(parse_callback_url(url)) is written_out


def test_policy_passes_a_literal_address_through_the_systems_resolver() -> None:
    found = asyncio.run(resolve_with(policy().guard(resolve_any), parse_callback_url("http://8.8.8.8/")))
    assert found == [(socket.AF_INET, "8.8.8.8")]


def test_client_of_callbacks_does_not_connect_where_the_policy_refuses() -> None:
    async def post(port: int) -> None:
        client = Client(policy().guard(resolve_any))
        await client.request("POST", parse_callback_url(f"http://localhost:{port}/"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(CallbackRefused, match="loopback"):
            asyncio.run(post(listener.getsockname()[1]))
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_only_refuses_public_addresses_that_are_not_listed() -> None:
    rules = policy("only, *.example.com, 9.9.9.0/24")
    assert resolve(rules, "http://a.example.com/", "8.8.8.8") == ["8.8.8.8"]
    assert resolve(rules, "http://other/", "9.9.9.9") == ["9.9.9.9"]
    assert rules.check_url("http://127.0.0.1:8080/function/notify").port == 8080
    with pytest.raises(CallbackRefused, match=r"8\.8\.8\.8 is not in callback_allow"):
        resolve(rules, "http://other/", "8.8.8.8")


def test_only_refuses_an_unlisted_name_at_submission_when_no_network_could_let_it_in() -> None:
    with pytest.raises(CallbackRefused, match="other is not in callback_allow"):
        policy("only,*.example.com").check_url("http://other/")
    assert policy("only,9.9.9.0/24").check_url("http://other/").host == "other"


@pytest.mark.parametrize(
    "text",
    [
        "a b",
        "http://a",
        "a/b",
        "10.0.0.0/33",
        "10.0.0.1/8",
        "a:0",
        "a:65536",
        "a:b",
        "*.*",
        "a*",
        "*a.b",
        "[::1",
        "1.2.3.4.5",
    ]
    + ["::1/129", "user@a", "*.", "a..b", "[a]:1", "*.1"],
)
def test_callback_allow_names_the_entry_it_cannot_read(text: str) -> None:
    with pytest.raises(ValueError, match="allowed, separated by commas") as caught:
        parse_callback_allow(f"example.com,{text}")
    assert repr(text) in str(caught.value)


# --- Redirects -------------------------------------------------------------------------------------------------

BASE = parse_callback_url("https://example.com/a/b?c")


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/x", "https://example.com/x"),
        ("x?y", "https://example.com/a/x?y"),
        ("//other.com/x", "https://other.com/x"),
        ("https://other.com", "https://other.com/"),
    ],
)
def test_redirect_that_keeps_the_method_is_followed(status: int, location: str, target: str) -> None:
    assert spell(policy().check_redirect(BASE, status, location)) == target


@pytest.mark.parametrize("status", [200, 300, 301, 302, 303, 304, 305, 306, 309])
def test_other_redirects_are_not_followed(status: int) -> None:
    assert policy().check_redirect(BASE, status, "https://other.com/") is None


def test_redirect_without_location_is_not_followed() -> None:
    assert policy().check_redirect(BASE, 307, None) is None


@pytest.mark.parametrize(
    "location",
    ["https://127.1/", "//[::ffff:a9fe:a9fe]/", "file:///etc/passwd", "http://example.com/", "https://[", "//a@b/"],
)
def test_redirect_to_a_refused_address_is_refused(location: str) -> None:
    with pytest.raises(CallbackRefused):
        policy().check_redirect(BASE, 308, location)
