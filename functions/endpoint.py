"""Where one version of a local function answers: a socket that the gateway holds, and the watchdogs behind it.

The socket is there before any watchdog and stays when one dies, so a connection waits in its backlog and is never
refused.  The life of an endpoint:

    asleep      no process.  We watch the socket; a connection (not accepted yet) wakes it
    awake       `count` watchdogs accept from the socket.  One that dies is started again by the supervisor.
                Where the labels allow it there are more while its load is high (scaling.py).
                When nothing has used them for zero-duration they are ended, and it is asleep
    retiring    another version has its name.  Its watchdogs finish what they have and end; should a connection still
                come, from a caller that had its address already, it is served.  Quiet for a while, it is closed

The socket is a Unix socket in a directory of the gateway's user: web pages and other users cannot reach it.

Whether watchdogs are used is seen from outside, without a word from them: each connection to the socket is a line of
/proc/net/unix, and each turn of a watchdog's loop shows in its processor time (/proc/PID/schedstat).  A call has its
connection open until it ends.  The gateway keeps connections for some seconds for the next call; those count as use.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

from ..calls.names import FunctionName
from ..watchdog import BACKLOG, Client, FaashoundError, Trouble, Url, log, parse_count, parse_workers, reason_of
from .logs import LogPipe, LogStore
from .scaling import Load, Scale, parse_scale
from .supervisor import ManagedProcess, ManagedProgram, Supervisor, lift
from .table import Function, watchdog_settings

HEALTHY_WITHIN_S = 20.0  # a new version; clients of the control plane wait 30 s and more for an answer

HEALTH_POLL_S = 0.005  # doubled after each look

LONGEST_HEALTH_POLL_S = 0.1

LONGEST_ANSWER_BYTES = 4096  # of one that is not healthy: it says why in a line

QUIET_S = 1.0  # without a connection for so long, an endpoint without a name is closed

LOOKS_COUNT = 4  # for use, in the time of one zero-duration

LONGEST_LOOK_S = 30.0

DRAIN_GRACE_S = 3600.0  # for calls of a watchdog that is to end; exec_timeout may end them before

LOAD_LOOK_S = 1.0  # between two looks at the load of a function that may have more watchdogs

WAKE_AGAIN_S = 1.0  # after a start that failed for want of descriptors, or of room on a disk

LISTENING_FLAGS = b"00010000"  # __SO_ACCEPTCON in /proc/net/unix


class NotHealthy(FaashoundError):
    """A version of a function did not begin to serve; the text says why."""

    status = 400


class Endpoint:
    """The socket at `path` of `function`, and its watchdogs, which `supervisor` keeps running.

    `program_of` returns what to run for a function on a socket, with a descriptor for its lines, which go to `logs`;
    `count_made` how many calls it has got so far.
    Obligations: `open`, then `start`, and `close_socket` when the supervisor has stopped, or `retire` while it goes on.
    """

    def __init__(
        self,
        function: Function,
        path: Path,
        program_of: Callable[[Function, socket.socket, int | None], ManagedProgram],
        logs: LogStore | None = None,
        count_made: Callable[[FunctionName], int] = lambda name: 0,
    ) -> None:
        self.function = function
        self.path = path
        self.scaled_count: int | None = None  # what an operator has asked for by hand
        self.processes: list[ManagedProcess] = []
        self._program_of = program_of
        self._logs = logs
        self._count_made = count_made
        self._load = Load()
        self._trouble = Trouble(log.error)  # of the last start
        self._log_pipe: LogPipe | None = None
        self._supervisor: Supervisor | None = None
        self._listener: socket.socket
        self._is_watched = False
        self._wake_again: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._load_look: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._used_s = 0.0
        self._spent_ns: Mapping[int, int] = {}

    @property
    def scale(self) -> Scale:
        """What the function's labels ask for."""
        return parse_scale(self.function.labels)

    @property
    def pids(self) -> list[int]:
        """The watchdogs that run now."""
        return [process.pid for process in self.processes if process.pid is not None]

    @property
    def restart_count(self) -> int:
        """How often a watchdog that has died was started again."""
        return sum(process.restart_count for process in self.processes)

    def open(self) -> None:
        """Listen; connections wait from now on.  Raises OSError."""
        with socket.socket(socket.AF_UNIX) as low:
            low.bind(str(self.path))
            try:
                self.path.chmod(0o600)  # its directory may be open for passing through, see secrets.py
                low.listen(BACKLOG)
                self._listener = socket.socket(fileno=lift(low.fileno()))
            except OSError:
                self.path.unlink()
                raise

    def start(self, supervisor: Supervisor) -> None:
        """Start as many watchdogs as are to be there before a call, or watch for one; inside the running loop."""
        self._supervisor = supervisor
        if self.scale.started_count:
            self.wake_or_tell()
        else:
            self._watch(True)

    def wake(self) -> None:
        """Have as many watchdogs as it should have when it is awake.  Raises OSError; it is watched on, then."""
        self._grow(self._woken_count)
        self._watch(False)
        self._note_use()
        self._look_at_load()

    @property
    def _woken_count(self) -> int:
        return max(self.scaled_count or 0, self.scale.woken_count)

    def follow(self, function: Function) -> None:
        """Be for `function`, which runs the same program; have what its labels ask for otherwise than before."""
        before, self.function = self.scale, function
        if self.scale == before or self._supervisor is None:
            return
        if self.scaled_count is not None:
            self.scaled_count = min(self.scaled_count, self.scale.max_count)
        self._set_look(None)  # it was for the zero-duration before, or is not wanted any more
        if self.processes or self.scale.started_count:
            self.wake_or_tell()
            if not self.scale.grows:  # else the load decides
                self._shrink(self._woken_count)

    def set_count(self, count: int) -> None:
        """Have `count` watchdogs; 0: none, until a call comes.  Those too many end when their calls have ended."""
        if count:
            self._grow(count)
            self.scaled_count = count
            self._watch(False)
            self._note_use()
            self._shrink(count)
            if self._load_look is None:  # it has slept; the load of one that is awake is looked at already
                self._look_at_load_later()
        else:
            self.scaled_count = 0
            self.rest()

    def _grow(self, count: int) -> None:
        if self._supervisor is None:
            raise AssertionError("an endpoint is started before it is woken")
        if self._logs is not None and self._log_pipe is None:
            self._log_pipe = self._logs.open_pipe(self.function, self.path.name)
        while len(self.processes) < count:
            fd = None if self._log_pipe is None else self._log_pipe.fd
            self.processes.append(self._supervisor.start(self._program_of(self.function, self._listener, fd)))
        self._trouble.over()

    def _shrink(self, count: int) -> None:
        busiest_first = sorted(self.processes, key=self._count_calls, reverse=True)
        self.processes, surplus = busiest_first[:count], busiest_first[count:]
        if surplus:
            self._later(self._end(surplus))

    def _count_calls(self, process: ManagedProcess) -> int:
        return 0 if process.pid is None else count_calls(process.pid, self.function.settings or {})

    def rest(self) -> asyncio.Task[None]:
        """End the watchdogs, each when its calls have ended; what comes meanwhile wakes it again.

        They write to the pipe of the log until then: it is closed by the task returned, which need not be waited for.
        """
        ending, self.processes = self.processes, []
        log_pipe, self._log_pipe = self._log_pipe, None
        earlier = tuple(self._ending)
        self._set_look(None)
        self._watch(True)
        return self._later(self._end(ending, earlier, log_pipe))

    async def _end(
        self,
        processes: list[ManagedProcess],
        earlier: Collection[asyncio.Task[None]] = (),
        log_pipe: LogPipe | None = None,
    ) -> None:
        """End `processes`; close `log_pipe` when all that write to it have ended, those that `earlier` ends as well."""
        try:
            if self._supervisor is not None:
                supervisor = self._supervisor
                await asyncio.gather(*(supervisor.end(process, DRAIN_GRACE_S) for process in processes))
            if earlier:
                await asyncio.wait(earlier)
        finally:
            if log_pipe is not None:
                log_pipe.close()

    async def become_healthy(self) -> None:
        """Wake it and wait until a watchdog answers; raises NotHealthy with the reason."""
        self.wake()
        answers: list[str] = []
        try:
            async with asyncio.timeout(HEALTHY_WITHIN_S):
                await self._healthy(answers)
        except TimeoutError:
            reason = f": {answers[-1]}" if answers else ""
            text = f"{self.function.name.short} was not healthy within {HEALTHY_WITHIN_S:g} s{reason}"
            raise NotHealthy(text) from None

    async def _healthy(self, answers: list[str]) -> None:
        """Return once a watchdog says that it is healthy; what it says until then is added to `answers`."""
        client, url, pause_s = Client(), Url("http", str(self.path), 80, "/_/health"), HEALTH_POLL_S
        try:
            while True:
                trouble = next((each.last_exit for each in self.processes if each.last_exit), None)
                if trouble:
                    raise NotHealthy(f"the watchdog of {self.function.name.short} {trouble}")
                with contextlib.suppress(FaashoundError, TimeoutError):  # who has not accepted yet may have died
                    async with asyncio.timeout(LONGEST_HEALTH_POLL_S), await client.request("GET", url) as response:
                        if response.status == 200:
                            return
                        answers.append((await response.body.read(LONGEST_ANSWER_BYTES)).decode().strip())
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_HEALTH_POLL_S)
        finally:
            await client.close()

    async def retire(self) -> None:
        """Serve what is on its way, then end and close; another version has its name already.

        When cancelled, what was told to end does so all the same: `ended` waits for it.
        """
        await asyncio.wait((self.rest(),))
        quiet_since_s = time.monotonic()
        while time.monotonic() < quiet_since_s + QUIET_S:
            await asyncio.sleep(QUIET_S / 10)
            if any(process.last_exit for process in self.processes):
                break  # it serves no caller, and what waits would have it started again and again
            if self.processes:
                await asyncio.wait((self.rest(),))
                quiet_since_s = time.monotonic()
        await self.abandon()

    async def abandon(self) -> None:
        """End and close, whatever waits: no caller is served here, and where it never was in the table only we ask.

        A version that does not accept leaves our asking for its health there for good, which `rest` would wake it for.
        """
        ending, self.processes = self.processes, []
        self.stop_watching()
        await self._end(ending)
        self.close_socket()

    def stop_watching(self) -> None:
        """Wake no more, and put nothing to rest; the supervisor is about to end the watchdogs."""
        self._set_look(None)
        if self._load_look is not None:
            self._load_look.cancel()
        self._watch(False)

    async def ended(self) -> None:
        """Wait until the watchdogs that were told to end have done so, and their last lines are in the log."""
        if self._ending:
            await asyncio.wait(self._ending)

    def close_log(self) -> None:
        """Close the pipe of its log, behind what is in it.  Repeatable."""
        if self._log_pipe is not None:
            self._log_pipe.close()
            self._log_pipe = None

    def close_socket(self) -> None:
        """Close the socket, and the pipe of its log.  Repeatable."""
        self.close_log()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    # Watching for the first connection, and for the last.

    def _watch(self, wanted: bool) -> None:
        if self._wake_again is not None:
            self._wake_again.cancel()
            self._wake_again = None
        if wanted == self._is_watched:
            return
        loop = asyncio.get_running_loop()
        self._is_watched = wanted
        if wanted:
            loop.add_reader(self._listener.fileno(), self._on_connection)
        else:
            loop.remove_reader(self._listener.fileno())

    def _on_connection(self) -> None:
        if has_backlog(self._listener):
            self.wake_or_tell()
        # else a watchdog that is just ending has taken it

    def wake_or_tell(self) -> None:
        """Wake it; if that cannot be now, say so and try again: those who have connected wait."""
        try:
            self.wake()
        except OSError as error:
            self._trouble.tell(
                f"{self.function.name.short} cannot be started: {reason_of(error)}; tried every {WAKE_AGAIN_S:g} s"
            )
            self._watch(False)  # what waits would call us again and again
            self._wake_again = asyncio.get_running_loop().call_later(WAKE_AGAIN_S, self.wake_or_tell)

    def _note_use(self) -> None:
        self._used_s = time.monotonic()
        if self._look is None and self.scale.rests:
            self._set_look(min(self.scale.zero_duration_s / LOOKS_COUNT, LONGEST_LOOK_S))

    def _set_look(self, delay_s: float | None) -> None:
        if self._look is not None:
            self._look.cancel()
        self._look = None if delay_s is None else asyncio.get_running_loop().call_later(delay_s, self._on_look)

    def _look_at_load(self) -> None:
        """Have as many watchdogs as the load wants, where the labels allow it; come again while it is awake."""
        if self._load_look is not None:
            self._load_look.cancel()
        self._load_look = None
        scale = self.scale
        if not scale.grows or not self.processes:
            return
        in_flight_count = sum(map(self._count_calls, self.processes))
        self._load.look(time.monotonic(), self._count_made(self.function.name), in_flight_count)
        wanted_count = scale.count_for(self._load.in_flight_count, self._load.calls_per_s)
        count = max(wanted_count, self.scaled_count or 0)
        try:
            self._grow(count)
        except OSError as error:  # the next look tries again
            self._trouble.tell(f"{self.function.name.short} gets no more watchdogs now: {reason_of(error)}")
        if count < len(self.processes):
            self._shrink(count)
        self._look_at_load_later()

    def _look_at_load_later(self) -> None:
        self._load_look = asyncio.get_running_loop().call_later(LOAD_LOOK_S, self._look_at_load)

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    def _serving_pids(self) -> list[int]:
        """Return the processes whose loops show that they are used."""
        if not has_workers(self.function.settings or {}):
            return self.pids
        return [child for pid in self.pids for child in children_of(pid)]

    def _on_look(self) -> None:
        """See whether the watchdogs were used since the last look; if not for long enough, put it to rest."""
        self._look = None
        spent_ns, limit_s = {pid: read_spent_ns(pid) for pid in self._serving_pids()}, self.scale.zero_duration_s
        idle_s = time.monotonic() - self._used_s
        # The list of all connections is long where many functions are awake: it is read only before a decision.
        if spent_ns != self._spent_ns or (idle_s >= limit_s and may_have_connections(self.path)):
            self._spent_ns = spent_ns
            self._note_use()
            return
        if idle_s < limit_s:
            self._set_look(min(max(limit_s - idle_s, 0.01), LONGEST_LOOK_S))
            return
        log.info(f"{self.function.name.short} had no call for {idle_s:.0f} s and is put to rest")
        self.rest()


