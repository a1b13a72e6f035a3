"""Where the result of a call may be posted, what the post carries, and how it is signed.

A callback address is a stranger's word: a caller who may submit a call names a URL that a machine inside the network
will post to.  So each address is judged by what it is (network/addresses.py):

    public                          allowed, unless `callback_allow` says `only`
    loopback, private, our own      refused, unless the host is the gateway's or callback_allow covers host or address
    the gateway itself              by its own name or address only, and there /function/ and /async-function/ only,
                                    whatever callback_allow says: its /system believes that who asks is inside
    link-local, cloud metadata,     refused; only a network of callback_allow that lies wholly inside the refused range
    multicast, unspecified,         opens it.  A host pattern does not (the owner of that name's DNS would decide), nor
    reserved                        does a wide network such as 0.0.0.0/0 (which is not meant for the metadata service)

The order of use, and the caller's obligations:

    url = policy.check_url(text)                        at submission, and again before each post
    client = Client(policy.guard(lookup))               for callbacks alone: it connects to checked addresses, without
                                                        a second look-up (rebinding), and keeps its connections apart
    url = policy.check_redirect(url, status, location)  then post again

Nothing else may parse the URL: a second parser that reads it differently is how such checks are got round.  (The queues
read its receiver by `destination_of`, for taking turns, and decide nothing about an address.)

Signatures are those of Standard Webhooks (https://www.standardwebhooks.com).  Everything here is pure, but for what it
is given: the resolver of `guard` reaches the network, and `own_addresses` asks the kernel.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import ClassVar
from urllib.parse import urljoin

from ..network.addresses import (
    Address,
    Level,
    Network,
    Verdict,
    classify_address,
    guard,
    own_addresses,
    parse_address,
    parse_host_name,
    parse_literal,
    parse_numeric_host,
)
from ..watchdog import SECRET_FIELDS, VERSION, FaashoundError, Resolver, Url, end_to_end, has_dot_segments
from ..watchdog import Address as SocketAddress
from .model import HISTORY_COUNT, Call, Headers

MAX_URL_CHARS = 2048


MAX_REDIRECTS_COUNT = 3  # a moved endpoint takes one or two; more is a loop


class CallbackRefused(FaashoundError):
    """The callback's address is malformed or not permitted; the text names it, the reason and the remedy."""

    status: ClassVar[int] = 400


# ---------------------------------------------------------------------------------------------------------------
# URLs: one strict grammar.  A host that could be read as a number is a number; whatever is neither name nor address is
# refused.
# ---------------------------------------------------------------------------------------------------------------

_URL = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<ipv6>[0-9a-f]*:[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::(?P<port>[0-9]{0,5}))?"
    r"(?P<target>[/?][^#]*)?(?:#.*)?",
    re.IGNORECASE | re.ASCII,
)


_DEFAULT_PORTS = {"http": 80, "https": 443}


def parse_callback_url(text: str) -> Url:
    """Return the parts of a callback URL in its one spelling; it says nothing about whether one may post there.

    The host is in lower case without trailing dot, or the address that it spells.

    Raises CallbackRefused for anything but an absolute http or https URL of visible ASCII, at most 2048 characters,
    with a host, without a user name, with a port from 1 to 65535.  A fragment is dropped: it is never sent.
    """
    if len(text) > MAX_URL_CHARS:
        raise CallbackRefused(f"callback URL refused: {len(text)} characters; allowed: at most {MAX_URL_CHARS}")
    match = _URL.fullmatch(text)
    if not match or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise CallbackRefused(
            f"callback to {_shown_host(text)!r} refused; allowed: http://HOST[:PORT]/PATH or https://..., in visible"
            " ASCII (an international host name in its xn-- form), without user name and password"
        )
    scheme, target = match["scheme"].lower(), match["target"] or "/"
    port = int(match["port"] or _DEFAULT_PORTS[scheme])
    try:
        if not 1 <= port <= 65535:
            raise ValueError(f"port {port}; allowed: 1 to 65535")
        address = parse_address(match["ipv6"]) if match["ipv6"] else parse_numeric_host(match["name"])
        host = str(address) if address else parse_host_name(match["name"])
    except ValueError as error:
        raise CallbackRefused(f"callback to {_shown_host(text)!r} refused: {error}") from None
    return Url(scheme, host, port, target if target.startswith("/") else f"/{target}")


