"""The books of a chaos run, and the audit that decides whether a promise was broken.

    books = Books()                                   # filled while things break: orders, answers, posts, faults
    problems = audit(books, parse_runs(text), found)  # [] or a line for each broken promise
    print(table(books, runs, found))

What is promised, and audited:

 1. Every order that was answered 202 is in the spool, once; what was not may be there, once, or not at all.
 2. Every call in the spool has ended, and so has its callback.  It ended as it had to: done unless its function never
    succeeds or its time ran out, cancelled only if a caller asked, expired only if it could.
 3. A call that is done has run, and its result is what its function answered.  One that is dead has run, unless its
    function was out of reach at its last attempt, the only one left to it or the last before its time ran out.
 4. A call runs as often as its function's script makes it necessary, and once more at most for each fault that hit it
    while a worker held it.
 5. A result is delivered once, and once more at most for each such fault; after a 410 never again.

Pure: times are seconds of CLOCK_BOOTTIME, which is what /proc/uptime shows to functions written in shell.
"""

from __future__ import annotations

import bisect
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

TICK_S = 0.02  # /proc/uptime counts in hundredths
NEVER_SUCCEEDS = "500"  # as a script's last step
OUT_OF_REACH = (502, 503)  # the status of a call whose last attempt did not reach its function

# --------------------------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """A call that a caller wants.

    `steps` is what the function is to do at its first run, its second, and so on, the last one for ever; `callback` is
    the same for the receiver of the result, empty if there is none.  `call_id` is the id asked for, if any.
    `attempts_limit` is after how many attempts the function has it given up.
    """

    number: int
    function: str
    steps: tuple[str, ...]
    callback: tuple[str, ...] = ()
    digest: str = ""
    call_id: str | None = None
    key: str | None = None
    delay_s: float | None = None
    expires_s: float | None = None
    attempts_limit: int = 60


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of sending an order.

    `status` and `call_id` are None if no whole answer came; `refused` if there was not even a connection.
    """

    order: Order
    sent_s: float
    answered_s: float
    status: int | None = None
    call_id: str | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A process of a function that ran for a call; `end_s` is None if it did not get as far as its end."""

    call_id: str
    start_s: float
    end_s: float | None


@dataclass(frozen=True, slots=True)
class Post:
    """A result that came to the receiver, and what it answered; None if it hung up instead."""

    call_id: str
    at_s: float
    status: int | None
    function_status: str
    digest: str

    @property
    def accepted(self) -> bool:
        """Whether the receiver took it."""
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to a part of the system, and which calls and callbacks workers held at that moment.

    `until_s` is when it was up again, or had room again.  `spreads` means that whatever ran meanwhile was hit too, and
    `begins_until_s` that what was posted or began to run up to then was: by workers that went on for a moment.
    """

    kind: str
    victim: str
    at_s: float
    until_s: float
    calls: frozenset[str] = frozenset()
    callbacks: frozenset[str] = frozenset()
    spreads: bool = False
    begins_until_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """What the gateway says of a call at the end; `result` is its digest, None if there is none."""

    state: str
    attempts: int
    status: int | None = None
    error: str | None = None
    callback: str | None = None
    result: str | None = None


@dataclass(slots=True)
class Books:
    """Everything seen from outside.  Lists are only ever appended to, which threads may do at the same time."""

    answers: list[Answer] = field(default_factory=list)
    cancels: list[tuple[str, int | None]] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def accepted(self) -> dict[str, Order]:
        """Return the orders that were answered 202, by the id in the answer."""
        return {each.call_id: each.order for each in self.answers if each.status == 202 and each.call_id}

    def doubtful(self) -> dict[str, Order]:
        """Return the orders without a 202 that asked for an id of their own, by that id."""
        accepted = self.accepted()
        orders = {each.order.call_id: each.order for each in self.answers if each.order.call_id}
        return {call_id: order for call_id, order in orders.items() if call_id not in accepted}

    def nameless_count(self) -> int:
        """Return how many orders had neither a 202 nor an id of their own: they may be in the spool unseen."""
        accepted = {order.number for order in self.accepted().values()}
        return len({each.order.number for each in self.answers if each.order.call_id is None} - accepted)


Runs = Mapping[str, Sequence[Run]]


def parse_runs(text: str) -> dict[str, list[Run]]:
    """Return the runs of each call from the functions' ledger: lines of "SECONDS CALL-ID PID start|end"."""
    starts: dict[tuple[str, str], float] = {}
    ends: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        at_s, call_id, pid, what = line.split()
        (starts if what == "start" else ends)[call_id, pid] = float(at_s)
    runs: dict[str, list[Run]] = defaultdict(list)
    for (call_id, pid), start_s in starts.items():
        runs[call_id].append(Run(call_id, start_s, ends.get((call_id, pid))))
    return dict(runs)


# --------------------------------------------------------------------------------------------------------------------
# The audit
# --------------------------------------------------------------------------------------------------------------------


