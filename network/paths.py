"""Paths of functions: how one is put behind an address, and which would lead out of what it is put behind.

    url = below(parse_url("http://10.0.0.7:8080/base"), "/thumb", "size=3")     # http://10.0.0.7:8080/base/thumb?size=3
    has_dot_segments(b"/%2e%2e/admin")                                          # True

Contract: pure.  The gateway, a worker that calls a function itself, and a worker that calls it through the gateway put
its URL together here, so a function sees the same path and query by each way.  So do all who ask about dot segments.

What it refuses: to mend a path.  It is passed on as it came, or the caller of `has_dot_segments` answers with an error.
"""

from __future__ import annotations

import re
import urllib.parse

from ..watchdog import Url

DECODINGS_COUNT = 3  # of a path: upstreams decode once, careless ones twice

# Segments as the widest of upstreams see them: `\\` separates like `/` (IIS), and `..;x` is `..` (Tomcat).
_DOTS = re.compile(rb"[/\\]\.{1,2}(?=[/\\;]|$)")


def below(base: Url, path: str, query: str) -> Url:
    """Return the URL of `path`, which begins with a slash or is empty (the root), and `query`, under that of `base`."""
    target = base.target.rstrip("/") + (path or "/") + (f"?{query}" if query else "")
    return Url(base.scheme, base.host, base.port, target)


def has_dot_segments(path: bytes) -> bool:
    """Tell whether a path has a segment `.` or `..`, plain or encoded: what is further on may resolve it.

    Clients resolve such segments before they ask (RFC 3986 5.2.4), so an honest caller loses nothing.
    """
    if b"." not in path and b"%" not in path:
        return False
    for _ in range(DECODINGS_COUNT + 1):
        if _DOTS.search(path):
            return True
        if b"%" not in path:
            return False
        path = urllib.parse.unquote_to_bytes(path)
    return False