def _shown_host(text: str) -> str:
    """Return the host of a URL for an error text: user, path and query may be secrets, and end up in logs."""
    return re.split(r"[/?#\\]", text.partition("://")[2] or text)[0].rpartition("@")[2][:100]


# ---------------------------------------------------------------------------------------------------------------
# The setting callback_allow.
# ---------------------------------------------------------------------------------------------------------------

CALLBACK_ALLOW_HELP = (
    'allowed, separated by commas: host names ("hooks.internal", "*.example.com", each with an optional ":PORT"),'
    ' addresses ("10.0.0.5", "[::1]:9000"), networks ("10.0.0.0/8", "fd00::/8"),'
    ' and the word "only" to refuse whatever is not listed'
)


@dataclass(frozen=True, slots=True)
class AllowEntry:
    """One entry of callback_allow: a host pattern or a network, and the port if only one is meant."""

    pattern: str | None
    network: Network | None
    port: int | None = None

    def names(self, host: str, port: int) -> bool:
        """Tell whether this is a host pattern that `host` and `port` match; `*.a.b` is any name below a.b."""
        if self.pattern is None or self.port not in (None, port):
            return False
        return self.pattern == "*" or (
            host.endswith(self.pattern[1:]) if self.pattern.startswith("*.") else host == self.pattern
        )

    def opens(self, address: Address, port: int, verdict: Verdict) -> bool:
        """Tell whether this is a network that has `address` in it and is specific enough to open `verdict`."""
        if self.network is None or self.port not in (None, port) or address not in self.network:
            return False
        return verdict.level < Level.FORBIDDEN or _lies_inside(self.network, verdict.network)


def _lies_inside(inner: Network, outer: Network) -> bool:
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)


@dataclass(frozen=True, slots=True)
class CallbackAllow:
    """The operator's word on callback addresses: what is opened and, with `only`, that all else is shut."""

    entries: tuple[AllowEntry, ...] = ()
    only: bool = False


