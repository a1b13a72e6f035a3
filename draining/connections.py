"""The connections of a worker: to the gateway and to functions, and apart from them those of callbacks.

Callbacks go where strangers say, and so do calls of functions whose host a caller's word completes (`function_url`).
Their clients connect to addresses that have been judged, and strangers' names do not share a queue with names that the
operator wrote (network/lookups.py).
"""

from __future__ import annotations

from ..calls.callbacks import CallbackPolicy
from ..network.addresses import guard_functions
from ..network.lookups import by_origin, strangers_names, system_names
from ..watchdog import Client


class Connections:
    """Three HTTP clients and their resolvers.  Obligation: `close` at the end."""

    def __init__(self, policy: CallbackPolicy) -> None:
        self._names, self._strangers_names = system_names(), strangers_names()
        self.to_functions = Client(self._names)
        self.to_found_functions = Client(guard_functions(self._strangers_names))
        callback_names = by_origin(policy.is_written_out, self._names, self._strangers_names)
        self.to_callbacks = Client(policy.guard(callback_names))

    async def close_idle(self) -> None:
        """Give back the descriptors of connections that carry nothing; new requests open new ones."""
        for client in (self.to_functions, self.to_found_functions, self.to_callbacks):
            await client.close()

    async def close(self) -> None:
        """Let go of everything."""
        await self.close_idle()
        await self._names.close()
        await self._strangers_names.close()
