"""What functions and callers have written, shown by a browser under our origin: it does nothing in our name there.

    response = place_of_pages(request)                        # 307 to where pages are; None: answer here
    fields = fields_for_browsers(request, fields)             # of /function/NAME, to callers
    fields = fields_of_result(fields)                         # of /async-function/ID/result
    check_place(request)                                      # ForeignPage

A function may answer with a web page, and a caller may send one that a function hands back.  A browser takes it for a
page of ours: it could ask /system whatever the browser's user may, with the password that the browser remembers.

So pages of functions have an origin of their own, where there can be one: a browser that has come to this machine as
`localhost` or 127.0.0.1 is led to http://functions.localhost, which is this machine too (RFC 6761 6.3), and where there
is nothing but functions.  There they work as anywhere.  Elsewhere such an answer carries the sandbox of
https://html.spec.whatwg.org/#sandboxing: its scripts, forms, styles and images work, its origin is none, so that it has
no cookies and no storage, and what it asks for is foreign.  A function that needs more can be trusted, by its
annotation or the setting function_pages.  A result is never a page: it is saved, and runs nothing.

What speaks of our whole origin and not of one answer is passed on for no function: by Service-Worker-Allowed a script
would answer in our place from then on.

Contract: pure.  Status, type, body and all other fields are the function's; what it says of its own
Content-Security-Policy holds besides.  The sandbox does not depend on what a browser wants an answer for: it shows from
its cache what it has got for another purpose, and tells the purpose only to this machine, and over TLS.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..watchdog import Header, Request, Response
from .answers import NotFound
from .browsers import ForeignPage

PLACE_OF_PAGES = b"functions.localhost"
OUR_HOSTS = (b"localhost", b"127.0.0.1", b"[::1]")
OF_PROXIES = (b"x-forwarded-host", b"x-forwarded-proto", b"forwarded")
OF_THE_ORIGIN = frozenset((b"service-worker-allowed", b"clear-site-data", b"alt-svc", b"nel", b"report-to"))
SANDBOX_FIELD: Header = (
    b"Content-Security-Policy",
    b"sandbox allow-downloads allow-forms allow-modals allow-popups allow-popups-to-escape-sandbox allow-scripts"
    b" allow-top-navigation-by-user-activation",
)
# Of which no browser makes a document with scripts (https://mimesniff.spec.whatwg.org/): most answers need no sandbox.
INERT_TYPES = frozenset(
    (
        *(b"application/json", b"application/octet-stream", b"application/x-ndjson", b"text/css", b"text/csv"),
        *(b"text/event-stream", b"text/javascript", b"text/plain"),
    )
)
OF_RESULTS: tuple[Header, ...] = ((b"Content-Security-Policy", b"sandbox"), (b"X-Content-Type-Options", b"nosniff"))


def split_host(host: bytes) -> tuple[bytes, bytes]:
    """Return the name in Host, in lower case, and what follows it: a colon and a port, or nothing."""
    name, colon, port = host.rpartition(b":")
    if not colon or not port.isdigit():
        name, colon, port = host, b"", b""
    return name.lower(), colon + port


def place_of_pages(request: Request) -> Response | None:
    """Return the way to where pages of functions are, for a browser that would show one here, if there is such a place.

    Browsers tell this machine what they want an answer for (https://www.w3.org/TR/fetch-metadata).  Behind a proxy
    there is no such place that we know of.
    """
    name, port = split_host(request.host)
    is_shown = request.method in ("GET", "HEAD") and request.header(b"sec-fetch-mode") == b"navigate"
    if not is_shown or name not in OUR_HOSTS or any(request.header(each) is not None for each in OF_PROXIES):
        return None
    target = request.path + (b"?" + request.query if request.query else b"")
    fields = ((b"Location", b"http://" + PLACE_OF_PAGES + port + target), (b"Cache-Control", b"no-store"))
    return Response(307, fields)


def fields_for_browsers(request: Request, fields: Sequence[Header], *, is_trusted: bool) -> list[Header]:
    """Return the fields of a function's answer as a caller gets them."""
    kept = [field for field in fields if field[0].lower() not in OF_THE_ORIGIN]
    types = [value for name, value in kept if name.lower() == b"content-type"]
    is_inert = len(types) == 1 and types[0].partition(b";")[0].strip().lower() in INERT_TYPES
    is_at_home = is_trusted or split_host(request.host)[0] == PLACE_OF_PAGES
    return kept if is_at_home or is_inert else [*kept, SANDBOX_FIELD]


def fields_of_result(fields: Sequence[Header]) -> list[Header]:
    """Return the fields of a stored answer as it is fetched; a name that it has for a file to save is kept."""
    dropped = OF_THE_ORIGIN | {b"x-content-type-options"}
    kept = [field for field in fields if field[0].lower() not in dropped]
    dispositions = [value for name, value in kept if name.lower() == b"content-disposition"]
    if len(dispositions) != 1 or dispositions[0].partition(b";")[0].strip().lower() != b"attachment":
        kept = [field for field in kept if field[0].lower() != b"content-disposition"]
        kept.append((b"Content-Disposition", b"attachment"))
    return [*kept, *OF_RESULTS]


def check_place(request: Request) -> None:
    """Raise NotFound for what is not where pages of functions are, ForeignPage for a script that asks for too much.

    A service worker may answer in the place of all that is in its directory, which for /function/NAME is that of all
    functions.  https://w3c.github.io/ServiceWorker/#service-worker-script-request
    """
    area, _, below = request.path.removeprefix(b"/").partition(b"/")
    if area != b"function" and split_host(request.host)[0] == PLACE_OF_PAGES:
        raise NotFound("not found; allowed: /function/NAME")
    if request.header(b"service-worker") is not None and (area != b"function" or b"/" not in below):
        raise ForeignPage("a service worker of a function is below /function/NAME/")
