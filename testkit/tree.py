"""A function that is a tree of processes, made by description, and a way to see afterwards what is left of it.

    echo '{"traits": ["setsid"], "children": [{"traits": ["exit"]}]}' | python -S -E -I tree.py DIRECTORY

The description is the request's body.  Every process leaves an empty file `<pid>.<start time>` in DIRECTORY, so `alive`
knows survivors, and zombies, even when they have wiped their environment; the start time (proc(5)) tells a process from
a later one of the same number.  The root says `started` once its children are forked.  Traits, done in this order:

    orphan          it was forked through a process that is dead: a double fork
    setsid          it leads a session of its own
    setpgid         it leads a process group of its own
    ignore-signals  TERM, INT and HUP do not end it
    close-output    it has closed the pipes of the call
    wipe            it has executed anew, with an empty environment
    stop            it stops itself (SIGSTOP) once its children are forked
    exit            it exits once its children are forked; without this and `stop` it hangs
"""

import json
import os
import signal
import sys
from typing import Any

TRAITS = ("orphan", "setsid", "setpgid", "ignore-signals", "close-output", "wipe", "stop", "exit")


def command(directory: object) -> str:
    """Return the `fprocess` whose processes leave their files in `directory`; -SEI has Python start in 10 ms."""
    return f"{sys.executable} -S -E -I {__file__} {directory}"


def alive(directory: object, *, or_zombie: bool = True) -> set[int]:
    """Return the numbers of the recorded processes that live, or (`or_zombie`) wait to be reaped."""
    recorded = [(int(pid), started) for pid, started in (name.split(".") for name in os.listdir(str(directory)))]
    states = "" if or_zombie else "ZX"
    return {pid for pid, started in recorded if (now := _state_and_start(pid))[1] == started and now[0] not in states}


def _state_and_start(pid: int) -> tuple[str, str]:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", ""
    return fields[0], fields[19]


def grow(directory: str, node: dict[str, Any]) -> None:
    """Be the process that `node` describes; never returns."""
    traits = node.get("traits", ())
    _record(directory)
    if "setsid" in traits and os.getpgid(0) != os.getpid():
        os.setsid()
    if "setpgid" in traits and os.getsid(0) != os.getpid():
        os.setpgid(0, 0)
    if "ignore-signals" in traits:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if "close-output" in traits:
        os.closerange(0, 3)
    if "wipe" in traits:
        rest = {**node, "traits": [each for each in traits if each not in ("wipe", "setsid")]}
        os.execve(sys.executable, [sys.executable, "-SEI", __file__, directory, json.dumps(rest)], {})
    _bear(directory, node)


def _bear(directory: str, node: dict[str, Any]) -> None:
    traits = node.get("traits", ())
    for child in node.get("children", ()):
        if os.fork() == 0:
            if "orphan" in child.get("traits", ()) and os.fork():
                os._exit(0)
            grow(directory, {**child, "root": False})
    if node.get("root", True) and "close-output" not in traits:
        os.write(1, b"started\n")
    if "exit" in traits:
        os._exit(0)
    if "stop" in traits:
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        signal.pause()


def _record(directory: str) -> None:
    pid = os.getpid()
    os.close(os.open(f"{directory}/{pid}.{_state_and_start(pid)[1]}", os.O_CREAT | os.O_WRONLY))


if __name__ == "__main__":
    grow(sys.argv[1], json.loads(sys.argv[2] if len(sys.argv) > 2 else sys.stdin.read()))
