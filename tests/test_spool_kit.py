"""What the tests of the spool share: a desk with a queue on it, a clock to set, and calls to put. Holds no tests.

Run as a program with a directory it is the other process: it opens the queue there and does what it is told by pickles.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any, TypeVar

from faashound.spool import Attempt, Call, Lease, NewCall, Spool, State, StoredBody, new_call_id
from faashound.watchdog import FaashoundError

T = TypeVar("T")
QUEUE = "faas-request"
LEASE_S = 60.0
START_S = 1_700_000_000.0


class Clock:
    """A wall clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s


class Desk:
    """An event loop and a Spool on it, for tests that go step by step: `desk.do(desk.spool.put(call))`."""

    def __init__(self, directory: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self.directory = directory
        self.clock = Clock()
        self.runner = asyncio.Runner(loop_factory=loop_factory)
        self.spools: list[Spool] = []
        self.spool = self.open()
        self.owner = self.do(self.spool.enlist())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def open(self) -> Spool:
        """One more Spool on the same directory, as another process would have it."""
        self.spools.append(self.do(Spool.open(self.directory, now=self.clock)))
        return self.spools[-1]

    def close(self) -> None:
        for spool in self.spools:
            self.do(spool.close())
        self.runner.close()

    def put(self, function: str = "f", **changes: Any) -> Call:
        return self.do(self.spool.put(self.new_call(function, **changes)))

    def new_call(self, function: str = "f", **changes: Any) -> NewCall:
        return new_call(function, **{"due_s": self.clock.now_s, "accepted_s": self.clock.now_s, **changes})

    def claim(self, limit: int = 100, **options: Any) -> list[Lease]:
        return self.do(self.spool.claim([QUEUE], self.owner, options.pop("lease_s", LEASE_S), limit, **options))

    def claim_one(self, lease_s: float = LEASE_S) -> Lease:
        (lease,) = self.claim(1, lease_s=lease_s)
        return lease

    def claim_callback(self, lease_s: float = LEASE_S) -> Lease:
        (lease,) = self.do(self.spool.claim_callbacks(self.owner, lease_s, 1))
        return lease

    def finish(self, lease: Lease, state: State = State.DONE, result: bytes | None = b"out", **changes: Any) -> None:
        self.do(finish(self.spool, lease, state, None if result is None else inline(result), **changes))

    def get(self, call_id: str) -> Call:
        call = self.do(self.spool.get(call_id))
        if call is None:
            raise AssertionError(f"the call {call_id} is gone")
        return call

    def attempt(self, status: int | None = 200, error: str | None = None) -> Attempt:
        return Attempt(self.clock.now_s, self.clock.now_s + 0.5, status, error)

    def body_files(self) -> set[str]:
        return {path.name for path in (self.directory / "bodies").iterdir()}


async def finish(spool: Spool, lease: Lease, state: State, result: StoredBody | None, **changes: Any) -> None:
    values = {
        "attempt": Attempt(START_S, START_S + 0.5, 200, None),
        "result": result,
        "result_headers": (),
        "status": 200,
        "duration_s": 0.5,
        "callback_due_s": None,
        **changes,
    }
    await spool.finish(lease, state=state, **values)


def inline(body: bytes) -> StoredBody:
    return StoredBody(len(body), body, None)


def new_call(function: str = "f", **changes: Any) -> NewCall:
    values: dict[str, Any] = {
        "id": new_call_id(),
        "function": function,
        "queue": QUEUE,
        "method": "POST",
        "path": "/",
        "query": "",
        "headers": (),
        "body": inline(b"in"),
        "callback_url": None,
        "due_s": START_S,
        "expires_s": None,
        "idempotency_key": None,
        "accepted_s": START_S,
    }
    return NewCall(**{**values, **changes})


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
        """Kills the process just before its writer's `statement`-th statement; whether the answer came before that."""
        self.call("crash_at", statement)
        self.send(method, *args, **kwargs)
        try:
            self.receive()
        except EOFError:
            return False
        except FaashoundError:
            return True  # refused
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):  # it died before it had read everything
            self._commands.close()


async def obey(directory: Path, commands: IO[bytes], answers: IO[bytes]) -> None:
    """Does what a Remote asks, one thing after another, until killed."""
    spool = await Spool.open(directory, now=Clock())
    answer: Any = await spool.enlist()
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        method, args, kwargs = pickle.load(commands)
        try:
            if method == "crash_at":
                crash_at(spool, *args)
                answer = None
            else:
                answer = await getattr(spool, method)(*args, **kwargs)
        except FaashoundError as error:
            answer = error


def crash_at(spool: Spool, statement: int) -> None:
    count = itertools.count(1)

    def trace(_: str) -> None:
        if next(count) == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    spool._writer._db.set_trace_callback(trace)


if __name__ == "__main__":
    asyncio.run(obey(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer))
