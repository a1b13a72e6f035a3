"""Which requests of a browser's pages a gateway answers: a page is written by a stranger, and asks in its user's name.

    rules = BrowserRules(on_loopback=True, hosts=frozenset(("faas.internal",)), origins=frozenset())
    rules.check_host(request)                  # UnknownHost: a name that leads here only because its owner says so
    check_own_page(request)                    # ForeignPage: for what shows or changes calls and functions
    fields = rules.check_call(request)         # ForeignPage, or what the answer has to say of it (CORS)

Three ways lead from a page to us.  It may have its own name resolve to our address (DNS rebinding): then it is of the
same origin as we are, and only the name in Host tells it from our user; so a gateway that only this machine reaches
answers to `localhost`, to addresses, and to names that its operator lists, whether it asks operators for a password or
not: to call functions takes none.  It may send what needs no permission (a form, an image, text/plain) and not care for
the answer: Origin and Sec-Fetch-Site, which no page can forge, say so.  Or it may ask for permission, as the Fetch
standard has it: that is what `allowed_origins` gives, for calling functions and for nothing else.

A page that a function has served is foreign too, unless it is trusted (function_pages.py).

Contract: pure.  Programs that are no browsers send neither Origin nor Sec-Fetch-Site and notice nothing but the names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..network.hosts import check_own_name
from ..watchdog import FaashoundError, Header, Request, Response

PREFLIGHT_AGE_S = 600  # how long browsers may remember a permission; Chromium takes two hours at most


EXPOSED_FIELDS = b"X-Call-Id, X-Start-Time, X-Duration-Seconds, Location, Retry-After"


class ForeignPage(FaashoundError):
    """The request comes from a page of another origin."""

    status = 403


class BadContentType(FaashoundError):
    """A body that a page could send without asking for permission."""

    status = 415


_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?", re.ASCII)


_DEFAULT_PORTS = {"http": "80", "https": "443"}


def parse_origins(text: str) -> frozenset[bytes]:
    """Return the origins of the setting allowed_origins as browsers write them; ValueError says what is allowed."""
    return frozenset(_parse_origin(word.strip()) for word in text.split(",") if word.strip())


def _parse_origin(word: str) -> bytes:
    match = _ORIGIN.fullmatch(word.lower())
    if not match or not 0 < int(match["port"] or 1) < 65536:
        raise ValueError('allowed: http://HOST[:PORT] or https://..., separated by commas ("https://app.example.com")')
    is_default = match["port"] in (None, _DEFAULT_PORTS[match["scheme"]])
    return f"{match['scheme']}://{match['host']}{'' if is_default else ':' + match['port']}".encode()


def is_foreign(request: Request) -> bool:
    """Tell whether a page of another origin sent a request, as far as its browser says so."""
    site = request.header(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")  # same-site is a page on another port of this machine
    origin = request.header(b"origin")
    if origin is None:
        return False
    # A proxy before us may have changed Host; no page can send X-Forwarded-Host without our permission.
    ours = (request.host, request.header(b"x-forwarded-host"))
    return origin.lower().partition(b"://")[2] not in (host.lower() for host in ours if host)


def check_own_page(request: Request) -> None:
    """Raise ForeignPage for a request of a page that is not ours, BadContentType for what any page could send."""
    if is_foreign(request):
        raise ForeignPage("pages of other origins may not ask this")
    if request.method in ("GET", "HEAD", "OPTIONS") or request.body.length == 0:
        return
    media_type = (request.header(b"content-type") or b"").partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise BadContentType("allowed: no body, or one with Content-Type: application/json")


@dataclass(frozen=True, slots=True)
class BrowserRules:
    """What pages may do here.

    `on_loopback`: only this machine reaches us, so that a page that is opened on it could what no stranger can.
    `hosts` are names that we answer to besides, in lower case; `origins` those of pages that may call functions.
    """

    on_loopback: bool
    hosts: frozenset[str]
    origins: frozenset[bytes]

    def check_host(self, request: Request) -> None:
        """Raise UnknownHost for a request to a name that is none of ours.

        Where others reach us we cannot know all our names; so there it is checked only if the operator lists them.
        """
        if self.on_loopback or self.hosts:
            check_own_name(request.host, self.hosts, "gateway")

    def check_call(self, request: Request) -> list[Header]:
        """Return what the answer to a function's call has to say to the page that makes it, if one does.

        Raises ForeignPage where it may not.  Without `origins`, a gateway that others reach leaves all of this to its
        functions, which may well have an answer of their own, as they do with OpenFaaS.
        """
        origin = request.header(b"origin")
        if origin is None:
            refused = self.on_loopback and is_foreign(request)
        else:
            judges = self.on_loopback or bool(self.origins)
            refused = judges and origin not in self.origins and is_foreign(request)
        if refused:
            raise ForeignPage("pages of other origins may not call functions; allowed: those in allowed_origins")
        if not self.origins:
            return []
        varies = (b"Vary", b"Origin")
        if origin is None or origin not in self.origins:
            return [varies]
        exposed = (b"Access-Control-Expose-Headers", EXPOSED_FIELDS)
        return [(b"Access-Control-Allow-Origin", origin), exposed, varies]

    def answer_preflight(self, request: Request) -> Response | None:
        """Return the permission that a page asks for before it calls a function, None if that is not what it asks.

        To be called after `check_call`.  https://fetch.spec.whatwg.org/#cors-preflight-request
        """
        if request.method != "OPTIONS" or request.header(b"origin") not in self.origins:
            return None
        method = request.header(b"access-control-request-method")
        if method is None:
            return None
        fields = [(b"Access-Control-Allow-Methods", method), (b"Access-Control-Max-Age", b"%d" % PREFLIGHT_AGE_S)]
        wanted = request.header(b"access-control-request-headers")
        if wanted:
            fields.append((b"Access-Control-Allow-Headers", wanted))
        fields.append((b"Vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"))
        return Response(204, fields)


def with_fields(response: Response, fields: list[Header]) -> Response:
    """Return `response` with what `check_call` says, in place of what the function itself says of origins."""
    if fields:
        kept = [field for field in response.headers if field[0].lower() != b"access-control-allow-origin"]
        response.headers = [*kept, *fields]
    return response
