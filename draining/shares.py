"""How the slots of a worker are divided: those of calls among functions, those of callbacks among destinations.

    share_fairly(16, {"a": 12, "b": 1}, 2)    # claim 3, for flows that have less than 8, or none yet
    share_rest(16, {"a": 12, "b": 1})         # claim 3, for any flow: those below want no more
    lend(16, {"a": 16})                       # claim 2 beyond the 16, for others than a

A flow is what takes turns: the calls of one function, or the callbacks to one destination.  How long one of them holds
its slot is not known beforehand, and one that hangs holds it for ever.  Turns alone are not enough: of two flows that
always have something waiting, the slow one ends up with every slot.  So, as in max-min fairness:

- what is free goes first to flows below their share: the slots divided by the number of flows that are at work, or
  were within LATELY_S (a quick one may hold nothing at the very moment of a claim);
- what is left then goes to whichever flow has something waiting.  A flow that is alone may hold every slot;
- when every slot has been held for LEND_AFTER_S, as many as a quarter more are lent: otherwise a flow that was alone,
  and hangs, would stop all that come later.  A flow gets no more than about half of what is still left to lend, so
  the first one that comes, and hangs too, does not take it all; and one that holds slots already gets none of it.

With fewer than four slots nothing is lent: an operator who says `max_inflight=1` means one at a time.

Everything here is pure.  Whether a flow bears more, or its destination is tried at all, is decided elsewhere
(`retries.Concurrency`, breakers.py) and narrows what is allotted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

LEND_AFTER_S = 1.0  # so long all slots are held by the same before more are lent: quick ones give a turn to all earlier


LATELY_S = 1.0


LENT_PART = 4  # one slot is lent for so many


@dataclass(frozen=True, slots=True)
class Allotment:
    """What one claim may take: `limit` in all, and of a flow that `capacities` names no more than it says."""

    limit: int
    capacities: Mapping[str, int] = field(default_factory=dict)
    is_for_all: bool = field(default=False, compare=False)  # not only for flows below their share

    def narrowed(self, *others: Mapping[str, int]) -> Allotment:
        """Return what is left when the capacities of `others` hold as well."""
        if not any(others):
            return self
        capacities = dict(self.capacities)
        for other in others:
            for flow, capacity in other.items():
                capacities[flow] = min(capacity, capacities.get(flow, capacity))
        return Allotment(self.limit, capacities, self.is_for_all)


def share_fairly(slots_count: int, held: Mapping[str, int], flows_count: int) -> Allotment:
    """Return what the flows below their share may take, each as much as it is below it; `held` is what each has now.

    `flows_count` are those that share, with some perhaps that hold nothing at this moment.  A flow that is not in
    `held` has the turns of `claim` for itself.
    """
    share = -(-slots_count // max(flows_count, 1))
    limit = max(slots_count - sum(held.values()), 0)
    return Allotment(limit, {flow: max(share - count, 0) for flow, count in held.items()})


def share_rest(slots_count: int, held: Mapping[str, int]) -> Allotment:
    """Return what any flow may take, once those below their share want no more."""
    return Allotment(max(slots_count - sum(held.values()), 0), is_for_all=True)


def lend(slots_count: int, held: Mapping[str, int]) -> Allotment:
    """Return what may be taken beyond `slots_count` slots, all of which are held.

    A flow may borrow while it holds less than what is then still left to lend (Choudhury and Hahne's dynamic
    thresholds, ToN 1998, with alpha = 1).
    """
    left = _left_to_lend(slots_count, sum(held.values()))
    return Allotment(_half(left), {flow: _half(left - count) for flow, count in held.items()})


def _left_to_lend(slots_count: int, held_count: int) -> int:
    return slots_count // LENT_PART - max(held_count - slots_count, 0)


def _half(count: int) -> int:
    return max((count + 1) // 2, 0)


class Slots:
    """The slots for one kind of work: which flows hold them, and what is known of the work that waits for more.

        allotment = slots.next_claim(now_s)     # then claim as it says, `take` for each that was found, and:
        again = slots.found(allotment, 2)       # which may have been narrowed before

    What a claim has found nothing of is not asked for again before `wake_up`; times are of one monotonic clock.
    """

    def __init__(self, slots_count: int) -> None:
        self.held: Counter[str] = Counter()
        self._held_count = 0
        self._slots_count = slots_count
        self._may_wait = True  # anything at all
        self._may_be_owed = True  # anything of a flow below its share
        self._full_since_s: float | None = None
        self._lately: dict[str, float] = {}  # when a flow gave a slot back last, the longest ago first

    def wake_up(self) -> None:
        """The queue has told of work, or nothing is known of it any more."""
        self._may_wait = self._may_be_owed = True

    def take(self, flow: str) -> None:
        """One more slot is held."""
        self.held[flow] += 1
        self._held_count += 1

    def give_back(self, flow: str, now_s: float) -> None:
        """A slot is free again."""
        self._held_count -= 1
        self.held[flow] -= 1
        if not self.held[flow]:
            del self.held[flow]
        self._lately.pop(flow, None)
        self._lately[flow] = now_s

    def next_claim(self, now_s: float) -> Allotment | None:
        """Return the claim to make now, None if no slot is free, or nothing that may wait."""
        if self._held_count >= self._slots_count:
            self._full_since_s = now_s if self._full_since_s is None else self._full_since_s
            return self._next_loan(now_s)
        self._full_since_s = None
        if not self._may_wait:
            return None
        flows_count = self._count_flows(now_s)
        if self._may_be_owed and flows_count > 1:
            self._may_be_owed = False  # before the claim: a wake-up that comes while it is made is for the next one
            return share_fairly(self._slots_count, self.held, flows_count)
        self._may_wait = False
        return share_rest(self._slots_count, self.held)

    def _count_flows(self, now_s: float) -> int:
        """Return how many flows are at work, or were lately; forget the others."""
        while self._lately and next(iter(self._lately.values())) < now_s - LATELY_S:
            del self._lately[next(iter(self._lately))]
        return len(self.held.keys() | self._lately.keys())

    def _next_loan(self, now_s: float) -> Allotment | None:
        due_s = self.lends_at_s
        if due_s is None or due_s > now_s:
            return None
        self._may_be_owed = False
        return lend(self._slots_count, self.held)

    def found(self, wanted: Allotment, count: int) -> bool:
        """Tell of the outcome of a claim that was made as `wanted`, narrowed or not; return whether to look again.

        One that brings less than it might have, and passed no flow over, has emptied the queue: to ask once more would
        be a turn of the queue's writer for nothing.  What comes later is told by `wake_up`.
        """
        has_passed_over = bool(wanted.capacities) and (count > 0 or 0 in wanted.capacities.values())
        if count >= wanted.limit or has_passed_over:
            self._may_wait = True
        if wanted.is_for_all:
            return count > 0 and self._may_wait
        if count:
            self._may_be_owed = True
        return True

    @property
    def lends_at_s(self) -> float | None:
        """When slots are lent, if they are all held and a flow may want one; else None."""
        if self._full_since_s is None or not (self._may_wait and self._may_be_owed):
            return None
        can_lend = _left_to_lend(self._slots_count, self._held_count) > 0
        return self._full_since_s + LEND_AFTER_S if can_lend else None
