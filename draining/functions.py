"""What a worker knows of functions: the gateway is asked, and what it says is kept for a while.

    functions = KnownFunctions(client, gateway, RetryPolicy())
    policy = await functions.policy(call.function)

Contract: it never fails.  While the gateway cannot tell, its last word holds, and before there is one the worker's own
policy.  What it refuses: to remember more than MAX_KNOWN_COUNT functions, since callers can make up names.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Mapping

from ..calls.names import FunctionName
from ..calls.retries import RetryPolicy, parse_annotations, policy_for
from ..watchdog import Client, FaashoundError, log
from .gateway import GatewayAccess

ANNOTATIONS_KEPT_S = 30.0  # how long a function's annotations are believed before the gateway is asked again
DESCRIPTION_TIMEOUT_S = 5.0
DESCRIPTION_BYTES = 1 << 20
MAX_KNOWN_COUNT = 1000


class KnownFunctions:
    """The retry policies of functions, asked of the gateway and remembered for a while."""

    def __init__(self, client: Client, gateway: GatewayAccess, base: RetryPolicy) -> None:
        self._client = client
        self._gateway = gateway
        self._base = base
        self._known: OrderedDict[FunctionName, tuple[float, RetryPolicy]] = OrderedDict()

    async def policy(self, function: FunctionName) -> RetryPolicy:
        """Return the policy of `function`: the last one known, or the worker's own, when the gateway cannot tell."""
        now_s = time.monotonic()
        asked_s, policy = self._known.get(function, (float("-inf"), self._base))
        if now_s - asked_s < ANNOTATIONS_KEPT_S:
            return policy
        try:
            policy = policy_for(self._base, parse_annotations(function, await self._ask(function)))
        except (FaashoundError, ValueError) as error:
            log.warning(f"the annotations of {function} are not to be had: {error}")
        else:
            self._known[function] = (now_s, policy)
            self._known.move_to_end(function)
            if len(self._known) > MAX_KNOWN_COUNT:
                self._known.popitem(last=False)
        return policy

    async def _ask(self, function: FunctionName) -> Mapping[str, str]:
        url, deadline_s = self._gateway.description_url(function), time.monotonic() + DESCRIPTION_TIMEOUT_S
        headers = [self._gateway.token_field]
        async with await self._client.request("GET", url, headers, deadline_s=deadline_s) as response:
            body = await response.body.read(DESCRIPTION_BYTES)
        if response.status == 404:
            return {}
        if response.status != 200:
            raise FaashoundError(f"the gateway answers {response.status}")
        answer = json.loads(body)
        found = answer.get("annotations") if isinstance(answer, dict) else None
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
