"""The thread that writes: it commits for all callers of this process together, and in turn with other processes.

    writer = Writer(parts, on_wake_up)                     # begins at once
    after = await writer.submit(run)                       # `run(tx)` was carried out, and is on the disk
    writer.stop()                                          # ends what was submitted; in a thread, as it waits

Contract: what `submit` returns is done when the disk has it, or raises QueueFull, QueueUnavailable or QueueDamaged and
has changed nothing; `run` may be carried out more than once, and counts in the last transaction.  What it refuses: to
wait longer than the lock's limit for another process, or to keep that from its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import operator
import os
import queue
import sqlite3
import threading
from collections.abc import (
    Callable,
    Iterable,
    Sequence,
)
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeVar, cast

from ...calls.model import Call, QueueFull, QueueUnavailable, StoredBody
from ...watchdog import Trouble, log, reason_of
from .body_files import unlink_bodies
from .directory import LockHeld
from .errors import DISK_FULL, NO_MEMORY, disk_error, sqlite_error
from .housekeeping import truncate_journal
from .limits import GROUP_COUNT, RESULTS_PART
from .notifier import WakeUp
from .parts import Parts
from .puts import Put, put_all
from .transaction import Transaction

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------------------------
# The writer
#
# One thread commits for all callers in this process. It takes all operations that wait, runs them in one transaction
# and answers them together; while that commit is on its way to the disk, the next group gathers. Puts that stand next
# to each other, which is what a busy gateway's groups are made of, go in by one statement for many. An operation that
# fails without having written anything fails alone. One that fails half-way is left out and the others are run again
# from the start, so a savepoint for each is not needed. When the disk fails, the whole group fails with the same error.
# When the writer lock cannot be had, all that has come meanwhile fails with the group: it has waited for the same
# process, and would else wait as long once more, which is longer than its callers do.
# --------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Operation:
    """Something to write. `alone`: under the writer lock, outside any transaction. `joins`: together with its like.

    `may_wait`: a result, which is to wait for room rather than take what is kept for steps that give room back.
    """

    run: Callable[[Transaction], Any]
    future: asyncio.Future[Any]
    alone: bool
    joins: bool = False
    bytes_count: int = 0  # of a body that goes into a row
    may_wait: bool = False
    answer: Any = None
    error: BaseException | None = None

    @property
    def refused_file(self) -> str | None:
        """The body's file of a call that did not get into the queue: no row names it, or ever will."""
        if not isinstance(self.run, Put):
            return None
        file = self.run.call.body.file
        return None if isinstance(self.answer, Call) and self.answer.body.file == file else file

    def settle(self) -> None:
        """Answer the caller that waits; on the event loop, as it is a future of asyncio."""
        if self.future.done():
            return  # cancelled meanwhile
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.answer)


