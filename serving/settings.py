"""The gateway's settings: one row for each variable that an operator can set.

    settings = parse_settings(Settings, os.environ)          # BadSettings names every bad variable

Contract: `--help`, docs/settings.md and the messages about bad values are all made from these rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..calls.names import DEFAULT_NAMESPACE, parse_namespaces
from ..functions.exposure import PAGES, SANDBOX
from ..functions.table import parse_function_url
from ..network.hosts import parse_hosts
from ..queues.settings import SharedSettings, parse_positive_size
from ..watchdog import (
    CONNECTIONS_DEFAULT,
    CONNECTIONS_HELP,
    PER_ADDRESS_DEFAULT,
    PER_ADDRESS_HELP,
    WORKERS_HELP,
    format_duration,
    parse_bool,
    parse_choice,
    parse_duration,
    parse_port,
    parse_positive_count,
    parse_positive_duration,
    parse_size,
    parse_text,
    parse_workers,
    setting,
)
from .browsers import parse_origins

WORKER_METRICS_PORT = 8083


@dataclass(frozen=True, slots=True)
class Settings(SharedSettings):
    """What the operator asked of this gateway; see `watchdog.settings_table`."""

    host: str | None = setting("host", "127.0.0.1", parse_text, "address to listen on; 0.0.0.0 serves others")
    port: int = setting("port", "8080", parse_port, "port to listen on; 0 picks a free one and logs it")
    metrics_port: int = setting("metrics_port", "8082", parse_port, "port of /metrics; 0 disables it")
    read_timeout_s: float = setting(
        "read_timeout", "60s", parse_positive_duration, "time to receive a whole request, from its first byte"
    )
    write_timeout_s: float = setting(
        "write_timeout",
        "60s",
        parse_positive_duration,
        "time to send a whole response, from its first byte; after an Upgrade, for either side to take what is sent",
    )
    upstream_timeout_s: float = setting(
        "upstream_timeout",
        "60s",
        parse_positive_duration,
        "time a caller waits for a function, and of silence on both sides after an Upgrade; calls of a worker have no"
        " limit",
    )
    functions: str = setting("functions", "functions.toml", parse_text, "path of the functions file")
    function_url: str | None = setting(
        "function_url",
        "",
        parse_function_url,
        "where functions answer that the file does not list: http://{name}.{namespace}.svc.cluster.local:8080",
    )
    namespaces: frozenset[str] = setting(
        "namespaces", DEFAULT_NAMESPACE, parse_namespaces, "namespaces in which function_url finds functions, by commas"
    )
    worker: str | None = setting(
        "worker",
        "",
        parse_choice("local", "none"),
        "local: run a worker beside the gateway",
        default_note="local with a spool, else none",
    )
    max_connections: int | None = setting(
        "max_connections", "", parse_positive_count, CONNECTIONS_HELP, default_note=CONNECTIONS_DEFAULT
    )
    max_connections_per_address: int | None = setting(
        "max_connections_per_address", "", parse_positive_count, PER_ADDRESS_HELP, default_note=PER_ADDRESS_DEFAULT
    )
    workers: int = setting("workers", "1", parse_workers, WORKERS_HELP)
    max_body_bytes: int = setting(
        "max_body", "512MiB", parse_positive_size, "largest body of an asynchronous call, above it 413"
    )
    worker_metrics_port: int | None = setting(
        "worker_metrics_port",
        "",
        parse_port,
        "port of the local worker's /metrics; 0 disables it",
        default_note="8083, or 0 if metrics_port is 0",
    )
    max_delay_s: float = setting("max_delay", "744h", parse_positive_duration, "longest X-Delay, above it 400")
    max_queued: int = setting(
        "max_queued",
        "1000000",
        parse_positive_count,
        "calls of one function that may wait or run, above it 429",
    )
    max_queued_bytes: int = setting(
        "max_queued_bytes", "16GiB", parse_positive_size, "bytes of payload that they may have, above it 507"
    )
    max_queue_age_s: float = setting(
        "max_queue_age", "744h", parse_positive_duration, "how long a call may be due and not be run; then it expires"
    )
    keep_dead_s: float = setting(
        "keep_dead", "2160h", parse_positive_duration, "how long dead letters and undelivered results are kept"
    )
    keep_dead_bytes: int = setting(
        "keep_dead_bytes", "4GiB", parse_positive_size, "how many bytes of them are kept, the newest first"
    )
    keep_results_s: float | None = setting(
        "keep_results",
        "",
        parse_duration,
        "how long a result can be fetched",
        default_note="1h, or retention if shorter",
    )
    retention_s: float = setting("retention", "24h", parse_duration, "how long a finished call is remembered")
    allowed_hosts: frozenset[str] | None = setting(
        "allowed_hosts",
        "",
        parse_hosts,
        "host names that we answer to, by commas, besides localhost and addresses",
        default_note="none on loopback, else any",
    )
    allowed_origins: frozenset[bytes] | None = setting(
        "allowed_origins",
        "",
        parse_origins,
        "origins of web pages that may call functions, by commas",
        default_note="none on loopback, else as functions say",
    )
    max_long_polls: int = setting(
        "max_long_polls", "1000", parse_positive_count, "callers that wait for a call by ?wait= at once; above it 503"
    )
    state: str = setting(
        "state", "./state", parse_text, "directory of what the gateway keeps besides the queue: deployments, counts"
    )
    logs_keep_bytes: int = setting(
        "logs_keep",
        "16MiB",
        parse_size,
        "lines kept of each function that is run here; 0: they are in our own log alone",
    )
    deploy: str = setting(
        "deploy", "off", parse_choice("off", "process"), "process: functions are deployed over HTTP, and run as we are"
    )
    limits: str = setting(
        "limits",
        "refuse",
        parse_choice("refuse", "ignore"),
        "what to do with a deployment that has limits, which we do not keep",
    )
    schedules: str = setting(
        "schedules", "on", parse_choice("on", "off"), "on: functions are called by the schedules in their annotations"
    )
    function_pages: str = setting(
        "function_pages",
        SANDBOX,
        parse_choice(*PAGES),
        "what web pages of functions may do in a browser; trust: all that this gateway's own page may",
    )
    ui: str = setting("ui", "on", parse_choice("on", "off"), "on: a page to look at, /ui/, shows what the gateway does")
    basic_auth: bool = setting(
        "basic_auth", "false", parse_bool, "ask for a password for /system and for reading and cancelling calls"
    )
    secret_mount_path: str = setting(
        "secret_mount_path",
        "/run/secrets",
        parse_text,
        "directory of basic-auth-user and basic-auth-password, and of basic-auth-users with their hashes and roles",
    )

    def conflicts(self) -> Iterable[str]:
        """Yield a line for each pair of settings that cannot both be meant."""
        if self.port and self.port == self.metrics_port:
            yield f"metrics_port={self.metrics_port} contradicts port={self.port}; allowed: two different ports"
        yield from SharedSettings.conflicts(self)
        port = self.local_worker_metrics_port
        if self.runs_worker and port and port in (self.port, self.metrics_port):
            yield f"worker_metrics_port={port} contradicts port or metrics_port; allowed: one of its own"
        if self.results_kept_s > self.retention_s:
            yield (
                f"keep_results is longer than retention={format_duration(self.retention_s)}; allowed: up to retention,"
                " which forgets the call"
            )
        if len(self.namespaces) > 1 and self.function_url and "{namespace}" not in self.function_url:
            yield (
                f"function_url={self.function_url} finds the same functions in each of the namespaces; allowed: one"
                " namespace, or {namespace} in function_url"
            )

    @property
    def results_kept_s(self) -> float:
        """How long a result can be fetched."""
        return min(3600.0, self.retention_s) if self.keep_results_s is None else self.keep_results_s

    @property
    def runs_worker(self) -> bool:
        """Whether a worker is to run beside the gateway."""
        return isinstance(self.queue_url, Path) if self.worker is None else self.worker == "local"

    @property
    def local_worker_metrics_port(self) -> int:
        """The port of the local worker's /metrics; 0: it has none."""
        if self.worker_metrics_port is not None:
            return self.worker_metrics_port
        return WORKER_METRICS_PORT if self.metrics_port else 0
