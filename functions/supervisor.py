"""Keeps programs of ours running beside this one: watchdogs of local functions, a local worker.

    supervisor = Supervisor()
    process = supervisor.start(ManagedProgram("the worker", (sys.executable, "-m", "faashound.worker"), environ))
    await supervisor.end(process, grace_s=30)      # this one, and leave the others
    await supervisor.stop(grace_s=30)              # all of them

What it promises: a process that dies is logged with the reason and started again, with growing delay; none outlives
this process, whatever way it ends.  For that each inherits the read end of a pipe, the parent-death pipe, whose write
end is only here: when we end, the kernel closes it, and a process that reads end of file stops at once.

One task for each managed process runs: launch, wait for the exit, reap, log, sleep, again.  A process is known by its
pidfd, which cannot come to mean another process as a number can.  How it comes into being is a `Launcher`'s business:
`Spawner` here runs a command, the fork server (forkserver.py) forks a watchdog.
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
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ..watchdog import (
    BAD_SETTINGS_STATUS,
    FIRST_RESTART_S,
    PROVEN_AFTER_S,
    log,
    next_restart_s,
    reason_of,
    spawn_under_own_limit,
)

KILL_GRACE_S = 5.0  # between "stop at once" and SIGKILL: to end the trees that were started, to hand back calls


LISTEN_FD = 3  # systemd's SD_LISTEN_FDS_START


PARENT_DEATH_FD = 4


UNKNOWN_STATUS = 1  # of a process whose exit status was lost


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


@dataclass(frozen=True)
class ManagedProgram:
    """What is to be kept running: `name` is what the log calls it, `environ` its whole environment.

    It inherits `listener` as systemd hands it (sd_listen_fds(3)), writes its stderr to `stderr_fd` if that is given,
    else to ours, and is started in `directory`, or where we were.  One that the fork server starts sees the directory
    `secrets` where OpenFaaS has them.  `on_trouble` is told why it ended when it ends again before it has lived for
    PROVEN_AFTER_S, and "" once it has; `on_restart` is called each time that it is started again.
    """

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    listener: socket.socket | None = None
    stderr_fd: int | None = None
    directory: str | None = None
    secrets: str | None = None
    on_trouble: Callable[[str], None] = lambda trouble: None
    on_restart: Callable[[], None] = lambda: None

    @property
    def told_environ(self) -> dict[str, str]:
        """Its environment with what it needs to know of the descriptors that it inherits."""
        told = {**self.environ, "FAASHOUND_LIFELINE_FD": str(PARENT_DEATH_FD)}
        if self.listener is not None:
            told["LISTEN_FDS"] = "1"  # no LISTEN_PID: it is not known before the process exists
        return told


class Running(Protocol):
    """A process that was launched.  Its owner closes it once it has exited, whatever happens."""

    pid: int
    pidfd: int

    async def exited(self) -> int:
        """Wait for its end and return its status as in `describe_exit`."""

    def close(self) -> None:
        """Kill it if it still runs, reap it, and forget it."""


class Launcher(Protocol):
    """What brings a program into being."""

    async def launch(self, program: ManagedProgram, parent_death_fd: int) -> Running:
        """Start it; raises OSError."""


class SpawnedProcess:
    """A child of this process."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd

    async def exited(self) -> int:
        """See `Running`."""
        await readable(self.pidfd)
        return read_status(self.pidfd)

    def close(self) -> None:
        """See `Running`."""
        signal_process(self.pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)


class Spawner:
    """Launches a program by posix_spawn(3)."""

    async def launch(self, program: ManagedProgram, parent_death_fd: int) -> SpawnedProcess:
        """See `Launcher`."""
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        if program.stderr_fd is not None:
            actions.append((os.POSIX_SPAWN_DUP2, program.stderr_fd, 2))
        if program.listener is not None:
            actions.append((os.POSIX_SPAWN_DUP2, program.listener.fileno(), LISTEN_FD))
        actions.append((os.POSIX_SPAWN_DUP2, parent_death_fd, PARENT_DEATH_FD))
        # A group of its own: a terminal's Ctrl-C is for us, who then end our processes in order.
        move = () if program.directory is None else ("/usr/bin/env", "-C", program.directory)  # GNU coreutils 8.28
        command, environ = (*move, *program.command), program.told_environ
        spawn = partial(os.posix_spawn, command[0], command, environ, file_actions=actions, setpgroup=0)
        pid = spawn_under_own_limit(spawn, parent_death_fd)  # it raises its own, and knows then what its functions get
        try:
            return SpawnedProcess(pid, os.pidfd_open(pid))
        except OSError:  # out of descriptors: what cannot be watched must not run
            kill_child(pid)
            raise