def parse_callback_allow(text: str) -> CallbackAllow:
    """Return the entries of the setting callback_allow; ValueError names the bad entry and says what is allowed."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    entries = tuple(_parse_allow_entry(word) for word in words if word != "only")
    return CallbackAllow(entries, only="only" in words)


def _parse_allow_entry(word: str) -> AllowEntry:
    try:
        if "/" in word or (word.count(":") > 1 and not word.startswith("[")):
            return AllowEntry(None, ip_network(word))
        match = re.fullmatch(r"(?:\[(?P<ipv6>[^\]]+)\]|(?P<host>[^:]+))(?::(?P<port>[0-9]{1,5}))?", word, re.ASCII)
        port = int(match["port"]) if match and match["port"] else None
        if not match or (port is not None and not 1 <= port <= 65535):
            raise ValueError("no host with an optional port")
        address = parse_address(match["ipv6"]) if match["ipv6"] else parse_numeric_host(match["host"])
        if address:
            return AllowEntry(None, ip_network(address), port)
        wildcard = "*." if match["host"].startswith("*.") else ""
        name = match["host"].removeprefix(wildcard)
        return AllowEntry("*" if name == "*" and not wildcard else wildcard + parse_host_name(name), None, port)
    except ValueError as error:
        raise ValueError(f"{word!r}: {error}; {CALLBACK_ALLOW_HELP}") from None


# ---------------------------------------------------------------------------------------------------------------
# The policy.
# ---------------------------------------------------------------------------------------------------------------

_LOOPBACK = (IPv4Address("127.0.0.1"), IPv6Address("::1"))


@dataclass(frozen=True, slots=True)
class CallbackPolicy:
    """Decides where callbacks may go; see the head of this module.  Made by `build_policy`."""

    gateways: tuple[Url, ...]
    allow: CallbackAllow = CallbackAllow()
    own: Callable[[], Collection[Address]] = own_addresses

    def check_url(self, text: str) -> Url:
        """Return the parsed URL if nothing that can be known without a look-up speaks against it.

        Addresses are judged in every spelling, of names `localhost` and those below it (RFC 6761: always loopback).
        Raises CallbackRefused.  Passing here permits nothing yet: what `guard` returns does, at the time of the post.
        """
        url = parse_callback_url(text)
        gateway = self._gateway_of(url)
        if gateway is not None and not _is_function_path(url.target, gateway.target):
            raise CallbackRefused(
                _refusal_text(url, "it is the gateway; allowed there: /function/ and /async-function/")
            )
        literal = parse_literal(url.host)
        if literal is not None:
            self._check_known(url, literal)
        elif f".{url.host}".endswith(".localhost"):
            self._check_known(url, *_LOOPBACK)
        elif (
            self.allow.only
            and gateway is None
            and not self._is_listed(url)
            and not any(entry.network for entry in self.allow.entries)
        ):
            raise CallbackRefused(_refusal_text(url, f"{url.host} is not in callback_allow"))
        return url

    def is_written_out(self, url: Url) -> bool:
        """Tell whether the operator wrote the host's name: then it does not share its look-up with strangers' names."""
        return any(gateway.host == url.host for gateway in self.gateways) or any(
            entry.pattern == url.host for entry in self.allow.entries
        )

    def guard(self, lookup: Resolver) -> Resolver:
        """Return a resolver for the client of callbacks: what `lookup` finds, as far as one may connect to it.

        It raises CallbackRefused when nothing is left, and whatever `lookup` raises.  A name that leads to the gateway,
        and is not the gateway's, is refused: its path cannot be judged each time, since connections are kept by name.
        One that the operator wrote into callback_allow may reach functions: the gateway, which knows a callback by its
        proof, lets it reach nothing else on a connection that was kept.
        """

        async def resolve(url: Url) -> Sequence[SocketAddress]:
            permitted = self.is_written_out(url) and any(
                _is_function_path(url.target, gateway.target) for gateway in self.gateways
            )
            disguised = set() if permitted else await self._find_gateways(url, lookup)

            def refusal(url: Url, address: Address) -> str | None:
                if address in disguised or (
                    disguised and self._is_here(address) and any(map(self._is_here, disguised))
                ):
                    return (
                        f"{address} is the gateway; allowed: its own name, {self.gateways[0].authority}, or one that"
                        " callback_allow has in full, and functions there"
                    )
                return self._refusal(url, address)

            return await guard(lookup, refusal, lambda url, reason: CallbackRefused(_refusal_text(url, reason)))(url)

        return resolve

    async def _find_gateways(self, url: Url, lookup: Resolver) -> set[Address]:
        """Return the addresses of gateways that have the port of `url`, but not its name."""
        found: set[Address] = set()
        if self._gateway_of(url) is None:
            for gateway in self.gateways:
                if gateway.port == url.port:
                    found.update(parse_address(address) for _, address in await lookup(gateway))
        return found

    def _gateway_of(self, url: Url) -> Url | None:
        """Return the gateway that `url` names, by its name or, if it is on this machine, by any address of that."""
        literal = parse_literal(url.host)
        for gateway in self.gateways:
            known = parse_literal(gateway.host)
            is_same = url.host == gateway.host or (
                known is not None
                and self._is_here(known)
                and (url.host == "localhost" or (literal is not None and self._is_here(literal)))
            )
            if url.port == gateway.port and is_same:
                return gateway
        return None

    def _is_here(self, address: Address) -> bool:
        return address.is_loopback or address in self.own()

    def _is_gateway(self, url: Url, address: Address) -> bool:
        """Tell whether the gateway listens at `address`, as far as is known: on loopback only where it was said to."""
        gateway = self._gateway_of(url)
        return gateway is not None and parse_literal(gateway.host) in (None, address)

    def _check_known(self, url: Url, *addresses: Address) -> None:
        reasons = [self._refusal(url, address) for address in addresses]
        if all(reasons):
            raise CallbackRefused(_refusal_text(url, str(reasons[0])))

    def check_redirect(self, base: Url, status: int, location: str | None) -> Url | None:
        """Return where to post next, None when the answer is no redirect to follow.

        Only 307 and 308 are: they keep method and body (RFC 9110 15.4.8, 15.4.9), the others would turn the post into
        a GET.  Raises CallbackRefused when the new address fails the check or leaves https for http.
        """
        if status not in (307, 308) or not location:
            return None
        try:
            joined = urljoin(f"{base.scheme}://{base.authority}{base.target}", location)
        except ValueError as error:  # of urllib, for brackets that do not match
            raise CallbackRefused(f"callback redirect refused: {error}") from None
        url = self.check_url(joined)
        if base.scheme == "https" and url.scheme == "http":
            raise CallbackRefused(_refusal_text(url, "it redirects from https to http"))
        return url

    def _is_listed(self, url: Url) -> bool:
        return any(entry.names(url.host, url.port) for entry in self.allow.entries)

    def _refusal(self, url: Url, address: Address) -> str | None:
        verdict = classify_address(address, self.own())
        if any(entry.opens(address, url.port, verdict) for entry in self.allow.entries):
            return None
        if verdict.level is Level.FORBIDDEN:
            return (
                f"{address} is {verdict.kind}; only a network inside {verdict.network} in callback_allow can permit it"
            )
        if self._is_listed(url) or self._is_gateway(url, address):
            return None
        if verdict.level is Level.PRIVATE:
            return f"{address} is {verdict.kind}; callback_allow can permit it"
        return f"{address} is not in callback_allow" if self.allow.only else None


def _refusal_text(url: Url, reason: str) -> str:
    return f"callback to {url.authority} refused: {reason}"


def _is_function_path(target: str, base: str) -> bool:
    """Tell whether `target` is a function's at a gateway that is reached at the path `base`, however it is decoded."""
    path = target.partition("?")[0]
    begins = (f"{base.rstrip('/')}/{area}/" for area in ("function", "async-function"))
    return path.startswith(tuple(begins)) and not has_dot_segments(path.encode())


