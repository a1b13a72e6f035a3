"""The functions of a gateway as they are at work: those run here behind sockets, those elsewhere as they stand.

    local = LocalFunctions(table, environ=os.environ, hidden=settings_names)
    local.open()                              # before any fork: sockets are there, `local.table` has every url
    local.start()                             # in the process that runs them, inside its loop
    await local.apply(new_table)              # what has changed, and nothing else: see below
    await local.put(function); await local.remove(name); await local.scale(name, 3)
    await local.stop(grace_s=30)

A function is at work in one version at a time (endpoint.py).  A changed one rolls: the new version is started on a
socket of its own, and when it is healthy the table names that socket; the old one finishes its calls and ends.  One
that does not get healthy leaves the old one serving.  Annotations and labels change without a restart.

`table` is one mapping that changes in place, between two turns of the loop: a reader sees all of a change or nothing.
Other processes of the gateway read the same from `published` (published.py).

Errors: NotHealthy, whose text is for the one that wanted the change; UnknownFunction.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..calls.names import FunctionName
from ..watchdog import FUNCTION_VARIABLE, FaashoundError, in_thread, log, reason_of
from .endpoint import Endpoint, NotHealthy
from .exposure import digest_token
from .forkserver import ForkServer
from .logs import SETTINGS, LogStore
from .published import PublishedTable, publish
from .runtime import open_runtime_directory
from .secrets import MOUNT_VARIABLE, SecretFiles
from .supervisor import ManagedProgram, Supervisor
from .table import RESERVED_PREFIXES, UNIX_PREFIX, WATCHDOG_ROWS, Function, watchdog_settings

_SHARED = ("log_format",)  # the gateway's holds for its watchdogs as well: their lines go to one stderr

ROLLS_COUNT = 4  # at once: each takes a processor for some milliseconds, and calls go on


class UnknownFunction(FaashoundError):
    """No function that is run here has this name."""

    status = 404


class BadScale(FaashoundError):
    """So many watchdogs cannot be had."""

    status = 400


@dataclass(frozen=True, slots=True)
class LocalStatus:
    """What is known of one local function.  `pids` are its watchdogs that run now; none while it is asleep.

    `wanted_count` is what the operator has asked for, or what it has when it is awake, or what its load wants;
    `available_count` what serves, or would as soon as a call comes.
    """

    pids: Sequence[int]
    restart_count: int
    path: Path
    wanted_count: int
    available_count: int


async def _nothing() -> None:
    """Commit nothing."""


class LocalFunctions:
    """Runs the local functions of `table` behind sockets of their own.

    `environ` is the gateway's own environment; the watchdogs get it without the variables named in `hidden` (the
    settings of the gateway and the worker, which are no business of theirs), without the watchdog's own settings
    (except for log_format), and without FAASHOUND_* and LISTEN_*.  `watchdog` is the command that serves a function;
    without one, a fork server has it ready.  Lines of functions go to `logs`, or to our stderr.  `on_change` is called
    after each change of the table.
    """

    def __init__(
        self,
        table: Mapping[FunctionName, Function],
        *,
        environ: Mapping[str, str],
        hidden: Collection[str] = (),
        watchdog: Sequence[str] | None = None,
        logs: LogStore | None = None,
    ) -> None:
        self.table: dict[FunctionName, Function] = dict(table)
        self.on_change: Callable[[], None] = lambda: None
        self.secrets: SecretFiles | None = None  # where functions find theirs
        self.token_of: Callable[[Function], bytes | None] = lambda function: None  # by which its callers are let in
        self.count_made: Callable[[FunctionName], int] = lambda name: 0  # calls that a function has got
        self._environ = environ
        self._watchdog = watchdog
        self._logs = logs
        self._base = {
            name: value
            for name, value in environ.items()
            if name in _SHARED or not (name in hidden or name in WATCHDOG_ROWS or name.startswith(RESERVED_PREFIXES))
        }
        self._endpoints: dict[FunctionName, Endpoint] = {}
        self._numbers = itertools.count(1)
        self.directory: Path  # for what is gone when we are; there after `open`
        self._fork_server: ForkServer | None = None
        self._supervisor: Supervisor | None = None
        self._open: set[Endpoint] = set()  # those in the table, those that are to be, and those that were
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._changing = asyncio.Lock()
        self._cleanup = contextlib.ExitStack()

    @property
    def published(self) -> PublishedTable:
        """The table as processes beside the one that runs the functions see it."""
        return PublishedTable(self.directory / "table")

    def open(self) -> None:
        """Open every socket; from then on `table` has the url of each local function.

        Call it once; `stop` must follow, or `close`.  Raises OSError, with nothing left open.
        """
        self._opener_pid = os.getpid()
        with contextlib.ExitStack() as stack:
            self.directory = stack.enter_context(open_runtime_directory(self._environ))
            for name, function in self.table.items():
                if function.local:
                    self._endpoints[name] = endpoint = self._new_endpoint(function)
                    endpoint.open()
                    stack.callback(endpoint.close_socket)
                    self._open.add(endpoint)
            self._cleanup = stack.pop_all()
        self._set_table(self.table)

    def start(self) -> None:
        """Start what is to be there before a call, and watch for calls; once, after `open`, inside the running loop.

        A process that takes the place of another publishes nothing by this: until its first change of the table, those
        beside it know the functions of the one before it, which are as good as there.
        """
        if self._watchdog is None:
            self._fork_server = ForkServer(self._base)
            self._fork_server.start()
        self._supervisor = Supervisor(self._fork_server)
        for endpoint in self._endpoints.values():
            endpoint.start(self._supervisor)

    def path(self, name: FunctionName) -> Path:
        """Return the socket of a local function; KeyError for any other name."""
        return self._endpoints[name].path

    def status(self) -> dict[FunctionName, LocalStatus]:
        """Return what is known of each local function, by its whole name."""
        return {name: _status_of(endpoint) for name, endpoint in self._endpoints.items()}

    async def stop(self, grace_s: float) -> None:
        """End every watchdog: SIGTERM, and after `grace_s` seconds what is left is killed, its functions with it."""
        self._is_stopping = True
        for endpoint in self._open:
            endpoint.stop_watching()
        for task in self._retiring:
            task.cancel()
        if self._supervisor is not None:
            await self._supervisor.stop(grace_s)
        if self._fork_server is not None:
            await self._fork_server.stop()
        for endpoint in list(self._open):
            await endpoint.ended()
        self.close()

    def close(self) -> None:
        """Close the sockets and remove the directory, as `stop` does, where it did not come to `start`.  Repeatable.

        A process that was forked after `open` leaves them as they are: another one takes its place.
        """
        if os.getpid() != self._opener_pid:
            for endpoint in self._open:
                endpoint.close_log()
            return
        for endpoint in self._open:
            endpoint.close_socket()
        self._open.clear()
        self._cleanup.close()

    # Changes.

    async def apply(self, table: Mapping[FunctionName, Function]) -> list[str]:
        """Make `table` the one in force: new functions are there, others gone, changed ones rolled.

        A function that does not change keeps its processes.  One whose new version does not get healthy keeps the old
        version; the log says why.  So does one for whose new version the machine has no descriptors or no room: those
        are returned, a text for each, since they are worth another try.  Annotations, which say whom a function is
        for, hold at once, whichever version serves.  Raises OSError: nothing has changed.
        """
        async with self._changing:
            rolling = [function for function in table.values() if self._is_other_version(function)]
            kept = {function.name: with_annotations(self.table[function.name], function) for function in rolling}
            added = self._add_all([function for function in table.values() if self._is_new(function)])
            gone = [name for name in self._endpoints if name not in table or not table[name].local]
            changes = dict.fromkeys(gone) | {endpoint.function.name: endpoint for endpoint in added}
            self._serve_by(changes, {**table, **kept})
            limit = asyncio.Semaphore(ROLLS_COUNT)
            found = await asyncio.gather(*(self._roll_or_tell(function, limit) for function in rolling))
            await self._prune_logs()
            return [text for text in found if text]

    async def put(self, function: Function, commit: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Have `function`, new or in a new version; return when a call works, raise NotHealthy if none does.

        `commit` is awaited when the version is known to work, before it serves; what it raises is raised, and nothing
        has changed.
        """
        async with self._changing:
            if function.local and not self._same_program(function):
                await self._roll(function, commit)
            else:
                await commit()
                self._set_table({**self.table, function.name: function})

    async def remove(self, name: FunctionName) -> None:
        """Have no function of this name any more; its calls finish.  Raises UnknownFunction."""
        async with self._changing:
            if name not in self.table:
                raise UnknownFunction(f"there is no function {name.short}")
            left = {each: function for each, function in self.table.items() if each != name}
            self._serve_by({name: None} if name in self._endpoints else {}, left)
            await self._prune_logs()

    async def scale(self, name: FunctionName, count: int) -> None:
        """Have `count` watchdogs for a function; 0: none, until a call comes.  Raises UnknownFunction, BadScale."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            raise UnknownFunction(f"no function that is run here is called {name.short}")
        if not 0 <= count <= endpoint.scale.max_count:
            raise BadScale(f"replicas: {count}; allowed: 0 to {endpoint.scale.max_count} (com.openfaas.scale.max)")
        endpoint.set_count(count)

    async def _prune_logs(self) -> None:
        """Keep the lines of functions that are no more within bounds; no function is made meanwhile.

        What the disk has against it is only logged: the table is another by now.
        """
        if self._logs is not None:
            try:
                await in_thread(self._logs.prune, set(self.table))
            except OSError as error:
                log.warning(f"lines of functions that are no more are not looked through: {reason_of(error)}")

    def serves(self, function: Function) -> bool:
        """Tell whether this version of a function is the one that serves."""
        return not function.local or self._same_program(function)

    def _is_new(self, function: Function) -> bool:
        return function.local and function.name not in self._endpoints

    def _is_other_version(self, function: Function) -> bool:
        return function.local and function.name in self._endpoints and not self._same_program(function)

    def _same_program(self, function: Function) -> bool:
        """Whether what runs for a function is what its new table wants to run."""
        endpoint = self._endpoints.get(function.name)
        return endpoint is not None and _runs(endpoint.function) == _runs(function)

    def _new_endpoint(self, function: Function) -> Endpoint:
        path = self.directory / f"{os.getpid()}.{next(self._numbers)}"
        program_of = partial(self._program, path.name)
        return Endpoint(function, path, program_of, self._logs, lambda name: self.count_made(name))

    def _add(self, function: Function) -> Endpoint:
        endpoint = self._new_endpoint(function)
        endpoint.open()
        self._open.add(endpoint)
        if self._supervisor is not None:
            endpoint.start(self._supervisor)
        return endpoint

    def _add_all(self, functions: Sequence[Function]) -> list[Endpoint]:
        """Add each of `functions`, or none; raises OSError."""
        added: list[Endpoint] = []
        with contextlib.ExitStack() as stack:
            for function in functions:
                added.append(self._add(function))
                stack.callback(self._retire, added[-1])
            stack.pop_all()
        return added

    async def _roll_or_tell(self, function: Function, limit: asyncio.Semaphore) -> str:
        """Let a new version take over, or log why it does not; return why that is worth another try, if it is."""
        async with limit:
            try:
                await self._roll(function)
                log.info(f"{function.name.short} is served by its new version")
            except NotHealthy as error:
                log.error(f"{error}; the old version of {function.name.short} goes on")
            except OSError as error:
                return f"the old version of {function.name.short} goes on: {reason_of(error)}"
        return ""

    async def _roll(self, function: Function, commit: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Start a version, and once it is healthy let it take the place of the one that serves, if there is one."""
        new = self._add(function)
        try:
            await new.become_healthy()
            await commit()
        except BaseException:
            self._retire(new, was_served=False)
            raise
        old = self._endpoints.get(function.name)
        if old is not None and old.scaled_count:
            new.scaled_count = min(old.scaled_count, new.scale.max_count)
            new.wake_or_tell()  # one serves, and it is stored: for the others it is tried again
        self._serve_by({function.name: new}, {**self.table, function.name: function})

    def _serve_by(
        self, changes: Mapping[FunctionName, Endpoint | None], table: Mapping[FunctionName, Function]
    ) -> None:
        """Let `table` be in force with other endpoints (None: no more), and retire those of before.

        Raises OSError: those of before serve on, and the others are retired.
        """
        before = {name: self._endpoints.pop(name, None) for name in changes}
        try:
            self._endpoints |= _only_endpoints(changes)
            self._set_table(table)
        except BaseException:
            for name in changes:
                self._endpoints.pop(name, None)
            self._endpoints |= _only_endpoints(before)
            for endpoint in _only_endpoints(changes).values():
                self._retire(endpoint, was_served=False)
            raise
        for endpoint in _only_endpoints(before).values():
            self._retire(endpoint)

    def _retire(self, endpoint: Endpoint, *, was_served: bool = True) -> None:
        if not self._is_stopping:
            task = asyncio.create_task(self._retired(endpoint, was_served))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retired(self, endpoint: Endpoint, was_served: bool) -> None:
        await (endpoint.retire() if was_served else endpoint.abandon())
        self._open.discard(endpoint)
        if self.secrets is not None:
            self.secrets.forget(endpoint.path.name)  # not before: its last calls read them

    def _set_table(self, table: Mapping[FunctionName, Function]) -> None:
        """Let `table`, with the addresses of what is run here, be in force.  Raises OSError: nothing has changed."""
        new = {name: self._with_token(self._with_url(function)) for name, function in table.items()}
        publish(self.directory / "table", new)
        self.table.clear()
        self.table.update(new)
        self.on_change()

    def _with_url(self, function: Function) -> Function:
        endpoint = self._endpoints.get(function.name)
        if not function.local or endpoint is None:
            return function
        if _runs(endpoint.function) == _runs(function):
            endpoint.follow(function)
        return dataclasses.replace(function, url=f"{UNIX_PREFIX}{endpoint.path}")

    def _with_token(self, function: Function) -> Function:
        if function.exposure.secret is None:
            return function
        token = self.token_of(function)
        return dataclasses.replace(function, token_digest=digest_token(token) if token and token.strip() else None)

    def refresh_tokens(self) -> None:
        """Tokens may have changed: let callers in by those that there are now."""
        self._set_table(self.table)

    # What is run.

    def _program(
        self, place: str, function: Function, listener: socket.socket, stderr_fd: int | None
    ) -> ManagedProgram:
        command = self._watchdog or ("fwatchdog",)
        secrets = None
        if self.secrets is not None and function.secrets:
            secrets = str(self.secrets.directory_of(function, place))
        name, environ = f"the watchdog of {function.name.short}", self._environ_of(function, secrets)
        return ManagedProgram(name, command, environ, listener, stderr_fd, function.directory, secrets)

    def _environ_of(self, function: Function, secrets: str | None) -> dict[str, str]:
        """Return the whole environment of a function's watchdog, which hands the function its part of it."""
        settings = watchdog_settings(function.settings or {})
        given = {FUNCTION_VARIABLE + name: value for name, value in function.environment.items()}
        if secrets is not None:
            given[FUNCTION_VARIABLE + MOUNT_VARIABLE] = secrets
        names = {"OPENFAAS_NAME": function.name.name, "OPENFAAS_NAMESPACE": function.name.namespace}
        log_settings = {} if self._logs is None else SETTINGS
        return {**self._base, **settings, **given, **names, **log_settings}


def with_annotations(old: Function, new: Function) -> Function:
    """Return the old version of a function, for whom the new one is."""
    return dataclasses.replace(old, annotations=new.annotations)


def _only_endpoints(changes: Mapping[FunctionName, Endpoint | None]) -> dict[FunctionName, Endpoint]:
    return {name: endpoint for name, endpoint in changes.items() if endpoint is not None}


def _runs(function: Function) -> tuple[object, ...]:
    """Return what makes one version of a function another program than the next."""
    return function.settings, function.environment, function.secrets, function.directory


def _status_of(endpoint: Endpoint) -> LocalStatus:
    pids = endpoint.pids
    scaled_count = endpoint.scaled_count
    asked_count = endpoint.scale.woken_count if scaled_count is None else scaled_count
    wanted_count = max(asked_count, len(endpoint.processes))
    available_count = len(pids) or (wanted_count if not endpoint.processes else 0)
    return LocalStatus(pids, endpoint.restart_count, endpoint.path, wanted_count, available_count)
