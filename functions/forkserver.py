"""Starts watchdogs in a few milliseconds: a small process that has everything imported, and forks.

    server = ForkServer(environ)                      # a `supervisor.Launcher`
    server.start()                                    # inside the running loop
    watchdogs = Supervisor(server)
    ...
    await server.stop()                               # after the watchdogs'

A watchdog is a Python program: a new interpreter takes a third of a second of processor time and 20 MiB until it
accepts a connection.  A process that has imported all of it and forks takes some milliseconds, and shares its memory.
What is forked runs `watchdog.main` with the environment that it would have been started with, so all its promises are
its own: it forks its guard, sweeps its trees, obeys the parent-death pipe.  Where there is a directory SECRETS_PATH
and the kernel allows it, the function sees its secrets there (mounts.py).

The two sides talk over a pair of sockets (SOCK_SEQPACKET, so that a message is whole):

    to the server       id; descriptors: a memfd with directory, environment and secrets, parent-death pipe, listener,
                        stderr
    from the server     launched(id, pid), with a pidfd | failed(id, errno) | exited(id, status)

The server ends when the other end of the socket has gone.  When it dies itself it is started again (it is a managed
process like others), and what it had forked goes on: its exit is then known by its pidfd, without a status.
The server has no thread and no loop, so it may fork at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import itertools
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

from .. import watchdog
from . import mounts
from .supervisor import (
    LISTEN_FD,
    PARENT_DEATH_FD,
    UNKNOWN_STATUS,
    ManagedProcess,
    ManagedProgram,
    Supervisor,
    kill_child,
    python_command,
    readable,
    signal_process,
)

REQUEST = struct.Struct("=Q??")  # id, whether there is a listener, and a stderr
ANSWER = struct.Struct("=cQi")  # what happened, id, number
LAUNCHED, FAILED, EXITED = b"l", b"f", b"e"

MAX_FDS = 4

ANSWER_LIMIT_S = 10.0  # a fork takes milliseconds; a server that has died is started again meanwhile

STATUS_LIMIT_S = 1.0  # without a word of a process's exit, after which the server that is to reap it is looked at

STDERR_FD = 2

SECRETS_PATH = "/var/openfaas/secrets"


ABOVE_FD = 16  # descriptors that came with a request are lifted above those that the watchdog gets


# ---------------------------------------------------------------------------------------------------------------
# The gateway's side.
# ---------------------------------------------------------------------------------------------------------------


class ForkedProcess:
    """A watchdog that the server has forked; see `supervisor.Running`."""

    def __init__(self, pid: int, pidfd: int, status: asyncio.Future[int], server_lives: Callable[[], bool]) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._status = status
        self._server_lives = server_lives

    async def exited(self) -> int:
        """Wait for its end and return its status, or UNKNOWN_STATUS if the server has died before it."""
        await readable(self.pidfd)
        for _ in range(int(ANSWER_LIMIT_S / STATUS_LIMIT_S)):
            told, _ = await asyncio.wait((self._status,), timeout=STATUS_LIMIT_S)
            if told:
                return self._status.result()
            if not self._server_lives():
                break
        return UNKNOWN_STATUS

    def close(self) -> None:
        """Kill it if it still runs; the server reaps it."""
        signal_process(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        self._status.cancel()


class ForkServer:
    """Launches watchdogs by forking.  `environ` is what the server's own interpreter is started with."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._ids = itertools.count(1)
        self._launching: dict[int, asyncio.Future[ForkedProcess]] = {}
        self._statuses: dict[int, asyncio.Future[int]] = {}
        self._cleanup = contextlib.ExitStack()
        self._supervisor: Supervisor | None = None
        self._server: ManagedProcess | None = None
        self._socket: socket.socket

    def start(self) -> None:
        """Start the server; once, inside the running loop."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._cleanup.enter_context(self._socket)
        self._cleanup.enter_context(theirs)  # kept: a server that is started again inherits the same
        self._socket.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._on_answer)
        self._cleanup.callback(loop.remove_reader, self._socket)
        self._supervisor = Supervisor()
        command = python_command("faashound.functions.forkserver")
        self._server = self._supervisor.start(ManagedProgram("the fork server", command, self._environ, theirs))

    async def stop(self) -> None:
        """End the server."""
        if self._supervisor is not None:
            await self._supervisor.stop(0.0)
        self._cleanup.close()

    async def launch(self, program: ManagedProgram, parent_death_fd: int) -> ForkedProcess:
        """See `supervisor.Launcher`; the program's command is not looked at, it is the watchdog."""
        number = next(self._ids)
        answer: asyncio.Future[ForkedProcess] = asyncio.get_running_loop().create_future()
        self._launching[number] = answer
        try:
            self._ask(number, program, parent_death_fd)
            async with asyncio.timeout(ANSWER_LIMIT_S):
                return await answer
        except TimeoutError:
            raise OSError("the fork server does not answer") from None
        finally:
            self._launching.pop(number, None)

    def _ask(self, number: int, program: ManagedProgram, parent_death_fd: int) -> None:
        environ_fd = os.memfd_create("environ", os.MFD_CLOEXEC)
        with open(environ_fd, "wb") as file:
            file.write(json.dumps([program.directory, program.told_environ, program.secrets]).encode())
            file.flush()
            fds = [environ_fd, parent_death_fd]
            if program.listener is not None:
                fds.append(program.listener.fileno())
            if program.stderr_fd is not None:
                fds.append(program.stderr_fd)
            request = REQUEST.pack(number, program.listener is not None, program.stderr_fd is not None)
            socket.send_fds(self._socket, [request], fds)

    @property
    def _server_pid(self) -> int | None:
        return None if self._server is None else self._server.pid

    def _lives(self, server_pid: int | None) -> bool:
        """Tell whether the server that had this number lives, and is only late with what it has to tell."""
        return server_pid is not None and server_pid == self._server_pid

    def _on_answer(self) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(self._socket, ANSWER.size, 1)
        except BlockingIOError:
            return
        kind, number, value = ANSWER.unpack(message)
        if kind == EXITED:
            status = self._statuses.pop(number, None)
            if status is not None and not status.done():
                status.set_result(value)
            return
        answer = self._launching.get(number)
        wanted = answer is not None and not answer.done()
        if kind == LAUNCHED and not fds:  # we are out of descriptors: what cannot be watched must not run
            os.kill(value, signal.SIGKILL)  # the server has not reaped it unless it has ended within this moment
            kind, value = FAILED, errno.EMFILE
        if kind == LAUNCHED:
            status = self._statuses[number] = asyncio.get_running_loop().create_future()
            process = ForkedProcess(value, fds[0], status, partial(self._lives, self._server_pid))
            if answer is not None and wanted:
                answer.set_result(process)
            else:  # the one that asked for it has been cancelled
                process.close()
        elif answer is not None and wanted:
            answer.set_exception(OSError(value, os.strerror(value)))


