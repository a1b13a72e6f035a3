"""The worker as its operator sees it: settings, help, health and metrics."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.harness import free_port, http_request, run, wait_until
from testkit.system import (
    SIGNING_SECRET,
    System,
    Worker,
)

# Settings


def test_worker_names_every_bad_setting() -> None:
    ended = run("worker", settings={"max_inflight": "0", "backoff": "fast", "callback_allow": "a b", "ack_wait": "0"})
    assert ended.returncode == 2
    for name in ("max_inflight='0'", "backoff='fast'", "callback_allow='a b'", "ack_wait='0'"):
        assert name in ended.stderr


@pytest.mark.parametrize(
    ("text", "told"), [("short", "line 1"), (f"{SIGNING_SECRET}\na.example whsec_%%%", "line 2"), ("", "no secret")]
)
def test_worker_refuses_a_bad_secret_without_showing_it(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "secret").write_text(text)
    settings = {"callback_secret_file": str(tmp_path / "secret"), "queue_url": f"spool:{tmp_path}/spool"}
    ended = run("worker", settings=settings | {"metrics_port": "0"})
    assert ended.returncode == 1
    assert told in ended.stderr
    assert not text or text.split()[-1] not in ended.stderr


def test_worker_shows_version_and_help() -> None:
    assert run("worker", ["--version"]).stdout.startswith("faashound ")
    assert "drain_timeout" in run("worker", ["--help"]).stdout
    assert run("worker", ["--what"]).returncode == 2


def test_worker_answers_healthz_and_metrics() -> None:
    port = free_port()
    with System(settings={"worker": "none"}) as system, Worker(system, {"metrics_port": str(port)}):
        call_id = str(uuid.uuid4())
        system.ended(system.submit("cat", b"", {"X-Call-Id": call_id}))
        assert http_request(port, "GET", "/healthz").text == "OK"
        assert http_request(port, "HEAD", "/healthz").status == 200
        assert http_request(port, "GET", "/").text == "only /metrics and /healthz are here\n"
        assert http_request(port, "POST", "/healthz").status == 405
        idle = 'worker_in_flight{kind="call"} 0.0'  # a moment after its end is known
        wait_until(lambda: idle in http_request(port, "GET", "/metrics").text, 15, "nothing in flight")
        text = http_request(port, "GET", "/metrics").text
    assert 'worker_attempts_total{function_name="cat.openfaas-fn",outcome="200"} 1.0' in text


@pytest.mark.parametrize("path", ["/metrics", "/healthz"])
@pytest.mark.parametrize(
    ("host", "status"),
    [("rebound.example", 421), ("localhost", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("worker.internal", 200)],
)
def test_status_port_on_loopback_answers_to_no_name_that_is_not_ours(
    status_port: int, path: str, host: str, status: int
) -> None:
    """A page whose name has been made to resolve to this machine is of the same origin as whatever answers it."""
    assert http_request(status_port, "GET", path, {"Host": host}).status == status


@pytest.fixture(scope="module")
def status_port(system: System) -> Iterator[int]:
    """Return the status port of a worker that one more name is allowed for."""
    port = free_port()
    with Worker(system, {"metrics_port": str(port), "allowed_hosts": "worker.internal"}):
        yield port


@pytest.mark.parametrize("url", ["http://gateway:0", "http://a!b", "http://1.2.3.4.5", "http://h/?a", "h:80"])
def test_worker_refuses_an_address_of_the_gateway_that_is_none(url: str) -> None:
    ended = run("worker", settings={"gateway_url": url})
    assert ended.returncode == 2
    assert f"gateway_url='{url}': " in ended.stderr
    assert "allowed: " in ended.stderr
    assert "callback" not in ended.stderr
