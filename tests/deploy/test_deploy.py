"""What deploy/ holds is valid to the tools that read it, names settings that exist, and has timeouts that agree."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from faashound import watchdog, worker
from faashound.queues.nats_settings import NatsSettings
from faashound.queues.settings import parse_positive_size
from faashound.queues.spool.directory import open_directory
from faashound.serving import settings as gateway
from faashound.watchdog import parse_duration, parse_settings
from testkit.harness import ROOT, SOON_S, free_port, said, wait_until
from testkit.nats_servers import Cluster
from testkit.needed import tool
from testkit.system import Receiver, System, always

DEPLOY = ROOT / "deploy"
KUBERNETES_VERSION = "1.30"
OVERLAYS = ("base", "async")
UNITS = sorted(path.name for path in (DEPLOY / "systemd").iterdir())
EXPOSURE_AT_MOST = 2.0  # of `systemd-analyze security`, where 10 is a service without any hardening
SETTINGS = {"gateway": gateway.Settings, "worker": worker.Settings, "function": watchdog.Settings}


# Which settings each service has, whatever deploys it.


class Service:
    """One program of ours as a deployment has it: which, with what settings, and how long it may take to stop."""

    def __init__(self, name: str, environment: Mapping[str, str], grace_s: float) -> None:
        self.name = name
        self.program = name if name in ("gateway", "worker") else "function"
        self.environment = dict(environment)
        self.grace_s = grace_s

    def value(self, name: str) -> float:
        """Return a duration among its settings, in seconds; the program's default where the deployment is silent."""
        (default,) = (row.default for row in rows(SETTINGS[self.program]) if row.name == name)
        return parse_duration(self.environment.get(name, default or "0"))

    def stops_within_s(self) -> float:
        """Return how long it may take from SIGTERM to its end."""
        if self.program == "worker":
            return self.value("drain_timeout")
        if self.program == "function":
            drain_s = max(self.value("exec_timeout"), self.value("write_timeout"))
            return self.value("healthcheck_interval") + drain_s + self.value("term_grace")
        own_worker_s = 0.0 if self.environment.get("worker") == "none" else worker_drain_s(self.environment)
        return own_worker_s + self.value("upstream_timeout")


def rows(settings: type) -> Iterable[watchdog.Setting]:
    return watchdog.settings_table(settings).values()


def worker_drain_s(environment: Mapping[str, str]) -> float:
    return Service("worker", environment, 0).value("drain_timeout")


def compose_services(*files: str) -> dict[str, dict[str, Any]]:
    """Return the services that compose makes of its files, by name."""
    words = [word for file in files for word in ("--file", str(DEPLOY / file))]
    services: dict[str, dict[str, Any]] = yaml.safe_load(said([tool("docker-compose"), *words, "config"]))["services"]
    return services


def of_compose(*files: str) -> list[Service]:
    """Return the services of compose files that run programs of ours."""
    services = compose_services(*files)
    return [
        Service(name.removeprefix("fn-"), service.get("environment", {}), parse_duration(service["stop_grace_period"]))
        for name, service in services.items()
        if name not in ("nats", "demo")
    ]


def resources(overlay: str) -> list[dict[str, Any]]:
    """Return what kustomize makes of an overlay."""
    text = said([tool("kubectl"), "kustomize", str(DEPLOY / "kubernetes" / overlay)])
    return list(yaml.safe_load_all(text))