def build_policy(gateway_urls: Iterable[str], allow: CallbackAllow | None = None) -> CallbackPolicy:
    """Return the policy of a system whose gateway is reached at `gateway_urls`.

    One at an address of loopback is so by the name localhost too.  Raises CallbackRefused for a malformed URL.
    """
    return CallbackPolicy(tuple(map(parse_callback_url, gateway_urls)), allow or CallbackAllow())


# ---------------------------------------------------------------------------------------------------------------
# What a callback carries.
# ---------------------------------------------------------------------------------------------------------------

# A callback is a message, repeated until it is taken: its id is the same for each repetition of one end of a call, and
# another for each end of a dead letter that was queued again.  Workers of earlier versions send none: then the call's
# stands for it, which is that of the first end.
CALLBACK_ID = b"X-Callback-Id"


def build_callback_id(call: Call) -> str:
    """Return the id of the callback that tells of a call's end.

    It is the call's id, and for a later end the time of that besides.  A later end has attempts from before it behind
    it; after more attempts than are remembered none can be told from a first one, and each goes by its time.
    """
    is_first = len(call.history) <= call.attempts < HISTORY_COUNT
    return call.id if is_first or call.finished_s is None else f"{call.id}:{call.finished_s * 1e6:.0f}"


# In a callback that goes to a gateway's /async-function it proves that a worker of the same queue sent it, and that it
# is this very callback; so the next call of a chain is submitted once for an end, however often its callback is
# repeated.  It may go to any receiver: it is good for nothing else.
CALLBACK_PROOF = b"X-Callback-Proof"


