"""What a worker knows of functions: the gateway is asked, and what it says is kept for some seconds.

    functions = KnownFunctions(client, gateway, RetryPolicy(), direct=True)
    known = await functions.get(call.function)
    known.policy, known.upstream              # how it is retried, and where it answers (None: ask at the gateway)
    functions.on_unreachable(call.function)   # nothing answers there: the gateway's way for a while
    functions.on_direct_call(call.function)   # the gateway has not seen it, and is told with the next question
    functions.capacities()                    # none for each function that is disabled: its calls wait

Contract: it never fails.  While the gateway cannot tell, its last word holds, except for a function that ends with its
gateway; before there is a word it is the worker's own policy, and no address.  An address of loopback means something
only where gateway and worker share a network (network/machine.py); anywhere else it is not taken.  What it refuses: to
remember more than MAX_KNOWN_COUNT functions, since callers can make up names.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..calls.names import FunctionName
from ..calls.retries import RetryPolicy, parse_annotations, policy_for
from ..functions.documents import parse_document
from ..functions.exposure import parse_exposure
from ..functions.table import parse_upstream
from ..network.addresses import parse_literal
from ..network.machine import network_identity
from ..watchdog import Client, FaashoundError, Url, log
from .gateway_access import DIRECT_CALLS, GatewayAccess

KEPT_S = 5.0  # how long the gateway's word, or its silence, is believed before it is asked again
UNREACHABLE_S = 30.0  # how long an address at which nothing answered is not tried again
DESCRIPTION_TIMEOUT_S = 5.0
DESCRIPTION_BYTES = 16 << 20  # one of 2 MiB may be deployed, and is told up to three times as long: ж in 6 bytes, not 2
MAX_KNOWN_COUNT = 1000


@dataclass(frozen=True, slots=True)
class KnownAddress:
    """Where a function answers.

    `is_guarded`: a caller's word completes the host, so its address is judged before each connection.  `ends_with_
    gateway`: it is run by the gateway, and a stale address may be another's.
    """

    url: Url
    is_guarded: bool = False
    ends_with_gateway: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one function; `asked_s` is when the gateway was asked last (monotonic)."""

    policy: RetryPolicy
    upstream: KnownAddress | None = None
    is_disabled: bool = False
    asked_s: float = float("-inf")
    avoided: Url | None = None
    avoided_until_s: float = float("-inf")
    trouble: str = ""  # of the last question, which has been told

    def usable(self, now_s: float) -> Known:
        """Return the same without an address that is avoided now."""
        is_avoided = self.upstream is not None and self.upstream.url == self.avoided and now_s < self.avoided_until_s
        return dataclasses.replace(self, upstream=None) if is_avoided else self


class KnownFunctions:
    """The policies and addresses of functions; `direct`: whether addresses are wanted."""

    def __init__(self, client: Client, gateway: GatewayAccess, base: RetryPolicy, *, direct: bool) -> None:
        self._client = client
        self.gateway = gateway
        self._direct = direct
        self._unknown = Known(base)
        self._known: OrderedDict[FunctionName, Known] = OrderedDict()
        self._asking: dict[FunctionName, asyncio.Task[Known]] = {}
        self._untold: Counter[FunctionName] = Counter()
        self._disabled: set[FunctionName] = set()
        self.on_enabled: Callable[[], None] = lambda: None  # calls wait no longer

    async def get(self, function: FunctionName) -> Known:
        """Return what is known of `function`, which may cost a question to the gateway."""
        now_s = time.monotonic()
        known = self._known.get(function)
        if known is None or now_s - known.asked_s >= KEPT_S:
            known = await self._ask_once(function)
        return known.usable(now_s)

    def on_unreachable(self, function: FunctionName) -> None:
        """Nothing answers at the address: ask for it again, and meanwhile do without it."""
        known = self._known.get(function)
        if known is not None and known.upstream is not None:
            until_s = time.monotonic() + UNREACHABLE_S
            self._known[function] = dataclasses.replace(
                known, asked_s=float("-inf"), avoided=known.upstream.url, avoided_until_s=until_s
            )

    def on_direct_call(self, function: FunctionName) -> None:
        """A call was made of which the gateway, which counts each function's, knows nothing."""
        self._untold[function] += 1

    def capacities(self) -> dict[str, int]:
        """Return how many more calls each function may get that is known to be disabled."""
        return dict.fromkeys(self._disabled, 0)

    async def keep_telling(self) -> None:
        """Tell the gateway of direct calls, and ask about disabled functions, from time to time, for ever."""
        while True:
            await asyncio.sleep(KEPT_S)
            await self.tell()

    async def tell(self) -> None:
        """Tell the gateway of the direct calls that it does not know of; ask whether a disabled function is enabled."""
        before = set(self._disabled)
        await asyncio.gather(*map(self._ask_once, before.union(self._untold)))
        if not before <= self._disabled:
            self.on_enabled()

    async def _ask_once(self, function: FunctionName) -> Known:
        """Ask, with one question for all calls that want the answer."""
        task = self._asking.get(function)
        if task is None:
            task = self._asking[function] = asyncio.create_task(self._ask(function))
            task.add_done_callback(lambda _: self._asking.pop(function, None))
        return await asyncio.shield(task)

    async def _ask(self, function: FunctionName) -> Known:
        asked_s, before, trouble = time.monotonic(), self._known.get(function, self._unknown), ""
        try:
            told = await self._description(function)
            annotations = annotations_of(told)
            policy = policy_for(self._unknown.policy, parse_annotations(function, annotations))
            is_disabled = parse_exposure(annotations).is_disabled
            upstream = parse_told_upstream(told) if self._direct else None
        except (FaashoundError, ValueError) as error:
            trouble = str(error)
            if trouble != before.trouble:
                log.warning(f"the gateway does not tell of {function}: {trouble}")
            policy, upstream, is_disabled = before.policy, before.upstream, before.is_disabled
            if upstream is not None and upstream.ends_with_gateway:
                upstream = None
        known = dataclasses.replace(
            self._known.get(function, before),  # which address is avoided may have been learnt meanwhile
            policy=policy,
            upstream=upstream,
            is_disabled=is_disabled,
            asked_s=asked_s,
            trouble=trouble,
        )
        self._keep(function, known)
        return known

    def _keep(self, function: FunctionName, known: Known) -> None:
        self._known[function] = known
        self._known.move_to_end(function)
        (self._disabled.add if known.is_disabled else self._disabled.discard)(function)
        if len(self._known) > MAX_KNOWN_COUNT:
            oldest, _ = self._known.popitem(last=False)
            self._disabled.discard(oldest)

    async def _description(self, function: FunctionName) -> Mapping[str, Any]:
        url, deadline_s = self.gateway.description_url(function), time.monotonic() + DESCRIPTION_TIMEOUT_S
        direct_count = self._untold.pop(function, 0)
        headers = [self.gateway.token_field, (DIRECT_CALLS, b"%d" % direct_count)]
        try:
            async with await self._client.request("GET", url, headers, deadline_s=deadline_s) as response:
                body = await response.body.read(DESCRIPTION_BYTES)
            if response.status not in (200, 404):
                raise FaashoundError(f"the gateway answers {response.status}")
        except FaashoundError:
            if direct_count:  # a key alone would have it asked for ever
                self._untold[function] += direct_count
            raise
        if response.status == 404:
            return {}
        told = parse_document(body)
        return told if isinstance(told, dict) else {}


def annotations_of(told: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the annotations in the gateway's description of a function."""
    found = told.get("annotations")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def parse_told_upstream(told: Mapping[str, Any]) -> KnownAddress | None:
    """Return where a function answers by the gateway's description of it; None if it does not say, or not to us."""
    found = told.get("upstream")
    if not isinstance(found, dict):
        return None
    try:
        url = parse_upstream(str(found.get("url")))
    except ValueError:  # what a later gateway may know, and this worker does not
        return None
    literal = parse_literal(url.host)
    is_inner = bool(told.get("local")) or url.host == "localhost" or (literal is not None and literal.is_loopback)
    if is_inner and found.get("network") != network_identity():
        return None
    return KnownAddress(url, found.get("guarded") is not False, bool(told.get("local")))
