"""Waking other processes: a datagram to each that has the queue open, once what they may wait for is on disk.

A notifier is a datagram socket with a file in `bells/`; waking its process sends one byte, a `WakeUp`.  Each sender
keeps one connected socket per notifier, as the kernel charges unread datagrams to their sender: through a shared
socket, one process that has stopped reading would silence the rest.  A notifier whose buffer is full loses the byte; it
has at least two unread then, and a process that reads two or more at once takes it that anything may have happened.

Most commits tell only that calls have ended, and most processes have nobody who waits for that.  Such a one says so by
the mode of its socket's file, and is not woken for it: to look costs a tenth of waking it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import time

from ...watchdog import Trouble, log, reason_of
from .limits import SETTLED_NS


class WakeUp:
    """Why a process may want to look at the queue; added up by `|`.

    Plain numbers: an IntFlag takes a microsecond to add, and there is one with each step of each call.
    """

    NOTHING = 0
    WORK = 1
    FINISHED = 2
    CANCEL = 4
    ALL = 7


_NOT_FOR_ENDS = stat.S_ISVTX  # it means nothing on a socket, and earlier versions do not set it: they are told of all


class Notifier:
    """Our own socket and the way to all others. `wake` belongs to the writer thread, `read` to the event loop."""

    def __init__(self, notifiers_fd: int) -> None:
        self._notifiers_fd = notifiers_fd
        self._others: dict[str, socket.socket] = {}
        self._names: set[str] = set()
        self._changed_ns = -1
        self._trouble = Trouble(log.warning)
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        with contextlib.ExitStack() as stack:
            self._own = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            self._own.bind(self._address(self.name))
            self._hears_of_ends = True
            self.hear_of_ends(False)
            stack.pop_all()

    def _address(self, name: str) -> str:
        return f"/proc/self/fd/{self._notifiers_fd}/{name}"

    def fileno(self) -> int:
        return self._own.fileno()

    def read(self) -> int:
        """All that has come since the last time; never blocks."""
        found: list[int] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.extend(self._own.recv(1))
        return WakeUp.ALL if len(found) > 1 else sum(found) & WakeUp.ALL

    def hear_of_ends(self, wanted: bool) -> None:
        """Be woken when calls have ended, or not, by what commits from now on."""
        if wanted is not self._hears_of_ends:
            with contextlib.suppress(OSError):  # without its file none could wake us anyhow
                os.chmod(self.name, 0o700 if wanted else 0o700 | _NOT_FOR_ENDS, dir_fd=self._notifiers_fd)
                self._hears_of_ends = wanted

    def wake(self, wake_up: int) -> None:
        """Wake every other process. One that cannot be woken is told of, and must not keep the queue from its work."""
        try:
            self._look_around()
        except OSError as error:
            self._trouble.tell(f"cannot wake any other process: {reason_of(error)}")
            return
        problem = ""
        for name in self._names:
            try:
                if wake_up != WakeUp.FINISHED or self._is_for_ends(name):
                    self._reach(name).send(bytes([wake_up]))
            except BlockingIOError:
                pass  # full: its process has not read what was sent before
            except (ConnectionRefusedError, FileNotFoundError):  # its process has died
                self._drop(name)
                with contextlib.suppress(OSError):  # the next wake-up tries again: a full disk may refuse even this
                    os.unlink(name, dir_fd=self._notifiers_fd)
            except OSError as error:
                problem = f"cannot wake the process behind {name}: {reason_of(error)}"
                self._drop(name)
        if problem or wake_up != WakeUp.FINISHED:  # else some were passed over, and may be out of reach yet
            self._trouble.tell(problem)

    def _look_around(self) -> None:
        """Bring the names up to date: listing the directory for every commit would cost more than sending."""
        changed_ns = os.fstat(self._notifiers_fd).st_mtime_ns
        if changed_ns == self._changed_ns:
            return
        # A change that is this young may be followed by another within the same tick of the file system's clock.
        self._changed_ns = changed_ns if changed_ns < time.time_ns() - SETTLED_NS else -1
        self._names = set(os.listdir(self._notifiers_fd)) - {self.name}
        for name in self._others.keys() - self._names:
            self._drop(name)

    def _is_for_ends(self, name: str) -> bool:
        return not os.stat(name, dir_fd=self._notifiers_fd).st_mode & _NOT_FOR_ENDS

    def _reach(self, name: str) -> socket.socket:
        if name not in self._others:
            self._others[name] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._others[name].connect(self._address(name))
        return self._others[name]

    def _drop(self, name: str) -> None:
        if name in self._others:
            self._others.pop(name).close()

    def close(self) -> None:
        self._own.close()
        for other in self._others.values():
            other.close()
        with contextlib.suppress(OSError):  # then those who wake us in vain remove it
            os.unlink(self.name, dir_fd=self._notifiers_fd)
