"""Every image of ours is built and run: non-root, read-only but for /tmp, healthy, stopped by one SIGTERM."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from testkit.harness import Answer, free_port, http_request, said, wait_until
from tests.images.conftest import Engine, Images, call_later

HARDENED = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=host"]
HEALTHY_DEADLINE_S = 40.0
FROZEN_START_S = 0.25  # from the start of the program to its listening, on a machine that is otherwise idle
GLIBC_MINOR = 36  # 2.36 is enough, as Dockerfile.watchdog says


class Container:
    """A container of ours, hardened, that shares the machine's network; `health_path` answers once it serves."""

    def __init__(self, images: Images, name: str, settings: dict[str, str], options: Sequence[str] = ()) -> None:
        self._engine = images.engine
        self.port = int(settings["port"])
        words = [f"--env={key}={value}" for key, value in settings.items()]
        words += ["--health-interval=500ms", "--health-start-period=0s", *HARDENED, *options]
        self.id = self._engine.docker("run", "--detach", "--pull=never", *words, images.tag(name)).strip()

    def inspect(self, template: str) -> str:
        """Return what the engine knows of it."""
        return self._engine.docker("inspect", "--format", template, self.id).strip()

    def wait_healthy(self) -> None:
        """Wait until its HEALTHCHECK says so."""

        def is_healthy() -> bool:
            state = self.inspect("{{.State.Status}} {{.State.Health.Status}}")
            assert state.startswith("running"), said([*self._engine.command, "logs", self.id])
            return state == "running healthy"

        wait_until(is_healthy, HEALTHY_DEADLINE_S, "healthy")

    def script(self, text: str) -> str:
        """Run a shell script as its function, and return what that says."""
        answer = http_request(self.port, "POST", "/", body=text.encode())
        assert answer.status == 200, answer
        return answer.text

    def stop(self) -> None:
        """Stop it by one SIGTERM; it ends in good order."""
        self._engine.docker("stop", "-t", "30", self.id)
        assert self.inspect("{{.State.ExitCode}}") == "0"


@contextmanager
def container(images: Images, name: str, *options: str, **settings: str) -> Iterator[Container]:
    """Run an image until its HEALTHCHECK is content, and stop it at the end."""
    defaults = {"port": str(free_port()), "metrics_port": str(free_port()), "healthcheck_interval": "0"}
    running = Container(images, name, defaults | settings, options)
    try:
        running.wait_healthy()
        yield running
        running.stop()
    finally:
        images.engine.docker("rm", "--force", "--volumes", running.id)


