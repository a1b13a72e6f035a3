"""fgateway: every function under one address, now or later.

    fgateway                                                    # or: python -m faashound.gateway
    curl -d hello http://127.0.0.1:8080/function/cat            # now: the answer
    curl -d hello http://127.0.0.1:8080/async-function/cat      # later: 202 and a call id

Routes, with the names, codes and headers of the OpenFaaS gateway, and the module of serving/ that answers each:

    ANY    /function/NAME[/path]           invocations    proxied; 404 unknown, 502 down, 504 past upstream_timeout
    POST   /async-function/NAME[/path]     submissions    202 once the call is durable, 503 or 507 if it cannot be
    GET    /async-function/ID              call_status    where the call stands; ?wait=30s waits for its end
    GET    /async-function/ID/result       call_status    the response of the function
    DELETE /async-function/ID              call_status    cancels, queued or running
    GET    /ui/                            pages          a page to look at; / leads browsers there
    GET    /system/info                    control_plane  what this gateway is
    GET    /system/functions               control_plane  functions of ?namespace=; /system/function/NAME for one
    POST   /system/functions               operations     deploys; PUT updates, DELETE removes, scale-function scales
    GET    /system/secrets                 operations     names of secrets; POST, PUT and DELETE change them
    GET    /system/namespaces              control_plane  namespaces; /system/namespace/NAME for one, made and removed
    GET    /system/logs                    function_logs  lines of a function; ?follow=1 for those to come
    GET    /system/schedules               operations     when functions are called by themselves
    GET    /system/metrics                 history        the last hour in figures
    GET    /system/events                  events         what changes, as it does
    GET    /system/calls                   call_admin     calls by ?state= ?function= ...; DELETE deletes
    POST   /system/calls/cancel            call_admin     cancels all that is queued, or with ?function= of one function
    GET    /system/calls/ID                call_admin     one call whole; POST .../retry for dead letters; DELETE
    GET    /healthz                        health         200 while all behind it works, else 503 and what does not

HEAD works wherever GET does.  What comes round through us again is answered with 508 (proxying), a page of another
origin with 403, one that has bound its own name to our address with 421 (browsers).

What it promises: a 202 is never given for a call that a crash could lose.  Beside itself it runs a watchdog for each
local function and, with a spool, a worker; all of them end when it ends, whatever way.  What it refuses to do: run
anything itself, retry, or follow redirects.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvloop

from .calls.callbacks import build_policy
from .calls.model import QueueLimits
from .calls.names import DEFAULT_NAMESPACE
from .functions.control import Control
from .functions.deployments import Rules
from .functions.local import LocalFunctions
from .functions.logs import LogStore
from .functions.scheduler import Scheduler
from .functions.supervisor import Supervisor
from .functions.table import Functions
from .network.hosts import UnknownHost
from .queues import Queue, open_queue, trouble_of
from .serving.access import SAFE_METHODS, Access
from .serving.answers import NotFound, allow
from .serving.browsers import ForeignPage, check_own_page, with_fields
from .serving.call_admin import CallAdmin
from .serving.call_status import CallStatus
from .serving.control_plane import (
    GIVES_NO_TOKENS,
    ControlPlane,
    ControlPlaneElsewhere,
    serve_control_plane,
)
from .serving.events import Events
from .serving.followers import Followers
from .serving.function_logs import FunctionLogs
from .serving.function_pages import check_place
from .serving.gates import FunctionGate
from .serving.health import Health
from .serving.history import History, Sources
from .serving.invocation_counts import InvocationCounts, load_counts
from .serving.invocations import Invocations
from .serving.janitor import Janitor
from .serving.local_workers import LocalWorkers
from .serving.metrics import GatewayMetrics, QueueFigures
from .serving.operations import NotOffered, Operations
from .serving.pages import PLACE, Pages
from .serving.proxying import build_via
from .serving.settings import Settings
from .serving.startup import (
    StartConfiguration,
    browser_rules,
    check_deploying_is_safe,
    deploying_is_off,
    function_queues,
    hidden_names,
    known_namespaces,
    load_door,
    load_start,
    local_url,
    open_bucket,
    open_logs,
    open_state,
    tell_what_is_served,
)
from .serving.submissions import Submissions, is_call_id
from .serving.user_command import write_user
from .watchdog import (
    FAREWELL_S,
    LONGEST_DURATION_S,
    TEXT_PLAIN,
    BadSettings,
    CannotStart,
    FaashoundError,
    ListenSockets,
    NotReady,
    Program,
    Request,
    Response,
    Scoreboard,
    Server,
    ServerTimeouts,
    Signals,
    Slot,
    WorkerContext,
    bind_sockets,
    connection_limits,
    drain_server,
    finished_first,
    flag_answer,
    help_text,
    log,
    log_origin,
    lookalikes,
    parse_url,
    run_workers,
    serve_metrics,
    settle_descriptors,
    start_metrics,
    watch_parent_death,
)

# ---------------------------------------------------------------------------------------------------------------
# Routes.
# ---------------------------------------------------------------------------------------------------------------


ALLOWED_PLACES = "/function/NAME, /async-function/NAME, /async-function/CALL-ID, /healthz"


def split_path(path: bytes) -> tuple[str, str, bytes]:
    """Return (area, name, rest) of `/area/name/rest`; rest keeps its slash."""
    area, *more = path.removeprefix(b"/").split(b"/", 2)
    name = more[0].decode("latin-1") if more else ""
    return area.decode("latin-1"), name, b"/" + more[1] if len(more) > 1 else b""


@dataclass(slots=True)
class Gateway:
    """Handler of the gateway's server: decides who may ask, and which part answers."""

    queue: Queue
    access: Access
    health: Health
    metrics: GatewayMetrics
    figures: QueueFigures
    invocations: Invocations
    submissions: Submissions
    call_status: CallStatus
    call_admin: CallAdmin
    control_plane: ControlPlane | ControlPlaneElsewhere
    pages: Pages | None
    draining: bool = False

    async def __call__(self, request: Request) -> Response:
        """Answer one request; cancelled when the client has gone."""
        try:
            return await self._route(request)
        except (UnknownHost, ForeignPage) as error:
            log.warning(
                f"Refused [{request.method[:20]}] {request.path[:100].decode('latin-1')} - [{error.status}]",
                host=request.host[:100].decode("latin-1"),
                origin=(request.header(b"origin") or b"")[:100].decode("latin-1"),
                peer=request.peer,
            )
            raise

    async def _route(self, request: Request) -> Response:
        self.access.check_host(request)
        check_place(request)
        area, name, rest = split_path(request.path)
        if area == "function" or (area == "async-function" and not is_call_id(name)):
            return await self._call(request, area, name, rest)
        self.access.check_no_callback(request)
        if area == "async-function":
            check_own_page(request)
            return self._noted(request, await self.call_status.answer(request, name.lower(), rest))
        if area == "system":
            check_own_page(request)
            await self.access.authorize(request)
            if name == "calls":
                return self._noted(request, await self.call_admin.answer(request, rest.decode("latin-1")))
            asker = self.access.asker_of(request)
            response = await self.control_plane.answer(request, name, rest.decode("latin-1"), asker)
            return self.access.watch(request, response)
        if request.path == b"/healthz":
            return self._answer_health(request)
        if request.path == b"/oauth/token":
            raise NotOffered(GIVES_NO_TOKENS)
        return self._show_page(request, area)

    def _show_page(self, request: Request, area: str) -> Response:
        """Answer with a file of the page, or what leads there; raises NotFound for everything else."""
        response = None
        if self.pages is not None:
            response = self.pages.answer(request) if area == PLACE.strip("/") else None
            response = self.pages.lead(request) if request.path == b"/" else response
        if response is None:
            ui = f", {PLACE}" if self.pages is not None else ""
            raise NotFound(f"not found; allowed: {ALLOWED_PLACES}{ui}")
        return response

    async def _call(self, request: Request, area: str, name: str, rest: bytes) -> Response:
        """Call a function, now or later; a browser's page may, or is told what it may."""
        fields = self.access.pages.check_call(request)
        response = self.access.pages.answer_preflight(request)
        if response is None:
            part = self.invocations if area == "function" else self.submissions
            response = await part.answer(request, name, rest)
        return with_fields(response, fields)

    def _noted(self, request: Request, response: Response) -> Response:
        """Return the answer to a request about calls, with a line in the log if it has changed some."""
        if request.method not in SAFE_METHODS:
            path = request.path[:200].decode("latin-1")
            log.info(f"Done: [{request.method[:20]}] {path}", asker=self.access.asker_of(request))
        return response

    def _answer_health(self, request: Request) -> Response:
        allow(request, "GET")
        found = (
            "draining" if self.draining else None,
            trouble_of(self.queue),
            *self.health.problems(),
        )
        problems = [problem for problem in found if problem is not None]
        if problems:
            raise NotReady("; ".join(problems))
        return Response(200, (TEXT_PLAIN,), "; ".join(["OK", *self.health.warnings()]).encode())

    async def serve_metrics(self, request: Request) -> Response:
        """Answer GET /metrics, on a port of its own, which others may know by other names than they call us by."""
        if self.access.pages.on_loopback:
            self.access.check_host(request)
        await self.figures.refresh()
        return await serve_metrics(self.metrics, request)

    def drain(self) -> None:
        """Be unhealthy, and let no caller wait any longer for a call to end; everything else goes on."""
        self.draining = True
        self.call_status.drain()
        self.control_plane.drain()


