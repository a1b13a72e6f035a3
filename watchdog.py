"""fwatchdog: put any program behind HTTP, one process per request, nothing left behind.

    fprocess="wc -c" python watchdog.py
    curl --data-binary hello http://127.0.0.1:8080/

A request's body becomes the process's standard input, its standard output the response: once it is whole, or with
mode=streaming as it is printed.  The exit status decides, as long as nothing of the answer is out:

    exit 0                      200 and the output, with X-Duration-Seconds
    exit N                      500, `exit status N`, then the output
    ended by a signal           500, `signal: killed` (and so on), then the output
    could not be started        500 and the reason
    exec_timeout reached        408, `Killed process.`, at the deadline
    too many at once            429 (max_inflight)
    headers too large           431 (for the server, or for execve)
    body above max_body         413

The whole user interface is the table of settings below, read from environment variables once at the start; a value
that makes no sense stops the start with exit code 2.  Names, codes and texts are those of the OpenFaaS classic
watchdog.  What it refuses to do: run a shell, interpret bodies, keep state, serve anything but HTTP/1.x.

With mode=http the program is a server of its own, started once and watched over, and requests are passed on to it:
503 while it takes no connections, 504 at the deadline, 502 if it breaks off.  mode=static serves files.

The file stands alone (standard library, h11, uvloop, psutil, prometheus-client).  Each section uses only what stands
above it: limits, errors, settings, HTTP policy, HTTP drivers, process rules, process driver, application, lifecycle.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # a `token.py` beside this file, or in PYTHONPATH, is a function's: look there last
    _stdlib = os.path.dirname(getattr(os, "__file__", ""))
    if _stdlib in sys.path:
        sys.path[:] = sys.path[sys.path.index(_stdlib) :] + sys.path[: sys.path.index(_stdlib)]

import asyncio
import base64
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import gc
import http
import importlib
import io
import itertools
import json
import math
import mmap
import pwd
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import time
import traceback
import urllib.parse
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar, cast

import h11
import uvloop

if TYPE_CHECKING:
    from prometheus_client import Metric

VERSION = "0.1.0"
T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------
# Limits, each with its reason.
# ---------------------------------------------------------------------------------------------------------------

MAX_FIELDS_COUNT = 500  # of a head or a trailer; Apache and Tomcat allow 100, Node 2000; each costs as much as 1 KiB
MAX_HEAD_BYTES = 65536  # request line and fields; nginx allows 32 KiB, Go 1 MiB, one variable of execve 128 KiB
BUFFERED_BYTES = 262144  # of a body that waits for its consumer before reading stops: four reads of the loop
EVENTS_AT_ONCE_COUNT = 64  # heads and chunks of one connection in one turn of the loop: half a millisecond
MAX_INTERIM_COUNT = 16  # answers before the answer (RFC 9110 15.2); Go's client takes 5
FRAMING_BYTES = 262144  # of a chunked body that are not its data, besides two for each byte of data
BACKLOG = 1024  # connections that the kernel keeps for us while the loop is busy (capped by net.core.somaxconn)
MAX_LISTEN_FDS_COUNT = 64  # of socket activation
MAX_WORKERS_COUNT = 64  # processes that share a port
AUTO_WORKERS_COUNT = 4  # of them by default: with its functions a loop keeps two processors busy or more
MAX_CONNECTIONS_COUNT = 10000  # of one process, if neither the operator nor its descriptors allow fewer: about 100 MiB
METRICS_CONNECTIONS_COUNT = 64  # of the port that a scraper and some probes look at
REFUSED_AT_ONCE_COUNT = 16  # connections above the limit that are told so at the same time; more are closed
TOLD_EVERY_S = 10.0  # the log, that connections are refused or cannot be accepted
MAX_DESCRIPTORS_COUNT = 1 << 20  # what we ask for at most; some containers allow 2**30
KEPT_BACK_COUNT = 64  # descriptors that connections may not take: for listening, files of a queue, pipes to children
ACCEPTS_COUNT = 64  # connections in one turn of the loop
TURN_S = 0.002  # a new connection waits so long for the process that has the fewest
LATE_S = 1.0  # for the first byte on a connection that is new when a drain begins
ACCEPT_PAUSE_S = 0.1  # when there are no descriptors for another connection
COUNTERS_BYTES = 1 << 23  # room for what one process counts; only what is used takes memory
FIRST_RESTART_S = 0.1  # until a process of ours that has died is started again, and then longer each time
LONGEST_RESTART_S = 30.0
PROVEN_AFTER_S = 10.0  # a process that has lived so long starts its delays from the beginning
SILENT_SERVER_S = 10.0  # a server that takes no connection for so long after its start is spoken of in the log
SERVER_POLL_S = 0.005  # between the first two looks whether it does, and then longer each time
LONGEST_SERVER_POLL_S = 0.1
SERVER_WAIT_S = 30.0  # for a server that is down, of a call that has no limit of its own
SERVER_KEPT_S = 0.5  # an idle connection to it: one that serves a single connection at a time is soon free for others
SERVER_PORTS = range(20000, 32768)  # of those that are chosen: connections get theirs above (ip(7))
PORT_TRIES_COUNT = 100
SERVER_GRACE_S = 2.0  # between SIGTERM and SIGKILL for a server without a term_grace; Docker waits 10 s in all
BAD_SETTINGS_STATUS = 2  # our programs' exit status for settings that no restart will mend
LINGER_S = 2.0  # after a refusal: how long the client may go on sending before the connection is cut
LINGER_BYTES = 1 << 24  # ... and how much
WATCH_IDLE_S = 30  # a connection without traffic is asked so often whether its other end lives; IPVS forgets at 900 s
WATCH_EVERY_S = 10  # ... and again, while there is no answer
WATCH_COUNT = 3  # ... and as many unanswered questions end it
SILENT_S = WATCH_IDLE_S + WATCH_EVERY_S * WATCH_COUNT  # what was sent may stay unconfirmed so long
FAREWELL_S = 1.0  # at the end of a drain: for the answers to requests that did not finish
CONNECT_TIMEOUT_S = 10.0  # look-up and handshakes; curl waits 300 s, Go's transport 30 s; behind us is a local network
ATTEMPT_TIMEOUT_S = 5.0  # ... of it for one address, and for TLS: after the third SYN (0, 1 and 3 s), before the fourth
ATTEMPT_DELAY_S = 0.25  # a silent address has the connection to itself so long (RFC 8305 5, "RECOMMENDED")
MAX_ATTEMPTS_COUNT = 16  # addresses of one name that are tried: with these delays the last one still has its time
KEPT_S = 20.0  # an idle connection to an upstream; below the 30 s after which a watchdog closes its side
KEPT_CONNECTIONS_COUNT = 64  # idle connections kept for each upstream
UNIX_WHOLE_BYTES = 16384  # written to a Unix socket at once they are one buffer of the kernel, which is not divided
EVENTS_COUNT = 64  # taken from an epoll set in one turn
PIPE_BYTES = 65536  # one read of a pipe: what a pipe holds by default (pipe(7))
MAX_PIPE_BYTES = 1 << 20  # what a pipe may hold (/proc/sys/fs/pipe-max-size)
WIDE_PIPE_BYTES = 262144  # asked for once much passes; a user may have 64 MiB in all (pipe-user-pages-soft)
SPILL_BYTES = 262144  # output kept in memory; the rest goes to an unlinked file in $TMPDIR
FILE_CHUNK_BYTES = 262144  # one write of such a file
SPILL_WAIT_S = 0.003  # for more output, in one of the few threads that there are
FILE_HOP_BYTES = 1 << 22  # to or from it in one turn of a thread, which learns only then that a call has ended
SNIFF_BYTES = 512  # of an output, to tell text from binary, as in Go's net/http
OUTPUT_GRACE_S = 0.1  # for a descendant that still holds the output of a process that has exited
DEADLINE_WAIT_S = 0.05  # a 408 waits so long for the end of the tree; the sweep goes on by itself
HANGUP_WAIT_S = 1.0  # an abandoned call holds its max_inflight slot so long at most while its tree ends
REFILL_S = 0.05  # a taken process is replaced so late at the latest
REFILL_PAUSE_S = 0.002  # after a call has ended: its answer, and the next request, come before a start
LONGEST_REFILL_PAUSE_S = 30.0  # between two starts of a function that ends before it has a request
ROOTS_COUNT = 16384  # processes of functions at once that the guard can know of
SESSIONS_COUNT = 4096  # ended calls whose session numbers are remembered, for orphans that wiped their environment
CHILDREN_BYTES = 65536  # of a list of our children, at one reading: more than the kernel gives at once
SWEEP_PAUSE_S = 0.001  # between two sweeps while trees die: each level that dies uncovers the next
LONGEST_SWEEP_PAUSE_S = 0.05
FREEZE_AFTER_COUNT = 3  # sweeps that have found something: then it forks faster than we follow, or is a deep tree
FREEZE_LIMIT_S = 2.0  # for stopping all of it before it is killed
SWEEP_LIMIT_S = 5.0  # after that, what SIGKILL does not end (uninterruptible sleep) is reported and left
GUARD_LOOKS_COUNT = 50  # of the guard's in each of both at least: a fork bomb leaves it little of a processor
MAX_EXEC_STRING_BYTES = 131072  # one argument or variable (execve(2), MAX_ARG_STRLEN)
MAX_LOG_LINE_BYTES = 8192  # a longer line of a function's stderr is cut into pieces
LINES_AT_ONCE_COUNT = 64  # lines of a function's stderr in one turn of the loop
LAST_LINES_COUNT = 2000  # lines of it at the end of the call
LOG_RETRY_S = 0.02  # between two tries to write a log whose reader is slow
LOG_BACKLOG_BYTES = 1 << 20  # log lines that wait for a slow reader; more are dropped and counted
SECRET_FIELDS = frozenset(  # header fields that are never shown, logged, or passed on to third parties
    b"authorization proxy-authorization authentication-info cookie cookie2 set-cookie set-cookie2 x-api-key api-key"
    b" apikey x-functions-key x-goog-api-key x-auth-token x-access-token x-amz-security-token x-csrf-token x-xsrf-token"
    b" private-token x-gitlab-token x-vault-token x-worker-token".split()
)
_SECRET_ENDS = tuple(  # of other fields' names: they are not shown either, but third parties may be meant to have them
    b"-token -secret -password -passwd -api-key -apikey -access-key -subscription-key -assertion -session".split()
)


def is_secret_field(name: bytes) -> bool:
    """Tell whether the value of a header field, whose name is in lower case, is not for people's eyes."""
    return name in SECRET_FIELDS or (b"-" + name).endswith(_SECRET_ENDS)


# ---------------------------------------------------------------------------------------------------------------
# Errors: one root; each kind carries the status to answer and a text that is safe to show to a client.
# ---------------------------------------------------------------------------------------------------------------


class FaashoundError(Exception):
    """Root of every error of ours: `status` is what a client is answered, the text is safe to show."""

    status: ClassVar[int] = 500
    text: ClassVar[str] = ""  # of a kind that always says the same
    headers: Sequence[tuple[bytes, bytes]] = ()

    def __init__(self, text: str = "") -> None:
        super().__init__(text or self.text)


def _strerror(error: OSError | UnicodeError) -> str:
    """Return the words of an error of the system alone.

    asyncio adds an address as a tuple, ssl the place in its source, and getaddrinfo the codec that takes no such name.
    """
    if isinstance(error, UnicodeError):
        return "it cannot be the name of a host"
    if isinstance(error, ssl.SSLError):
        return re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", error.strerror or str(error)).lower()
    if error.errno is not None and error.errno > 0:  # getaddrinfo's are below
        return os.strerror(error.errno).lower()
    return (error.strerror or "").lower() or str(error) or type(error).__name__  # a text of ours has no number


def reason_of(error: Exception, place: object = None) -> str:
    """Return what an operator is told of an error: of one of the system its words and file, no number and no tuples.

    `place` is told beside it.
    """
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    is_new = isinstance(error.filename, str) and error.filename != str(place)
    return _strerror(error) + (f" ({error.filename})" if is_new else "")


class BadSettings(FaashoundError):
    """The environment asks for something impossible.  `problems` names every bad variable, a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("bad settings:\n" + "\n".join(f"  {problem}" for problem in self.problems))


class CannotStart(FaashoundError):
    """Something that the operator asked for cannot be had: an address, the lock file."""


# ---------------------------------------------------------------------------------------------------------------
# Settings: a program declares a frozen dataclass whose every field is a `setting(...)`: the name as the operator
# types it, the default as typed, the parser, one sentence.  Parsing, --help, the README's reference and the tests
# all come from that one declaration.  An empty variable counts as unset, as it does in Go and in compose files.
# Nothing is guessed: all bad values are reported together and the program does not start.
# ---------------------------------------------------------------------------------------------------------------

_DURATION_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+", re.ASCII)
LONGEST_DURATION_S = float(2**63 // 10**9)  # Go's time.Duration is an int64 of nanoseconds: about 292 years
DURATION_HELP = 'whole seconds ("30") or a Go duration ("500ms", "1m30s", "1h")'


def parse_duration(text: str) -> float:
    """Return seconds for `text`: a bare integer is seconds, else a Go duration (time.ParseDuration, unsigned).

    Raises ValueError, whose text says what is allowed, for anything else; negative values are refused.
    """
    if re.fullmatch(r"[0-9]+", text, re.ASCII):
        value_s = float(text)
    elif _DURATION.fullmatch(text):
        value_s = sum(float(number) * _DURATION_UNITS_S[unit] for number, unit in _DURATION_PART.findall(text))
    else:
        raise ValueError(f"allowed: {DURATION_HELP}")
    if value_s > LONGEST_DURATION_S:
        raise ValueError(f"longer than a Go duration can be; allowed: {DURATION_HELP}")
    return value_s


def parse_positive_duration(text: str) -> float:
    """Return seconds, as `parse_duration`, of a duration that must not be zero."""
    value_s = parse_duration(text)
    if value_s == 0:
        raise ValueError(f"must be longer than 0; allowed: {DURATION_HELP}")
    return value_s


def format_duration(value_s: float) -> str:
    """Return the shortest text among ours that `parse_duration` reads back as `value_s` to the nanosecond."""
    whole_ns = round(value_s * 1e9)
    for unit, size_ns in (("h", 3600 * 10**9), ("m", 60 * 10**9), ("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if whole_ns and whole_ns % size_ns == 0:
            return f"{whole_ns // size_ns}{unit}"
    return f"{whole_ns}ns" if whole_ns else "0s"


def parse_bool(text: str) -> bool:
    """Return the truth of `true`, `false`, `1` or `0` in any case; ValueError for anything else."""
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError:
        raise ValueError("allowed: true, false, 1, 0") from None


def parse_number(text: str, low: int, high: int, kind: str = "a whole number") -> int:
    """Return a whole number from `low` to `high`; `kind` is what the error calls it."""
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or not low <= int(text) <= high:
        raise ValueError(f"allowed: {kind} from {low} to {high}")
    return int(text)


parse_count = partial(parse_number, low=0, high=2**31 - 1)
parse_positive_count = partial(parse_number, low=1, high=2**31 - 1)
parse_port = partial(parse_number, low=0, high=65535, kind="a port")


def parse_workers(text: str) -> int:
    """Return how many processes are to share a port, 1 to MAX_WORKERS_COUNT; `auto` is one for each processor, to 4."""
    if text == "auto":
        return min(usable_processors_count(), AUTO_WORKERS_COUNT)
    return parse_number(text, 1, MAX_WORKERS_COUNT, "auto, or a whole number")


WORKERS_HELP = f"processes that share the port; auto: one per usable processor, at most {AUTO_WORKERS_COUNT}"


CONNECTIONS_HELP = (
    "connections at once, in equal parts for each worker; above it the one that was idle longest is closed, or the new"
    " one gets 503"
)
CONNECTIONS_DEFAULT = f"{MAX_CONNECTIONS_COUNT} for each worker, or what its descriptors allow"
PER_ADDRESS_HELP = (
    "connections of one client, an IPv4 address or an IPv6 /64; parts, and above it, as with max_connections"
)
PER_ADDRESS_DEFAULT = "three quarters of max_connections"


def usable_processors_count() -> int:
    """Return how many processors this process may keep busy: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):  # not the second version of control groups, or none at all
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


_SIZE_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Return bytes for `1048576`, `64KiB`, `512MiB`, `1GB` and the like."""
    match = re.fullmatch(r"([0-9]{1,15})(B|KiB|MiB|GiB|KB|MB|GB)?", text, re.ASCII)
    if not match:
        raise ValueError('allowed: bytes, or a number with KiB, MiB, GiB, KB, MB or GB ("512MiB")')
    return int(match[1]) * _SIZE_UNITS[match[2] or ""]


def parse_text(text: str) -> str:
    """Return `text` unless it has control characters, which no setting of ours can mean."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("allowed: text without control characters")
    return text


