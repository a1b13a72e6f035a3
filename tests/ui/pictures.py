"""Makes the pictures of the README: `python -m tests.ui.pictures`, after a change of how the page looks.

They show the functions of examples/, called by this program, and one that fails.  The hour before is made up, or a
picture would take an hour; it is put where a gateway finds the figures of its last life.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from pathlib import Path

from faashound.serving.figures import BUCKETS_COUNT
from testkit.browser import Browser
from testkit.harness import ROOT
from tests.ui.kit import Shown

PICTURES = ROOT / "docs" / "pictures"
SIZE = 1080, 680
INVOICE = """
[invoice]
fprocess = "sh -c 'echo asking the ledger for order 4711 >&2; echo ledger: connection refused >&2; exit 1'"
combine_output = false
"""
RATES = {"cat": 34.0, "wordcount": 17.0, "env": 6.0, "slow": 2.0, "invoice": 3.0}  # calls a minute


def made_up_hour(now_s: float) -> dict[str, object]:
    """Return the figures of a gateway that has been up for an hour, with some trouble a while ago."""
    chance = random.Random(7)
    last = int(now_s // 60)
    minutes: dict[int, dict[str, list[int]]] = {}
    for minute in range(last - 59, last):
        swing = 1 + 0.35 * math.sin((minute - last) / 9)
        trouble = 18 < last - minute < 25
        minutes[minute] = {}
        for name, rate in RATES.items():
            calls = max(int(chance.gauss(rate * swing, rate / 7)), 0)
            failed = calls if name == "invoice" and trouble else int(name == "invoice" and chance.random() < 0.2)
            first = 10 if name == "slow" else 1
            buckets = [0] * BUCKETS_COUNT
            for _ in range(calls):
                buckets[min(first + int(chance.expovariate(0.9)), BUCKETS_COUNT - 2)] += 1
            minutes[minute][f"{name}.openfaas-fn"] = [min(failed, calls), *buckets]
    depths = []
    for at_s in range(int(now_s) - 3590, int(now_s), 10):
        hill = math.exp(-(((now_s - at_s) / 60 - 20) ** 2) / 14)
        waiting = max(int(chance.gauss(3 + 46 * hill, 1.5)), 0)
        depths.append([at_s, waiting, min(waiting, 4), round(max(chance.gauss(1 + 70 * hill, 1), 0), 1)])
    return {"since_s": now_s - 3595, "life": "", "minutes": minutes, "depths": depths, "gateway": {}, "worker": {}}


def make(directory: Path) -> None:
    """Start a system, use it, and keep two pictures of its page."""
    functions = (ROOT / "examples" / "functions.toml").read_text(encoding="utf-8")
    functions = functions.replace("examples/", f"{ROOT}/examples/") + INVOICE
    state = directory / "state"
    state.mkdir(mode=0o700)
    (state / "history.json").write_text(json.dumps(made_up_hour(time.time())))
    with Shown(functions, {"state": str(state), "max_retry_attempts": "3", "deploy": "process"}) as system:
        for number in range(30):
            name = ("cat", "wordcount", "cat", "env")[number % 4]
            system.request("POST", f"/function/{name}", b"so much depends upon a red wheel barrow")
        for number in range(3):
            order = json.dumps({"order": 4711 + number, "customer": "Miriam", "total": "38.50"})
            failed = system.submit("invoice", order.encode(), {"Content-Type": "application/json"})
            system.ended(failed)
            system.ended(system.submit("cat", order.encode()))
        system.submit("slow", b"60")
        with Browser(*SIZE) as browser:
            browser.open(system.url)
            browser.find("svg.chart")
            browser.see("Live", "#link")
            browser.picture(PICTURES / "overview.png")
            browser.open(f"{system.url}#/calls/{failed}")
            browser.see("ledger: connection refused", "pre.log")
            browser.picture(PICTURES / "call.png")
            browser.open("about:blank")


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
