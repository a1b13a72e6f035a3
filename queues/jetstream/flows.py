"""The way out of the queue: a consumer a flow, pulled in turns.

A flow is the calls of one function, or the callbacks to one destination, in one queue.  The servers keep each flow's
order, its leases and its delays, by a durable consumer; we only choose from which to take.  That there is a flow is a
message of its own, written by the first process that puts something into it, so the workers need no list of functions.

How turns are taken.  `fetch` goes round the flows, beginning behind the one that was served last, and asks as many as
it has room for, each for its share, without waiting.  A flow that has nothing is *watched*: one request for one message
stays with the servers for WATCH_S, and while it does the flow need not be asked again.  So a worker that is busy with
one function learns of a call of another at once, and an idle one sends a request a flow every WATCH_S.  What comes in
waits here, in the flow's stash, and goes back to the servers if it is not taken within STASH_S: we have no room.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from ...calls.model import QueueFull, QueueUnavailable, TooManyQueued
from ...watchdog import Trouble, log
from .connection import TRY_S, Connection, Write, parse_status
from .subjects import TIMERS, FlowKind, FlowName, Names, parse_token

WATCH_S = 3.0  # that a request for the next message stays with the servers
AHEAD_S = 0.1  # between two claims of a worker for which it is worth to ask in advance
AHEAD_COUNT = 256  # messages that a flow has to have besides, so that no other worker lacks what waits here
STASH_S = 0.5  # that a message waits here for a claim
ANNOUNCED_S = 600.0  # after which a flow is announced again by those who put into it
IDLE_S = 3600.0  # after which the servers may forget the consumer of a flow that no worker asks for
LOOK_S = 30.0  # longest wait without a look for flows that are new: bounds the harm of a word that was lost
FLOWS_KNOWN_COUNT = 10_000  # flows that this process remembers to have announced
MAX_FLOWS_COUNT = 10_000  # functions and destinations at once: callers can make up both, and each is a consumer
WHOLE_S = 3600.0  # between two looks at all flows, which find those that are no more
CROWDED_S = 60.0  # the same, while there are as many as may be
LOOK_LEASE_S = 60.0  # of a message that is only looked at
MAX_DELAY_S = 600.0  # longest delay that is asked of the servers at once: our clock may be wrong now, and right later
MIN_LEASE_S = 1.0  # shortest time after which the servers deliver again what has not been acknowledged

KINDS: tuple[FlowKind, ...] = ("call", "callback", "timer")
DUE_HEADER = "Faashound-Due"
_NS = 1_000_000_000


@dataclass(eq=False, slots=True)
class Delivery:
    """A message that was delivered to us, for the time number `count`; `more_count` stand behind it in its flow."""

    flow: Flow
    call_id: str
    due_s: float
    reply: str
    data: bytes
    headers: Mapping[str, str]
    revision: int
    count: int
    more_count: int


@dataclass(eq=False, slots=True)
class Flow:
    """What this process knows of a flow."""

    name: FlowName
    consumer: str
    lease_s: float | None = None  # of the consumer; None: to be made, or made again
    stash: list[Delivery] = field(default_factory=list)
    polls: list[Callable[[], None]] = field(default_factory=list)  # told of each message
    acked: str = ""  # the last message that was acknowledged
    watched: bool = False
    trouble: Trouble = field(default_factory=lambda: Trouble(log.error))  # why it cannot be asked


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much a claim may take: from which queues, how many in all, and how many of each name in `capacity`."""

    kind: FlowKind
    queues: tuple[str, ...]
    limit: int
    capacity: Mapping[str, int]
    lease_s: float


def parse_delivery(flow: Flow, message: Msg) -> Delivery:
    """Return what a pull has brought; the subject to answer to tells the rest."""
    tokens = message.reply.split(".")
    first = 4 if len(tokens) == 9 else 6  # with a domain and an account's hash in front
    count, revision, _, _, more_count = map(int, tokens[first : first + 5])
    headers = message.headers or {}
    call_id = parse_token(message.subject.split(".")[2])
    due_s = float(headers.get(DUE_HEADER, 0.0))
    return Delivery(flow, call_id, due_s, message.reply, message.data, headers, revision, count, more_count)


def _turn_of(delivery: Delivery) -> tuple[float, str]:
    return delivery.due_s, delivery.call_id