class Writer:
    """The thread that writes. `on_wake_up` is called on the event loop with what each commit has to tell."""

    def __init__(self, parts: Parts, on_wake_up: Callable[[int], None]) -> None:
        directory = parts.directory
        self._directory = directory
        self._db = parts.db
        self._reserve = parts.reserve
        self._notifier = parts.notifier
        self._on_wake_up = on_wake_up
        self._loop = asyncio.get_running_loop()
        self._path = directory.database
        self._file = self._path.stat()
        self._gathered: list[_Operation] = []
        self._waiting: queue.SimpleQueue[Sequence[_Operation] | None] = queue.SimpleQueue()
        self._lock_error: LockHeld | None = None  # of the turn under way
        self._trouble = Trouble(log.error)
        self.commit_count = 0
        self._thread = threading.Thread(target=self._work, name="spool-writer", daemon=True)
        self._thread.start()

    def submit(
        self, run: Callable[[Transaction], T], *, alone: bool = False, body: StoredBody | None = None
    ) -> asyncio.Future[T]:
        """The future of what `run` returns, done once that is on disk; `body`: what it writes that may be large."""
        future: asyncio.Future[T] = self._loop.create_future()
        joins, may_wait = False, body is not None
        if isinstance(run, Put):
            joins, body = run.call.idempotency_key is None, run.call.body
        bytes_count = 0 if body is None or body.inline is None else body.bytes_count
        if not self._gathered:
            self._loop.call_soon(self.hand_over)
        self._gathered.append(_Operation(run, future, alone, joins, bytes_count, may_wait))
        return future

    @property
    def is_gathering(self) -> bool:
        """Whether there is something already to which the thread has not been given this turn of the loop."""
        return bool(self._gathered)

    def hand_over(self) -> None:
        """Give the thread what this turn of the loop has brought: one by one, the first would go to the disk alone."""
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._waiting.put(gathered)

    def stop(self) -> None:
        """End the thread after all that was handed over, and close the connection; it blocks until then."""
        self._waiting.put(None)
        self._thread.join()
        with (
            contextlib.suppress(QueueUnavailable),
            self._directory.writer_lock(),
        ):  # the last one to close writes the journal back
            self._db.close()
        self._db.close()

    def _work(self) -> None:
        going = True
        while going:
            groups = self._next_group()
            group = _operations_of(groups)
            wake_up = self._serve(group)
            if self._lock_error is not None:
                behind = self._take_waiting()
                groups += behind
                group += _fail(_operations_of(behind), self._lock_error)
            going = None not in groups
            self._drop_refused(group)
            self._answer(group, wake_up)

    def _next_group(self) -> list[Sequence[_Operation] | None]:
        """What waits: up to GROUP_COUNT operations, and what came in the same turn as the last of them."""
        groups = [self._waiting.get()]
        while not self._waiting.empty() and sum(len(group or ()) for group in groups) < GROUP_COUNT:
            groups.append(self._waiting.get_nowait())  # there is no other thread that takes any
        return groups

    def _take_waiting(self) -> list[Sequence[_Operation] | None]:
        """What has come during the turn under way."""
        groups = []
        while not self._waiting.empty():
            groups.append(self._waiting.get_nowait())
        return groups

    def _drop_refused(self, group: Sequence[_Operation]) -> None:
        """The bodies of refused calls go before their callers know: on a full disk each would keep it full."""
        told = [operation for operation in group if operation.error is not None or operation.answer is not None]
        files = [file for operation in told if (file := operation.refused_file) is not None]
        if not files:
            return
        try:
            unlink_bodies(self._directory.bodies_fd, files)
        except OSError as error:  # then `sweep` finds them
            log.warning(f"the body of a refused call cannot be removed: {reason_of(error)}")

    def _answer(self, group: Sequence[_Operation], wake_up: int) -> None:
        """Wake the other processes, then answer: a caller that has its 202 may take it that workers know of the call.

        The other way round, a process that dies right after an answer would leave its call to their next look.
        """

        def settle() -> None:
            for operation in group:
                operation.settle()
            if wake_up:
                self._on_wake_up(wake_up)

        if wake_up:
            self._notifier.wake(wake_up)
        with contextlib.suppress(RuntimeError):  # the loop was closed without closing the Spool: no caller waits
            self._loop.call_soon_threadsafe(settle)

    def _serve(self, group: Sequence[_Operation]) -> int:
        """Run the group; afterwards each operation has its answer or its error. Return whom to wake."""
        self._lock_error = None
        wake_ups: list[int | None] = []
        together: list[_Operation] = []
        for operation in group:
            if operation.future.cancelled():
                operation.error = QueueUnavailable("its caller has gone")
            elif operation.alone:
                wake_ups.append(self._guard([operation], partial(self._run_alone, operation)))
            else:
                together.append(operation)
        if together:
            wake_ups.append(self._guard(together, partial(self._commit_if_room, together)))
        failed = [operation for operation in group if operation.error is not None]
        refused = [operation for operation in failed if isinstance(operation.error, QueueFull)]
        if refused:
            wake_ups += self._serve_without_room(refused)
        return reduce(operator.or_, filter(None, wake_ups), WakeUp.NOTHING)

    def _serve_without_room(self, group: Sequence[_Operation]) -> list[int | None]:
        """Steps that end calls go first and one by one: a group may need more than the reserve has, a step does not."""
        puts = [operation for operation in group if isinstance(operation.run, Put)]
        others = [operation for operation in group if not isinstance(operation.run, Put)]
        wake_ups = [self._guard([operation], partial(self._work_without_room, operation)) for operation in others]
        self._guard((), self.tidy)
        if puts:
            for operation in puts:
                operation.error = None
            wake_ups.append(self._guard(puts, partial(self._commit_if_room, puts)))
        self._reserve.tell()
        return wake_ups

    def _work_without_room(self, operation: _Operation) -> int:
        """Do a step, if need be with the reserve. First the journal's pages go to their places, which takes room.

        Results may be larger than what their calls give up, and would use up the whole in the end; then nothing could
        be cancelled or dropped any more. So they get a part of it, and what holds them holds them until there is room.
        """
        operation.error = None
        work = (
            partial(self._run_alone, operation) if operation.alone else partial(self._commit, [operation], short=True)
        )
        try:
            wake_up = work()
        except sqlite3.Error as error:
            if not isinstance(sqlite_error(error), QueueFull):
                raise
        else:
            if not isinstance(operation.error, QueueFull):
                return wake_up
        operation.error = None
        self._reserve.release(RESULTS_PART if operation.may_wait else 1.0)
        self.tidy(refill=False)
        try:
            return work()
        finally:
            self.tidy()

    def tidy(self, *, refill: bool = True) -> None:
        """Give the journal's room back, to the reserve; what cannot be done now is done behind a later step."""
        with contextlib.suppress(sqlite3.Error, OSError, MemoryError):
            truncate_journal(self._db)
            if refill:
                self._reserve.refill()

    def _run_alone(self, operation: _Operation) -> int:
        self._run(operation, Transaction(self._db))
        return WakeUp.NOTHING

    def _guard(self, operations: Sequence[_Operation], work: Callable[[], T]) -> T | None:
        """What `work` returns under the writer lock; None if that or the disk fails, which fails all of `operations`.

        A lock that could not be had is not waited for again in the same turn.
        """
        try:
            if self._lock_error is not None:
                raise self._lock_error
            before = self._db.total_changes
            with self._directory.writer_lock():
                self._check_place()
                done = work()
            if self._db.total_changes != before:  # what has written nothing would succeed on any disk
                self._trouble.over()
            return done
        except sqlite3.Error as error:
            problem: Exception = sqlite_error(error)
            if not isinstance(problem, QueueFull):  # of which the reserve tells, once
                self._trouble.tell(f"the queue in {self._directory.path} cannot be written: {error}")
        except OSError as error:
            problem = disk_error(error)
        except LockHeld as error:
            problem = self._lock_error = error
        except (QueueFull, QueueUnavailable) as error:
            problem = error
        except MemoryError:
            problem = QueueUnavailable(NO_MEMORY)
        except Exception:  # noqa: BLE001 - a thread's boundary: a writer that died here would keep all callers waiting for ever
            log.exception(f"the queue in {self._directory.path} cannot be written")
            problem = QueueUnavailable("the queue cannot be used: see the log")
        _fail(operations, problem)
        return None

    def _check_place(self) -> None:
        """A file that was moved or removed under us would take every write, and lose it."""
        try:
            if os.path.samestat(self._path.stat(), self._file):
                return
        except FileNotFoundError:
            pass
        raise QueueUnavailable("the queue's file was moved or removed: restart what uses it")

    def _commit_if_room(self, group: Sequence[_Operation]) -> int:
        if not self._reserve.has_room(sum(operation.bytes_count for operation in group)):
            raise QueueFull(DISK_FULL)
        return self._commit(group)

    def _commit(self, group: Sequence[_Operation], *, short: bool = False) -> int:
        while True:
            tx = Transaction(self._db, short=short)
            before = self._db.total_changes
            try:
                self._db.execute("BEGIN IMMEDIATE")
                if self._run_all(group, tx):
                    if tx.waiting:
                        tx.write_waiting()
                    self._db.execute("COMMIT")
                    self.commit_count += self._db.total_changes != before
                    return tx.wake_up
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _run_all(self, group: Sequence[_Operation], tx: Transaction) -> bool:
        """False when an operation has failed half-way, and the transaction must not be committed."""
        for joins, run in itertools.groupby(group, operator.attrgetter("joins")):
            operations = list(run)
            if joins and len(operations) > 1:
                if not self._run_together(operations, tx):
                    return False
            elif not all(self._run_apart(operation, tx) for operation in operations):
                return False
        return True

    def _run_together(self, operations: Sequence[_Operation], tx: Transaction) -> bool:
        """False when one of them cannot be done: which one, and why, is found out by running each by itself."""
        try:
            put_all(tx, [cast(Put, operation.run) for operation in operations])
        except Exception as error:
            if _is_disk_trouble(error):
                raise
            for operation in operations:
                operation.joins = False
            return False
        return True

    def _run_apart(self, operation: _Operation, tx: Transaction) -> bool:
        if operation.error is not None:
            return True
        before = self._db.total_changes
        self._run(operation, tx)
        return operation.error is None or self._db.total_changes == before

    def _run(self, operation: _Operation, tx: Transaction) -> None:
        try:
            operation.answer = operation.run(tx)
        except OSError as error:
            operation.error = disk_error(error)
        except Exception as error:
            if _is_disk_trouble(error):
                raise
            operation.error = error  # its caller gets it


def _operations_of(groups: Iterable[Sequence[_Operation] | None]) -> list[_Operation]:
    return [operation for group in groups for operation in group or ()]


def _fail(operations: Sequence[_Operation], error: Exception) -> Sequence[_Operation]:
    """Fail all of them; return them."""
    for operation in operations:
        operation.error = error
    return operations


def _is_disk_trouble(error: Exception) -> bool:
    """Tell whether the disk, the file or the memory is in trouble, not the operation."""
    return type(error) in (sqlite3.OperationalError, sqlite3.InternalError, sqlite3.DatabaseError, MemoryError)
