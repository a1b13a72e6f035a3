"""The stacks of deploy/ are brought up by the real tools, and the demonstration of examples/ passes against them."""

from __future__ import annotations

import os
import subprocess
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from testkit.harness import ROOT, free_port, http_request, said, wait_until
from testkit.needed import tool
from tests.images.conftest import Engine, Images, call_later

UP_DEADLINE_S = 180.0
SERVICES = ("gateway", "worker", "nats", "example-shell", "example-chain", "example-python", "example-picture")


class Stack:
    """What compose files describe, as a project of its own on a free port."""

    def __init__(self, images: Images, *files: str) -> None:
        for name in SERVICES:
            images.tag(name)
        self.port = free_port()
        chosen = {"GATEWAY_PORT": str(self.port), "NATS_IMAGE": images.tag("nats"), "INITIAL_RETRY_WAIT": "500ms"}
        self.environment = os.environ | {"DOCKER_HOST": images.engine.host} | chosen
        words = [word for file in files for word in ("--file", str(ROOT / "deploy" / file))]
        self._command = [tool("docker-compose"), "--project-name", f"faashound-{uuid.uuid4().hex[:8]}", *words]

    def compose(self, *arguments: str) -> str:
        """Run compose and return what it prints; AssertionError with all of it if it fails."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


@contextmanager
def stack(images: Images, *files: str) -> Iterator[Stack]:
    """Bring a stack up, and down again with its volumes."""
    running = Stack(images, *files)
    try:
        running.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", str(int(UP_DEADLINE_S)))
        yield running
    finally:
        running.compose("down", "--volumes", "--timeout", "1")


@pytest.mark.parametrize("files", [[], ["compose.spool.yml"]], ids=["nats", "spool"])
def test_demo_passes_when_compose_has_brought_up_the_stack(
    images: Images, tell: Callable[[str], None], files: Sequence[str]
) -> None:
    with stack(images, "compose.yml", "compose.examples.yml", *files) as running:
        assert http_request(running.port, "POST", "/function/wordcount", body=b"now").text == "1 words\n"
        said = running.compose("run", "--rm", "--no-deps", "demo")
        assert "Every answer was right." in said
        tell(f"make demo against the compose stack ({', '.join(files) or 'NATS'}): every answer was right")


# Virtual addresses and the routing mesh of a swarm need IPVS, which not every kernel has: names lead to containers
# instead, and the gateway's port is the machine's.
WITHOUT_IPVS = """
services:
  gateway:
    deploy: {{endpoint_mode: dnsrr}}
    ports: [{{target: 8080, published: {port}, mode: host}}]
  worker: {{deploy: {{endpoint_mode: dnsrr}}}}
  nats: {{deploy: {{endpoint_mode: dnsrr}}}}
  fn-wordcount: {{deploy: {{endpoint_mode: dnsrr}}}}
  fn-notify: {{deploy: {{endpoint_mode: dnsrr}}}}
"""


@contextmanager
def swarm(engine: Engine) -> Iterator[None]:
    """Make the engine a swarm of one, and end that together with the network it brings."""
    engine.docker("swarm", "init", "--advertise-addr", "127.0.0.1")
    try:
        yield
    finally:
        engine.docker("swarm", "leave", "--force")
        ours = ["ps", "--quiet", "--filter", "label=com.docker.swarm.service.name"]
        wait_until(lambda: not engine.docker(*ours), UP_DEADLINE_S, "all containers of the swarm gone")
        engine.docker("network", "rm", "docker_gwbridge")


def test_calls_are_made_now_and_later_when_a_swarm_runs_the_stack(
    images: Images, engine: Engine, tell: Callable[[str], None], tmp_path: Path
) -> None:
    environment = Stack(images, "compose.yml").environment
    port = int(environment["GATEWAY_PORT"])
    override = tmp_path / "without-ipvs.yml"
    override.write_text(WITHOUT_IPVS.format(port=port))
    paths = (ROOT / "deploy" / "compose.yml", ROOT / "deploy" / "stack.yml", override)
    files = [word for path in paths for word in ("--compose-file", str(path))]
    with swarm(engine):
        for name in ("basic-auth-user", "basic-auth-password"):
            engine.docker("secret", "create", name, "-", stdin=b"known\n")
        said(
            [*engine.command, "stack", "deploy", "--resolve-image=never", *files, "faashound"], environment=environment
        )
        wait_until(lambda: is_served(port), UP_DEADLINE_S, "the gateway and a function answer")
        assert http_request(port, "GET", "/system/calls").status == 401
        assert call_later(port, {"Authorization": f"Basic {b64encode(b'known:known').decode()}"}) == "2 words\n"
        tell("the stack ran as a swarm: calls made now and later")


def is_served(port: int) -> bool:
    try:
        return http_request(port, "POST", "/function/wordcount", body=b"now").status == 200
    except OSError:
        return False