# ---------------------------------------------------------------------------------------------------------------
# Lifecycle.  SIGTERM: unhealthy; the local worker drains while we still serve, since its calls come through us;
# then no more connections, what is in flight finishes within upstream_timeout, in every process, and the local
# functions end.  SIGHUP: the process that runs the functions reads their file again.
# ---------------------------------------------------------------------------------------------------------------

WORKER_GONE_POLL_S = OTHERS_POLL_S = 0.05
GIVE_UP_S = 1.0  # for the other processes to answer for what they cut, after the second signal
FUNCTIONS_GRACE_S = 10.0  # for watchdogs whose requests are over already, or are to be cut
DESCRIPTORS_EACH_COUNT = 3  # of a caller's connection: its own, the function's, a file of the queue
INVOCATIONS_FILE, SCHEDULES_FILE, HISTORY_FILE = "invocations.json", "schedules.json", "history.json"
CONTROL_SOCKET = "control"


@dataclass(frozen=True, slots=True)
class Common:
    """What the processes of a gateway have in common, from before they were forked.

    `state` is the directory of what survives a restart, None if there is none; `invocations_before` says how often
    each function was called in the lives of the gateways before this one, and `life` tells this one from those.
    """

    start: StartConfiguration
    local: LocalFunctions
    logs: LogStore | None
    sockets: ListenSockets
    environ: Mapping[str, str]
    state: Path | None
    invocations_before: Mapping[str, int]
    life: str = field(default_factory=lambda: uuid.uuid4().hex)
    on_change: list[Callable[[], None]] = field(default_factory=list)

    def kept(self, name: str) -> Path | None:
        """Return the path of a file that survives a restart; None if nothing does."""
        return None if self.state is None else self.state / name

    def changed(self) -> None:
        """Tell all who need to know that the functions have changed."""
        for each in self.on_change:
            each()


