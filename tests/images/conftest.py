"""An engine, base images and wheels, so that every image of ours is built and run for real, with nothing pulled.

No registry of images is asked: the two bases are made from Debian's packages, `debian` as small as Debian gets and
without Python, `tools` with what building and the examples need.  Builds have no network: wheels are fetched before.
The engine is a `dockerd` of our own, with its data in a temporary directory and without rules in the machine's
firewall; or the one that DOCKER_HOST names, where bases and layers stay for the next run.  All that takes root, and
programs of the machine: see testkit/needed.py.  `pytest -m 'not images'` leaves these tests out.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from testkit.harness import ROOT, http_request, said, wait_until
from testkit.needed import tool, want_root

ENGINE_DEADLINE_S = 30.0
BUILD_DEADLINE_S = 600.0
IMAGE_TEST_S = 900  # of pytest-timeout: the first test waits for bases, wheels and builds
DEBIAN, DEBIAN_PYTHON = "bookworm", "3.11"
PROGRAMS = ("mmdebstrap", "dockerd", "docker", "runc")
TOOLS = "binutils gcc imagemagick libc6-dev libpython3.11 nodejs python3 python3-venv"
NO_WHEELS = ["nkeys"]  # published as source only; all are pure Python, so any Python makes the wheel
BASES = ("debian", "tools")
PREFIX = "faashound-"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "images: builds and runs images; needs root, Debian's docker.io and mmdebstrap")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is in this folder."""
    item.add_marker(pytest.mark.images)
    item.add_marker(pytest.mark.timeout(IMAGE_TEST_S))


@dataclass(frozen=True)
class Recipe:
    """How an image is built; `arguments` name images of ours by their short names."""

    file: str
    context: str = "."
    target: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)


RECIPES = {
    "watchdog": Recipe("Dockerfile.watchdog", arguments={"BASE": "tools"}),
    "gateway": Recipe("Dockerfile", target="gateway", arguments={"BASE": "tools"}),
    "worker": Recipe("Dockerfile", target="worker", arguments={"BASE": "tools"}),
    "example-shell": Recipe("examples/shell/Dockerfile", "examples", arguments={"BASE": "debian"}),
    "example-chain": Recipe("examples/chain/Dockerfile", "examples", arguments={"BASE": "debian"}),
    "example-python": Recipe("examples/python/Dockerfile", "examples", arguments={"BASE": "tools"}),
    "example-node": Recipe("examples/node/Dockerfile", "examples", arguments={"BASE": "tools"}),
    "example-c": Recipe("examples/c/Dockerfile", "examples", arguments={"BASE": "debian", "BUILD": "tools"}),
    "example-tokens": Recipe("examples/tokens/Dockerfile", "examples", arguments={"BASE": "debian"}),
    "example-server": Recipe("examples/server/Dockerfile", "examples", arguments={"BASE": "tools"}),
    "example-site": Recipe("examples/site/Dockerfile", "examples", arguments={"BASE": "debian"}),
    "example-status": Recipe("examples/status/Dockerfile", "examples", arguments={"BASE": "debian"}),
    "example-picture": Recipe("examples/picture/Dockerfile", "examples", arguments={"BASE": "tools"}),
}


class Engine:
    """A Docker engine, by its address.  What it has is of this run alone if it is `ours`, else maybe of another."""

    ours = False

    def __init__(self, host: str, directory: Path) -> None:
        """`directory` is one for files that do not matter any more when the tests are over."""
        self.host = host
        self.directory = directory
        self.command = ["docker", "-H", host]

    def docker(self, *arguments: str, stdin: bytes | None = None, deadline_s: float = 60.0) -> str:
        """Run the docker client and return what it prints; AssertionError with its complaint if it fails."""
        return said([*self.command, *arguments], stdin=stdin, deadline_s=deadline_s)

    def has(self, tag: str) -> bool:
        """Tell whether it has an image."""
        return bool(self.docker("image", "ls", "--quiet", tag).strip())