@pytest.fixture(scope="session")
def photo(images: Images, engine: Engine) -> bytes:
    """The photograph of a rose that ImageMagick brings, as a JPEG."""
    command = [*engine.command, "run", "--rm", "--network=none", images.tag("tools"), "convert", "rose:", "jpg:-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def says(text: str) -> Callable[[Answer], bool]:
    return lambda answer: answer.text == text


def is_png_of_width(width: int) -> Callable[[Answer], bool]:
    return lambda answer: (
        answer.body[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", answer.body[16:20])[0] == width
    )


EXAMPLES = {
    "shell": ("/", b"the quick brown fox", says("4 words\n")),
    "chain": ("/", b"hello", says("")),
    "python": ("/", b"0", says("done\n")),
    "node": ("/", b"[1, 2, 6]", says('{"count":3,"sum":9,"mean":3}\n')),
    "c": ("/", b"1000000", says("78498\n")),
    "picture": ("/?width=200", None, is_png_of_width(200)),
    "tokens": ("/", b"one two", says("data: one\n\ndata: two\n\ndata: [DONE]\n\n")),
    "server": ("/tea", b"", says("/tea was called 1 times\n")),
    "status": ("/", b"alice", says("welcome, alice\n")),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_answers_and_is_hardened_when_its_image_runs(images: Images, photo: bytes, name: str) -> None:
    path, body, is_right = EXAMPLES[name]
    with container(images, f"example-{name}") as running:
        answer = http_request(running.port, "POST", path, body=photo if body is None else body)
        assert answer.status == 200, answer
        assert is_right(answer), answer
        assert running.inspect("{{.Config.User}} {{.HostConfig.ReadonlyRootfs}}") == "65532:65532 true"


def test_example_site_serves_its_page_from_a_hardened_image(images: Images) -> None:
    with container(images, "example-site") as running:
        answer = http_request(running.port, "GET", "/")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "Hello from a function without a program." in answer.text


def test_watchdog_needs_neither_python_nor_rights_when_it_is_copied_into_an_image(images: Images) -> None:
    with container(images, "example-shell", fprocess="sh") as running:
        assert running.script("command -v python3 python || echo none") == "none\n"
        assert running.script("cat /proc/1/comm; id -u") == "fwatchdog\n65532\n"
        assert running.script("touch /opt/x 2>/dev/null || echo read-only") == "read-only\n"
        assert (
            running.script("grep -E '^(Cap(Eff|Bnd)|NoNewPrivs)' /proc/self/status | cut -f2 | uniq")
            == f"{0:016x}\n1\n"
        )


@pytest.mark.parametrize("own", [None, "/opt/own"], ids=["unset", "set-by-operator"])
def test_function_sees_nothing_of_the_freezing_when_it_looks_at_its_environment(
    images: Images, own: str | None
) -> None:
    settings = {"fprocess": "env", "cgi_headers": "false"} | ({"LD_LIBRARY_PATH": own} if own else {})
    with container(images, "example-shell", **settings) as running:
        names = dict(line.split("=", 1) for line in http_request(running.port).text.splitlines())
        assert names.get("LD_LIBRARY_PATH") == own
        assert not [name for name in names if "PYI" in name or "MEIPASS" in name or name.endswith("_ORIG")]


def test_glibc_of_the_promised_version_is_enough_when_frozen_for_it(
    images: Images, engine: Engine, tmp_path: Path
) -> None:
    created = engine.docker("create", images.tag("watchdog"), "none").strip()
    engine.docker("cp", f"{created}:/fwatchdog", str(tmp_path))
    engine.docker("rm", created)
    files = [path for path in (tmp_path / "fwatchdog").rglob("*") if path.is_file()]
    needed = max(int(minor) for path in files for minor in re.findall(rb"GLIBC_2\.(\d+)\0", path.read_bytes()))
    images.tell(f"fwatchdog: {sum(path.stat().st_size for path in files) / 1e6:.1f} MB, needs glibc 2.{needed}")
    assert needed <= GLIBC_MINOR


FROZEN = ("example-shell", "/opt/fwatchdog/fwatchdog")
SOURCE = ("example-python", "/opt/watchdog/bin/python /opt/watchdog/watchdog.py")


def test_watchdog_starts_in_time_when_frozen(images: Images) -> None:
    """Judged by the processor's time, all that a start takes: other tests have the processors too."""
    processor_s = {}
    for name, command in (FROZEN, SOURCE):
        with container(images, name, fprocess="sh") as running:
            memory_bytes = resident_bytes(running)
            starts = [start(running, command) for _ in range(7)]
        processor_s[name] = min(one.processor_s for one in starts)
        images.tell(
            f"{command}: listens after {min(one.elapsed_s for one in starts) * 1000:.0f} ms at best,"
            f" {processor_s[name] * 1000:.0f} ms of a processor; {memory_bytes / 1e6:.1f} MB at rest, guard included"
        )
    assert processor_s[FROZEN[0]] < FROZEN_START_S


class Start(NamedTuple):
    """What it took a watchdog to say that it listens."""

    elapsed_s: float
    processor_s: float


def start(running: Container, command: str) -> Start:
    """Start a watchdog in a container, measured by a script there."""
    output = running.script(f"""
        mkfifo /tmp/log-$$; begin=$(date +%s%N)
        port=0 metrics_port=0 suppress_lock=true fprocess=true {command} >/tmp/log-$$ 2>&1 &
        read line </tmp/log-$$
        echo $(($(date +%s%N) - begin)) $(cut -d' ' -f14,15 /proc/$!/stat) "$line"
        kill $!
    """)
    elapsed_ns, user_ticks, system_ticks, line = output.split(maxsplit=3)
    assert "Listening" in line
    return Start(int(elapsed_ns) / 1e9, (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK"))


def resident_bytes(running: Container) -> int:
    """Return the memory of PID 1 and its children; what they share is counted once (PSS)."""
    first = running.inspect("{{.State.Pid}}")
    children = Path(f"/proc/{first}/task/{first}/children").read_text("ascii").split()
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text("ascii") for pid in [first, *children]]
    return sum(int(found) * 1024 for text in rollups for found in re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE))


@pytest.mark.parametrize("split", [False, True], ids=["worker-inside", "worker-beside"])
def test_gateway_and_worker_make_a_call_when_they_share_a_volume(images: Images, engine: Engine, split: bool) -> None:
    volume = f"--volume=faashound-{uuid.uuid4()}:/var/lib/faashound"
    with container(images, "example-shell") as function:
        pattern = f"http://127.0.0.1:{function.port}/{{name}}"
        gateway_settings = {"function_url": pattern, "worker": "none"} if split else {"function_url": pattern}
        with container(images, "gateway", volume, worker_metrics_port=str(free_port()), **gateway_settings) as gateway:
            if not split:
                assert call_later(gateway.port) == "2 words\n"
                return
            with container(images, "worker", volume, gateway_url=f"http://127.0.0.1:{gateway.port}"):
                assert call_later(gateway.port) == "2 words\n"
