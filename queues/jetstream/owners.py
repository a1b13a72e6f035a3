"""Who runs what, and is it alive: questions that workers answer for one another, outside of any stream.

The servers tell that a lease may have run out, by delivering its message again; they do not know whether its owner is
dead, hangs, or could not reach them.  So the owner is asked.  One that does not answer is taken for dead only if we
ourselves could be heard all the while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from ...calls.model import Kind, Lease, QueueUnavailable
from ...calls.steps import Hold
from .connection import TRY_S, Connection, parse_status, queue_error
from .flows import Delivery
from .records import Standing

ASK_COUNT = 4  # questions within TRY_S to an owner
ANSWERS_S = 0.1  # of silence behind an answer, after which no more are awaited


@dataclass(slots=True)
class Held:
    """A lease of ours: the call as it was claimed, the message to acknowledge, until when it is good (loop's clock)."""

    standing: Standing
    delivery: Delivery
    kind: Kind
    owner: str
    until_s: float
    lease_s: float


class Owners:
    """The owners of this process, and what they hold; and how to ask others."""

    def __init__(self, connection: Connection) -> None:
        self.held: dict[int, Held] = {}  # by the lease's fence
        self.ending: set[int] = set()  # the fences of leases that are being ended here: what they meet is told there
        self.cancelled: set[str] = set()
        self.cancel = asyncio.Event()
        self._connection = connection
        self._names = connection.names
        self._loop = asyncio.get_running_loop()
        self._owners: dict[str, Subscription] = {}
        self._returned_s = float("-inf")  # when the connection came back
        connection.reporter.on_return.append(self._on_return)

    def __contains__(self, owner: str) -> bool:
        return owner in self._owners

    def _on_return(self) -> None:
        """The servers could not be reached for a while, to renew either: every lease has its whole time before it."""
        self._returned_s = self._loop.time()
        for held in self.held.values():
            held.until_s = max(held.until_s, self._loop.time() + held.lease_s)

    async def enlist(self, name: str) -> None:
        """Answer for an owner from now on.  QueueUnavailable if another process does."""
        try:
            at_work = await self._connection.with_retries(lambda _: self._ask(name, {}))
        except QueueUnavailable as error:
            raise QueueUnavailable(
                f"the owner {name} is there but does not answer, or NATS does not: {error}"
            ) from error
        if at_work is not None:
            raise QueueUnavailable(f"the owner {name} is at work already")
        if not self._owners:
            await self._connection.subscribe(self._names.subject("owners"), self._on_census)
        self._owners[name] = await self._connection.subscribe(self._names.owner(name), self._on_word)

    # -- answers

    async def _on_word(self, message: Msg) -> None:
        """Another process asks whether we live, whether we hold a call, or wants one of ours cancelled."""
        question = json.loads(message.data or b"{}")
        if "cancel" in question:
            self.cancelled.add(question["cancel"])
            self.cancel.set()
        elif "holds" in question:
            call_id, fence = question["holds"]
            held = self.find(call_id, fence)
            await message.respond(b"0" if held is None else str(held.until_s - self._loop.time()).encode())
        else:
            await message.respond(b"here")

    async def _on_census(self, message: Msg) -> None:
        now_s = self._loop.time()
        running = [
            held.standing.accepted for held in self.held.values() if held.kind == "call" and held.until_s > now_s
        ]
        await message.respond(json.dumps([[call.id, call.function, call.queue] for call in running]).encode())

    def find(self, call_id: str, fence: int) -> Held | None:
        """Return the lease of ours on a call that followed this revision, if it has not run out."""
        for held in self.held.values():
            hold = held.standing.record.hold
            if hold is not None and (held.standing.id, hold.fence) == (call_id, fence):
                return held if self._loop.time() < held.until_s else None
        return None

    # -- questions

    async def _ask(self, owner: str, question: Mapping[str, object]) -> bytes | None:
        """Return what an owner answers, or None: there is none.  Raises TimeoutError, NatsError.

        One that has just hung up may take a question with it, so it is asked again.
        """
        subject, data = self._names.owner(owner), json.dumps(question).encode()
        for number in range(ASK_COUNT):
            try:
                return (await self._connection.request(subject, data, TRY_S / ASK_COUNT)).data
            except NoRespondersError:
                return None
            except TimeoutError:
                if number == ASK_COUNT - 1:
                    raise
        raise AssertionError("the last try has returned or raised")

    async def ask_left_s(self, call_id: str, hold: Hold, lease_s: float) -> float | None:
        """How much longer the owner that a record names has its call; 0: not at all; None: that cannot be known now."""
        if hold.owner in self._owners:
            held = self.find(call_id, hold.fence)
            return 0.0 if held is None else held.until_s - self._loop.time()
        try:
            answer = await self._ask(hold.owner, {"holds": [call_id, hold.fence]})
        except TimeoutError:
            answer = None
        except NatsError:
            return None
        if answer is not None:
            return float(answer)
        quiet_s = self._loop.time() - max(self._returned_s, self._connection.troubled_s)
        return 0.0 if quiet_s > lease_s else None

    async def tell_cancel(self, call_id: str, hold: Hold) -> None:
        """Tell the owner of a call that its end is wanted; if the word is lost, it learns when it renews."""
        await self._connection.tell(self._names.owner(hold.owner), json.dumps({"cancel": call_id}).encode())

    async def census(self) -> list[tuple[str, str, str]]:
        """Return what all workers run: id, function and queue of each call."""
        found: dict[str, tuple[str, str, str]] = {}
        heard, is_alone = asyncio.Event(), False

        def on_answer(message: Msg) -> None:
            nonlocal is_alone
            is_alone = parse_status(message) == "503"
            for call_id, function, queue in json.loads(message.data) if message.data else ():
                found[call_id] = call_id, function, queue
            heard.set()

        inbox = self._connection.listen(on_answer)
        try:
            await self._connection.client.publish(self._names.subject("owners"), b"", inbox)
            wait_s = TRY_S  # another process listens, or the servers would have said that none does
            with contextlib.suppress(TimeoutError):
                while not is_alone:
                    async with asyncio.timeout(wait_s):
                        await heard.wait()
                    heard.clear()
                    wait_s = ANSWERS_S
        except NatsError as error:
            raise queue_error(error) from error
        finally:
            self._connection.unlisten(inbox)
        return list(found.values())

    # -- leases

    def get(self, lease: Lease) -> Held | None:
        """Return what is held by a lease, None if it has passed on."""
        held = self.held.get(lease.fence)
        return held if held is not None and held.owner == lease.owner else None

    def drop_lapsed(self) -> list[Held]:
        """Let go of the leases that were not renewed in time; return them."""
        lapsed = [fence for fence, held in self.held.items() if held.until_s <= self._loop.time()]
        return [self.held.pop(fence) for fence in lapsed]
