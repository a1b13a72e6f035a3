"""The names of streams, subjects and consumers that begin with one prefix (pure).

A token of a subject may hold no dot, and a function's whole name has one: `build_token` is where texts become tokens.

- `P-queue`, what waits; an acknowledgement removes it: `P.call.ID.QUEUE.FUNCTION`, `P.callback.ID.QUEUE.DESTINATION`,
  and `P.timer.ID.all.all`, which tells that a call may expire.
- `P-records`, one message a subject: `P.rec.PLACE.ID.FUNCTION`, what is known of a call since it was first taken;
  `P.key.HASH`, which call an idempotency key stands for; `P.flow.KIND.QUEUE.NAME`, which flows there are; `P.meta.*`.
- `P-bodies`: `P.body.NAME.NUMBER`, long bodies in pieces, and `P.body.NAME.ref`, the call that names one.

Outside of any stream: `P.event.ID` (a call has ended) and `P.owner.*` (questions to workers).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...calls.destinations import destination_of
from ...calls.model import Kind, NewCall, State
from ...calls.names import FunctionName

Place = Literal[
    "queued",
    "run",
    "dead",
    "cancelled",
    "expired",
    "held",
    "run-undelivered",
    "dead-undelivered",
    "expired-undelivered",
]
FlowKind = Literal["call", "callback", "timer"]

# Where the record of a call is, by its state: so the servers count and list by subject.  A run and its good end are one
# place, since a change of place costs a deletion.
PLACES: dict[State, Place] = {
    State.QUEUED: "queued",
    State.RUNNING: "run",
    State.DONE: "run",
    State.DEAD: "dead",
    State.CANCELLED: "cancelled",
    State.EXPIRED: "expired",
}
UNDELIVERED: dict[State, Place] = {  # of a call whose callback is dead
    State.DONE: "run-undelivered",
    State.DEAD: "dead-undelivered",
    State.EXPIRED: "expired-undelivered",
}

_TOKEN = re.compile(r"[A-Za-z0-9_.:-]{1,128}", re.ASCII)
_CONSUMER_CHARS = 100  # a server takes 255, but each is the name of a directory


def build_token(text: str) -> str:
    """Return `text` as one token of a subject: a dot becomes `=`, and odd text is in hexadecimal behind `==`."""
    return text.replace(".", "=") if _TOKEN.fullmatch(text) else "==" + text.encode("utf-8", "surrogatepass").hex()


def parse_token(token: str) -> str:
    """Return what `build_token` was given."""
    if token.startswith("=="):
        return bytes.fromhex(token[2:]).decode("utf-8", "surrogatepass")
    return token.replace("=", ".")


@dataclass(frozen=True, slots=True)
class FlowName:
    """Calls of one function, or callbacks to one destination, in one queue: what takes turns with others."""

    kind: FlowKind
    queue: str
    name: str


def flows_of(call: NewCall) -> Iterator[FlowName]:
    """Yield the flows that a call takes its turn in: as a call, and when its outcome is delivered."""
    yield FlowName("call", call.queue, call.function)
    if call.callback_url is not None:
        yield FlowName("callback", call.queue, destination_of(call.callback_url))


TIMERS = FlowName("timer", "all", "all")  # the calls that may expire, of all functions and queues


@dataclass(frozen=True, slots=True)
class Names:
    """The names that begin with one prefix."""

    prefix: str

    @property
    def queue(self) -> str:
        """The stream of what waits."""
        return f"{self.prefix}-queue"

    @property
    def records(self) -> str:
        """The stream of records, keys, flows and secrets."""
        return f"{self.prefix}-records"

    @property
    def bodies(self) -> str:
        """The stream of long bodies."""
        return f"{self.prefix}-bodies"

    @property
    def old_calls(self) -> str:
        """The stream that earlier versions have kept their calls in."""
        return f"{self.prefix}-calls"

    def subject(self, kind: str, *tokens: object) -> str:
        """A subject such as `P.timer.ID`; the tokens are taken as they are."""
        return ".".join((self.prefix, kind, *map(str, tokens)))

    def waiting(self, kind: Kind, call_id: str, queue: str, name: str) -> str:
        """Where a call or a callback waits."""
        return self.subject(kind, build_token(call_id), build_token(queue), build_token(name))

    def waiting_of(self, kind: Kind, call_id: str) -> str:
        """A filter that finds what waits of a call, in whatever queue."""
        return self.subject(kind, build_token(call_id), ">")

    def waiting_for(self, function: FunctionName | None) -> str:
        """A filter that finds the calls that wait for a function, or for any."""
        return self.subject("call", "*", "*", "*" if function is None else build_token(function))

    def timer(self, call_id: str) -> str:
        """Where it is said that a call may expire."""
        return self.subject("timer", build_token(call_id), TIMERS.queue, TIMERS.name)

    def record(self, place: Place, call_id: str, function: FunctionName) -> str:
        """Where the record of a call is."""
        return self.subject("rec", place, build_token(call_id), build_token(function))

    def records_at(self, place: Place, function: FunctionName | None = None) -> str:
        """A filter that finds the records at a place, of one function or of all."""
        return self.subject("rec", place, "*", "*" if function is None else build_token(function))

    def event(self, call_id: str) -> str:
        """Where those who wait for the end of a call hear of it."""
        return self.subject("event", build_token(call_id))

    def record_of(self, call_id: str) -> str:
        """A filter that finds the record of a call wherever it is."""
        return self.subject("rec", "*", build_token(call_id), "*")

    @property
    def flows(self) -> str:
        """A filter that finds all that is said of flows."""
        return self.subject("flow", "*", "*", "*")

    def flow(self, flow: FlowName) -> str:
        """Where it is said that there is a flow."""
        return self.subject("flow", flow.kind, build_token(flow.queue), build_token(flow.name))

    def parse_flow(self, subject: str) -> FlowName:
        """Return the flow that a subject of `flow` is for."""
        _, _, kind, queue, name = subject.split(".")
        return FlowName("call" if kind == "call" else "callback", parse_token(queue), parse_token(name))

    def filter(self, flow: FlowName) -> str:
        """What a flow's consumer delivers."""
        return self.subject(flow.kind, "*", build_token(flow.queue), build_token(flow.name))

    def consumer(self, flow: FlowName) -> str:
        """The name of a flow's consumer."""
        text = f"{flow.kind}-{build_token(flow.queue)}-{build_token(flow.name)}"
        if len(text) > _CONSUMER_CHARS or ":" in text:
            return f"{flow.kind}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"
        return text

    def owner(self, name: str) -> str:
        """Where an owner of leases is asked."""
        return self.subject("owner", build_token(name))

    def key(self, function: FunctionName, key: str) -> str:
        """Where it is said which call an idempotency key stands for."""
        return self.subject("key", hashlib.sha256(f"{function.short}\0{key}".encode()).hexdigest()[:40])
