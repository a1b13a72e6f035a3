"""Who may ask what of the gateway: browsers' pages, holders of the password, workers of ours, callbacks.

    access = Access(queue.token, rules, door)
    access.check_host(request)                               # UnknownHost
    await access.authorize(request)                          # Unauthorized, TooManyGuesses, Forbidden

Contract: what can open the queue is a worker of ours and proves it by the queue's token; it needs no password and
may know us by any name.  A callback of ours carries a proof that it is one: it reaches functions, and nothing else.
"""

from __future__ import annotations

import base64
import hmac
from contextlib import suppress
from dataclasses import dataclass

from ..calls.callbacks import CALLBACK_ID, CALLBACK_PROOF, build_proof
from ..draining.gateway_access import WORKER_TOKEN
from ..network.hosts import UnknownHost
from ..watchdog import FileBody, Request, Response
from .answers import Forbidden
from .browsers import BrowserRules
from .followers import Watched
from .passwords import PasswordDoor
from .users import Role

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # RFC 9110 9.2.1
_CALLBACK_ID, _PROOF, _TOKEN = CALLBACK_ID.lower(), CALLBACK_PROOF.lower(), WORKER_TOKEN.lower()


@dataclass(frozen=True, slots=True)
class Access:
    """The rules of one gateway; `token` is its queue's, `door` asks for the password, if there is one."""

    token: str
    pages: BrowserRules
    door: PasswordDoor | None

    def is_worker(self, request: Request) -> bool:
        """Tell whether a worker of ours asks."""
        given = request.header(_TOKEN) or b""
        return given != b"" and hmac.compare_digest(given, self.token.encode())  # an empty field is no token

    def callback_id(self, request: Request) -> str | None:
        """Return the id of the callback that a request is, None if it is none of ours."""
        proof = request.header(_PROOF)
        if proof is None:
            return None
        given = (request.header(_CALLBACK_ID) or request.header(b"x-call-id") or b"").decode("latin-1")
        return given if hmac.compare_digest(proof, build_proof(self.token, given).encode()) else None

    def check_no_callback(self, request: Request) -> None:
        """Raise Forbidden for a callback, which a stranger may have sent anywhere."""
        if request.header(_PROOF) is not None:
            raise Forbidden("callbacks reach /function/NAME and /async-function/NAME, nothing else")

    def check_host(self, request: Request) -> None:
        """Raise UnknownHost for a name that is none of ours, unless a worker asks, which is no browser."""
        try:
            self.pages.check_host(request)
        except UnknownHost:
            if not self.is_worker(request):
                raise

    def asker_of(self, request: Request) -> str:
        """Return who asks, and from where, for the log: the name that was given with the password, if one was."""
        scheme, _, given = (request.header(b"authorization") or b"").partition(b" ")
        user = ""
        if scheme.lower() == b"basic" and self.door is not None:
            with suppress(ValueError):
                user = base64.b64decode(given.strip()).decode("utf-8", "replace").partition(":")[0]
        return f"{user or 'no name'} from {request.peer or 'a Unix socket'}"

    async def authorize(self, request: Request) -> None:
        """Return if a request may see calls and functions, or change them; raises what says that it may not."""
        if request.method in SAFE_METHODS:
            if self.door is not None and not self.is_worker(request):
                await self.door.check(request)
        else:
            await self.authorize_change(request)

    def watch(self, request: Request, response: Response) -> Response:
        """Return an answer to an authorized request, which ends, if it is a stream, when its user is no longer one."""
        body = response.body
        if self.door is not None and not isinstance(body, bytes | FileBody) and not self.is_worker(request):
            response.body = Watched(body, request, self.door.watch(request))
        return response

    async def authorize_change(self, request: Request) -> None:
        """Return if a request may change something, whatever its method; raises as `authorize`."""
        if self.door is None or self.is_worker(request):
            return
        user = await self.door.check(request)
        if user.role is not Role.DEPLOY:
            raise Forbidden(f"{user.name} may look, and change nothing; allowed: with the role {Role.DEPLOY.value}")