class OwnEngine(Engine):
    """A Docker engine of our own, with all that it keeps in `directory`; runs from `start` to `stop`."""

    ours = True

    def __init__(self, directory: Path) -> None:
        super().__init__(f"unix://{directory}/engine.sock", directory)
        self._log = directory / "engine.log"

    def start(self) -> None:
        """Start it and wait until it answers; the test fails if it cannot run here."""
        options = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "-H", self.host]
        places = [f"--data-root={self.directory}/data", f"--exec-root={self.directory}/exec"]
        places += [f"--pidfile={self.directory}/engine.pid"]
        with self._log.open("wb") as log:
            command = ["setpriv", "--pdeathsig", "TERM", "dockerd", *options, *places]  # not to outlive a killed test
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._is_up, ENGINE_DEADLINE_S, f"dockerd answers; its log is {self._log}")

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            print(self._log.read_text(errors="replace")[-2000:])
            pytest.skip("dockerd cannot run here; what it says is above")
        return subprocess.run([*self.command, "version"], capture_output=True, check=False).returncode == 0

    def stop(self) -> None:
        """End it and all its containers."""
        for container in self.docker("ps", "--all", "--quiet").split():
            self.docker("rm", "--force", "--volumes", container)
        self._process.terminate()
        self._process.wait(ENGINE_DEADLINE_S)
        self._let_go()

    def _let_go(self) -> None:
        """Unmount what an engine leaves mounted when it ends: the network of the host, which its last container had."""
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for path in reversed(mounted):
            if Path(path).is_relative_to(self.directory):
                said(["umount", path])


class Images:
    """Images by short names, each built when it is first asked for."""

    def __init__(self, engine: Engine, tell: Callable[[str], None]) -> None:
        self.engine = engine
        self.tell = tell
        self._source = engine.directory / "source"
        self._have: dict[str, str] = {}

    def tag(self, name: str) -> str:
        """Return the tag of the image `name`, built by now; another process may be at it, so one at a time."""
        if name not in self._have:
            with locked(self.engine.directory / "building"):
                self._need(name)
        return self._have[name]

    def _need(self, name: str) -> str:
        if name not in self._have:
            begin_s, tag = time.monotonic(), f"{PREFIX}{name}:latest"
            if not (self.engine.has(tag) and (self.engine.ours or name in BASES)):
                self._make(name, tag)  # and before it, in its time, what it is made from
                self.tell(f"image {name}: {self._size(name, tag)}, made in {time.monotonic() - begin_s:.1f} s")
            self._have[name] = tag
        return self._have[name]

    def _size(self, name: str, tag: str) -> str:
        base = RECIPES[name].arguments["BASE"] if name in RECIPES and name != "watchdog" else None
        beyond = f", {self._size_mb(tag) - self._size_mb(self._need(base)):.1f} MB beyond its base" if base else ""
        return f"{self._size_mb(tag):.1f} MB{beyond}"

    def _size_mb(self, tag: str) -> float:
        return int(self.engine.docker("image", "inspect", "--format", "{{.Size}}", tag)) / 1e6

    def _make(self, name: str, tag: str) -> None:
        if name == "debian":
            self._import_debian(tag)
        elif name == "tools":
            install = f"apt-get update -qq && apt-get install -qq -y --no-install-recommends {TOOLS} >/dev/null"
            self._build(tag, f"FROM {self._need('debian')}\nRUN {install}\n")
        elif name == "nats":
            self._build_nats(tag)
        else:
            self._build_recipe(tag, RECIPES[name])

    def _import_debian(self, tag: str) -> None:
        """Make the smallest Debian; mmdebstrap is debootstrap in half the time."""
        archive = self.engine.directory / "debian.tar"
        options = ["--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io"]  # it need not survive a power failure
        said(["mmdebstrap", *options, DEBIAN, str(archive)], deadline_s=BUILD_DEADLINE_S)
        self.engine.docker("import", str(archive), tag)
        archive.unlink()

    def _build(self, tag: str, dockerfile: str) -> None:
        """Build from a Dockerfile's text alone, with network."""
        words = ["build", "--network", "host", "-t", tag, "-"]
        self.engine.docker(*words, stdin=dockerfile.encode(), deadline_s=BUILD_DEADLINE_S)

    def _build_nats(self, tag: str) -> None:
        """Stand in for the image `nats`, with the same server and the same way to start it."""
        context = self.engine.directory / "nats"
        context.mkdir()
        shutil.copy(tool("nats-server"), context / "nats-server")
        entry = 'ENTRYPOINT ["/nats-server"]\nCMD ["--config", "/etc/nats/nats-server.conf"]'
        (context / "Dockerfile").write_text(f"FROM {self._need('debian')}\nCOPY nats-server /\n{entry}\n")
        self.engine.docker("build", "-t", tag, str(context))

    def _build_recipe(self, tag: str, recipe: Recipe) -> None:
        """Build without network, from a copy of the sources that has wheels beside it."""
        if not self._source.exists():
            copy_sources(self._source)
        arguments = {name: self._need(value) for name, value in recipe.arguments.items()}
        arguments |= {"PIP_NO_INDEX": "1"} if (self._source / recipe.file).read_text().count("PIP_NO_INDEX") else {}
        if recipe.context != ".":
            arguments["WATCHDOG"] = self._need("watchdog")
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        words += ["--target", recipe.target] if recipe.target else []
        file, context = self._source / recipe.file, self._source / recipe.context
        self.engine.docker(
            "build", "--network", "none", *words, "-t", tag, "-f", str(file), str(context), deadline_s=BUILD_DEADLINE_S
        )


