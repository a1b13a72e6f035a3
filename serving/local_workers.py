"""The queue workers beside a gateway: one that is started with it, and one more for each set of queues that came later.

    workers = LocalWorkers(supervisor, environ, on_trouble, on_restart, follows=True)
    workers.follow(queues)                                   # whenever the functions have changed

Contract: what drains a queue goes on when others are added, so no call is cut and none waits; after a restart of the
gateway one worker drains them all.  An operator who names `queues` has said which there are, and no others are drained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from ..functions.supervisor import ManagedProgram, Supervisor, python_command
from ..watchdog import log, parse_settings
from ..worker import Settings as WorkerSettings

WORKER_COMMAND = python_command("faashound.worker")


class LocalWorkers:
    """Starts workers with `environ`; `follows` tells whether queues that come later are theirs too."""

    def __init__(
        self,
        supervisor: Supervisor,
        environ: Mapping[str, str],
        on_trouble: Callable[[str], None],
        on_restart: Callable[[], None],
        *,
        follows: bool,
    ) -> None:
        self._supervisor = supervisor
        self._environ = environ
        self._on_trouble = on_trouble
        self._on_restart = on_restart
        self._follows = follows
        self._drained = set(parse_settings(WorkerSettings, environ).queues)
        self.later_count = 0  # of those beside the first: they have no port that tells what they count
        self._troubled: set[str] = set()
        self._start("the worker", environ)

    def follow(self, queues: Collection[str]) -> None:
        """Have every one of `queues` drained."""
        new = set(queues) - self._drained
        if not new or not self._follows:
            return
        self._drained |= new
        self.later_count += 1
        told = ",".join(sorted(new))
        log.info(f"functions name queues that are new, and another worker drains them: {told}")
        environ = {**self._environ, "queues": told, "metrics_port": "0"}
        self._start(f"the worker of {told}", environ)

    def _start(self, name: str, environ: Mapping[str, str]) -> None:
        on_trouble, on_restart = partial(self._note, name), self._on_restart
        program = ManagedProgram(name, WORKER_COMMAND, environ, on_trouble=on_trouble, on_restart=on_restart)
        self._supervisor.start(program)

    def _note(self, name: str, trouble: str) -> None:
        """One of them has trouble, or none any more: all is well only when none has."""
        (self._troubled.add if trouble else self._troubled.discard)(name)
        self._on_trouble(", ".join(sorted(self._troubled)))
