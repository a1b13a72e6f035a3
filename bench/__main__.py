"""Measure everything that has a target, in one command, on this machine's loopback.

    python -m bench                                   # all, about ten minutes
    python -m bench --quick --only watchdog,large     # less
    python -m bench --peer /path/to/fwatchdog --peer-gateway http://127.0.0.1:9090

Prints a table of figures, each the median of its rounds, with the targets, and writes it all as JSON.  A peer is any
watchdog that honours `port` and `fprocess`; a peer gateway is any that answers 202 to POST /async-function/cat, and is
started by you.  Every run of load is bounded, nothing is sent anywhere but to 127.0.0.1 or a peer gateway on it.
The exit status is 1 if a target was missed, 2 if something is lacking to measure with.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from .functions import measure_functions
from .gateways import measure_claim, measure_drain, measure_enqueue, measure_gateway_workers, measure_idle, measure_sync
from .latency import measure_callbacks, measure_mixed
from .limit import prepare_limit
from .load import NoLoadGenerator, check_load_generator, write_script
from .modes import measure_modes
from .programs import parse_peer
from .report import Report, describe_machine
from .watchdogs import (
    MIB,
    Plan,
    measure_calls,
    measure_large,
    measure_prewarm,
    measure_start,
    measure_workers,
)

MEASUREMENTS: dict[str, Callable[[Plan, Report], None]] = {
    "watchdog": measure_calls,
    "start": measure_start,
    "prewarm": measure_prewarm,
    "large": measure_large,
    "sync": measure_sync,
    "enqueue": measure_enqueue,
    "drain": measure_drain,
    "claim": measure_claim,
    "callbacks": measure_callbacks,
    "mixed": measure_mixed,
    "idle": measure_idle,
    "workers": measure_workers,
    "gateway-workers": measure_gateway_workers,
    "functions": measure_functions,
    "modes": measure_modes,
}


def parse_names(text: str) -> list[str]:
    """Return the measurements that a list with commas names; ArgumentTypeError for one that does not exist."""
    names = text.split(",")
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no measurement {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    return names


def parse_loopback_url(text: str) -> str:
    """Return an http URL of this machine's loopback; load is sent nowhere else."""
    parts = urlsplit(text)
    host = parts.hostname or ""
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if parts.scheme != "http" or not loopback:
        raise argparse.ArgumentTypeError(f"{text}: allowed: http:// and a loopback address")
    return text.rstrip("/")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure faashound on this machine.")
    parser.add_argument(
        "--only",
        type=parse_names,
        default=list(MEASUREMENTS),
        metavar="NAMES",
        help=f"some of {','.join(MEASUREMENTS)}",
    )
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="another watchdog; repeatable")
    parser.add_argument(
        "--peer-gateway",
        action="append",
        default=[],
        type=parse_loopback_url,
        metavar="URL",
        help="another gateway, running; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="short rounds, few calls: to see that it works")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (5; 1 with --quick)")
    parser.add_argument("--seconds", type=int, help="seconds of each run of load (2; 1 with --quick)")
    parser.add_argument("--queued", type=int, help="calls in the full spool (1000000; 20000 with --quick)")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="PATH", help="where JSON goes")
    return parser.parse_args(argv)


def build_plan(arguments: argparse.Namespace, directory: Path) -> Plan:
    """Return the plan that the arguments ask for, its tools prepared in `directory`."""
    quick = arguments.quick
    return Plan(
        rounds_count=arguments.rounds or (1 if quick else 5),
        seconds=arguments.seconds or (1 if quick else 2),
        queued_count=arguments.queued or (20_000 if quick else 1_000_000),
        large_bytes=(32 if quick else 256) * MIB,
        calls_count=500 if quick else 4000,
        peers=tuple(parse_peer(command) for command in arguments.peer),
        peer_gateways=tuple(arguments.peer_gateway),
        directory=directory,
        script=write_script(directory),
        limit=prepare_limit(directory),
    )


def main(argv: Sequence[str]) -> int:
    """Measure and return the exit status."""
    arguments = parse_arguments(argv)
    try:
        check_load_generator()
    except NoLoadGenerator as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="faashound-bench-") as name:
        directory = Path(name)
        plan, report = build_plan(arguments, directory), Report(describe_machine(directory))
        report.begin()
        for measurement in arguments.only:
            MEASUREMENTS[measurement](plan, report)
        report.end(arguments.json)
    return 1 if any(figure.holds is False for figure in report.figures) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