class ManagedProcess:
    """One program that is kept running.  `pid` is None between two lives."""

    def __init__(self, program: ManagedProgram) -> None:
        self.program = program
        self.restart_count = 0
        self.last_exit: str | None = None  # why its last life ended, if it was not told to
        self.is_ending = False
        self._running: Running | None = None

    @property
    def pid(self) -> int | None:
        """The number of the process, if there is one."""
        return None if self._running is None else self._running.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self._running is not None:
            signal_process(self._running.pidfd, number)

    async def run(self, launcher: Launcher, parent_death_fd: int) -> int:
        """Run one process to its end and return its status as in `describe_exit`; OSError if it cannot be started.

        When cancelled, it is killed and reaped first.
        """
        self._running = running = await launcher.launch(self.program, parent_death_fd)
        try:
            return await running.exited()
        finally:
            running.close()
            self._running = None


class Supervisor:
    """Keeps processes running until `stop`, which must follow.  Made inside the running loop."""

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or Spawner()
        self._tasks: dict[ManagedProcess, asyncio.Task[None]] = {}
        self._parent_death_end = contextlib.ExitStack()
        self._cleanup = contextlib.ExitStack()
        self._parent_death_fd = _open_parent_death_pipe(self._cleanup, self._parent_death_end)

    def start(self, program: ManagedProgram) -> ManagedProcess:
        """Keep `program` running until it is told to end."""
        process = ManagedProcess(program)
        self._tasks[process] = asyncio.create_task(self._keep(process), name=program.name)
        return process

    async def end(self, process: ManagedProcess, grace_s: float) -> None:
        """End one process: SIGTERM, after `grace_s` seconds once more, then SIGKILL; return when it is gone."""
        task = self._tasks.get(process)
        if task is None:
            return
        self._ask_to_end(process)
        _, late = await asyncio.wait((task,), timeout=grace_s)
        if late:  # the second one ends what it has, with an answer
            process.signal(signal.SIGTERM)
            await asyncio.wait((task,), timeout=KILL_GRACE_S)
        task.cancel()
        await asyncio.wait((task,))
        self._tasks.pop(process, None)

    async def stop(self, grace_s: float) -> None:
        """End every process: SIGTERM, and after `grace_s` seconds what is left is stopped at once, then killed."""
        for process in self._tasks:
            self._ask_to_end(process)
        await self._ended(grace_s)
        self._parent_death_end.close()
        await self._ended(KILL_GRACE_S)
        for task in self._tasks.values():
            task.cancel()
        await self._ended(None)
        self._cleanup.close()

    def _ask_to_end(self, process: ManagedProcess) -> None:
        if process.pid is None:
            self._tasks[process].cancel()
        elif not process.is_ending:  # a second signal would cut what it finishes
            process.signal(signal.SIGTERM)
        process.is_ending = True

    async def _ended(self, timeout_s: float | None) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_s)

    async def _keep(self, process: ManagedProcess) -> None:
        """Run a process, again and again, until told to end."""
        delay_s: float | None = None
        program = process.program
        while True:
            started_s = time.monotonic()
            proven = asyncio.get_running_loop().call_later(PROVEN_AFTER_S, program.on_trouble, "")
            try:
                status = await process.run(self._launcher, self._parent_death_fd)
                process.last_exit = describe_exit(status)
            except OSError as error:
                status, process.last_exit = 1, f"cannot be started: {reason_of(error)}"
            finally:
                proven.cancel()
            if process.is_ending:
                return
            delay_s = next_restart_s(delay_s, time.monotonic() - started_s, status)
            if delay_s > FIRST_RESTART_S:
                program.on_trouble(process.last_exit)
            log.error(f"{program.name} {process.last_exit}; next start in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            process.restart_count += 1
            program.on_restart()


def read_status(pidfd: int) -> int:
    """Return the status of a child that has exited, and is still to be reaped."""
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    if result is None:
        raise AssertionError("waitid without WNOHANG returns a result")
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def kill_child(pid: int) -> None:
    """Kill and reap a child."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def signal_process(pidfd: int, number: signal.Signals) -> None:
    """Send a signal to the process of `pidfd`, unless it has been reaped."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def lift(fd: int) -> int:
    """Return a duplicate of `fd` above the numbers that a child's descriptors get, close-on-exec like every other.

    From below, one dup2 of a spawn would overwrite the source of the next.
    """
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, PARENT_DEATH_FD + 1)


def _open_parent_death_pipe(stack: contextlib.ExitStack, end: contextlib.ExitStack) -> int:
    """Return the read end of a new pipe, closed by `stack`; its write end is closed by `end`, at the latest by both."""
    low, write_end = os.pipe()
    stack.callback(end.close)
    end.callback(os.close, write_end)
    try:
        read_end = lift(low)
    finally:
        os.close(low)
    stack.callback(os.close, read_end)
    return read_end


async def readable(fd: int) -> None:
    """Return once `fd` is readable; a pidfd is when its process has exited."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