def has_backlog(listener: socket.socket) -> bool:
    """Tell whether a connection waits to be accepted."""
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    return bool(poller.poll(0))


def count_connections(path: Path) -> int:
    """Return how many connections there are to the listening socket at `path`, accepted or not."""
    wanted = os.fsencode(path)
    with open("/proc/net/unix", "rb") as file:
        found = [words for words in map(bytes.split, file) if words[-1] == wanted]
    return sum(words[3] != LISTENING_FLAGS for words in found)


def may_have_connections(path: Path) -> bool:
    """Tell whether there are connections to the socket at `path`, or that cannot be seen: we are out of descriptors."""
    try:
        return count_connections(path) > 0
    except OSError:
        return True


def count_calls(pid: int, settings: Mapping[str, str]) -> int:
    """Return how many calls a watchdog with `settings` has in flight; 0 if it has ended.

    Each is a child of the process that took it, and so is each that waits for its request (prewarm).  That process is
    the watchdog, which has its guard as well, or one of its worker processes, which are its children beside the guard.
    """
    waiting_count = parse_count(settings.get("prewarm") or "0")
    children = children_of(pid)
    count = max(len(children) - 1, 0)
    if has_workers(settings):
        waiting_count = -(-waiting_count // max(count, 1)) * count  # each worker process has its share, rounded up
        count = sum(len(children_of(child)) for child in children)
    return max(count - waiting_count, 0)


def has_workers(settings: Mapping[str, str]) -> bool:
    """Tell whether the watchdog of a function with `settings` has worker processes, which take its calls."""
    return parse_workers(watchdog_settings(settings)["workers"]) > 1


def children_of(pid: int) -> list[int]:
    """Return the children of a process; none if it has ended."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def read_spent_ns(pid: int) -> int:
    """Return the processor time that a process's first thread has used; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
