"""Names of functions: what they mean, and what no name may be."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.calls.names import BadFunctionName, FunctionName, parse_function_name

ADDRESSES = [
    "2852039166",
    "0177",
    "0x7f000001",
    "0xa9fea9fe",
    "0x",
    "127",
    "127.1",
    "10.0",
    "10.0.0.1",
    "127.0.0.1",
    "localhost",
    "x.localhost",
    "localhost.localdomain",
    "::1",
    "[::1]",
]


@pytest.mark.parametrize(
    ("text", "name", "namespace", "short"),
    [
        ("cat", "cat", "openfaas-fn", "cat"),
        ("cat.openfaas-fn", "cat", "openfaas-fn", "cat"),
        ("cat.prod", "cat", "prod", "cat.prod"),
        ("0xy", "0xy", "openfaas-fn", "0xy"),
        ("7zip", "7zip", "openfaas-fn", "7zip"),
        ("a" * 63, "a" * 63, "openfaas-fn", "a" * 63),
    ],
)
def test_name_is_whole_however_it_was_typed(text: str, name: str, namespace: str, short: str) -> None:
    found = parse_function_name(text)
    assert (found.name, found.namespace, found.short) == (name, namespace, short)
    assert found == f"{name}.{namespace}"


def test_bare_name_takes_the_namespace_that_is_given() -> None:
    assert parse_function_name("cat", "prod") == parse_function_name("cat.prod") == FunctionName("cat.prod")


@pytest.mark.parametrize("text", ADDRESSES)
def test_name_that_could_be_read_as_an_address_is_refused(text: str) -> None:
    with pytest.raises(BadFunctionName, match="allowed"):
        parse_function_name(text)


@pytest.mark.parametrize("text", ["", ".", "cat.", ".prod", "a.b.c", "Cat", "a/b", "a b", "-a", "a-", "a" * 64, "cät"])
def test_what_is_no_label_is_refused(text: str) -> None:
    with pytest.raises(BadFunctionName) as refused:
        parse_function_name(text)
    assert refused.value.status == 404


@given(st.from_regex(r"[0-9a-fx.]{1,20}", fullmatch=True))
def test_no_name_is_an_address_to_the_resolver_either(text: str) -> None:
    try:
        found = parse_function_name(text)
    except BadFunctionName:
        return
    for spelling in (found, found.name, found.namespace):
        with pytest.raises(OSError, match="illegal"):
            socket.inet_aton(spelling)
