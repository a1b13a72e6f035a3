"""Where the gateway is, and how a worker makes itself known to it.

    gateway = GatewayAccess(parse_url("http://127.0.0.1:8080"), queue.token)
    client.request("POST", gateway.function_url(call), [gateway.token_field], ...)

Contract: pure.  Requests with the token are not judged as a stranger's, so it goes to the gateway and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..calls.model import Call
from ..calls.names import FunctionName
from ..network.paths import below
from ..watchdog import Header, Url

WORKER_TOKEN = b"X-Worker-Token"  # who has it can open the queue, so it is a worker of this system
DIRECT_CALLS = b"X-Direct-Calls"  # how many calls of a function a worker has made since it asked about it last


@dataclass(frozen=True, slots=True)
class GatewayAccess:
    """The gateway's base URL, and the queue's token, which gateway and worker alone can read."""

    url: Url
    token: str

    @property
    def token_field(self) -> Header:
        """The header field by which the gateway knows a worker."""
        return WORKER_TOKEN, self.token.encode()

    def function_url(self, call: Call) -> Url:
        """Return where the gateway answers for a call's function."""
        return below(self.url, f"/function/{call.function}{call.path}", call.query)

    def description_url(self, function: FunctionName) -> Url:
        """Return where the gateway tells what it knows of a function."""
        return below(self.url, f"/system/function/{function}", "")
