"""What a gateway is started with, and what its operator is told at the start.

    start = load_start(os.environ)                           # BadSettings names every problem
    door = load_door(start.settings)                         # CannotStart if the password is not to be had
    rules = browser_rules(start.settings, sockets)
    tell_what_is_served(start, sockets)

Contract: settings of ours, those of the worker beside us, and the functions file are read together, so that all that
is wrong with them is told at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from .. import queues
from ..calls.names import FunctionName
from ..functions.logs import LogStore
from ..functions.table import DEFAULT_QUEUE, BadFunctions, Function, FunctionsFile, read_functions
from ..network.addresses import parse_literal
from ..watchdog import (
    BadSettings,
    CannotStart,
    format_duration,
    log,
    parse_duration,
    parse_settings,
    read_file,
    settings_table,
)
from ..worker import Settings as WorkerSettings
from .browsers import BrowserRules
from .passwords import Credentials, PasswordDoor
from .settings import Settings
from .users import UserFile

if TYPE_CHECKING:  # which wants nats-py, an extra
    from ..queues.jetstream.bucket import Bucket

CREDENTIAL_FILES = ("basic-auth-user", "basic-auth-password")
USERS_FILE = "basic-auth-users"  # with a hash for each
MAX_TOLD_COUNT = 20  # functions listed in the log at the start, a line each


@dataclass(frozen=True, slots=True)
class StartConfiguration:
    """A gateway to be started.  `worker` is the environment of the worker beside it, but for its gateway_url.

    `follows_queues` tells whether that worker drains every queue that a function names, and not those of an operator.
    """

    settings: Settings
    file: FunctionsFile
    worker: Mapping[str, str] | None
    follows_queues: bool

    @property
    def worker_settings(self) -> WorkerSettings | None:
        """What the worker beside us makes of its environment; None: there is no worker."""
        return None if self.worker is None else parse_settings(WorkerSettings, self.worker)

    def drained_queues(self, functions: Iterable[Function]) -> frozenset[str]:
        """Return the queues that the worker beside us drains; those that `functions` name, where it is elsewhere."""
        worker = self.worker_settings
        if worker is None:
            return function_queues(functions)
        return frozenset(worker.queues).union(function_queues(functions) if self.follows_queues else ())


def load_start(environ: Mapping[str, str]) -> StartConfiguration:
    """Return what `environ` asks for; raises BadSettings with every problem in it, and in what it points to."""
    problems: list[str] = []
    settings: Settings | None = None
    file = FunctionsFile()
    try:
        settings = parse_settings(Settings, environ)
    except BadSettings as error:
        problems += error.problems
    try:
        file = load_functions(environ)
    except BadFunctions as error:
        problems += error.problems
    runs_worker = environ.get("worker") != "none" if settings is None else settings.runs_worker
    worker = worker_environment(environ, settings, file.functions) if runs_worker else None
    try:
        parse_settings(WorkerSettings, worker or {})
    except BadSettings as error:
        problems += error.problems
    if problems or settings is None:
        raise BadSettings(dict.fromkeys(problems))  # what both programs read is told once
    return StartConfiguration(settings, file, worker, follows_queues=not environ.get("queues"))


def load_functions(environ: Mapping[str, str]) -> FunctionsFile:
    """Return what is in the file that `functions` names; raises BadFunctions."""
    path = Path(environ.get("functions") or settings_table(Settings)["functions"].default or "")
    return read_functions(path, missing_ok=not environ.get("functions"))


def function_queues(functions: Iterable[Function]) -> frozenset[str]:
    """Return the queues in which calls of `functions` wait, and the one of all others."""
    return frozenset((DEFAULT_QUEUE, *(function.queue for function in functions)))


def worker_environment(
    environ: Mapping[str, str], settings: Settings | None, functions: Mapping[FunctionName, Function]
) -> dict[str, str]:
    """Return the environment of the worker beside us: its own settings as they stand, the rest as ours are.

    Unless told otherwise it drains every queue that a function of the file has, or their calls would wait for ever.
    """
    shared = {row.name for row in settings_table(WorkerSettings).values()} - {"host", "metrics_port"}
    ours = {row.name for row in settings_table(Settings).values()} - shared
    base = {name: value for name, value in environ.items() if name not in ours and not name.startswith("LISTEN_")}
    base |= {"OPENFAAS_NAME": "worker"}
    base.setdefault("queues", ",".join(sorted(function_queues(functions.values()))))
    if settings is not None:
        base |= {"host": settings.host or "", "metrics_port": str(settings.local_worker_metrics_port)}
    return base


def hidden_names() -> set[str]:
    """Return the names of the settings that are no business of a function."""
    return {row.name for kind in (Settings, WorkerSettings) for row in settings_table(kind).values()}


def load_door(settings: Settings) -> PasswordDoor | None:
    """Return what asks for a password before calls and functions; None if nothing does.  Raises CannotStart."""
    if not settings.basic_auth:
        return None
    directory = Path(settings.secret_mount_path)
    users = UserFile(directory / USERS_FILE, missing_ok=True)
    if (directory / USERS_FILE).exists() and not any((directory / name).exists() for name in CREDENTIAL_FILES):
        return PasswordDoor(None, users)
    texts = []
    for name in CREDENTIAL_FILES:
        path = str(directory / name)
        text = read_file(path, f"basic_auth=true needs it, or {USERS_FILE}").strip()
        if not text:
            raise CannotStart(f"{path} is empty (basic_auth=true needs it)")
        texts.append(text)
    return PasswordDoor(Credentials(*texts), users)


def open_state(settings: Settings) -> Path | None:
    """Return the directory of what is kept over restarts, made if need be; None, and a warning, if it cannot be had."""
    path = Path(settings.state)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
        reason = "it cannot be written to"
    except OSError as error:
        reason = str(error.strerror)
    log.warning(f"counts of invocations, and what is scheduled, will not survive a restart: state={path}: {reason}")
    return None


def open_logs(settings: Settings, state: Path | None) -> LogStore | None:
    """Return where the lines of functions are kept; None if they are not."""
    if state is None or not settings.logs_keep_bytes:
        return None
    return LogStore(state / "logs", settings.logs_keep_bytes, as_json=settings.log_format == "json")


async def open_bucket(settings: Settings) -> Bucket | None:
    """Return where all gateways of a cluster keep what is deployed to them; None where one keeps it to itself.

    Raises CannotStart, and the queue's errors.
    """
    if isinstance(settings.queue_url, Path) or deploying_is_off(settings) is not None:
        return None
    return await queues.open_bucket(settings.queue_url, settings)


def known_namespaces(settings: Settings) -> frozenset[str]:
    """Return the namespaces that functions may be in by the operator's word, whether or not there are some."""
    return settings.namespaces if settings.function_url or settings.deploy != "off" else frozenset()