async def serve(common: Common, context: WorkerContext) -> int:
    """Serve until told to stop; return the exit status."""
    settings, sockets, loop = common.start.settings, common.sockets, asyncio.get_running_loop()
    signals = Signals(loop)
    watch_parent_death(loop, context.parent_death_fd, signals.stop_now)
    async with AsyncExitStack() as stack:
        gateway = await assemble(stack, common, context.slot)
        metrics_server = start_metrics(sockets.metrics, gateway.serve_metrics)
        stack.callback(metrics_server.abort)
        timeouts = ServerTimeouts(settings.read_timeout_s, settings.write_timeout_s, settings.read_timeout_s)
        limits = connection_limits(
            settings.max_connections, settings.max_connections_per_address, DESCRIPTORS_EACH_COUNT, context.slot
        )
        server = Server(gateway, timeouts, slot=context.slot, limits=limits)
        await finished_first(functions_known(common.local, context.slot), signals.first.wait())
        if signals.first.is_set() and not context.slot.is_first:  # it may know no function, and others take its calls
            return 0
        for sock in sockets.own:
            server.listen(sock)
        context.on_serving()
        supervisor = Supervisor()
        stack.push_async_callback(supervisor.stop, 0.0)
        if isinstance(gateway.control_plane, ControlPlane) and common.start.worker is not None:
            environ = {**common.start.worker, "gateway_url": local_url(sockets.own) or ""}
            follows = common.start.follows_queues
            if follows:  # those of functions that were deployed before, too
                environ["queues"] = ",".join(sorted(common.start.drained_queues(common.local.table.values())))
            on_trouble, on_restart = gateway.health.worker_trouble, gateway.metrics.worker_restarted
            workers = LocalWorkers(supervisor, environ, on_trouble, on_restart, follows=follows)
            follow = partial(follow_queues, signals, workers, common.local, gateway.control_plane.history)
            follow()
            common.on_change.append(follow)
        await signals.first.wait()
        gateway.drain()
        await finished_first(worker_gone(gateway, supervisor, context.slot), signals.second.wait())
        if signals.second.is_set():  # the process that takes our place must not wait for the worker to be gone
            server.stop_accepting()
            metrics_server.stop_accepting()
        await supervisor.stop(0.0)
        return await drain_all(server, signals, common.local, settings.upstream_timeout_s, context.slot)


