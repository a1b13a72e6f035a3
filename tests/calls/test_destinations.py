"""The flow that a callback belongs to: its receiver, whatever way that is spelt."""

from __future__ import annotations

import pytest

from faashound.calls.destinations import destination_of


@pytest.mark.parametrize(
    ("url", "destination"),
    [
        ("http://caller/done", "caller:80"),
        ("https://caller/done?x=1", "caller:443"),
        ("HTTPS://Caller.Example.:8443/", "caller.example:8443"),
        ("http://[2001:DB8::1]/", "[2001:db8::1]:80"),
        ("http://caller?done", "caller:80"),
        ("http://0x7f.1:81/", "127.0.0.1:81"),
        ("http://2130706433/", "127.0.0.1:80"),
        ("http://[2001:db8:0:0::1]/", "[2001:db8::1]:80"),
        ("http://[::ffff:127.0.0.1]/", "127.0.0.1:80"),
        ("http://1.2.3.4.5/", "1.2.3.4.5:80"),
        ("http://user@caller/", ""),
        ("ftp://caller/", ""),
        ("", ""),
    ],
)
def test_destination_of_a_callback_is_its_host_and_port(url: str, destination: str) -> None:
    assert destination_of(url) == destination
