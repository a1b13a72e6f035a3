#!/usr/bin/env python3
"""Show what the system does in five steps, and check every answer.

    python examples/demo.py                 against http://127.0.0.1:8080, or a system started for the occasion
    python examples/demo.py --url URL       against the gateway at URL
    python examples/demo.py --lines URL     only print the steps as curl commands

Exits with 1 if an answer is wrong or missing.  Run it where faashound is installed (`make demo` does).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USUAL_URL = "http://127.0.0.1:8080"
START_DEADLINE_S = 20.0
REPLY_DEADLINE_S = 30.0
STOP_DEADLINE_S = 20.0


class DemoFailed(Exception):
    """The system did not do what this demonstration promises."""


@dataclass(frozen=True)
class Answer:
    """A response as far as it is shown and checked."""

    status: int
    reason: str
    headers: Message[str, str]
    text: str


@dataclass(frozen=True)
class Call:
    """One request, and what its answer must be: the status, a text in the body, members of the body's JSON object.

    With `within_s` it is repeated for so long until the answer is right.
    """

    method: str
    path: str
    status: int
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    members: Mapping[str, object] = field(default_factory=dict)
    within_s: float = 0.0

    def curl(self, url: str) -> str:
        """Return the command that does the same by hand."""
        words = ["curl", "-i"] if self.status == 202 else ["curl"]
        if self.body is not None:
            words += ["-d", self.body]
        elif self.method != "GET":
            words += ["-X", self.method]
        for name, value in self.headers.items():
            words += ["-H", f"{name}: {value}"]
        return shlex.join([*words, url + self.path])

    def send(self, url: str) -> Answer:
        """Return the answer of the system at `url`, whatever its status; DemoFailed if there is none."""
        data = None if self.body is None else self.body.encode()
        request = urllib.request.Request(url + self.path, data, dict(self.headers), method=self.method)
        try:
            with urllib.request.urlopen(request, timeout=REPLY_DEADLINE_S) as response:
                return Answer(response.status, response.reason, response.headers, response.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.reason, error.headers, error.read().decode())
        except OSError as error:
            raise DemoFailed(f"no answer from {url}: {error}") from None

    def is_right(self, answer: Answer) -> bool:
        """Return whether `answer` is what it must be."""
        if answer.status != self.status or self.text not in answer.text:
            return False
        body = json.loads(answer.text) if self.members else {}
        return all(body.get(name) == value for name, value in self.members.items())

    def expected(self) -> str:
        """Return in words what the answer must be."""
        text = [f"a body with {self.text!r}"] if self.text else []
        return ", ".join(
            [f"status {self.status}", *text, *(f"{name} {value!r}" for name, value in self.members.items())]
        )


def plan(url: str) -> list[tuple[str, list[Call]]]:
    """Return the five steps; the call ids are new each time, as the system wants them."""
    copied, retried, cancelled = (str(uuid.uuid4()) for _ in range(3))
    to_notify = {"X-Call-Id": copied, "X-Callback-Url": f"{url}/function/notify"}
    return [
        (
            "Call a function and wait for its answer",
            [Call("POST", "/function/wordcount", 200, "the quick brown fox", text="4 words")],
        ),
        (
            "Call one for later: the answer goes to the callback, here another function",
            [
                Call("POST", "/async-function/cat", 202, "hello", to_notify),
                Call("GET", "/function/notify", 200, text=copied, within_s=10),
            ],
        ),
        (
            "Ask what has become of the call; ?wait lets the answer wait for the end",
            [Call("GET", f"/async-function/{copied}?wait=10s", 200, members={"state": "done", "attempts": 1})],
        ),
        (
            "Call one that fails twice: it is tried again",
            [
                Call("POST", "/async-function/flaky", 202, "", {"X-Call-Id": retried}),
                Call("GET", f"/async-function/{retried}?wait=20s", 200, members={"state": "done", "attempts": 3}),
            ],
        ),
        (
            "Cancel one that takes a minute",
            [
                Call("POST", "/async-function/slow", 202, "60", {"X-Call-Id": cancelled}),
                Call("DELETE", f"/async-function/{cancelled}", 202),
                Call("GET", f"/async-function/{cancelled}?wait=10s", 200, members={"state": "cancelled"}),
            ],
        ),
    ]


def show_lines(url: str) -> None:
    """Print the steps as commands to paste."""
    for number, (title, calls) in enumerate(plan(url), 1):
        print(f"  {number}. {title}")
        for call in calls:
            print(f"     {call.curl(url)}")
    sys.stdout.flush()


def run(url: str) -> None:
    """Run every step against `url`, showing calls and answers; DemoFailed at the first wrong one."""
    for number, (title, calls) in enumerate(plan(url), 1):
        print(f"\n{number}. {title}")
        for call in calls:
            print(f"   $ {call.curl(url)}")
            end_s = time.monotonic() + call.within_s
            answer = call.send(url)
            while not call.is_right(answer) and time.monotonic() < end_s:
                time.sleep(0.1)
                answer = call.send(url)
            show(answer)
            if not call.is_right(answer):
                raise DemoFailed(f"wrong answer, expected: {call.expected()}")


def show(answer: Answer) -> None:
    """Print the status line, the headers of ours, and the body."""
    print(f"   {answer.status} {answer.reason}")
    for name in ("Location", "X-Call-Id"):
        if name in answer.headers:
            print(f"   {name}: {answer.headers[name]}")
    for line in answer.text.splitlines():
        print(f"   {line}")


def serves_examples(url: str) -> bool:
    """Return whether a gateway with our examples answers at `url`."""
    probe = Call("GET", "/function/notify", 200)
    try:
        return probe.is_right(probe.send(url))
    except DemoFailed:
        return False


@contextlib.contextmanager
def own_system() -> Iterator[str]:
    """Start a gateway with its worker on free ports, yield its URL, and end it; all it keeps is temporary."""
    with tempfile.TemporaryDirectory(prefix="faashound-demo-") as directory:
        settings = {
            "port": "0",
            "metrics_port": "0",
            "functions": "examples/functions.toml",
            "queue_url": f"spool:{directory}/spool",
            "state": f"{directory}/state",
            "TMPDIR": directory,
        }
        log = Path(directory, "log")
        command = [sys.executable, "-m", "faashound.gateway"]
        with log.open("wb") as stderr:
            gateway = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stdin=subprocess.DEVNULL, stderr=stderr
            )
        try:
            yield f"http://127.0.0.1:{wait_for_port(gateway, log)}"
        except DemoFailed as error:
            raise DemoFailed(f"{error}\nThe system's log:\n{log.read_text(errors='replace')}") from None
        finally:
            gateway.terminate()
            gateway.wait(STOP_DEADLINE_S)


def wait_for_port(gateway: subprocess.Popen[bytes], log: Path) -> int:
    """Return the port that the gateway says it listens on; DemoFailed if it ends, or does not say so in time.

    The lines of its watchdogs begin with the time, as its own do, but then comes the function's name.
    """
    end_s = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < end_s:
        said = re.search(r"^\S+ \S+ Listening on port: (\d+)", log.read_text(errors="replace"), re.MULTILINE)
        if said:
            return int(said[1])
        if gateway.poll() is not None:
            raise DemoFailed(f"the gateway ended with exit code {gateway.returncode}")
        time.sleep(0.05)
    raise DemoFailed(f"the gateway did not listen within {START_DEADLINE_S:g} s")


def main() -> int:
    """Run the demonstration as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Show what the system does in five steps, and check every answer.")
    parser.add_argument("--url", help=f"the gateway to use (default: {USUAL_URL} if it answers, else one of our own)")
    parser.add_argument("--lines", metavar="URL", help="only print the steps as curl commands for the gateway at URL")
    options = parser.parse_args()
    if options.lines:
        show_lines(options.lines)
        return 0
    url = options.url or (USUAL_URL if serves_examples(USUAL_URL) else None)
    try:
        with contextlib.nullcontext(url) if url else own_system() as used:
            print(f"Using the system at {used}" + ("" if url else ", started for this demonstration"))
            run(used)
    except DemoFailed as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    print("\nEvery answer was right.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
