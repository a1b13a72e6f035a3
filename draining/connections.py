"""The connections of a worker: to the gateway and to functions, and apart from them those of callbacks.

Callbacks go where strangers say.  Their client connects to addresses that the policy has judged, and strangers' names
do not share a queue with names that the operator wrote (network/lookups.py).
"""

from __future__ import annotations

from ..calls.callbacks import CallbackPolicy
from ..network.lookups import by_origin, strangers_names, system_names
from ..watchdog import Client


class Connections:
    """Two HTTP clients and their resolvers.  Obligation: `close` at the end."""

    def __init__(self, policy: CallbackPolicy) -> None:
        self._names, self._strangers_names = system_names(), strangers_names()
        self.to_functions = Client(self._names)
        callback_names = by_origin(policy.is_written_out, self._names, self._strangers_names)
        self.to_callbacks = Client(policy.guard(callback_names))

    async def close_idle(self) -> None:
        """Give back the descriptors of connections that carry nothing; new requests open new ones."""
        await self.to_functions.close()
        await self.to_callbacks.close()

    async def close(self) -> None:
        """Let go of everything."""
        await self.close_idle()
        await self._names.close()
        await self._strangers_names.close()