# ---------------------------------------------------------------------------------------------------------------
# The server.
# ---------------------------------------------------------------------------------------------------------------


class Server:
    """Forks what is asked for, and tells of exits."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._children: dict[int, tuple[int, int]] = {}  # by pidfd: pid, and the id of the request

    def run(self) -> None:
        """Serve until the other end has gone."""
        while True:
            for fd, _ in self._poller.poll():
                if fd != self._control.fileno():
                    self._on_exit(fd)
                elif not self._on_request():
                    return

    def _on_request(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._control, REQUEST.size, MAX_FDS)
        if not message:
            return False
        number, has_listener, has_stderr = REQUEST.unpack(message)
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(FAILED, number, error.errno or errno.EAGAIN)
        else:
            if pid == 0:
                self._become_watchdog(fds, has_listener, has_stderr)
            self._on_forked(number, pid)
        for fd in fds:
            os.close(fd)
        return True

    def _on_forked(self, number: int, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:  # out of descriptors: what cannot be watched must not run
            kill_child(pid)
            self._tell(FAILED, number, error.errno or errno.EMFILE)
            return
        self._children[pidfd] = pid, number
        self._poller.register(pidfd, select.POLLIN)
        self._tell(LAUNCHED, number, pid, [pidfd])

    def _on_exit(self, pidfd: int) -> None:
        pid, number = self._children.pop(pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._tell(EXITED, number, os.waitstatus_to_exitcode(status))

    def _tell(self, kind: bytes, number: int, value: int, fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(BrokenPipeError):  # the gateway has gone: `run` sees it next
            socket.send_fds(self._control, [ANSWER.pack(kind, number, value)], fds)

    def _become_watchdog(self, fds: list[int], has_listener: bool, has_stderr: bool) -> NoReturn:
        """In the child: have what a new process would have, and be the watchdog until it ends."""
        status = 1
        try:
            os.setpgid(0, 0)  # a terminal's Ctrl-C is for the gateway, which then ends its processes in order
            for pidfd in self._children:
                os.close(pidfd)
            self._control.close()
            with open(fds[0], "rb", closefd=False) as file:
                file.seek(0)
                directory, environ, secrets = json.load(file)
            targets = [PARENT_DEATH_FD, *([LISTEN_FD] if has_listener else []), *([STDERR_FD] if has_stderr else [])]
            _take_descriptors(fds[1:], targets)
            os.close(fds[0])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(environ)
            if secrets is not None:
                _show_secrets(secrets, keeps_users="user" in environ)
            if directory is not None:
                os.chdir(directory)
            with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
                file.write(process_name(environ.get("OPENFAAS_NAME", "")))
            status = watchdog.main([], os.environ)
        except BaseException:  # noqa: BLE001 - nothing may get back into the server's loop, in another process
            traceback.print_exc()
        finally:
            os._exit(status)


def _show_secrets(directory: str, *, keeps_users: bool) -> None:
    """Have a function's secrets at SECRETS_PATH too, if that is there; where it cannot be, its log says so."""
    if not os.path.isdir(SECRETS_PATH):  # noqa: PTH112 - in the path of each start
        return
    try:
        mounts.bind(directory, SECRETS_PATH, keeps_users=keeps_users)
    except OSError as error:
        told = f"the secrets are where secret_mount_path says, and not at {SECRETS_PATH}"
        print(f"{os.environ.get('OPENFAAS_NAME')}: {told}: {error.strerror}", file=sys.stderr)


def process_name(function: str) -> str:
    """Return what `ps` shows of the watchdog of a function: the kernel keeps 15 bytes (prctl(2), PR_SET_NAME)."""
    return f"fw {function}"[:15]


def _take_descriptors(fds: Sequence[int], targets: Sequence[int]) -> None:
    """Give each of `fds` the number in `targets`, whatever has that now."""
    lifted = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE_FD) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, target in zip(lifted, targets, strict=True):
        os.dup2(fd, target)
        os.close(fd)


def main() -> int:
    """Be the server."""
    import psutil  # noqa: F401 - a watchdog's guard loads it, which takes longer than all else that it does

    watchdog.settle_descriptors()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the gateway, whose end is ours
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, what the watchdogs share
    Server(socket.socket(fileno=LISTEN_FD)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