def parse_header_value(text: str) -> str:
    """Return `text` if it can stand as an HTTP field value: visible ASCII with inner spaces (RFC 9110 5.5)."""
    if not re.fullmatch(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?", text):
        raise ValueError("allowed: a header value of visible ASCII characters")
    return text


def parse_command(text: str) -> tuple[str, ...]:
    """Return the words of a command line split by the shell's quoting rules; no shell is run."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{str(error).lower()}; allowed: a command line with balanced quotes") from None
    if not words or not words[0]:
        raise ValueError("allowed: a command line with at least the program's name")
    if "\0" in text:
        raise ValueError("allowed: a command line without NUL characters")
    if max(len(os.fsencode(word)) for word in words) >= MAX_EXEC_STRING_BYTES:
        raise ValueError(f"allowed: a command line whose words are each shorter than {MAX_EXEC_STRING_BYTES} bytes")
    return tuple(words)


class Identity(NamedTuple):
    """As whom functions run: the numbers of user, group and further groups, and the variables that tell of them."""

    uid: int
    gid: int
    groups: Sequence[int]
    variables: Mapping[str, str]


USER_HELP = "allowed: the name of a user, or UID:GID as numbers; not root"
_LARGEST_ID = 2**32 - 2  # -1 means "leave it" to setresuid(2)


def parse_user(text: str) -> Identity:
    """Return the user that `text` names, with all groups, or that UID:GID stands for, with that group only."""
    numbers = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text, re.ASCII)
    if numbers:
        identity = Identity(int(numbers[1]), int(numbers[2]), (), {})
    else:
        try:
            found = pwd.getpwnam(text)
        except (KeyError, ValueError):
            raise ValueError(f"there is no such user; {USER_HELP}") from None
        variables = {"HOME": found.pw_dir, "USER": text, "LOGNAME": text}
        groups = tuple(os.getgrouplist(text, found.pw_gid))
        identity = Identity(found.pw_uid, found.pw_gid, groups, variables)
    if not (0 < identity.uid <= _LARGEST_ID and identity.gid <= _LARGEST_ID):
        raise ValueError(USER_HELP)
    return identity


# What it takes to run functions as another user (capabilities(7)): to become that user and give it its pipes, to signal
# its processes, and to read the mark in their environment.
_USER_CAPABILITIES = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_PTRACE": 19}


def missing_capabilities() -> list[str]:
    """Return what this process lacks of the rights that `user` needs; root has them unless they were taken away."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        held = int(next(line for line in file if line.startswith("CapEff:")).split()[1], 16)
    return [name for name, number in _USER_CAPABILITIES.items() if not held >> number & 1]


def parse_choice(*choices: str) -> Callable[[str], str]:
    """Return a parser that takes one of `choices` and nothing else."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"allowed: {', '.join(choices)}")
        return text

    return parse


def parse_unasked(text: str) -> bool:
    """Return False; ValueError for true: a check that an image relies on must not be gone without a word."""
    if parse_bool(text):
        raise ValueError("callers' tokens are not checked here; allowed: false, behind a proxy that checks them")
    return False


class Setting(NamedTuple):
    """One row of a program's table of settings: everything there is to know about one variable.

    `default` is written as an operator would type it; None means the variable is required, "" that it is unset.
    `modes` are those in which it means something; none: it does in all.
    """

    name: str
    default: str | None
    parse: Callable[[str], Any]
    help: str
    alias: str | None = None
    default_note: str | None = None
    modes: tuple[str, ...] = ()


def setting(
    name: str,
    default: str | None,
    parse: Callable[[str], Any],
    help: str,  # noqa: A002 - the field's own word, as in argparse
    *,
    alias: str | None = None,
    default_note: str | None = None,
    modes: tuple[str, ...] = (),
) -> Any:
    """Declare a field of a settings dataclass; see `Setting` for the meaning of each argument."""
    return field(metadata={"setting": Setting(name, default, parse, help, alias, default_note, modes)})


def settings_table(kind: type) -> dict[str, Setting]:
    """Return the rows of `kind`, a settings dataclass: field name to `Setting`, own ones first, then each base's."""
    rows = {each.name: each.metadata["setting"] for each in dataclasses.fields(kind)}
    return {name: rows[name] for base in kind.__mro__ for name in vars(base).get("__annotations__", ()) if name in rows}


def setting_names(kind: type) -> frozenset[str]:
    """Return every name and alias by which a setting of `kind` can be given."""
    return frozenset(name for row in settings_table(kind).values() for name in (row.name, row.alias) if name)


def parse_settings(kind: type[T], environ: Mapping[str, str]) -> T:
    """Return `kind`, a settings dataclass, filled from `environ`.

    If `kind` has a method `conflicts() -> Iterable[str]`, it tells what contradicts what; a line that begins with a
    name and a space gets the value behind the name, as it was typed.
    Raises BadSettings with every bad variable, its value and what is allowed.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    bad_names: list[str] = []
    for attribute, row in settings_table(kind).items():
        try:
            values[attribute] = _parse_row(row, environ)
        except ValueError as error:
            problems.append(str(error))
            bad_names.append(row.name)
            values[attribute] = row.parse(row.default) if row.default else None
    settings = kind(**values)
    for conflict in getattr(settings, "conflicts", tuple)():
        if not any(re.search(rf"\b{name}\b", conflict) for name in bad_names):
            name, _, rest = conflict.partition(" ")
            said = next((each for each in settings_table(kind).values() if each.name == name), None)
            problems.append(conflict if said is None else f"{_as_typed(said, environ)} {rest}")
    if problems:
        raise BadSettings(problems)
    return settings


def _parse_row(row: Setting, environ: Mapping[str, str]) -> Any:
    name, text = row.name, environ.get(row.name, "")
    other = environ.get(row.alias, "") if row.alias else ""
    if other and text and other != text:
        raise ValueError(f"{name} and {row.alias} are both set, and differ; allowed: one of the two")
    if other and not text:
        name, text = row.alias or name, other
    if not text:
        if row.default is None:
            raise ValueError(f"{name} is not set; it is required: {row.help}")
        return row.parse(row.default) if row.default else None
    try:
        return row.parse(text)
    except ValueError as error:
        raise ValueError(f"{name}={without_credentials(text)!r}: {error}") from None


def _as_typed(row: Setting, environ: Mapping[str, str]) -> str:
    """Return a setting with its value, if it has one; of a command, which may hold any secret, its name alone."""
    name = row.alias if row.alias and environ.get(row.alias) and not environ.get(row.name) else row.name
    value = environ.get(name)
    return f"{name}={without_credentials(value)!r}" if value and row.parse is not parse_command else name


def without_credentials(text: str) -> str:
    """Return `text`, a value that is to be shown because it was refused, with what may be user and password hidden.

    It may be any text with a URL in it, or several, or what was meant to be one (RFC 3986 3.2.1): what stands before
    the last @ goes.
    """
    before, at, after = text.rpartition("@")
    if not at or ":" not in before:
        return text
    start, slashes, _ = before.partition("//")
    return f"{start if slashes else ''}{slashes}***@{after}"


def lookalikes(kind: type, environ: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable of `environ` that is not ours but nearly spelled like one of ours."""
    known = setting_names(kind) | {"USER"}  # which every login shell sets
    warnings = []
    for name in sorted(set(environ) - known):
        close = [name.lower()] if name.lower() in known else difflib.get_close_matches(name, known, 1, cutoff=0.85)
        if close:
            warnings.append(f"{name} is not a setting and is ignored; did you mean {close[0]}?")
    return warnings


def format_settings(kind: type) -> str:
    """Return the table of `kind` for --help: one variable a line with its default and its sentence."""
    lines = []
    for row in settings_table(kind).values():
        default = row.default_note or ("required" if row.default is None else row.default or "unset")
        alias = f" (or {row.alias})" if row.alias else ""
        lines.append(f"  {row.name + alias:<28} {default:<12} {row.help}")
    return "\n".join(lines)


class Url(NamedTuple):
    """An http or https address: `target` is path and query as they go on the request line.

    A `host` that begins with a slash is the path of a Unix socket.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Return the Host field: the port is left out when it is the scheme's own."""
        if self.host.startswith("/"):
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


def parse_url(text: str) -> Url:
    """Return the parts of an absolute http(s) URL.

    Raises ValueError, saying what is allowed, for another scheme, no host, user information, a bad port, or characters
    that have no place in a URL (RFC 3986; spaces and control characters would end up in a request line).
    """
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("allowed: a URL of visible ASCII characters")
    try:
        parts = urllib.parse.urlsplit(text)
        given_port = parts.port
    except ValueError:  # whose text may show a part of a password
        raise ValueError("allowed: http(s)://host[:port]/path, with a port up to 65535") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("allowed: http:// or https://")
    if not parts.hostname:
        raise ValueError("no host; allowed: http://host[:port]/path")
    if parts.username is not None or parts.password is not None:
        raise ValueError("user information is not allowed in a URL")
    port = given_port or (443 if parts.scheme == "https" else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Url(parts.scheme, parts.hostname, port, target)


PER_REQUEST = ("serializing", "streaming")  # modes with a process for each request
WITH_PROGRAM = (*PER_REQUEST, "http")
CHOSEN_PORT = 0  # of an upstream_url whose port is for us to choose


def parse_upstream_url(text: str) -> Url:
    """Return where the server of mode=http is; its target is a prefix, and CHOSEN_PORT stands for `:0` or `:$PORT`.

    Raises ValueError as `parse_url`, and for a query.
    """
    plain = re.sub(r":(?:0+|\$PORT|\$\{PORT\})(?=/|$)", ":0", text)
    url = parse_url(plain)
    if "?" in plain or "#" in plain:
        raise ValueError("allowed: http(s)://host[:port][/path], without a query")
    is_chosen = urllib.parse.urlsplit(plain).port == 0
    return url._replace(port=CHOSEN_PORT if is_chosen else url.port, target=url.target.rstrip("/"))


def parse_path(text: str) -> str:
    """Return `text` if it can be the path of a request (RFC 9112 3.2.1)."""
    if not re.fullmatch(r"/[\x21\x22\x24-\x7e]*", text):
        raise ValueError("allowed: a path of visible ASCII characters but # that begins with /")
    return text


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator asked of this watchdog; see `settings_table(Settings)`."""

    fprocess: tuple[str, ...] = setting(
        "fprocess",
        "",
        parse_command,
        "the command to run for each request, or once with mode=http",
        alias="function_process",
        default_note="required, but for mode=static",
        modes=WITH_PROGRAM,
    )
    mode: str = setting(
        "mode",
        "serializing",
        parse_choice(*WITH_PROGRAM, "static"),
        "serializing: output is sent once its process has ended; streaming: as it is printed; http: fprocess is a"
        " server, started once; static: files, and no program",
    )
    upstream_url: Url | None = setting(
        "upstream_url",
        "",
        parse_upstream_url,
        "where the server listens; with :0 or :$PORT a free port is chosen, and given to it as PORT",
        alias="http_upstream_url",
        default_note="required with mode=http",
        modes=("http",),
    )
    http_buffer_req_body: bool = setting(
        "http_buffer_req_body",
        "false",
        parse_bool,
        "a request's body is read first, before exec_timeout begins, and sent with a Content-Length",
        alias="buffer_http",
        modes=("http",),
    )
    ready_path: str | None = setting(
        "ready_path", "", parse_path, "path of the server that /_/ready asks as well", modes=("http",)
    )
    static_path: str = setting(
        "static_path", "/home/app/public", parse_text, "directory whose files are served", modes=("static",)
    )
    host: str | None = setting("host", "", parse_text, "address to listen on", default_note="all")
    port: int = setting("port", "8080", parse_port, "port to listen on; 0 picks a free one and logs it")
    metrics_port: int = setting("metrics_port", "8081", parse_port, "port of /metrics; 0 disables it")
    read_timeout_s: float = setting(
        "read_timeout", "30s", parse_positive_duration, "time to receive a whole request, from its first byte"
    )
    write_timeout_s: float = setting(
        "write_timeout",
        "30s",
        parse_positive_duration,
        "time to send a whole response, from its first byte; after an Upgrade, for either side to take what is sent",
    )
    exec_timeout_s: float = setting(
        "exec_timeout",
        "0",
        parse_duration,
        "life of the process and all that it started; with mode=http time of an answer, or of an Upgrade and then of"
        " silence on both sides; 0 is no limit",
    )
    healthcheck_interval_s: float | None = setting(
        "healthcheck_interval",
        "",
        parse_duration,
        "after SIGTERM: time to stay up, unhealthy, before draining",
        default_note="5s, or write_timeout if shorter",
    )
    user: Identity | None = setting(
        "user",
        "",
        parse_user,
        "user that functions run as, by name or UID:GID",
        default_note="the watchdog's own",
        modes=WITH_PROGRAM,
    )
    term_grace_s: float | None = setting(
        "term_grace",
        "",
        parse_duration,
        "SIGTERM first and so long before SIGKILL; 0 is SIGKILL at once",
        default_note=f"0; with mode=http {SERVER_GRACE_S:g}s",
        modes=WITH_PROGRAM,
    )
    max_body_bytes: int = setting(
        "max_body", "0", parse_size, "largest request body, above it 413; 0 is no limit", modes=WITH_PROGRAM
    )
    max_inflight: int = setting(
        "max_inflight",
        "0",
        parse_count,
        "requests at once, each while the program runs for it or, with mode=http, answers; above it 429; 0 is no limit",
        modes=WITH_PROGRAM,
    )
    max_connections: int | None = setting(
        "max_connections", "", parse_positive_count, CONNECTIONS_HELP, default_note=CONNECTIONS_DEFAULT
    )
    max_connections_per_address: int | None = setting(
        "max_connections_per_address", "", parse_positive_count, PER_ADDRESS_HELP, default_note=PER_ADDRESS_DEFAULT
    )
    workers: int = setting("workers", "auto", parse_workers, WORKERS_HELP)
    prewarm: int = setting(
        "prewarm", "0", parse_count, "processes that wait, started, for their request; 0 is none", modes=PER_REQUEST
    )
    cgi_headers: bool = setting(
        "cgi_headers", "true", parse_bool, "request facts as Http_* environment variables", modes=PER_REQUEST
    )
    marshal_request: bool = setting(
        "marshal_request", "false", parse_bool, "stdin is JSON of headers and base64 body", modes=PER_REQUEST
    )
    cgi_response: bool = setting(
        "cgi_response",
        "false",
        parse_bool,
        "output begins with header fields (CGI): Status and headers are its own",
        modes=PER_REQUEST,
    )
    content_type: str | None = setting(
        "content_type", "", parse_header_value, "Content-Type of every response", modes=PER_REQUEST
    )
    combine_output: bool = setting(
        "combine_output", "true", parse_bool, "stderr joins the response; false: the log", modes=PER_REQUEST
    )
    write_debug: bool = setting(
        "write_debug",
        "false",
        parse_bool,
        f"first {SNIFF_BYTES} bytes of the output, and of each piece of the body, in the log",
        modes=PER_REQUEST,
    )
    debug_headers: bool = setting("debug_headers", "false", parse_bool, "headers in the log")
    suppress_lock: bool = setting(
        "suppress_lock",
        "false",
        parse_bool,
        "no lock file at $TMPDIR/.lock (.lock.PORT if port is not 8080), without which --run-healthcheck fails",
    )
    jwt_auth: bool = setting("jwt_auth", "false", parse_unasked, "callers' tokens are not checked: true is refused")
    prefix_logs: bool = setting(
        "prefix_logs",
        "true",
        parse_bool,
        "time and origin before the lines that the function writes to the log",
        modes=WITH_PROGRAM,
    )
    log_callid: bool = setting("log_callid", "false", parse_bool, "X-Call-Id before each log line of a request")
    log_format: str = setting("log_format", "text", parse_choice("text", "json"), "how log lines look: text or json")

    def conflicts(self) -> Iterable[str]:
        """Yield a line for each setting that is missing, or that another one leaves without a meaning."""
        yield from self._strangers_to_mode()
        if self.port and self.port == self.metrics_port:
            yield f"metrics_port={self.metrics_port} contradicts port={self.port}; allowed: two different ports"
        if self.user is not None and (missing := missing_capabilities()):
            yield (
                f"user is set, but this process may not change users: it lacks {', '.join(missing)}; allowed: user"
                " where the program runs as root, or not at all"
            )
        if self.prewarm and self.cgi_headers:
            yield (
                f"prewarm={self.prewarm} contradicts cgi_headers=true: a process that is started already cannot get"
                " the request's facts in its environment; allowed: prewarm with cgi_headers=false"
            )

    def _strangers_to_mode(self) -> Iterator[str]:
        """Yield a line for each setting of another mode, unless it asks for nothing, and each that this mode lacks."""
        if not self.fprocess and self.mode != "static":
            yield "fprocess is not set; it is required: the command to run"
        if self.upstream_url is None and self.mode == "http":
            yield "upstream_url is not set; it is required with mode=http: where the server listens"
        for attribute, row in settings_table(Settings).items():
            unset = row.parse(row.default) if row.default else None
            if row.modes and self.mode not in row.modes and getattr(self, attribute) != unset:
                allowed = " or ".join(f"mode={mode}" for mode in row.modes)
                yield f"{row.name} means nothing with mode={self.mode}; allowed: with {allowed}"


# ---------------------------------------------------------------------------------------------------------------
# Log: lines to stderr, as Go's log package writes them or as JSON.  Whatever a line contains, it stays one line.
# A reader that is slow or stopped never stops us: what the descriptor does not take waits in memory up to
# LOG_BACKLOG_BYTES, and beyond that lines are dropped and counted.
# ---------------------------------------------------------------------------------------------------------------

_UNPRINTABLE = [*range(0x09), *range(0x0A, 0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0xD800, 0xE000)]
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _UNPRINTABLE}


def escape_line(text: str) -> str:
    """Return `text` with control characters and the like as \\x escapes, so that it cannot pose as another line."""
    return text if text.isprintable() else text.translate(_ESCAPES)


class Log:
    """A program's log.  `configure` once in `main`; may be used from any thread."""

    def __init__(self) -> None:
        self._json = False
        self._origin = ""
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped_count = 0
        self._scheduled = False
        self._home: asyncio.AbstractEventLoop | None = None
        self._lock_fd = -1
        self._second: tuple[int, str] = (0, "")

    def configure(self, log_format: str, origin: str | None) -> None:
        """Choose `text` or `json`, and the name that stands before each line when several programs share a stderr."""
        self._json = log_format == "json"
        self._origin = origin or ""

    def share(self) -> None:
        """Keep lines whole when processes that are forked from now on write to the same stderr.

        A pipe takes up to PIPE_BUF bytes as one piece, and lines may be longer: so there is a record lock (fcntl(2)),
        which the kernel releases when its holder dies.
        """
        self._lock_fd = os.memfd_create("faashound", os.MFD_CLOEXEC)

    def info(self, text: str, **fields: object) -> None:
        """Write a line; `fields` follow it as name=value, or are members of the JSON object."""
        self._add("info", text, fields)

    def warning(self, text: str, **fields: object) -> None:
        """Write a line about something an operator should look at."""
        self._add("warning", text, fields)

    def error(self, text: str, **fields: object) -> None:
        """Write a line about something that went wrong."""
        self._add("error", text, fields)

    def exception(self, text: str) -> None:
        """Write a line with the traceback of the exception being handled."""
        self._add("error", text, {"traceback": traceback.format_exc().strip()})

    def is_full(self) -> bool:
        """Tell whether lines would be dropped now, because stderr takes none."""
        return self._waiting_bytes >= LOG_BACKLOG_BYTES - MAX_LOG_LINE_BYTES

    def drop(self, count: int) -> None:
        """Count lines that were not even made because the log is full."""
        self._dropped_count += count

    def raw(self, text: str) -> None:
        """Write a line of another program as it is, but one line."""
        self._put(escape_line(text))

    def _add(self, level: str, text: str, fields: dict[str, object]) -> None:
        now_s = time.time()
        if int(now_s) != self._second[0]:
            self._second = (int(now_s), time.strftime("%Y/%m/%d %H:%M:%S ", time.localtime(now_s)))
        if self._json:
            record = {"time": now_s, "level": level, "msg": text, **fields}
            if self._origin:
                record["function"] = self._origin
            self._put(json.dumps(record, default=str))
            return
        origin = f"{self._origin}: " if self._origin else ""
        shown = "".join([f" {name}={_quoted(value)}" for name, value in fields.items()])
        self._put(escape_line(f"{self._second[1]}{origin}{'' if level == 'info' else level + ': '}{text}{shown}"))

    def _put(self, line: str) -> None:
        loop = asyncio._get_running_loop()
        if loop is not None:
            self._home = loop
        elif self._home is not None and self._home.is_running():  # a thread's line
            self._home.call_soon_threadsafe(self._put, line)
            return
        data = line.encode(errors="backslashreplace") + b"\n"
        if self._waiting_bytes + len(data) > LOG_BACKLOG_BYTES:
            self._dropped_count += 1
            return
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if loop is None:  # before the loop starts or after it ended
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._write_some, loop)

    def _write_some(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write what stderr takes without blocking, once for all lines of a turn of the loop."""
        while self._waiting and _is_ready(2, select.POLLOUT) and self._may_write():
            self._write_piece()
        if self._waiting:
            loop.call_later(LOG_RETRY_S, self._write_some, loop)
            return
        self._scheduled = False
        if self._dropped_count:
            count, self._dropped_count = self._dropped_count, 0
            self.warning(f"{count} log lines were dropped: they were not read fast enough")

    def _may_write(self) -> bool:
        """Take the lock that processes of one program share; it stays ours until a line is written to its end."""
        try:
            if self._lock_fd >= 0:
                fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _write_piece(self) -> None:
        """Write as many whole lines as are one piece to a pipe (pipe(7)), or a part of one that is longer."""
        data = self._waiting.popleft()
        while self._waiting and len(data) + len(self._waiting[0]) <= select.PIPE_BUF:
            data += self._waiting.popleft()
        self._waiting_bytes -= len(data)
        written = _write_all(data[: select.PIPE_BUF])
        if written < len(data):
            self._waiting.appendleft(data[written:])
            self._waiting_bytes += len(data) - written
        if data[:written].endswith(b"\n"):
            self._unlock()

    def _unlock(self) -> None:
        if self._lock_fd >= 0:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_UN)

    def flush(self, limit_s: float = 1.0) -> None:
        """Write what waits, at the end of the program; give up after `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while self._waiting and (left_s := deadline_s - time.monotonic()) > 0:
            if not self._may_write():
                time.sleep(min(LOG_RETRY_S, left_s))
            elif _is_ready(2, select.POLLOUT, left_s):
                self._write_piece()
        self._waiting.clear()
        self._waiting_bytes = 0
        self._unlock()


def _is_ready(fd: int, event: int, wait_s: float = 0.0) -> bool:
    """Wait until an operation on `fd` would not block, a write up to PIPE_BUF bytes (pipe(7), poll(2)); tell whether.

    An error, or the end of what can be read, will not block either.
    """
    poller = select.poll()
    poller.register(fd, event)
    return bool(poller.poll(max(wait_s, 0.0) * 1000))


def _write_all(data: bytes) -> int:
    try:
        return os.write(2, data)
    except BlockingIOError:
        return 0
    except OSError:  # its reader has gone: the log must not be the end of the program
        return len(data)


_PLAIN = re.compile(r"[^\s\"=]+")


def _quoted(value: object) -> str:
    text = str(value)
    return text if isinstance(value, int) or _PLAIN.fullmatch(text) else json.dumps(text)


log = Log()

# ---------------------------------------------------------------------------------------------------------------
# Scoreboard: what the worker processes of one program share.  With workers=N there are N that accept from the same
# sockets, each with a loop of its own; a limit or a metric is meant for all of them together.  The numbers stand in
# memory that the supervisor mapped before it forked them: a slot of the scoreboard for each, and each one's counters.
# A worker process reads every slot and writes only its own, so counting needs no lock, and what was counted survives
# the death of the process that counted.  Only admission up to a limit takes a lock (a record lock, fcntl(2): the kernel
# releases it when its holder dies).
# ---------------------------------------------------------------------------------------------------------------


class SharedCounters:
    """Sums under a key: a counter is one number, a histogram its sum and its buckets.

    Each worker process writes into its own region: entries of the key's length, how many numbers, the key, the numbers.
    """

    def __init__(self, workers_count: int) -> None:
        self._regions = [memoryview(mmap.mmap(-1, COUNTERS_BYTES)) for _ in range(workers_count)]
        self._scratch = memoryview(bytearray(8 * 64)).cast("d")

    def values(self, index: int, key: str, size: int) -> memoryview[float]:
        """Return `size` numbers, all zero, that worker process `index` may add to; to be called once for each key.

        A region that is full takes no more keys; what is added to their numbers is lost.
        """
        region, name = self._regions[index], key.encode()
        used_bytes = int.from_bytes(region[:8], "little") or 8
        start = used_bytes + 8 + -(-len(name) // 8) * 8
        if start + 8 * size > COUNTERS_BYTES:
            return self._scratch
        region[used_bytes : used_bytes + 8] = len(name).to_bytes(4, "little") + size.to_bytes(4, "little")
        region[used_bytes + 8 : used_bytes + 8 + len(name)] = name
        region[:8] = (start + 8 * size).to_bytes(8, "little")  # last: a reader finds whole entries only
        return region[start : start + 8 * size].cast("d")

    def totals(self) -> dict[str, list[float]]:
        """Return the sums over all worker processes."""
        totals: dict[str, list[float]] = {}
        for region in self._regions:
            for key, values in _entries(region):
                mine = totals.setdefault(key, [0.0] * len(values))
                totals[key] = [one + other for one, other in zip(mine, values, strict=True)]
        return totals

    def adopt(self, index: int) -> dict[str, memoryview[float]]:
        """Return the numbers that a worker process which has died left to the one that takes its slot."""
        return dict(_entries(self._regions[index]))


def _entries(region: memoryview) -> Iterator[tuple[str, memoryview[float]]]:
    at, end = 8, int.from_bytes(region[:8], "little")
    while at < end:
        length = int.from_bytes(region[at : at + 4], "little")
        size = int.from_bytes(region[at + 4 : at + 8], "little")
        start = at + 8 + -(-length // 8) * 8
        yield bytes(region[at + 8 : at + 8 + length]).decode(), region[start : start + 8 * size].cast("d")
        at = start + 8 * size


class Scoreboard:
    """A slot for each worker process: requests in flight, connections, whether it serves.  Made before the fork."""

    def __init__(self, workers_count: int = 1) -> None:
        self.workers_count = workers_count
        self.counters = SharedCounters(workers_count)
        rows = memoryview(mmap.mmap(-1, 3 * 8 * workers_count)).cast("q")
        self.in_flight = rows[:workers_count]
        self.connections = rows[workers_count : 2 * workers_count]
        self.serving = rows[2 * workers_count :]
        self.lock_fd = os.memfd_create("faashound", os.MFD_CLOEXEC) if workers_count > 1 else -1

    def clear(self, index: int) -> None:
        """Empty the slot of a worker process that has died; what it has counted stays."""
        self.in_flight[index] = self.connections[index] = self.serving[index] = 0


class Slot:
    """One process's part of the scoreboard; `on_change` is called when it begins or ends to accept connections."""

    def __init__(self, scoreboard: Scoreboard, index: int = 0, on_change: Callable[[], None] = lambda: None) -> None:
        self.scoreboard = scoreboard
        self.index = index
        self._on_change = on_change
        self._values = scoreboard.counters.adopt(index)

    @property
    def is_alone(self) -> bool:
        """Whether there are no other processes."""
        return self.scoreboard.workers_count == 1

    @property
    def is_first(self) -> bool:
        """Whether work that one worker process does for all is this process's."""
        return self.index == 0

    @property
    def in_flight_count(self) -> int:
        """The requests in flight in all processes."""
        return sum(self.scoreboard.in_flight)

    @property
    def others_connections_count(self) -> int:
        """The connections of all other processes."""
        return sum(self.scoreboard.connections) - self.scoreboard.connections[self.index]

    def set_serving(self, serving: bool) -> None:
        """Note whether this process accepts connections."""
        self.scoreboard.serving[self.index] = serving
        self._on_change()

    def count_connection(self, change: int) -> None:
        """Count a connection in (1) or out (-1)."""
        self.scoreboard.connections[self.index] += change

    def enter(self, limit_count: int) -> bool:
        """Count a request in, unless that would make more than `limit_count` in all processes; 0 is no limit."""
        locked = limit_count > 0 and not self.is_alone
        if locked:
            fcntl.lockf(self.scoreboard.lock_fd, fcntl.LOCK_EX)
        admitted = not limit_count or self.in_flight_count < limit_count
        self.scoreboard.in_flight[self.index] += admitted
        if locked:
            fcntl.lockf(self.scoreboard.lock_fd, fcntl.LOCK_UN)
        return admitted

    def leave(self) -> None:
        """Count a request out."""
        self.scoreboard.in_flight[self.index] -= 1

    def share_of(self, count: int) -> int:
        """Return this process's part of `count`, rounded up."""
        return -(-count // self.scoreboard.workers_count)

    def values(self, key: str, size: int) -> memoryview[float]:
        """Return this process's numbers under `key`."""
        if key not in self._values:
            self._values[key] = self.scoreboard.counters.values(self.index, key, size)
        return self._values[key]

    def is_next(self) -> bool:
        """Tell whether a new connection is for this process: none that serves has much fewer.

        Some lead is allowed, or many that come at once would be taken one by one, with a wait for each.
        """
        if self.is_alone:
            return True
        connections, serving = self.scoreboard.connections, self.scoreboard.serving
        others = (connections[each] for each in range(self.scoreboard.workers_count) if serving[each])
        return all(connections[self.index] <= other + other // 4 + 1 for other in others)


# ---------------------------------------------------------------------------------------------------------------
# HTTP policy (sans-I/O).  All framing is h11's; what stands here is what h11 leaves to its user, or lets through:
#   * a grammar as strict as RFC 9112 wants it of a server that others stand in front of (smuggling needs two
#     parsers that disagree, so nothing ambiguous may pass): no bare CR in chunk extensions, no control characters
#     in field values, HTTP/1.0 and 1.1 only, targets in origin-form, absolute-form or `OPTIONS *`;
#   * Transfer-Encoding never beside Content-Length, never in HTTP/1.0 (RFC 9112 6.1): 400 and close;
#   * one leading empty line before a request is ignored (RFC 9112 2.2);
#   * heads are limited in size whichever way they are cut into packets: 431.
# A body whose length is known has no framing of its own: in both directions it passes by h11, which is told its size.
# A plain head (HTTP/1.1, one length, nothing about the connection) has no more: h11 is shown it only if something comes
# of the exchange that is not plain.  After a 101 there is no framing at all.
# Bytes in, events and bytes out; no socket, no clock, no log below this line until the drivers.
# ---------------------------------------------------------------------------------------------------------------

Header = tuple[bytes, bytes]
Headers = Sequence[Header]

# What repeats gives nothing back (`++`, `*+`): a run that can be divided in two ways costs the square of its length.
_TEXT = r"[\x21-\x7e\x80-\xff]"
_VALUE = rf"(?:{_TEXT}++(?:[ \t]++{_TEXT}++)*+)?"
_FIELD = rf"(?P<field_name>{h11._abnf.token}):[ \t]*+(?P<field_value>{_VALUE})[ \t]*+"
_FIELD_LINE, _FIELD_LINES = re.compile(_FIELD.encode()), re.compile(rf"(?<=\r\n){_FIELD}(?=\r\n)".encode())
_TARGET = r"(?:/[\x21\x22\x24-\x7e]*|[Hh][Tt][Tt][Pp][Ss]?://[\x21\x22\x24-\x7e]+|(?<=^OPTIONS )\*)"


def _tighten_h11_grammar() -> None:
    """Replace three patterns of h11 0.16.0, which setup.py pins, by strict ones, and have it count a head's fields.

    h11 goes on doing all framing.
    """
    readers = h11._readers
    for name in ("request_line_re", "header_field_re", "chunk_header_re", "_decode_header_lines"):
        if not hasattr(readers, name):
            raise ImportError(f"this h11 has no _readers.{name} to tighten; install h11 0.16.0")
    token = h11._abnf.token
    readers.request_line_re = re.compile(
        rf"(?P<method>{token}) (?P<target>{_TARGET}) HTTP/(?P<http_version>1\.[01])".encode()
    )
    readers.header_field_re = _FIELD_LINE
    readers.chunk_header_re = re.compile(
        rb"(?P<chunk_size>[0-9A-Fa-f]{1,16})(?P<chunk_ext>[ \t]*+;[\t\x20-\x7e\x80-\xff]*+)?[ \t]*+\r\n"
    )
    readers._decode_header_lines = partial(_decode_few_lines, readers._decode_header_lines)


def _broken_rule(error: h11.RemoteProtocolError) -> str:
    """Return what h11 says without the bytes, which it quotes: they may be a secret, and go to clients and logs."""
    return re.split(r":? (?:b|bytearray\(b)['\"]", str(error), maxsplit=1)[0]


def _decode_few_lines(
    decode: Callable[[Sequence[bytes]], Iterable[Header]], lines: Sequence[bytes]
) -> Iterable[Header]:
    if len(lines) > MAX_FIELDS_COUNT:
        raise h11.LocalProtocolError("too many header fields", error_status_hint=431)
    return decode(lines)


_tighten_h11_grammar()

_REQUEST_LINE = re.compile(rf"({h11._abnf.token}) ({_TARGET}) HTTP/1\.1".encode())
_STATUS_LINE = re.compile(rb"HTTP/1\.1 (?!204|304)([2-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*+)?")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]*)?")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})|%00")  # NUL can stand in no path and no variable


class BadRequest(FaashoundError):
    """The peer broke a rule of HTTP; the connection is closed after the answer."""

    status = 400


class UnknownCoding(BadRequest):
    """A Transfer-Encoding that we do not know (RFC 9112 6.1)."""

    status = 501


class HeadTooLarge(BadRequest):
    """The request line and the fields together are over MAX_HEAD_BYTES, or there are too many of them."""

    status = 431
    text = f"request line and headers too large; allowed: {MAX_HEAD_BYTES} bytes in all, {MAX_FIELDS_COUNT} headers"


class ExpectationFailed(BadRequest):
    """An Expect that is not 100-continue (RFC 9110 10.1.1)."""

    status = 417


class ReadTimeout(FaashoundError):
    """The request did not arrive whole within the read timeout."""

    status = 408


class TooMuchFraming(BadRequest):
    """The chunks of a body are so small, or their extensions so long, that reading them is mostly waste."""

    text = f"bad request: chunks too small; allowed: {FRAMING_BYTES} bytes of framing, and two for each byte of data"


class BodyTooLarge(FaashoundError):
    """The request's body is over the limit."""

    status = 413

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"request body too large; allowed: {limit_bytes} bytes")


# The field tells a worker that this is not the function's own answer, so that the call is made again (OpenFaaS).
_OUR_REFUSAL = ((b"Retry-After", b"1"), (b"X-OpenFaaS-Internal", b"faashound"))


class Stopping(FaashoundError):
    """The request did not finish before this server had to end."""

    status = 503
    headers = _OUR_REFUSAL
    text = "the server is stopping; the request was given up"


class TooManyConnections(FaashoundError):
    """There is no room for another connection, and none that waits for a request could be closed for it."""

    status = 503
    headers = _OUR_REFUSAL


class PeerGone(FaashoundError):
    """The other side closed or broke the connection in the middle of a message."""

    status = 502


class IdentityEnum(Enum):
    """Root of the enumerations that tables are indexed by: hashed by identity, as members are singletons."""

    __hash__ = object.__hash__


class WireEvent(Enum):
    """What a wire says when it has no head and no chunk to give."""

    NEED_DATA = "feed more bytes"
    END = "the message is complete"
    PAUSED = "the next message waits for the end of this exchange"
    CLOSED = "the peer has closed"


def fields_bytes(headers: Headers) -> int:
    """Return what the fields take on the wire, since h11 limits only a head that comes in pieces."""
    return sum(len(name) + len(value) + 4 for name, value in headers)


def first_values(headers: Headers) -> dict[bytes, bytes]:
    """Return the first value of each name."""
    return dict(reversed(headers))


_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)


@lru_cache(maxsize=64)  # callers drop what they always drop
def _ends_here(dropped: tuple[bytes, ...]) -> frozenset[bytes]:
    return _HOP_BY_HOP.union(dropped, (b"content-length",))


def end_to_end(headers: Headers, *dropped: bytes) -> list[Header]:
    """Return the fields that go beyond this hop (RFC 9110 7.6.1), without framing and without `dropped`.

    `dropped` are names in lower case; names in `headers` may be in any case.
    """
    left_out = _ends_here(dropped)
    names = [name.lower() for name, _ in headers]
    if b"connection" in names:
        named = b",".join(value for name, (_, value) in zip(names, headers, strict=True) if name == b"connection")
        left_out = left_out.union(option.strip().lower() for option in named.split(b","))
    return [field for name, field in zip(names, headers, strict=True) if name not in left_out]


def tokens_of(headers: Headers, name: bytes) -> list[bytes]:
    """Return the members of a list-based field (RFC 9110 5.6.1) in all of its lines; `name` and names in lower case."""
    values = [value for key, value in headers if key == name]
    return [token.strip() for token in b",".join(values).split(b",")] if values else []


def upgrade_of(request: Request) -> bytes | None:
    """Return the protocols that a request wants to switch to (RFC 9110 7.8), None if it wants none that is passed on.

    Not h2c, wherever it stands: its requests would pass us unseen (RFC 9113 has dropped it, 3.1).  Not by HEAD, whose
    answer has no body that the other protocol could be.
    """
    protocols = tokens_of(request.headers, b"upgrade")
    names = {protocol.partition(b"/")[0].lower() for protocol in protocols}
    options = [option.lower() for option in tokens_of(request.headers, b"connection")]
    has_body = request.body.buffered_bytes or not request.body.complete
    if not names or names & {b"", b"h2c"} or b"upgrade" not in options or has_body or request.method == "HEAD":
        return None
    return b", ".join(protocols)


class Body:
    """The incoming body of one message: an async iterator of chunks, fed by a driver.

    `length` is what Content-Length announced, None for a chunked or close-delimited body.  The consumer must either
    iterate to the end or leave it; `on_drained` is called when the consumer has taken what was waiting, so that
    the driver can read on.  Raises what the driver passed to `fail`: PeerGone, UpstreamTimeout, BadRequest, or why the
    body that was sent in exchange for it could not be had.
    """

    __slots__ = ("_chunks", "_error", "_on_abandoned", "_on_drained", "_waiter", "buffered_bytes", "complete", "length")

    def __init__(
        self, length: int | None, on_drained: Callable[[], None], on_abandoned: Callable[[], None] | None = None
    ) -> None:
        self.length = length
        self._on_abandoned = on_abandoned
        self.buffered_bytes = 0
        self.complete = False
        self._chunks: deque[bytes] = deque()
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_drained = on_drained

    def feed(self, chunk: bytes) -> None:
        """Driver: append a chunk."""
        self._chunks.append(chunk)
        self.buffered_bytes += len(chunk)
        self._wake()

    def finish(self) -> None:
        """Driver: the body is complete."""
        self.complete = True
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Driver: the body will never be complete; what was received is still delivered first."""
        if not self.complete and self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> bytes | None:
        """Return all that waits, joined, without waiting; None when there is nothing (yet, or any more)."""
        if not self._chunks:
            return None
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self.buffered_bytes = 0
        if not self.complete:
            self._on_drained()
        return data

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        while True:
            data = self.take()
            if data is not None:
                return data
            if self.complete:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._on_drained()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def aclose(self) -> None:
        """Leave the rest of the body; its sender is told."""
        if not self.complete and self._on_abandoned is not None:
            self._on_abandoned()

    async def read(self, limit_bytes: int) -> bytes:
        """Return the whole body; BodyTooLarge beyond `limit_bytes`."""
        parts, total = [], 0
        async for chunk in self:
            total += len(chunk)
            if total > limit_bytes:
                raise BodyTooLarge(limit_bytes)
            parts.append(chunk)
        return b"".join(parts)


def body_if_complete(body: T) -> T | bytes:
    """Return a body that has come whole already as its bytes: they go out with the head, in one write."""
    return (body.take() or b"") if isinstance(body, Body) and body.complete else body


@dataclass(slots=True)
class Request:
    """One request as a handler sees it: `method`, `target` as sent, `path` undecoded and `query` raw, `host`.

    `headers` are (lower-case name, value) pairs as received; `peer` is the client's address as text, "" if unknown.
    A handler that is cancelled finds in `refusal` what its client is answered, None if the client has gone.  With
    `abort` it cuts an answer that has begun and can never be whole, however slowly the client reads.
    """

    method: str
    target: bytes
    path: bytes
    query: bytes
    host: bytes
    headers: Headers
    body: Body
    peer: str = ""
    refusal: FaashoundError | None = None
    abort: Callable[[], None] = lambda: None
    _first: dict[bytes, bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._first = first_values(self.headers)

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of `name`, given in lower case."""
        return self._first.get(name)

    def decoded_path(self) -> bytes:
        """Return the path with its percent escapes resolved, as Go's URL.Path (bytes: it need not be UTF-8)."""
        return urllib.parse.unquote_to_bytes(self.path) if b"%" in self.path else self.path


class Stream(Protocol):
    """A body that comes in pieces.  Its consumer must `aclose` it, also if nothing was read of it."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Return what yields the pieces."""

    async def aclose(self) -> None:
        """Release what the pieces come from."""


class FileBody(NamedTuple):
    """A body that is a plain file from `offset` on, behind a prefix.  Its consumer must close the file."""

    prefix: bytes
    file: io.FileIO
    offset: int = 0


@dataclass(slots=True)
class Response:
    """One response as a handler gives it: `body` is bytes, or a `Stream` with an optional `length` in bytes, or a
    `FileBody`, of which `length`, prefix and all, has to be known.

    Framing fields (Content-Length, Transfer-Encoding, Connection) are the wire's business and not given here; `length`
    is what a GET would have in the answer to a HEAD.  `write_timeout_s` overrules the server's, infinity is none.
    `is_live`: the body is made while it is sent, for as long as the client keeps its side of the connection open.
    `switch`, of a 101, says what becomes of what the client sends; `body` is then what the other side of it sends.
    """

    status: int
    headers: Headers = ()
    body: bytes | Stream | FileBody = b""
    length: int | None = None
    write_timeout_s: float | None = None
    is_live: bool = False
    switch: Switch | None = None


class Switch(NamedTuple):
    """What follows a 101: `send` passes on what the client sends, until its task ends; given the longest stall in s.

    The connection is closed when nothing has come from either side for `idle_s`.
    """

    send: Callable[[Body, float], asyncio.Task[None]]
    idle_s: float = math.inf


_REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus}


_PERSISTENCE_FIELDS = frozenset((b"connection", b"upgrade"))
_FRAMING_FIELDS = frozenset((b"content-length", b"transfer-encoding", b"connection"))
_FIELD_NAME = re.compile(h11._abnf.token.encode())
_FIELD_VALUE = re.compile(_VALUE.encode("latin-1"))


@lru_cache(maxsize=1024)
def _sendable_name(name: bytes) -> bytes:
    if not _FIELD_NAME.fullmatch(name) or name.lower() in _FRAMING_FIELDS:
        raise h11.LocalProtocolError(f"Illegal header name {name!r}")
    return name


def build_lines(headers: Headers) -> bytes:
    """Return the lines of a head; raises h11.LocalProtocolError for what h11 would not send, and for framing fields."""
    lines = []
    for name, value in headers:
        if not _FIELD_VALUE.fullmatch(value):
            raise h11.LocalProtocolError(f"Illegal header value {value!r}")
        lines.append(b"%b: %b\r\n" % (_sendable_name(name), value))
    return b"".join(lines)


# Not isinstance, here and below: h11's events have an abstract base, which makes that slow.


def _fields(event: h11.Request | h11.Response) -> list[Header]:
    """Return the header fields of a head; to iterate over h11's own object is ten times slower."""
    return [(name, value) for _, name, value in event.headers._full_items]


class PlainHead(NamedTuple):
    """A head that leaves nothing to decide about its framing: the parts of its first line, its fields, its bytes."""

    start: re.Match[bytes]
    headers: list[Header]
    length: int | None
    size: int


_LENGTH = re.compile(rb"[0-9]{1,18}")
_NOT_PLAIN = frozenset((b"connection", b"expect", b"transfer-encoding", b"upgrade"))


def parse_plain_head(data: bytes, start_line: re.Pattern[bytes]) -> PlainHead | None:
    """Return the head that `data` begins with if it is whole and plain; None for any other, which is then h11's.

    Nearly every head is plain, and h11 takes 50 to 100 microseconds for one.  What is read here h11 reads in the same
    way, or the other way would be open to smuggling; a test has both read the same bytes.
    """
    size = data.find(b"\r\n\r\n") + 4
    if not 4 <= size <= MAX_HEAD_BYTES:
        return None
    end = data.find(b"\r\n")
    start, lines = start_line.fullmatch(data, 0, end), data[end : size - 2]
    found, headers, length = _FIELD_LINES.findall(lines), [], None
    # A match is within one line, all of it: as many as there are ends of lines, less that of the first, are all.
    if start is None or len(found) != lines.count(b"\r\n") - 1 or len(found) > MAX_FIELDS_COUNT:
        return None
    for given, value in found:
        name = given.lower()
        if name == b"content-length":
            if length is not None or not _LENGTH.fullmatch(value):
                return None
            length = int(value)
        elif name in _NOT_PLAIN and (name, value.lower()) != (b"connection", b"keep-alive"):  # HTTP/1.1 keeps it anyhow
            return None
        headers.append((name, value))
    return PlainHead(start, headers, length, size)


class ContentLengthReader:
    """Reads an incoming body with a Content-Length.  It has no framing of its own, so it passes by h11 and is counted.

    h11 would copy it four times, and walk through two more states.  Its own reader, if it has been shown the head, is
    told how much has passed, so that it can be asked for the end of the message where its state matters, and finds by
    itself that a body was cut short.
    """

    def __init__(self, length: int, waiting: bytes, reader: h11._readers.ContentLengthReader | None = None) -> None:
        self._remaining = length
        self._reader = reader
        self._end_told = False
        self._waiting = self._count(waiting)

    def attach(self, reader: h11._readers.ContentLengthReader) -> None:
        """Tell h11's reader, which has just been made, what has passed."""
        self._reader = reader
        reader._remaining = self._remaining

    def _count(self, data: bytes) -> bytes:
        self._remaining -= len(data)
        if self._reader is not None:
            self._reader._remaining = self._remaining
        return data

    @property
    def complete(self) -> bool:
        """True when all of it has come."""
        return not self._remaining

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to the body; return the rest, which is h11's."""
        if not self._remaining:
            return data
        taken = self._count(data[: self._remaining])
        self._waiting = self._waiting + taken if self._waiting else taken
        return data[len(taken) :]

    def next_event(self) -> bytes | WireEvent | None:
        """Return what has come since the last time, or the end; None: h11 has to be asked."""
        if self._waiting:
            taken, self._waiting = self._waiting, b""
            return taken
        if self._remaining:
            return None
        told, self._end_told = self._end_told, True
        return WireEvent.PAUSED if told else WireEvent.END


class ChunkedReader:
    """Reads any other incoming body: h11 does, and what it spends on framing is weighed against its data.

    A chunk costs the same however little it holds.  Go's net/http keeps such accounts too (ErrLineTooLong of its
    chunked reader), though only of what a chunk's line has beyond its size.
    """

    complete = False  # as far as can be told without h11

    def __init__(self, conn: h11.Connection) -> None:
        self._conn = conn
        self._data_bytes = 0
        self._fed_bytes = len(conn._receive_buffer)

    def feed(self, data: bytes) -> bytes:
        """Return what is h11's: all."""
        self._fed_bytes += len(data)
        return data

    def next_event(self) -> bytes | WireEvent | None:
        """Return None: h11 has to be asked."""

    def weigh(self, data: bytes) -> bytes:
        """Return `data`, a piece that h11 read; raises TooMuchFraming."""
        self._data_bytes += len(data)
        framing_bytes = self._fed_bytes - len(self._conn._receive_buffer) - self._data_bytes
        if framing_bytes > FRAMING_BYTES + 2 * self._data_bytes:
            raise TooMuchFraming
        return data


class SwitchedReader:
    """Reads what comes after a 101: it is the other protocol's, up to the end of the stream (RFC 9110 7.8)."""

    def __init__(self, conn: h11.Connection) -> None:
        self._conn = conn
        self._waiting = bytes(conn._receive_buffer.maybe_extract_at_most(len(conn._receive_buffer)) or b"")

    @property
    def complete(self) -> bool:
        """True when the peer has ended its side."""
        return bool(self._conn._receive_buffer_closed) and not self._waiting

    def feed(self, data: bytes) -> bytes:
        """Take all; nothing of it is h11's."""
        self._waiting += data
        return b""

    def next_event(self) -> bytes | WireEvent:
        """Return what has come since the last time, or that more is to come, or the end."""
        taken, self._waiting = self._waiting, b""
        return taken or (WireEvent.END if self.complete else WireEvent.NEED_DATA)


def body_reader(conn: h11.Connection) -> ContentLengthReader | ChunkedReader:
    """Return what reads the body of a message whose head h11 has just parsed."""
    reader = conn._reader
    if isinstance(reader, h11._readers.ContentLengthReader) and not conn.they_are_waiting_for_100_continue:
        length = reader._remaining
        return ContentLengthReader(length, bytes(conn._receive_buffer.maybe_extract_at_most(length) or b""), reader)
    return ChunkedReader(conn)  # chunked; or h11 has yet to learn, by a first byte, that the peer waits no more


class Wire:
    """What the two sides of a connection share: an h11 for the present exchange, and what reads the incoming body.

    An h11 is cheap to make and dear to walk through its states, so it serves one exchange and is replaced.  A plain
    head it is not even shown, unless something comes of the exchange that is not plain: until then it is as new.
    """

    _role: ClassVar[type[h11.CLIENT] | type[h11.SERVER]]

    def __init__(self) -> None:
        self._unshown: bytes | None = None  # the plain head that h11 has not seen
        self._begin_anew()

    def _begin_anew(self) -> None:
        if self._unshown is None:
            self._conn = h11.Connection(self._role, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._unshown = None
        self._head: PlainHead | None = None  # a plain one until it is taken
        self._body: ContentLengthReader | ChunkedReader | SwitchedReader | None = None

    def _take_plain(self, head: PlainHead, data: bytes) -> bool:
        """Take a head with what `data` has of its body, if it has nothing behind that; tell whether it did."""
        length = head.length or 0
        if len(data) > head.size + length:
            return False
        self._head, self._unshown = head, data[: head.size]
        self._body = ContentLengthReader(length, data[head.size :])
        return True

    def _show(self) -> None:
        """Have h11 see what has passed it by: the exchange goes on with it."""
        if self._unshown is not None:
            head, self._unshown = self._unshown, None
            self._conn.receive_data(head)
            self._conn.next_event()
            cast(ContentLengthReader, self._body).attach(cast(h11._readers.ContentLengthReader, self._conn._reader))

    def feed(self, data: bytes) -> None:
        """Take bytes from the peer; b"" is its end of stream."""
        if data and self._body is not None:
            data = self._body.feed(data)
            if not data:
                return
        self._show()
        self._conn.receive_data(data)

    def _body_event(self) -> bytes | WireEvent | None:
        known = None if self._body is None else self._body.next_event()
        return WireEvent.NEED_DATA if known is None and self._unshown is not None else known

    def _message_event(self, event: object) -> bytes | WireEvent:
        """Return what an event of h11 that is no head stands for."""
        if type(event) is h11.Data:  # of the other bodies it has none
            return cast(ChunkedReader, self._body).weigh(bytes(event.data))
        if event is h11.NEED_DATA:
            return WireEvent.NEED_DATA
        if type(event) is h11.EndOfMessage:
            return WireEvent.END
        return WireEvent.PAUSED if event is h11.PAUSED else WireEvent.CLOSED

    def _settle(self) -> None:
        """Have h11 know that the incoming message is complete, if it is."""
        self._show()
        if self._body is not None and self._body.complete and self._conn.their_state is h11.SEND_BODY:
            self._conn.next_event()

    def build_chunk(self, data: bytes) -> bytes:
        """Return the bytes of one piece of our message's body."""
        return self._sent(h11.Data(data=data))

    def end(self) -> bytes:
        """Return the bytes that end our message."""
        return self._sent(h11.EndOfMessage())

    def _sent(self, event: h11.Event) -> bytes:
        return self._conn.send(event) or b""

    @property
    def is_switched(self) -> bool:
        """True after a 101."""
        return isinstance(self._body, SwitchedReader)

    def _is_over(self) -> bool:
        """Tell whether both sides have said all, and neither wants to close."""
        self._settle()
        return self._conn.our_state is h11.DONE and self._conn.their_state is h11.DONE


class ServerWire(Wire):
    """The server's side of one connection: feed bytes, take events, build responses.

    After BadRequest was raised only `build_head` and `end` may follow, then the connection must be closed.
    """

    _role = h11.SERVER
    head_request = False
    _is_plain = False  # the request leaves h11 nothing to decide about the connection

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._lead: bytes | None = b""  # what has come of an empty line before the request; None: it is passed
        self._is_answered = False  # by `build_whole`, of which h11 does not know

    @property
    def started(self) -> bool:
        """True once the first byte of a request has come and until the exchange is over."""
        return self._unshown is not None or self._conn.their_state is not h11.IDLE or self.waiting_bytes > 0

    @property
    def waiting_bytes(self) -> int:
        """What was fed and has not become an event yet."""
        return len(self._conn._receive_buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes from the peer; b"" is its end of stream."""
        if data:
            data = self._behind_empty_line(data)
            if not data or (not self.started and self._feed_plain(data)):
                return
        if self._conn.their_state is not h11.MUST_CLOSE:  # else it asked to close, and what follows is void
            super().feed(data)

    def _behind_empty_line(self, data: bytes) -> bytes:
        """Return what h11, which takes an empty line for a whole head, may see of the next bytes of a request."""
        if self._lead is not None:
            data, self._lead = self._lead + data, None
            if data == b"\r":
                self._lead = data
                return b""
            data = data.removeprefix(b"\r\n")
        return data

    def _feed_plain(self, data: bytes) -> bool:
        head = parse_plain_head(data, _REQUEST_LINE)
        has_host = head is not None and [name for name, _ in head.headers].count(b"host") == 1
        return head is not None and has_host and self._take_plain(head, data)

    def next_event(self) -> tuple[bytes, bytes, Headers] | bytes | WireEvent:
        """Return a head (method, target, headers), a chunk of its body, or a `WireEvent`; raises BadRequest."""
        if self._head is not None:
            plain, self._head = self._head, None
            head = self._checked_head(plain.start[1], plain.start[2], b"1.1", plain.headers)
            self._is_plain = not self.head_request
            return head
        if (known := self._body_event()) is not None:
            return known
        if self._conn.their_state is h11.MUST_CLOSE:
            return WireEvent.CLOSED
        try:
            event = self._conn.next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                raise HeadTooLarge from None
            kind = UnknownCoding if error.error_status_hint == 501 else BadRequest
            raise kind(f"bad request: {_broken_rule(error)}") from None
        if type(event) is not h11.Request:
            return self._message_event(event)
        head = self._checked_head(event.method, event.target, event.http_version, _fields(event))
        self._body = body_reader(self._conn)
        return head

    def _checked_head(
        self, method: bytes, target: bytes, version: bytes, headers: Headers
    ) -> tuple[bytes, bytes, Headers]:
        if len(method) + len(target) + 14 + fields_bytes(headers) > MAX_HEAD_BYTES:
            raise HeadTooLarge
        first = first_values(headers)
        if b"transfer-encoding" in first:
            if b"content-length" in first:
                raise BadRequest("bad request: Content-Length together with Transfer-Encoding (RFC 9112 6.1)")
            if version < b"1.1":
                raise BadRequest("bad request: Transfer-Encoding in HTTP/1.0 (RFC 9112 6.1)")
        if not _HOST.fullmatch(first.get(b"host", b"")):
            raise BadRequest("bad request: invalid Host")
        if first.get(b"expect", b"100-continue").lower() != b"100-continue":
            raise ExpectationFailed("unknown Expect; allowed: 100-continue")
        self.head_request = method == b"HEAD"
        if version < b"1.1":  # RFC 9110 7.8: a server ignores its Upgrade
            headers = [field for field in headers if field[0] != b"upgrade"]
        is_persistent = version == b"1.1" and _PERSISTENCE_FIELDS.isdisjoint(first)
        self._is_plain = is_persistent and not self.head_request
        return method, target, headers

    @property
    def peer_is_old(self) -> bool:
        """True when the peer speaks HTTP/1.0: what has no length ends for it with the connection."""
        return self._conn.their_http_version == b"1.0"

    @property
    def awaits_continue(self) -> bool:
        """True while the peer waits for a 100 before it sends its body."""
        return self._conn.they_are_waiting_for_100_continue

    def build_continue(self) -> bytes:
        """Return the interim response that asks for the body."""
        return self._sent(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))

    @property
    def peer_done(self) -> bool:
        """True when the request has been received whole."""
        if self._body is not None and self._body.complete:
            return True
        # not in (DONE, MUST_CLOSE): after a request with Upgrade h11 waits for our answer in a state of its own
        return self._conn.their_state not in (h11.IDLE, h11.SEND_BODY, h11.ERROR)

    def build_head(self, status: int, headers: Headers, length: int | None, close: bool) -> bytes:
        """Return the bytes of a response's head.  `length` None: chunked, or until close for HTTP/1.0."""
        self._settle()
        fields = list(headers)
        if length is not None and status not in (204, 304) and status >= 200:
            fields.append((b"Content-Length", b"%d" % length))
        if close:
            fields.append((b"Connection", b"close"))
        return self._sent(h11.Response(status_code=status, headers=fields, reason=_REASONS.get(status, b"")))

    def build_whole(self, status: int, headers: Headers, body: bytes, length: int, close: bool) -> bytes:
        """Return the bytes of a whole response, head to end; `length` is what the answer to a GET would have.

        The plainest exchange, which is nearly every one, has nothing left for h11 to decide: a request of HTTP/1.1 with
        nothing about the connection in it has been received whole, and the length is known.
        """
        plain = self._is_plain and not close and status >= 200 and status not in (204, 304) and length == len(body)
        if not plain or not self.peer_done or self._conn._receive_buffer_closed:
            head = self.build_head(status, headers, length, close)
            return head + (self.build_chunk(body) if body else b"") + self.end()
        start = b"HTTP/1.1 %d %b\r\n%bContent-Length: %d\r\n\r\n"
        head = start % (status, _REASONS.get(status, b""), build_lines(headers), length)
        self._is_answered = True
        return head + body

    def build_switch(self, headers: Headers) -> bytes:
        """Return the bytes of a 101; from then on both sides carry the other protocol.  `headers` has Upgrade."""
        fields = [*headers, (b"Connection", b"Upgrade")]
        head = self._sent(h11.InformationalResponse(status_code=101, headers=fields, reason=b"Switching Protocols"))
        self._body = SwitchedReader(self._conn)
        return head

    def build_chunk(self, data: bytes) -> bytes:
        """Return the bytes of one piece of the response's body; a HEAD's body is left out."""
        return b"" if self.head_request else super().build_chunk(data)

    def pass_by(self, count: int) -> None:
        """Account for `count` bytes of the response's body that the driver sends by itself."""
        # Of data that it does not have to join, h11 asks the length alone ("Support for sendfile()" in its manual).
        self._conn.send_with_data_passthrough(h11.Data(data=cast(bytes, range(count))))

    def next_cycle(self) -> bool:
        """Make ready for the next request; False when this connection cannot carry one."""
        if not self._is_answered and not self._is_over():
            return False
        waiting, closed = self._conn.trailing_data
        self._begin_anew()
        if waiting:
            self.feed(waiting)
        if closed:
            self._conn.receive_data(b"")
        return True


def split_target(target: bytes, host: bytes) -> tuple[bytes, bytes, bytes]:
    """Return (path, query, host) of a request target in origin-form, absolute-form or asterisk-form.

    The authority of an absolute-form replaces Host (RFC 9112 3.2.2).  Raises BadRequest for a broken percent escape.
    """
    if not target.startswith((b"/", b"*")):
        authority, slash, rest = target.partition(b"://")[2].partition(b"/")
        if b"?" in authority:
            authority, _, query = target.partition(b"://")[2].partition(b"?")
            slash, rest = b"/", b"?" + query
        if not _HOST.fullmatch(authority) or not authority:
            raise BadRequest("bad request: invalid authority in the request target")
        target, host = (slash or b"/") + rest, authority
    path, _, query = target.partition(b"?")
    if _BAD_ESCAPE.search(path):
        raise BadRequest("bad request: invalid percent escape in the path")
    return path, query, host


class BadPath(FaashoundError):
    """The path would lead out of what it is put behind."""

    status = 400


DECODINGS_COUNT = 3  # of a path: upstreams decode once, careless ones twice

# Segments as the widest of upstreams see them: `\\` separates like `/` (IIS), and `..;x` is `..` (Tomcat).
_DOTS = re.compile(rb"[/\\]\.{1,2}(?=[/\\;]|$)")


def has_dot_segments(path: bytes) -> bool:
    """Tell whether a path has a segment `.` or `..`, plain or encoded: what is further on may resolve it.

    Clients resolve such segments before they ask (RFC 3986 5.2.4), so an honest caller loses nothing.
    """
    if b"." not in path and b"%" not in path:
        return False
    for _ in range(DECODINGS_COUNT + 1):
        if _DOTS.search(path):
            return True
        if b"%" not in path:
            return False
        path = urllib.parse.unquote_to_bytes(path)
    return False


def check_path(path: bytes) -> None:
    """Raise BadPath for a path with dot segments; see `has_dot_segments`."""
    if has_dot_segments(path):
        raise BadPath("the path has dot segments; allowed: a path without . and .., encoded or not (RFC 3986 3.3)")


CUT_SHORT = "the connection was closed before the response was complete"


_VISIBLE = re.compile(rb"[\x21-\x7e]+")
_END = h11.EndOfMessage()


@lru_cache(maxsize=64)
def _asked(method: bytes) -> h11.Request:
    """Return what h11 must know of a request that it did not build: an answer is framed by the method alone."""
    return h11.Request(method=method, target=b"/", headers=[(b"Host", b"")])


class ClientWire(Wire):
    """The client's side of one connection: build requests, feed bytes, take events."""

    _role = h11.CLIENT
    _cut = False

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._interim_count = 0
        self._method: bytes | None = None  # of a request of which h11 has not been told
        self._protocols: frozenset[bytes] = frozenset()  # that were asked for

    def build_whole(self, method: bytes, target: bytes, headers: Headers, body: bytes, length: int | None) -> bytes:
        """Return the bytes of a whole request; `headers` has Host, but not the Content-Length that `length` is put in.

        Nothing is left for h11 to decide but how the answer is framed, so it is only told that it has been asked, and
        that only if the answer is not plain.
        """
        if not _VISIBLE.fullmatch(target):
            raise h11.LocalProtocolError(f"Illegal request target {target!r}")
        _asked(method)  # raises for what is no method
        self._method = method
        framing = b"" if length is None else b"Content-Length: %d\r\n" % length
        return b"%b %b HTTP/1.1\r\n%b%b\r\n%b" % (method, target, build_lines(headers), framing, body)

    def build_head(self, method: bytes, target: bytes, headers: Headers) -> bytes:
        """Return the bytes of a request's head; `headers` has Host and the framing field, or Upgrade."""
        return self._sent(h11.Request(method=method, target=target, headers=list(headers)))

    def feed(self, data: bytes) -> None:
        """Take bytes from the peer; b"" is its end of stream."""
        self._cut = self._cut or not data
        if self._method is not None and self._unshown is None:
            if data and self._feed_plain(data):
                return
            self._ask()
        super().feed(data)

    def _feed_plain(self, data: bytes) -> bool:
        head = None if self._method == b"HEAD" else parse_plain_head(data, _STATUS_LINE)
        return head is not None and head.length is not None and self._take_plain(head, data)

    def _ask(self) -> None:
        if self._method is not None:
            self._conn.send(_asked(self._method))
            self._conn.send(_END)
            self._method = None

    def _show(self) -> None:
        self._ask()
        super()._show()

    def next_event(self) -> tuple[int, Headers] | bytes | WireEvent:
        """Return the final head (status, headers), a chunk of the body, or a `WireEvent`; raises PeerGone."""
        if self._head is not None:
            plain, self._head = self._head, None
            return int(plain.start[1]), plain.headers
        if (known := self._body_event()) is not None:
            return known
        try:
            event = self._conn.next_event()
            while type(event) is h11.InformationalResponse:
                if event.status_code == 101:  # which h11 lets pass if we have asked for any protocol
                    return self._switch([(name, value) for name, value in event.headers])
                self._interim_count += 1
                if self._interim_count > MAX_INTERIM_COUNT:
                    raise PeerGone(f"bad response: too many interim ones; allowed: {MAX_INTERIM_COUNT}")
                event = self._conn.next_event()
            if type(event) is not h11.Response:
                return self._message_event(event)
        except h11.RemoteProtocolError as error:
            raise PeerGone(CUT_SHORT if self._cut else f"bad response: {_broken_rule(error)}") from None
        except TooMuchFraming as error:
            raise PeerGone(str(error).replace("request", "response")) from None
        headers = _fields(event)
        if fields_bytes(headers) > MAX_HEAD_BYTES:
            raise PeerGone(f"bad response: head too large; allowed: {MAX_HEAD_BYTES} bytes")
        self._body = body_reader(self._conn)
        return event.status_code, headers

    def ask_for(self, protocols: bytes) -> None:
        """Let the request that is built next be answered with a 101, for some of `protocols` (as Upgrade has them)."""
        self._protocols = frozenset(tokens_of([(b"upgrade", protocols.lower())], b"upgrade"))

    def _switch(self, headers: Headers) -> tuple[int, Headers]:
        chosen = {protocol.lower() for protocol in tokens_of(headers, b"upgrade")}
        if not chosen or not chosen <= self._protocols:
            raise PeerGone("bad response: 101 for a protocol that was not asked for (RFC 9110 7.8)")
        self._body = SwitchedReader(self._conn)
        return 101, headers

    def next_cycle(self) -> bool:
        """Make ready for the next request; False when this connection cannot carry one."""
        is_plain = self._unshown is not None and self._body is not None and self._body.complete
        if not is_plain and (not self._is_over() or self._conn.trailing_data[0]):  # not asked for: it is out of step
            return False
        self._begin_anew()
        return True


# What h11 must not let through, on each of the ways that are tightened from outside, and some of its own.
_FIELD_FLAWS = (b"X-A: a\x01", b"X-A : a", b"Content-Length: 1\r\nContent-Length: 2", b"Transfer-Encoding: gzip")
_CHUNK_FLAWS = (b"1;a\rb\r\nx\r\n", b"0x1\r\nx\r\n", b"1\r\nxx\r\n")
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
HOSTILE_REQUESTS = (
    b"GET / HTTP/2.0\r\nHost: h\r\n\r\n",
    b"GET path HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n" + _CHUNKED + b"0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X-A: a\r\n" * MAX_FIELDS_COUNT + b"\r\n",
    *(b"POST / HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n" % flaw for flaw in _FIELD_FLAWS),
    *(b"POST / HTTP/1.1\r\nHost: h\r\n" + _CHUNKED + flaw for flaw in _CHUNK_FLAWS),
)
HOSTILE_RESPONSES = (
    b"HTTP/1.1 2000 OK\r\n\r\n",
    *(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % flaw for flaw in _FIELD_FLAWS),
    *(b"HTTP/1.1 200 OK\r\n" + _CHUNKED + flaw for flaw in _CHUNK_FLAWS),
)


def _refuses(wire: ServerWire | ClientWire, hostile: bytes) -> bool:
    try:
        wire.feed(hostile)
        while wire.next_event() not in (WireEvent.NEED_DATA, WireEvent.PAUSED, WireEvent.CLOSED):
            continue
    except (BadRequest, PeerGone):
        return True
    return False


def _asking_wire() -> ClientWire:
    wire = ClientWire()
    wire.build_whole(b"GET", b"/", [(b"Host", b"h")], b"", None)
    return wire


def _try_h11_grammar() -> None:
    """Raise ImportError unless both wires refuse what no h11 of another version may start to let through."""
    passed = [hostile for hostile in HOSTILE_REQUESTS if not _refuses(ServerWire(), hostile)]
    passed += [hostile for hostile in HOSTILE_RESPONSES if not _refuses(_asking_wire(), hostile)]
    if passed:
        raise ImportError(f"h11 {h11._version.__version__} lets through {passed[0][:80]!r}; install h11 0.16.0")


_try_h11_grammar()

# ---------------------------------------------------------------------------------------------------------------
# HTTP drivers: they read, feed, write and arm timers.  They know nothing of processes.
#
# Server: one connection carries one exchange at a time; what a client pipelines waits in the wire.  The handler
# runs in a task of its own from the moment the head is there, while the body still arrives.  That task is cancelled
# when its answer has no reader any more (the client hung up) or is already known (the rest of the request is broken or
# late), so a handler needs no other sign.  An end of stream from the client counts as hanging up, as in Go: TCP
# cannot tell a half-closed connection from a closed one.
# Back-pressure: no reading while a body has BUFFERED_BYTES waiting, or more than a head of what was read is still to be
# parsed, in whatever phase; no writing while the transport has bytes unsent.
# Fairness: of one connection only so many heads and chunks are taken in one turn of the loop, the rest in the next.
# Deadlines: `read` runs from a request's first byte to its last, but stands still while we do not read; `write`
# from a response's first byte until the kernel has the last; `idle` between requests.
# After a 101 each side may end alone, and what the other still sends is passed on.  `write` is then for each piece that
# a side is to take, and the switch says how long both may be silent.  A client that is reset is seen at once, for a
# set of the kernel's watches its connection whenever we do not read from it.
# ---------------------------------------------------------------------------------------------------------------


class Alarm:
    """One timer whose deadline moves often: moving it later costs an attribute, not a heap operation."""

    __slots__ = ("_handle", "_left_s", "_loop", "_ring", "when_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._left_s: float | None = None
        self.when_s: float | None = None

    def set(self, when_s: float | None) -> None:
        """Ring at `when_s` (loop time) instead of what was set before; None: not at all."""
        self.when_s, self._left_s = when_s, None
        if when_s is not None and (self._handle is None or self._handle.when() > when_s):
            self.stop_handle()
            self._handle = self._loop.call_at(when_s, self._on_time)

    def hold(self) -> None:
        """Stand still until `go_on`, or `set`."""
        if self.when_s is not None:
            self._left_s = self.when_s - self._loop.time()
            self.when_s = None

    def go_on(self) -> None:
        """Run on with the time that was left."""
        if self._left_s is not None:
            self.set(self._loop.time() + self._left_s)

    def stop_handle(self) -> None:
        """Cancel the loop's timer; `set` makes a new one."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _on_time(self) -> None:
        self._handle = None
        if self.when_s is None:
            return
        if self._loop.time() < self.when_s - 0.001:  # uvloop's clock has milliseconds
            self._handle = self._loop.call_at(self.when_s, self._on_time)
            return
        self.when_s = None
        self._ring()


def keep_watch(sock: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other end has gone without a word, within SILENT_S (tcp(7)).

    Without it a machine that lost its power is waited for without end.  Connections inherit what their
    listening socket has, so one call for that is enough.  A socket of another kind is left as it is.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, WATCH_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, WATCH_EVERY_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, WATCH_COUNT)
    expect_stalls(sock, False)


def expect_stalls(sock: socket.socket, expected: bool) -> None:
    """Tell the kernel whether the other end of a connection that `keep_watch` saw may rightly take nothing for long.

    TCP_USER_TIMEOUT does not tell a peer that is gone from one that lives, answers, and has no room: after SILENT_S
    with a full window it ends both.  While more is sent than a receiver surely takes, only its own deadlines may.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0 if expected else SILENT_S * 1000)


def confirm_at_once(sock: socket.socket) -> None:
    """Confirm what has come on a TCP connection now, where the kernel would wait for more or 40 ms (tcp(7)).

    A sender with Nagle's algorithm and two writes for a message, as Python's http.server, waits for that.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # it is closed already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def is_broken(sock: socket.socket, has_ended: bool) -> bool:
    """Tell whether a connection is no more, as after a reset; `has_ended`: we have ended our side of it.

    Then POLLHUP may mean that the other end has ended its own as well, in good order (tcp_poll() in Linux).
    """
    poller = select.poll()
    poller.register(sock.fileno(), 0)
    broken = select.POLLERR if has_ended else select.POLLERR | select.POLLHUP
    return any(events & broken for _, events in poller.poll(0))


_TCP_INFO = struct.Struct("=B119xQ")  # of linux/tcp.h: tcpi_state, tcpi_bytes_acked
_TCP_ESTABLISHED = 1


def tcp_progress(sock: socket.socket) -> tuple[bool, int]:
    """Return whether neither end has closed a connection, and how many bytes the other end's kernel has confirmed.

    The count is 0 where the kernel keeps none (before Linux 4.1): an established connection has one from its SYN.
    """
    if sock.family is socket.AF_UNIX:  # it confirms nothing, and what comes on an idle connection is its end
        return not _is_ready(sock.fileno(), select.POLLIN), 0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    state, confirmed_bytes = _TCP_INFO.unpack(info.ljust(_TCP_INFO.size, b"\0"))
    return state == _TCP_ESTABLISHED, confirmed_bytes


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Return what `function` returns in a thread.  If cancelled, wait for its end: what it uses is closed next."""
    work = asyncio.get_running_loop().run_in_executor(None, function, *args)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait((work,))
        raise


async def finished_first(*waits: Awaitable[object]) -> None:
    """Return when one of `waits` has finished, or raise what it raised; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for task in done:
        task.result()


def send_file(socket_fd: int, file_fd: int, offset: int, count: int) -> int:
    """Return how many of `count` bytes of a file a non-blocking socket took, 0 if it is full (sendfile(2))."""
    try:
        sent = os.sendfile(socket_fd, file_fd, offset, count)
    except BlockingIOError:
        return 0
    if not sent:
        raise FaashoundError("a file is shorter than was announced")
    return sent


Handler = Callable[[Request], Awaitable[Response]]
TEXT_PLAIN: Header = (b"Content-Type", b"text/plain; charset=utf-8")


def error_response(error: FaashoundError) -> Response:
    """Return the one form in which an error of ours reaches a client."""
    text = f"{error}\n".encode(errors="backslashreplace")  # it may repeat what a caller has sent
    return Response(error.status, (TEXT_PLAIN, *error.headers), text)


class ServerTimeouts(NamedTuple):
    """Seconds to receive a whole request, to send a whole response, and to wait between requests."""

    read_s: float
    write_s: float
    idle_s: float


class EpollSet:
    """Descriptors watched in a set of our own, which hangs on the loop by its one descriptor.

    The loop makes an object for each descriptor and asks the kernel six times; here to add is one system call, and to
    forget is none: a descriptor that is closed leaves the set by itself (epoll(7)).  And the set can wait for more than
    the loop can: EPOLLRDHUP tells that a client has gone while its connection is not read from.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._first_fd = -1
        self._loop = loop
        loop.add_reader(self._epoll.fileno(), self._on_ready)

    def add(self, fd: int, on_event: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Call `on_event` whenever `fd` is ready for `events`, until `remove` or `forget`."""
        self._watched[fd] = on_event
        self._epoll.register(fd, events)

    def add_first(self, fd: int, on_event: Callable[[], None]) -> None:
        """As `add` for reading, but handled before all others of the same turn."""
        self._first_fd = fd
        self.add(fd, on_event)

    def remove(self, fd: int) -> None:
        """Watch `fd` no more, which stays open."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """Watch `fd` no more, which is about to be closed."""
        self._watched.pop(fd, None)

    def _on_ready(self) -> None:
        ready = [fd for fd, _ in self._epoll.poll(0, EVENTS_COUNT)]
        if self._first_fd in ready:
            ready.remove(self._first_fd)
            self._watched[self._first_fd]()
        for fd in ready:
            on_event = self._watched.get(fd)  # one that is handled may end the watch for another
            if on_event is not None:
                on_event()

    def close(self) -> None:
        """Let go of the set."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()


def build_date(epoch_s: int) -> bytes:
    """Return an IMF-fixdate (RFC 9110 5.6.7)."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(epoch_s)).encode()  # nothing sets a locale


class ConnectionLimits(NamedTuple):
    """How many connections one process takes, in all and from one address (see `network_of`), and what says so."""

    total_count: int = MAX_CONNECTIONS_COUNT
    per_address_count: int = MAX_CONNECTIONS_COUNT
    total_source: str = "max_connections"
    per_address_source: str = "max_connections_per_address"


_MAPPED_IPV4 = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2: how a socket for both protocols shows IPv4


def network_of(peername: object) -> bytes:
    """Return what stands for the client at `peername`: its IPv4 address, or its IPv6 network of 64 bits.

    A client that has one IPv6 address has the network (RFC 4291 2.5.4).  b"" for what has no address: Unix sockets.
    """
    if not isinstance(peername, tuple):
        return b""
    host = str(peername[0]).partition("%")[0]
    if ":" not in host:
        return socket.inet_aton(host)
    packed = socket.inet_pton(socket.AF_INET6, host)
    return packed[12:] if packed.startswith(_MAPPED_IPV4) else packed[:8]


class Roster:
    """The accepted connections, and which of them is closed first when there is no more room.

    It is the one which has waited longest for a request, or for the rest of its head: nothing is lost with it.  Those
    that wait stand in the order of their last answer.  One that has begun an exchange since is left there, and skipped
    when it comes first, so that an exchange costs no more than two moves in ordered dictionaries.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._count = 0
        self._counts: dict[bytes, int] = {}
        self._waiting: dict[bytes | None, OrderedDict[ServerConnection, None]] = {None: OrderedDict()}

    def is_full(self, network: bytes) -> bool:
        """Tell whether one more from `network` takes the place of another, if it is admitted at all."""
        return self._count >= self._limits.total_count or self._is_crowded(network)

    def _is_crowded(self, network: bytes) -> bool:
        return bool(network) and self._counts.get(network, 0) >= self._limits.per_address_count

    def make_room(self, network: bytes) -> TooManyConnections | None:
        """Close a connection, that another from `network` be admitted; return why it is not if none can be closed."""
        is_crowded, limits = self._is_crowded(network), self._limits
        if self._close_oldest(network if is_crowded else None):
            return None
        if is_crowded:
            allowed = f"{limits.per_address_count} ({limits.per_address_source})"
            return TooManyConnections(f"too many connections from this address; allowed: {allowed}")
        return TooManyConnections(f"too many connections; allowed: {limits.total_count} ({limits.total_source})")

    def _close_oldest(self, network: bytes | None) -> bool:
        line = self._waiting.get(network)
        while line:
            connection = next(iter(line))
            del line[connection]
            if connection.close_if_waiting():
                return True
        return False

    def enter(self, connection: ServerConnection) -> None:
        """Count a new connection, which waits for its first request."""
        network = connection.network
        self._count += 1
        self._counts[network] = self._counts.get(network, 0) + 1
        connection.lines = (self._waiting[None], self._waiting.setdefault(network, OrderedDict()))
        self.wait(connection)

    def leave(self, connection: ServerConnection) -> None:
        """Forget a connection that was counted."""
        network = connection.network
        self._count -= 1
        self._counts[network] -= 1
        for line in connection.lines:
            line.pop(connection, None)
        if not self._counts[network]:
            del self._counts[network], self._waiting[network]

    @staticmethod
    def wait(connection: ServerConnection) -> None:
        """Put a connection that waits for its next request behind all others."""
        for line in connection.lines:
            line[connection] = None
            line.move_to_end(connection)


class Trouble:
    """What keeps something from its work at each look: told once, and its end; what is another is told anew."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._told = ""

    def tell(self, text: str) -> None:
        """It is there (still); without a text, it is over."""
        if text != self._told:
            (self._write if text else log.info)(text or f"{self._told}: over")
        self._told = text

    def over(self) -> None:
        """It is there no longer."""
        self.tell("")


class Listener:
    """Accepts from a listening socket, in turns with the other worker processes: the fewest connections go first.

    The kernel wakes all of them for each connection, whichever has the fewest; a client that keeps its connections
    could load one loop for long and leave another idle.  A process whose turn it is not takes what is still there after
    TURN_S.  One whose turn it is takes all that wait: asyncio's server takes one a turn, so the last of many wait long.
    """

    def __init__(self, sock: socket.socket, server: Server, slot: Slot) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._server = server
        self._slot = slot
        self._opening: set[asyncio.Task[Any]] = set()
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        keep_watch(sock)
        sock.listen(BACKLOG)  # one that was inherited may have been given less
        self._loop.add_reader(sock.fileno(), self._on_connection)

    def _on_connection(self) -> None:
        for _ in range(ACCEPTS_COUNT):
            if not self._slot.is_next():
                self._rest(TURN_S)
                return
            if not self._accept():
                return

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._on_connection)
        self._accept()

    def _accept(self) -> bool:
        """Accept a connection; tell whether there may be more."""
        try:
            sock, peername = self._sock.accept()
        except ConnectionError:  # that client has gone again
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            self._server.tell(error)
            self._rest(ACCEPT_PAUSE_S)
            return False
        is_full, connection = self._server.admit(network_of(peername))
        if connection is None:
            sock.close()
            return False
        task = self._loop.create_task(self._open(connection, sock))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return not is_full  # what had to make room closes its descriptor in the next turn

    async def _open(self, connection: ServerConnection, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except OSError as error:
            log.info(f"a connection could not be opened: {_strerror(error)}")
            sock.close()
            self._server.forget(connection)

    def close(self) -> None:
        """Accept no more."""
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()


class Server:
    """Serves `handler` on any number of listening sockets.

    `on_refused` is told of each request that was answered without a handler: the request, None if it had no valid head,
    and the error.  `slot` tells of the other processes that serve the same sockets, `limits` are this one's.
    Obligations: `listen` each socket, then at the end `stop_accepting`, `drained`, `give_up`, in this order.
    """

    def __init__(
        self,
        handler: Handler,
        timeouts: ServerTimeouts,
        on_refused: Callable[[Request | None, FaashoundError], None] = lambda request, error: None,
        slot: Slot | None = None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self._slot = slot or Slot(Scoreboard())
        self._roster = Roster(limits or ConnectionLimits())
        self._refused_count = 0
        self._told_s: dict[str, float] = {}
        self.handler = handler
        self.timeouts = timeouts
        self.on_refused = on_refused
        self.draining = False
        self.connections: set[ServerConnection] = set()
        self._listeners: list[Listener] = []
        self._date: tuple[int, bytes] = (0, b"")

    def listen(self, sock: socket.socket) -> None:
        """Accept connections on `sock`, bound already, TCP or Unix; the server owns it from here."""
        self._slot.set_serving(True)
        self._listeners.append(Listener(sock, self, self._slot))

    def admit(self, network: bytes) -> tuple[bool, ServerConnection | None]:
        """Listener: return whether there is no more room, and what serves a new connection, None if it is to be closed.

        One that finds no room is told so, if not too many are told already.
        """
        was_full = self._roster.is_full(network)
        refusal = self._roster.make_room(network) if was_full else None
        if refusal is not None:
            self._tell(log.warning, "connections are refused: ", str(refusal))
            if self._refused_count >= REFUSED_AT_ONCE_COUNT:
                return True, None
            self._refused_count += 1
        connection = ServerConnection(self, network, refusal)
        if refusal is None:
            self._roster.enter(connection)
        self._slot.count_connection(1)
        return was_full, connection

    def tell(self, error: OSError) -> None:
        """Listener: a connection cannot be accepted, and waits."""
        remedy = " (LimitNOFILE, ulimit -n)" if error.errno == errno.EMFILE else ""
        self._tell(log.error, "cannot accept a connection: ", f"{_strerror(error)}{remedy}")

    def _tell(self, write: Callable[[str], None], what: str, why: str) -> None:
        now_s = time.monotonic()
        if now_s >= self._told_s.get(what, -math.inf) + TOLD_EVERY_S:
            self._told_s[what] = now_s
            write(what + why)

    def forget(self, connection: ServerConnection) -> None:
        """Connection: it is closed, or was never opened."""
        self.connections.discard(connection)
        self._slot.count_connection(-1)
        if connection.is_surplus:
            self._refused_count -= 1
        else:
            self._roster.leave(connection)

    def stop_accepting(self) -> None:
        """Close the listening sockets and connections that are idle, new ones a little later.  Repeatable.

        What is in flight goes on, and closes then.
        """
        self.draining = True
        self._slot.set_serving(False)
        while self._listeners:
            self._listeners.pop().close()
        for connection in list(self.connections):
            connection.close_if_idle()

    async def drained(self, deadline_s: float) -> bool:
        """Wait until no exchange is left or `deadline_s` (loop time) has come; tell whether none is left.

        Connections that have switched to another protocol do not count: they need never end.
        """
        try:
            async with asyncio.timeout_at(deadline_s):
                while left := self.unfinished():
                    for connection in left:
                        await connection.settled.wait()
        except TimeoutError:
            return False
        return True

    def unfinished(self) -> list[ServerConnection]:
        """Return the connections that are waited for at a drain."""
        return [connection for connection in self.connections if not connection.settled.is_set()]

    @property
    def busy_count(self) -> int:
        """The connections on which a request is arriving, handled or answered."""
        return sum(connection.is_busy for connection in self.connections)

    async def give_up(self) -> None:
        """Answer 503 to every request whose answer has not begun, then cut what is left after FAREWELL_S.

        Of what has switched to another protocol the other side is told that the client has ended, and may say goodbye.
        """
        connections = list(self.connections)
        for connection in connections:
            connection.give_up()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                for connection in connections:
                    await connection.closed.wait()
        self.abort()

    def abort(self) -> None:
        """Cut every connection; their handlers are cancelled."""
        for connection in list(self.connections):
            connection.abort()

    @cached_property
    def hangups(self) -> EpollSet:
        """What watches the connections that are not read from, which takes them out of the loop's poll."""
        return EpollSet(asyncio.get_running_loop())

    def date(self) -> bytes:
        """Return the Date field (RFC 9110 6.6.1), made once a second."""
        second = int(time.time())
        if second != self._date[0]:
            self._date = (second, build_date(second))
        return self._date[1]


class Connection(asyncio.Protocol):
    """What both sides' connections share: they write no faster than the kernel takes, and read in turns with others.

    What does not fit into one turn of the loop is taken in the next, by `_advance`, while `_advancing` is true.
    """

    closed_text: ClassVar[str]

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._loop, self._on_alarm)
        self._transport: asyncio.Transport
        self._socket: socket.socket
        self._advancing = False
        self._writable: asyncio.Future[None] | None = None
        self._write_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # told as soon as the kernel takes no more
        self._socket = cast(socket.socket, transport.get_extra_info("socket"))

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def _put(self, data: bytes) -> None:
        self._transport.write(data)

    async def _write(self, data: bytes) -> None:
        self._put(data)
        while self._write_paused and not self._transport.is_closing():
            self._writable = self._loop.create_future()
            await self._writable
        if self._transport.is_closing():
            raise PeerGone(self.closed_text)

    async def _write_within(self, data: bytes, stall_s: float) -> None:
        """Write `data`; raises PeerGone if the kernel has not taken it after `stall_s`, too."""
        try:
            async with asyncio.timeout(stall_s):
                await self._write(data)
        except TimeoutError:
            raise PeerGone(self.closed_text) from None

    def _advance_later(self) -> None:
        self._advancing = True
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        raise NotImplementedError

    def _on_alarm(self) -> None:
        raise NotImplementedError

    def _reset_on_close(self) -> None:
        """Have the other end know at once that we close, also behind what it does not read (socket(7), SO_LINGER)."""
        if not self._transport.is_closing():
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def abort(self) -> None:
        """Cut the connection now."""
        self._transport.abort()


class Intake:
    """Whether an accepted connection is read from.  While it is not, a set of the server's tells of a hang-up."""

    def __init__(self, server: Server, on_hangup: Callable[[], None]) -> None:
        self.paused = False
        self._server = server
        self._on_hangup = on_hangup
        self._watched_fd = -1

    def pause(self, transport: asyncio.Transport) -> None:
        """Read no more, and call `on_hangup` when the client closes."""
        self.paused = True
        transport.pause_reading()
        self._watch(transport, select.EPOLLRDHUP)

    def resume(self, transport: asyncio.Transport) -> None:
        """Read on."""
        self.paused = False
        if not transport.is_closing():
            self.stop_watching()
            transport.resume_reading()

    def watch_reset(self, transport: asyncio.Transport) -> None:
        """Call `on_hangup` once more, when a client that has ended its side is reset, or we have ended ours too."""
        self._watch(transport, 0)  # epoll_ctl(2): EPOLLERR and EPOLLHUP are always reported

    def stop_watching(self) -> None:
        """Call `on_hangup` no more."""
        if self._watched_fd >= 0:
            self._server.hangups.remove(self._watched_fd)
            self._watched_fd = -1

    def _watch(self, transport: asyncio.Transport, events: int) -> None:
        self.stop_watching()
        self._watched_fd = transport.get_extra_info("socket").fileno()
        self._server.hangups.add(self._watched_fd, self._on_closed, events)

    def _on_closed(self) -> None:
        self.stop_watching()
        self._on_hangup()


class Phase(IdentityEnum):
    """Where an accepted connection stands in its present exchange."""

    OPENING = "it has no transport yet"
    IDLE = "no byte of a request has come"
    HEAD = "a request has begun to arrive"
    BODY = "the handler runs, the body still arrives"
    HANDLING = "the handler runs, or is ending because the request was refused"
    SENDING = "the response is on its way"
    LINGERING = "the response is out, the rest of the request is discarded"


NEXT_PHASES = {
    Phase.OPENING: {Phase.IDLE},
    Phase.IDLE: {Phase.HEAD},
    Phase.HEAD: {Phase.BODY, Phase.HANDLING},
    Phase.BODY: {Phase.HANDLING, Phase.SENDING},
    Phase.HANDLING: {Phase.SENDING},
    Phase.SENDING: {Phase.IDLE, Phase.LINGERING},
    Phase.LINGERING: set(),
}


class ServerConnection(Connection):
    """One accepted connection; see the theory above."""

    closed_text = "the client closed the connection or took too long to read"

    def __init__(self, server: Server, network: bytes, refusal: FaashoundError | None) -> None:
        super().__init__()
        self.network = network
        self.lines: tuple[OrderedDict[ServerConnection, None], ...] = ()  # the roster's, in which it may wait
        self.is_surplus = refusal is not None
        self.closed = asyncio.Event()
        self.settled = asyncio.Event()  # it is closed, or has switched to another protocol
        self._server = server
        self._wire = ServerWire()
        self._intake = Intake(server, self._on_hangup)
        self._phase = Phase.OPENING
        self._closed_early = False
        self._peer = ""
        self._task: asyncio.Task[None] | None = None
        self._request: Request | None = None
        self._handled = False
        self._is_live = False
        self._silence_s = math.inf  # after a 101: how long both sides may be silent
        self._has_ended = False  # ... the other side has, and so have we towards the client
        self._refusal = refusal
        self._discarded_bytes = 0

    # Callbacks of the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peername = transport.get_extra_info("peername")
        self._peer = peername[0] if isinstance(peername, tuple) else ""
        self._server.connections.add(self)
        self._enter(Phase.IDLE)
        if self._refusal is not None:
            self._enter(Phase.HEAD)
            self._refuse(self._refusal)
            return
        if self._closed_early:
            self._transport.close()
        self._alarm.set(self._loop.time() + self._server.timeouts.idle_s)
        if self._server.draining:
            self.close_if_idle()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None or self._phase is Phase.LINGERING:
            self._discard(len(data))
            return
        if self._phase is Phase.IDLE:
            self._begin_receiving()
        self._wire.feed(data)
        if self._is_switched:
            self._note_traffic()
        if self._advancing:
            self._throttle()
        else:
            self._advance()

    def eof_received(self) -> bool:
        if self._is_switched:  # that protocol knows what the end of one side means
            self._intake.watch_reset(self._transport)
            self._end_clients_side()
            return True
        if self._phase is Phase.SENDING and not self._is_live:
            self._intake.paused = True  # by the transport; it will say so again when we read on after the answer
            return True  # a client that half-closed may still read it
        self._cancel()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._alarm.stop_handle()
        self._intake.stop_watching()
        self._cancel()
        self.resume_writing()
        self._server.forget(self)
        self.settled.set()
        self.closed.set()

    def _enter(self, phase: Phase) -> None:
        if phase not in NEXT_PHASES[self._phase]:
            raise AssertionError(f"{phase} cannot follow {self._phase}")
        self._phase = phase

    # Receiving.

    def _begin_receiving(self) -> None:
        self._enter(Phase.HEAD)
        self._alarm.set(self._loop.time() + self._server.timeouts.read_s)

    def _advance(self) -> None:
        """Take what the wire has, up to EVENTS_AT_ONCE_COUNT; then others are served before the rest."""
        pieces: list[bytes] = []
        sign = None
        try:
            for _ in range(EVENTS_AT_ONCE_COUNT):
                event = self._wire.next_event()
                if isinstance(event, bytes):
                    pieces.append(event)
                elif isinstance(event, WireEvent):
                    sign = event
                    break  # after END too: what follows waits for the end of this exchange
                else:
                    self._begin(*event)
        except BadRequest as error:
            self._refuse(error)
            return
        if pieces:
            cast(Request, self._request).body.feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if sign is WireEvent.END:
            self._received_whole()
        elif sign is None:
            self._advance_later()
        self._throttle()

    def _go_on(self) -> None:
        """Take the rest, unless the exchange has ended meanwhile."""
        self._advancing = False
        if self._refusal is None and self._phase in (Phase.HEAD, Phase.BODY, Phase.SENDING):
            self._advance()

    def _begin(self, method: bytes, target: bytes, headers: Headers) -> None:
        first = first_values(headers)
        path, query, host = split_target(target, first.get(b"host", b""))
        length = None if b"transfer-encoding" in first else int(first.get(b"content-length", 0))
        body = Body(length, self._on_drained)
        self._request = Request(method.decode(), target, path, query, host, headers, body, self._peer, abort=self._cut)
        self._handled = False
        self._enter(Phase.BODY)
        self._task = self._loop.create_task(self._exchange(self._request))

    def _received_whole(self) -> None:
        if self._phase is Phase.BODY:
            self._enter(Phase.HANDLING)
            self._alarm.set(None)
        cast(Request, self._request).body.finish()

    def _throttle(self) -> None:
        """Read only while there is room for what comes; the read deadline stands still while the handler is slow."""
        is_full = self._request is not None and self._request.body.buffered_bytes >= BUFFERED_BYTES
        if is_full and self._phase is Phase.BODY:
            self._alarm.hold()
        if not is_full and self._wire.waiting_bytes <= MAX_HEAD_BYTES:
            if self._intake.paused:
                self._resume_reading()
        elif not self._intake.paused and not self._transport.is_closing():
            self._intake.pause(self._transport)

    def _on_drained(self) -> None:
        """The handler wants more of the body."""
        if self._wire.awaits_continue and self._phase is Phase.BODY:
            self._transport.write(self._wire.build_continue())
        self._throttle()

    def _resume_reading(self) -> None:
        self._intake.resume(self._transport)
        self._alarm.go_on()

    def _on_hangup(self) -> None:
        if self._is_switched:
            if is_broken(self._socket, self._has_ended):
                self.abort()
            elif not self._has_ended:
                self._intake.watch_reset(self._transport)  # it has ended its side, and what it sent is still to be read
        elif self._phase is not Phase.SENDING or self._is_live:
            self.abort()

    # Answering.

    async def _exchange(self, request: Request) -> None:
        self._handled = True
        try:
            await self._answer(await self._handle(request))
        except asyncio.CancelledError:
            if self._refusal is None:  # the client has gone; or what was waited for was cancelled, and no alarm is set
                self._cut()
            raise

    async def _answer(self, response: Response) -> None:
        try:
            await self._send(response)
        except (FaashoundError, OSError) as error:
            log.info(f"response cut short: {reason_of(error)}")
            self._cut()
        except Exception:
            log.exception("a response could not be sent")
            self._cut()
        else:
            self._end_exchange()

    async def _handle(self, request: Request) -> Response:
        try:
            return await self._server.handler(request)
        except FaashoundError as error:
            return error_response(error)
        except Exception:
            log.exception("a handler failed")
            return error_response(FaashoundError("internal error; see the log"))

    async def _send(self, response: Response) -> None:
        self._enter(Phase.SENDING)
        if response.switch is not None:
            await self._relay(response, response.switch)
            return
        self._is_live = response.is_live
        limit_s = self._server.timeouts.write_s if response.write_timeout_s is None else response.write_timeout_s
        self._alarm.set(None if limit_s == math.inf else self._loop.time() + limit_s)
        close = self._server.draining or self._refusal is not None or not self._wire.peer_done
        headers = response.headers
        if b"date" not in dict(headers):  # that of a function's server tells caches the answer's age
            headers = (*headers, (b"Date", self._server.date()))
        # The length that is told to a HEAD is the function's own, if any, and never that of the body that has come.
        body = response.body if self._wire.head_request else body_if_complete(response.body)
        if not isinstance(body, bytes) or len(body) > MAX_HEAD_BYTES:
            expect_stalls(self._socket, True)  # its reader has the write timeout
        if isinstance(body, bytes):
            length = len(body) if response.length is None else response.length
            await self._write(self._wire.build_whole(response.status, headers, body, length, close))
            return
        head = partial(self._wire.build_head, response.status, headers, response.length, close)
        if isinstance(body, FileBody):
            with body.file:
                await self._write(head() + self._wire.build_chunk(body.prefix))
                await self._send_file(body, cast(int, response.length) - len(body.prefix))
        else:
            async with aclosing(body):
                await self._write(head())
                async for data in body:
                    await self._write(self._wire.build_chunk(data))
        await self._write(self._wire.end())

    async def _relay(self, response: Response, switch: Switch) -> None:
        """Send a 101, then pass on what comes from either side without framing, until both sides have ended."""
        stall_s = self._server.timeouts.write_s
        async with aclosing(cast(Stream, response.body)) as stream:
            expect_stalls(self._socket, True)
            head = self._wire.build_switch(response.headers)
            cast(Request, self._request).body = body = Body(None, self._on_drained)
            self._silence_s = switch.idle_s
            self._note_traffic()
            self.settled.set()
            passing = switch.send(body, stall_s)
            try:
                self._advance()
                await self._write_within(head, stall_s)
                async for data in stream:
                    self._note_traffic()
                    await self._write_within(data, stall_s)
                await self._end_our_side(passing)
            finally:
                passing.cancel()
        if not body.complete:
            raise PeerGone("the other side of the switched connection was closed")

    async def _end_our_side(self, passing: asyncio.Task[None]) -> None:
        """Tell the client that the other side has ended its own, and wait for what the client still sends."""
        self._has_ended = True
        self._transport.write_eof()
        self._silence_s = min(self._silence_s, self._server.timeouts.read_s)
        self._note_traffic()
        await asyncio.wait((passing,))

    def _end_clients_side(self) -> None:
        self._wire.feed(b"")
        if not self._advancing:
            self._advance()

    @property
    def _is_switched(self) -> bool:
        return self._wire.is_switched and self._phase is Phase.SENDING

    def _note_traffic(self) -> None:
        self._alarm.set(None if self._silence_s == math.inf else self._loop.time() + self._silence_s)

    async def _send_file(self, body: FileBody, count: int) -> None:
        """Have the kernel copy `count` bytes of a file, behind what it has got, in a thread: no disk stops the loop."""
        if self._wire.head_request:
            return
        self._wire.pass_by(count)
        # A copy: the transport closes its own whenever it must, and the next client's could get the same number.
        fd = os.dup(self._socket.fileno())
        try:
            sent = 0
            while sent < count:
                at, hop_bytes = body.offset + sent, min(count - sent, FILE_HOP_BYTES)
                taken = await in_thread(send_file, fd, body.file.fileno(), at, hop_bytes)
                sent += taken
                if not taken:
                    await self._takes_more(fd)
        finally:
            os.close(fd)

    async def _takes_more(self, fd: int) -> None:
        """Wait until a socket takes more; a client that has gone ends the wait too."""
        ready = asyncio.Event()
        self._loop.add_writer(fd, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(fd)

    def _end_exchange(self) -> None:
        self._task = self._request = None
        # Who was told to go on may have asked again already: of what we have read, nothing is dropped unanswered.
        is_over = self._refusal is not None or (self._server.draining and not self._wire.waiting_bytes)
        if is_over or not self._wire.next_cycle():
            self._linger()
            return
        self._enter(Phase.IDLE)
        if self._server.draining and not self._wire.started:  # what waited was the empty line before a request
            self._transport.close()
            return
        Roster.wait(self)
        self._alarm.set(self._loop.time() + self._server.timeouts.idle_s)
        if self._wire.started:
            self._begin_receiving()
            self._advance()
        elif self._intake.paused:
            self._throttle()

    def _refuse(self, error: FaashoundError, *, at_once: bool = False) -> None:
        """Answer `error` instead of what the handler would have said, and close: once it has ended, or `at_once`."""
        self._refusal = error
        self._alarm.set(None)
        if self._phase is Phase.SENDING:
            self._transport.close()
            return
        if self._phase is not Phase.HANDLING:
            self._enter(Phase.HANDLING)
        if self._task is None:
            self._answer_refusal(None)
        else:
            cast(Request, self._request).refusal = error
            self._task.cancel()
            if at_once:
                self._answer_refusal(self._task)
            else:
                self._task.add_done_callback(self._answer_refusal)

    def _answer_refusal(self, task: asyncio.Task[None] | None) -> None:
        error = cast(FaashoundError, self._refusal)
        if not self._transport.is_closing():
            self._task = self._loop.create_task(self._answer(error_response(error)))
        if task is None or not self._handled:
            self._server.on_refused(self._request, error)

    # Deadlines and the end.

    def _on_alarm(self) -> None:
        if self._phase in (Phase.SENDING, Phase.LINGERING):
            if self._is_switched:
                log.info(f"a switched connection is closed: silent for {format_duration(self._silence_s)}")
            self.abort()
        elif self._phase in (Phase.HEAD, Phase.BODY):
            timeout = format_duration(self._server.timeouts.read_s)
            self._refuse(ReadTimeout(f"the request did not arrive within read_timeout ({timeout})"))
        else:
            self._transport.close()

    def _linger(self) -> None:
        """Close so that the client can read the answer: unread input would make the kernel reset the connection."""
        in_step = self._wire.peer_done and not isinstance(self._refusal, BadRequest)
        if in_step or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._enter(Phase.LINGERING)
        self._transport.write_eof()
        # A client that has broken a rule gets a moment; one whose answer came early may send all that it has to.
        limit_s = LINGER_S if self._refusal is not None else self._server.timeouts.read_s
        self._alarm.set(self._loop.time() + limit_s)
        if self._intake.paused:
            self._resume_reading()

    def _discard(self, count: int) -> None:
        self._discarded_bytes += count
        if self._refusal is not None and self._discarded_bytes > LINGER_BYTES:
            self.abort()

    def close_if_waiting(self) -> bool:
        """Close unless a whole head has come; tell whether it did."""
        if self._phase is Phase.OPENING:  # another came right behind it
            self._closed_early = True
            return True
        if self._phase not in (Phase.IDLE, Phase.HEAD) or self._transport.is_closing():
            return False
        self._transport.close()
        return True

    def close_if_idle(self) -> None:
        """Close unless an exchange is going on or beginning; one that is new may have its first request on the way."""
        if self._phase is Phase.IDLE:
            if self._handled:
                self._transport.close()
            else:
                self._alarm.set(self._loop.time() + LATE_S)

    @property
    def is_busy(self) -> bool:
        """True while an exchange is going on or beginning."""
        return self._phase not in (Phase.IDLE, Phase.LINGERING) and not self._transport.is_closing()

    def give_up(self) -> None:
        """Answer that we are stopping, where the answer has not begun; else cut the connection."""
        if self._is_switched:
            self._end_clients_side()
        elif self._phase not in (Phase.HEAD, Phase.BODY, Phase.HANDLING):
            self.abort()
        elif self._refusal is None:
            self._refuse(Stopping(), at_once=True)  # a tree that was granted term_grace may outlast the farewell

    def _cut(self) -> None:
        """Cut an answer that has begun; where a client would take a mere close for its end, by a reset."""
        if self._wire.peer_is_old:
            self._reset_on_close()
        self.abort()

    def _cancel(self) -> None:
        """Cancel the exchange, once: a second time would cut short how its handler ends."""
        if self._task is not None and not self._task.done() and not self._task.cancelling():
            self._task.cancel()


class Unreachable(FaashoundError):
    """No connection to the upstream could be made."""

    status = 502


class OutOfResources(Unreachable):
    """No connection could be made for want of something on this machine that it may soon have again."""


# Descriptors of this process or of all, memory for a socket.  Not EADDRNOTAVAIL: no port is left to connect from, but
# also what a machine without IPv6 says of every IPv6 address.
_OUT_OF_RESOURCES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class UpstreamTimeout(FaashoundError):
    """The upstream did not answer whole by the deadline."""

    status = 504


Address = tuple[socket.AddressFamily, str]
Resolver = Callable[[Url], Awaitable[Sequence[Address]]]


async def resolve_any(url: Url) -> Sequence[Address]:
    """Return every address of `url`'s host by the system's resolver; raises Unreachable."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"cannot resolve {url.host}: {_strerror(error)}") from None
    return [(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found]


def take_turns(addresses: Sequence[Address]) -> list[Address]:
    """Return `addresses` in the order in which to try them: in their own, but the families alternate (RFC 8305 4).

    Where one family leads nowhere, which is the usual fault, the second attempt is of the other.
    """
    each = list(dict.fromkeys(addresses))
    families = list(dict.fromkeys(family for family, _ in each))
    rows = [[address for address in each if address[0] is family] for family in families]
    return [address for turn in itertools.zip_longest(*rows) for address in turn if address is not None]


class Client:
    """HTTP/1.1 client with a pool of idle connections; bodies stream both ways, redirects are answers like any other.

    `resolve` decides which addresses a URL may be reached at; connections go to just those (no second look-up).
    Raises Unreachable, UpstreamTimeout or PeerGone.  Obligation: `close` at the end.
    """

    def __init__(self, resolve: Resolver = resolve_any, kept_s: float = KEPT_S) -> None:
        self.kept_s = kept_s
        self._resolve = resolve
        self._idle: dict[tuple[str, str, int], list[ClientConnection]] = {}
        self._tls: ssl.SSLContext | None = None

    async def request(
        self,
        method: str,
        url: Url,
        headers: Headers = (),
        body: SentBody = b"",
        length: int | None = None,
        deadline_s: float | None = None,
    ) -> ClientResponse:
        """Send one request and return its response as soon as the head is there.

        `headers` without framing, and Host, if it is not to be the URL's, before all others; a body that can be had
        again is best given as a function that opens it;
        `length` of one that is not bytes if known, else it goes chunked; `deadline_s` (loop time) bounds everything to
        the last byte of the response.
        The response must be used as `async with`, which ends the exchange whatever happens.

        A kept connection may be closed by its other end while a request is on its way.  One of which nothing has been
        answered is sent again, once, on a connection of its own, if its body can be had again and its method is
        idempotent, or if no byte of it had reached the other end (RFC 9110 9.2.2, RFC 9112 9.3.1).
        """
        body = body_if_complete(body)
        once = not isinstance(body, bytes) and not callable(body)
        connection = self._kept(url, once)
        if connection is not None:
            try:
                return await connection.exchange(method, url, headers, body, length, deadline_s)
            except PeerGone:
                if once or not (connection.untouched or (connection.silent and method in _IDEMPOTENT)):
                    raise
        connection = await self._connect(url, deadline_s)
        try:
            return await connection.exchange(method, url, headers, body_if_complete(body), length, deadline_s)
        except PeerGone:
            if not connection.untouched or (once and connection.has_begun_to_stream):
                raise  # what is left of such a body would be taken for all of it
        # As a server does that stops with connections which it has not looked at yet.
        raise Unreachable(f"cannot connect to {url.authority}: it closed the connection unread")

    async def reach(self, url: Url, deadline_s: float) -> None:
        """Connect and close again; raises Unreachable or UpstreamTimeout where a request would."""
        (await self._connect(url, deadline_s)).abort()

    def _kept(self, url: Url, once: bool) -> ClientConnection | None:
        """Return an idle connection that can carry a request, if there is one; `once`: which cannot be repeated."""
        kept = self._idle.get((url.scheme, url.host, url.port))
        while kept:
            connection = kept.pop()
            if connection.usable(once):
                return connection
        return None

    async def _connect(self, url: Url, deadline_s: float | None) -> ClientConnection:
        loop = asyncio.get_running_loop()
        limit_s = loop.time() + CONNECT_TIMEOUT_S
        try:
            async with asyncio.timeout_at(limit_s if deadline_s is None else min(limit_s, deadline_s)):
                return await self._connect_any(url)
        except TimeoutError:
            if deadline_s is not None and deadline_s <= limit_s:
                raise UpstreamTimeout(f"no connection to {url.authority} before the deadline") from None
            timeout = format_duration(CONNECT_TIMEOUT_S)
            raise Unreachable(f"no connection to {url.authority} within {timeout}") from None

    async def _connect_any(self, url: Url) -> ClientConnection:
        """Return a connection to the first address that speaks: one that takes it but fails in TLS is not the last."""
        is_path = url.host.startswith("/")
        found = [(socket.AF_UNIX, url.host)] if is_path else await self._resolve(url)
        left = take_turns(found)[:MAX_ATTEMPTS_COUNT]
        reasons = [] if left else ["it has no address"]
        while left:
            try:
                address, connection = await self._connect_first(left, url.port)
            except OSError as error:
                reasons.append(str(error))
                break
            try:
                if url.scheme == "https":
                    self._tls = self._tls or ssl.create_default_context()
                    await connection.start_tls(self._tls, url.host)
                return connection
            except OSError as error:
                reasons.append(f"{address[1]}: {_strerror(error)}")
                left.remove(address)
        raise Unreachable(f"cannot connect to {url.authority}: {'; '.join(reasons)}")

    async def _connect_first(self, addresses: Sequence[Address], port: int) -> tuple[Address, ClientConnection]:
        """Return the first of `addresses` that takes a connection, and the connection; OSError with each one's reason.

        The next one is tried as soon as one has failed, and beside those that are silent for ATTEMPT_DELAY_S; what
        comes too late is closed (RFC 8305 5).
        """
        if len(addresses) == 1:
            return addresses[0], await self._connect_to(addresses[0], port)
        left, reasons = deque(addresses), []
        attempts: dict[asyncio.Task[ClientConnection], Address] = {}
        try:
            while left or attempts:
                if left:
                    address = left.popleft()
                    attempts[asyncio.create_task(self._connect_to(address, port))] = address
                patience_s = ATTEMPT_DELAY_S if left else None
                ended, _ = await asyncio.wait(attempts, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for attempt in ended:
                    error = attempt.exception()
                    if error is None:
                        return attempts.pop(attempt), attempt.result()
                    if isinstance(error, OutOfResources):
                        raise error
                    reasons.append(str(error))
                    del attempts[attempt]
            raise OSError("; ".join(reasons))
        finally:
            for attempt in attempts:
                if not attempt.cancel() and attempt.exception() is None:
                    attempt.result().abort()

    async def _connect_to(self, address: Address, port: int) -> ClientConnection:
        """Return a connection to `address`; raises OSError, whose text names the address and the reason.

        Raises OutOfResources for what would be the same with any other address.
        """
        family, host = address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                if family is socket.AF_UNIX:
                    return (await loop.create_unix_connection(lambda: ClientConnection(self), host))[1]
                _, connection = await loop.create_connection(lambda: ClientConnection(self), host, port, family=family)
                return connection
        except OSError as error:  # a TimeoutError of asyncio among them, which has no number
            if error.errno in _OUT_OF_RESOURCES:
                raise OutOfResources(f"cannot connect to {host}: {os.strerror(error.errno)}") from None
            silence = f"no answer within {format_duration(ATTEMPT_TIMEOUT_S)}"
            raise OSError(f"{host}: {os.strerror(error.errno) if error.errno else silence}") from None

    def keep(self, connection: ClientConnection, url: Url) -> None:
        """Connection: it is idle and may carry another request."""
        kept = self._idle.setdefault((url.scheme, url.host, url.port), [])
        if len(kept) >= KEPT_CONNECTIONS_COUNT:
            connection.abort()
            return
        kept.append(connection)

    def forget(self, connection: ClientConnection, url: Url) -> None:
        """Connection: it is closed."""
        kept = self._idle.get((url.scheme, url.host, url.port), [])
        if connection in kept:
            kept.remove(connection)
        if not kept:
            self._idle.pop((url.scheme, url.host, url.port), None)

    async def close(self) -> None:
        """Close all idle connections."""
        for kept in list(self._idle.values()):
            for connection in list(kept):
                connection.abort()
        self._idle.clear()


class Upgrade(NamedTuple):
    """In place of a request's body: the wish to switch to another protocol (RFC 9110 7.8)."""

    protocols: bytes  # as Upgrade has them


# A body to send: its bytes, a stream that can be read once, or a function that opens a stream of it, time and again.
SentBody = bytes | AsyncIterator[bytes] | Callable[[], Stream] | Upgrade
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})  # RFC 9110 9.2.2


class ClientResponse:
    """A response whose head is there: `status`, `headers` (lower-case names), and `body`, to be iterated.

    Leaving `async with` before the end of the body cuts the connection, which tells the server to stop.  After a 101,
    which only an `Upgrade` is answered with, `body` is what the server sends, and `send` says what it is sent; each may
    end before the other.
    """

    def __init__(self, status: int, headers: Headers, body: Body, connection: ClientConnection) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self._first = first_values(headers)
        self._connection = connection

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of `name`, given in lower case."""
        return self._first.get(name)

    def send(self, body: Body, stall_s: float) -> asyncio.Task[None]:
        """After a 101: send what comes out of `body`, and its end; the server has `stall_s` to take each piece.

        The task ends when all is sent, or the connection is lost; to cancel it cuts the connection.
        """
        return self._connection.send_switched(body, stall_s)

    async def __aenter__(self) -> ClientResponse:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the exchange: cut the connection unless the body came whole."""
        if not self.body.complete:
            self._connection.abort()


class ClientConnection(Connection):
    """One connection to an upstream, carrying one exchange at a time."""

    closed_text = "the connection was closed before the request was sent"

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client
        self._wire = ClientWire()
        self._url: Url | None = None
        self._head: asyncio.Future[ClientResponse] | None = None
        self._body: Body | None = None
        self._sender: asyncio.Task[None] | None = None
        self._ended = False
        self._stalls_expected = False
        self._is_counted = True  # what is sent is what we write: no TLS in between
        self._sent_bytes = 1  # a SYN counts as one
        self._confirmed_bytes = 1  # of what we sent before this request
        self._puts_count = 0  # of this request
        self.silent = True  # nothing has been answered
        self.untouched = False  # ... and nothing of the request had arrived when the other end closed the connection

    # Callbacks of the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        keep_watch(self._socket)  # not through a copy of it, for which there may be no descriptor left

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Speak TLS from now on; raises OSError (ssl.SSLError among them), and the connection is closed then."""
        try:
            transport = await self._loop.start_tls(
                self._transport, self, context, server_hostname=host, ssl_handshake_timeout=ATTEMPT_TIMEOUT_S
            )
        except BaseException:
            self.abort()
            raise
        if transport is None:
            raise OSError("the connection was closed in the TLS handshake")
        self._transport, self._is_counted = transport, False
        # Not 0: that of TLS is "as much or more" (asyncio.sslproto), so an empty buffer would pause us too, for ever.
        self._transport.set_write_buffer_limits(high=1)

    def data_received(self, data: bytes) -> None:
        if self._head is None:  # nothing was asked
            self._transport.abort()
            return
        self.silent = False
        self._wire.feed(data)
        if not self._advancing:
            self._advance()

    def eof_received(self) -> bool:
        self._ended = True
        if self._head is not None:
            self._on_closed_by_peer()
            self._wire.feed(b"")
            if not self._advancing:
                self._advance()
            if self._wire.is_switched and self._transport.can_write_eof():
                return True  # it may go on reading
        return self._advancing  # what has come is still to be parsed

    def connection_lost(self, exc: Exception | None) -> None:
        while self._advancing:  # reset, or the end of TLS, which waits for nothing
            self._go_on()
        if isinstance(exc, BrokenPipeError | ConnectionResetError):
            self._on_write_refused(exc)
        self._fail(PeerGone(CUT_SHORT))
        self.resume_writing()
        if self._wire.is_switched and self._sender is not None:
            self._sender.cancel()
        if self._url is not None:
            self._client.forget(self, self._url)

    def _on_write_refused(self, exc: BrokenPipeError | ConnectionResetError) -> None:
        if self._is_counted:
            self._read_rest(has_ended=isinstance(exc, BrokenPipeError))
        if self._socket.family is socket.AF_UNIX:
            # Closed with our request unread, if it was written at once: one this short is in one buffer, which our
            # servers read whole.  Of several writes the first may have been read before the last was refused.
            is_whole = self._puts_count <= 1 and self._sent_bytes - self._confirmed_bytes <= UNIX_WHOLE_BYTES
            self.untouched = self.silent and is_whole
        elif isinstance(exc, BrokenPipeError):  # in Linux: after an end of stream; a peer that cuts is ECONNRESET
            self._on_closed_by_peer()

    def _read_rest(self, has_ended: bool) -> None:
        """Take what the kernel still has: an answer that came before the end of the request, and closed it (413).

        No loop reads on when a write has failed, but Linux keeps what was received until the descriptor is closed.
        `has_ended`: the other end sent its end of stream, which is also that of a body without a length.
        """
        with suppress(OSError):
            while self._head is not None and not self._is_full:
                data = os.read(self._socket.fileno(), PIPE_BYTES)
                if data:
                    self.data_received(data)
                elif has_ended and not self.silent and not self._wire.is_switched:
                    self._wire.feed(b"")
                    self._advance()
                while self._advancing:
                    self._go_on()
                if not data:
                    return

    def _on_closed_by_peer(self) -> None:
        """Note whether its end of stream was sent before anything of our request had arrived.

        Such an end confirms nothing of it, and what comes behind it is not read (RFC 9112 9.6).  An end by RST tells
        nothing: the kernel sends it for a program that has read a part and closes, too, and does not confirm that part.
        """
        if self.silent:
            with suppress(OSError, ValueError):  # the socket is closed: uvloop's TLS tells us only then
                self.untouched = 0 < tcp_progress(self._socket)[1] <= self._confirmed_bytes

    # One exchange.

    @property
    def has_begun_to_stream(self) -> bool:
        """Whether pieces of the request's body may have been taken from where they come from."""
        return self._sender is not None

    async def exchange(
        self, method: str, url: Url, headers: Headers, body: SentBody, length: int | None, deadline_s: float | None
    ) -> ClientResponse:
        """Send a request and wait for the response's head; see `Client.request`."""
        self._url, self.silent, self._puts_count = url, True, 0
        if self._ended or self._transport.is_closing():  # since it was made: what is told from now on is not of this
            self.untouched = True
            self.abort()
            raise PeerGone(CUT_SHORT)
        head: asyncio.Future[ClientResponse] = self._loop.create_future()
        self._head = head
        self._body = None
        self._alarm.set(deadline_s)
        try:
            self._start(method, url, headers, body, length)
            return await head
        except BaseException:
            if self._head is head:  # else it is over, and the connection may carry another request
                self.abort()
            raise

    def _start(self, method: str, url: Url, headers: Headers, body: SentBody, length: int | None) -> None:
        has_host = headers and headers[0][0].lower() == b"host"
        fields = [*headers] if has_host else [(b"Host", url.authority.encode()), *headers]
        if isinstance(body, Upgrade):
            self._wire.ask_for(body.protocols)
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", body.protocols)]
            self._put(self._wire.build_head(method.encode(), url.target.encode(), fields) + self._wire.end())
            return
        known = len(body) if isinstance(body, bytes) else length
        if known is None or known > MAX_HEAD_BYTES:
            self._stalls_expected = True  # a function may begin to read it whenever it likes
            expect_stalls(self._socket, True)
        told = None if known == 0 and method in ("GET", "HEAD", "DELETE", "OPTIONS") else known
        if isinstance(body, bytes):
            self._put(self._wire.build_whole(method.encode(), url.target.encode(), fields, body, told))
            return
        if known is None:
            fields.append((b"Transfer-Encoding", b"chunked"))
        elif told is not None:
            fields.append((b"Content-Length", b"%d" % told))
        self._put(self._wire.build_head(method.encode(), url.target.encode(), fields))
        self._sender = self._loop.create_task(self._send_body(body))

    def send_switched(self, body: Body, stall_s: float) -> asyncio.Task[None]:
        """After a 101: see `ClientResponse.send`."""
        expect_stalls(self._socket, True)
        self._sender = self._loop.create_task(self._send_switched(body, stall_s))
        self._sender.add_done_callback(lambda sender: self.abort() if sender.cancelled() else None)
        return self._sender

    async def _send_switched(self, body: Body, stall_s: float) -> None:
        try:
            async for data in body:
                await self._write_within(data, stall_s)
        except PeerGone:
            self._fail(PeerGone("the other side closed the switched connection or took too long to read"))
            self.abort()
            return
        if self._ended or not self._transport.can_write_eof():
            self._transport.close()
        else:
            self._transport.write_eof()

    async def _send_body(self, body: AsyncIterator[bytes] | Callable[[], Stream]) -> None:
        if callable(body):
            async with aclosing(body()) as opened:
                return await self._send_body(aiter(opened))
        try:
            async for chunk in body:
                await self._write(self._wire.build_chunk(chunk))
            await self._write(self._wire.end())
        except FaashoundError as error:
            if not (isinstance(error, PeerGone) and self._transport.is_closing()):
                self._fail(error)  # else `connection_lost` tells, when it has looked whether there is an answer
            self.abort()
        except h11.LocalProtocolError as error:
            # The body is longer or shorter than announced: the upstream must not take it for whole.
            self._fail(BadRequest(f"body does not match its announced length: {error}"))
            self.abort()

    def _put(self, data: bytes) -> None:
        self._sent_bytes += len(data)
        self._puts_count += 1
        super()._put(data)

    def _advance(self) -> None:
        """Take what the wire has, up to EVENTS_AT_ONCE_COUNT; then others are served before the rest."""
        pieces: list[bytes] = []
        sign: WireEvent | None = None
        error: PeerGone | None = None
        try:
            for _ in range(EVENTS_AT_ONCE_COUNT):
                event = self._wire.next_event()
                if isinstance(event, bytes):
                    pieces.append(event)
                elif isinstance(event, WireEvent):
                    sign = event
                    break
                else:
                    self._on_head(*event)
        except PeerGone as caught:
            error = caught
        if pieces:
            cast(Body, self._body).feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if error is not None:
            self._fail(error)
            self.abort()
        elif sign is WireEvent.END:
            self._complete()
        else:
            self._throttle(is_rest=sign is None)

    def _throttle(self, is_rest: bool) -> None:
        if is_rest:
            self._advance_later()
        else:
            confirm_at_once(self._socket)
        if (is_rest or self._is_full) and self._transport.is_reading():
            self._transport.pause_reading()
        elif not (is_rest or self._is_full):
            self._on_drained()

    @property
    def _is_full(self) -> bool:
        return self._body is not None and self._body.buffered_bytes >= BUFFERED_BYTES

    def _go_on(self) -> None:
        """Take the rest, unless that was done when the connection ended."""
        if self._advancing:
            self._advancing = False
            self._advance()

    def _on_head(self, status: int, headers: Headers) -> None:
        if status == 101:
            self._alarm.set(None)
        length = first_values(headers).get(b"content-length") if status != 101 else None
        self._body = Body(None if length is None else int(length), self._on_drained, self.abort)
        if self._head is not None and not self._head.done():
            self._head.set_result(ClientResponse(status, headers, self._body, self))

    def _on_drained(self) -> None:
        if not (self._advancing or self._ended or self._transport.is_reading() or self._transport.is_closing()):
            self._transport.resume_reading()

    def _complete(self) -> None:
        self._alarm.set(None)
        cast(Body, self._body).finish()
        if self._wire.is_switched:
            if self._sender is not None and self._sender.done():
                self._transport.close()
            return
        if self._sender is not None and not self._sender.done():
            self._sender.cancel()
        self._sender = self._head = None
        if not self._ended and self._wire.next_cycle() and not self._transport.is_closing():
            self._alarm.set(self._loop.time() + self._client.kept_s)
            self._client.keep(self, cast(Url, self._url))
            self._on_drained()
        elif self._transport.get_write_buffer_size():  # it would first wait until what is left of the request is taken
            self.abort()
        else:
            self._transport.close()

    def _fail(self, error: FaashoundError) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_exception(error)
        elif self._body is not None:
            self._body.fail(error)

    def _on_alarm(self) -> None:
        self._fail(UpstreamTimeout("no complete response before the deadline"))
        self.abort()

    # Between two exchanges, and the end.

    def usable(self, once: bool) -> bool:
        """Tell whether this idle connection can carry another request; it is no longer idle.

        It may have been closed already by an end of stream that we have not read.  That is looked for only if
        `once`, since what can be sent again then need not know it before: the end confirms nothing of the request.
        """
        self._alarm.set(None)
        if self._transport.is_closing():
            return False
        if self._stalls_expected:
            self._stalls_expected = False
            expect_stalls(self._socket, False)
        self._confirmed_bytes = self._sent_bytes
        if once or not self._is_counted or self._socket.family is socket.AF_UNIX:
            is_established, confirmed_bytes = tcp_progress(self._socket)
            if self._socket.family is not socket.AF_UNIX:
                self._confirmed_bytes = confirmed_bytes
            if not is_established:
                self.abort()
            return is_established
        return True

    def abort(self) -> None:
        """Cut the connection now."""
        self._alarm.stop_handle()
        if self._wire.is_switched:
            self._reset_on_close()
        if self._sender is not None:
            self._sender.cancel()
        self._transport.abort()


def sent_body(request: Request) -> SentBody:
    """Return what a proxy sends as the body of a request that it passes on: the wish to switch, if it has that."""
    protocols = upgrade_of(request)
    return body_if_complete(request.body) if protocols is None else Upgrade(protocols)


def relayed(response: ClientResponse, headers: Headers, body: Stream, idle_s: float) -> Response:
    """Return an answer as it is passed on while it comes, with `headers`; of a 101 both directions; see `Switch`."""
    if response.status != 101:
        return Response(response.status, headers, body, response.body.length, is_live=True)
    fields = [*headers, (b"Upgrade", b", ".join(tokens_of(response.headers, b"upgrade")))]
    return Response(101, fields, body, switch=Switch(response.send, idle_s))


# ---------------------------------------------------------------------------------------------------------------
# Process rules (pure): the environment of a process, the words for its end, the states of a call.
# ---------------------------------------------------------------------------------------------------------------

MARK = b"FAASHOUND_CALL"  # in the environment of everything that a call starts; see "Process driver"

# A request header must not pose as one of our own variables, nor reach what reads HTTP_PROXY (httpoxy): these are
# never exported under their own names.  Compared without case: some programs fold the names of variables.
_RESERVED_FIELDS = frozenset(
    (b"method", b"path", b"query", b"host", b"contentlength", b"content-length", b"transfer-encoding", b"proxy")
)


@lru_cache(maxsize=1024)
def canonical_name(name: bytes) -> bytes:
    """Return a field's name in Go's canonical case: `x-3abc-id` is `X-3abc-Id`."""
    return b"-".join(part[:1].upper() + part[1:].lower() for part in name.split(b"-"))


@lru_cache(maxsize=1024)
def cgi_name(name: bytes) -> bytes | None:
    """Return `Http_<Name>` for a lower-case field name in Go's canonical case, None if it must not be exported."""
    if name in _RESERVED_FIELDS or b"_" in name:  # an underscore would shadow the twin with a dash
        return None
    return b"Http_" + canonical_name(name).replace(b"-", b"_")


def cgi_environment(request: Request) -> dict[bytes, bytes]:
    """Return the variables that tell a process about its request."""
    facts: dict[bytes, bytes] = {}
    for name, value in request.headers:
        variable = cgi_name(name)
        if variable is not None and variable not in facts:
            facts[variable] = value
    length = b"%d" % (-1 if request.body.length is None else request.body.length)
    facts[b"Http_Method"] = request.method.encode()
    facts[b"Http_ContentLength"] = facts[b"Http_Content_Length"] = length
    if request.body.length is None:
        facts[b"Http_Transfer_Encoding"] = b"chunked"
    if request.query:
        facts[b"Http_Query"] = request.query
    facts[b"Http_Path"] = request.decoded_path()
    if request.host:
        facts[b"Http_Host"] = request.host
    return facts


async def limited(body: AsyncIterator[bytes], limit_bytes: int) -> AsyncIterator[bytes]:
    """Yield `body`; BodyTooLarge beyond the limit."""
    total = 0
    async for chunk in body:
        total += len(chunk)
        if total > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        yield chunk


async def marshalled(headers: Headers, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield `{"header":{"Name":["v"]},"body":{"raw":"<base64>"}}` of a request, in constant memory."""
    header: dict[str, list[str]] = {}
    for name, value in headers:
        if name not in (b"host", b"transfer-encoding", b"trailer"):  # which Go has elsewhere
            header.setdefault(canonical_name(name).decode(), []).append(value.decode(errors="replace"))
    yield f'{{"header":{json.dumps(header)},"body":{{"raw":"'.encode()
    rest = b""
    async for chunk in body:
        data = rest + chunk
        whole = len(data) - len(data) % 3  # base64 in pieces is base64 of the whole only at multiples of three
        rest = data[whole:]
        yield base64.b64encode(data[:whole])
    yield base64.b64encode(rest) + b'"}}'


class BadOutputHead(FaashoundError):
    """With cgi_response: an output that does not begin with header fields and an empty line; the text says why."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the function's output has no valid head (cgi_response): {problem}")


class OutputHead(NamedTuple):
    """What an output begins with: `size` bytes up to its body, which mean a status and fields."""

    size: int
    status: int
    headers: list[Header]


_STATUS_VALUE = re.compile(rb"([2-5][0-9]{2})(?: .*)?")


def parse_output_head(data: bytes) -> OutputHead | None:
    """Return the head of a CGI response (RFC 3875 6.2, 6.3), lines with LF or CRLF; None if `data` has not all of it.

    `Location` without a status is a redirect by the client (302).  Fields of this hop and Content-Length are left out:
    framing is ours, whatever the function says.  Raises BadOutputHead.
    """
    headers: list[Header] = []
    at = 0
    while (end := data.find(b"\n", at, MAX_HEAD_BYTES)) >= 0:
        line = data[at:end].removesuffix(b"\r")
        at = end + 1
        if not line:
            return _output_head(at, headers)
        name, colon, value = line.partition(b":")
        value = value.strip(b" \t")
        if not colon or not _FIELD_NAME.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise BadOutputHead(f"line {len(headers) + 1} is no header field")
        headers.append((name, value))
        if len(headers) > MAX_FIELDS_COUNT:
            raise BadOutputHead(f"too many header fields; allowed: {MAX_FIELDS_COUNT}")
    if len(data) >= MAX_HEAD_BYTES:
        raise BadOutputHead(f"no empty line within {MAX_HEAD_BYTES} bytes")
    return None


def _output_head(size: int, headers: list[Header]) -> OutputHead:
    if not headers:
        raise BadOutputHead("it begins with an empty line")
    names = [name.lower() for name, _ in headers]
    statuses = [value for name, value in zip(names, (value for _, value in headers), strict=True) if name == b"status"]
    if len(statuses) > 1:
        raise BadOutputHead("more than one Status")
    found = _STATUS_VALUE.fullmatch(statuses[0]) if statuses else None
    if statuses and found is None:
        raise BadOutputHead("its Status is none from 200 to 599")
    default = 302 if b"location" in names else 200
    return OutputHead(size, int(found[1]) if found else default, end_to_end(headers, b"status", b"date"))


# Go's words where they are not strsignal's in lower case.
_SIGNAL_TEXTS: dict[int, str] = {
    signal.SIGXCPU: "CPU time limit exceeded",
    signal.SIGIO: "I/O possible",
}


def describe_exit(status: int) -> str:
    """Return the end of a process in Go's words for a wait status: `exit status 3`, `signal: killed`."""
    if os.WIFEXITED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    words = signal.strsignal(number) if number < 32 else None  # Go has none for those of real time
    text = _SIGNAL_TEXTS.get(number) or (words or f"signal {number}").lower()
    return f"signal: {text}" + (" (core dumped)" if os.WCOREDUMP(status) else "")


def next_restart_s(delay_s: float | None, lived_s: float, status: int) -> float:
    """Return the seconds to wait before the next start of a process of ours that has ended.

    `delay_s` is the wait before this life (None for the first), `lived_s` its length, `status` its exit status, or
    minus the number of the signal that ended it.
    """
    if status == BAD_SETTINGS_STATUS:
        return LONGEST_RESTART_S
    if delay_s is None or lived_s >= PROVEN_AFTER_S:
        return FIRST_RESTART_S
    return min(2 * delay_s, LONGEST_RESTART_S)


class ProcessState(IdentityEnum):
    """Where a call stands.  Its answer is decided on reaching DONE or KILLED."""

    RUNNING = "the process runs, its output is open"
    CLOSED = "the process runs, its output is closed"
    EXITED = "the process has exited, a descendant holds its output"
    DONE = "the process has exited and its output is read"
    KILLED = "deadline, hang-up or refusal: the tree is being killed"


class ProcessEvent(IdentityEnum):
    """What happens to a call."""

    EXIT = "the process has exited"
    EOF = "its output is at its end"
    GRACE = "a descendant has held the output for OUTPUT_GRACE_S"
    DEADLINE = "exec_timeout or X-Timeout has come"
    ABANDON = "the client has gone, or its answer is known already"


# A process that has exited has done its work in time, so nothing that comes later takes its answer away.
TRANSITIONS = {
    (ProcessState.RUNNING, ProcessEvent.EOF): ProcessState.CLOSED,
    (ProcessState.RUNNING, ProcessEvent.EXIT): ProcessState.EXITED,
    (ProcessState.RUNNING, ProcessEvent.DEADLINE): ProcessState.KILLED,
    (ProcessState.RUNNING, ProcessEvent.ABANDON): ProcessState.KILLED,
    (ProcessState.CLOSED, ProcessEvent.EXIT): ProcessState.DONE,
    (ProcessState.CLOSED, ProcessEvent.DEADLINE): ProcessState.KILLED,
    (ProcessState.CLOSED, ProcessEvent.ABANDON): ProcessState.KILLED,
    (ProcessState.EXITED, ProcessEvent.EOF): ProcessState.DONE,
    (ProcessState.EXITED, ProcessEvent.GRACE): ProcessState.DONE,
    (ProcessState.EXITED, ProcessEvent.DEADLINE): ProcessState.DONE,
    (ProcessState.EXITED, ProcessEvent.ABANDON): ProcessState.DONE,
    (ProcessState.DONE, ProcessEvent.ABANDON): ProcessState.DONE,
    (ProcessState.KILLED, ProcessEvent.EXIT): ProcessState.KILLED,
    (ProcessState.KILLED, ProcessEvent.EOF): ProcessState.KILLED,
    (ProcessState.KILLED, ProcessEvent.ABANDON): ProcessState.KILLED,
}


def next_state(state: ProcessState, event: ProcessEvent) -> ProcessState:
    """Return the state after `event`; AssertionError for a pair that cannot happen."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise AssertionError(f"{event} cannot happen in {state}: the driver must not report it") from None


class StartFailed(FaashoundError):
    """The process could not be started; the text says why."""


class ProcessFailed(FaashoundError):
    """The process ended badly after its answer had begun; the text says how."""


class OutputLost(FaashoundError):
    """The disk did not take what the process wrote, or what it is to be sent."""


class FactsTooLarge(FaashoundError):
    """The request's facts do not fit into a process's environment (execve's limit), but would be fine without."""

    status = 431
    text = "request headers too large for the environment of a process; allowed: what execve takes"


class DeadlineReached(FaashoundError):
    """The process was still running at its deadline and has been killed (the text is OpenFaaS's)."""

    status = 408
    text = "Killed process."


# ---------------------------------------------------------------------------------------------------------------
# Process driver: spawn, pump, signal the tree, reap.  It knows nothing of HTTP.
#
# Each process leads a session of its own, carries the call's mark in its environment, and is our child.  We are the
# subreaper (prctl(2)) of all that descends from it: whatever loses its parent becomes our child, however it was
# daemonised.  So everything a call started is either below its root or a direct child of ours, and killing
# goes by levels: SIGKILL to the root's process group, then to every adopted orphan of that call, whose children are
# thereby adopted and found in the next sweep, until two sweeps find nothing.
# What forks faster than that (each killed process makes room for another) is stopped first, all of it, and then killed.
# The mark of an orphan, or its session, tells to which call it belongs.  One that wiped its environment and left its
# session can belong to any call that ran when it started: once all of those have ended, it is killed.  An orphan that
# started while no call ran is a foreign child (an entrypoint's sidecar, a `docker exec`): it is reaped, else ignored.
# The reaper sees and reaps all exits, on SIGCHLD, because orphans have to be reaped in any case; the sweeper kills.  A
# root is reaped after its group was killed: until then no other process can have its number.
# What survives SIGKILL of the watchdog itself is killed, by the mark, by the guard (see "Lifecycle").
# ---------------------------------------------------------------------------------------------------------------

_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # a program expects them at their defaults


def signals_at_default() -> tuple[int, ...]:
    """Return the signals that a function's process begins with at their default: all but what we were told to ignore.

    Handlers would end with exec by themselves; but in the child, for which we stand still, glibc 2.36 makes one system
    call for each signal that posix_spawn is told of, and two for each other.
    """
    numbers = signal.valid_signals()
    return tuple(n for n in numbers if n in _IGNORED_BY_PYTHON or signal.getsignal(n) is not signal.SIG_IGN)


def become_subreaper() -> None:
    """Make every descendant that loses its parent a child of this process (prctl(2), Linux 3.4)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def drop_ambient_capabilities() -> None:
    """Let no right of ours pass to what we execute as another user (capabilities(7), Linux 4.3)."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def find_program(name: str, path: str | None) -> str:
    """Return what execve is to be given for `name`; StartFailed in Go's words when PATH does not have it."""
    if "/" in name:
        return name
    found = shutil.which(name, path=path)
    if found is None:
        raise StartFailed(f'exec: "{name}": executable file not found in $PATH')
    return found


class ProcessResult(NamedTuple):
    """How a call ended: `status` is the wait status of its process, `output` what it wrote (and `stderr` if joined)."""

    status: int
    output: Output
    duration_s: float


class Output:
    """What a process wrote: in memory up to SPILL_BYTES, then in an unlinked temporary file.

    Obligation: `close`, or close `file`, which is not None once the output is in one.
    """

    def __init__(self) -> None:
        self.bytes_count = 0
        self.file: io.FileIO | None = None
        self._parts: list[bytes] = []

    def append(self, data: bytes) -> None:
        """Keep `data` in memory; or in the file once there is one, which blocks on the disk."""
        if self.file is None:
            self._parts.append(data)
        else:
            self._write(data)
        self.bytes_count += len(data)

    def spill(self) -> None:
        """Move what is in memory to a file; blocks on the disk."""
        import tempfile  # only here: many functions never write so much, and it loads a dozen modules

        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `close`
        self._write(b"".join(self._parts))
        self._parts.clear()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[cast(io.FileIO, self.file).write(view) :]

    def splice(self, pipe_fd: int) -> bool:
        """Move what comes out of a non-blocking pipe to the file; False at its end, BlockingIOError once it is empty.

        Returns True after FILE_HOP_BYTES, as the writer may never stop.  While much comes, it waits for more in
        this thread, for each PIPE_BYTES up to SPILL_WAIT_S: to wait in the loop costs two changes of threads.  Read
        and write are no slower here than splice(2), which not every file system has.
        """
        moved_bytes = waits_count = 0
        while moved_bytes < FILE_HOP_BYTES:
            try:
                data = os.read(pipe_fd, FILE_CHUNK_BYTES)
            except BlockingIOError:
                waits_count += 1
                if moved_bytes < waits_count * PIPE_BYTES or not _is_ready(pipe_fd, select.POLLIN, SPILL_WAIT_S):
                    raise
                continue
            if not data:
                return False
            self._write(data)
            moved_bytes += len(data)
            self.bytes_count += len(data)
        return True

    def head(self, size: int = SNIFF_BYTES, offset: int = 0) -> bytes:
        """Return the first `size` bytes after `offset`."""
        if self.file is not None:
            return os.pread(self.file.fileno(), size, offset)
        return self.in_memory()[offset : offset + size]

    def in_memory(self) -> bytes:
        """Return the whole output; only when it has not spilled."""
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0] if self._parts else b""

    def close(self) -> None:
        """Give the memory and the file back."""
        self._parts.clear()
        if self.file is not None:
            self.file.close()


class RootTable:
    """The numbers of the roots that have not been reaped, in memory shared with processes forked from this one.

    They are for the guard or the supervisor, which survive us; writing to it costs no system call.
    """

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 4 * ROOTS_COUNT)).cast("i")
        self._free = list(range(ROOTS_COUNT - 1, -1, -1))
        self._slots: dict[int, int] = {}

    def add(self, pid: int) -> None:
        """Note a root; more than ROOTS_COUNT at once are not noted."""
        if self._free:
            self._slots[pid] = self._free.pop()
            self._numbers[self._slots[pid]] = pid

    def remove(self, pid: int) -> None:
        """The root is about to be reaped."""
        slot = self._slots.pop(pid, None)
        if slot is not None:
            self._numbers[slot] = 0
            self._free.append(slot)

    def clear(self) -> None:
        """Forget all; for a copy that has noted nothing itself, when the process that did is gone."""
        self._numbers[:] = memoryview(bytes(4 * ROOTS_COUNT)).cast("i")

    def pids(self) -> frozenset[int]:
        """Return what is noted."""
        return frozenset(self._numbers) - {0}

    def is_empty(self) -> bool:
        """Tell whether nothing is noted."""
        return not any(self._numbers)


_SFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK  # SFD_CLOEXEC and SFD_NONBLOCK are the same numbers (signalfd(2))
_SIGINFO_BYTES = 128


def open_signalfd(*numbers: signal.Signals) -> int:
    """Block signals in this thread, and return a descriptor that can be read when one is pending (signalfd(2))."""
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)  # our parent may have ignored SIGCHLD: then nothing is reaped
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    mask = (ctypes.c_ulong * 16)(sum(1 << (number - 1) for number in numbers))
    fd: int = ctypes.CDLL(None, use_errno=True).signalfd(-1, ctypes.byref(mask), _SFD_FLAGS)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return fd


class Reaper:
    """The one place where the children of this process are known, and reaped.

    Children are roots, which calls have started; orphans, which we have adopted; and foreign ones, which are ignored.
    `on_reaped` is called after each look for exits; `is_reaping` is true during it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, table: RootTable) -> None:
        become_subreaper()
        self.loop = loop
        self.roots: dict[int, Root] = {}  # not reaped yet, by process number
        self.is_reaping = False
        self.on_reaped: Callable[[], None] = lambda: None
        self._table = table
        self._orphans: dict[int, Orphan] = {}  # what is known of those that are not reaped yet
        self._foreign: dict[int, Callable[[], None] | None] = {}
        self._children_fd = os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY | os.O_CLOEXEC)
        for pid, _ in self.orphans():  # what was there before us, an entrypoint's sidecar
            self.ignore(pid)
        self.ready = EpollSet(loop)
        self._signal_fd = open_signalfd(signal.SIGCHLD)
        self.ready.add_first(self._signal_fd, self._on_sigchld)

    def add(self, process: Root) -> None:
        """Watch a root: its `on_exiting` and `on_exit` are called just before and after it is reaped."""
        self.roots[process.pid] = process
        self._table.add(process.pid)

    def ignore(self, pid: int, on_exit: Callable[[], None] | None = None) -> None:
        """A child of ours is foreign; `on_exit` is called when it has been reaped."""
        self._foreign[pid] = on_exit

    def _on_sigchld(self) -> None:
        with suppress(BlockingIOError):  # taken back meanwhile, see `Spawner`
            os.read(self._signal_fd, _SIGINFO_BYTES)
        self.reap()

    def reap(self) -> None:
        """Reap all children that have exited."""
        self.is_reaping = True
        try:
            with suppress(ChildProcessError):
                while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                    self._reap_child(found.si_pid)
        finally:
            self.is_reaping = False
        self.on_reaped()

    def _reap_child(self, pid: int) -> None:
        process = self.roots.get(pid)
        if process is not None:
            process.on_exiting()
            self._table.remove(pid)
        _, status = os.waitpid(pid, 0)
        if process is not None:
            del self.roots[pid]
            process.on_exit(status)
            return
        self._orphans.pop(pid, None)
        if on_exit := self._foreign.pop(pid, None):
            on_exit()

    def signal_group(self, process: Root, number: signal.Signals) -> None:
        """Signal a root and its process group, while its number is still its own."""
        if process.pid in self.roots:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    def orphans(self) -> list[tuple[int, Orphan]]:
        """Return the children that we have adopted (the `children` file of proc(5); sweeps are repeated)."""
        children = b""
        while piece := os.pread(self._children_fd, CHILDREN_BYTES, len(children)):  # of a page at most, whatever fits
            children += piece
        known = self.roots.keys() | self._foreign.keys()
        pids = [pid for pid in map(int, children.split()) if pid not in known]
        return [(pid, self._orphans.setdefault(pid, Orphan())) for pid in pids]

    def close(self) -> None:
        """Stop watching; no child may be left."""
        self.ready.close()
        os.close(self._signal_fd)
        os.close(self._children_fd)


@dataclass(slots=True)
class Orphan:
    """What is known of an adopted child until it is reaped; its number is its own for so long."""

    mark: bytes | None = None
    killed: bool = False


class Owner(Enum):
    """Which calls an orphan belongs to."""

    RUNNING = "a call that runs, for certain or perhaps; or it has just gone"
    ENDED = "calls that have ended"
    NONE = "no call: it is a foreign child"


class CallTable:
    """Which calls run, and so which orphans belong to one; pure but for two looks at an orphan."""

    def __init__(self) -> None:
        self._calls: dict[bytes, Root] = {}  # not ended yet, by mark
        self._ended_sessions: OrderedDict[int, None] = OrderedDict()
        self._begun_count = 0
        self._busy_since_s = math.inf  # since boot: when the first of the present calls was started

    def add(self, process: Root) -> None:
        """A root has been started."""
        self._calls[process.mark] = process
        self._ended_sessions.pop(process.pid, None)

    def begin(self, process: Root, was_idle: bool) -> None:
        """A root has got its request: from now on what it starts is a call's.  `was_idle`: nothing is being killed."""
        if was_idle and not self._begun_count:
            self._busy_since_s = process.started_s
        process.begun = True
        self._begun_count += 1

    def end(self, process: Root) -> None:
        """A call has ended, if it has not already."""
        if self._calls.pop(process.mark, None) is None:
            return
        self._begun_count -= process.begun
        self._ended_sessions[process.pid] = None
        if len(self._ended_sessions) > SESSIONS_COUNT:
            self._ended_sessions.popitem(last=False)

    def owner_of(self, pid: int, mark: bytes | None) -> Owner:
        """Return to what the orphan `pid` belongs."""
        if mark is not None:
            return Owner.RUNNING if mark in self._calls else Owner.ENDED
        try:
            session, started_s = os.getsid(pid), _read_start(pid)
        except ProcessLookupError:
            return Owner.RUNNING  # the next reaping takes it
        if session in self._ended_sessions:  # no other session can have its number while a process is in it
            return Owner.ENDED
        if started_s < self._busy_since_s:
            return Owner.NONE
        processes = self._calls.values()
        is_running = any(each.pid == session or (each.begun and each.started_s <= started_s) for each in processes)
        return Owner.RUNNING if is_running else Owner.ENDED


@dataclass(slots=True)
class Dying:
    """A call whose tree is being killed."""

    process: Root
    gone: asyncio.Future[None]
    limit_s: float = math.inf
    clean_count: int = 0


class Sweeper:
    """Kills what calls leave behind, and the trees of those that are cut short; the reaper then reaps it."""

    def __init__(self, reaper: Reaper) -> None:
        self.reaper = reaper
        self._loop = reaper.loop
        self._calls = CallTable()
        self._dying: list[Dying] = []
        self._asking: dict[asyncio.Task[None], Dying] = {}  # what has had SIGTERM, and time to end by itself
        self._sweeping: asyncio.Task[None] | None = None
        self._clean_count = 0
        self._is_due = False
        reaper.on_reaped = self._sweep_if_due

    def add(self, process: Root) -> None:
        """A root has been started."""
        self.reaper.add(process)
        self._calls.add(process)

    def begin(self, process: Root) -> None:
        """A root has got its request."""
        self._calls.begin(process, was_idle=self._sweeping is None)

    def release(self, process: Process) -> None:
        """The call has its answer: kill what its process has left behind, in one sweep for all that were reaped."""
        self._calls.end(process)
        self._is_due = True
        if not self.reaper.is_reaping:
            self._sweep_if_due()

    def _sweep_if_due(self) -> None:
        if self._is_due:
            self._is_due = False
            if self._sweep():
                self._start_sweeping()

    def kill(self, process: Root, term_grace_s: float) -> asyncio.Future[None]:
        """Kill a call's whole tree; the future is done when nothing of it is left."""
        dying = Dying(process, self._loop.create_future())
        if term_grace_s:
            task = self._loop.create_task(self._terminate_first(dying, term_grace_s))
            self._asking[task] = dying
            task.add_done_callback(self._asking.pop)
        else:
            self._kill_now(dying)
        return dying.gone

    async def _terminate_first(self, dying: Dying, term_grace_s: float) -> None:
        """Send SIGTERM to all of a call, once each; kill it when it has had the time to end that it was granted."""
        try:
            await self._terminate(dying.process, term_grace_s)
        except OSError as error:  # out of descriptors: what is left cannot be known
            log.error(f"a call is killed without a SIGTERM: {reason_of(error)}", pid=dying.process.pid)
        self._kill_now(dying)

    async def _terminate(self, process: Root, term_grace_s: float) -> None:
        until_s = time.monotonic() + term_grace_s
        adopted = [pid for pid, _ in self.reaper.orphans() if _read_mark(pid) == process.mark]
        family = [each for each in map(read_relative, adopted) if each is not None]
        with suppress(RuntimeError):  # no thread to be had: then SIGKILL has to do for what has left the group
            family += await self._loop.run_in_executor(None, read_descendants, [process.pid, *adopted])
        self.reaper.signal_group(process, signal.SIGTERM)  # not before: what exits leaves its children to us
        for each in family:
            with suppress(ProcessLookupError):
                if os.getpgid(each.pid) != process.pid:
                    each.signal(signal.SIGTERM)
        pause_s = SWEEP_PAUSE_S
        while time.monotonic() < until_s and (not process.exited.done() or any(each.is_alive() for each in family)):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_SWEEP_PAUSE_S)

    def _kill_now(self, dying: Dying) -> None:
        self._calls.end(dying.process)
        self.reaper.signal_group(dying.process, signal.SIGKILL)
        dying.limit_s = time.monotonic() + SWEEP_LIMIT_S
        self._dying.append(dying)
        self._start_sweeping()

    def _start_sweeping(self) -> None:
        self._clean_count = 0
        if self._sweeping is None:
            self._sweeping = self._loop.create_task(self._sweep_out())

    async def _sweep_out(self) -> None:
        """Sweep until two sweeps in a row were clean and no tree is dying any more: one task for all calls."""
        pause_s, found_count = SWEEP_PAUSE_S, 0
        try:
            while self._dying or self._clean_count < 2:
                await asyncio.sleep(pause_s)
                present = self._sweep()
                found_count = found_count + 1 if present else 0
                if found_count >= FREEZE_AFTER_COUNT:
                    found_count = 0
                    await self._freeze()
                for dying in self._dying:
                    self._look_after(dying, present)
                self._dying = [dying for dying in self._dying if not dying.gone.done()]
                self._clean_count = 0 if present else self._clean_count + 1
                pause_s = SWEEP_PAUSE_S if present else min(pause_s * 2, LONGEST_SWEEP_PAUSE_S)
        finally:
            self._sweeping = None  # also after a failure: then the next call's end begins anew

    def _look_after(self, dying: Dying, present: set[bytes | None]) -> None:
        """Note whether anything is left of a dying call: twice in a row nothing is nothing."""
        if dying.process.pid in self.reaper.roots or None in present or dying.process.mark in present:
            dying.clean_count = 0
        else:
            dying.clean_count += 1
        if dying.clean_count == 2:
            dying.gone.set_result(None)
        elif not dying.clean_count and time.monotonic() > dying.limit_s:
            adopted = [pid for pid, _ in self.reaper.orphans()]
            log.error("processes are left that SIGKILL does not end", pid=dying.process.pid, adopted=adopted)
            dying.gone.set_result(None)

    def _sweep(self) -> set[bytes | None]:
        """Kill every orphan of ended calls; return the marks of those that were there, None for one without."""
        present = set()
        for pid, orphan in self._orphans_to_kill():
            if not orphan.killed:
                orphan.killed = True
                if not _kill_orphan(pid):  # to go on would keep us busy, and a stop waiting, while it runs
                    log.error("a process is left that runs as a user whom we may not signal", pid=pid)
                    self.reaper.ignore(pid)
                    continue
            present.add(orphan.mark)
        return present

    def _orphans_to_kill(self) -> Iterator[tuple[int, Orphan]]:
        """Yield every orphan of ended calls."""
        for pid, orphan in self.reaper.orphans():
            if not orphan.killed:
                orphan.mark = orphan.mark or _read_mark(pid)
                owner = self._calls.owner_of(pid, orphan.mark)
                if owner is Owner.NONE:
                    self.reaper.ignore(pid)
                if owner is not Owner.ENDED:
                    continue
            yield pid, orphan

    async def _freeze(self) -> None:
        """Stop all that is to die, until a look finds nothing new, and kill it then.

        What is stopped does not fork, and keeps its place among the processes that a limit allows; what is killed gives
        its place to the next.
        """
        stopped: set[Relative] = set()
        limit_s = time.monotonic() + FREEZE_LIMIT_S
        while time.monotonic() < limit_s:
            roots = [pid for pid, _ in self._orphans_to_kill()]
            for pid in roots:  # at once, they are our children: there is less to read then, and we get a processor
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGSTOP)
            roots += [each.process.pid for each in self._dying if each.process.pid in self.reaper.roots]
            found = set(read_family(roots)) - stopped
            for each in found:
                each.signal(signal.SIGSTOP)
            stopped |= found
            if not found:
                break
            await asyncio.sleep(0)
        for each in stopped:
            each.signal(signal.SIGKILL)

    async def tidied_up(self) -> None:
        """Return when all that had SIGTERM has ended, or had its time."""
        if self._asking:
            await asyncio.wait(self._asking)

    async def end_all(self) -> None:
        """Kill every tree and wait until nothing is left."""
        processes = list(self.reaper.roots.values())
        for process in processes:
            process.abandon()
        for task, dying in self._asking.items():
            if task.cancel():
                self._kill_now(dying)
        gone = [self.kill(process, 0.0) for process in processes]
        self._start_sweeping()
        limit_s = SWEEP_LIMIT_S + FREEZE_LIMIT_S  # what does not die is reported before, and left
        await asyncio.wait([*gone, cast(asyncio.Task[None], self._sweeping)], timeout=limit_s)


def _kill_orphan(pid: int) -> bool:
    """SIGKILL an adopted child, and its group if it leads one; tell whether we may."""
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True


def _read_mark(pid: int) -> bytes | None:
    """Return the mark in the environment of `pid`; None if it has none or we may not look."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:
        return None
    return next((each[len(MARK) + 1 :] for each in variables if each.startswith(MARK + b"=")), None)


def signal_if(pid: int, number: signal.Signals, condition: Callable[[int], bool]) -> None:
    """Signal a process that need not be our child if it meets `condition`, and no other that has got its number since.

    A pidfd means the same process for ever (pidfd_open(2)), so what is found out after it was opened holds for it.
    """
    with suppress(ProcessLookupError, PermissionError):
        pidfd = os.pidfd_open(pid)
        try:
            if condition(pid):
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


class Relative(NamedTuple):
    """A process as a look at /proc has found it; no other has had this number and this start."""

    pid: int
    start: bytes

    def is_alive(self) -> bool:
        """Tell whether it is still there, and no zombie."""
        with suppress(*_UNREADABLE):
            fields = _read_stat(self.pid)
            return fields[19] == self.start and fields[0] not in (b"Z", b"X")
        return False

    def signal(self, number: signal.Signals) -> None:
        """Signal it, if it is still there."""
        signal_if(self.pid, number, lambda _: self.is_alive())


# A process has gone; or it is another user's, and /proc is mounted with hidepid (proc(5); systemd's ProtectProc=).
_UNREADABLE = (ProcessLookupError, FileNotFoundError, PermissionError)


def read_relative(pid: int) -> Relative | None:
    """Return the process that has the number `pid` now; None if there is none, or none that we may read."""
    with suppress(*_UNREADABLE):
        return Relative(pid, _read_stat(pid)[19])
    return None


def read_descendants(pids: Collection[int]) -> list[Relative]:
    """Return what descends from `pids`, whatever session or group it has gone to; some ms for each, for a thread."""
    import psutil  # only here, and in the guard: most calls end by themselves

    found: list[Relative | None] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            try:
                found += [read_relative(each.pid) for each in psutil.Process(pid).children(recursive=True)]
            except psutil.AccessDenied:  # which it raises if there is any process that we may not read
                return [each for each in read_family(pids) if each.pid not in pids]
    return [each for each in found if each is not None]


def read_family(pids: Iterable[int]) -> list[Relative]:
    """Return `pids` and all that descends from them: one look at /proc.

    Beside a fork bomb, where loading psutil takes seconds and there may be no place for a thread.
    """
    found, children = {}, defaultdict(list)
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(*_UNREADABLE):
            fields = _read_stat(pid)
            found[pid] = Relative(pid, fields[19])
            children[int(fields[1])].append(found[pid])
    family = [found[pid] for pid in pids if pid in found]
    for each in family:  # which grows meanwhile
        family += children.pop(each.pid, ())
    return family


_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _read_stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat (proc(5)) after the name, from the state on."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _read_start(pid: int) -> float:
    """Return when `pid` started, in seconds since boot, rounded down to the kernel's ticks; inf if it is hidden."""
    with suppress(PermissionError, FileNotFoundError):  # hidepid=1; hidepid=2
        return int(_read_stat(pid)[19]) / _TICKS_PER_S
    return math.inf


class LineSplitter:
    """Cuts a stream of bytes into lines; a line over MAX_LOG_LINE_BYTES is cut into pieces.

    Lines come out by `emit`, a few at a time, since a flood of short ones would keep the loop from everything else.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.on_line = on_line
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Take bytes."""
        self._buffer += data

    def emit(self, limit_count: int) -> bool:
        """Hand on up to `limit_count` lines; tell whether there are more."""
        start, has_more = 0, True
        for _ in range(limit_count):
            end = self._buffer.find(b"\n", start, start + MAX_LOG_LINE_BYTES + 1)
            if end < 0 and len(self._buffer) - start <= MAX_LOG_LINE_BYTES:
                has_more = False
                break
            stop = start + MAX_LOG_LINE_BYTES if end < 0 else end
            self.on_line(self._buffer[start:stop].decode(errors="backslashreplace"))
            start = stop if end < 0 else end + 1
        self._buffer = self._buffer[start:]
        return has_more

    def finish(self) -> None:
        """Hand on what is left, the line without an end too; of a flood only its beginning."""
        if self.emit(LAST_LINES_COUNT):
            self.on_line(f"({len(self._buffer)} more bytes are left out)")
        elif self._buffer:
            self.on_line(self._buffer.decode(errors="backslashreplace"))
        self._buffer = b""


class Readiness:
    """Has one task wait until a descriptor is ready."""

    def __init__(self, ready: EpollSet, fd: int, events: int) -> None:
        self._ready = ready
        self._fd = fd
        self._events = events
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return once the descriptor is ready, or `wake` is called."""
        self._waiter = asyncio.get_running_loop().create_future()
        self._ready.add(self._fd, self.wake, self._events)
        try:
            await self._waiter
        finally:
            self.stop()

    def wake(self) -> None:
        """End the wait, if there is one."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stop(self) -> None:
        """Watch no more: the descriptor is about to be closed."""
        if self._waiter is not None:
            self._waiter = None
            self._ready.remove(self._fd)


def widen_pipe(fd: int) -> None:
    """Let a pipe hold more, so that its two sides take fewer turns; where the kernel refuses, it stays as it is."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, WIDE_PIPE_BYTES)


class Stdin:
    """Writes a body to a process.  What the pipe does not take at once, or has not come yet, a task writes.

    `on_error` is told why the body cannot be had; the process does not read an end of it then.  Obligation: `close`.
    """

    def __init__(self, ready: EpollSet, fd: int, on_error: Callable[[FaashoundError], None]) -> None:
        self.bytes_count = 0
        self._fd = fd
        self._on_error = on_error
        self._ready = ready
        self._writable: Readiness | None = None  # until the pipe is full for the first time
        self._task: asyncio.Task[None] | None = None

    def feed(self, body: AsyncIterator[bytes]) -> None:
        """Write `body`, and close; one that is there already, as far as the pipe takes it, at once."""
        first = b""
        if isinstance(body, Body) and body.complete:
            first = body.take() or b""
            try:
                first = first[self._write_some(first) :]
            except BrokenPipeError:
                first = b""
            if not first:
                self._close_pipe()
                return
        self._task = asyncio.get_running_loop().create_task(self._feed(first, body))

    async def _feed(self, first: bytes, body: AsyncIterator[bytes]) -> None:
        try:
            await self._write(first)
            async for chunk in body:
                await self._write(chunk)
        except BrokenPipeError:
            pass  # the function does not want the rest; its answer counts all the same
        except FaashoundError as error:
            self._on_error(error)
            return
        self._close_pipe()

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._write_some(view)
            view = view[written:]
            if written:
                continue
            if self._writable is not None:
                await self._writable.wait()
                continue
            self._writable = Readiness(self._ready, self._fd, select.EPOLLOUT)
            await self._writable.wait()
            widen_pipe(self._fd)  # now that the function has shown that it reads

    def _write_some(self, data: bytes | memoryview) -> int:
        try:
            written = os.write(self._fd, data) if data else 0
        except BlockingIOError:
            return 0
        self.bytes_count += written
        return written

    def _close_pipe(self) -> None:
        """Close the writing end: the process reads the end of its input."""
        if self._fd >= 0:
            if self._writable is not None:
                self._writable.stop()
            os.close(self._fd)
            self._fd = -1

    def stop(self) -> None:
        """Write no more, and leave the pipe open: at its end the process would take what it has for the whole body."""
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Write no more, and close the pipe."""
        self.stop()
        self._close_pipe()
        del self._on_error  # which leads back to the process: in a circle they would be kept until it is looked for


class Stdout:
    """Collects what a process writes: into memory, and from SPILL_BYTES on, by a task and a thread, into a file.

    `on_eof` is called at the end of it, `on_lost` when the disk does not take it.  Obligations: `stop`, `close`, and
    `drop` or close the output.
    """

    def __init__(
        self, ready: EpollSet, fd: int, on_eof: Callable[[], None], on_lost: Callable[[OutputLost], None]
    ) -> None:
        self.output = Output()
        self.at_eof = False
        self._ready = ready
        self._fd = fd
        self._on_eof = on_eof
        self._on_lost = on_lost
        self._readable: Readiness | None = None  # while it spills
        self._stopped = self._discarding = self._closed = False
        self._spiller: asyncio.Task[None] | None = None
        ready.add(fd, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, PIPE_BYTES)
        except BlockingIOError:
            return
        if not (data and self._discarding):
            self._collect(data)
        if self.at_eof and not self._stopped:
            self._on_eof()

    def _collect(self, data: bytes) -> None:
        if not data:
            self.at_eof = True
            self._ready.remove(self._fd)
            return
        self.output.append(data)
        if self.output.bytes_count > SPILL_BYTES:
            self._ready.remove(self._fd)
            self._spiller = asyncio.get_running_loop().create_task(self._spill())

    def drain(self) -> None:
        """Take what the pipe holds, and no more: a descendant may go on writing for ever."""
        for _ in range(MAX_PIPE_BYTES // PIPE_BYTES + 1):
            if self.at_eof or self._spiller is not None or self._discarding:
                return
            try:
                self._collect(os.read(self._fd, PIPE_BYTES))
            except BlockingIOError:
                return

    async def _spill(self) -> None:
        """Take over from memory: the rest goes to a file, in a thread, so that no disk stops the loop."""
        loop, self._readable = asyncio.get_running_loop(), Readiness(self._ready, self._fd, select.EPOLLIN)
        try:
            widen_pipe(self._fd)
            await loop.run_in_executor(None, self.output.spill)
            while not (self.at_eof or self._discarding):
                was_stopped = self._stopped
                try:
                    self.at_eof = not await loop.run_in_executor(None, self.output.splice, self._fd)
                except BlockingIOError:
                    if was_stopped:
                        return
                    if not self._stopped:  # else more may have been written between that look and the stop
                        await self._readable.wait()
        except OSError as error:
            self._on_lost(OutputLost(f"the output could not be kept: {_strerror(error)}"))
        except RuntimeError as error:  # no thread to be had
            self._on_lost(OutputLost(f"the output could not be kept: {error}"))
        if self.at_eof and not self._stopped:
            self._on_eof()

    def stop(self, discarding: bool) -> None:
        """Wait for no more output; `discarding`: nor keep what comes until `close`, but let the process write it."""
        self._stopped, self._discarding = True, discarding
        if self._readable is not None:
            self._readable.wake()
        if discarding:
            self._after_spilling(self._read_on)

    def _read_on(self) -> None:
        if not (self.at_eof or self._closed):
            self._ready.remove(self._fd)  # if it is watched
            self._ready.add(self._fd, self._on_readable)

    async def settled(self) -> None:
        """Return when the output changes no more; after `stop`."""
        if self._spiller is not None:
            await asyncio.shield(self._spiller)  # a thread may be at it, which cannot be cancelled

    def _after_spilling(self, action: Callable[[], None]) -> None:
        if self._spiller is None or self._spiller.done():
            action()
        else:
            self._spiller.add_done_callback(lambda _: action())

    def drop(self) -> None:
        """Give back the output, which will not be read, but not while a thread writes to it."""
        self._after_spilling(self.output.close)

    def close(self) -> None:
        """Close the pipe, but not while a thread reads from it."""
        self._after_spilling(self._close)

    def _close(self) -> None:
        self._closed = True
        self._ready.forget(self._fd)
        os.close(self._fd)
        del self._on_eof, self._on_lost  # as in `Stdin.close`: the output would be kept too


class StreamedStdout(Stdout):
    """Hands on what a process writes as it is written, by `body`.  A slow reader of that slows the process.

    Nothing of it is kept but the beginning, for the log.  `on_cut` is called when the tree is killed.
    """

    def __init__(
        self, ready: EpollSet, fd: int, on_eof: Callable[[], None], on_lost: Callable[[OutputLost], None]
    ) -> None:
        super().__init__(ready, fd, on_eof, on_lost)
        self.body = Body(None, self._on_drained)
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # ... or it has ended
        self.on_cut: Callable[[], None] = lambda: None
        self._paused = False

    def _collect(self, data: bytes) -> None:
        if not data:
            super()._collect(data)
            return
        if not self.output.bytes_count:
            self.output.append(data[:SNIFF_BYTES])
            self.output.bytes_count = 0
        self.output.bytes_count += len(data)
        self.body.feed(data)
        self._begin()
        if self.body.buffered_bytes >= BUFFERED_BYTES and not self._paused:
            self._paused = True
            self._ready.remove(self._fd)

    def _begin(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)

    def _on_drained(self) -> None:
        if self._paused and not self.at_eof and not self._stopped:
            self._paused = False
            self._ready.add(self._fd, self._on_readable)

    def stop(self, discarding: bool) -> None:
        """Wait for no more output, and end `body`; `discarding`: cut what reads it."""
        super().stop(discarding)
        self.body.finish()
        self._begin()
        if discarding:
            self.on_cut()

    def _close(self) -> None:
        super()._close()
        del self.body, self.on_cut  # as there: both lead back here


class Stderr:
    """Hands on what a process writes, line by line, to `on_line`.  Obligation: `close`."""

    def __init__(self, ready: EpollSet, fd: int, on_line: Callable[[str], None]) -> None:
        self.lines = LineSplitter(on_line)
        self._ready = ready
        self._fd = fd
        ready.add(fd, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, PIPE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._ready.remove(self._fd)
        elif log.is_full():
            log.drop(data.count(b"\n"))
        else:
            self.lines.feed(data)
            if self.lines.emit(LINES_AT_ONCE_COUNT):
                self._ready.remove(self._fd)
                asyncio.get_running_loop().call_soon(self._emit)

    def _emit(self) -> None:
        """Go on with the lines of one read, and read on when they are out."""
        if self._fd < 0:
            return  # closed meanwhile
        if self.lines.emit(LINES_AT_ONCE_COUNT):
            asyncio.get_running_loop().call_soon(self._emit)
        else:
            self._ready.add(self._fd, self._on_readable)

    def close(self) -> None:
        """Hand on what the pipe holds, and close it."""
        self._ready.remove(self._fd)
        with suppress(BlockingIOError):
            for _ in range(MAX_PIPE_BYTES // PIPE_BYTES):
                self.lines.feed(os.read(self._fd, PIPE_BYTES))
        self.lines.finish()
        os.close(self._fd)
        self._fd = -1


class Root:
    """A process that was started, and by its mark and its session everything that it starts.

    Reaper and sweeper know no more of it than this.
    """

    def __init__(self, sweeper: Sweeper, birth: Birth) -> None:
        self.pid = birth.pid
        self.mark = birth.mark
        self.started_s = birth.started_s
        self.begun = False
        self.exited: asyncio.Future[None] = sweeper.reaper.loop.create_future()
        self._sweeper = sweeper
        self._status = 0
        sweeper.add(self)

    def describe(self) -> str:
        """Return how the process ended, or that it has not yet."""
        return describe_exit(self._status) if self.exited.done() else "not ended yet"

    def on_exiting(self) -> None:
        """Reaper: the process has exited and is not reaped yet."""

    def on_exit(self, status: int) -> None:
        """Reaper: the process has been reaped."""
        self._status = status
        self.exited.set_result(None)

    def abandon(self, error: FaashoundError | None = None) -> None:
        """Sweeper: the tree is about to be killed."""


class ServerProcess(Root):
    """A process that serves many requests, of mode=http: what it prints is the log's.  Obligation: `end`.

    Its input stays open and empty, as some programs take its end for that of their parent.
    """

    def __init__(self, sweeper: Sweeper, birth: Birth, on_stdout: Callable[[str], None]) -> None:
        super().__init__(sweeper, birth)
        sweeper.begin(self)
        ready, pipes = sweeper.reaper.ready, birth.pipes
        self._stdin = pipes.stdin
        self._streams = [Stderr(ready, pipes.stdout, on_stdout)]
        if birth.on_stderr is not None:
            self._streams.append(Stderr(ready, pipes.stderr, birth.on_stderr))

    async def end(self, term_grace_s: float) -> None:
        """End its tree and return when nothing is left of it, if need be by SIGKILL after `term_grace_s`."""
        try:
            await asyncio.shield(self._sweeper.kill(self, term_grace_s))
        finally:
            os.close(self._stdin)
            for stream in self._streams:
                stream.close()


class Process(Root):
    """One process of the function, for one request.

    It decides, by TRANSITIONS, when a call has its answer; its three streams move the bytes, the sweeper kills.
    Made by `Spawner.spawn`; then `begin` and `end`, exactly once, or `discard`: they close what it holds.
    """

    def __init__(self, sweeper: Sweeper, birth: Birth, term_grace_s: float, stdout_kind: type[Stdout]) -> None:
        super().__init__(sweeper, birth)
        self.state = ProcessState.RUNNING
        self._loop = sweeper.reaper.loop
        self._term_grace_s = term_grace_s
        self._clock_s = time.perf_counter()
        self._answerable: asyncio.Future[None] = self._loop.create_future()
        self._error: FaashoundError | None = None
        self._killing: asyncio.Future[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        ready, pipes = sweeper.reaper.ready, birth.pipes
        self.stdin = Stdin(ready, pipes.stdin, self.abandon)
        self.stdout = stdout_kind(ready, pipes.stdout, self._on_eof, self._on_output_lost)
        self.stderr = Stderr(ready, pipes.stderr, birth.on_stderr) if birth.on_stderr is not None else None

    def begin(self, body: AsyncIterator[bytes], deadline_s: float | None) -> None:
        """Feed `body` to the process, and collect its output.  `deadline_s` is monotonic.  Obligation: `end`."""
        self._clock_s = time.perf_counter()
        self._sweeper.begin(self)
        if deadline_s is not None:
            self._timers.append(self._loop.call_at(deadline_s, self._on_deadline))
        self.stdin.feed(body)

    async def end(self, killed_wait_s: float = DEADLINE_WAIT_S) -> ProcessResult:
        """Wait for the end of the process and return it.

        Raises DeadlineReached at the deadline, what `abandon` was given, or what reading the body raises; in each case,
        and when cancelled, the tree is killed, for whose end it waits `killed_wait_s`.  The caller closes the result's
        output.
        """
        try:
            await self._answerable
            await self.stdout.settled()
        except asyncio.CancelledError:
            self.abandon()
            self.stdout.drop()
            await self._killed(HANGUP_WAIT_S)
            raise
        finally:
            self._close()
        if self._error is not None:
            self.stdout.drop()
            await self._killed(killed_wait_s)
            raise self._error
        return ProcessResult(self._status, self.stdout.output, time.perf_counter() - self._clock_s)

    def abandon(self, error: FaashoundError | None = None) -> None:
        """Kill the tree unless the answer is decided already; `end` raises `error`."""
        if self.state in (ProcessState.RUNNING, ProcessState.CLOSED):
            self._error = error
        self._drain_if_exited()
        self._happens(ProcessEvent.ABANDON)

    def discard(self) -> None:
        """End a process that serves no request, instead of `begin` and `end`."""
        self.abandon()
        self.stdout.drop()
        self._close()

    def stderr_to(self, on_line: Callable[[str], None]) -> None:
        """Hand the lines of stderr on to `on_line` from now on."""
        if self.stderr is not None:
            self.stderr.lines.on_line = on_line

    def _on_deadline(self) -> None:
        self._sweeper.reaper.reap()  # an exit that the loop has not seen yet came before the deadline
        if self.state in (ProcessState.RUNNING, ProcessState.CLOSED):
            self._error = DeadlineReached()
        self._drain_if_exited()
        if not self._answerable.done():
            self._happens(ProcessEvent.DEADLINE)

    def _drain_if_exited(self) -> None:
        """Take what a descendant has written meanwhile: an answer that is decided by the exit is to have it."""
        if self.state is ProcessState.EXITED:
            self.stdout.drain()

    def _on_eof(self) -> None:
        self._happens(ProcessEvent.EOF)

    def _on_output_lost(self, error: OutputLost) -> None:
        self.abandon()
        self._error = error  # also if the process has exited: its answer is not whole

    def _on_grace(self) -> None:
        self._drain_if_exited()
        if self.state is ProcessState.EXITED:
            self._happens(ProcessEvent.EOF if self.stdout.at_eof else ProcessEvent.GRACE)

    def _happens(self, event: ProcessEvent) -> None:
        before, self.state = self.state, next_state(self.state, event)
        if self.state is before:
            return
        if self.state is ProcessState.EXITED:
            self._timers.append(self._loop.call_later(OUTPUT_GRACE_S, self._on_grace))
        elif self.state is ProcessState.DONE:
            self._sweeper.release(self)
            self._answer()
        elif self.state is ProcessState.KILLED:
            self._killing = self._sweeper.kill(self, self._term_grace_s)
            self.stdin.stop()
            self._answer()

    def _answer(self) -> None:
        self.stdout.stop(discarding=self.state is ProcessState.KILLED)
        if not self._answerable.done():
            self._answerable.set_result(None)

    async def exit_status(self) -> int:
        """Return the wait status once the answer is decided; raises as `end`."""
        await asyncio.shield(self._answerable)
        if self._error is not None:
            raise self._error
        return self._status

    async def _killed(self, limit_s: float) -> None:
        """Wait for the end of the tree, but not longer than `limit_s`: the sweep goes on by itself."""
        if self._killing is not None:
            await asyncio.wait((self._killing,), timeout=limit_s)

    def on_exiting(self) -> None:
        """Reaper: the process has exited and is not reaped yet.  Take what is in the pipe, then end its group."""
        self.stdout.drain()
        if self.stdout.at_eof and self._killing is None:  # else what is left of it may have its time
            self._sweeper.reaper.signal_group(self, signal.SIGKILL)

    def on_exit(self, status: int) -> None:
        """Reaper: the process has been reaped."""
        super().on_exit(status)
        self._happens(ProcessEvent.EXIT)
        if self.state is ProcessState.EXITED and self.stdout.at_eof:
            self._happens(ProcessEvent.EOF)

    def _close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        if self._killing is None:
            self._close_pipes()
        else:  # what still runs would read the end of a body that was cut off, or die of what it writes
            self._killing.add_done_callback(lambda _: self._close_pipes())

    def _close_pipes(self) -> None:
        self.stdin.close()
        self.stdout.close()
        if self.stderr is not None:
            self.stderr.close()


class Pipes:
    """Our ends of a process's pipes, and the child's ends until it has been spawned.

    Ours do not block; the child's do, as programs expect.  `stderr` is -1 when it shares stdout's pipe.
    Obligation: `close`, unless the process was started: then `close_theirs`, and ours are its streams'.
    """

    def __init__(self, has_stderr: bool) -> None:
        self.stdin = self.stdout = self.stderr = -1
        self._theirs: list[int] = []
        try:
            child_in, self.stdin = os.pipe2(os.O_CLOEXEC)
            self._theirs.append(child_in)
            self.stdout, child_out = os.pipe2(os.O_CLOEXEC)
            self._theirs.append(child_out)
            if has_stderr:
                self.stderr, child_err = os.pipe2(os.O_CLOEXEC)
                self._theirs.append(child_err)
            for fd in self._ours():
                fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
        except OSError:
            self.close()
            raise

    def _ours(self) -> list[int]:
        return [fd for fd in (self.stdin, self.stdout, self.stderr) if fd >= 0]

    @property
    def theirs(self) -> tuple[int, int, int]:
        """What become 0, 1 and 2 of the child (all others close on exec)."""
        return self._theirs[0], self._theirs[1], self._theirs[-1]

    def close_theirs(self) -> None:
        """Close the child's ends in this process."""
        while self._theirs:
            os.close(self._theirs.pop())

    def close(self) -> None:
        """Close everything that is open."""
        self.close_theirs()
        for fd in self._ours():
            os.close(fd)


class Birth(NamedTuple):
    """What is known of a process that was just started: `started_s` is since boot, the mark as in its environment."""

    pid: int
    mark: bytes
    started_s: float
    pipes: Pipes
    on_stderr: Callable[[str], None] | None


DESCRIPTOR_LIMITS = resource.getrlimit(resource.RLIMIT_NOFILE)  # soft and hard, as this program was started with


def spawn_under_own_limit(spawn: Callable[[], int], highest_fd: int) -> int:
    """Return the pid that `spawn` returns; its process has the soft limit of descriptors that we were started with.

    More than 1024 break a program that uses select(2), and some close all that they could have (systemd.exec(5),
    LimitNOFILE=).  posix_spawn sets no limits, so ours is lowered meanwhile, which only a thread of ours that opens
    something would notice.  It would fail if so many are open (`highest_fd` was opened just now, and the kernel gives
    the lowest that is free); then the process, a moment old, is given its limit from outside.
    """
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    if highest_fd + KEPT_BACK_COUNT < DESCRIPTOR_LIMITS[0]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTOR_LIMITS[0], ours[0]), ours[1]))
        try:
            return spawn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, ours)
    pid = spawn()
    with suppress(OSError):  # it has ended, or runs as another user
        resource.prlimit(pid, resource.RLIMIT_NOFILE, DESCRIPTOR_LIMITS)
    return pid


class Spawner:
    """Starts the function's processes: path resolved and environment encoded once, only the request's part added.

    With `user` a function must differ from its watchdog in the real, effective and saved user, and for no moment may
    the two be alike, or a function could signal us: kill(2) compares with real and saved.  posix_spawn(3) can only make
    the effective user the real one, so our own real user would have to be the function's; only fork(2) keeps the two
    apart.  It copies our page tables (2 to 4 ms at 30 MB on a virtual machine, which only calls with `user` pay, and
    `prewarm` hides).  A helper such as setpriv(1) would be cheaper, but run as root with the function's LD_PRELOAD.
    """

    def __init__(self, sweeper: Sweeper, instance: bytes, settings: Settings, environ: Mapping[bytes, bytes]) -> None:
        self._instance = instance
        self._sweeper = sweeper
        self._words = settings.fprocess
        self._environ = dict(environ)
        self._term_grace_s = settings.term_grace_s or 0.0
        self._stdout_kind = StreamedStdout if settings.mode == "streaming" else Stdout
        self._user = settings.user
        self._program: str | None = None
        self._defaults = signals_at_default()
        if self._user is not None:
            drop_ambient_capabilities()

    def spawn(self, facts: Mapping[bytes, bytes], on_stderr: Callable[[str], None] | None) -> Process:
        """Start a process for one request, with `facts` added to its environment; raises as `start`.

        `on_stderr` gets the lines that it writes on stderr; None: stderr joins its output.
        """
        return Process(self._sweeper, self.start(facts, on_stderr), self._term_grace_s, self._stdout_kind)

    def start(self, facts: Mapping[bytes, bytes], on_stderr: Callable[[str], None] | None) -> Birth:
        """Start a process, which the caller makes a `Root` of at once; raises StartFailed, or FactsTooLarge (431)."""
        # Not a number: a process that knows the mark of another call would pass for that call's, and outlive its own.
        mark = b"%s.%s" % (self._instance, os.urandom(8).hex().encode())
        environ = {**self._environ, **facts, MARK: mark}
        started_s = math.floor(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S) / _TICKS_PER_S
        try:
            pipes = Pipes(on_stderr is not None)
        except OSError as error:
            raise StartFailed(f"no pipe: {_strerror(error)}") from None
        try:
            pid = self._launch(environ, pipes.theirs)
        except OSError as error:
            pipes.close()
            raise self._explained(error, facts) from None
        except FaashoundError:
            pipes.close()
            raise
        pipes.close_theirs()
        return Birth(pid, mark, started_s, pipes, on_stderr)

    def _launch(self, environ: Mapping[bytes, bytes], streams: tuple[int, int, int]) -> int:
        remembered = self._program is not None
        if self._program is None:
            self._program = find_program(self._words[0], os.fsdecode(self._environ.get(b"PATH", b"")) or None)
        spawn: Callable[[], int]
        if self._user is not None:
            spawn = partial(self._fork_exec, self._program, self._user, environ, streams)
        else:
            spawn = partial(
                os.posix_spawn,
                self._program,
                self._words,
                environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(streams)],
                setsid=True,
                setsigmask=(),
                setsigdef=self._defaults,
            )
        try:
            return spawn_under_own_limit(spawn, max(streams))
        except FileNotFoundError:
            self._program = None  # it may have moved, or come, since PATH was searched
            if not remembered:
                raise
        return self._launch(environ, streams)

    def _fork_exec(
        self, program: str, user: Identity, environ: Mapping[bytes, bytes], streams: tuple[int, int, int]
    ) -> int:
        """Start a process as another user."""
        for fd in streams:
            os.fchown(fd, user.uid, user.gid)  # or `echo >/dev/stderr` would fail: that opens the pipe again
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))  # a fork inherits it
        try:
            process = subprocess.Popen(
                self._words,
                executable=program,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                env=environ,
                close_fds=False,
                start_new_session=True,
                user=user.uid,
                group=user.gid,
                extra_groups=user.groups,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
            reaper = self._sweeper.reaper
            reaper.loop.call_soon(reaper.reap)  # what has exited meanwhile has not been told
        process.returncode = 0  # it is the reaper's
        return process.pid

    def _explained(self, error: OSError, facts: Mapping[bytes, bytes]) -> FaashoundError:
        if error.errno == errno.E2BIG and facts and self._fits_execve():
            return FactsTooLarge()
        return StartFailed(f"fork/exec {self._program or self._words[0]}: {_strerror(error)}")

    def _fits_execve(self) -> bool:
        """Tell whether words and environment would fit without a request's facts (execve(2), "Limits on size")."""
        texts = [len(os.fsencode(word)) + 1 for word in self._words]
        texts += [len(name) + len(value) + 2 for name, value in self._environ.items()]
        return max(texts) < MAX_EXEC_STRING_BYTES and sum(texts) + 8 * len(texts) < os.sysconf("SC_ARG_MAX")


class Pool:
    """Processes started before their request, so that the start of the function's runtime costs no caller time.

    Each serves exactly one request, like the others, and its deadline runs from there.  One that is taken is replaced
    when no call is running any more, or soon: not at once, when a start would take a core from those that are answered.
    One that ends before its request makes the next start wait, longer each time.
    """

    def __init__(self, reaper: Reaper, spawner: Spawner, size: int, on_stderr: Callable[[str], None] | None) -> None:
        self._reaper = reaper
        self._spawner = spawner
        self._size = size
        self._on_stderr = on_stderr
        self._waiting: deque[Process] = deque()
        self._serving_count = 0
        self._loop = asyncio.get_running_loop()
        self._filling: asyncio.TimerHandle | None = None
        self._pause_s = REFILL_S
        self._not_before_s = -math.inf
        self._closed = False
        self._fill()

    def take(self, facts: Mapping[bytes, bytes], on_stderr: Callable[[str], None] | None) -> Process:
        """Return a process for a request: one that waits if there is any, else a new one; raises as `spawn`."""
        if not self._size:
            return self._spawner.spawn(facts, on_stderr)
        self._fill_in(REFILL_S)
        self._reaper.reap()  # or the request could go to one that has just died
        process = next((each for each in self._waiting if not each.exited.done()), None)
        if process is None:
            return self._spawner.spawn(facts, on_stderr)
        self._waiting.remove(process)
        self._serving_count += 1
        if on_stderr is not None:
            process.stderr_to(on_stderr)
        self._pause_s = REFILL_S
        return process

    def _fill_in(self, seconds: float, sooner: bool = False) -> None:
        """Fill after `seconds`, but not while starts have to wait; `sooner` overrules what was planned."""
        if self._filling is not None and sooner:
            self._filling.cancel()
            self._filling = None
        if self._filling is None and not self._closed:
            self._filling = self._loop.call_at(max(self._loop.time() + seconds, self._not_before_s), self._fill)

    def _fill(self) -> None:
        """Start one process if one is missing, and come back for the next."""
        self._filling = None
        if self._closed or len(self._waiting) >= self._size:
            return
        try:
            process = self._spawner.spawn({}, self._on_stderr)
        except FaashoundError as error:
            log.error(f"prewarm: {error}")
            self._give_up_for_now()
            return
        self._waiting.append(process)
        process.exited.add_done_callback(partial(self._on_exit, process))
        self._fill_in(0.0)

    def _on_exit(self, process: Process, _: asyncio.Future[None]) -> None:
        if process not in self._waiting:  # its call has ended
            self._serving_count -= 1
            if not self._serving_count:
                self._fill_in(REFILL_PAUSE_S, sooner=True)
            return
        self._waiting.remove(process)
        process.discard()
        if not self._closed:
            log.error("prewarm: a process ended before it had a request", pid=process.pid, exit=process.describe())
            self._give_up_for_now()

    def _give_up_for_now(self) -> None:
        self._pause_s = min(self._pause_s * 2, LONGEST_REFILL_PAUSE_S)
        self._not_before_s = self._loop.time() + self._pause_s
        self._fill_in(0.0, sooner=True)

    def close(self) -> None:
        """End the processes that wait."""
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
        while self._waiting:
            self._waiting.popleft().discard()


# ---------------------------------------------------------------------------------------------------------------
# The application: a request becomes a process, its result a response.
# ---------------------------------------------------------------------------------------------------------------

FUNCTION_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
CLIENT_GONE_STATUS = 499  # the answer had no reader; nginx's number, for the log and the metrics
_CALL_ID = re.compile(rb"[A-Za-z0-9._~-]{1,128}")
_BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")  # what Go's sniffer takes for "not text"


class ClientGone(FaashoundError):
    """The client closed the connection before it had its answer."""

    status = CLIENT_GONE_STATUS
    text = "the client has gone"


class MethodNotAllowed(FaashoundError):
    """The resource does not know the method (RFC 9110 15.5.6)."""

    status = 405

    def __init__(self, allowed: Sequence[str]) -> None:
        text = ", ".join(allowed)
        self.headers = ((b"Allow", text.encode()),)
        super().__init__(f"method not allowed; allowed: {text}")


class TooManyRequests(FaashoundError):
    """max_inflight is reached (header and text are those of OpenFaaS's middleware)."""

    status = 429
    headers = ((b"X-OpenFaaS-Internal", b"faas-middleware"),)

    def __init__(self, limit_count: int) -> None:
        super().__init__(f"Concurrent request limit exceeded. Max concurrent requests: {limit_count}")


class BadTimeout(FaashoundError):
    """X-Timeout does not parse."""

    status = 400


class NotReady(FaashoundError):
    """Draining, or the lock file has gone."""

    status = 503


def content_type_of(request_type: bytes | None, forced: str | None, start: bytes) -> Header:
    """Return the Content-Type of an output that begins with `start`."""
    if forced is not None:
        return b"Content-Type", forced.encode()
    if request_type:
        return b"Content-Type", request_type
    return (b"Content-Type", b"application/octet-stream") if _BINARY.search(start) else TEXT_PLAIN


def call_id_of(request: Request) -> str | None:
    """Return the request's X-Call-Id if it is a sane token, as it may stand in a log line."""
    value = request.header(b"x-call-id")
    return value.decode() if value is not None and _CALL_ID.fullmatch(value) else None


# prometheus_client's own buckets, in seconds.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, math.inf)


class Histogram(NamedTuple):
    """How long something took, among the shared counters: the sum in seconds, then how many fell into each bucket."""

    values: memoryview[float]

    @classmethod
    def at(cls, slot: Slot, key: str) -> Histogram:
        """Return this process's histogram under `key`."""
        return cls(slot.values(key, 1 + len(BUCKETS_S)))

    def observe(self, duration_s: float) -> None:
        """Count one."""
        self.values[0] += duration_s
        self.values[1 + bisect_left(BUCKETS_S, duration_s)] += 1


def cumulated(numbers: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
    """Return the buckets and the sum of a histogram's numbers, as prometheus_client takes them."""
    total, *counts = numbers
    bounds = [*(str(bound) for bound in BUCKETS_S[:-1]), "+Inf"]
    return list(zip(bounds, itertools.accumulate(counts), strict=True)), total


class HttpMetrics:
    """The three metrics of the OpenFaaS watchdogs, under the same names, of all processes (a Prometheus collector)."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._histogram = lru_cache(maxsize=256)(self._find_histogram)

    def _find_histogram(self, status: int, method: str) -> Histogram:
        known = method.lower() if method in (*FUNCTION_METHODS, "HEAD", "OPTIONS", "TRACE") else "unknown"
        return Histogram.at(self._slot, f"{status} {known}")

    def observe(self, status: int, method: str, duration_s: float) -> None:
        """Count one finished request; an unknown method is no label, or a stranger could fill the memory."""
        self._histogram(status, method).observe(duration_s)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; prometheus_client asks for them."""
        core = importlib.import_module("prometheus_client.core")
        labels = ("code", "method")
        totals = core.CounterMetricFamily("http_requests", "total HTTP requests processed", labels=labels)
        durations = core.HistogramMetricFamily(
            "http_request_duration_seconds", "Seconds spent serving HTTP requests.", labels=labels
        )
        for key, numbers in self._slot.scoreboard.counters.totals().items():
            buckets, total_s = cumulated(numbers)
            totals.add_metric(key.split(), buckets[-1][1])
            durations.add_metric(key.split(), buckets, total_s)
        count = self._slot.in_flight_count
        yield from (totals, durations)
        yield core.GaugeMetricFamily("http_requests_in_flight", "total HTTP requests in-flight", value=count)


class Collector(Protocol):
    """What has metrics to show."""

    def collect(self) -> Iterable[Metric]:
        """Return them."""


async def serve_metrics(collector: Collector, request: Request) -> Response:
    """Answer GET /metrics with Prometheus text."""
    if request.path != b"/metrics":
        return Response(404, (TEXT_PLAIN,), b"only /metrics is here\n")
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed(("GET", "HEAD"))
    # Only here, and beside the loop: it takes 27 ms and 4 MiB, for which a function without a scraper has no use.
    prometheus = await asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "prometheus_client")
    registry = prometheus.CollectorRegistry()
    registry.register(collector)
    kind = prometheus.CONTENT_TYPE_LATEST.encode()
    return Response(200, ((b"Content-Type", kind),), prometheus.generate_latest(registry))


class ModeParts(NamedTuple):
    """What modes are made of; `roots` are the processes of the first worker process, which all can see."""

    slot: Slot
    sweeper: Sweeper
    spawner: Spawner
    pool: Pool
    roots: RootTable


class Mode:
    """How the program sees a request."""

    methods: ClassVar[Sequence[str]] = FUNCTION_METHODS  # () for any

    async def answer(self, request: Request, call: CallLog) -> Response:
        """Return the program's answer; a `LiveAnswer` accounts for the call itself, when it ends."""
        raise NotImplementedError

    def start(self) -> None:
        """Start what has to run before the first request."""

    async def check(self) -> None:
        """Raise NotReady while no request would be answered."""

    async def check_ready(self, request: Request, call: CallLog) -> Response | None:
        """Return what the program says to a request for /_/ready; None if it is not asked."""

    async def stop(self, hurry: asyncio.Event) -> None:
        """End what `start` has started, after a drain; at once when `hurry` is set."""


class LiveAnswer:
    """The body of an answer that has begun.  `on_end` is called with the status to account for, when it has ended."""

    def __init__(self) -> None:
        self.on_end: Callable[[int], None] = lambda status: None


class Watchdog:
    """Handler of a function's server: health, limits, and what `mode` makes of a request."""

    def __init__(self, settings: Settings, mode: Mode, lock_path: str | None, slot: Slot) -> None:
        self.metrics = HttpMetrics(slot)
        self.accepting = True
        self._slot = slot
        self._settings = settings
        self._mode = mode
        self._lock_path = lock_path

    async def __call__(self, request: Request) -> Response:
        """Answer one request; cancelled when the client has gone."""
        if request.path == b"/_/health":
            return await self._health(request)
        if request.path == b"/_/ready":
            return await self._ready(request)
        call = CallLog(request, self._settings)
        admitted = False
        try:
            if self._mode.methods and request.method not in self._mode.methods:
                raise MethodNotAllowed(self._mode.methods)
            admitted = self._slot.enter(self._settings.max_inflight)
            if not admitted:
                raise TooManyRequests(self._settings.max_inflight)
            response = await self._mode.answer(request, call)
        except FaashoundError as error:
            call.failed(error)
            self._account(request, call, admitted, error.status)
            raise
        except BaseException as error:
            status = 500
            if isinstance(error, asyncio.CancelledError):
                status = CLIENT_GONE_STATUS if request.refusal is None else request.refusal.status
                call.failed(request.refusal or ClientGone())
            self._account(request, call, admitted, status)
            raise
        account = partial(self._account, request, call, admitted)
        if isinstance(response.body, LiveAnswer):
            response.body.on_end = account
        else:
            account(response.status)
        return response

    def _account(self, request: Request, call: CallLog, admitted: bool, status: int) -> None:
        if admitted:
            self._slot.leave()
        self.metrics.observe(status, request.method, call.elapsed_s())

    def on_refused(self, request: Request | None, error: FaashoundError) -> None:
        """Log and count a request that HTTP's rules did not let through to us."""
        if request is not None:
            CallLog(request, self._settings).failed(error)
        else:
            log.info(str(error), status=error.status)
        self.metrics.observe(error.status, "" if request is None else request.method, 0.0)

    async def _health(self, request: Request) -> Response:
        if request.method != "GET":
            raise MethodNotAllowed(("GET",))
        if not self.accepting:
            raise NotReady("draining")
        if self._lock_path is not None and not is_locked(self._lock_path):
            raise NotReady(f"the lock file {self._lock_path} has gone")
        await self._mode.check()
        return Response(200, (TEXT_PLAIN,), b"OK")

    async def _ready(self, request: Request) -> Response:
        healthy = await self._health(request)
        if self._settings.max_inflight and self._slot.in_flight_count >= self._settings.max_inflight:
            raise TooManyRequests(self._settings.max_inflight)
        return await self._mode.check_ready(request, CallLog(request, self._settings)) or healthy


def limit_of(settings: Settings, request: Request) -> float | None:
    """Return a call's limit in seconds: the caller may shorten ours, never lengthen it.  Raises BadTimeout."""
    return least(settings.exec_timeout_s or None, caller_limit_of(request))


def caller_limit_of(request: Request) -> float | None:
    """Return the limit in seconds that the caller sets a call.  Raises BadTimeout."""
    text = request.header(b"x-timeout")
    if not text:
        return None
    try:
        return parse_positive_duration(text.decode("latin-1"))
    except ValueError as error:
        raise BadTimeout(f"X-Timeout: {error}") from None


def least(*limits_s: float | None) -> float | None:
    """Return the least of some limits, of which any may be None: none."""
    return min((limit_s for limit_s in limits_s if limit_s is not None), default=None)


def body_within(limit_bytes: int, body: Body) -> AsyncIterator[bytes]:
    """Return `body`, which raises BodyTooLarge beyond `limit_bytes`, unless that is 0; raises it at once if it can."""
    if not limit_bytes:
        return body
    size = body.buffered_bytes if body.complete else body.length
    if size is None:
        return limited(body, limit_bytes)
    if size > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    return body


_WITHOUT_BODY = frozenset((204, 304))  # RFC 9110 6.4.1


class Serializing(Mode):
    """Mode: one process per request, and its answer once it has ended."""

    def __init__(self, settings: Settings, parts: ModeParts) -> None:
        self._settings = settings
        self._pool = parts.pool

    async def answer(self, request: Request, call: CallLog) -> Response:
        """Return what the process wrote, and what its exit status makes of it."""
        result = await self._begin(request, call).end()
        response = self._response(request, call, result)
        call.ended(response, result)
        return response

    def _begin(self, request: Request, call: CallLog) -> Process:
        settings = self._settings
        timeout_s = limit_of(settings, request)
        body = body_within(settings.max_body_bytes, request.body)
        facts = cgi_environment(request) if settings.cgi_headers else {}
        call.begins("Forking fprocess.")
        if settings.marshal_request:
            body = marshalled(request.headers, body)
        on_stderr = None if settings.combine_output else call.on_stderr
        call.process = process = self._pool.take(facts, on_stderr)
        process.begin(call.watched(body), None if timeout_s is None else time.monotonic() + timeout_s)
        return process

    def _response(self, request: Request, call: CallLog, result: ProcessResult) -> Response:
        output, forced = result.output, self._settings.content_type
        if result.status == 0 and self._settings.cgi_response:
            return self._cgi_response(request, call, result)
        if result.status == 0:
            kind = content_type_of(request.header(b"content-type"), forced, output.head())
            duration = (b"X-Duration-Seconds", b"%f" % result.duration_s)
            return output_response(200, (kind, duration), b"", output)
        reason = describe_exit(result.status).encode() + b"\n"
        kind = content_type_of(None, forced, reason + output.head())
        return output_response(500, (kind,), reason, output)

    def _cgi_response(self, request: Request, call: CallLog, result: ProcessResult) -> Response:
        output = result.output
        try:
            head = self._whole_head(call, output.head(MAX_HEAD_BYTES))
        except BadOutputHead:
            output.close()
            raise
        duration = (b"X-Duration-Seconds", b"%f" % result.duration_s)
        fields = self._cgi_headers(request, head, output.head(offset=head.size))
        headers = [*end_to_end(fields, b"x-duration-seconds"), duration]
        if head.status in _WITHOUT_BODY:
            output.close()
            return Response(head.status, headers)
        return output_response(head.status, headers, b"", output, head.size)

    @staticmethod
    def _head(call: CallLog, data: bytes) -> OutputHead | None:
        """Return the head with which `data` begins, if it is whole; a line of what makes BadOutputHead is logged."""
        try:
            return parse_output_head(data)
        except BadOutputHead:
            call.shows_output(data)
            raise

    def _whole_head(self, call: CallLog, data: bytes) -> OutputHead:
        head = self._head(call, data)
        if head is None:
            call.shows_output(data)
            raise BadOutputHead("it ended before an empty line")
        return head

    def _cgi_headers(self, request: Request, head: OutputHead, start: bytes) -> list[Header]:
        """Return the fields of an output, with a Content-Type if it has none, or ours if there is one for all."""
        forced = self._settings.content_type
        if forced is None and any(name.lower() == b"content-type" for name, _ in head.headers):
            return head.headers
        others = [field for field in head.headers if field[0].lower() != b"content-type"]
        if head.status in _WITHOUT_BODY:
            return others
        return [*others, content_type_of(request.header(b"content-type"), forced, start)]


class Streaming(Serializing):
    """Mode: one process per request, whose answer is 200 as soon as it prints, and is sent as it is printed.

    Without any output the exit status decides, as in `Serializing`.
    """

    async def answer(self, request: Request, call: CallLog) -> Response:
        """Return the answer when it has begun."""
        process = self._begin(request, call)
        stdout = cast(StreamedStdout, process.stdout)
        data, head = b"", None
        try:
            await stdout.begun
            if self._settings.cgi_response:
                data, head = await self._read_head(call, stdout.body)
        except (asyncio.CancelledError, BadOutputHead) as error:
            process.abandon(error if isinstance(error, BadOutputHead) else ClientGone())
            with suppress(FaashoundError):
                await process.end(HANGUP_WAIT_S)
            raise
        if not stdout.output.bytes_count or (self._settings.cgi_response and head is None):
            return self._without_head(request, call, await process.end(), data)
        if head is None:
            kind = content_type_of(request.header(b"content-type"), self._settings.content_type, stdout.output.head())
            return self._live(request, call, Response(200, (kind,)), b"")
        rest = data[head.size :]
        response = Response(head.status, self._cgi_headers(request, head, rest))
        return self._live(request, call, response, rest)

    async def _read_head(self, call: CallLog, body: Body) -> tuple[bytes, OutputHead | None]:
        """Return what of an output was read to have its head, and the head; None if the output ended before."""
        data = b""
        async for piece in body:
            data += piece
            head = self._head(call, data)
            if head is not None:
                return data, head
        return data, None

    def _without_head(self, request: Request, call: CallLog, result: ProcessResult, data: bytes) -> Response:
        """Return the answer of a process that ended, well or not, before its answer could begin."""
        if result.status == 0 and self._settings.cgi_response:
            self._whole_head(call, data)  # raises
        output = Output()
        output.append(data)
        response = self._response(request, call, result._replace(output=output))
        call.ended(response, result)
        return response

    def _live(self, request: Request, call: CallLog, response: Response, prefix: bytes) -> Response:
        process = cast(Process, call.process)
        response.is_live = True
        response.body = StreamedAnswer(process, response, call, prefix)
        cast(StreamedStdout, process.stdout).on_cut = request.abort
        return response


class StreamedAnswer(LiveAnswer):
    """What the process of a call prints.

    It ends well only if the process does; else the iterator raises, and the connection is cut without the last chunk.
    """

    def __init__(self, process: Process, response: Response, call: CallLog, prefix: bytes) -> None:
        super().__init__()
        self._process = process
        self._response = response
        self._call = call
        self._prefix = prefix
        self._is_whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what is printed; raises ProcessFailed, or what ended the process."""
        is_sent = self._response.status not in _WITHOUT_BODY
        if self._prefix and is_sent:
            yield self._prefix
        async for data in cast(StreamedStdout, self._process.stdout).body:
            if is_sent:
                yield data
        self._is_whole = True
        status = await self._process.exit_status()
        if status:
            raise ProcessFailed(describe_exit(status))

    async def aclose(self) -> None:
        """Kill the process unless it has ended, and account for the call, even if cancelled meanwhile."""
        self._ending = asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        if not self._is_whole:
            self._process.abandon(ClientGone())
        status = self._response.status
        try:
            result = await self._process.end(HANGUP_WAIT_S)
            if not self._is_whole:
                raise ClientGone
            if result.status:
                raise ProcessFailed(describe_exit(result.status))
            self._call.ended(self._response, result)
        except FaashoundError as error:
            status = error.status
            self._call.failed(error)
        finally:
            self.on_end(status)


class ServerFailure(FaashoundError):
    """With mode=http: no answer of the server's.  The field tells a worker so (its value is of-watchdog's)."""

    status = 502
    headers: Headers = ((b"X-OpenFaaS-Internal", b"of-watchdog"),)


class ServerDown(ServerFailure):
    """The server takes no connections; the text says whether it runs."""

    status = 503
    headers = (*ServerFailure.headers, (b"Retry-After", b"1"))


class ServerTimeout(ServerFailure):
    """The server did not answer within exec_timeout, or X-Timeout."""

    status = 504
    text = "the server did not answer within the limit (exec_timeout, X-Timeout)"


class Upstream:
    """The server of mode=http as every worker process sees it: whether it runs, and takes connections."""

    def __init__(self, url: Url, roots: RootTable) -> None:
        self.url = url
        self.client = Client(kept_s=SERVER_KEPT_S)
        self._roots = roots
        self._looking: asyncio.Task[None] | None = None

    def down(self) -> ServerDown:
        """Return what to say of a server that takes no connections: whether it runs and is slow, or does not run."""
        if self._roots.is_empty():
            return ServerDown("the function's server is not running, and is started again soon")
        return ServerDown("the function's server runs, but takes no connections yet")

    async def takes_connections(self) -> bool:
        """Tell whether it does now."""
        if self._roots.is_empty():
            return False
        try:
            await self.client.reach(self.url, time.monotonic() + ATTEMPT_TIMEOUT_S)
        except (Unreachable, UpstreamTimeout):
            return False
        return True

    async def wait(self, seconds: float) -> None:
        """Return as soon as it takes connections; raises ServerDown after so many seconds.  One task looks for all."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        done, _ = await asyncio.wait((self._looking,), timeout=max(seconds, 0.0))
        if not done:
            raise self.down()
        done.pop().result()

    async def _look(self) -> None:
        pause_s = SERVER_POLL_S
        try:
            while not await self.takes_connections():
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_SERVER_POLL_S)
        finally:
            self._looking = None


class ManagedServer:
    """The server of mode=http through all its lives: one that dies is started again, with growing delay."""

    def __init__(self, upstream: Upstream, start: Callable[[], ServerProcess]) -> None:
        self._upstream = upstream
        self._start = start
        self._process: ServerProcess | None = None
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        delay_s = None
        while True:
            started_s = time.monotonic()
            reason = await self._live()
            delay_s = next_restart_s(delay_s, time.monotonic() - started_s, 0)  # no status of it tells of our settings
            log.error(f"the server {reason}; next start in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    async def _live(self) -> str:
        """Start it, and return how it ended once nothing of it is left."""
        try:
            self._process = process = self._start()
        except FaashoundError as error:
            return f"cannot be started: {error}"
        log.info("Forking fprocess.", pid=process.pid)
        report = asyncio.create_task(self._report_start(process))
        try:
            await asyncio.wait((process.exited,))
        finally:
            report.cancel()
        self._process = None
        await process.end(0.0)
        return f"ended ({process.describe()})"

    async def _report_start(self, process: ServerProcess) -> None:
        """Log that it takes connections, or that it has not for long, which is another fault than to be slow."""
        where, began_s = self._upstream.url.authority, time.monotonic()
        try:
            await self._upstream.wait(SILENT_SERVER_S)
        except ServerDown:
            text = f"the server has run for {SILENT_SERVER_S:g} s and takes no connections at {where}"
            log.warning(f"{text}; does upstream_url say where it listens?", pid=process.pid)
            await self._upstream.wait(math.inf)
        log.info(f"The server takes connections at {where} after {time.monotonic() - began_s:.3f}s", pid=process.pid)

    async def stop(self, term_grace_s: float, hurry: asyncio.Event) -> None:
        """End it, if it runs; what is left when `hurry` is set is the sweeper's."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        if self._process is not None:
            await finished_first(self._process.end(term_grace_s), hurry.wait())


class Http(Mode):
    """Mode: the program is a server of its own, started once, to which requests are passed on.

    One worker process has it as its child, for all of them; each sends its requests there by itself.
    """

    methods = ()

    def __init__(self, settings: Settings, parts: ModeParts) -> None:
        self._settings = settings
        self._parts = parts
        self._upstream = Upstream(cast(Url, settings.upstream_url), parts.roots)
        self._server: ManagedServer | None = None

    def start(self) -> None:
        """Start the server."""
        if self._parts.slot.is_first:
            self._server = ManagedServer(self._upstream, self._start_server)

    def _start_server(self) -> ServerProcess:
        on_stdout, on_stderr = (partial(log_line, self._settings, name, "") for name in ("stdout", "stderr"))
        return ServerProcess(self._parts.sweeper, self._parts.spawner.start({}, on_stderr), on_stdout)

    async def check(self) -> None:
        """Raise ServerDown while the server takes no connections."""
        if not await self._upstream.takes_connections():
            raise self._upstream.down()

    async def check_ready(self, request: Request, call: CallLog) -> Response | None:
        """Ask the server, if ready_path says where."""
        path = self._settings.ready_path
        if path is None:
            return None
        asked = dataclasses.replace(request, target=path.encode())
        return await self.answer(asked, call)

    async def answer(self, request: Request, call: CallLog) -> Response:
        """Return what the server answers, streamed as it comes."""
        call.begins()
        caller_limit_s, ours_s = caller_limit_of(request), self._settings.exec_timeout_s
        caller_deadline_s = None if caller_limit_s is None else time.monotonic() + caller_limit_s
        try:
            body, length = await self._body(request, caller_deadline_s)
            deadline_s = least(caller_deadline_s, time.monotonic() + ours_s if ours_s else None)
            response = await self._send(request, body, length, deadline_s)
        except ServerFailure as error:
            error.headers = (*error.headers, call.duration_field())
            raise
        headers = [*end_to_end(response.headers, b"x-duration-seconds"), call.duration_field()]
        has_body = response.status != 101 and request.method != "HEAD"
        body = body_if_complete(response.body) if has_body else response.body
        if isinstance(body, bytes):
            whole = Response(response.status, headers, body, response.body.length)
            call.sent(whole, len(body))
            return whole
        live = ProxiedAnswer(response, call)
        live.response = relayed(response, headers, live, self._settings.exec_timeout_s or math.inf)
        return live.response

    async def _body(self, request: Request, deadline_s: float | None) -> tuple[SentBody, int | None]:
        """Return what is sent as the body of a request, and its length if known.

        One that is buffered has its read_timeout, and until `deadline_s`, the caller's; raises ServerTimeout then.  Our
        exec_timeout begins after it.
        """
        body = body_within(self._settings.max_body_bytes, request.body)
        if request.body.complete:
            return sent_body(request), request.body.length
        if not self._settings.http_buffer_req_body:
            return body, request.body.length
        try:
            async with asyncio.timeout_at(deadline_s):
                return await spooled(body)
        except TimeoutError:
            raise ServerTimeout from None

    async def _send(
        self, request: Request, body: SentBody, length: int | None, deadline_s: float | None
    ) -> ClientResponse:
        """Send a request as soon as the server takes it; raises ServerFailure: ServerDown if it does not in time.

        Raises BadPath for a path that would lead out of the upstream's.
        """
        base, client = self._upstream.url, self._upstream.client
        target = origin_form(request)
        if base.target:
            check_path(target.partition("?")[0].encode())
        url = Url(base.scheme, base.host, base.port, base.target + target or "*")
        headers = [(b"Host", request.host), *end_to_end(request.headers, b"host", b"expect")]
        limit_s = time.monotonic() + SERVER_WAIT_S if deadline_s is None else deadline_s
        while True:
            try:
                return await client.request(request.method, url, headers, body, length, deadline_s)
            except UpstreamTimeout:
                raise ServerTimeout from None
            except (PeerGone, OutOfResources) as error:
                raise ServerFailure(f"the function's server gave no answer: {error}") from None
            except Unreachable:  # nothing was sent
                await self._upstream.wait(limit_s - time.monotonic())

    async def stop(self, hurry: asyncio.Event) -> None:
        """End the server, once no other worker process needs it."""
        await self._upstream.client.close()
        if self._server is not None:
            grace_s = self._settings.term_grace_s
            await finished_first(self._others_drained(), hurry.wait())
            await self._server.stop(SERVER_GRACE_S if grace_s is None else grace_s, hurry)

    async def _others_drained(self) -> None:
        slot, is_drained = self._parts.slot, False
        while not is_drained:
            await asyncio.sleep(SERVER_POLL_S)
            # A request whose head is still arriving is not in flight yet; its connection is there.
            is_drained = not (any(slot.scoreboard.serving) or slot.in_flight_count or slot.others_connections_count)


def origin_form(request: Request) -> str:
    """Return a request's target as it stands behind a prefix (RFC 9112 3.2.1), as it came; nothing for `*`."""
    target = request.target.decode()
    if target.startswith(("/", "*")):
        return target.removeprefix("*")
    return request.path.decode() + (f"?{request.query.decode()}" if request.query else "")


async def spooled(body: AsyncIterator[bytes]) -> tuple[SentBody, int]:
    """Return a body that has been read whole, in memory or beyond SPILL_BYTES from a file, and its length."""
    kept = Output()
    try:
        async for data in body:
            if kept.file is None and kept.bytes_count + len(data) > SPILL_BYTES:
                await in_thread(kept.spill)
            if kept.file is None:
                kept.append(data)
            else:
                await in_thread(kept.append, data)
    except BaseException as error:
        kept.close()
        if isinstance(error, OSError):
            raise OutputLost(f"the request could not be kept: {_strerror(error)}") from None
        raise
    return (kept.in_memory() if kept.file is None else _unspooled(kept)), kept.bytes_count


async def _unspooled(kept: Output) -> AsyncIterator[bytes]:
    try:
        for offset in range(0, kept.bytes_count, FILE_CHUNK_BYTES):
            yield await in_thread(kept.head, FILE_CHUNK_BYTES, offset)
    finally:
        kept.close()


class ProxiedAnswer(LiveAnswer):
    """What a server sends.  If it breaks off, so does the answer."""

    response: Response  # that this is the body of

    def __init__(self, answer: ClientResponse, call: CallLog) -> None:
        super().__init__()
        self._answer = answer
        self._call = call
        self._bytes_count = 0
        self._error: FaashoundError | None = ClientGone()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what comes; raises PeerGone or UpstreamTimeout."""
        try:
            async for data in self._answer.body:
                self._bytes_count += len(data)
                yield data
        except FaashoundError as error:
            self._error = error
            raise
        self._error = None

    async def aclose(self) -> None:
        """Cut the server's answer unless it is whole, and account for the call."""
        self._answer.close()
        if self._error is None:
            self._call.sent(self.response, self._bytes_count)
        else:
            self._call.failed(self._error)
        self.on_end(self.response.status if self._error is None else self._error.status)


class NoFile(FaashoundError):
    """With mode=static: there is nothing to be served under a path, or what is there is not for us to serve."""

    status = 404
    text = "there is no such file"


class ServedFile(NamedTuple):
    """An open file and what is told of it: its size, its validators (RFC 9110 8.8), its type."""

    file: io.FileIO
    size: int
    modified_s: int
    etag: bytes
    kind: bytes


MEDIA_TYPES = {  # that not every Python and every system know, or that they have under an older name (RFC 9239)
    "application/wasm": ".wasm",
    "font/woff": ".woff",
    "font/woff2": ".woff2",
    "image/avif": ".avif",
    "image/webp": ".webp",
    "text/javascript": ".js .mjs",
}


class Static(Mode):
    """Mode: files below a directory, and no program.

    A file is opened only once the kernel has said that what a path leads to, through whatever links, is a regular one
    below the directory.
    """

    methods = ("GET", "HEAD")

    def __init__(self, settings: Settings, parts: ModeParts) -> None:
        self._root = os.path.realpath(settings.static_path)
        if not os.path.isdir(self._root):
            raise CannotStart(f"static_path={settings.static_path!r}: there is no such directory")
        import mimetypes  # only here: it reads the system's tables

        mimetypes.init()
        for kind, endings in MEDIA_TYPES.items():
            for ending in endings.split():
                mimetypes.add_type(kind, ending)

    async def answer(self, request: Request, call: CallLog) -> Response:
        """Return a file, a part of it, or what the conditions of the request make of that."""
        call.begins()
        found = await in_thread(self._find, request.decoded_path())
        response = self._moved(request) if found is None else file_response(request, found)
        call.sent(response, len(response.body) if isinstance(response.body, bytes) else response.length or 0)
        return response

    @staticmethod
    def _moved(request: Request) -> Response:
        """Lead to the same directory with a slash behind it: links in its page count from there."""
        place = b"./" + request.path.rpartition(b"/")[2] + b"/" + (b"?" + request.query if request.query else b"")
        return Response(301, ((b"Location", place), TEXT_PLAIN), b"moved: a directory's path ends with /\n")

    def _find(self, path: bytes) -> ServedFile | None:
        """Return the file at `path`, or the page of a directory; None if the path of one lacks its slash."""
        parts = [part for part in path.split(b"/") if part]
        if b".." in parts or b"." in parts:
            raise NoFile
        inner = os.path.join(os.fsencode(self._root), *parts)
        with ExitStack() as cleanup:
            fd = self._look(inner, cleanup)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                if not path.endswith(b"/"):
                    return None
                inner = os.path.join(inner, b"index.html")
                fd = self._look(inner, cleanup)
            elif path.endswith(b"/"):
                raise NoFile
            return self._open(fd, inner)

    def _look(self, path: bytes, cleanup: ExitStack) -> int:
        """Return a descriptor that stands for what is at `path` and has opened nothing; raises NoFile if it is outside.

        What /proc says of it is where it is, however it was reached and whatever has changed since (proc(5)).
        """
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            cleanup.callback(os.close, fd)
            place = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # not there, not a directory, a name too long, links in a circle, a directory we may not enter
            raise NoFile from None
        if place != self._root and not place.startswith(self._root.rstrip("/") + "/"):
            raise NoFile
        return fd

    @staticmethod
    def _open(fd: int, path: bytes) -> ServedFile:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise NoFile
        try:
            file = io.FileIO(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            raise NoFile from None
        etag = b'"%x-%x"' % (found.st_mtime_ns, found.st_size)
        return ServedFile(file, found.st_size, int(found.st_mtime), etag, content_type_by_name(path))


def content_type_by_name(path: bytes) -> bytes:
    """Return the media type that a file's name tells; text is UTF-8."""
    import mimetypes

    kind, coding = mimetypes.guess_type(os.fsdecode(path))
    if kind is None or coding is not None:  # of a compressed file the type is that of what it has inside
        return b"application/gzip" if coding == "gzip" else b"application/octet-stream"
    return kind.encode() + (b"; charset=utf-8" if kind.startswith("text/") else b"")


def file_response(request: Request, found: ServedFile) -> Response:
    """Return what RFC 9110 13.2.2 and 14.2 make of a request for a file."""
    modified = build_date(found.modified_s)
    headers = [(b"ETag", found.etag), (b"Last-Modified", modified), (b"Accept-Ranges", b"bytes")]
    status = conditional_status(request, found)
    if status is not None:
        found.file.close()
        return Response(status, headers)
    part = None
    # If-Range, if given, has to mean this very state of the file (RFC 9110 13.1.5).
    if request.method == "GET" and request.header(b"if-range") in (None, found.etag, modified):
        part = parse_range(request.header(b"range") or b"", found.size)
    if part is None:
        return Response(200, [*headers, (b"Content-Type", found.kind)], FileBody(b"", found.file), found.size)
    if not part:
        found.file.close()
        return Response(416, [*headers, (b"Content-Range", b"bytes */%d" % found.size)])
    place = b"bytes %d-%d/%d" % (part.start, part.stop - 1, found.size)
    headers += [(b"Content-Type", found.kind), (b"Content-Range", place)]
    return Response(206, headers, FileBody(b"", found.file, part.start), len(part))


def conditional_status(request: Request, found: ServedFile) -> int | None:
    """Return 304 or 412 if the preconditions of a GET or HEAD say so, in the order of RFC 9110 13.2.2; else None."""
    match, none_match = request.header(b"if-match"), request.header(b"if-none-match")
    if match is not None:
        if not names_etag(match, found.etag, weakly=False):
            return 412
    elif is_older(request.header(b"if-unmodified-since"), found) is True:
        return 412
    if none_match is not None:
        return 304 if names_etag(none_match, found.etag, weakly=True) else None
    return 304 if is_older(request.header(b"if-modified-since"), found) is False else None


def names_etag(value: bytes, etag: bytes, *, weakly: bool) -> bool:
    """Tell whether an If-Match or If-None-Match names `etag` (RFC 9110 8.8.3.2, 13.1)."""
    tags = re.findall(rb'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"', value)
    return value.strip() == b"*" or etag in tags or (weakly and b"W/" + etag in tags)


def is_older(date: bytes | None, found: ServedFile) -> bool | None:
    """Tell whether a date lies before the file's last change; None if it is none (RFC 9110 13.1.3: it is ignored)."""
    if date is None:
        return None
    import calendar
    from email.utils import parsedate  # all three forms of RFC 9110 5.6.7, which are all in UTC

    given = parsedate(date.decode("latin-1"))
    try:
        return None if given is None else calendar.timegm(given) < found.modified_s
    except (ValueError, OverflowError):  # no day of any calendar
        return None


_RANGE = re.compile(rb"bytes=[ \t]*(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))[ \t]*", re.IGNORECASE)


def parse_range(value: bytes, size: int) -> range | None:
    """Return the part of `size` bytes that a Range asks for, empty if there is none of it (416).

    None: the whole, for what is no single range of bytes; a server may ignore any Range (RFC 9110 14.2).  That of an
    empty file is ignored as in Go: there are clients that always send one.
    """
    found = _RANGE.fullmatch(value)
    if found is None or not size:
        return None
    if found[3] is not None:
        return range(max(size - int(found[3]), 0), size)
    first, last = int(found[1]), int(found[2]) if found[2] else None
    if last is None or last >= size:
        return range(min(first, size), size)
    return None if last < first else range(first, last + 1)


MODES: Mapping[str, Callable[[Settings, ModeParts], Mode]] = {
    "serializing": Serializing,
    "streaming": Streaming,
    "http": Http,
    "static": Static,
}


def output_response(status: int, headers: Headers, prefix: bytes, output: Output, offset: int = 0) -> Response:
    """Return a response of `prefix` and a process's output after `offset`, from memory or from its file."""
    if output.file is None:
        return Response(status, headers, prefix + output.in_memory()[offset:])
    length = len(prefix) + output.bytes_count - offset
    return Response(status, headers, FileBody(prefix, output.file, offset), length)


def log_prefix(settings: Settings, call_id: str | None) -> str:
    """Return what stands before each line of a call, or, without an id, of a process that waits for one."""
    return f"[{call_id or 'none'}] " if settings.log_callid else ""


def log_line(settings: Settings, stream: str, prefix: str, line: str) -> None:
    """Log a line that a function wrote on `stream`, which says so unless the operator wants it as it is."""
    if settings.prefix_logs:
        log.info(f"{prefix}{stream}: {line}")
    else:
        log.raw(prefix + line)


class CallLog:
    """What the log says of one call: a line at its start, one at its end whatever the outcome."""

    def __init__(self, request: Request, settings: Settings) -> None:
        self.process: Process | None = None
        self._request = request
        self._settings = settings
        self._call_id = call_id_of(request)
        self._prefix = log_prefix(settings, self._call_id)
        self._started_s = time.perf_counter()

    def elapsed_s(self) -> float:
        """Return the seconds since the request came."""
        return time.perf_counter() - self._started_s

    def duration_field(self) -> Header:
        """Return the same as a header field."""
        return b"X-Duration-Seconds", b"%f" % self.elapsed_s()

    def begins(self, text: str = "") -> None:
        """The function is about to get the request; `text` says how, if that is worth a line."""
        if self._settings.debug_headers:
            self._headers("in", self._request.headers)
        if text:
            log.info(self._prefix + text)

    def shows_output(self, start: bytes) -> None:
        """The output cannot be used as it begins."""
        line = start.partition(b"\n")[0][:SNIFF_BYTES].decode(errors="backslashreplace")
        log.error(f"{self._prefix}the output begins with: {line}")

    def on_stderr(self, line: str) -> None:
        """The process wrote a line on stderr, which does not join the response."""
        log_line(self._settings, "stderr", self._prefix, line)

    def ended(self, response: Response, result: ProcessResult) -> None:
        """The process ended by itself."""
        if self._settings.write_debug:
            log.info(self._prefix + "Out=" + result.output.head().decode(errors="backslashreplace"))
        self.sent(response, result.output.bytes_count, result.duration_s)

    def sent(self, response: Response, bytes_count: int, duration_s: float | None = None) -> None:
        """The answer is whole."""
        if self._settings.debug_headers:
            self._headers("out", response.headers)
        duration_s = self.elapsed_s() if duration_s is None else duration_s
        self._line(f"Wrote {bytes_count} Bytes - Duration: {duration_s:f}s", response.status)

    def failed(self, error: FaashoundError) -> None:
        """The request was refused, or its process could not begin, was killed, or has ended badly."""
        is_killed = self.process is not None and self.process.state is ProcessState.KILLED
        killed = f"Killed process: {shlex.join(self._settings.fprocess)}: " if is_killed else ""
        text = "deadline" if isinstance(error, DeadlineReached) else str(error)
        self._line(f"{killed}{text} - Duration: {self.elapsed_s():f}s", error.status)

    def watched(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Return `body`, or with write_debug one that logs what passes."""
        return self._echoed(body) if self._settings.write_debug else body

    async def _echoed(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in body:
            log.info(self._prefix + "In=" + chunk[:SNIFF_BYTES].decode(errors="backslashreplace"))
            yield chunk

    def _line(self, text: str, status: int) -> None:
        fields: dict[str, object] = {"status": status, "method": self._request.method}
        if self._settings.mode not in PER_REQUEST:
            fields["path"] = self._request.path.decode()
        if self.process is not None:
            fields |= {"pid": self.process.pid, "exit": self.process.describe()}
            fields |= {"in": self.process.stdin.bytes_count, "out": self.process.stdout.output.bytes_count}
        if self._call_id is not None:
            fields["call_id"] = self._call_id
        log.info(self._prefix + text, **fields)

    def _headers(self, direction: str, headers: Headers) -> None:
        for name, value in headers:
            shown = "(hidden)" if is_secret_field(name.lower()) else value.decode("latin-1")
            log.info(f"{self._prefix}[{direction}] {canonical_name(name).decode()}={shown}")


# ---------------------------------------------------------------------------------------------------------------
# Lifecycle: sockets, guard, signals, drain, exit status.
#
# SIGTERM (or SIGINT): unhealthy at once and the lock file removed, so that proxies and orchestrators route elsewhere;
# after healthcheck_interval no more connections are accepted and what is in flight may finish, bounded by the larger
# of exec_timeout and write_timeout; if it did, what waits for a request or is being killed may have its term_grace.
# Another signal ends everything at once.  SIGINT, which a person sends, does not wait for health checks.  The exit
# status is 0 when every call had its answer, 1 when some were cut.
# ---------------------------------------------------------------------------------------------------------------


def open_sockets(
    host: str | None, port: int, environ: Mapping[str, str], setting_name: str = "port"
) -> list[socket.socket]:
    """Return the sockets to listen on: those of socket activation (sd_listen_fds(3)) if given, else new ones.

    LISTEN_PID, if set, must be our own number; a parent that cannot know it leaves it out.  Raises CannotStart.
    """
    if environ.get("LISTEN_FDS") and environ.get("LISTEN_PID", str(os.getpid())) == str(os.getpid()):
        return _inherited_sockets(environ["LISTEN_FDS"])
    try:
        if host in (None, "::"):  # as in Go, for which `[::]` is IPv4 as well
            return [_listen_everywhere(port)]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        once = dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found)  # /etc/hosts may repeat itself
        return [_listen(family, sockaddr) for family, sockaddr in once]
    except (OSError, UnicodeError) as error:
        place = f"port {port} ({setting_name}) of {host or 'all interfaces'} (host)"
        raise CannotStart(f"cannot listen on {place}: {_strerror(error)}") from None


def _inherited_sockets(count_text: str) -> list[socket.socket]:
    try:
        fds = range(3, 3 + parse_positive_count(count_text))  # SD_LISTEN_FDS_START
        if len(fds) > MAX_LISTEN_FDS_COUNT:
            raise ValueError(f"allowed: up to {MAX_LISTEN_FDS_COUNT}")
        sockets = [socket.socket(fileno=fd) for fd in fds]
        if not all(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in sockets):
            raise ValueError("they do not listen")
    except (ValueError, OSError) as error:
        raise CannotStart(
            f"LISTEN_FDS={count_text!r}: the sockets from descriptor 3 on cannot be used: {reason_of(error)}"
        ) from None
    for fd in fds:
        os.set_inheritable(fd, False)  # or each function would hold our port
    return sockets


def _listen_everywhere(port: int) -> socket.socket:
    """Return a socket for IPv6 and IPv4, or for IPv4 alone where the kernel has no IPv6."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("0.0.0.0", port), backlog=BACKLOG)  # noqa: S104 - what "all interfaces" means


def _listen(family: socket.AddressFamily, sockaddr: Any) -> socket.socket:
    return socket.create_server(sockaddr, family=family, backlog=BACKLOG)  # whole: fe80:: means nothing without scope


def describe_socket(sock: socket.socket) -> str:
    """Return the port of a TCP socket, or the path of a Unix one."""
    name = sock.getsockname()
    return str(name[1]) if isinstance(name, tuple) else os.fsdecode(name)


class Hooks:
    """What a program does as its worker processes come and go, in gunicorn's words.  Here: nothing."""

    def post_fork(self) -> None:
        """Runs in a worker process that was just forked."""

    def child_start(self, pid: int) -> None:
        """Runs in the supervisor: it has forked a worker process."""

    def child_exit(self, index: int, pid: int) -> None:
        """Runs in the supervisor: it has reaped a worker process."""

    def foreign_exit(self, pid: int) -> None:
        """Runs in the supervisor: it has reaped a child that is no worker process."""


class Guard(Hooks):
    """A forked process that waits for our end, however it comes, and then kills what our calls have left.

    It reads a parent-death pipe, whose other end only we hold.  The first is forked before there is any thread; one
    that has been killed is replaced (its own code calls nothing that a thread could have locked).
    `roots` has a table for each worker process, of the roots of its calls, and a last one of the worker processes.
    """

    def __init__(self, workers_count: int = 1) -> None:
        self.instance = os.urandom(8).hex().encode()
        self.roots = tuple(RootTable() for _ in range(workers_count + 1))
        self._held_fd = -1
        self.pid = self._fork()

    def mark_of(self, index: int) -> bytes:
        """Return what the marks of a worker process's calls begin with."""
        return b"%s.%d" % (self.instance, index)

    def _fork(self) -> int:
        watched, held = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            self._watch(watched)
        os.close(watched)
        self._release_pipe()
        self._held_fd = held
        return pid

    def post_fork(self) -> None:
        """Hold the pipe no longer: the end of a worker process means nothing to the guard."""
        self._release_pipe()

    def _release_pipe(self) -> None:
        if self._held_fd >= 0:
            os.close(self._held_fd)
        self._held_fd = -1

    def _watch(self, watched: int) -> NoReturn:
        try:
            os.setsid()  # a Ctrl-C is for the watchdog
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            _list_processes()  # loads what it takes while there is time
            for fd in open_descriptors():  # not up to SC_OPEN_MAX, which may be 10^9 (musl, an old glibc)
                if fd != watched:
                    with suppress(OSError):
                        os.close(fd)
            os.read(watched, 1)
            kill_left(self.instance + b".", frozenset().union(*(table.pids() for table in self.roots)))
        finally:
            os._exit(0)

    def keep(self, reaper: Reaper) -> None:
        """Have the reaper tell of its end, and replace it then."""
        reaper.ignore(self.pid, partial(self._replace, reaper))

    def _replace(self, reaper: Reaper) -> None:
        self.foreign_exit(self.pid)
        self.keep(reaper)

    def foreign_exit(self, pid: int) -> None:
        """If it is the guard that was killed: start a new one."""
        if pid == self.pid:
            log.error("the guard was killed; a new one is started", pid=pid)
            self.pid = self._fork()

    def child_start(self, pid: int) -> None:
        """Have the guard know of a worker process, which leads a session."""
        self.roots[-1].add(pid)

    def child_exit(self, index: int, pid: int) -> None:
        """Kill what a worker process has left, before another takes its slot."""
        self.roots[-1].remove(pid)
        kill_left(self.mark_of(index) + b".", self.roots[index].pids())
        self.roots[index].clear()


def _list_processes() -> list[int]:
    import psutil  # the guard loads it beside us while we start

    return psutil.pids()


def kill_left(mark_prefix: bytes, sessions: frozenset[int]) -> None:
    """Kill every process that has one of our marks or belongs to one of `sessions`, until two looks find none."""
    is_left = partial(_is_left, mark_prefix=mark_prefix, sessions=sessions)
    stopped: set[int] = set()
    for _ in _guard_looks(FREEZE_LIMIT_S):  # see `Sweeper._freeze`
        found = [pid for pid in _list_processes() if pid not in stopped and is_left(pid)]
        for pid in found:
            signal_if(pid, signal.SIGSTOP, is_left)
        stopped.update(found)
        if not found:
            break
    empty_count = 0
    for _ in _guard_looks(SWEEP_LIMIT_S):
        found = [pid for pid in _list_processes() if is_left(pid)]
        for pid in found:
            signal_if(pid, signal.SIGKILL, is_left)
        empty_count = 0 if found else empty_count + 1
        if empty_count == 2:
            break
        time.sleep(0.005)


def _guard_looks(limit_s: float) -> Iterator[int]:
    """Yield the numbers of looks from 0 on, for `limit_s` seconds and GUARD_LOOKS_COUNT looks, both."""
    end_s, number = time.monotonic() + limit_s, 0
    while number < GUARD_LOOKS_COUNT or time.monotonic() < end_s:
        yield number
        number += 1


def _is_left(pid: int, mark_prefix: bytes, sessions: frozenset[int]) -> bool:
    try:
        if os.getsid(pid) not in sessions:
            return (_read_mark(pid) or b"").startswith(mark_prefix)
        return _read_stat(pid)[0] != b"Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:  # hidden, see `_UNREADABLE`; perhaps we may signal it all the same
        return True


def open_descriptors() -> list[int]:
    """Return the descriptors that are open in this process, and that of the listing, which is closed again."""
    return list(map(int, os.listdir("/proc/self/fd")))


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Counts the requests to stop: the first asks for a drain, the second for an end at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.by_hand = False
        loop.add_signal_handler(signal.SIGTERM, self._on_signal, signal.SIGTERM)
        loop.add_signal_handler(signal.SIGINT, self._on_signal, signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a supervisor's worker process blocks them until here

    def _on_signal(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.second.set()
            return
        self.by_hand = number == signal.SIGINT
        log.info(f"{number.name}: draining; once more to stop at once")
        self.first.set()

    def stop_now(self) -> None:
        """Stop as if both signals had come: the process that started us has gone."""
        self.first.set()
        self.second.set()


LIFELINE_FD = "FAASHOUND_LIFELINE_FD"  # the variable that has the number of the parent-death pipe


def parent_death_fd(environ: Mapping[str, str]) -> int | None:
    """Return the read end of the pipe that tells of our parent's end; None if the parent gave us none.

    The parent alone holds the write end, and never writes: when it ends, whatever way, the kernel closes it.
    """
    if LIFELINE_FD not in environ:
        return None
    fd = int(environ[LIFELINE_FD])
    os.set_inheritable(fd, False)
    return fd


def watch_parent_death(loop: asyncio.AbstractEventLoop, fd: int | None, on_end: Callable[[], None]) -> None:
    """Call `on_end` when a parent-death pipe, if there is one, is at its end."""
    if fd is None:
        return

    def on_readable() -> None:
        loop.remove_reader(fd)
        on_end()

    loop.add_reader(fd, on_readable)


# A variable of the function that must not be its watchdog's, since it would change our interpreter (PYTHONHOME,
# LD_PRELOAD), comes behind this prefix.  What else begins like it is between our programs.
FUNCTION_VARIABLE = "FAASHOUND_FUNCTION_"
OUR_PREFIX = "FAASHOUND_"

# What systemd means for the process that it has started, and for no child of it (sd_notify(3), sd_listen_fds(3),
# systemd.exec(5)): a function must not report for us, nor read our credentials.
_SYSTEMD_ONLY = ("LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY")

# Settings that are no secret of ours, and by which OpenFaaS' own templates (Go's, for one) set their time limits.
_TOLD_FUNCTIONS = frozenset(("read_timeout", "write_timeout", "exec_timeout", "healthcheck_interval"))


def function_environment(environ: Mapping[str, str], user: Identity | None = None) -> dict[bytes, bytes]:
    """Return the environment that functions start from: ours without what was meant for us alone, and what is theirs.

    As another user they have that user's HOME, USER and LOGNAME, or none.

    LC_CTYPE is left out if it came with our interpreter, which sets it in a bare environment (PEP 538).
    """
    with open("/proc/self/environ", "rb") as file:
        coerced = "LC_CTYPE" in os.environ and not re.search(rb"(?:^|\0)LC_CTYPE=", file.read())
    left_out = setting_names(Settings) - _TOLD_FUNCTIONS | ({"LC_CTYPE"} if coerced else set())
    if user is not None:
        left_out |= {"HOME", "USER", "LOGNAME"}
    private = (OUR_PREFIX, *_SYSTEMD_ONLY)
    theirs = {name: value for name, value in environ.items() if name not in left_out and not name.startswith(private)}
    if user is not None:
        theirs |= user.variables
    for name, value in environ.items():
        if name.startswith(FUNCTION_VARIABLE):
            theirs[name.removeprefix(FUNCTION_VARIABLE)] = value
    return {os.fsencode(name): os.fsencode(value) for name, value in theirs.items()}


class WorkerContext(NamedTuple):
    """What a process that serves is given: its slot, its parent-death pipe, what to call once it serves or stops."""

    slot: Slot
    parent_death_fd: int | None
    on_serving: Callable[[], None] = lambda: None
    on_stopping: Callable[[], None] = lambda: None


class ListenSockets(NamedTuple):
    """The listening sockets of a program: its own, and those of /metrics."""

    own: Sequence[socket.socket]
    metrics: Sequence[socket.socket]

    def close(self) -> None:
        """Hold them open no longer in this process."""
        for sock in (*self.own, *self.metrics):
            sock.close()

    def announce(self) -> None:
        """Log where one can connect, once connections are accepted."""
        for sock in self.own:
            log.info(f"Listening on port: {describe_socket(sock)}")
        for sock in self.metrics:
            log.info(f"Metrics on port: {describe_socket(sock)}")


def bind_sockets(host: str | None, port: int, metrics_port: int, environ: Mapping[str, str]) -> ListenSockets:
    """Bind all sockets of a program; metrics_port 0: none for /metrics.  Raises CannotStart."""
    own = open_sockets(host, port, environ)
    return ListenSockets(own, bind_metrics_sockets(host, metrics_port))


def bind_metrics_sockets(host: str | None, port: int) -> list[socket.socket]:
    """Return the sockets of /metrics, none for port 0.  Raises CannotStart."""
    return open_sockets(host, port, {}, "metrics_port") if port else []


class Program(NamedTuple):
    """What worker processes run: `run`, which returns the exit status, on `sockets`, with `hooks`.

    In the process that was started, `on_serving` is called once, as soon as all of them accept connections, and
    `on_stopping` each time that it is told to stop.  They get the signals `passed_on` as well, which they find blocked
    and at their default.
    """

    run: Callable[[WorkerContext], int]
    sockets: ListenSockets
    on_serving: Callable[[], None]
    hooks: Hooks = Hooks()
    passed_on: Sequence[signal.Signals] = ()
    on_stopping: Callable[[], None] = lambda: None


class WorkerProcess:
    """One of a supervisor's worker processes, through all its lives; `pid` is 0 between two."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pid = 0
        self.due_s = 0.0
        self._delay_s: float | None = None
        self._started_s = 0.0

    def on_start(self, pid: int) -> None:
        """It has been forked."""
        self.pid, self._started_s = pid, time.monotonic()

    def on_exit(self, status: int) -> float:
        """It has ended, or could not be forked: return the seconds until its next start."""
        now_s, self.pid = time.monotonic(), 0
        self._delay_s = next_restart_s(self._delay_s, now_s - self._started_s, status)
        self.due_s = now_s + self._delay_s
        return self._delay_s


class Supervisor:
    """Runs a program in several worker processes that share its sockets, and replaces those that die.

    This process (gunicorn's arbiter) serves nothing: it has neither a loop nor a thread, so it can fork at any time.
    It passes on the signals that it gets, and ends when the last worker process has.  Each of those leads a session of
    its own (a terminal's Ctrl-C is for us), reads a parent-death pipe, and writes to the status pipe when its slot has
    changed.
    """

    def __init__(self, scoreboard: Scoreboard, program: Program) -> None:
        self._scoreboard = scoreboard
        self._program = program
        self._workers = [WorkerProcess(index) for index in range(scoreboard.workers_count)]
        self._announced = self._stopping = False
        self._status = 0
        self._death_fd, self._death_end_fd = os.pipe2(os.O_CLOEXEC)
        self._status_fd, self._status_end_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signal_fd = open_signalfd(signal.SIGCHLD, *STOP_SIGNALS, *program.passed_on)

    def run(self, parent_death: int | None) -> int:
        """Run until all worker processes have ended; return the worst of their exit statuses."""
        become_subreaper()  # what a worker process that dies leaves behind comes to us
        on_ready = {self._signal_fd: self._on_signal, self._status_fd: self._on_status_change}
        poller = select.poll()
        for fd in (*on_ready, *([] if parent_death is None else [parent_death])):
            poller.register(fd, select.POLLIN)
        while True:
            self._start_due()
            if self._stopping and not any(worker.pid for worker in self._workers):
                return self._status
            for fd, _ in poller.poll(self._poll_timeout_ms()):
                if fd == parent_death:
                    poller.unregister(fd)
                    self._stop(*STOP_SIGNALS)
                else:
                    on_ready[fd]()

    def _poll_timeout_ms(self) -> float | None:
        dues_s = [worker.due_s for worker in self._workers if not worker.pid and not self._stopping]
        return max(0.0, min(dues_s) - time.monotonic()) * 1000 if dues_s else None

    def _start_due(self) -> None:
        for worker in self._workers:
            if not self._stopping and not worker.pid and worker.due_s <= time.monotonic():
                self._start(worker)

    def _start(self, worker: WorkerProcess) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            log.error(f"worker {worker.index} cannot be started: {_strerror(error)}; again in {worker.on_exit(1):g} s")
            return
        if pid == 0:
            self._run_worker(worker)
        worker.on_start(pid)
        self._program.hooks.child_start(pid)

    def _run_worker(self, worker: WorkerProcess) -> NoReturn:
        """Run the program in a process that was just forked, and exit: nothing of the supervisor may run in it."""
        status = 1
        try:
            os.setsid()
            self._program.hooks.post_fork()
            for fd in (self._death_end_fd, self._status_fd, self._signal_fd):
                os.close(fd)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
            slot = Slot(self._scoreboard, worker.index, self._report_change)
            status = self._program.run(WorkerContext(slot, self._death_fd))
        except FaashoundError as error:
            log.error(str(error))
        except Exception:
            log.exception("a worker failed")
        finally:
            log.flush()
            os._exit(status)

    def _report_change(self) -> None:
        """Have the supervisor look at the scoreboard, if it is still there."""
        with suppress(BrokenPipeError):
            os.write(self._status_end_fd, b".")

    def _on_status_change(self) -> None:
        os.read(self._status_fd, MAX_WORKERS_COUNT)
        if not self._announced and all(self._scoreboard.serving):
            self._announced = True
            self._program.on_serving()
            log.info(f"Workers: {len(self._workers)}")
        if self._stopping and not any(self._scoreboard.serving):
            self._program.sockets.close()  # or a connection would wait for ever in a backlog that is not accepted from

    def _on_signal(self) -> None:
        siginfo = os.read(self._signal_fd, _SIGINFO_BYTES)
        number = signal.Signals(int.from_bytes(siginfo[:4], sys.byteorder))  # ssi_signo of signalfd(2)
        if number in self._program.passed_on:
            self._pass_on(number)
            return
        if number != signal.SIGCHLD:
            # Two, for one that has not had the first yet: of those that wait, the kernel keeps one of each number.
            self._stop(*(STOP_SIGNALS if self._stopping else (number,)))
            return
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self._on_exit(*found)

    def _on_exit(self, pid: int, status: int) -> None:
        worker = next((each for each in self._workers if each.pid == pid), None)
        if worker is None:
            self._program.hooks.foreign_exit(pid)
            return
        self._program.hooks.child_exit(worker.index, pid)
        code = os.waitstatus_to_exitcode(status)
        was_serving, delay_s = self._scoreboard.serving[worker.index], worker.on_exit(code)
        self._scoreboard.clear(worker.index)
        self._report_change()
        if self._stopping:
            self._status = max(self._status, abs(code) and 1)
        elif code > 0 and not was_serving and not self._announced:  # it has said why it cannot start, and would again
            self._status = code
            self._stop(*STOP_SIGNALS)
        else:
            text = f"worker {worker.index} died ({describe_exit(status)}), and its calls with it"
            log.error(f"{text}; next start in {delay_s:g} s")

    def _stop(self, *numbers: signal.Signals) -> None:
        self._stopping = True
        self._pass_on(*numbers)
        self._program.on_stopping()

    def _pass_on(self, *numbers: signal.Signals) -> None:
        for worker in self._workers:
            for number in numbers:
                if worker.pid:
                    os.kill(worker.pid, number)


def run_workers(count: int, program: Program, environ: Mapping[str, str]) -> int:
    """Run a program in this process, or in `count` worker processes under a supervisor; return the exit status."""
    gc.freeze()
    parent_death, scoreboard = parent_death_fd(environ), Scoreboard(count)
    if count == 1:
        return program.run(WorkerContext(Slot(scoreboard), parent_death, program.on_serving, program.on_stopping))
    log.share()
    return Supervisor(scoreboard, program).run(parent_death)


async def serve(
    settings: Settings, environ: Mapping[str, str], sockets: ListenSockets, guard: Guard, context: WorkerContext
) -> int:
    """Serve until told to stop; return the exit status."""
    loop, slot = asyncio.get_running_loop(), context.slot
    signals = Signals(loop)
    watch_parent_death(loop, context.parent_death_fd, signals.stop_now)
    reaper = Reaper(loop, guard.roots[slot.index])
    if slot.is_alone:
        guard.keep(reaper)
    mark = guard.mark_of(slot.index)
    sweeper = Sweeper(reaper)
    spawner = Spawner(sweeper, mark, settings, function_environment(environ, settings.user))
    with ExitStack() as cleanup:
        cleanup.callback(reaper.close)
        on_stderr = (
            None if settings.combine_output else partial(log_line, settings, "stderr", log_prefix(settings, None))
        )
        pool = Pool(reaper, spawner, slot.share_of(settings.prewarm), on_stderr)
        cleanup.callback(pool.close)
        lock_path = None if settings.suppress_lock else lock_file_path(environ)
        mode = MODES[settings.mode](settings, ModeParts(slot, sweeper, spawner, pool, guard.roots[0]))
        mode.start()
        watchdog = Watchdog(settings, mode, lock_path, slot)
        timeouts = ServerTimeouts(settings.read_timeout_s, settings.write_timeout_s, settings.read_timeout_s)
        limits = connection_limits(settings.max_connections, settings.max_connections_per_address, 4, slot)
        server = Server(watchdog, timeouts, watchdog.on_refused, slot, limits)
        metrics_server = start_metrics(sockets.metrics, partial(serve_metrics, watchdog.metrics))
        for sock in sockets.own:
            server.listen(sock)
        context.on_serving()
        await signals.first.wait()
        watchdog.accepting = False
        context.on_stopping()
        status = await drain(settings, signals, server, drain_limit_s(settings, environ))
        metrics_server.stop_accepting()
        await mode.stop(signals.second)
        pool.close()
        if not status:  # else the time for a stop is over already
            await finished_first(sweeper.tidied_up(), signals.second.wait())
        await sweeper.end_all()
        metrics_server.abort()
    return status


def drain_limit_s(settings: Settings, environ: Mapping[str, str]) -> float:
    """Return how long calls may go on after SIGTERM: as `exec_timeout` lets them, and `write_timeout` at least.

    Where that is no limit, a parent that has given us a parent-death pipe sets one: it closes the pipe.
    """
    if settings.exec_timeout_s == 0 and LIFELINE_FD in environ:
        return LONGEST_DURATION_S
    buffers_s = settings.read_timeout_s if settings.http_buffer_req_body else 0.0  # before exec_timeout begins
    return max(buffers_s + settings.exec_timeout_s, settings.write_timeout_s)


async def drain(settings: Settings, signals: Signals, server: Server, limit_s: float) -> int:
    """Go from unhealthy to ended; return 0 if nothing was cut."""
    interval_s = settings.healthcheck_interval_s
    if interval_s is None:
        interval_s = min(5.0, settings.write_timeout_s)
    if not signals.by_hand:
        await finished_first(asyncio.sleep(interval_s), signals.second.wait())
    return await drain_server(server, signals, 0.0 if signals.second.is_set() else limit_s)


async def drain_server(server: Server, signals: Signals, limit_s: float) -> int:
    """Stop accepting, let what is in flight finish within `limit_s` or until the second signal, give up the rest.

    Returns 0 if nothing was given up but connections that had switched to another protocol, else 1: the exit status.
    """
    server.stop_accepting()
    log.info(f"No new connections allowed, draining: {server.busy_count} requests")
    await finished_first(server.drained(time.monotonic() + limit_s), signals.second.wait())
    cut_count = sum(each.is_busy for each in server.unfinished())
    await server.give_up()
    log.info(f"Exiting. Active connections: {cut_count}")
    return 1 if cut_count else 0


def start_metrics(sockets: Iterable[socket.socket], handler: Handler) -> Server:
    """Serve `handler` on sockets of its own."""
    limits = ConnectionLimits(METRICS_CONNECTIONS_COUNT, METRICS_CONNECTIONS_COUNT)
    server = Server(handler, ServerTimeouts(10.0, 10.0, 60.0), limits=limits)
    for sock in sockets:
        server.listen(sock)
    return server


def settle_descriptors() -> None:
    """Make sure that 0, 1 and 2 are open, and that functions inherit nothing else from the process that started us.

    And have as many others as we may: the soft limit is for programs that use select(2).
    First of all in each program: a socket that got the number 2 would be sent the log, and libuv aborts when it gets
    one of these numbers for itself.
    """
    soft, hard = DESCRIPTOR_LIMITS
    wanted = MAX_DESCRIPTORS_COUNT if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS_COUNT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for fd in open_descriptors():
        if fd > 2:
            with suppress(OSError):  # the listing's own
                os.set_inheritable(fd, False)


def connection_limits(
    max_connections: int | None, per_address: int | None, descriptors_each: int, slot: Slot
) -> ConnectionLimits:
    """Return this process's part of what the operator allows, but no more than it has descriptors for.

    `descriptors_each` is what a connection takes with all that is done for it.  Without a word from the operator, one
    address gets three quarters: a proxy in front of us is one, and a stranger must leave room for others.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = MAX_CONNECTIONS_COUNT
    if soft != resource.RLIM_INFINITY:
        room = max((soft - KEPT_BACK_COUNT) // descriptors_each, 1)
    wanted = slot.share_of(max_connections) if max_connections else MAX_CONNECTIONS_COUNT
    total = min(wanted, room)
    if max_connections and total < wanted and slot.is_first:
        allowed = f"{soft} descriptors (LimitNOFILE, ulimit -n) allow {total}"
        log.warning(f"max_connections={max_connections} is too much: in one process {allowed}")
    each = slot.share_of(per_address) if per_address else max(total * 3 // 4, 1)
    total_source = _limit_source("max_connections", max_connections, slot)
    return ConnectionLimits(total, each, total_source, _limit_source("max_connections_per_address", per_address, slot))


def _limit_source(name: str, count: int | None, slot: Slot) -> str:
    """Return what a refusal says of the setting of a limit of this process: what the operator set was for them all."""
    if slot.is_alone:
        return name
    workers_count = slot.scoreboard.workers_count
    return f"{name}={count}, divided among {workers_count} workers" if count else f"{name}, of each worker"


def with_chosen_port(settings: Settings, environ: Mapping[str, str]) -> tuple[Settings, Mapping[str, str]]:
    """Return both with a port for the server of mode=http, if that is for us to choose.  Raises CannotStart."""
    url = settings.upstream_url
    if url is None or url.port != CHOSEN_PORT:
        return settings, environ
    port = free_server_port(url.host)
    chosen = dataclasses.replace(settings, upstream_url=url._replace(port=port))
    return chosen, {**environ, FUNCTION_VARIABLE + "PORT": str(port)}


def free_server_port(host: str) -> int:
    """Return one of SERVER_PORTS that could be bound a moment ago.  Raises CannotStart."""
    reason = ""
    try:
        family, *_, (address, _, *scope) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        for _ in range(PORT_TRIES_COUNT):
            port = SERVER_PORTS[int.from_bytes(os.urandom(4)) % len(SERVER_PORTS)]
            try:
                with socket.socket(family) as probe:
                    probe.bind((address, port, *scope))
                return port
            except OSError as error:
                reason = _strerror(error)
    except (OSError, UnicodeError) as error:
        reason = _strerror(error)
    raise CannotStart(f"no port of {host} for the server (upstream_url): {reason}")


def lock_file_path(environ: Mapping[str, str]) -> str:
    """Return the path of the lock file, whose existence is what --run-healthcheck looks at.

    OpenFaaS's name for OpenFaaS's port, which probes know (`cat /tmp/.lock`); another port has a file of its own, or
    the first of two watchdogs that ended would make the other unhealthy.  It goes by the setting, since a health check
    has our environment and not our socket.
    """
    port = environ.get("port") or settings_table(Settings)["port"].default
    name = ".lock" if port in ("8080", "0") else f".lock.{port}"
    return os.path.join(environ.get("TMPDIR") or "/tmp", name)  # noqa: S108 - the name is OpenFaaS's


def create_lock_file(environ: Mapping[str, str]) -> str:
    """Create the lock file and return its path; raises CannotStart.

    $TMPDIR may be writable for others: nothing is followed, waited for (a FIFO) or taken over that is not ours.
    """
    path = lock_file_path(environ)
    log.info(f"Writing lock-file to: {path}")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o660)
        found = os.fstat(fd)
        os.close(fd)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else _strerror(error)
    else:
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            return path
        reason = "it is there already and no file of ours"
    raise CannotStart(f"cannot write {path}: {reason}; suppress_lock=true does without it")


def is_locked(path: str) -> bool:
    """Tell whether the lock file is there; a symbolic link or a FIFO is none."""
    with suppress(OSError):
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def remove_lock_file(path: str) -> None:
    """Remove the lock file if it is still there."""
    with suppress(FileNotFoundError):
        os.unlink(path)
        log.info(f"Removing lock-file: {path}")


def help_text(usage: str, purpose: str, kind: type) -> str:
    """Return what --help prints: usage, purpose, and the table of settings that `kind` declares."""
    return f"usage: {usage} [--version | --help]\n\n{purpose}\n\nEnvironment variables:\n\n{format_settings(kind)}\n"


PURPOSE = """Puts the program named by `fprocess` behind HTTP, one process per request or, with mode=http, one for all.
--run-healthcheck exits with 0 if the lock file is there, else with 1."""


class OutputFailed(FaashoundError):
    """Standard output does not take what was asked for; the text says why."""

    def __init__(self, cause: OSError | None) -> None:
        self.reader_has_left = isinstance(cause, BrokenPipeError)
        super().__init__(f"cannot write to standard output: {_strerror(cause) if cause else 'it is closed'}")


def write_out(text: str) -> None:
    """Write a line to standard output, at once; raises OutputFailed.

    Not print(): what that buffers fails when the interpreter ends, and then with a traceback.  And a descriptor 1 that
    was closed when we were started may be a file of ours by now: the interpreter knows.
    """
    if sys.stdout is None:
        raise OutputFailed(None)
    rest = memoryview(f"{text}\n".encode("utf-8", "backslashreplace"))
    try:
        while rest:
            rest = rest[os.write(1, rest) :]
    except OSError as error:
        raise OutputFailed(error) from None


def report_failure(error: FaashoundError) -> int:
    """Say on standard error why a command failed; return its exit status.

    A reader that has seen enough (`| head`) is no failure to speak of: the status is that of a death by SIGPIPE.
    """
    if isinstance(error, OutputFailed) and error.reader_has_left:
        return 128 + signal.SIGPIPE
    print(error, file=sys.stderr)
    return 1


def flag_answer(argv: Sequence[str], help_shown: str) -> int | None:
    """Do what a flag common to our programs asks and return the exit status; None if none was given."""
    if not argv:
        return None
    texts = {"--version": f"faashound {VERSION}", "--help": help_shown.rstrip("\n")}
    if len(argv) > 1 or argv[0] not in texts:
        print(f"unknown arguments: {' '.join(argv)}; see --help", file=sys.stderr)
        return 2
    try:
        write_out(texts[argv[0]])
    except OutputFailed as error:
        return report_failure(error)
    return 0


def read_file(path: str, meaning: str) -> str:
    """Return the text of a file that a setting names; CannotStart, naming path and meaning, if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = _strerror(error) if isinstance(error, OSError) else "not UTF-8"
        raise CannotStart(f"cannot read {path} ({meaning}): {reason}") from None


def run_healthcheck(environ: Mapping[str, str]) -> int:
    """Return 0 if the lock file is there, else 1 (the texts are OpenFaaS's)."""
    if is_locked(lock_file_path(environ)):
        return 0
    print("unable to find lock file.", file=sys.stderr)
    return 1


def log_origin(environ: Mapping[str, str]) -> str | None:
    """Return the name of the function that we serve, as people type it, for the log; None outside of OpenFaaS."""
    name, namespace = environ.get("OPENFAAS_NAME"), environ.get("OPENFAAS_NAMESPACE")
    return f"{name}.{namespace}" if name and namespace not in (None, "", "openfaas-fn") else name


def load_settings(kind: type[T], environ: Mapping[str, str]) -> T | None:
    """Return the settings, with the log set up and a warning for each look-alike; None, and a message, if bad."""
    try:
        settings = parse_settings(kind, environ)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return None
    log.configure(getattr(settings, "log_format", "text"), log_origin(environ))
    for warning in lookalikes(kind, environ):
        log.warning(warning)
    return settings


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the watchdog and return its exit status: 0 stopped, 1 failed or cut calls, 2 bad settings."""
    argv = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    settle_descriptors()
    if argv == ["--run-healthcheck"]:
        return run_healthcheck(environ)
    answer = flag_answer(argv, help_text("fwatchdog [--run-healthcheck]", PURPOSE, Settings))
    if answer is not None:
        return answer
    settings = load_settings(Settings, environ)
    if settings is None:
        return 2
    try:
        settings, environ = with_chosen_port(settings, environ)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # our parent may have blocked SIGCHLD or SIGTERM
        with ExitStack() as cleanup:
            sockets = bind_sockets(settings.host, settings.port, settings.metrics_port, environ)
            if not settings.suppress_lock:
                cleanup.callback(remove_lock_file, create_lock_file(environ))
            guard = Guard(settings.workers)

            def run(context: WorkerContext) -> int:
                return uvloop.run(serve(settings, environ, sockets, guard, context))

            program = Program(run, sockets, sockets.announce, guard, on_stopping=cleanup.close)
            return run_workers(settings.workers, program, environ)
    except CannotStart as error:
        log.error(str(error))
        return 1
    finally:
        log.flush()


if __name__ == "__main__":
    sys.exit(main())