def audit(books: Books, runs: Runs, found: Mapping[str, Found], total_count: int) -> list[str]:
    """Return a line for each broken promise.  `total_count` is how many calls the spool holds."""
    problems = [*_check_acceptance(books, found, total_count)]
    asked_to_cancel = {call_id for call_id, _ in books.cancels}
    posts: dict[str, list[Post]] = defaultdict(list)
    for post in books.posts:
        posts[post.call_id].append(post)
    for call_id, order in (books.doubtful() | books.accepted()).items():
        call, made = found.get(call_id), runs.get(call_id, ())
        if call is None:
            continue
        checks = (
            _check_end(order, call, call_id in asked_to_cancel),
            _check_runs(order, call, made, cuts(books.faults, call_id, made)),
            _check_callback(order, call, posts[call_id], callback_cuts(books.faults, call_id, posts[call_id])),
        )
        script = f"{order.function}, {'.'.join(order.steps)}"
        problems += [f"{call_id} ({script}): {text}" for each in checks for text in each]
    strangers = (runs.keys() | posts.keys()) - found.keys()
    if len(strangers) > books.nameless_count():
        problems.append(f"ran or were delivered, but are not in the spool: {sorted(strangers)[:5]}")
    return problems


def _check_acceptance(books: Books, found: Mapping[str, Found], total_count: int) -> Iterator[str]:
    accepted = books.accepted()
    for call_id, order in accepted.items():
        if call_id not in found:
            yield f"{call_id} ({order.function}): lost, it was answered 202 and is not in the spool"
    ids: dict[int, set[str]] = defaultdict(set)
    for call_id, order in accepted.items():
        ids[order.number].add(call_id)
    yield from (f"order {number} has become several calls: {names}" for number, names in ids.items() if len(names) > 1)
    for call_id, status in books.cancels:
        if status == 404:
            yield f"{call_id}: 404 to DELETE after a 202"
    unseen_count = total_count - len(found)
    if not 0 <= unseen_count <= books.nameless_count():
        yield f"{total_count} calls in the spool, {len(found)} known; at most {books.nameless_count()} may be unknown"


def _check_end(order: Order, call: Found, asked_to_cancel: bool) -> Iterator[str]:
    never = order.steps[-1] == NEVER_SUCCEEDS
    allowed = {
        "done": not never,
        "dead": (never and call.attempts >= order.attempts_limit) or order.expires_s is not None,
        "cancelled": asked_to_cancel,
        "expired": order.expires_s is not None,
    }
    if not allowed.get(call.state, False):
        yield f"ended as {call.state}: {call.error}"
    if call.state == "done" and call.status != 200:
        yield f"done with status {call.status}"
    if call.state == "done" and call.result not in (None, order.digest):
        yield "its result is not what its function answered"


def _check_runs(order: Order, call: Found, made: Sequence[Run], cut_count: int) -> Iterator[str]:
    if call.state == "dead" and not made and order.expires_s is None and call.status not in OUT_OF_REACH:
        yield f"dead and never ran: {call.error}"
    if call.state == "done" and not any(run.end_s is not None for run in made):
        yield "done, but no run of it came to its end"
    needed_count = runs_needed(order, call)
    if len(made) > needed_count + cut_count:
        yield f"ran {len(made)} times; {needed_count} were needed, and {cut_count} cut short"


def _check_callback(order: Order, call: Found, posts: Sequence[Post], cut_count: int) -> Iterator[str]:
    expected = None
    if order.callback and call.state in ("done", "dead", "expired"):
        expected = "dead" if order.callback[-1] == "410" else "delivered"
    if call.callback != expected:
        yield f"its callback is {call.callback}, not {expected}"
    if expected is None and posts:
        yield f"{len(posts)} posts to a callback that should not be"
    accepted_count = sum(post.accepted for post in posts)
    if expected == "delivered" and not 1 <= accepted_count <= 1 + cut_count:
        yield f"delivered {accepted_count} times; {cut_count} deliveries were cut short"
    gone_count = sum(post.status == 410 for post in posts)
    if expected == "dead" and not 1 <= gone_count <= 1 + cut_count:
        yield f"posted {gone_count} times where 410 was answered; {cut_count} were cut short"
    if any(post.function_status == "200" and post.digest != order.digest for post in posts):
        yield "what was delivered is not what its function answered"


def runs_needed(order: Order, call: Found) -> int:
    """Return how many runs the script of a call's function made necessary."""
    return len(order.steps) if call.state == "done" else max(len(order.steps), call.attempts)


def cuts(faults: Iterable[Fault], call_id: str, made: Sequence[Run]) -> int:
    """Return how many runs of a call faults may have cut short: what each found in flight, and what began meanwhile."""
    return sum(_cut_by(fault, call_id, made) for fault in faults)


def callback_cuts(faults: Iterable[Fault], call_id: str, posts: Sequence[Post]) -> int:
    """Return how many deliveries of a result faults may have cut short."""
    return sum(
        max(
            call_id in fault.callbacks,
            sum(fault.at_s - TICK_S <= post.at_s <= fault.begins_until_s + TICK_S for post in posts),
        )
        for fault in faults
    )


