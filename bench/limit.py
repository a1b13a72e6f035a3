"""How many processes this machine can run, one per request, if nothing else is done: the limit for every watchdog.

    python -m bench.limit 2        # the plain loop in Python for 2 seconds; prints how many

One step is two pipes, posix_spawn of /bin/cat, 11 bytes in, 11 bytes out, wait.  In C if there is a compiler, so that
the language costs nothing, else in Python; one copy per core runs at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "/bin/cat"
BODY = b"hello world"

SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void run_one(void) {
    int in[2], out[2], status;
    char buffer[64], *words[] = {"cat", NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC)) exit(1);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    if (posix_spawn(&pid, "/bin/cat", &actions, NULL, words, environ)) exit(1);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    if (write(in[1], "hello world", 11) != 11) exit(1);
    close(in[1]);
    while (read(out[0], buffer, sizeof buffer) > 0) continue;
    close(out[0]);
    if (waitpid(pid, &status, 0) != pid || status) exit(1);
}

int main(int argc, char **argv) {
    double end_s = now_s() + atof(argv[1]);
    long count = 0;
    while (now_s() < end_s) run_one(), count++;
    printf("%ld\n", count);
    return 0;
}
"""


@dataclass(frozen=True)
class SpawnLimit:
    """The plain loop, ready to run; `language` says in what it is written."""

    command: tuple[str, ...]
    language: str

    def measure(self, seconds: float, copies_count: int) -> float:
        """Return the processes per second that so many loops reach together."""
        command = (*self.command, str(seconds))
        loops = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(copies_count)]
        counts = [int(loop.communicate(timeout=seconds + 30)[0]) for loop in loops]
        return sum(counts) / seconds


def prepare_limit(directory: Path) -> SpawnLimit:
    """Return the loop in C, compiled into `directory`, or in Python where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return SpawnLimit((sys.executable, "-m", "bench.limit"), "Python (no cc)")
    source, program = directory / "limit.c", directory / "limit"
    source.write_text(SOURCE, encoding="ascii")
    subprocess.run([compiler, "-O2", "-o", program, source], check=True)
    return SpawnLimit((str(program),), "C")


def run_one() -> None:
    """Do one step in Python."""
    child_in, stdin = os.pipe2(os.O_CLOEXEC)
    stdout, child_out = os.pipe2(os.O_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, child_in, 0), (os.POSIX_SPAWN_DUP2, child_out, 1)]
    pid = os.posix_spawn(PROGRAM, ("cat",), os.environ, file_actions=actions)
    os.close(child_in)
    os.close(child_out)
    os.write(stdin, BODY)
    os.close(stdin)
    while os.read(stdout, 64):
        pass
    os.close(stdout)
    os.waitpid(pid, 0)


def main(seconds: float) -> None:
    """Run steps for `seconds` and print how many."""
    end_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        run_one()
        count += 1
    print(count)


if __name__ == "__main__":
    main(float(sys.argv[1]))
