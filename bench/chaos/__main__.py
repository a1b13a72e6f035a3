"""The command `python -m bench.chaos`."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.chaos.faults import strikes_until
from bench.chaos.run import run_chaos


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.chaos", description="Break everything under load; see bench/chaos/__init__.py."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults are injected; default 10")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="default: a random one")
    parser.add_argument("--rate", type=float, default=30.0, help="calls a second; default 30")
    parser.add_argument("--workers", type=int, default=1, help="processes of the gateway; default 1")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background of a shell: nothing is to be left running
        signal.signal(number, signal.default_int_handler)
    plan = f"{options.minutes:g} minutes, {options.rate:g} calls a second, {options.workers} workers of the gateway"
    print(f"seed {options.seed}, {plan}", flush=True)
    deadline_s = time.monotonic() + 60 * options.minutes
    strikes = strikes_until(deadline_s, random.Random(options.seed), several=options.workers > 1)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as directory:
        verdict = run_chaos(Path(directory), options.seed, strikes, options.rate, workers_count=options.workers)
    print(f"\n{verdict.ledger}\n")
    for problem in verdict.problems:
        print(problem, file=sys.stderr)
    if verdict.problems:
        print(f"seed {options.seed}: {len(verdict.problems)} broken promises\n{verdict.log}", file=sys.stderr)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
