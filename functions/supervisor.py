"""Keeps programs of ours running beside this one: watchdogs of local functions, a local worker.

    keeper = Keeper()
    child = keeper.start("the worker", [sys.executable, "-m", "faashound.worker"], environ)
    await keeper.stop(grace_s=30)

What it promises: a child that dies is logged with the reason and started again, with growing delay; none outlives
this process, whatever way it ends.  For that each inherits the read end of a pipe, the lifeline, whose write end is
only here: when we end, the kernel closes it, and a child that reads end of file stops at once.

One task per child runs: spawn, wait for the exit, reap, log, sleep, again.  A process is known by its pidfd, which
cannot come to mean another process as a number can.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..watchdog import (
    BACKLOG,
    BAD_SETTINGS_STATUS,
    FIRST_RESTART_S,
    PROVEN_AFTER_S,
    log,
    next_restart_s,
    spawn_under_own_limit,
)

KILL_GRACE_S = 2.0  # between "stop at once" and SIGKILL: for a watchdog to end the trees it has started


LISTEN_FD = 3  # systemd's SD_LISTEN_FDS_START


LIFELINE_FD = 4


def python_command(module: str) -> tuple[str, ...]:
    """Return the command that runs one of our modules, whatever lies in the working directory.

    A module is compiled only once.  Without -P (or PYTHONSAFEPATH) Python would look for `email` and `token` in the
    working directory first, where people keep their functions beside functions.toml.
    """
    return (sys.executable, "-I" if sys.flags.isolated else "-P", "-m", module)


def describe_exit(status: int) -> str:
    """Return what an exit status, or a signal's number as a negative one, means in words."""
    if status < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"was ended by {names.get(-status, f'signal {-status}')}"
    if status == BAD_SETTINGS_STATUS:
        return "exited with status 2: it refuses its settings (its message is above)"
    return f"exited with status {status}"


class Child:
    """One program that is kept running.  `pid` is None between two lives.

    `on_trouble` is told why it ended when it ends again before it has lived for PROVEN_AFTER_S, and "" once it has.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        listener: socket.socket | None,
        on_trouble: Callable[[str], None] = lambda trouble: None,
    ) -> None:
        self.name = name
        self.restart_count = 0
        self.on_trouble = on_trouble
        self.pid: int | None = None
        self._pidfd: int | None = None
        self._command = tuple(command)
        self._environ = {**environ, "FAASHOUND_LIFELINE_FD": str(LIFELINE_FD)}
        if listener is not None:
            self._environ["LISTEN_FDS"] = "1"  # no LISTEN_PID: nobody can know it before posix_spawn
        self._listener = listener

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def run(self, lifeline: int) -> int:
        """Run one process to its end and return its status as in `describe_exit`; OSError if it cannot be started.

        When cancelled, it is killed and reaped first.
        """
        pidfd = self._spawn(lifeline)
        try:
            await _readable(pidfd)
        finally:
            self.signal(signal.SIGKILL)  # matters when cancelled; means nothing to a process that has exited
            status = self._reap(pidfd)
        return status

    def _spawn(self, lifeline: int) -> int:
        """Start a process and return its pidfd, which `_reap` closes."""
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        if self._listener is not None:
            actions.append((os.POSIX_SPAWN_DUP2, self._listener.fileno(), LISTEN_FD))
        actions.append((os.POSIX_SPAWN_DUP2, lifeline, LIFELINE_FD))
        # A group of its own: a terminal's Ctrl-C is for us, who then end our children in order.
        spawn = partial(
            os.posix_spawn, self._command[0], self._command, self._environ, file_actions=actions, setpgroup=0
        )
        pid = spawn_under_own_limit(spawn, lifeline)  # it raises its own, and knows then what its functions get
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # out of descriptors: what cannot be watched must not run
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self.pid = pid
        return self._pidfd

    def _reap(self, pidfd: int) -> int:
        """Wait for the process, which has exited or is about to, and forget it."""
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        if result is None:
            raise AssertionError("waitid without WNOHANG returns a result")
        os.close(pidfd)
        self.pid = self._pidfd = None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


class Keeper:
    """Keeps children running until `stop`, which must follow.  Made inside the running loop."""

    def __init__(self) -> None:
        self._tasks: dict[Child, asyncio.Task[None]] = {}
        self._lifeline_end = contextlib.ExitStack()
        self._cleanup = contextlib.ExitStack()
        self._lifeline = _open_lifeline(self._cleanup, self._lifeline_end)
        self._stopping = False

    def start(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        listener: socket.socket | None = None,
        on_trouble: Callable[[str], None] = lambda trouble: None,
    ) -> Child:
        """Keep `command` running with the whole environment `environ`; it inherits `listener` as systemd hands it.

        `name` is what the log calls it; `on_trouble` is described at `Child`.
        """
        child = Child(name, command, environ, listener, on_trouble)
        self._tasks[child] = asyncio.create_task(self._keep(child), name=name)
        return child

    async def stop(self, grace_s: float) -> None:
        """End every child: SIGTERM, and after `grace_s` seconds what is left is stopped at once, then killed."""
        self._stopping = True
        for child, task in self._tasks.items():
            if child.pid is None:
                task.cancel()
            else:
                child.signal(signal.SIGTERM)
        await self._ended(grace_s)
        self._lifeline_end.close()
        await self._ended(KILL_GRACE_S)
        for task in self._tasks.values():
            task.cancel()
        await self._ended(None)
        self._cleanup.close()

    async def _ended(self, timeout_s: float | None) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_s)

    async def _keep(self, child: Child) -> None:
        """Run a child, again and again, until told to stop."""
        delay_s: float | None = None
        while True:
            started_s = time.monotonic()
            proven = asyncio.get_running_loop().call_later(PROVEN_AFTER_S, child.on_trouble, "")
            try:
                status = await child.run(self._lifeline)
                outcome = describe_exit(status)
            except OSError as error:
                status, outcome = 1, f"cannot be started: {error.strerror}"
            finally:
                proven.cancel()
            if self._stopping:
                return
            delay_s = next_restart_s(delay_s, time.monotonic() - started_s, status)
            if delay_s > FIRST_RESTART_S:
                child.on_trouble(outcome)
            log.error(f"{child.name} {outcome}; next start in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            child.restart_count += 1


def _lift(fd: int) -> int:
    """Return a duplicate of `fd` above the numbers that a child's descriptors get, close-on-exec like every other.

    From below, one dup2 of a spawn would overwrite the source of the next.
    """
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LIFELINE_FD + 1)


def _open_lifeline(stack: contextlib.ExitStack, end: contextlib.ExitStack) -> int:
    """Return the read end of a new pipe, closed by `stack`; its write end is closed by `end`, at the latest by both."""
    low, write_end = os.pipe()
    stack.callback(end.close)
    end.callback(os.close, write_end)
    try:
        lifeline = _lift(low)
    finally:
        os.close(low)
    stack.callback(os.close, lifeline)
    return lifeline


def listen_on_loopback() -> socket.socket:
    """Return a new listening socket on 127.0.0.1, for a child to inherit."""
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as low:
        return socket.socket(fileno=_lift(low.fileno()))


async def _readable(fd: int) -> None:
    """Return once `fd` is readable; a pidfd is when its process has exited."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
