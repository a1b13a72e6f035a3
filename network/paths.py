"""Paths of functions: how one is put behind an address.

    url = below(parse_url("http://10.0.0.7:8080/base"), "/thumb", "size=3")     # http://10.0.0.7:8080/base/thumb?size=3

Contract: pure.  The gateway, a worker that calls a function itself, and a worker that calls it through the gateway put
its URL together here, so a function sees the same path and query by each way.

What it refuses: to mend a path.  It is passed on as it came; see `watchdog.check_path` for those that are not.
"""

from __future__ import annotations

from ..watchdog import Url


def below(base: Url, path: str, query: str) -> Url:
    """Return the URL of `path`, which begins with a slash or is empty (the root), and `query`, under that of `base`."""
    target = base.target.rstrip("/") + (path or "/") + (f"?{query}" if query else "")
    return Url(base.scheme, base.host, base.port, target)
