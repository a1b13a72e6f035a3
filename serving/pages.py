"""The page at /ui/: static files of the package, the same in every installation.

    pages = Pages.load()
    response = pages.answer(request)                         # GET /ui/..., NotFound
    response = pages.lead(request)                           # GET / of a browser: to /ui/; None for other clients

They hold no data: all that the page shows it asks of /system, as any client does, with the password that its reader
has typed into it.  So the files are given without one; a browser that was asked for it by HTTP would send it along with
every page that a function of ours serves, and would keep it until it is closed.

Contract: pure; a request names a file of a table, never a path.  The policy lets nothing of another origin in, no
markup that a script has put together, and no page around it; and a page that opens it, such as one that a function of
ours serves from the same origin, gets no hold of it.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..watchdog import Header, Request, Response
from .answers import NotFound, allow

PLACE = "/ui/"
FOLDER = Path(__file__).resolve().parent.parent / "ui"
TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    b" form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
FIELDS: tuple[Header, ...] = (
    (b"Content-Security-Policy", POLICY),
    (b"X-Content-Type-Options", b"nosniff"),
    (b"Referrer-Policy", b"no-referrer"),
    (b"Cross-Origin-Opener-Policy", b"noopener-allow-popups"),
    (b"Cross-Origin-Resource-Policy", b"same-origin"),
    (b"Cache-Control", b"no-cache"),
)


@dataclass(frozen=True, slots=True)
class Page:
    """One file: its bytes, as they are and packed, their type, and a tag by which a browser knows that it has them."""

    content: bytes
    packed: bytes
    media_type: bytes
    tag: bytes


@dataclass(frozen=True, slots=True)
class Pages:
    """The files by the names that they have below /ui/."""

    files: Mapping[str, Page]

    @classmethod
    def load(cls) -> Pages:
        """Read the files of the package."""
        paths = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in TYPES]
        return cls({path.relative_to(FOLDER).as_posix(): _read(path) for path in paths})

    def answer(self, request: Request) -> Response:
        """Answer with one file; raises NotFound."""
        allow(request, "GET")
        if request.path + b"/" == PLACE.encode():
            return Response(308, ((b"Location", PLACE.encode()),))
        name = request.path.decode("latin-1").removeprefix(PLACE) or "index.html"
        page = self.files.get(name)
        if page is None:
            raise NotFound(f"not found; allowed: {PLACE}")
        fields = [*FIELDS, (b"Content-Type", page.media_type), (b"ETag", page.tag), (b"Vary", b"Accept-Encoding")]
        if request.header(b"if-none-match") == page.tag:
            return Response(304, fields)
        content = page.content
        if b"gzip" in (request.header(b"accept-encoding") or b""):
            content = page.packed
            fields.append((b"Content-Encoding", b"gzip"))
        return Response(200, fields, b"" if request.method == "HEAD" else content, len(content))

    def lead(self, request: Request) -> Response | None:
        """Return the way to the page for who asks for / and can show it; None for other clients."""
        if request.method not in ("GET", "HEAD") or b"text/html" not in (request.header(b"accept") or b""):
            return None
        return Response(302, ((b"Location", PLACE.encode()), (b"Vary", b"Accept"), (b"Cache-Control", b"no-store")))


def _read(path: Path) -> Page:
    content = path.read_bytes()
    tag = b'W/"%s"' % hashlib.sha256(content).hexdigest()[:32].encode()  # weak: one for both forms (RFC 9110 8.8.3)
    return Page(content, gzip.compress(content, mtime=0), TYPES[path.suffix], tag)
