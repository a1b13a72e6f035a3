"""The watchdog's own tests of timeouts and supervision, run against the image: PID 1, non-root, no Python inside.

Nothing is written anew here: the tests are those of test_timeouts.py, and those of test_container.py whose functions
are shell scripts; only the command that starts a watchdog is another.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testkit import harness
from testkit.harness import Program
from tests.images.conftest import Images
from tests.watchdog import test_container, test_timeouts

# Starts a container with the environment that a test gives to its watchdog, and becomes its client, which passes
# signals in and the log and the exit code out.  TMPDIR is the test's own directory, inside as outside.  The image has
# an exec_timeout of its own, which a test that sets none does not expect.
START = """#!/bin/sh
chmod 777 "$TMPDIR"
set -- --env exec_timeout=0
for name in $(env | sed -n 's/^\\([A-Za-z_]*\\)=.*/\\1/p' | grep -Ev '^(PATH|PWD|PYTHONPATH|COV.*)$'); do
    set -- "$@" --env "$name"
done
exec {docker} run --rm --pull=never --network=host --no-healthcheck --read-only --tmpfs=/tmp --cap-drop=ALL \\
    --security-opt=no-new-privileges --volume="$TMPDIR:$TMPDIR" "$@" {tag}
"""


@pytest.fixture(scope="module", autouse=True)
def _started_as_a_container(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    start = tmp_path_factory.mktemp("start") / "start"
    start.write_text(START.format(docker=" ".join(images.engine.command), tag=images.tag("example-shell")))
    start.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "command_of", lambda _: [str(start)])
        patch.setattr(harness, "runs_our_program", runs_our_program)
        patch.setattr(test_container, "UNSHARE", [])  # the engine makes the namespaces
        yield


def runs_our_program(pid: int) -> bool:
    """Tell whether process `pid` runs the frozen watchdog, or has ended."""
    words = harness.command_line_of(pid)
    return not words or words[0].startswith(b"/opt/fwatchdog/")


@pytest.fixture(scope="module")
def shell() -> Iterator[Program]:
    """Stands before the fixture that all other tests share."""
    with Program("watchdog", {"fprocess": "/bin/sh"}) as program:
        yield program


impatient = test_timeouts.impatient
globals().update({name: test for name, test in vars(test_timeouts).items() if name.startswith("test_")})

test_calls_are_answered_and_exit_is_0_when_told_to_stop = (
    test_container.test_calls_are_answered_and_exit_is_0_when_told_to_stop
)
test_watchdog_ends_at_once_when_told_twice_and_a_function_is_stuck = (
    test_container.test_watchdog_ends_at_once_when_told_twice_and_a_function_is_stuck
)
test_drain_is_bounded_when_a_function_is_stuck = test_container.test_drain_is_bounded_when_a_function_is_stuck
test_daemons_are_gone_and_reaped_when_deadlines_come_and_clients_leave = (
    test_container.test_daemons_are_gone_and_reaped_when_deadlines_come_and_clients_leave
)