async def functions_known(local: LocalFunctions, slot: Slot) -> None:
    """Wait until the process that runs the functions has told which there are, and whom they let in.

    Its socket is there from then on, also while it is replaced: what it has told is as good as before.
    """
    while not slot.is_first and not (local.directory / CONTROL_SOCKET).exists():  # noqa: ASYNC110 - as in `worker_gone`
        await asyncio.sleep(OTHERS_POLL_S)


def follow_queues(signals: Signals, workers: LocalWorkers, local: LocalFunctions, history: History) -> None:
    """Have the queues drained that the functions name by now."""
    if signals.first.is_set():  # one that is started now would not be told to drain, and cut when the others have
        return
    workers.follow(function_queues(local.table.values()))
    history.misses_workers = workers.later_count > 0


async def worker_gone(gateway: Gateway, supervisor: Supervisor, slot: Slot) -> None:
    """Let the local worker drain; where it is another process's, wait until that one has seen to it."""
    await gateway.control_plane.look_at_worker()
    await supervisor.stop(LONGEST_DURATION_S)
    while not slot.is_first and slot.scoreboard.serving[0]:  # noqa: ASYNC110 - another process sets no event of ours
        await asyncio.sleep(WORKER_GONE_POLL_S)


async def drain_all(server: Server, signals: Signals, local: LocalFunctions, limit_s: float, slot: Slot) -> int:
    """Drain this process; the one that runs the functions goes last.  Return the exit status."""
    end_s = time.monotonic() + limit_s + FAREWELL_S
    status = await drain_server(server, signals, limit_s)
    if slot.is_first:
        await finished_first(end_functions(local, slot, end_s, FUNCTIONS_GRACE_S), signals.second.wait())
        if signals.second.is_set():
            await end_functions(local, slot, time.monotonic() + GIVE_UP_S, 0.0)
    return status


async def end_functions(local: LocalFunctions, slot: Slot, end_s: float, grace_s: float) -> None:
    """End the local functions once no process has requests for them; what workers elsewhere have may last as long.

    That is until `end_s`, and `grace_s` seconds at least.
    """
    if not slot.is_alone:
        await others_drained(slot.scoreboard, end_s)
    await local.stop(max(end_s - time.monotonic(), grace_s))


