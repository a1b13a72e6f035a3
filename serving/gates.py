"""Functions that are not for every caller, or for none at the moment (annotations, see functions/exposure.py).

    gate = FunctionGate(access)
    dropped = await gate.admit(request, function)     # Unauthorized, Forbidden, TooManyGuesses
    check_enabled(function)                           # Disabled

Contract: workers of ours are let in, and so is who has the gateway's password and the role `deploy`; besides, where an
annotation names a secret, who carries it as a bearer token.  A function never gets the credentials that were meant for
us: `admit` returns the fields that are not passed on.  Tokens are compared in constant time, and guessing them is as
slow as guessing passwords, for each address and function: so a wrong token holds up no caller of another function, and
none at all whose token is right and long (passwords.py).

What it refuses: callbacks of ours, which a stranger may have sent here, unless they carry a token like any caller.
"""

from __future__ import annotations

import hmac

from ..functions.exposure import digest_token
from ..functions.table import Function
from ..watchdog import FaashoundError, Request
from .access import Access
from .answers import Forbidden
from .passwords import Guesses, is_long

DISABLED_RETRY_S = 30  # after so long a caller may see whether the function is enabled again


class TokenWanted(FaashoundError):
    """The function is for who knows its token (RFC 6750 3)."""

    status = 401
    headers = ((b"WWW-Authenticate", b'Bearer realm="faashound"'),)


class Disabled(FaashoundError):
    """The function is not called at the moment."""

    status = 503
    headers = ((b"Retry-After", b"%d" % DISABLED_RETRY_S), (b"X-OpenFaaS-Internal", b"gateway"))


class FunctionGate:
    """Lets callers through to functions, or not."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._guesses = Guesses()

    async def admit(self, request: Request, function: Function) -> tuple[bytes, ...]:
        """Return the fields of a request that are for us and not for its function; raises what says it may not pass."""
        exposure = function.exposure
        if not (exposure.is_internal or exposure.secret) or self.access.is_worker(request):
            return ()
        scheme, _, given = (request.header(b"authorization") or b"").partition(b" ")
        if self.access.door is not None and scheme.lower() == b"basic":
            await self.access.authorize_change(request)
        elif exposure.secret is not None:
            await self._check_token(request, function, given.strip() if scheme.lower() == b"bearer" else b"")
        elif self.access.door is not None:
            await self.access.authorize_change(request)  # which asks for a password
        else:
            raise Forbidden(f"{function.name.short} is for callers inside (com.faashound.auth: internal)")
        return (b"authorization",)

    async def _check_token(self, request: Request, function: Function, token: bytes) -> None:
        refused = TokenWanted(f"{function.name.short} wants its bearer token (com.faashound.auth)")
        if not token:
            raise refused
        wanted, about = function.token_digest, str(function.name)
        is_right = wanted is not None and hmac.compare_digest(digest_token(token), wanted)
        if not (is_right and is_long(token)):
            self._guesses.check(request, about)
        if not is_right:
            await self._guesses.note(request, "token", about)
            raise refused


def check_enabled(function: Function) -> None:
    """Raise Disabled for a function that is not to be called."""
    if function.exposure.is_disabled:
        raise Disabled(f"{function.name.short} is disabled (com.faashound.disabled); asynchronous calls wait")