def deploying_is_off(settings: Settings) -> str | None:
    """Return why functions cannot be deployed; None if they can."""
    if settings.deploy == "off":
        return "deploy=off: this gateway's functions are those of its functions file; deploy=process changes that"
    return None


# ---------------------------------------------------------------------------------------------------------------
# What follows from the sockets that we have got.
# ---------------------------------------------------------------------------------------------------------------


def local_url(sockets: Iterable[socket.socket]) -> str | None:
    """Return the URL at which this machine reaches one of `sockets`; None if none of them is TCP."""
    for sock in sockets:
        name = sock.getsockname()
        if isinstance(name, tuple):
            address, port = ip_address(name[0].partition("%")[0]), name[1]
            if address.is_unspecified:
                address = ip_address("127.0.0.1" if address.version == 4 else "::1")
            return f"http://{address}:{port}" if address.version == 4 else f"http://[{address}]:{port}"
    return None


def is_open_to_others(sockets: Iterable[socket.socket]) -> bool:
    """Tell whether other machines may reach one of `sockets`."""
    names = [sock.getsockname() for sock in sockets]
    return any(isinstance(name, tuple) and not ip_address(name[0].partition("%")[0]).is_loopback for name in names)


def browser_rules(settings: Settings, sockets: Sequence[socket.socket]) -> BrowserRules:
    """Return what browsers' pages may do at the gateway of `sockets`."""
    on_loopback = local_url(sockets) is not None and not is_open_to_others(sockets)
    names = settings.allowed_hosts or frozenset()
    if on_loopback and settings.host and parse_literal(settings.host) is None:
        names |= {settings.host.lower()}  # that it listens on this name is the operator's word
    return BrowserRules(on_loopback, names, settings.allowed_origins or frozenset())


def check_deploying_is_safe(settings: Settings, sockets: Iterable[socket.socket]) -> None:
    """Raise CannotStart where strangers could run commands here."""
    if settings.deploy != "off" and is_open_to_others(sockets) and not settings.basic_auth:
        raise CannotStart(
            f"deploy={settings.deploy} lets other machines run commands here; allowed: with basic_auth=true, or with a"
            " host that only this machine reaches"
        )


def tell_what_is_served(start: StartConfiguration, sockets: Sequence[socket.socket]) -> None:
    """Log what one can do now, and whether others can."""
    url = local_url(sockets) or ""
    for warning in timeout_warnings(start):
        log.warning(warning)
    names = list(start.file.functions)
    for name in names[:MAX_TOLD_COUNT]:
        log.info(f"Serving {url}/function/{name.short}")
    if len(names) > MAX_TOLD_COUNT:
        log.info(f"... and {len(names) - MAX_TOLD_COUNT} functions more, see {url}/system/functions")
    if not names and start.settings.function_url is None:
        log.warning(f"no functions: {start.settings.functions} lists none, and function_url is not set")
    if is_open_to_others(sockets) and not start.settings.basic_auth:
        log.warning(
            "other machines reach this port, and basic_auth=false: all their users can call functions, and see"
            " and cancel each other's calls"
        )


def timeout_warnings(start: StartConfiguration) -> Iterator[str]:
    """Yield a line for each pair of timeouts that we can see and that do not agree; see the table in the docs."""
    worker = start.worker_settings
    waits_s = {
        "upstream_timeout": start.settings.upstream_timeout_s,
        "call_timeout": worker.call_timeout_s if worker else 0,
    }
    for name, function in start.file.functions.items():
        limit_s = parse_duration((function.settings or {}).get("exec_timeout") or "0")
        for waiting, wait_s in waits_s.items():
            if wait_s and limit_s > wait_s:
                yield (
                    f"{waiting} ({format_duration(wait_s)}) is shorter than exec_timeout of {name.short}"
                    f" ({format_duration(limit_s)}), which is cut from outside before it can end by itself"
                )