def deal(ring: Iterable[Flow], wanted: Wanted, left: dict[str, int], count: int) -> list[Delivery]:
    """Take up to `count` messages from the stashes, in turns; `left` is the capacity of names, and shrinks."""
    taken: list[Delivery] = []
    flows = [flow for flow in ring if flow.stash]
    while flows and len(taken) < count:
        for flow in flows:
            if len(taken) < count and flow.stash and left.get(flow.name.name, 1) > 0:
                taken.append(flow.stash.pop(0))
                if flow.name.name in left:
                    left[flow.name.name] -= 1  # one name in two queues shares one capacity
        flows = [flow for flow in flows if flow.stash and left.get(flow.name.name, 1) > 0]
    return taken


def tell_trouble(failed: Mapping[Flow, Exception]) -> None:
    """Log which flows cannot be asked, each once while its trouble lasts."""
    for flow, error in failed.items():
        flow.trouble.tell(f"what waits for {flow.name.name} in the queue {flow.name.queue} cannot be fetched: {error}")


class Flows:
    """The flows that are known, what was delivered of them and has not been claimed, and who is next."""

    def __init__(self, connection: Connection) -> None:
        self.arrived = asyncio.Event()
        self._connection = connection
        self._names: Names = connection.names
        self._loop = asyncio.get_running_loop()
        self._by_consumer: dict[str, Flow] = {}
        self._flows: dict[FlowName, Flow] = {TIMERS: Flow(TIMERS, self._names.consumer(TIMERS))}
        self._order: list[Flow] | None = None
        self._revision = 0  # of the newest flow that was read
        self._whole_s = self._loop.time()  # when all were read
        self._lost: set[FlowName] = set()  # that were known then, and have not been read since
        self._announced: dict[FlowName, float] = {}
        self._last: dict[FlowKind, tuple[str, str]] = dict.fromkeys(KINDS, ("", ""))
        self._wanted: dict[FlowKind, Wanted] = {}  # what was last claimed
        self._ahead: dict[FlowKind, asyncio.Future[list[bool | BaseException]]] = {}  # what is asked for in advance
        self._fetched_s: dict[FlowKind, float] = {}
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Hear of new flows from now on."""
        self._connection.on_pulled = self._on_pulled
        self._connection.reporter.on_return.append(lambda: self._do(self._catch_up()))
        await self._connection.subscribe(self._names.flows, self._on_announced)

    async def close(self) -> None:
        """Give back what no claim has taken."""
        self._closed = True
        for flow in list(self._flows.values()):
            stash, flow.stash[:] = list(flow.stash), []
            for delivery in stash:
                await self.nak(delivery)

    # -- which flows there are

    async def check_room(self, names: Iterable[FlowName]) -> None:
        """Raise TooManyQueued if one of `names` would be a flow more than there may be."""
        if len(self._flows) < MAX_FLOWS_COUNT:
            return
        new = [name for name in names if name not in self._flows]
        if new:
            await self.refresh(is_crowded=True)
            new = [name for name in new if name not in self._flows]
        if new and len(self._flows) >= MAX_FLOWS_COUNT:
            raise TooManyQueued(
                f"{len(self._flows)} functions and destinations have calls waiting, or had them within a day, and"
                f" {new[0].name} is none of them; that is the limit"
            )

    async def announce(self, name: FlowName) -> None:
        """Say that there is a flow, before something is put into it."""
        now_s = self._loop.time()
        if now_s - self._announced.get(name, float("-inf")) < ANNOUNCED_S:
            return
        await self._connection.publish(Write(self._names.flow(name), b""))
        if len(self._announced) >= FLOWS_KNOWN_COUNT:
            self._announced.clear()
        self._announced[name] = now_s
        self._learn(name)

    async def _on_announced(self, message: Msg) -> None:
        self._learn(self._names.parse_flow(message.subject))

    def _learn(self, name: FlowName) -> None:
        self._lost.discard(name)
        if name not in self._flows:
            self._flows[name] = Flow(name, self._names.consumer(name))
            self._order = None
            self.arrived.set()

    async def refresh(self, *, is_crowded: bool = False) -> list[FlowName]:
        """Read which flows are new, now and then which there are at all; return all."""
        now_s, is_whole = self._loop.time(), False
        if now_s - self._whole_s >= (CROWDED_S if is_crowded else WHOLE_S):
            self._whole_s, self._revision = now_s, 0  # from the beginning: a server may be behind what we had read
            is_whole, self._lost = True, self._flows.keys() - {TIMERS}
        async for stored in self._connection.walk(self._names.flows, self._revision + 1):
            name = self._names.parse_flow(stored.subject)
            self._learn(name)
            self._revision = max(self._revision, stored.revision)
        if is_whole:
            for name in self._lost:
                self._forget(name)
            self._lost = set()
        return list(self._flows)

    def _forget(self, name: FlowName) -> None:
        """Ask for a flow no more, unless something of it is here."""
        flow = self._flows.get(name)
        if flow is not None and not flow.stash:
            del self._flows[name]
            self._by_consumer.pop(flow.consumer, None)
            self._order = None

    async def _catch_up(self) -> None:
        """Learn of the flows that were announced while the servers could not be reached."""
        with contextlib.suppress(QueueUnavailable, QueueFull):
            await self.refresh()

    async def forget_idle(self, before_s: float) -> None:
        """Remove the flows into which no call was put since `before_s` and that have nothing."""
        async for stored in self._connection.walk(self._names.flows):
            name = self._names.parse_flow(stored.subject)
            if stored.stored_s < before_s and not await self._connection.count(self._names.filter(name)):
                await self._connection.erase(self._names.records, stored.revision)
                self._forget(name)

    # -- taking

    async def fetch(self, wanted: Wanted) -> list[Delivery]:
        """Return up to `limit` messages, in turns between flows; fewer only if there are no more.

        A flow that cannot be asked keeps no other from its turn; QueueUnavailable or QueueFull if none has anything.
        """
        if wanted.kind != "timer":
            self._wanted[wanted.kind] = wanted
        ahead = self._ahead.pop(wanted.kind, None)
        if ahead is not None:
            await ahead
        taken: list[Delivery] = []
        try:
            await self._fill(taken, wanted)
        except BaseException:
            self._put_back(taken)
            raise
        return taken

    async def _fill(self, taken: list[Delivery], wanted: Wanted) -> None:
        left = dict(wanted.capacity)
        taken += deal(self._ring(wanted), wanted, left, wanted.limit)
        dry: set[Flow] = set()
        failed: dict[Flow, Exception] = {}
        looked_again = False
        while len(taken) < wanted.limit:
            ring = [flow for flow in self._ring(wanted, left) if flow not in dry and not flow.watched]
            if not ring:
                if taken or looked_again:
                    break
                looked_again = True
                await self._look_again(wanted, left, dry, failed)
            else:
                need = wanted.limit - len(taken)
                share = -(-need // len(ring))
                asked = ring[:need]
                counts = {flow: min(share, left.get(flow.name.name, share)) for flow in asked}
                dry |= await self._poll_all(counts, wanted.lease_s, failed)
            taken += deal(self._ring(wanted), wanted, left, wanted.limit - len(taken))
        if taken:
            self._last[wanted.kind] = taken[-1].flow.name.queue, taken[-1].flow.name.name
        for flow in dry:
            await self._watch(flow)
        self._look_ahead(wanted, taken)
        if not any(flow.stash for flow in self._flows.values()):
            self.arrived.clear()
        if failed and not taken:
            raise next(iter(failed.values()))
        tell_trouble(failed)

    def _put_back(self, taken: Iterable[Delivery]) -> None:
        """What was taken out of the stashes waits there once more: its fetch comes to nothing."""
        for delivery in taken:
            self._keep(delivery)
            delivery.flow.stash.sort(key=_turn_of)

    def _look_ahead(self, wanted: Wanted, taken: Sequence[Delivery]) -> None:
        """A worker that comes for more all the time: ask in advance, while it works, where there is a backlog."""
        now_s = self._loop.time()
        last_s = self._fetched_s.get(wanted.kind, float("-inf"))
        self._fetched_s[wanted.kind] = now_s
        if len(taken) < wanted.limit or now_s - last_s > AHEAD_S:
            return
        flows = {each.flow for each in taken if each.more_count > AHEAD_COUNT and not each.flow.stash}
        polls = [self._poll(flow, -(-wanted.limit // len(flows)), wanted.lease_s) for flow in flows]
        if polls:
            self._ahead[wanted.kind] = asyncio.gather(*polls, return_exceptions=True)

    async def _look_again(
        self, wanted: Wanted, left: Mapping[str, int], dry: set[Flow], failed: dict[Flow, Exception]
    ) -> None:
        """Nothing was found: look for flows that are new, and ask all once more, also those that are watched.

        An answer comes behind what has been delivered to the watcher; and the servers may have acknowledged a message
        a moment before its consumer knows of it.
        """
        await self.refresh()
        ring = self._ring(wanted, left)
        found = await self._poll_all(dict.fromkeys(ring, 1), wanted.lease_s, failed)
        for flow in ring:
            (dry.add if flow in found and not flow.stash else dry.discard)(flow)

    def _ring(self, wanted: Wanted, left: Mapping[str, int] | None = None) -> list[Flow]:
        """The flows that may be served, beginning behind the one that was served last."""
        if self._order is None:
            self._order = sorted(self._flows.values(), key=lambda flow: (flow.name.queue, flow.name.name))
        capacity = wanted.capacity if left is None else left
        flows = [
            flow
            for flow in self._order
            if flow.name.kind == wanted.kind
            and flow.name.queue in wanted.queues
            and capacity.get(flow.name.name, 1) > 0
        ]
        last = self._last[wanted.kind]
        after = [flow for flow in flows if (flow.name.queue, flow.name.name) > last]
        return after + flows[: len(flows) - len(after)]

    async def _poll_all(self, counts: Mapping[Flow, int], lease_s: float, failed: dict[Flow, Exception]) -> set[Flow]:
        """Ask flows for so many messages each; return those that had fewer, and those that have `failed`."""
        polls = (self._poll(flow, count, lease_s) for flow, count in counts.items())
        outcomes = await asyncio.gather(*polls, return_exceptions=True)
        dry: set[Flow] = set()
        for flow, outcome in zip(counts, outcomes, strict=True):
            if isinstance(outcome, QueueUnavailable | QueueFull):
                failed[flow] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                flow.trouble.over()
                failed.pop(flow, None)
            if outcome:
                dry.add(flow)
        return dry

    async def _poll(self, flow: Flow, count: int, lease_s: float) -> bool:
        """Ask for up to `count` messages that are there now; tell whether there were fewer."""
        is_new = flow.lease_s is None
        if is_new:
            await self._ensure(flow, lease_s)
        is_dry = await self._poll_once(flow, count)
        if flow.lease_s is None and not is_new:  # the servers had forgotten the consumer
            return await self._poll(flow, count, lease_s)
        return is_dry

    async def _poll_once(self, flow: Flow, count: int) -> bool:
        ended: asyncio.Future[str | None] = self._loop.create_future()
        received = 0

        def end(status: str | None) -> None:
            if not ended.done():
                ended.set_result(status)

        def on_message() -> None:
            nonlocal received
            received += 1
            if received >= count:
                end(None)

        inbox = self._connection.listen(lambda message: end(parse_status(message)))
        flow.polls.append(on_message)
        timer = self._loop.call_later(TRY_S, end, "408")
        try:
            await self._ask(flow, inbox, {"batch": count, "no_wait": True})
            self._note(flow, await ended)
        finally:
            timer.cancel()
            flow.polls.remove(on_message)
            self._connection.unlisten(inbox)
        flow.stash.sort(key=_turn_of)
        return received < count

    async def _watch(self, flow: Flow) -> None:
        """Leave a request for the next message with the servers."""
        if flow.watched or flow.stash or flow.lease_s is None or self._closed:
            return
        flow.watched = True

        def end(status: str | None) -> None:
            self._note(flow, status)
            self._connection.unlisten(inbox)
            timer.cancel()
            flow.watched = False

        inbox = self._connection.listen(lambda message: end(parse_status(message)))
        timer = self._loop.call_later(WATCH_S + 1, end, None)
        await self._ask(flow, inbox, {"batch": 1, "expires": int(WATCH_S * _NS)})

    async def _ask(self, flow: Flow, inbox: str, question: Mapping[str, object]) -> None:
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._names.queue}.{flow.consumer}"
        await self._connection.tell(subject, json.dumps(question).encode(), inbox)

    def _note(self, flow: Flow, status: str | None) -> None:
        if status in ("409", "503"):  # the consumer is gone, or has no leader now
            flow.lease_s = None

    async def _ensure(self, flow: Flow, lease_s: float) -> None:
        """Make the consumer of a flow, or see that it is there; the shortest lease of all workers decides."""
        self._by_consumer[flow.consumer] = flow
        lease_s = max(lease_s, MIN_LEASE_S)
        stream = self._names.queue
        with contextlib.suppress(NotFoundError):
            found = await self._connection.insist(f"CONSUMER.INFO.{stream}.{flow.consumer}")
            if found["config"]["ack_wait"] <= int(lease_s * _NS):
                flow.lease_s = found["config"]["ack_wait"] / _NS
                return
        config = {
            "name": flow.consumer,
            "durable_name": flow.consumer,
            "filter_subject": self._names.filter(flow.name),
            "ack_policy": "explicit",
            "ack_wait": int(lease_s * _NS),
            "max_deliver": -1,
            "mem_storage": True,  # what a restart of all servers forgets is delivered again, and its record decides
            "max_ack_pending": -1,  # what is delayed counts
            "max_waiting": 8192,
            "inactive_threshold": int(IDLE_S * _NS),
        }
        operation = f"CONSUMER.CREATE.{stream}.{flow.consumer}.{config['filter_subject']}"
        try:
            await self._connection.insist(operation, {"stream_name": stream, "action": "", "config": config})
        except NotFoundError as error:
            raise QueueUnavailable(f"the stream {stream} is gone") from error
        flow.lease_s = lease_s

    def _on_pulled(self, message: Msg) -> None:
        tokens = message.reply.split(".")
        flow = self._by_consumer.get(tokens[3 if len(tokens) == 9 else 5])
        if flow is None:  # it was forgotten while we asked, and is there again
            self._do(self._connection.tell(message.reply, b"-NAK"))
            return
        self._keep(parse_delivery(flow, message))
        flow.watched = False  # by this message, unless it has come by a poll: then the next look asks once more
        for told in flow.polls:
            told()

    def _keep(self, delivery: Delivery) -> None:
        delivery.flow.stash.append(delivery)
        self.arrived.set()
        self._loop.call_later(STASH_S, self._give_back, delivery)

    def _give_back(self, delivery: Delivery) -> None:
        if delivery in delivery.flow.stash and not self._closed:
            delivery.flow.stash.remove(delivery)
            self._do(self.nak(delivery))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin something whose end nothing waits for."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- waiting

    async def wait(self, timeout_s: float) -> bool:
        """True when something has come that was not there before.  False after `timeout_s`, or when a look is due."""
        deadline_s = self._loop.time() + min(timeout_s, LOOK_S)
        while not self.arrived.is_set():
            await self._look(self._wanted.values() or self._everything())
            left_s = deadline_s - self._loop.time()
            if self.arrived.is_set() or left_s <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, WATCH_S / 2)):
                    await self.arrived.wait()
            if self.arrived.is_set() and not any(flow.stash for flow in self._flows.values()):
                self.arrived.clear()  # only a flow that is new: ask it
        came = self.arrived.is_set()
        self.arrived.clear()
        return came

    def _everything(self) -> list[Wanted]:
        queues = tuple({name.queue for name in self._flows})
        return [Wanted(kind, queues, 1, {}, LOOK_LEASE_S) for kind in KINDS[:2]]

    async def _look(self, wishes: Iterable[Wanted]) -> None:
        """Ask every flow that is not watched, and watch it."""
        if len(self._flows) == 1:  # only that of the timers, which is always there
            await self.refresh()
        asked = [
            (flow, wanted.lease_s)
            for wanted in wishes
            for flow in self._ring(wanted)
            if not flow.watched and not flow.stash
        ]
        failed: dict[Flow, Exception] = {}
        await asyncio.gather(*(self._poll_all({flow: 1}, lease_s, failed) for flow, lease_s in asked))
        for flow, _ in asked:
            await self._watch(flow)
        if failed and not any(flow.watched or flow.stash for flow in self._flows.values()):
            raise next(iter(failed.values()))
        tell_trouble(failed)

    # -- acknowledging: none of these is sure to arrive, and what is lost comes again after its lease

    async def ack(self, delivery: Delivery) -> None:
        """The message is done with."""
        delivery.flow.acked = delivery.reply
        await self._connection.tell(delivery.reply, b"+ACK")

    async def flush(self) -> None:
        """Return when the servers have heard what was acknowledged: they answer to one behind the others."""
        flows = [flow for flow in self._flows.values() if flow.acked]
        for flow in flows:
            reply, flow.acked = flow.acked, ""
            with contextlib.suppress(NatsError, TimeoutError):
                await self._connection.request(reply, b"+ACK", TRY_S)

    async def nak(self, delivery: Delivery, delay_s: float = 0.0) -> None:
        """The message is to be delivered again after a while, or sooner; returns when the servers know."""
        delay_s = min(delay_s, MAX_DELAY_S)
        body = b"-NAK" if delay_s <= 0 else b"-NAK " + json.dumps({"delay": int(delay_s * _NS)}).encode()
        with contextlib.suppress(NatsError, TimeoutError):
            await self._connection.request(delivery.reply, body, TRY_S)

    async def progress(self, delivery: Delivery) -> None:
        """The message is still being worked on."""
        await self._connection.tell(delivery.reply, b"+WPI")
