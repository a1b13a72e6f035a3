"""Functions that are not for every caller, or for none at the moment: the annotations that say so, read and judged.

    com.faashound.auth       internal: for workers, schedules and who has the gateway's password
                             NAME: for callers that carry the secret of this name as a bearer token (RFC 6750), too
    com.faashound.disabled   true: no call is made; callers are told to come again, and asynchronous calls wait
    com.faashound.pages      sandbox or trust: what its web pages may do in a browser, see serving/function_pages.py

Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..watchdog import parse_bool
from .secret_names import SECRETS_ARE, is_secret_name

AUTH_ANNOTATION = "com.faashound.auth"
DISABLED_ANNOTATION = "com.faashound.disabled"
PAGES_ANNOTATION = "com.faashound.pages"
INTERNAL = "internal"
SANDBOX, TRUST = PAGES = ("sandbox", "trust")


class BadExposure(ValueError):
    """Annotations about callers make no sense.  `problems` has what is wrong under each one's name."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Exposure:
    """Whom a function is for: `is_internal`, or for who knows `secret`; if neither is set, for every caller.

    `pages` is one of PAGES, None where the gateway's setting function_pages decides.
    """

    is_internal: bool = False
    secret: str | None = None
    is_disabled: bool = False
    pages: str | None = None


FOR_ALL = Exposure()


def parse_exposure(annotations: Mapping[str, str]) -> Exposure:
    """Return what `annotations` say of callers; raises BadExposure with all that is wrong."""
    auth, disabled = annotations.get(AUTH_ANNOTATION), annotations.get(DISABLED_ANNOTATION)
    pages = annotations.get(PAGES_ANNOTATION)
    if auth is None and disabled is None and pages is None:  # almost always, and this is asked at each call
        return FOR_ALL
    problems: dict[str, str] = {}
    if auth is not None and not is_secret_name(auth):
        problems[AUTH_ANNOTATION] = f"{auth[:300]!r}: allowed: {INTERNAL}, or the name of a secret: {SECRETS_ARE}"
    if pages is not None and pages not in PAGES:
        problems[PAGES_ANNOTATION] = f"{pages[:300]!r}: allowed: {', '.join(PAGES)}"
    is_disabled = False
    try:
        is_disabled = disabled is not None and parse_bool(disabled)
    except ValueError as error:
        problems[DISABLED_ANNOTATION] = f"{str(disabled)[:300]!r}: {error}"
    if problems:
        raise BadExposure(problems)
    return Exposure(auth == INTERNAL, auth if auth != INTERNAL else None, is_disabled, pages)


def digest_token(value: bytes) -> str:
    """Return what tokens are compared by; the white space around one, such as a file's last line end, is not of it."""
    return hashlib.sha256(value.strip()).hexdigest()
