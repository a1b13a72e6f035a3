"""callbacks.py: what a callback carries of its call and of the answer, and how it is signed."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from faashound.calls.callbacks import CallFacts, Signer, build_callback_headers, parse_callback_url, parse_secrets
from faashound.watchdog import VERSION, Url

# --- Headers ---------------------------------------------------------------------------------------------------

FACTS = CallFacts("id-1", "echo", 200, 1.5, retries_count=2, max_retries_count=9)
OURS = [
    ("X-Call-Id", "id-1"),
    ("X-Duration-Seconds", "1.500000"),
    ("X-Function-Status", "200"),
    ("X-Function-Name", "echo"),
    ("X-Retry", "2"),
    ("X-Retry-Max", "9"),
    ("User-Agent", f"faashound/{VERSION}"),
]


def test_callback_carries_the_functions_fields_in_order_and_then_ours() -> None:
    response = [("Content-Type", "text/html"), ("X-A", "1"), ("x-a", "2"), ("Content-Encoding", "gzip")]
    assert list(build_callback_headers(FACTS, response)) == response + OURS


@pytest.mark.parametrize(
    "name",
    ["Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length"]
    + ["X-Callback-Url", "X-Delay", "X-Expires", "Idempotency-Key", "X-Timeout"]
    + ["Host", "Expect", "Set-Cookie", "cookie", "AUTHORIZATION", "Proxy-Authenticate", "WWW-Authenticate", "X-Api-Key"]
    + ["x-call-id", "X-FUNCTION-STATUS", "X-Retry", "user-agent", "webhook-id", "Webhook-Signature"]
    + ["X-Callback-Id", "X-Callback-Proof"]
    + ["X-Callback-Url", "X-Delay", "X-Expires", "X-Timeout", "Idempotency-Key", "X-Worker-Token", "Via", "Forwarded"]
    + ["X-Forwarded-For", "X-Forwarded-Host", "Origin", "Sec-Fetch-Site", "Access-Control-Request-Method"],
)
def test_callback_does_not_pass_on(name: str) -> None:
    assert list(build_callback_headers(FACTS, [(name, "evil")])) == OURS


def test_callback_does_not_pass_on_what_connection_names() -> None:
    response = [
        ("X-Hop", "1"),
        ("Connection", "close, X-Hop"),
        ("connection", "X-Two"),
        ("X-Two", "2"),
        ("X-Three", "3"),
    ]
    assert list(build_callback_headers(FACTS, response)) == [("X-Three", "3"), *OURS]


# --- Signatures ------------------------------------------------------------------------------------------------

KEY = bytes(range(24))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
RAW_SECRET = "a raw secret has 24 bytes or more".replace(" ", "-")


RECEIVER = parse_callback_url("https://hooks.example.com/x")


def sign(
    secrets: str, body: Iterable[bytes], call_id: str = "id-1", now_s: float | None = None, url: Url = RECEIVER
) -> dict[str, str]:
    signature = Signer(parse_secrets(secrets)).start(url, call_id, time.time() if now_s is None else now_s)
    if signature is None:
        return {}
    for chunk in body:
        signature.update(chunk)
    return dict(signature.finish())


def test_signature_is_accepted_by_the_reference_implementation() -> None:
    Webhook(SECRET).verify(b'{"a": 1}', sign(SECRET, [b'{"a"', b"", b": 1}"]))


def test_signature_with_a_raw_secret_is_accepted_by_the_reference_implementation() -> None:
    Webhook(RAW_SECRET.encode()).verify(b"", sign(RAW_SECRET, []), json_parse=False)


def test_each_of_several_secrets_signs() -> None:
    headers = sign(f"{SECRET}\n{RAW_SECRET}\n", [b"body"])
    for secret in (SECRET, RAW_SECRET.encode()):
        Webhook(secret).verify(b"body", headers, json_parse=False)


@pytest.mark.parametrize(
    ("change", "later_s", "body"),
    [
        pytest.param({"webhook-id": "id-2"}, 0, b"1", id="id"),
        pytest.param({}, 60, b"1", id="timestamp"),
        pytest.param({}, 0, b"2", id="body"),
    ],
)
def test_signature_is_void_when_anything_signed_is_changed(change: dict[str, str], later_s: int, body: bytes) -> None:
    signed = sign(SECRET, [b"1"])
    changed = signed | {"webhook-timestamp": str(int(signed["webhook-timestamp"]) + later_s)} | change
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(SECRET).verify(body, changed, json_parse=False)


def test_signature_of_the_specifications_example_is_the_published_one() -> None:
    body = b'{"test": 2432232314}'
    headers = sign("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", [body], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.9)
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_signed_id_holds_no_full_stop() -> None:
    assert sign(SECRET, [], "a.1")["webhook-id"] == "a:1"


@given(st.lists(st.binary()))
def test_signature_does_not_depend_on_how_the_body_is_cut(chunks: list[bytes]) -> None:
    assert sign(SECRET, chunks, now_s=1.0) == sign(SECRET, [b"".join(chunks)], now_s=1.0)


OTHER = "whsec_" + base64.b64encode(bytes(25)).decode().rstrip("=")

SECRETS = {
    "whsec": (SECRET, [(KEY, None)]),
    "newline at the end": (SECRET + "\n", [(KEY, None)]),
    "without padding": (OTHER, [(bytes(25), None)]),
    "raw": (RAW_SECRET, [(RAW_SECRET.encode(), None)]),
    "two lines": (f"{RAW_SECRET}\r\n\n {SECRET} ", [(RAW_SECRET.encode(), None), (KEY, None)]),
    "two on a line, as before hosts could be named": (f"{SECRET} {OTHER}", [(KEY, None), (bytes(25), None)]),
    "host": (f"a.example {SECRET}", [(KEY, "a.example")]),
    "host in capitals, tab": (f"A.Example.\t{RAW_SECRET}", [(RAW_SECRET.encode(), "a.example")]),
    "host, two secrets": (f"a.example {SECRET} {OTHER}", [(KEY, "a.example"), (bytes(25), "a.example")]),
    "one for all, one for a host": (f"{SECRET}\n*.example {OTHER}", [(KEY, None), (bytes(25), "*.example")]),
}


@pytest.mark.parametrize(("text", "expected"), SECRETS.values(), ids=SECRETS)
def test_secrets_are_read(text: str, expected: list[tuple[bytes, str | None]]) -> None:
    assert [(each.key, each.host and each.host.pattern) for each in parse_secrets(text)] == expected


SIGNED = {
    "every host": (SECRET, "http://anything:99/", True),
    "host": (f"a.example {SECRET}", "https://A.example:8443/x", True),
    "another host": (f"a.example {SECRET}", "https://b.example/", False),
    "a host that ends alike": (f"a.example {SECRET}", "https://evil-a.example/", False),
    "host and port": (f"a.example:8443 {SECRET}", "https://a.example:8443/", True),
    "another port": (f"a.example:8443 {SECRET}", "https://a.example/", False),
    "pattern": (f"*.example {SECRET}", "https://a.b.example/", True),
    "address": (f"10.0.0.5 {SECRET}", "http://10.0.0.5:99/", True),
    "address in another spelling": (f"10.0.0.5 {SECRET}", "http://0x0a000005/", True),
    "address and another port": (f"10.0.0.5:80 {SECRET}", "http://10.0.0.5:99/", False),
    "IPv6 address and port": (f"[::1]:99 {SECRET}", "http://[::1]:99/", True),
    "second line": (f"a.example {OTHER}\nb.example {SECRET}", "https://b.example/", True),
}


@pytest.mark.parametrize(("text", "url", "is_signed"), SIGNED.values(), ids=SIGNED)
def test_post_is_signed_with_the_secrets_of_its_host_only(text: str, url: str, is_signed: bool) -> None:
    headers = sign(text, [b"body"], url=parse_callback_url(url))
    assert bool(headers) is is_signed
    if is_signed:
        Webhook(SECRET).verify(b"body", headers, json_parse=False)


def test_secret_of_one_host_signs_nothing_for_another() -> None:
    headers = sign(f"a.example {SECRET}\n{OTHER}", [b"body"])
    Webhook(OTHER).verify(b"body", headers, json_parse=False)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(b"body", headers, json_parse=False)


BAD_SECRETS = {
    "nothing": ("", ["holds no secret"]),
    "white space": (" \n", ["holds no secret"]),
    "short": ("hunter2", ["line 1: the secret is 7 bytes long"]),
    "empty": ("whsec_", ["line 1: the secret is 0 bytes long"]),
    "no base64": ("whsec_hunter2!hunter2!hunter2!", ["line 1: the secret is no base64"]),
    "short, for a host": ("a.example hunter2", ["line 1: the secret is 7 bytes long"]),
    "network": (f"10.0.0.0/8 {SECRET}", ["line 1: the first of several words is no host"]),
    "no host": (f"a..b {SECRET}", ["line 1: the first of several words is no host"]),
    "two raw ones on a line": ("hunter2" * 5 + f" {RAW_SECRET}", ["line 1: the first of several words is no host"]),
    "several": (f"hunter2\n\n{SECRET}\na.example hunter2-hunter2", ["line 1: ", "line 4: the secret is 15 bytes"]),
}


@pytest.mark.parametrize(("text", "told"), BAD_SECRETS.values(), ids=BAD_SECRETS)
def test_bad_secrets_are_refused_together_by_line_without_being_told(text: str, told: list[str]) -> None:
    with pytest.raises(ValueError, match=r"allowed|base64") as caught:
        parse_secrets(text)
    assert all(part in str(caught.value) for part in told)
    assert "hunter2" not in str(caught.value)


def test_signer_keeps_its_keys_out_of_its_repr() -> None:
    assert "AAEC" not in repr(Signer(parse_secrets(SECRET))) + repr(parse_secrets(SECRET))