async def others_drained(scoreboard: Scoreboard, end_s: float) -> None:
    """Wait until no process has a connection, or can get one; or until `end_s`, by when all should have cut theirs."""
    is_drained = False
    while not is_drained and time.monotonic() < end_s:
        await asyncio.sleep(OTHERS_POLL_S)
        is_drained = not (any(scoreboard.serving) or any(scoreboard.connections))


async def assemble(stack: AsyncExitStack, common: Common, slot: Slot) -> Gateway:
    """Return the gateway of one process with all that is behind it at work; `stack` ends it all.

    Raises CannotStart and the queue's errors.
    """
    start, local, sockets = common.start, common.local, common.sockets.own
    settings, url = start.settings, local_url(sockets)
    door = load_door(settings)
    limits = QueueLimits(settings.queue_reserve_bytes, settings.max_queued, settings.max_queued_bytes)
    queue = await open_queue(settings.queue_url, settings, limits=limits)
    stack.push_async_callback(queue.close)
    access = Access(queue.token, browser_rules(settings, sockets), door)
    policy = build_policy([url] if url else [], settings.callback_allow)
    table = local.table if slot.is_first else local.published
    functions = Functions(table, settings.function_url, settings.namespaces, are_elsewhere=not slot.is_first)
    metrics, health, via = GatewayMetrics(slot), Health(slot), build_via(queue.token)
    control_plane: ControlPlane | ControlPlaneElsewhere
    if slot.is_first:
        operations = await run_functions(stack, common, queue, health)
        counts = InvocationCounts(common.kept(INVOCATIONS_FILE), common.invocations_before, metrics)
        keep_counts(stack, counts, functions, health)
        local.count_made = metrics.asked_count
        history = keep_history(stack, common, queue, slot, health)
        limit_s = settings.write_timeout_s
        events = Events(queue, history, Followers("events", "ask /system/calls instead", limit_s))
        log_followers = Followers("lines of functions", "ask without follow", limit_s)
        health.keep_running(stack, events.run())
        common.on_change.append(events.functions_changed)
        control_plane = ControlPlane(
            functions,
            access,
            local.status,
            counts,
            operations,
            FunctionLogs(common.logs, functions, log_followers),
            history,
            events,
        )
        if not slot.is_alone:
            serve_control_plane(stack, control_plane, local.directory / CONTROL_SOCKET, settings)
        janitor = Janitor(queue, settings, lambda: start.drained_queues(local.table.values()), metrics, health)
        health.keep_running(stack, janitor.run())
    else:
        control_plane = ControlPlaneElsewhere(local.directory / CONTROL_SOCKET)
        stack.push_async_callback(control_plane.close)
    gate = FunctionGate(access)
    invocations = Invocations(settings, functions, gate, via, metrics)
    stack.push_async_callback(invocations.close)
    figures = QueueFigures(queue, metrics)
    stack.push_async_callback(figures.close)
    return Gateway(
        queue,
        access,
        health,
        metrics,
        figures,
        invocations,
        Submissions(settings, functions, queue, policy, access, gate, via, metrics, health),
        CallStatus(queue, access, slot.share_of(settings.max_long_polls), settings.max_long_polls),
        CallAdmin(queue),
        control_plane,
        Pages.load() if settings.ui == "on" else None,
    )


async def run_functions(stack: AsyncExitStack, common: Common, queue: Queue, health: Health) -> Operations:
    """Have the local functions run, the functions file followed, and schedules kept; return what changes them."""
    settings, local = common.start.settings, common.local
    off = deploying_is_off(settings)
    rules = Rules(
        common.start.file.images,
        namespaces=frozenset((DEFAULT_NAMESPACE, *known_namespaces(settings))),
        path=common.environ.get("PATH"),
        ignores_limits=settings.limits == "ignore",
    )
    bucket = await open_bucket(settings)
    if bucket is not None:
        stack.push_async_callback(bucket.close)
    control = Control(
        local,
        Path(settings.functions),
        state=Path(settings.state) if off is None else None,
        rules=rules,
        file_is_optional=not common.environ.get("functions"),
        operator_secrets=Path(settings.secret_mount_path),
        bucket=bucket,
    )
    stack.callback(control.close)
    local.start()
    stack.push_async_callback(local.stop, FUNCTIONS_GRACE_S)
    await control.start()
    for following in (control.follow(), control.follow_bucket()):
        health.keep_running(stack, following)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, control.look_now)
    scheduler = None
    if settings.schedules == "on":
        scheduler = Scheduler(local.table, queue, common.kept(SCHEDULES_FILE), on_refused=health.queue_refused)
        common.on_change.append(scheduler.wake)
        health.keep_running(stack, scheduler.run())
    local.on_change = common.changed
    operations = Operations(control, scheduler, off)
    stack.push_async_callback(operations.close)
    return operations