def pods(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and pod of each workload."""
    for resource in resources(overlay):
        if resource["kind"] in ("Deployment", "StatefulSet"):
            yield resource["metadata"]["name"], resource["spec"]["template"]["spec"]


def of_kubernetes(overlay: str) -> list[Service]:
    """Return the programs of ours in an overlay; a preStop hook counts into the time that stopping takes."""
    found = []
    for name, pod in pods(overlay):
        (container,) = pod["containers"]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        pause_s = float(hook[1]) if hook[:1] == ["sleep"] else 0.0
        environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        if name != "nats":
            found.append(Service(name, environment, pod["terminationGracePeriodSeconds"] - pause_s))
    return found


def of_systemd() -> list[Service]:
    """Return the programs of ours that are units."""
    found = []
    for name in UNITS:
        if name.endswith(".service"):
            text = (DEPLOY / "systemd" / name).read_text(encoding="utf-8")
            words = [word for line in re.findall(r"^Environment=(.*)$", text, re.MULTILINE) for word in line.split()]
            (grace,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
            program = re.sub(r"faashound-|@?\.service", "", name)
            found.append(Service(program, dict(word.split("=", 1) for word in words), float(grace)))
    return found


DEPLOYMENTS = {
    "compose": lambda: of_compose("compose.yml"),
    "compose-examples": lambda: of_compose("compose.yml", "compose.examples.yml"),
    "compose-spool": lambda: of_compose("compose.yml", "compose.spool.yml"),
    "kubernetes-base": lambda: of_kubernetes("base"),
    "kubernetes-async": lambda: of_kubernetes("async"),
    "systemd": of_systemd,
}


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_every_setting_is_one_that_its_program_has(deployment: str) -> None:
    for service in DEPLOYMENTS[deployment]():
        kinds = [SETTINGS[service.program], NatsSettings]
        kinds += [worker.Settings] if service.program == "gateway" else []  # for the worker beside it
        known = {row.name for kind in kinds for row in rows(kind)}
        assert set(service.environment) <= known, service.name


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_nothing_is_killed_while_it_ends_in_good_order(deployment: str) -> None:
    for service in DEPLOYMENTS[deployment]():
        assert service.grace_s > service.stops_within_s(), service.name


@pytest.mark.parametrize("deployment", [name for name in DEPLOYMENTS if name != "systemd"])
def test_callers_outwait_the_functions_that_they_call(deployment: str) -> None:
    services = DEPLOYMENTS[deployment]()
    longest_s = max(service.value("exec_timeout") for service in services if service.program == "function")
    for service in services:
        if service.program == "gateway":
            assert service.value("upstream_timeout") > longest_s
        if service.program == "worker":
            assert service.value("drain_timeout") > longest_s


# Compose.

COMPOSED = pytest.mark.parametrize(
    "files", [(), ("compose.examples.yml",), ("compose.spool.yml",)], ids=lambda files: "+".join(files)
)


@COMPOSED
def test_compose_starts_every_service_again_when_the_machine_does(files: tuple[str, ...]) -> None:
    for name, service in compose_services("compose.yml", *files).items():
        assert service.get("restart") == "unless-stopped", name


def test_compose_stops_the_broker_after_those_who_record_in_it_what_they_end() -> None:
    services = compose_services("compose.yml")
    users = {
        name for name, service in services.items() if "nats" in service.get("environment", {}).get("queue_url", "")
    }
    assert users == {"gateway", "worker"}
    assert all("nats" in services[name].get("depends_on", {}) for name in users)


def test_compose_worker_calls_through_the_gateway_as_it_shares_no_network_with_functions() -> None:
    services = compose_services("compose.yml")
    of_functions = {network for name in services if name.startswith("fn-") for network in services[name]["networks"]}
    assert of_functions.isdisjoint(services["worker"]["networks"])
    assert services["worker"]["environment"].get("invoke") == "gateway"


# Images.

HEALTH_CHECKS = dict(
    re.findall(
        r"^FROM runtime AS (\w+)$.*?^HEALTHCHECK .*?CMD (\[.*?\])$",
        (ROOT / "Dockerfile").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)


def is_content(program: str, port: int) -> bool:
    """Run the health check of a program's image against `port`; tell whether it finds the program healthy."""
    command = [word.replace("python3", sys.executable) for word in json.loads(HEALTH_CHECKS[program])]
    variable = {"gateway": "port", "worker": "metrics_port"}[program]
    return subprocess.run(command, env={variable: str(port)}, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("program", ["gateway", "worker"])
@pytest.mark.parametrize("status", [200, 503])
def test_image_is_healthy_while_its_program_answers_whatever_it_says_of_its_queue(program: str, status: int) -> None:
    """A swarm kills what is not: results that wait for room would be lost, and their functions run again."""
    with Receiver(always(status)) as receiver:
        wait_until(lambda: is_content(program, receiver.port), SOON_S, "it is healthy")
        assert {request.path for request in receiver.received()} == {"/healthz"}


@pytest.mark.parametrize("program", ["gateway", "worker"])
def test_image_is_unhealthy_when_its_program_does_not_answer(program: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connected by the kernel, and accepted by nothing
        assert not is_content(program, silent.getsockname()[1])
    assert not is_content(program, free_port())


# Who may reach what.


def is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


@COMPOSED
def test_compose_publishes_on_loopback_only(files: tuple[str, ...]) -> None:
    for name, service in compose_services("compose.yml", *files).items():
        assert all(is_loopback(port["host_ip"]) for port in service.get("ports", ())), name


@COMPOSED
def test_compose_gateway_keeps_to_its_names_and_pages_though_it_cannot_see_that_it_is_on_loopback(
    files: tuple[str, ...],
) -> None:
    service = compose_services("compose.yml", *files)["gateway"]
    told = {name: service["environment"][name] for name in ("allowed_hosts", "allowed_origins")}
    with System(settings={"host": "0.0.0.0", "worker": "none", **told}) as system:

        def status(headers: Mapping[str, str]) -> int:
            return system.request("POST", "/function/cat", b"", headers).status

        page = {"Origin": "http://page.example"}
        assert [status({"Host": "rebind.example"}), status(page)] == [421, 403]
        assert status({"Host": "gateway:8080"}) == 200  # as the worker and the demonstration call it
        assert status({"Host": "localhost:8080", "Origin": "http://localhost:8080"}) == 200


def test_swarm_publishes_only_a_gateway_that_asks_for_a_password() -> None:
    """Ports that a swarm publishes are open on all nodes; with `dnsrr` it refuses to publish any."""
    published = {name for name, service in compose_services("compose.yml").items() if service.get("ports")}
    assert published == {"gateway"}
    assert compose_services("compose.yml")["gateway"]["deploy"]["endpoint_mode"] == "dnsrr"
    gateway = yaml.safe_load((DEPLOY / "stack.yml").read_text(encoding="utf-8"))["services"]["gateway"]
    assert gateway["environment"] == {"basic_auth": "true", "allowed_hosts": "", "allowed_origins": ""}  # unset
    assert gateway["secrets"] == ["basic-auth-user", "basic-auth-password"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gateway_in_kubernetes_asks_for_a_password(overlay: str) -> None:
    (gateway,) = (service for service in of_kubernetes(overlay) if service.program == "gateway")
    assert gateway.environment["basic_auth"] == "true"


def test_units_listen_on_loopback_only() -> None:
    assert all("host" not in service.environment for service in of_systemd() if service.program != "function")
    assert all(
        is_loopback(row.default or "")
        for kind in (gateway.Settings, worker.Settings)
        for row in rows(kind)
        if row.name == "host"
    )
    sockets = [(DEPLOY / "systemd" / name).read_text(encoding="utf-8") for name in UNITS if name.endswith(".socket")]
    streams = [stream for text in sockets for stream in re.findall(r"^Listen\w+=(.*)$", text, re.MULTILINE)]
    assert streams
    assert all(is_loopback(stream.rpartition(":")[0]) for stream in streams)


PUBLISHED = [ROOT / "README.md", *(path for folder in ("deploy", "examples") for path in (ROOT / folder).rglob("*.*"))]
(FUNCTION_URL_HELP,) = (row.help for row in rows(gateway.Settings) if row.name == "function_url")


def test_no_example_makes_a_host_of_a_name_alone() -> None:
    """A caller chooses the name: with `http://{name}:8080` also `localhost`, or an address in disguise."""
    texts = [FUNCTION_URL_HELP, *(path.read_text(encoding="utf-8", errors="replace") for path in PUBLISHED)]
    patterns = [pattern for text in texts for pattern in re.findall(r"https?://[^\s\"'`|]*\{name\}[^\s\"'`|]*", text)]
    assert patterns
    assert [pattern for pattern in patterns if re.search(r"://\{name\}(?![-.\w])", pattern)] == []


# Kubernetes.


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_knows_every_field(overlay: str) -> None:
    for resource in resources(overlay):
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)


def test_kubernetes_knows_every_field_of_the_scaling_examples() -> None:
    kubernetes_validate.validate(yaml.safe_load(scaling("functions.yaml")), KUBERNETES_VERSION, strict=True)
    keda = yaml.safe_load(scaling("worker.yaml"))
    named = {(resource["kind"], resource["metadata"]["name"]) for resource in resources("async")}
    assert keda["apiVersion"] == "keda.sh/v1alpha1"  # has no schema here: at least its target exists
    assert ("Deployment", keda["spec"]["scaleTargetRef"]["name"]) in named


def scaling(name: str) -> str:
    return (DEPLOY / "kubernetes" / "scaling" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_hardened_limited_and_probed(overlay: str) -> None:
    for name, pod in pods(overlay):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["automountServiceAccountToken"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= set(container["resources"])
        assert {"readinessProbe", "livenessProbe"} <= set(container)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_restarts_nothing_for_the_state_of_its_queue(overlay: str) -> None:
    """/healthz is 503 on a full disk and without NATS: calls go elsewhere, and what waits for the queue is kept."""
    for name, pod in pods(overlay):
        (container,) = pod["containers"]
        if name in ("gateway", "worker"):
            readiness = container["readinessProbe"]["httpGet"]
            assert readiness["path"] == "/healthz"
            assert container["livenessProbe"].get("tcpSocket") == {"port": readiness["port"]}, name


def mount_as_kubelet(volume: Path, policy: str) -> None:
    """Do to a volume what kubelet does for an `fsGroup` before each start of a pod; its group is ours already."""
    wanted = stat.S_ISGID | 0o770
    if policy == "OnRootMismatch" and volume.stat().st_mode & wanted == wanted:
        return
    for path in (volume, *volume.rglob("*")):
        path.chmod(path.stat().st_mode | (wanted if path.is_dir() else 0o660))


def test_spool_is_trusted_again_when_the_next_pod_has_its_volume(tmp_path: Path) -> None:
    security = dict(pods("base"))["gateway"]["securityContext"]
    assert security["fsGroup"] == security["runAsGroup"]  # who may write to a volume that is root's at first
    for _ in range(3):
        mount_as_kubelet(tmp_path, security.get("fsGroupChangePolicy", "Always"))
        open_directory(tmp_path / "spool").close()


EMPTY_PART, STORE_PART = (
    0.95,
    0.75,
)  # of a volume that is free in a new ext4; of that, what nats-server gives to streams


def test_streams_of_a_queue_find_room_on_the_volume_of_a_nats_server() -> None:
    (servers,) = (resource for resource in resources("async") if resource["kind"] == "StatefulSet")
    (claim,) = servers["spec"]["volumeClaimTemplates"]
    volume_bytes = parse_positive_size(claim["spec"]["resources"]["requests"]["storage"] + "B")
    with Cluster() as cluster, System(settings={"queue_url": cluster.servers[0].url, "worker": "none"}):
        facts = wait_until(lambda: cluster.servers[0].ask("jsz"), SOON_S, "the server tells what it holds")
    assert 0 < facts["reserved_storage"] < volume_bytes * EMPTY_PART * STORE_PART


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_monitoring_may_reach_all_that_gateways_and_workers_count(overlay: str) -> None:
    for service in of_kubernetes(overlay):
        if service.program in ("gateway", "worker"):
            assert metrics_ports(service) <= ports_for_monitoring(overlay, service.name), service.name


def metrics_ports(service: Service) -> set[int]:
    """Return the ports at which a program, and the worker beside it, have metrics."""
    if service.program == "worker":
        return {parse_settings(worker.Settings, service.environment).metrics_port}
    settings = parse_settings(gateway.Settings, service.environment)
    return {settings.metrics_port, *([settings.local_worker_metrics_port] if settings.runs_worker else [])}


def ports_for_monitoring(overlay: str, app: str) -> set[int]:
    (policy,) = (
        resource["spec"]
        for resource in resources(overlay)
        if resource["kind"] == "NetworkPolicy" and resource["spec"]["podSelector"] == {"matchLabels": {"app": app}}
    )
    source = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    return {each["port"] for rule in policy["ingress"] if rule.get("from") == [source] for each in rule["ports"]}


def test_workers_in_kubernetes_call_through_the_gateway_as_nothing_else_may_reach_functions() -> None:
    (one,) = (service for service in of_kubernetes("async") if service.program == "worker")
    assert one.environment.get("invoke") == "gateway"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_gateway_may_reach_functions(overlay: str) -> None:
    (policy,) = (
        resource
        for resource in resources(overlay)
        if resource["kind"] == "NetworkPolicy" and resource["metadata"]["namespace"] == "faashound-functions"
    )
    assert policy["spec"]["podSelector"] == {}
    ((source,),) = [rule["from"] for rule in policy["spec"]["ingress"]]
    assert source["podSelector"] == {"matchLabels": {"app": "gateway"}}
    assert source["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "faashound"}}


@pytest.mark.parametrize("path", ["nats.conf", "kubernetes/async/nats.conf"])
def test_nats_accepts_its_configuration(path: str) -> None:
    said([tool("nats-server"), "-t", "--config", str(DEPLOY / path)], environment=os.environ | {"POD_NAME": "nats-0"})


# systemd.


@pytest.fixture(scope="session")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units in a directory of their own, with the programs where this environment has them."""
    directory = tmp_path_factory.mktemp("units")
    for name in UNITS:
        text = (DEPLOY / "systemd" / name).read_text(encoding="utf-8")
        (directory / name.replace("@.", "@9001.")).write_text(re.sub(r"/opt/faashound/bin/\w+", sys.executable, text))
    return directory


def test_systemd_accepts_the_units(units: Path) -> None:
    said([tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", *map(str, units.iterdir())])


@pytest.mark.parametrize("name", [name for name in UNITS if name.endswith(".service")])
def test_systemd_finds_the_services_hardened(units: Path, name: str) -> None:
    unit = str(units / name.replace("@.", "@9001."))
    threshold = f"--threshold={round(EXPOSURE_AT_MOST * 10)}"
    said([tool("systemd-analyze"), "security", "--offline=true", "--no-pager", threshold, unit])


@pytest.mark.parametrize("name", ["faashound-gateway.service", "faashound-worker.service"])
def test_services_with_a_spool_run_as_a_user_that_an_operator_can_be(name: str) -> None:
    """The directory of a dynamic user is below one that only root may enter, and a spool is for its owner alone."""
    lines = (DEPLOY / "systemd" / name).read_text(encoding="utf-8").splitlines()
    assert {"User=faashound", "StateDirectory=faashound"} <= set(lines)
    assert not any(line.startswith("DynamicUser=") for line in lines)
