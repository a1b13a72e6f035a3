"""Functions run here: a watchdog for each, on a socket that the gateway opens and keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..calls.names import FunctionName
from ..watchdog import FUNCTION_VARIABLE
from .supervisor import Child, Keeper, listen_on_loopback, python_command
from .table import _RESERVED_PREFIXES, _ROWS, Function, watchdog_settings

_SHARED = ("log_format",)  # the gateway's holds for its watchdogs as well: their lines go to one stderr


# ---------------------------------------------------------------------------------------------------------------
# Functions run here.  The gateway opens each function's socket and keeps it for its own life; the watchdog inherits
# it as a service does from systemd.  So a connection made while a watchdog starts, or is started again, waits in the
# backlog and is never refused.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalStatus:
    """What is known of one local function's watchdog; `pid` is None between two lives."""

    pid: int | None
    restart_count: int
    address: tuple[str, int]


class LocalFunctions:
    """Runs one watchdog for each local function of `table`, and starts again what dies.

    `environ` is the gateway's own environment; the watchdogs get it without the variables named in `hidden` (the
    settings of the gateway and the worker, which are no business of theirs), without the watchdog's own settings
    (except for log_format), and without FAASHOUND_* and LISTEN_*.  `watchdog` is the command that serves a function.
    """

    def __init__(
        self,
        table: Mapping[FunctionName, Function],
        *,
        environ: Mapping[str, str],
        hidden: Collection[str] = (),
        watchdog: Sequence[str] = python_command("faashound.watchdog"),
    ) -> None:
        self.table: Mapping[FunctionName, Function] = table
        self._command = tuple(watchdog)
        self._base = {
            name: value
            for name, value in environ.items()
            if name in _SHARED or not (name in hidden or name in _ROWS or name.startswith(_RESERVED_PREFIXES))
        }
        self._listeners: dict[FunctionName, socket.socket] = {}
        self._addresses: dict[FunctionName, tuple[str, int]] = {}
        self._children: dict[FunctionName, Child] = {}
        self._keeper: Keeper | None = None
        self._cleanup = contextlib.ExitStack()

    def open(self) -> None:
        """Open every socket; from then on `table` has the url of each local function.

        Call it once; `stop` must follow.  Raises OSError, with nothing left open.
        """
        with contextlib.ExitStack() as stack:
            names = [name for name, function in self.table.items() if function.local]
            self._listeners = {name: stack.enter_context(listen_on_loopback()) for name in names}
            self._cleanup = stack.pop_all()
        self._addresses = {name: listener.getsockname() for name, listener in self._listeners.items()}
        self.table = {name: self._with_url(function) for name, function in self.table.items()}

    def start(self) -> None:
        """Start every watchdog; once, after `open`, inside the running loop."""
        self._keeper = Keeper()
        for name, listener in self._listeners.items():
            environ = self._environ(self.table[name])
            self._children[name] = self._keeper.start(f"the watchdog of {name.short}", self._command, environ, listener)

    def address(self, name: FunctionName) -> tuple[str, int]:
        """Return host and port of a local function; KeyError for any other name."""
        return self._addresses[name]

    def status(self) -> dict[FunctionName, LocalStatus]:
        """Return what is known of each local function's watchdog, by the function's whole name."""
        return {
            name: LocalStatus(child.pid, child.restart_count, self.address(name))
            for name, child in self._children.items()
        }

    async def stop(self, grace_s: float) -> None:
        """End every watchdog: SIGTERM, and after `grace_s` seconds what is left is killed, its functions with it."""
        if self._keeper is not None:
            await self._keeper.stop(grace_s)
        self._cleanup.close()

    def _with_url(self, function: Function) -> Function:
        if not function.local:
            return function
        host, port = self.address(function.name)
        return dataclasses.replace(function, url=f"http://{host}:{port}")

    def _environ(self, function: Function) -> dict[str, str]:
        """Return the whole environment of a function's watchdog, which hands the function its part of it."""
        settings = watchdog_settings(function.settings or {})
        given = {FUNCTION_VARIABLE + name: value for name, value in function.environment.items()}
        names = {"OPENFAAS_NAME": function.name.name, "OPENFAAS_NAMESPACE": function.name.namespace}
        return {**self._base, **settings, **given, **names}