def keep_counts(stack: AsyncExitStack, counts: InvocationCounts, functions: Functions, health: Health) -> None:
    """Keep the counts of invocations from time to time, and at the end."""

    def listed() -> list[str]:
        return [function.name for function in functions]

    stack.callback(lambda: counts.save(listed()))
    health.keep_running(stack, counts.keep(listed))


def keep_history(stack: AsyncExitStack, common: Common, queue: Queue, slot: Slot, health: Health) -> History:
    """Return the last hour in figures, which goes on, and is kept from time to time and at the end."""
    start = common.start
    kind = "spool" if isinstance(start.settings.queue_url, Path) else "nats"
    port = start.settings.local_worker_metrics_port
    base = local_url(common.sockets.own)
    worker = None
    if start.worker is not None and port and base is not None:
        worker = parse_url(base)._replace(port=port, target="/metrics")
    sources = Sources(slot, queue, kind, worker)
    stack.push_async_callback(sources.client.close)
    history = History(sources, common.kept(HISTORY_FILE), common.life)
    stack.callback(history.save)
    health.keep_running(stack, history.run())
    return history


PURPOSE = "Serves every function under one address, now (/function/NAME) or later (/async-function/NAME)."


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the gateway and return its exit status: 0 stopped, 1 failed or cut calls, 2 bad settings."""
    argv = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    settle_descriptors()
    if argv[:1] == ["password"]:
        return write_user(argv[1:])
    answer = flag_answer(argv, help_text("fgateway [password NAME [ROLE]]", PURPOSE, Settings))
    if answer is not None:
        return answer
    try:
        start = load_start(environ)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    log.configure(start.settings.log_format, log_origin(environ))
    try:
        for warning in lookalikes(Settings, environ):
            log.warning(warning)
        return run(start, environ)
    except FaashoundError as error:
        log.error(str(error))
        return 1
    finally:
        log.flush()


def run(start: StartConfiguration, environ: Mapping[str, str]) -> int:
    """Open what is shared by all processes, and serve in them; return the exit status."""
    settings = start.settings
    sockets = bind_sockets(settings.host, settings.port, settings.metrics_port, environ)
    if start.worker is not None and local_url(sockets.own) is None:
        raise CannotStart("the local worker calls functions over TCP and was given a Unix socket; worker=none")
    check_deploying_is_safe(settings, sockets.own)
    state = open_state(settings)
    logs = open_logs(settings, state)
    local = LocalFunctions(start.file.functions, environ=environ, hidden=hidden_names(), logs=logs)
    local.open()
    before = load_counts(None if state is None else state / INVOCATIONS_FILE)
    common = Common(start, local, logs, sockets, environ, state, before)
    survive_reload()

    def on_serving() -> None:
        sockets.announce()
        tell_what_is_served(start, sockets.own)

    def serve_in_loop(context: WorkerContext) -> int:
        survive_reload()
        return uvloop.run(serve(common, context))

    program = Program(serve_in_loop, sockets, on_serving, passed_on=(signal.SIGHUP,))
    with closing(local):  # whatever keeps its process from having it in its hands
        return run_workers(settings.workers, program, environ)


def survive_reload() -> None:
    """Let SIGHUP pass, until the functions run and their file is read at it: in one process, if there are several."""
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP,))  # blocked by our supervisor, if we have one


if __name__ == "__main__":
    sys.exit(main())