def build_proof(token: str, callback_id: str) -> str:
    """Return the proof for a callback, made with the token that only gateway and worker know."""
    return hmac.new(token.encode(), callback_id.encode(), hashlib.sha256).hexdigest()


# They mean nothing in a response, but would steer the request that the callback is: at a gateway the next call of a
# chain, with another callback, another time or another limit.  A function that echoes what it was sent answers with
# some of them, and an answer is no word of the caller's.
_REQUEST_ONLY = {
    *("host", "expect", "origin", "via", "forwarded"),
    *("x-callback-url", "x-delay", "x-expires", "x-timeout", "idempotency-key", "x-worker-token"),
}
_REQUEST_ONLY_PREFIXES = ("x-forwarded-", "sec-", "access-control-request-", "proxy-")


# Credentials and what asks for them: meant for the function's caller, not for a third party.
_CREDENTIALS = {name.decode() for name in SECRET_FIELDS} | {"www-authenticate"}


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What a callback tells of its call.  `retries_count` are the attempts after the first; equal to
    `max_retries_count` it means that the call was given up."""

    call_id: str
    function: str
    status: int
    duration_s: float
    retries_count: int
    max_retries_count: int


def _our_fields(facts: CallFacts) -> Headers:
    return (
        ("X-Call-Id", facts.call_id),
        ("X-Duration-Seconds", f"{facts.duration_s:f}"),
        ("X-Function-Status", str(facts.status)),
        ("X-Function-Name", facts.function),
        ("X-Retry", str(facts.retries_count)),
        ("X-Retry-Max", str(facts.max_retries_count)),
        ("User-Agent", f"faashound/{VERSION}"),
    )


# Ours: the function cannot override them, nor pretend to a signature where there is none.
_OURS = {
    *(name.lower() for name, _ in _our_fields(CallFacts("", "", 0, 0.0, 0, 0))),
    *("webhook-id", "webhook-timestamp", "webhook-signature"),
    *(name.decode().lower() for name in (CALLBACK_ID, CALLBACK_PROOF)),
}


_NOT_PASSED_ON = tuple(sorted(name.encode() for name in _REQUEST_ONLY | _CREDENTIALS | _OURS))


def build_callback_headers(facts: CallFacts, response_headers: Iterable[tuple[str, str]]) -> Headers:
    """Return the header fields of a callback: the function's, as far as they may be passed on, then ours.

    What is hop by hop, or framing, stays behind as it does at the gateway (`watchdog.end_to_end`).

    Left to the caller: Host, the framing, and the signature.  For a call without a response pass no fields.
    """
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response_headers]
    passed_on = [
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in end_to_end(fields, *_NOT_PASSED_ON)
    ]
    return (
        *((name, value) for name, value in passed_on if not name.lower().startswith(_REQUEST_ONLY_PREFIXES)),
        *_our_fields(facts),
    )


# ---------------------------------------------------------------------------------------------------------------
# Signing (Standard Webhooks, symmetric scheme v1): HMAC-SHA256 over `id.timestamp.body`, base64.  The signature is
# a header and so goes out before the body: a large body is read twice, once to sign it and once to send it.
#
# It proves that a worker with this secret posted this body, at that time, to one of those for whom the secret is.  It
# does not prove who submitted the call: every caller who may submit one chooses the body, and with a secret for every
# host the receiver too, and could post there what another function has had signed.
# ---------------------------------------------------------------------------------------------------------------

_SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix, no secret


MIN_SECRET_BYTES = 24  # the specification's lower bound


SECRETS_HELP = "allowed, one a line: SECRET, for every host, or HOST SECRET; a secret is whsec_<base64>, or raw"


@dataclass(frozen=True, slots=True)
class Secret:
    """A key that signs, and for which host: a name, pattern or address as in callback_allow; None is every host."""

    key: bytes = field(repr=False)
    host: AllowEntry | None = None

    def signs_for(self, url: Url) -> bool:
        """Tell whether posts to `url` are signed with this key."""
        if self.host is None or self.host.names(url.host, url.port):
            return True
        literal = parse_literal(url.host)
        is_at_host = self.host.network is not None and literal is not None and literal in self.host.network
        return is_at_host and self.host.port in (None, url.port)


def parse_secrets(text: str) -> tuple[Secret, ...]:
    """Return the secrets of a file, newest first: a line for each, with a host before it if it is for that one only.

    Several for one host are for rotation: each signs, and a receiver accepts what one of them signed.
    Raises ValueError with all that is wrong, each by its line and without a word of a secret: bad base64, a key that
    is too short, a host that is none, or a file without a secret.
    """
    secrets: list[Secret] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            secrets += _parse_secret_line(line.split())
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    if not secrets:
        raise ValueError(f"holds no secret; {SECRETS_HELP}")
    return tuple(secrets)


def _parse_secret_line(words: Sequence[str]) -> list[Secret]:
    if len(words) < 2 or words[0].startswith(_SECRET_PREFIX):
        return [Secret(_parse_secret(word)) for word in words]
    host = _parse_secret_host(words[0])
    return [Secret(_parse_secret(word), host) for word in words[1:]]


def _parse_secret_host(word: str) -> AllowEntry:
    """Return the host that a line begins with; one that may well be a secret is not taken for a name, nor shown."""
    may_be_secret = len(word) >= MIN_SECRET_BYTES and not set(word) & set(".:")
    try:
        if may_be_secret or "/" in word:
            raise ValueError
        return _parse_allow_entry(word)
    except ValueError:
        raise ValueError(f"the first of several words is no host; {SECRETS_HELP}") from None


def _parse_secret(word: str) -> bytes:
    key = word.encode()
    if word.startswith(_SECRET_PREFIX):
        encoded = word.removeprefix(_SECRET_PREFIX).rstrip("=")
        try:
            key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"the secret is no base64 after {_SECRET_PREFIX}") from None
    if len(key) < MIN_SECRET_BYTES:
        raise ValueError(f"the secret is {len(key)} bytes long; allowed: {MIN_SECRET_BYTES} bytes or more")
    return key


class Signature:
    """The signature of one post, fed with its body.  Made by `Signer.start`."""

    def __init__(self, keys: Sequence[bytes], message_id: str, timestamp_s: int) -> None:
        self._message_id = message_id
        self._timestamp_s = timestamp_s
        head = f"{message_id}.{timestamp_s}.".encode()
        self._macs = [hmac.new(key, head, hashlib.sha256) for key in keys]

    def update(self, chunk: bytes) -> Signature:
        """Take the next piece of the body."""
        for mac in self._macs:
            mac.update(chunk)
        return self

    def finish(self) -> Headers:
        """Return the three header fields that sign what was fed."""
        signatures = " ".join(f"v1,{base64.b64encode(mac.digest()).decode()}" for mac in self._macs)
        return (
            ("webhook-id", self._message_id),
            ("webhook-timestamp", str(self._timestamp_s)),
            ("webhook-signature", signatures),
        )


class Signer:
    """Signs callbacks with the secrets of `parse_secrets`; says nothing of them in its repr."""

    def __init__(self, secrets: Sequence[Secret]) -> None:
        self._secrets = tuple(secrets)

    def start(self, url: Url, callback_id: str, now_s: float) -> Signature | None:
        """Return a signature to feed, for a post to `url` at `now_s` (epoch seconds; each retry is signed anew).

        None for a host that no secret is for.

        The receiver's key for telling repeats is the callback's id.  A full stop in it, which only a caller's own id
        can have, becomes a colon: the specification forbids it, as `a.1` at 2 would sign the same text as `a` at 1.
        """
        keys = [secret.key for secret in self._secrets if secret.signs_for(url)]
        return Signature(keys, callback_id.replace(".", ":"), int(now_s)) if keys else None
