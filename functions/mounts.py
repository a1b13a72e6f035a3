"""A directory seen under a second name by this process and what it starts, and by no other (mount_namespaces(7)).

    bind("/run/faashound.run.x/secrets/42.1", "/var/openfaas/secrets")

Programs that were written for OpenFaaS look for their secrets at one fixed path.  A link there would show each function
the secrets of all; a mount in a namespace of the function's own shows it its own, at no cost.

With the privilege to mount, a mount namespace is enough.  Without it there is a user namespace around it, in which our
user and group are what they are outside and all others do not exist (user_namespaces(7)): programs that change their
user, such as sudo, do not work in it.

Contract: to be called in a process that has one thread.  OSError says that the kernel does not allow it; the process is
as good as before, except that it may be in the user namespace already.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

# linux/sched.h, linux/mount.h; os.unshare is there from Python 3.12 on, mount(2) never was.
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19


def bind(source: str, target: str, *, keeps_users: bool = False) -> None:
    """Let the directory `source` be seen at `target` by this process and those that it starts.

    `keeps_users`: other users have to exist, so no user namespace is made.  Raises OSError.
    """
    try:
        _unshare(CLONE_NEWNS)
    except PermissionError:
        if keeps_users:
            raise
        _enter_user_namespace()
    _mount(None, "/", MS_REC | MS_SLAVE)  # what is mounted here is seen here alone
    _mount(source, target, MS_BIND)


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _unshare(CLONE_NEWUSER | CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")  # or the next but one is not allowed
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="ascii")


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        _fail(f"unshare({flags:#x})")


def _mount(source: str | None, target: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    given = None if source is None else os.fsencode(source)
    if libc.mount(given, os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        _fail(f"mount at {target}")


def _fail(what: str) -> None:
    number = ctypes.get_errno() or errno.EPERM
    raise OSError(number, f"{what}: {os.strerror(number)}")