def _cut_by(fault: Fault, call_id: str, made: Sequence[Run]) -> int:
    """Return how many runs of a call one fault may have cut short.

    A call that was in flight may have been taken over, and begun again, before all that a fault ends had ended.
    """
    was_in_flight, begin_s = call_id in fault.calls, fault.at_s - TICK_S
    if fault.spreads:
        end_s = fault.until_s + TICK_S
        hit = sum(run.start_s <= end_s and (run.end_s is None or run.end_s >= begin_s) for run in made)
        return max(was_in_flight, hit)
    since_s = fault.at_s if was_in_flight else begin_s  # all that could begin a run stands still when it is read
    return was_in_flight + sum(since_s < run.start_s <= fault.begins_until_s + TICK_S for run in made)


# --------------------------------------------------------------------------------------------------------------------
# The ledger that is shown
# --------------------------------------------------------------------------------------------------------------------


def table(books: Books, runs: Runs, found: Mapping[str, Found]) -> str:
    """Return the ledger in Markdown: what became of every order, and how fast the system was back."""
    counts, recovery = _count_lines(books, runs, found), _recovery_lines(books, runs)
    return "\n".join(["| what | count |", "|---|---|", *counts, "", *recovery])


def _count_lines(books: Books, runs: Runs, found: Mapping[str, Found]) -> Iterator[str]:
    accepted = books.accepted()
    states = Counter(found[call_id].state if call_id in found else "lost" for call_id in accepted)
    orders = {**books.doubtful(), **accepted}
    repeated_count = sum(
        max(0, len(runs.get(call_id, ())) - runs_needed(orders[call_id], call)) for call_id, call in found.items()
    )
    never_ran_count = sum(call.state == "dead" and call_id not in runs for call_id, call in found.items())
    deliveries = Counter(post.call_id for post in books.posts if post.accepted)
    refused = Counter(answer.status for answer in books.answers if answer.status not in (202, None))
    rows = {
        "orders": len({answer.order.number for answer in books.answers}),
        "accepted (202)": len(accepted),
        **{f"refused ({status})": count for status, count in sorted(refused.items(), key=str)},
        "no whole answer": sum(answer.status is None and not answer.refused for answer in books.answers),
        "of these in the spool all the same": len(found.keys() - accepted.keys()),
        **{state: states[state] for state in ("done", "dead", "cancelled", "expired")},
        "of the dead never executed (out of reach at every attempt)": never_ran_count,
        "**lost**": states["lost"],
        "executed": sum(map(len, runs.values())),
        "repeated after faults": repeated_count,
        "callbacks delivered": sum(call.callback == "delivered" for call in found.values()),
        "callbacks dead (410)": sum(call.callback == "dead" for call in found.values()),
        "callbacks delivered again after faults": sum(count - 1 for count in deliveries.values()),
    }
    yield from (f"| {what} | {count} |" for what, count in rows.items())


def _recovery_lines(books: Books, runs: Runs) -> Iterator[str]:
    accepted = sorted((answer.sent_s, answer.answered_s) for answer in books.answers if answer.status == 202)
    sent_s, answered_s = [sent_s for sent_s, _ in accepted], [answered_s for _, answered_s in accepted]
    started_s = sorted(run.start_s for made in runs.values() for run in made)
    groups: dict[tuple[str, str], list[Fault]] = defaultdict(list)
    for fault in books.faults:
        groups[fault.kind, fault.victim].append(fault)
    yield "| fault | times | calls in flight | down | next 202 | next execution | what was cut runs again |"
    yield "|---|---|---|---|---|---|---|"
    for (kind, victim), faults in sorted(groups.items()):
        columns = (
            [fault.until_s - fault.at_s for fault in faults if fault.until_s > fault.at_s],
            [after_s for fault in faults for after_s in _next_after(fault.at_s, sent_s, answered_s)],
            [after_s for fault in faults for after_s in _next_after(fault.at_s, started_s, started_s)],
            [after_s for fault in faults for after_s in _runs_again(fault, runs)],
        )
        in_flight_count = sum(len(fault.calls) for fault in faults)
        shown = " | ".join(map(_spread, columns))
        yield f"| {kind} {victim} | {len(faults)} | {in_flight_count} | {shown} |"


def _runs_again(fault: Fault, runs: Runs) -> Iterator[float]:
    for call_id in fault.calls:
        starts_s = sorted(run.start_s for run in runs.get(call_id, ()))
        yield from _next_after(fault.at_s, starts_s, starts_s)


def _next_after(at_s: float, begun_s: Sequence[float], seen_s: Sequence[float]) -> list[float]:
    """Return how long after `at_s` the first is seen of those begun later, in a list of one; nothing without any."""
    return [each_s - at_s for each_s in seen_s[bisect.bisect(begun_s, at_s) :][:1]]


def _spread(times_s: Sequence[float]) -> str:
    return f"{statistics.median(times_s):.2f} s, max {max(times_s):.2f} s" if times_s else ""
