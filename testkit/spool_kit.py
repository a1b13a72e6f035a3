"""What the tests of the spool share beside what those of every queue do. Holds no tests.

Run as a program with a directory it is the other process: it opens the queue there and does what it is told by pickles.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from faashound.calls.model import NewCall
from faashound.queues import Queue
from faashound.queues.spool.limits import DATABASE
from faashound.queues.spool.queue import Spool
from faashound.watchdog import FaashoundError
from testkit.harness import eventually
from testkit.queue_kit import LEASE_S, QUEUE, START_S, Clock, SpoolDesk, finish, inline, new_call

__all__ = ["LEASE_S", "QUEUE", "START_S", "Clock", "Desk", "Remote", "finish", "inline", "new_call"]


class Desk(SpoolDesk):
    """A desk with a spool that is looked into."""

    @classmethod
    def create(cls, directory: Path) -> None:
        """Leave an empty queue."""
        asyncio.run(cls.create_spool(directory))

    @staticmethod
    async def create_spool(directory: Path) -> None:
        await (await Spool.open(directory)).close()

    @property
    def spool(self) -> Spool:
        return as_spool(self.queue)

    def open(self) -> Spool:
        return as_spool(super().open())

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """What another program reads in the queue's file."""
        with contextlib.closing(sqlite3.connect(self.directory / DATABASE)) as db:
            return db.execute(sql).fetchall()

    def release_reserve(self) -> None:
        """As a step does that finds no room."""
        os.truncate(self.directory / "reserve", 0)

    def body_files(self) -> set[str]:
        return {path.name for path in (self.directory / "bodies").iterdir()}


def as_spool(queue: Queue) -> Spool:
    """Return the queue as what it is, for tests that know."""
    assert isinstance(queue, Spool)
    return queue


class Remote:
    """A Spool in a process of its own, which can be killed at any moment."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both are pipes")
        self._commands: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self.owner: str = self.receive()

    def send(self, method: str, *args: Any, **kwargs: Any) -> None:
        pickle.dump((method, args, kwargs), self._commands)
        self._commands.flush()

    def receive(self) -> Any:
        answer = pickle.load(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.send(method, *args, **kwargs)
        return self.receive()

    def crash(self, statement: int, method: str, *args: Any, **kwargs: Any) -> bool:
        """Kill the process just before its writer's `statement`-th statement; tell whether it had answered."""
        self.call("crash_at", statement)
        self.send(method, *args, **kwargs)
        try:
            self.receive()
        except EOFError:
            return False
        except FaashoundError:
            return True  # refused
        return True

    def put_and_die(self, call: NewCall) -> None:
        """Have it killed in the moment in which a put is answered."""
        self.call("die_when_answered")
        self.send("put", call)
        self._process.wait()
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):  # it died before it had read everything
            self._commands.close()


async def obey(directory: Path, commands: IO[bytes], answers: IO[bytes]) -> None:
    """Do what a Remote asks, one thing after another, until killed."""
    spool = await Spool.open(directory, now=Clock())
    answer: Any = await spool.enlist()
    dies = False
    while True:
        if dies and answer is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        pickle.dump(answer, answers)
        answers.flush()
        method, args, kwargs = pickle.load(commands)
        try:
            if method == "crash_at":
                crash_at(spool, *args)
                answer = None
            elif method == "die_when_answered":
                dies, answer = True, None
            else:
                answer = await getattr(spool, method)(*args, **kwargs)
        except FaashoundError as error:
            answer = error


def writer_connection(spool: Spool) -> sqlite3.Connection:
    """The connection that writes: what it executes, and how, no user of a queue can see."""
    return spool._writer._db


async def writer_has_all(spool: Spool) -> None:
    """Wait until the thread that writes has taken what was submitted, as far as the loop has got; nothing tells."""
    await asyncio.sleep(0)

    async def has_all() -> bool:
        return not spool._writer._gathered and spool._writer._waiting.empty()

    await eventually(has_all, 10, "the writer has taken all that was submitted")


def crash_at(spool: Spool, statement: int) -> None:
    """Have this process killed before the `statement`-th statement of its writer."""
    count = itertools.count(1)

    def trace(_: str) -> None:
        if next(count) == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    writer_connection(spool).set_trace_callback(trace)


if __name__ == "__main__":
    asyncio.run(obey(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer))