def copy_sources(target: Path) -> None:
    """Copy what the Dockerfiles take, and put wheels for the Python of `tools` beside it."""
    target.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("Dockerfile*"), ROOT / "py.typed", ROOT / "pyproject.toml"]:
        shutil.copy(path, target)
    rooms = re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for folder in ("examples", *rooms):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    machine = platform.machine()
    for_base = ["--only-binary=:all:", "--python-version", DEBIAN_PYTHON]
    for_base += [f"--platform=manylinux{version}_{machine}" for version in ("2014", "_2_28", "_2_34")]
    wheels = str(target / "wheels")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    said([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, *NO_WHEELS])
    wanted = [f"{target}[nats]", "pyinstaller", "setuptools"]
    said([*pip, "download", "--find-links", wheels, "--dest", wheels, *for_base, *wanted], deadline_s=BUILD_DEADLINE_S)
    shutil.copytree(wheels, target / "examples" / "wheels")


def call_later(port: int, headers: Mapping[str, str] = {}) -> str:
    """Make an asynchronous call to a gateway and return its result, asking for it with `headers`."""
    accepted = http_request(port, "POST", "/async-function/wordcount", body=b"two words")
    assert accepted.status == 202, accepted
    location = accepted.headers["location"]
    ended = http_request(port, "GET", f"{location}?wait=40s", headers, timeout_s=60)
    assert json.loads(ended.body)["state"] == "done"
    return http_request(port, "GET", f"{location}/result", headers).text


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A Docker engine; the tests that want it are left out where there is none to be had."""
    want_root("starting a Docker engine")
    for program in PROGRAMS:
        tool(program)
    host = os.environ.get("DOCKER_HOST")
    if host:
        yield Engine(host, tmp_path_factory.mktemp("engine"))
        return
    base = tmp_path_factory.getbasetemp()
    with shared_engine((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engine") as ours:
        yield ours


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only process, and the only caller in it, that is past this point with `path`."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def shared_engine(directory: Path) -> Iterator[Engine]:
    """Run one engine for all processes of pytest-xdist: the first starts it, and ends it when the others are done."""
    directory.mkdir(exist_ok=True)
    engine = OwnEngine(directory)
    with (directory / "using").open("w") as using:
        with locked(directory / "starting"):
            first = not (directory / "running").exists()
            if first:
                engine.start()
                (directory / "running").touch()
            fcntl.flock(using, fcntl.LOCK_SH)
        try:
            yield engine
        finally:
            if first:
                with locked(directory / "starting"):
                    fcntl.flock(using, fcntl.LOCK_EX)  # the others have let go
                    engine.stop()
                    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line into the log of the whole run, past the capturing of output."""
    manager = request.config.pluginmanager.getplugin("capturemanager")

    def past_capture(line: str) -> None:
        with manager.global_and_fixture_disabled():
            print(f"\n{line}", file=sys.stderr, flush=True)

    return past_capture


@pytest.fixture(scope="session")
def images(engine: Engine, tell: Callable[[str], None]) -> Images:
    """The images of this project, built when asked for."""
    return Images(engine, tell)
