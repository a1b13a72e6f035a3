"""Where host names lead: look-ups that stop neither one another nor anything else, however long they take.

    resolve = system_names()                # for names that the operator wrote: functions' URLs, gateway_url
    resolve = strangers_names()             # for names from outside: callbacks, hosts that function_url completes
    resolve = by_origin(is_ours, system_names(), strangers_names())
    client = Client(resolve) ... await resolve.close()

Contract: a name is asked for once at a time, however many callers wait for it; waiting is bounded, and so is what runs
and what is remembered; an answer is remembered for a second (a restarted container has a new address), a failure for
two.  The two kinds share no queue.

    system      getaddrinfo(3), each in a thread of its own: whatever nsswitch.conf says, /etc/hosts and mDNS included.
                Such a thread cannot be stopped, and a dead DNS server holds it for ten seconds and more for each name.
                So there is room for more of them than an operator has names.  It must not be the loop's own
                getaddrinfo: libuv lets two of them run at once, and those two stop all others.
    strangers   c-ares (aiodns), which has any number of questions under way at once and reads /etc/hosts, resolv.conf
                and the line `hosts:` of nsswitch.conf, but knows no other sources than files and DNS.  With threads a
                stranger would need as many dead names as there are threads to stop all callbacks.

What it refuses to do: judge addresses (addresses.py), keep an answer for as long as DNS would allow.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ..watchdog import Address, Resolver, Unreachable, Url, format_duration, reason_of
from .addresses import parse_literal

ANSWER_AGE_S = 1.0


FAILURE_AGE_S = 2.0


REMEMBERED_COUNT = 1024  # names


SYSTEM_WAIT_S = 8.0  # the C library asks a second DNS server after 5


SYSTEM_COUNT = 64  # threads, of which each takes some ten KiB


STRANGERS_WAIT_S = 5.0


STRANGERS_COUNT = 512  # more names at once than a worker has callbacks under way


DNS_TIMEOUT_S = 1.0  # for the first answer of one server; doubled in the second round through all of them


DNS_TRIES_COUNT = 2


Answer = Sequence[Address] | str  # what was found, or the reason why nothing was


class Source(Protocol):
    """What knows where names lead."""

    def ask(self, host: str) -> Awaitable[Answer]:
        """Return where `host` leads.  It ends some time by itself, and is never cancelled."""

    async def close(self) -> None:
        """Let go of everything; what still runs has no effect any more."""


@dataclass(slots=True)
class _Lookup:
    task: asyncio.Task[Answer]
    started_s: float
    ended_s: float = 0.0


class Lookups:
    """A resolver over `source`: one look-up a name at a time, at most `limit_count` at once, none awaited for longer
    than `wait_s`.

    Raises Unreachable, which names the host and the reason.  Obligation: `close` at the end.
    """

    def __init__(self, source: Source, wait_s: float, limit_count: int) -> None:
        self._source = source
        self._wait_s = wait_s
        self._limit_count = limit_count
        self._running: dict[str, _Lookup] = {}
        self._ended: OrderedDict[str, _Lookup] = OrderedDict()

    async def __call__(self, url: Url) -> Sequence[Address]:
        """Return every address of the host of `url`, an address's own without a look-up."""
        literal = parse_literal(url.host)
        if literal is not None:
            return [(socket.AF_INET if literal.version == 4 else socket.AF_INET6, str(literal))]
        now_s = asyncio.get_running_loop().time()
        lookup = self._running.get(url.host) or self._remembered(url.host, now_s) or self._start(url.host, now_s)
        # One that is late already is not waited for again: the next caller's time is as good as the first one's.
        await asyncio.wait((lookup.task,), timeout=max(lookup.started_s + self._wait_s - now_s, 0.0))
        if not lookup.task.done():
            raise Unreachable(f"cannot resolve {url.host}: no answer within {format_duration(self._wait_s)}")
        answer = lookup.task.result()
        if isinstance(answer, str):
            raise Unreachable(f"cannot resolve {url.host}: {answer}")
        return answer

    def _remembered(self, host: str, now_s: float) -> _Lookup | None:
        lookup = self._ended.get(host)
        if lookup is None:
            return None
        age_limit_s = FAILURE_AGE_S if isinstance(lookup.task.result(), str) else ANSWER_AGE_S
        return lookup if now_s - lookup.ended_s < age_limit_s else None

    def _start(self, host: str, now_s: float) -> _Lookup:
        if len(self._running) >= self._limit_count:
            raise Unreachable(f"cannot resolve {host}: {self._limit_count} other names are being looked up")
        lookup = _Lookup(asyncio.create_task(self._ask(host)), now_s)
        self._running[host] = lookup
        return lookup

    async def _ask(self, host: str) -> Answer:
        try:
            return await self._source.ask(host)
        finally:
            lookup = self._running.pop(host)
            lookup.ended_s = asyncio.get_running_loop().time()
            self._ended[host] = lookup
            self._ended.move_to_end(host)
            if len(self._ended) > REMEMBERED_COUNT:
                self._ended.popitem(last=False)

    async def close(self) -> None:
        """Wait for nothing that still runs."""
        for lookup in self._running.values():
            lookup.task.cancel()
        await self._source.close()


class SystemSource:
    """The C library's look-up, in a thread of its own for each."""

    def ask(self, host: str) -> Awaitable[Answer]:
        """See Source."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Answer] = loop.create_future()

        def settle(answer: Answer) -> None:
            if not found.done():
                found.set_result(answer)

        def look_up() -> None:
            answer = _ask_system(host)
            with suppress(RuntimeError):  # the loop is closed: the program has ended meanwhile
                loop.call_soon_threadsafe(settle, answer)

        try:
            threading.Thread(target=look_up, daemon=True).start()  # the end of the program does not wait for it
        except RuntimeError as error:  # no more threads
            settle(str(error))
        return found

    async def close(self) -> None:
        """See Source."""


def _ask_system(host: str) -> Answer:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:
        return "it cannot be the name of a host"
    except OSError as error:
        return reason_of(error)
    return [(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found]


class DnsSource:
    """c-ares's look-up."""

    def __init__(self) -> None:
        self._aiodns: Any = None
        self._resolver: Any = None

    async def ask(self, host: str) -> Answer:
        """See Source."""
        if self._resolver is None:  # loading it takes 15 ms, and most gateways and many workers never need it
            self._aiodns = await asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "aiodns")
            self._resolver = self._aiodns.DNSResolver(timeout=DNS_TIMEOUT_S, tries=DNS_TRIES_COUNT)
        try:
            found = await self._resolver.getaddrinfo(host, socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except self._aiodns.error.DNSError as error:
            return str(error.args[1])
        return [(socket.AddressFamily(node.family), node.addr[0].decode()) for node in found.nodes]

    async def close(self) -> None:
        """See Source."""
        if self._resolver is not None:
            await self._resolver.close()


def system_names() -> Lookups:
    """Return the resolver for names that the operator wrote."""
    return Lookups(SystemSource(), SYSTEM_WAIT_S, SYSTEM_COUNT)


def strangers_names() -> Lookups:
    """Return the resolver for names that come from outside, whole or in part."""
    return Lookups(DnsSource(), STRANGERS_WAIT_S, STRANGERS_COUNT)


def by_origin(is_ours: Callable[[Url], bool], ours: Resolver, strangers: Resolver) -> Resolver:
    """Return a resolver that asks `ours` for the URLs that `is_ours` knows, `strangers` for all others."""
    return lambda url: (ours if is_ours(url) else strangers)(url)
